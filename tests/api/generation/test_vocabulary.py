"""The bytes of single tokens against decoding all of them at once, and their names: no two tokens share one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from service.api.generation.detokenizer import Detokenizer
from service.api.generation.vocabulary import Vocabulary
from tests.support.fake_engine import build_tokenizer
from tests.support.sentencepiece_like import build_sentencepiece

DEMO = Path(__file__).parents[3] / "model_store" / "demo" / "base" / "tokenizer.json"
TEXTS = ["a b", " a  b\n", "🙂 ab é 日本", "a\u2028b\x85", "\t\x00", "ab ab  ab", "<0x0A> <s"]
BUILDERS = {
    "demo": lambda: Tokenizer.from_file(str(DEMO)),
    "byte level": build_tokenizer,
    "sentencepiece": build_sentencepiece,
    "metaspace": lambda: build_sentencepiece(metaspace=True),
}


@pytest.fixture(params=BUILDERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return BUILDERS[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_joined_bytes_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    """After a prompt, and at the beginning, where a tokenizer may drop a space."""
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer.encode(text).ids
    for prompt in ([], tokenizer.encode("b").ids):
        detokenizer = Detokenizer(tokenizer, vocabulary, prompt)
        joined, content = b"", ""
        for id in ids:
            joined += vocabulary.bytes_of(id, at_start=detokenizer.at_start)
            content += detokenizer.push(id)
        assert joined == (content + detokenizer.flush()).encode()


@pytest.mark.parametrize("name", ["demo", "byte level"])
def test_every_token_of_a_byte_level_vocabulary(name: str) -> None:
    """In random order, so that characters are cut anywhere."""
    tokenizer = BUILDERS[name]()
    vocabulary = Vocabulary(tokenizer)
    ids = list(range(tokenizer.get_vocab_size()))
    for seed in range(20):
        random.Random(seed).shuffle(ids)
        joined = b"".join(map(vocabulary.bytes_of, ids))
        assert joined.decode(errors="replace") == tokenizer.decode(ids)
    assert sum(len(vocabulary.bytes_of(id)) == 1 for id in ids) == 256


@pytest.mark.parametrize("metaspace", [False, True])
def test_every_token_of_a_sentencepiece_vocabulary(metaspace: bool) -> None:
    tokenizer = build_sentencepiece(metaspace=metaspace)
    vocabulary = Vocabulary(tokenizer)
    for byte in range(256):
        assert vocabulary.bytes_of(tokenizer.token_to_id(f"<0x{byte:02X}>")) == bytes([byte])
    ordinary = [id for token, id in tokenizer.get_vocab().items() if not token.startswith("<")]
    first = tokenizer.token_to_id("b")
    for seed in range(20):
        random.Random(seed).shuffle(ordinary)
        assert b"".join(map(vocabulary.bytes_of, [first, *ordinary])) == tokenizer.decode([first, *ordinary]).encode()
    assert list(vocabulary.bytes_of(tokenizer.token_to_id("▁a"))) == [32, 97]


def test_no_two_tokens_share_a_name(tokenizer: Tokenizer) -> None:
    """Nor do ids without a token, of which there are some behind many vocabularies."""
    vocabulary = Vocabulary(tokenizer)
    ids = range(tokenizer.get_vocab_size() + 20)
    assert len({vocabulary.name(id) for id in ids}) == len(ids)


def test_names() -> None:
    smiley, accent = "🙂", build_tokenizer().encode("é").ids
    level, pieces = Vocabulary(build_tokenizer()), Vocabulary(build_sentencepiece())
    [first, *_] = build_tokenizer().encode(smiley).ids
    assert (level.name(first), list(level.bytes_of(first))) == ("bytes:\\xf0", [240])
    assert [level.name(id) for id in accent] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert (level.name(258), level.bytes_of(258), level.name(999)) == ("<|end|>", b"", "token_id:999")
    id_of = build_sentencepiece().token_to_id
    assert (pieces.name(id_of("▁a")), pieces.name(id_of("a"))) == (" a", "a")
    assert (pieces.name(id_of("<0x0A>")), pieces.bytes_of(id_of("<0x0A>"))) == ("\n", b"\n")
    assert pieces.name(id_of("<0x61>")) == f"token_id:{id_of('<0x61>')}"  # "a" has that name
    assert pieces.bytes_of(id_of("<0x61>")) == b"a"
    assert (pieces.name(id_of("</s>")), pieces.bytes_of(id_of("</s>"))) == ("</s>", b"")


def test_another_kind_of_decoder_is_asked() -> None:
    tokens = ["[UNK]", "once", "upon", "##time", "##s"]
    tokenizer = Tokenizer(models.WordPiece({token: id for id, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.decoder = decoders.WordPiece()
    vocabulary = Vocabulary(tokenizer)
    assert [vocabulary.bytes_of(id) for id in range(1, 5)] == [b" once", b" upon", b"time", b"s"]
    tokenizer.decoder = None
    assert Vocabulary(tokenizer).bytes_of(2) == b" upon"
