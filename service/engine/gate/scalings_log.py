"""The engine's half of the scalings log: buffers gate logits until their positions are final, then in batches, and
sends every position once.

Logged are the classifier's weights (after softmax, before top-k and steering) of positions of generated text whose
scaling rows were computed while the log was on. That leaves out positions found in the prefix cache, fixed gates,
positions behind a frozen gate (no classifier ran), wrong drafts, and requests that only scale or score. A position
that is computed again after a preemption is not logged again.

The log itself and its bounds are the API's (api/gate_views/scalings_log.py).
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
_MAX_BUFFERED_STEPS = 8
_MAX_BUFFERED_ROWS = 256  # bounds the memory

Rows = npt.NDArray[np.float32]  # [n, S, E]


def keep(sequence: Sequence, start: int, logits: Rows) -> None:
    """Buffers the gate logits of positions start .. start + n with their sequence. Any later ones that it holds are of
    drafts that were wrong, and are discarded.
    """
    kept = sequence.unlogged
    while kept and kept[-1][0] >= start:
        kept.pop()
    if kept and kept[-1][0] + len(kept[-1][1]) > start:
        first, earlier = kept.pop()
        kept.append((first, earlier[: start - first]))
    kept.append((start, logits))


class LogBuffer:
    """Gate logits of final positions, until there are enough for a message."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._parts: dict[tuple[str, int], list[tuple[int, Rows]]] = {}  # by request and choice: start, gate logits
        self._rows = self._steps = 0

    def collect(self, sequence: Sequence, end: int) -> None:
        """Takes a sequence's gate logits of positions before `end`, which have become final."""
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
        """Called once a step: the buffered rows after the classifier's softmax, if there are enough or `everything` is
        to go.
        """
        self._steps += 1
        if not (everything or self._steps >= _MAX_BUFFERED_STEPS or self._rows >= _MAX_BUFFERED_ROWS):
            return []
        taken, rows = self._parts, self._rows
        self._parts, self._rows, self._steps = {}, 0, 0
        if not rows:
            return []
        gate_logits = np.concatenate([logits for parts in taken.values() for _, logits in parts])
        weights = self._classifier.before_top_k(torch.from_numpy(gate_logits)).numpy()
        logged: list[LoggedRows] = []
        end = 0
        for (request_id, index), parts in taken.items():
            for start, count in _runs(parts):
                begin, end = end, end + count
                logged.append(LoggedRows(request_id, index, start, count, weights[begin:end].tobytes()))
        return logged


def _runs(parts: list[tuple[int, Rows]]) -> Iterator[tuple[int, int]]:
    """(first position, count) of each run of consecutive positions."""
    start = count = 0
    for first, logits in parts:
        if first != start + count:
            if count:
                yield start, count
            start, count = first, 0
        count += len(logits)
    if count:
        yield start, count
