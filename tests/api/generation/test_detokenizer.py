"""Incremental detokenisation against decoding everything at once."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer

from service.api.generation.detokenizer import Detokenizer
from service.api.generation.vocabulary import Vocabulary
from tests.support.fake_engine import build_tokenizer
from tests.support.sentencepiece_like import build_sentencepiece
from tests.support.zoo import sentencepiece


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, Vocabulary(tokenizer))
    return [*(detokenizer.push(id) for id in ids), detokenizer.flush()]


TEXTS = [
    "plain",
    "naïve 🙂 zebra",
    "🙂🙂🙂" * 20,
    "日本語" * 30,
    "a\u0301e\u200d👩\u200d👩\u200d👧",
    "\ufffd is a character \ufffd",
]


@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_ever_split(tokenizer: Tokenizer, text: str) -> None:
    given = pieces(tokenizer, tokenizer.encode(text).ids)
    assert "".join(given) == text
    position = 0
    for piece in given:  # every piece is whole characters of the text
        assert text.startswith(piece, position)
        position += len(piece)


@pytest.mark.parametrize("text", [*TEXTS[:4], "a日本語 b", "🙂日é🙂" * 9])
@pytest.mark.parametrize("metaspace", [False, True])
def test_no_character_of_byte_tokens_is_ever_split(text: str, metaspace: bool) -> None:
    """Of tokenizers that decode bytes in a row all together, or not at all."""
    tokenizer = build_sentencepiece(metaspace=metaspace)
    given = pieces(tokenizer, tokenizer.encode(text).ids)
    assert "".join(given) == tokenizer.decode(tokenizer.encode(text).ids) == text
    assert not any("\ufffd" in piece for piece in given)
    assert max(map(len, given)) < 5


@pytest.mark.parametrize("prompt", ["日本", "🙂🙂", "a日本語"])
def test_a_prompt_of_byte_tokens_is_context(prompt: str) -> None:
    """Its last five may begin within a character; without it the answer would lose its first space."""
    tokenizer = build_sentencepiece()
    detokenizer = Detokenizer(tokenizer, Vocabulary(tokenizer), tokenizer.encode(prompt).ids)
    assert not detokenizer.at_start
    assert detokenizer.push(tokenizer.token_to_id("▁a")) == " a"


@pytest.mark.parametrize("metaspace", [False, True])
def test_endless_beginnings_of_characters_are_given_out(metaspace: bool) -> None:
    for tokenizer, token in ((build_sentencepiece(metaspace=metaspace), "<0xF0>"), (build_tokenizer(), "ð")):
        detokenizer = Detokenizer(tokenizer, Vocabulary(tokenizer))
        text = "".join(detokenizer.push(tokenizer.token_to_id(token)) for _ in range(500))
        assert len(text) > 480
        assert set(text + detokenizer.flush()) == {"\ufffd"}
        assert len(detokenizer._window) <= 17


def test_any_bytes_decode_as_they_do_at_once(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    good = tokenizer.encode("é🙂日x ").ids
    for length in [1, 2, 3, 17, 40, 200] * 20:
        ids = [generator.choice(good) if generator.random() < 0.6 else generator.randrange(258) for _ in range(length)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_endless_invalid_bytes_are_given_out_and_cost_no_more_than_others(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, Vocabulary(tokenizer))
    invalid = tokenizer.encode("é").ids[1]  # a continuation byte alone
    text = "".join(detokenizer.push(invalid) for _ in range(500))
    assert len(text) >= 497
    assert len(detokenizer._window) <= 17
    assert text + detokenizer.flush() == "\ufffd" * 500


def test_an_unfinished_character_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab🙂").ids[:-1]
    assert pieces(tokenizer, ids) == ["a", "b", "", "", "", "\ufffd"]


def test_special_tokens_have_no_text_even_within_a_character(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("é").ids
    assert "".join(pieces(tokenizer, [first, tokenizer.token_to_id("<|end|>"), second])) == "é"


def test_the_prompt_is_context_and_not_output(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, Vocabulary(tokenizer), tokenizer.encode("a long prompt").ids)
    assert "".join(detokenizer.push(id) for id in tokenizer.encode(" and more").ids) == " and more"


# -- bytes as tokens, of which a run is decoded as a whole ----------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_as_tokens() -> Tokenizer:
    """Nothing but letters in its vocabulary, and 256 bytes."""
    return sentencepiece()


@pytest.mark.parametrize("text", [*TEXTS, "éé" * 30, "日🙂é" * 20, "the 日本語 of the 🙂🙃 end é"])
def test_no_character_of_a_run_is_split_or_lost(bytes_as_tokens: Tokenizer, text: str) -> None:
    given = pieces(bytes_as_tokens, bytes_as_tokens.encode(text, add_special_tokens=False).ids)
    assert "".join(given) == text
    position = 0
    for piece in given:
        assert text.startswith(piece, position)
        position += len(piece)


def test_a_character_of_a_run_is_given_out_with_its_last_byte(bytes_as_tokens: Tokenizer) -> None:
    ids = bytes_as_tokens.encode("日🙂é", add_special_tokens=False).ids[1:]
    assert pieces(bytes_as_tokens, ids) == ["", "", "日", "", "", "", "🙂", "", "é", ""]


def test_an_unfinished_character_of_a_run_comes_out_at_the_end(bytes_as_tokens: Tokenizer) -> None:
    ids = bytes_as_tokens.encode("日本", add_special_tokens=False).ids[1:-1]
    assert pieces(bytes_as_tokens, ids)[-3:] == ["", "", "\ufffd\ufffd"]


def test_an_invalid_byte_in_a_run_holds_nothing_back_for_long(bytes_as_tokens: Tokenizer) -> None:
    """Every byte of its run is replaced from then on, as decoding at once does; what was given out stays."""
    ids = bytes_as_tokens.encode("日" * 200, add_special_tokens=False).ids[1:]
    ids[3] = bytes_as_tokens.token_to_id("<0xFF>")
    detokenizer = Detokenizer(bytes_as_tokens, Vocabulary(bytes_as_tokens))
    text = "".join(detokenizer.push(id) for id in ids)
    assert text.startswith("日\ufffd")
    assert len(text) > 190
    assert len(detokenizer._window) <= 17


@pytest.mark.parametrize("prompt", ["the 日本語", "日🙂", "é", "🙂"])
def test_a_space_after_a_run_in_the_prompt_is_kept(bytes_as_tokens: Tokenizer, prompt: str) -> None:
    """The prompt's last tokens may begin within a character."""
    detokenizer = Detokenizer(bytes_as_tokens, Vocabulary(bytes_as_tokens), bytes_as_tokens.encode(prompt).ids)
    ids = bytes_as_tokens.encode(" the end", add_special_tokens=False).ids[1:]
    assert bytes_as_tokens.decode(ids) == "the end"  # by itself
    assert "".join(map(detokenizer.push, ids)) == " the end"
