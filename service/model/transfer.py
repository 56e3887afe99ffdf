"""Asynchronous copies between host and device: many values in one copy, and one wait for all copies to the host."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 8  # bytes


def to_device(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """`values` as a tensor on `device`. An array of int64 may become its memory, and must not be changed any more.

    The copy to a GPU is from pinned memory: one from pageable memory would wait for everything queued on the device.
    """
    if dtype == torch.int64 and values:  # several times as fast as from a list
        numbers = torch.frombuffer(values if isinstance(values, array) else array("q", values), dtype=dtype)
    else:
        numbers = torch.tensor(values, dtype=dtype)
    return copy_to_device(numbers, device)


def copy_to_device(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, copied from pinned memory; on a CPU the tensor itself."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def pack_to_device(columns: Sequence[npt.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Writable arrays [n] as tensors on `device`, in a single copy."""
    if device.type == "cpu":
        return [torch.from_numpy(column) for column in columns]
    sizes = [-(-column.nbytes // _ALIGNMENT) * _ALIGNMENT for column in columns]
    packed = np.zeros(sum(sizes), np.uint8)
    first = 0
    for column, size in zip(columns, sizes, strict=True):
        packed[first : first + column.nbytes] = column.view(np.uint8)
        first += size
    parts = copy_to_device(torch.from_numpy(packed), device).split_with_sizes(sizes)
    dtypes = [torch.from_numpy(column[:0]).dtype for column in columns]
    return [
        part.view(dtype).narrow(0, 0, len(column)) for part, dtype, column in zip(parts, dtypes, columns, strict=True)
    ]


def unpack_bits(packed: Tensor, width: int) -> Tensor:
    """Bool [n, width]: the first `width` bits of each row of `packed`, uint8 [n, bytes], lowest bit first."""
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(1)[:, :width].bool()


class HostCopies:
    """Copies of one device's tensors to the host, with one wait for all of them.

    They are queued on the current stream and complete with the event of `close`, so work that is queued later neither
    delays them nor spoils them: it may overwrite the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Queues the copy of a tensor. Returns the host tensor, which is filled once `wait` has returned."""
        if self._device.type == "cpu":
            return tensor.clone()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def close(self) -> None:
        """Ends the series: all copies have been queued."""
        if self._device.type != "cpu":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Waits until all copies are in the host's memory. Returns at once when called again."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
