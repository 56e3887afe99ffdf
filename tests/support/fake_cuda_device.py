"""What a CUDA device that computes nothing is asked to do: launches, copies, waits, and which copies are under way."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CUDA = torch.device("cuda:0")
_SERVICE = f"{__file__.rpartition('/tests/')[0]}/service/"


class DeviceFault(AssertionError):
    """What would fail, or read rubbish, on a GPU."""


@dataclass
class Counts:
    """What happened between two moments, by the innermost line of the service."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies_in: Counter[str] = field(default_factory=Counter)
    copies_out: Counter[str] = field(default_factory=Counter)
    late_reads: Counter[str] = field(default_factory=Counter)
    decoder_launches: int = 0


class Device:
    """The queue of a device, and what the host has seen of it. `counts` are of what happens now."""

    def __init__(self, token: int = 5) -> None:
        self.token = token
        self.counts = Counts()
        self.in_decoder = False
        self.capturing = False
        self.queued = self.done = self.forward = 0  # moments: the last one queued, seen done, before the last forward
        self._pending: dict[int, tuple[Any, int]] = {}  # storages that copies are under way to
        self._pinned: dict[int, Any] = {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        """The counts of a block of code."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = before

    @contextmanager
    def decoder(self) -> Iterator[None]:
        """Launches inside are the decoder's: work that keeps the device busy for long."""
        self.in_decoder, self.forward = True, self.queued
        try:
            yield
        finally:
            self.in_decoder = False

    def launch(self, what: str) -> None:
        """Counts a kernel."""
        self.queued += 1
        if self.in_decoder:
            self.counts.decoder_launches += 1
        else:
            self.counts.launches[f"{what} {site()}"] += 1

    def wait(self, what: str, moment: int | None = None) -> None:
        """Waits until the device has come to a moment; None: to the end of what is queued. A moment before the last
        forward is a late read: the device goes on meanwhile.
        """
        moment = self.queued if moment is None else moment
        if self.capturing:
            raise DeviceFault(f"{what} while a graph is captured, at {site()}")
        if moment > self.done:
            counted = self.counts.late_reads if moment <= self.forward else self.counts.waits
            counted[f"{what} {site()}"] += 1
            self.done = moment
            self._pending = {key: one for key, one in self._pending.items() if one[1] > moment}

    def like(self, model: Tensor, device: torch.device) -> Tensor:
        """A fake tensor of the shape of another."""
        with self.fake:
            return torch.empty_strided(model.shape, model.stride(), dtype=model.dtype, device=device)

    def copy(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        """Counts a copy between host and device, and waits for it where the host would."""
        self.queued += 1
        to_host = target.device.type == "cpu"
        counted = self.counts.copies_out if to_host else self.counts.copies_in
        counted[site()] += 1
        if non_blocking and self.is_pinned(target if to_host else source):
            if to_host:
                self._pending[storage(target)] = target.untyped_storage(), self.queued
        else:
            self.wait("copy to the host" if to_host else "copy to the device")

    def pin(self, tensor: Tensor) -> Tensor:
        """Marks a tensor's memory as pinned."""
        self._pinned[storage(tensor)] = tensor.untyped_storage()
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a host tensor's memory is pinned."""
        return storage(tensor) in self._pinned

    def read(self, tensor: Tensor) -> None:
        """The host looks at a tensor: at one of the device after a wait, at one of the host if no copy is under way."""
        if tensor.device.type == "cuda":
            self.wait("read")
        elif isinstance(tensor, FakeTensor) and self._pending and storage(tensor) in self._pending:
            raise DeviceFault(f"read before the copy was waited for, at {site()}")

    def number(self, dtype: torch.dtype) -> Any:
        """Every number that comes back from the device."""
        return True if dtype == torch.bool else 0.25 if dtype.is_floating_point else self.token


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def site() -> str:
    """The innermost line of the service on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_SERVICE):
            return f"{frame.f_code.co_filename.removeprefix(_SERVICE)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
