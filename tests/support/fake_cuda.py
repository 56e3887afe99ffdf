"""A CUDA device that computes nothing, for a build of torch that has none.

Inside `FakeCuda`, tensors say that they are on CUDA and hold no numbers (torch's FakeTensorMode). Operators check
shapes and devices: a mix of devices raises. What the device would be asked to do is counted:

    launches    operators that compute on the device; a captured graph is one
    copies      from the host to the device and back
    waits       for the device: .item(), .tolist(), a synchronous copy, synchronize() of an event that is not done
    late reads  waits for what was queued before the last forward: the device has that to do, and does not idle

Time is the order of what was queued. A copy to pinned memory is done once an event recorded after it has been waited
for; whoever reads it before that reads rubbish on a GPU, and an error here. Numbers that come back are always the same:
`token` where they are integers, true where they are bool.

Python's indexing and a few methods ask for a CUDA build below the dispatcher; they are computed on meta tensors.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tests.support.fake_cuda_device import CUDA, Device
from tests.support.fake_cuda_operators import Watch, tensor_methods
from tests.support.fake_cuda_runtime import runtime


class FakeCuda(Device):
    """The device. Enter it, build what runs on it, and look at `counts`."""

    def __init__(self, token: int = 5) -> None:
        super().__init__(token)
        self._exits = ExitStack()

    def __enter__(self) -> FakeCuda:
        _forget()
        self._exits.callback(_forget)
        for owner, name, stand_in in (*tensor_methods(self), *runtime(self)):
            self._exits.enter_context(patch.object(owner, name, stand_in, create=True))
        self._exits.enter_context(self.fake)
        self._exits.enter_context(Watch(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()


def move_to_cuda(cuda: FakeCuda, thing: Any) -> None:
    """Replaces every tensor that hangs on a model of the service by a fake one on CUDA."""
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # tied ones stay tied

    def moved(value: Any) -> Any:
        if isinstance(value, FakeTensor) or not isinstance(value, Tensor):
            return tuple(map(moved, value)) if type(value) is tuple else value
        if id(value) not in copies:
            copy = cuda.like(value, CUDA)
            parameter = torch.nn.Parameter(copy, requires_grad=False)
            copies[id(value)] = value, parameter if isinstance(value, torch.nn.Parameter) else copy
        return copies[id(value)][1]

    seen: set[int] = set()
    pending = [thing]
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        own = one if isinstance(one, dict | list) else getattr(one, "__dict__", {})
        for key, value in list(own.items() if isinstance(own, dict) else enumerate(own)):
            own[key] = moved(value)
            if isinstance(value, torch.nn.Module | list | dict) or type(value).__module__.startswith("service"):
                pending.append(value)


def _forget() -> None:
    """Clears the caches of the service: what they hold of one device is of no use on another."""
    for name, module in list(sys.modules.items()):
        if name.startswith("service."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
