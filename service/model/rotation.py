"""RoPE in one call per tensor, in steps that have a kernel for it.

The decoders of transformers call a function of their own file, under the name apply_rotary_pos_emb. Where that is found
to compute what the kernel does, on pairs half a head apart, each attention module gets its own forward once more, with
other globals: ours under that name. Nothing of transformers is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from service.model.gate import Gate

_NAME = "apply_rotary_pos_emb"
_ROWS, _HEADS, _HEAD_DIM = 3, 2, 8

Rotation = Callable[..., tuple[Tensor, Tensor]]


def replace_rotations(causal_lm: nn.Module, dtype: torch.dtype, gate: Gate) -> None:
    """Has every attention of the decoder rotate queries and keys by the gate's kernel, in steps that have one."""
    for module in causal_lm.modules():
        forward: Any = type(module).forward
        if not isinstance(forward, FunctionType) or _NAME not in forward.__code__.co_names:
            continue
        theirs = forward.__globals__.get(_NAME)
        if theirs is not None and _is_half_rotation(theirs, dtype):
            own = {**forward.__globals__, _NAME: _rotation(theirs, gate)}
            module.forward = MethodType(_with_globals(forward, own), module)


def _rotation(theirs: Rotation, gate: Gate) -> Rotation:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        kernel = gate.kernels.rotate
        if kernel is None or more or named or cos.shape[-1] != q.shape[-1] or cos.dtype != q.dtype:
            return theirs(q, k, cos, sin, *more, **named)
        return kernel(q, cos, sin), kernel(k, cos, sin)

    return apply


def _with_globals(function: FunctionType, own: dict[str, Any]) -> FunctionType:
    copy = FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _is_half_rotation(theirs: Rotation, dtype: torch.dtype) -> bool:
    """Whether it returns, to the bit, what the formula of the kernel gives."""
    q, k = (torch.randn(1, _HEADS, _ROWS, _HEAD_DIM, dtype=dtype) for _ in range(2))
    cos, sin = (torch.randn(1, _ROWS, _HEAD_DIM, dtype=dtype) for _ in range(2))
    try:
        their_q, their_k = theirs(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return torch.equal(rotated(q, cos, sin), their_q) and torch.equal(rotated(k, cos, sin), their_k)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, heads, T, head_dim] turned by cos and sin [1, T, head_dim], each in pairs half a head apart."""
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
