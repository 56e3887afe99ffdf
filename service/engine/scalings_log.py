"""The engine's half of the scalings log: gate logits wait with their sequence until their positions are final; then
their rows leave, once, with those of other steps and sequences.

What leaves is what the classifier said (after softmax, before top-k and steering) of positions of generated text whose
rows were computed while the log was on. So there is nothing of positions found in the prefix cache, of fixed gates, of
positions behind a frozen gate (no classifier ran), of drafts that missed, nor of scaling passes and scores alone; a
position computed again after a preemption is not logged again.

Who keeps the log, within which bounds, is the API's business (api/scalings_log.py).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.engine.request import LoggedRows
from service.engine.sequence import Sequence

Rows = npt.NDArray[np.float32]  # [n, S, E]


@dataclass(slots=True)
class _Run:
    """Consecutive final positions of one sequence."""

    sequence: Sequence
    start: int
    count: int


def keep(sequence: Sequence, start: int, logits: Rows) -> None:
    """Takes the gate logits of positions start .. start + n; later ones were of drafts that missed."""
    kept = sequence.unlogged
    while kept and kept[-1][0] >= start:
        kept.pop()
    if kept and kept[-1][0] + len(kept[-1][1]) > start:
        first, earlier = kept.pop()
        kept.append((first, earlier[: start - first]))
    kept.append((start, logits))


def take_final(sequences: SequenceOf[Sequence], say: Callable[[Rows], Rows]) -> list[LoggedRows]:
    """Hands out what `say` makes of the kept logits of positions that are final and have not been logged."""
    runs: list[_Run] = []
    parts: list[Rows] = []
    for sequence in sequences:
        end, kept, sequence.unlogged = sequence.final, sequence.unlogged, []
        for start, logits in kept:
            first, last = max(start, sequence.logged), min(start + len(logits), end)
            if first < last:
                parts.append(logits[first - start : last - start])
                if not runs or runs[-1].sequence is not sequence or runs[-1].start + runs[-1].count != first:
                    runs.append(_Run(sequence, first, 0))
                runs[-1].count += last - first
            if start + len(logits) > end:
                sequence.unlogged.append((max(start, end), logits[max(0, end - start) :]))
        sequence.logged = max(sequence.logged, end)
    if not parts:
        return []
    said = say(np.concatenate(parts))  # a softmax costs nearly the same for one row as for dozens
    logged: list[LoggedRows] = []
    end = 0
    for run in runs:
        begin, end = end, end + run.count
        rows = said[begin:end].tobytes()
        logged.append(LoggedRows(run.sequence.request.id, run.sequence.index, run.start, run.count, rows))
    return logged
