"""The engine's half of the scalings log: rows wait with their sequence until their positions are final, and leave once.

What leaves is what the classifier said (after softmax, before top-k and steering) of positions of generated text whose
rows were computed while the log was on. So there is nothing of positions found in the prefix cache, of fixed gates, of
positions behind a frozen gate (no classifier ran), of drafts that missed, nor of scaling passes and scores alone; a
position computed again after a preemption is not logged again.

Who keeps the log, within which bounds, is the API's business (api/scalings_log.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from service.engine.request import LoggedRows
from service.engine.sequence import Sequence


def keep(sequence: Sequence, start: int, rows: npt.NDArray[np.float32]) -> None:
    """Takes rows [n, S, E] of positions start .. start + n; later ones were of drafts that missed."""
    kept = sequence.unlogged
    while kept and kept[-1][0] >= start:
        kept.pop()
    if kept and kept[-1][0] + len(kept[-1][1]) > start:
        first, earlier = kept.pop()
        kept.append((first, earlier[: start - first]))
    kept.append((start, rows))


def take_final(sequence: Sequence) -> Iterator[LoggedRows]:
    """Hands out the kept rows of positions that are final and have not been logged."""
    end, kept, sequence.unlogged = sequence.final, sequence.unlogged, []
    for start, rows in kept:
        first, last = max(start, sequence.logged), min(start + len(rows), end)
        if first < last:
            values = rows[first - start : last - start].tobytes()
            yield LoggedRows(sequence.request.id, sequence.index, first, last - first, values)
        if start + len(rows) > end:
            sequence.unlogged.append((max(start, end), rows[max(0, end - start) :]))
    sequence.logged = max(sequence.logged, end)
