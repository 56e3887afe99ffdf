"""Operators on tensors of a device that computes nothing: seen, counted, and computed on meta tensors where torch asks
for a CUDA build.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.support.fake_cuda_device import CUDA, Device, DeviceFault, is_tensor, site

_SHIMS = ("__getitem__", "__setitem__", "__invert__", "__and__", "__or__", "__xor__", "repeat_interleave", "contiguous")
_NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh", "device"}


class Watch(TorchDispatchMode):
    """Sees every operator before the fake mode does."""

    def __init__(self, cuda: Device) -> None:
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
            for tensor in filter(is_tensor, args):
                cuda.read(tensor)
            return True if name == "equal" else cuda.number(args[0].dtype)
        if name == "scaled_dot_product_attention":  # its parts on a CPU are of no interest here
            cuda.launch(name)
            same_device(args)
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

    def __init__(self, cuda: Device) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        _count(self._cuda, func, args, found)
        return found


def _count(cuda: Device, func: Any, args: Any, found: Any) -> None:
    """Counts an operator if it computes on the device; one of the host must not read what is still on its way."""
    name = func.overloadpacket.__name__
    is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
    if is_view or name in _NO_KERNEL:
        return
    tensors = list(filter(is_tensor, found if isinstance(found, tuple | list) else [found]))
    if any(one.device.type in ("cuda", "meta") for one in tensors):
        cuda.launch(name)
    else:
        for tensor in filter(is_tensor, args):
            cuda.read(tensor)


def _crosses(source: Any, target: Any) -> bool:
    return is_tensor(source) and source.device.type != target.device.type


def tensor_methods(cuda: Device) -> list[tuple[Any, str, Callable[..., Any]]]:
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


def _on_meta(cuda: Device, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if same_device((self, *args)) == "cpu":
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


def same_device(values: Any) -> str:
    """The one type of device of all tensors."""
    found = _devices(values)
    if len(found) > 1:
        raise DeviceFault(f"tensors on {sorted(found)}, at {site()}")
    return found.pop() if found else "cuda"


def _devices(value: Any) -> set[str]:
    """Of all tensors with a dimension: numbers may come from anywhere."""
    if isinstance(value, Tensor):
        return {value.device.type} if value.dim() else set()
    return set().union(*map(_devices, value)) if isinstance(value, tuple | list) else set()
