"""Tokens beyond the model's vocabulary: a grammar has the masks that it has without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from service.contract.request import GrammarSpec
from service.grammar import GrammarCompiler

EOS = 0
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789<>{}[]:,.-", '"', "\u2581"]
WORDS = ["th", "the", "an", "and"]  # and the halves of what is added below
PIECES = ["</s>", "<unk>", *LETTERS, *WORDS]
FORMS = [
    GrammarSpec(regex="<tool>[ab]{2}"),
    GrammarSpec(regex="(theand|[a-c]){1,3}"),
    GrammarSpec(grammar='start: "{" "\\"theand\\":" ("\\"<tool>\\"" | "\\"the\\"") "}"'),
]


def bpe(*more: str) -> Tokenizer:
    ids = {piece: id for id, piece in enumerate([*PIECES, *more])}
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d"), *([("the", "and")] if more else [])]
    return Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True))


def unigram(*more: str) -> Tokenizer:
    return Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate([*PIECES, *more])], unk_id=1))


def byte_level(*more: str) -> Tokenizer:
    pieces = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *WORDS, *more]
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d"), *([("the", "and")] if more else [])]
    tokenizer = Tokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def as_sentencepiece(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


KINDS: dict[str, Callable[..., Tokenizer]] = {
    "byte-level": byte_level,
    "BPE": lambda *more: as_sentencepiece(bpe(*more)),
    "Unigram": lambda *more: as_sentencepiece(unigram(*more)),
}


def masks(path: Path, tokenizer: Tokenizer | str, vocab_size: int, form: GrammarSpec) -> list[bytes]:
    """Those along a text that is chosen by the masks."""
    file = path / "tokenizer.json"
    file.write_text(tokenizer if isinstance(tokenizer, str) else tokenizer.to_str())
    cursor, found = GrammarCompiler(str(file), vocab_size, [EOS]).compile(form).start(), []
    for step in range(12):
        found.append(cursor.allowed())
        allowed = [id for id in range(vocab_size) if found[-1][id // 8] >> id % 8 & 1 and id != EOS]
        if not allowed:
            break
        cursor.accept(allowed[step % len(allowed)])
        if cursor.finished:
            break
    return found


@pytest.mark.parametrize("form", FORMS, ids=["regex", "choice", "schema"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("in_model", [True, False], ids=["in the model", "added"])
def test_masks_are_those_without_it(
    tmp_path: Path, kind: str, special: bool, in_model: bool, form: GrammarSpec
) -> None:
    """Even where the form leaves no choice but to write what the token says."""
    plain = KINDS[kind]()
    plain.add_special_tokens(["</s>"])
    expected = masks(tmp_path, plain, plain.get_vocab_size(), form)
    more = KINDS[kind](*(["theand"] if in_model else []))
    more.add_special_tokens(["</s>"])
    more.add_tokens([AddedToken("<tool>", special=special, normalized=False), AddedToken("theand", normalized=False)])
    assert more.get_vocab_size() == plain.get_vocab_size() + 2
    assert masks(tmp_path, more, plain.get_vocab_size(), form) == expected
    assert len(expected) > 2


@pytest.mark.parametrize("id", [900, 2**31])
def test_the_id_that_the_file_states_may_be_any(tmp_path: Path, id: int) -> None:
    """What counts is the one that the token gets, which is the next."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["</s>"])
    vocab_size = tokenizer.get_vocab_size()
    expected = masks(tmp_path, tokenizer, vocab_size, FORMS[0])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    content["added_tokens"].insert(0, {**content["added_tokens"][0], "content": "<tool>", "id": id})
    assert masks(tmp_path, json.dumps(content), vocab_size, FORMS[0]) == expected
