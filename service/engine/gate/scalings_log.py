"""The engine's half of the scalings log: gate logits wait with their sequence until their positions are final, then
with those of other sequences and steps until enough are together; they leave once.

What leaves is what the classifier said (after softmax, before top-k and steering) of positions of generated text whose
rows were computed while the log was on. So there is nothing of positions found in the prefix cache, of fixed gates, of
positions behind a frozen gate (no classifier ran), of drafts that missed, nor of scaling passes and scores alone; a
position computed again after a preemption is not logged again.

Who keeps the log, within which bounds, is the API's business (api/gate_views/scalings_log.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from service.contract.output import LoggedRows
from service.engine.sequence import Sequence
from service.model.classifier import Classifier

# A softmax, a message and a write of the log cost nearly the same for one row as for dozens.
_STEPS_TOGETHER = 8
_ROWS_TOGETHER = 256  # no more steps than these fill: they hold memory

Rows = npt.NDArray[np.float32]  # [n, S, E]


def keep(sequence: Sequence, start: int, logits: Rows) -> None:
    """Takes the gate logits of positions start .. start + n; later ones were of drafts that missed."""
    kept = sequence.unlogged
    while kept and kept[-1][0] >= start:
        kept.pop()
    if kept and kept[-1][0] + len(kept[-1][1]) > start:
        first, earlier = kept.pop()
        kept.append((first, earlier[: start - first]))
    kept.append((start, logits))


class Outgoing:
    """Gate logits of final positions, until enough are together."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._parts: dict[tuple[str, int], list[tuple[int, Rows]]] = {}  # by request and choice: start, gate logits
        self._rows = self._steps = 0

    def collect(self, sequence: Sequence, end: int) -> None:
        """Takes what has become final of a sequence since the last time: positions before `end`."""
        if not sequence.unlogged:
            return
        kept, sequence.unlogged = sequence.unlogged, []
        parts = self._parts.setdefault((sequence.request.id, sequence.index), [])
        for start, logits in kept:
            first, last = max(start, sequence.logged), min(start + len(logits), end)
            if first < last:
                parts.append((first, logits[first - start : last - start]))
                self._rows += last - first
            if start + len(logits) > end:
                sequence.unlogged.append((max(start, end), logits[max(0, end - start) :]))
        sequence.logged = max(sequence.logged, end)

    def take(self, *, everything: bool) -> list[LoggedRows]:
        """Once a step: what the classifier says by what was collected, where that is enough or `everything`."""
        self._steps += 1
        if not (everything or self._steps >= _STEPS_TOGETHER or self._rows >= _ROWS_TOGETHER):
            return []
        taken, rows = self._parts, self._rows
        self._parts, self._rows, self._steps = {}, 0, 0
        if not rows:
            return []
        gate_logits = np.concatenate([logits for parts in taken.values() for _, logits in parts])
        said = self._classifier.before_top_k(torch.from_numpy(gate_logits)).numpy()
        logged: list[LoggedRows] = []
        end = 0
        for (request_id, index), parts in taken.items():
            for start, count in _runs(parts):
                begin, end = end, end + count
                logged.append(LoggedRows(request_id, index, start, count, said[begin:end].tobytes()))
        return logged


def _runs(parts: list[tuple[int, Rows]]) -> Iterator[tuple[int, int]]:
    """First position and number of what is consecutive."""
    start = count = 0
    for first, logits in parts:
        if first != start + count:
            if count:
                yield start, count
            start, count = first, 0
        count += len(logits)
    if count:
        yield start, count
