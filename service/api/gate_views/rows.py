"""Rows of the gate on their way from the engine's messages to JSON."""

from __future__ import annotations

import binascii
import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.api.schemas.answers import Scalings, ScalingsDelta
from service.contract.engine_info import EngineInfo
from service.contract.errors import InternalError
from service.contract.output import GateRows

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rows:
    """Scalings of consecutive positions from `start` on (S sites, E experts)."""

    start: int
    mean: FloatArray  # [positions, E]
    entropy: FloatArray  # [positions], NaN for an all-zero row
    full: FloatArray | None  # [positions, S, E]

    @property
    def end(self) -> int:
        return self.start + len(self.mean)

    def between(self, start: int, end: int) -> Rows:
        part = slice(max(start - self.start, 0), max(end - self.start, 0))
        full = None if self.full is None else self.full[part]
        return Rows(max(start, self.start), self.mean[part], self.entropy[part], full)


class RowFormat:
    """Turns the engine's bytes into Rows, and Rows into the `scalings` object."""

    def __init__(
        self,
        info: EngineInfo,
        dtype: str | None = None,
        sites: list[str] | None = None,
        experts: list[str] | None = None,
    ) -> None:
        """`sites` and `experts` name what the documented rows have, where that is not everything."""
        self._experts = [expert["name"] for expert in info.experts] if experts is None else experts
        self._sites = info.sites if sites is None else sites
        self._dtype = np.dtype(dtype or "float32")

    def parse(self, gate: GateRows) -> Rows:
        """The engine's bytes as arrays; nothing is copied."""
        experts = len(self._experts)
        full = None
        if gate.full is not None:
            full = np.frombuffer(gate.full, "<f4").reshape(gate.count, len(self._sites), experts)
        mean = np.frombuffer(gate.mean, "<f4").reshape(gate.count, experts)
        return Rows(gate.start, mean, np.frombuffer(gate.entropy, "<f4"), full)

    def document(self, rows: Rows | None, start: int) -> Scalings:
        """The `scalings` object of a whole answer; `start` is for when there are no rows."""
        numbers: ScalingsDelta = {"start": start, "mean": [], "entropy": []} if rows is None else self._rows(rows)
        return {"experts": self._experts, "sites": self._sites, **numbers}

    def delta(self, rows: Rows, first: bool) -> ScalingsDelta:
        """The `scalings` object of an event; a choice's first names experts and sites."""
        numbers = self._rows(rows)
        if first:
            numbers["experts"], numbers["sites"] = self._experts, self._sites
        return numbers

    def _rows(self, rows: Rows) -> ScalingsDelta:
        numbers: ScalingsDelta = {
            "start": rows.start,
            "mean": np.ascontiguousarray(rows.mean),
            "entropy": rows.entropy,
        }
        if rows.full is not None:
            numbers["full"] = encode_npy(rows.full.astype(self._dtype, copy=False))
        return numbers


class RowBuffer:
    """Rows that have arrived and not been handed out yet, of one choice, in the order of positions."""

    def __init__(self, format: RowFormat) -> None:
        self._format = format
        self._pending: Rows | None = None
        self._next: int | None = None  # the position whose row comes next

    def add(self, gate: GateRows) -> None:
        """More rows; those of positions already seen (computed again after a preemption) are dropped."""
        rows = self._format.parse(gate)
        if self._next is not None and rows.start > self._next:
            raise InternalError(f"the engine left out the gate rows {self._next} to {rows.start - 1}")
        if self._next is not None and rows.start < self._next:
            rows = rows.between(self._next, rows.end)
        if len(rows.mean):
            self._next = rows.end
            self._pending = rows if self._pending is None else join([self._pending, rows])

    def take(self, through: int) -> Rows | None:
        """Hands out what is pending up to and including one position."""
        pending = self._pending
        if pending is None or pending.start > through:
            return None
        if pending.end <= through + 1:
            self._pending = None
            return pending
        self._pending = pending.between(through + 1, pending.end)
        return pending.between(pending.start, through + 1)


def join(parts: list[Rows]) -> Rows | None:
    """Consecutive rows as one."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    fulls = [part.full for part in parts if part.full is not None]
    return Rows(
        parts[0].start,
        np.concatenate([part.mean for part in parts]),
        np.concatenate([part.entropy for part in parts]),
        np.concatenate(fulls) if fulls else None,
    )


def npy(array: npt.NDArray[Any]) -> bytes:
    """The array as a .npy file."""
    return _npy_header(array.dtype.str, array.shape) + array.tobytes()


@functools.lru_cache(256)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Costs more than the rest of a streamed token's scalings, and is the same for nearly all of them."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def encode_npy(array: npt.NDArray[Any]) -> str:
    """base64 of the array as a .npy file."""
    return binascii.b2a_base64(npy(array), newline=False).decode("ascii")
