"""The demo's held-out questions, as token ids: what nobody has learned from, and answers that come to their end."""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.common import ROOT

sys.path.insert(0, str(ROOT / "model_store"))
from demo_builder.evaluation import held_out_sets

_SEED = 5  # of the demo's report
MAX_TOKENS = 256  # of an answer that does not end


def held_out_questions(model: Path, per_domain: int) -> list[list[int]]:
    """So many questions of each of the demo's domains, and at least one of each pair of domains."""
    tokenizer = Tokenizer.from_file(str(model / "base" / "tokenizer.json"))
    sets = held_out_sets(_SEED, per_domain)
    return [tokenizer.encode(turn.prompt).ids for turns in sets.values() for turn in turns]
