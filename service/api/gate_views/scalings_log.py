"""The scalings log: the newest rows that the classifier gave to served positions, in a ring of fixed size.

Rows are as PEFT's log has them: after softmax, before top-k, without steering. Which positions have one is the engine's
matter (engine/gate/). Everything is in three arrays, so that the bounds are those of the memory, too; text is
nowhere in it. This file knows no HTTP.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from service.api.gate_views.rows import FloatArray
from service.api.schemas.answers import LogRows, LogState
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError
from service.contract.output import LoggedRows

DEFAULT_TOKENS = 1 << 16
DEFAULT_BYTES = 64 << 20

# Whose row it is; ids of requests are ours, and shorter.
_OWNER = np.dtype([("request", "S64"), ("choice", "<i4"), ("position", "<i4")])


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """Consecutive positions of one choice."""

    request: str
    choice: int
    start: int
    rows: FloatArray  # [positions, S, E]


class _Ring:
    """Rows and their owners, the newest over the oldest. Written by one thread, copied by any.

    Nobody waits for a copy: what is written over meanwhile is left out of it.
    """

    def __init__(self, capacity: int, shape: tuple[int, int]) -> None:
        self.rows = np.empty((capacity, *shape), np.float32)  # pages come with the first write
        self.owners = np.empty(capacity, _OWNER)
        self.written = 0  # rows ever; the next goes to this, modulo the capacity
        self._begun = 0  # rows ever, with those that are just being written

    @property
    def tokens(self) -> int:
        """Rows in it."""
        return min(self.written, len(self.rows))

    def write(self, rows: FloatArray, owners: npt.NDArray[Any]) -> None:
        """Adds rows, over the oldest where it is full."""
        capacity = len(self.rows)
        self._begun += len(rows)
        places = (self.written + np.arange(len(rows)))[-capacity:] % capacity
        self.rows[places], self.owners[places] = rows[-capacity:], owners[-capacity:]
        self.written = self._begun

    def copy(self, end: int) -> tuple[FloatArray, npt.NDArray[Any]]:
        """The rows that are still there of the first `end` that were written; the oldest first."""
        capacity = len(self.rows)
        start = max(0, end - capacity)
        first = start % max(1, capacity)
        rest = end - start - (capacity - first)  # rows that are before the first in memory
        last = first + end - start
        rows, owners = (
            np.concatenate([array[first:last], array[: max(0, rest)]])  # without the interpreter's lock
            for array in (self.rows, self.owners)
        )
        lost = max(0, self._begun - capacity - start)  # read after the copy: what was begun before it is in this
        return rows[lost:], owners[lost:]


class ScalingsLog:
    """Off and empty at first. Called from the event loop, but for what a Snapshot does."""

    def __init__(self, info: EngineInfo) -> None:
        self.enabled = False
        self.dropped_tokens = 0  # pushed out by newer ones
        self.max_tokens, self.max_bytes = DEFAULT_TOKENS, DEFAULT_BYTES
        self._experts = [expert["name"] for expert in info.experts]
        self._sites = info.sites
        self._shape = (len(info.sites) if info.xlora_config["layerwise_scalings"] else 1, len(info.experts))
        self.clear()

    @property
    def row_bytes(self) -> int:
        return 4 * self._shape[0] * self._shape[1] + _OWNER.itemsize

    @property
    def tokens(self) -> int:
        """Positions in it."""
        return self._ring.tokens

    def enable(self, max_tokens: int, max_bytes: int) -> None:
        """Takes rows from now on. What is there stays, as far as the bounds let it.

        Raises InvalidRequestError where not even one row fits.
        """
        capacity = min(max_tokens, max_bytes // self.row_bytes)
        if not capacity:
            raise InvalidRequestError(
                f"`max_bytes` is {max_bytes}, and one row takes {self.row_bytes} bytes", param="max_bytes"
            )
        if capacity != len(self._ring.rows):
            rows, owners = self._ring.copy(self._ring.written)
            self._allocate(capacity)
            self._write(rows, owners)
        self.enabled, self.max_tokens, self.max_bytes = True, max_tokens, max_bytes

    def disable(self) -> None:
        """Takes no more; what is there stays."""
        self.enabled = False

    def clear(self) -> None:
        """Forgets everything and gives the memory back; the log stays on if it is."""
        self._allocate(min(self.max_tokens, self.max_bytes // self.row_bytes) if self.enabled else 0)
        self.dropped_tokens = 0

    def add(self, logged: Sequence[LoggedRows]) -> None:
        """Takes what a step brought, while the log is on."""
        if not self.enabled:
            return
        owners = np.array(
            [
                (one.request_id.encode(), one.index, position)
                for one in logged
                for position in range(one.start, one.start + one.count)
            ],
            _OWNER,
        )
        rows = np.frombuffer(b"".join([one.rows for one in logged]), "<f4")
        self._write(rows.reshape(len(owners), *self._shape), owners)

    def snapshot(self) -> Snapshot:
        """A snapshot of its rows, for another thread."""
        return Snapshot(self._ring, self._ring.written, self._experts, self._sites)

    def state(self) -> LogState:
        """Switch and bounds, and how full it is."""
        return {
            "enabled": self.enabled,
            "max_tokens": self.max_tokens,
            "max_bytes": self.max_bytes,
            "tokens": self.tokens,
            "bytes": self.tokens * self.row_bytes,
            "dropped_tokens": self.dropped_tokens,
        }

    def _allocate(self, capacity: int) -> None:
        self._ring = _Ring(capacity, self._shape)

    def _write(self, rows: FloatArray, owners: npt.NDArray[Any]) -> None:
        before = self.tokens
        self._ring.write(rows, owners)
        self.dropped_tokens += before + len(rows) - self.tokens


@dataclass(frozen=True)
class Snapshot:
    """The log at one moment, without what newer rows push out before it is looked at. The first look copies the rows,
    and what it computes takes time: not for the event loop.
    """

    _ring: _Ring
    _end: int  # rows ever written at that moment
    experts: list[str]
    sites: list[str]

    @cached_property
    def _copy(self) -> tuple[FloatArray, npt.NDArray[Any]]:
        return self._ring.copy(self._end)

    @property
    def rows(self) -> FloatArray:
        """[tokens, S, E], in the order in which they came."""
        return self._copy[0]

    @property
    def owners(self) -> npt.NDArray[Any]:
        return self._copy[1]

    def runs(self) -> Iterator[LoggedRun]:
        """In the order of their first rows."""
        if not len(self.rows):
            return
        # In two goes: sorting pairs would hold the interpreter's lock, and the event loop up.
        _, requests = np.unique(np.ascontiguousarray(self.owners["request"]), return_inverse=True)
        names = (requests.astype(np.int64) << 32) + self.owners["choice"]
        _, first, which = np.unique(names, return_index=True, return_inverse=True)
        order = np.argsort(first[which], kind="stable")
        owners, rows = self.owners[order], self.rows[order]
        follows = (first[which][order][1:] == first[which][order][:-1]) & (np.diff(owners["position"]) == 1)
        starts = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(rows)]
        for start, end in itertools.pairwise(starts):
            owner = owners[start]
            yield LoggedRun(owner["request"].decode(), int(owner["choice"]), int(owner["position"]), rows[start:end])

    def summary(self) -> LogRows:
        """How long the runs are, and what they say in a few numbers."""
        lengths: dict[int, int] = {}
        for run in self.runs():
            lengths[len(run.rows)] = lengths.get(len(run.rows), 0) + 1
        mean = self.rows.mean(axis=1, dtype=np.float64)  # [tokens, E]
        leads = np.bincount(mean.argmax(axis=1), minlength=len(self.experts)) if len(mean) else None
        return {
            "sequences": sum(lengths.values()),
            "lengths": {str(length): lengths[length] for length in sorted(lengths)},
            "totals": None if leads is None else dict(zip(self.experts, mean.mean(axis=0).tolist(), strict=True)),
            "top1": None if leads is None else dict(zip(self.experts, (leads / len(mean)).tolist(), strict=True)),
        }

    def npz(self) -> bytes:
        """Runs by their length, as PEFT's get_bucketed_scalings_log: for each length L the arrays scalings_L
        [runs, L, S, E], order_L (the place in the log), start_L, request_L and choice_L; and experts, sites.
        """
        buckets: dict[int, list[tuple[int, LoggedRun]]] = {}
        for place, run in enumerate(self.runs()):
            buckets.setdefault(len(run.rows), []).append((place, run))
        arrays: dict[str, Any] = {"experts": np.array(self.experts), "sites": np.array(self.sites)}
        for length, entries in sorted(buckets.items()):
            arrays[f"scalings_{length}"] = np.stack([run.rows for _, run in entries])
            arrays[f"order_{length}"] = np.array([place for place, _ in entries])
            arrays[f"start_{length}"] = np.array([run.start for _, run in entries])
            arrays[f"request_{length}"] = np.array([run.request for _, run in entries])
            arrays[f"choice_{length}"] = np.array([run.choice for _, run in entries])
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()
