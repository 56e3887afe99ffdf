"""Numbers from the host to the device and back, without waiting for either until somebody reads them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

_ALIGNMENT = 8  # bytes
_BLOCK = 1 << 20  # elements converted at once: a copy of all of a large weight costs new memory


def to_device(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """`values` as a tensor on `device`; an array of int64 may become its memory, and must not change any more.

    From pinned memory, where that is another device: a copy from ordinary memory would wait until everything queued on
    the device is done.
    """
    if dtype == torch.int64 and values:  # several times as fast as from a list
        numbers = torch.frombuffer(values if isinstance(values, array) else array("q", values), dtype=dtype)
    else:
        numbers = torch.tensor(values, dtype=dtype)
    return copy_to_device(numbers, device)


def copy_to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, the same way; on a CPU it is the tensor itself."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def pack_to_device(columns: Sequence[npt.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Writable arrays [n] as tensors on `device`, in one copy for all of them."""
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
    """Bool [n, width]: of each row of bytes uint8 [n, bytes] the first `width` bits, lowest of a byte first."""
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(1)[:, :width].bool()


class HostCopies:
    """Copies of tensors of one device on their way to the host, one wait for all of them.

    They are queued behind what the device has been given before, and what it is given later does not delay them: the
    tensors may be overwritten then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Queues the copy of a tensor. Returns where it will be once `wait` has returned; from a CPU it is there."""
        if self._device.type == "cpu":
            return tensor.clone()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def close(self) -> None:
        """Ends the queue: every copy has been asked for."""
        if self._device.type != "cpu":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Waits until all copies are in the host's memory; a second time for nothing."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None


def narrowed(tensor: Tensor) -> Tensor:
    """The tensor in bfloat16 if it loses nothing by it, else the tensor itself."""
    flat = tensor.view(-1)
    blocks = (flat[first : first + _BLOCK] for first in range(0, flat.numel(), _BLOCK))
    if all(torch.equal(block.to(torch.bfloat16).float(), block) for block in blocks):
        return tensor.to(torch.bfloat16)
    return tensor


def upcast_to_float32(module: nn.Module) -> None:
    """Every bfloat16 parameter and buffer of a module, one after the other; tied ones stay tied."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.float()
