"""A CUDA device that computes nothing, for a build of torch that has none.

Inside `FakeCuda`, tensors say that they are on CUDA and hold no numbers (torch's FakeTensorMode). Operators check
shapes and devices: a mix of devices raises. What the device would be asked to do is counted:

    launches    operators that compute on the device; a captured graph is one
    copies      from the host to the device and back
    waits       for the device: .item(), .tolist(), a synchronous copy, synchronize() of an event that is not done

Time is the order of what was queued. A copy to pinned memory is done once an event recorded after it has been waited
for; whoever reads it before that reads rubbish on a GPU, and an error here. Numbers that come back are always the same:
`token` where they are integers, true where they are bool.

Python's indexing and a few methods ask for a CUDA build below the dispatcher; they are computed on meta tensors.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CUDA = torch.device("cuda:0")
PROCESSORS = 132
_FREE_BYTES = 1 << 30
_SHIMS = ("__getitem__", "__setitem__", "__invert__", "__and__", "__or__", "__xor__", "repeat_interleave", "contiguous")
_NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh", "device"}
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
    decoder_launches: int = 0


class FakeCuda:
    """The device. Enter it, build what runs on it, and look at `counts`."""

    def __init__(self, token: int = 5) -> None:
        self.token = token
        self.counts = Counts()
        self.in_decoder = False
        self.capturing = False
        self.queued = self.done = 0  # moments
        self._pending: dict[int, tuple[Any, int]] = {}  # storages that copies are under way to
        self._pinned: dict[int, Any] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self._exits = ExitStack()

    def __enter__(self) -> FakeCuda:
        _forget()
        self._exits.callback(_forget)
        for owner, name, stand_in in (*_methods(self), *_stand_ins(self)):
            self._exits.enter_context(patch.object(owner, name, stand_in, create=True))
        self._exits.enter_context(self._fake)
        self._exits.enter_context(_Watch(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

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
        """Launches inside are the decoder's."""
        self.in_decoder = True
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
            self.counts.launches[f"{what} {_site()}"] += 1

    def wait(self, what: str, moment: int | None = None) -> None:
        """Waits until the device has come to a moment; None: to the end of what is queued."""
        moment = self.queued if moment is None else moment
        if self.capturing:
            raise DeviceFault(f"{what} while a graph is captured, at {_site()}")
        if moment > self.done:
            self.counts.waits[f"{what} {_site()}"] += 1
            self.done = moment
            self._pending = {key: one for key, one in self._pending.items() if one[1] > moment}

    def like(self, model: Tensor, device: torch.device) -> Tensor:
        """A fake tensor of the shape of another."""
        with self._fake:
            return torch.empty_strided(model.shape, model.stride(), dtype=model.dtype, device=device)

    def copy(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        """Counts a copy between host and device, and waits for it where the host would."""
        self.queued += 1
        to_host = target.device.type == "cpu"
        counted = self.counts.copies_out if to_host else self.counts.copies_in
        counted[_site()] += 1
        if non_blocking and self.is_pinned(target if to_host else source):
            if to_host:
                self._pending[_storage(target)] = target.untyped_storage(), self.queued
        else:
            self.wait("copy to the host" if to_host else "copy to the device")

    def pin(self, tensor: Tensor) -> Tensor:
        """Marks a tensor's memory as pinned."""
        self._pinned[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a host tensor's memory is pinned."""
        return _storage(tensor) in self._pinned

    def read(self, tensor: Tensor) -> None:
        """The host looks at a tensor: at one of the device after a wait, at one of the host if no copy is under way."""
        if tensor.device.type == "cuda":
            self.wait("read")
        elif isinstance(tensor, FakeTensor) and self._pending and _storage(tensor) in self._pending:
            raise DeviceFault(f"read before the copy was waited for, at {_site()}")

    def number(self, dtype: torch.dtype) -> Any:
        """Every number that comes back from the device."""
        return True if dtype == torch.bool else 0.25 if dtype.is_floating_point else self.token


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


class _Watch(TorchDispatchMode):
    """Sees every operator before the fake mode does."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, cuda = dict(kwargs or {}), self._cuda
        name = func.overloadpacket.__name__
        if name == "is_pinned":
            return cuda.is_pinned(args[0])
        if name == "_pin_memory":
            return cuda.pin(cuda.like(args[0], torch.device("cpu")))
        if name in ("_local_scalar_dense", "equal"):
            for tensor in filter(_is_tensor, args):
                cuda.read(tensor)
            return True if name == "equal" else cuda.number(args[0].dtype)
        if name == "scaled_dot_product_attention":  # its parts on a CPU are of no interest here
            cuda.launch(name)
            _same_device(args)
            return cuda.like(torch.empty(*args[0].shape[:-1], args[2].shape[-1], dtype=args[0].dtype), CUDA)
        if (
            func.namespace == "aten" and func._can_decompose()
        ):  # of inference tensors, what is made of several operators comes in one
            with self:
                return func.decompose(*args, **kwargs)
        pinned = kwargs.pop("pin_memory", False)
        found = func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and _crosses(source := args[name == "copy_"], found):
            non_blocking = args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking", False)
            if name == "_to_copy" and non_blocking and found.device.type == "cpu":
                cuda.pin(found)  # as torch does
            cuda.copy(source, found, non_blocking)
        else:
            _count(cuda, func, args, found)
        return cuda.pin(found) if pinned else found


class _WatchMeta(TorchDispatchMode):
    """Counts what a shim computes on meta tensors."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        _count(self._cuda, func, args, found)
        return found


def _count(cuda: FakeCuda, func: Any, args: Any, found: Any) -> None:
    """Counts an operator if it computes on the device; one of the host must not read what is still on its way."""
    name = func.overloadpacket.__name__
    is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
    if is_view or name in _NO_KERNEL:
        return
    tensors = list(filter(_is_tensor, found if isinstance(found, tuple | list) else [found]))
    if any(one.device.type in ("cuda", "meta") for one in tensors):
        cuda.launch(name)
    else:
        for tensor in filter(_is_tensor, args):
            cuda.read(tensor)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _crosses(source: Any, target: Any) -> bool:
    return _is_tensor(source) and source.device.type != target.device.type


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _site() -> str:
    """The innermost line of the service on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_SERVICE):
            return f"{frame.f_code.co_filename.removeprefix(_SERVICE)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


def _methods(cuda: FakeCuda) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Stand-ins for methods of tensors that need a CUDA build, or numbers."""

    def filled(tensor: Tensor) -> np.ndarray[Any, Any]:
        cuda.read(tensor)
        dtype = {torch.bfloat16: torch.float32}.get(tensor.dtype, tensor.dtype)
        return np.full(tuple(tensor.shape), cuda.number(dtype), dtype=str(dtype).removeprefix("torch."))

    def numpy(tensor: Tensor, *_: Any, **__: Any) -> np.ndarray[Any, Any]:
        if tensor.device.type != "cpu" or tensor.dtype == torch.bfloat16:
            raise TypeError(f"numpy() of {tensor.dtype} on {tensor.device}")
        return filled(tensor)

    def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        source.expand_as(target)  # raises where the shapes do not fit
        if _crosses(source, target):
            cuda.copy(source, target, non_blocking)
        elif target.device.type == "cuda":
            cuda.launch("copy_")
        else:
            cuda.read(source)
        return target

    shims = [(FakeTensor, name, _on_meta(cuda, name, getattr(Tensor, name))) for name in _SHIMS]
    methods = {"numpy": numpy, "copy_": copy_, "tolist": lambda tensor: filled(tensor).tolist()}
    return [*shims, *((FakeTensor, name, method) for name, method in methods.items())]


def _on_meta(cuda: FakeCuda, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _same_device((self, *args)) == "cpu":
            return original(self, *args, **kwargs)
        if name in ("__getitem__", "__setitem__") and _has_list(args[0]):
            cuda.wait("index from a list")
        with _disable_current_modes(), _WatchMeta(cuda):
            result = original(_to_meta(self), *_to_meta(args), **kwargs)
        return None if result is None else cuda.like(result, CUDA)

    return method


def _has_list(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(map(_has_list, index)))


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return type(value)(map(_to_meta, value)) if isinstance(value, tuple | list) else value


def _same_device(values: Any) -> str:
    """The one type of device of all tensors."""
    found = _devices(values)
    if len(found) > 1:
        raise DeviceFault(f"tensors on {sorted(found)}, at {_site()}")
    return found.pop() if found else "cuda"


def _devices(value: Any) -> set[str]:
    """Of all tensors with a dimension: numbers may come from anywhere."""
    if isinstance(value, Tensor):
        return {value.device.type} if value.dim() else set()
    return set().union(*map(_devices, value)) if isinstance(value, tuple | list) else set()


def _forget() -> None:
    """Clears the caches of the service: what they hold of one device is of no use on another."""
    for name, module in list(sys.modules.items()):
        if name.startswith("service."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _stand_ins(cuda: FakeCuda) -> list[tuple[Any, str, Any]]:
    """What torch.cuda is asked for."""

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.moment = 0

        def record(self, _stream: Any = None) -> None:
            self.moment = cuda.queued

        def synchronize(self) -> None:
            cuda.wait("event", self.moment)

        def query(self) -> bool:
            return self.moment <= cuda.done

    class Stream:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.cuda_stream = 0

        def synchronize(self) -> None:
            cuda.wait("stream")

        def record_event(self, event: Event | None = None) -> Event:
            event = Event() if event is None else event
            event.record()
            return event

        def wait_event(self, _event: Event) -> None: ...

        def wait_stream(self, _stream: Stream) -> None: ...

    class Graph:
        def replay(self) -> None:
            cuda.launch("replay of a graph")

    @contextmanager
    def capture(_graph: Graph, **_: Any) -> Iterator[None]:
        cuda.capturing = True
        try:
            with cuda.decoder():
                yield
        finally:
            cuda.capturing = False

    only = Stream()
    properties = SimpleNamespace(multi_processor_count=PROCESSORS, name="fake", total_memory=_FREE_BYTES)
    return [
        (torch.cuda, name, stand_in)
        for name, stand_in in {
            "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": capture, "graph_pool_handle": tuple,
            "current_stream": lambda *_: only, "default_stream": lambda *_: only, "stream": lambda _: nullcontext(),
            "device": lambda _: nullcontext(), "device_of": lambda _: nullcontext(), "empty_cache": lambda: None,
            "synchronize": lambda *_: cuda.wait("synchronize"), "get_device_name": lambda *_: "fake",
            "get_device_properties": lambda *_: properties, "mem_get_info": lambda *_: (_FREE_BYTES, _FREE_BYTES),
        }.items()
    ]  # fmt: skip
