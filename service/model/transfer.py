"""Numbers from the host to the device and back, without waiting for either until somebody reads them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor, nn

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


def bits_to_device(rows: Sequence[bytes], width: int, device: torch.device) -> Tensor:
    """Bool [rows, width]: of each row of bytes the first `width` bits, lowest of a byte first. Copied as packed."""
    packed = copy_to_device(torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1), device)
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    return bits.flatten(1)[:, :width].bool()


class HostCopy:
    """Copies of tensors of one device, on their way to the host.

    A copy is queued behind what the device has been given so far, and what is given to it later does not delay it: the
    tensors may be overwritten then.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        device = tensors[0].device
        if device.type == "cpu":
            self._tensors = [tensor.clone() for tensor in tensors]
            return
        self._tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device))

    def read(self) -> list[Tensor]:
        """The tensors in the host's memory. Waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._tensors


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
