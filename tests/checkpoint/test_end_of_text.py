"""Which tokens end a text: ids that are none, and an eos token that only the tokenizer names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.checkpoint import Overrides, describe, load_checkpoint
from service.contract.errors import CheckpointError
from tests.support.damage import set_json

CONFIG, GENERATION, TOKENIZER = "base/config.json", "base/generation_config.json", "base/tokenizer_config.json"
NO_TOKEN = "is no token of the model, and ends no text"


def loaded(bundle: Path, *, from_tokenizer: bool = False) -> tuple[tuple[int, ...], list[str]]:
    """Ids that end a text, and the warnings; those of `check` are the same."""
    lines: list[str] = []
    overrides = Overrides(eos_from_tokenizer=from_tokenizer)
    checkpoint = load_checkpoint(bundle, overrides=overrides, on_progress=lines.append)
    warnings = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    shown = [line.split(maxsplit=1)[1] for line in describe(checkpoint).splitlines() if line.startswith("warning")]
    assert shown == warnings
    return checkpoint.eos_token_ids, warnings


@pytest.mark.parametrize(
    ("stated", "ids", "warned"),
    [(1, (1,), []), ([1, 2, 1], (1, 2), []), ([1, 320], (1,), [320]), ([-1, 1], (1,), [-1]), (10**12, (), [10**12])],
)
@pytest.mark.parametrize("file", [CONFIG, GENERATION])
def test_ids_that_are_no_token_end_nothing(bundle: Path, file: str, stated: Any, ids: Any, warned: list[int]) -> None:
    for one in (CONFIG, GENERATION):
        set_json(one, eos_token_id=stated if one == file else None)(bundle)
    set_json(TOKENIZER, eos_token=None)(bundle)
    expected = [f"{bundle / file}: eos_token_id: {id} {NO_TOKEN}" for id in warned]
    assert loaded(bundle) == (ids, expected)


def test_none_in_generation_config_is_none(bundle: Path) -> None:
    """An empty list is no absence: config.json has an id."""
    set_json(GENERATION, eos_token_id=[])(bundle)
    set_json(TOKENIZER, eos_token=None)(bundle)
    assert json.loads((bundle / CONFIG).read_text())["eos_token_id"] == 1
    assert loaded(bundle) == ((), [])


@pytest.mark.parametrize("stated", [None, [], 7, [7, 8], -1])
def test_an_eos_token_that_only_the_tokenizer_names(bundle: Path, stated: Any) -> None:
    """Said once at load; the operator decides."""
    for file in (CONFIG, GENERATION):
        set_json(file, eos_token_id=stated)(bundle)
    ids, warnings = loaded(bundle)
    assert 1 not in ids
    assert "the tokenizer's eos token '</s>' (1) is not among the ids" in warnings[-1]
    assert warnings[-1].endswith("--eos-from-tokenizer adds it")
    with_it, others = loaded(bundle, from_tokenizer=True)
    assert with_it == (*ids, 1)
    assert others == warnings[:-1]


@pytest.mark.parametrize("named", [None, "<far>"])
def test_the_flag_wants_a_token(bundle: Path, named: str | None) -> None:
    """One that the tokenizer adds beyond the vocabulary is none of the model's."""
    set_json(TOKENIZER, eos_token=named)(bundle)
    assert loaded(bundle) == ((1,), [])
    with pytest.raises(CheckpointError, match=r"--eos-from-tokenizer: the tokenizer in .* names no eos token"):
        loaded(bundle, from_tokenizer=True)
