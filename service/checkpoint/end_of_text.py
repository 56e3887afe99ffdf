"""The end-of-text tokens, by generation_config.json or config.json, and by the tokenizer.

Knows files and ids. An id outside the vocabulary ends nothing, here as in transformers, and causes a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.checkpoint.defects import Defects, defect
from service.checkpoint.weights.files import BundleRoot

GENERATION_FILE = "generation_config.json"
_FLAG = "--eos-from-tokenizer"


def read_eos_token_ids(
    root: BundleRoot,
    base: Path,
    config: Mapping[str, Any],
    vocabulary: int | None,
    named: tuple[str, int] | None,
    defects: Defects,
    *,
    from_tokenizer: bool,
) -> tuple[int, ...]:
    """The end-of-text ids. generation_config.json overrides config.json, as in transformers' generate. `named` is the
    tokenizer's eos token, which transformers ignores; with `from_tokenizer` it ends texts, too.

    Raises CheckpointError for ids that are no numbers, and if `from_tokenizer` needs a token that is missing.
    """
    source = base / "config.json"
    stated = read_ids(config.get("eos_token_id"), source, vocabulary)
    if (base / GENERATION_FILE).exists() and (own := root.json(base / GENERATION_FILE).get("eos_token_id")) is not None:
        source = base / GENERATION_FILE
        stated = read_ids(own, source, vocabulary)
    ids = tuple(id for id in stated if _is_token(id, vocabulary))
    for id in stated:
        if id not in ids:
            defects.warn(source, f"eos_token_id: {id} is no token of the model, and ends no text")
    if named is not None and not _is_token(named[1], vocabulary):
        named = None
    if from_tokenizer and named is None:
        raise defect(_FLAG, f"the tokenizer in {base} names no eos token of the model's vocabulary")
    if named is None or named[1] in ids:
        return ids
    if from_tokenizer:
        return (*ids, named[1])
    text = f"the tokenizer's eos token {named[0]!r} ({named[1]}) is not among the ids {list(ids)} that end a text"
    defects.warn(source, f"eos_token_id: {text}; {_FLAG} adds it")
    return ids


def read_ids(value: Any, source: Path, vocabulary: int | None) -> tuple[int, ...]:
    """`eos_token_id` as a tuple of ids. Raises CheckpointError for any that is no whole number."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for id in ids:
        if type(id) is not int:
            expected = "token ids" if vocabulary is None else f"token ids from 0 to {vocabulary - 1}"
            raise defect(source, f"eos_token_id: expected {expected}, found {id!r:.80}")
    return tuple(dict.fromkeys(ids))


def _is_token(id: int, vocabulary: int | None) -> bool:
    return id >= 0 and (vocabulary is None or id < vocabulary)
