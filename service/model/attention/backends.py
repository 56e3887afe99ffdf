"""Selects the attention backend of a CUDA device: the fastest of those that work there.

    varlen      torch's varlen_attn over block tables, for the block sizes that it supports
    triton      our kernel: needs Triton, and a C compiler with which Triton builds its launcher
    reference   torch's operators over copied keys

A backend is tried once per shape, and compared with the reference. The warm-up forward (steps/warm_up.py) triggers this
while the engine starts, so no request waits for a compiler, or fails for want of one.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from service.model.attention import varlen
from service.model.attention.reference import sdpa
from service.model.batch import AttentionGroup
from service.model.kv_cache import KVCache


class Backend(Protocol):
    """Computes attention of one group's rows [N * Q, heads, head_dim] over their streams' stored keys and values."""

    def __call__(
        self,
        rows: Tensor,
        group: AttentionGroup,
        layer: int,
        kv_cache: KVCache,
        scaling: float,
        window: int | None,
        softcap: float | None,
        /,
    ) -> Tensor:
        """Returns [N * Q, heads, head_dim]. `window` is a sliding window in tokens; None: no window, no soft cap."""


class Shape(NamedTuple):
    """The properties that decide whether a backend works."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    window: int | None  # tokens
    softcap: float | None


triton_attend: Backend | None = None
_import_fault = "Triton is not installed"
if torch.version.cuda is not None:
    try:
        from service.model.attention import triton
    except Exception as error:  # a broken installation raises whatever it likes
        _import_fault = f"{type(error).__name__}: {error}"
    else:
        triton_attend = triton.attend

logger = logging.getLogger(__name__)

_MAX_TRITON_HEAD_DIM = 256  # more does not fit shared memory
_VARLEN_BLOCK = 256  # multiples of it work with every varlen_attn that has block tables
# Numbers of queries and keys that compile every variant of the kernel: decode and prefill, with and without split keys.
_TRIED = ((1, 1), (1, 512), (32, 32), (32, 512))
_MAX_FAULT_CHARACTERS = 300  # of a log line


@functools.cache
def cuda_backend(shape: Shape) -> Backend:
    """The first backend that works for this shape: torch's kernel, our Triton kernel, the reference."""
    if _varlen_works(shape):
        return varlen.attend
    if shape.head_dim > _MAX_TRITON_HEAD_DIM:
        return sdpa
    fault: str | None = _import_fault
    if triton_attend is not None:
        fault = fault_of(triton_attend, shape)
        if fault is None:
            return triton_attend
    takes_larger_blocks = _varlen_works(shape._replace(block_size=_VARLEN_BLOCK))
    _warn(fault, f"; --block-size {_VARLEN_BLOCK} lets torch's own kernel do it" if takes_larger_blocks else "")
    return sdpa


def _varlen_works(shape: Shape) -> bool:
    return shape.softcap is None and varlen.works(*shape[:6])


@torch.inference_mode()
def fault_of(attend: Backend, shape: Shape) -> str | None:
    """Why `attend` cannot be used; None where its results agree with the reference."""
    device, dtype, heads, kv_heads, head_dim, block, window, softcap = shape
    tolerance = 1e-2 if dtype == torch.float32 else 0.1
    try:
        for queries, keys in _TRIED:
            width = -(-keys // block)
            key, value = torch.randn(2, width, block, kv_heads, head_dim, device=device).to(dtype).unbind(0)
            for pool in (key, value):
                pool.flatten(0, 1)[keys:] = torch.nan
            positions = torch.arange(keys - queries, keys, device=device)[None]
            table = torch.arange(width, device=device)[None]
            group = AttentionGroup(0, 1, queries, positions, table, keys, needs_mask=True)
            rows = torch.randn(queries, heads, head_dim, device=device).to(dtype)
            arguments = (rows, group, 0, KVCache([key], [value], key), head_dim**-0.5, window, softcap)
            if not torch.allclose(attend(*arguments), sdpa(*arguments), atol=tolerance, rtol=tolerance):
                return f"its kernel is wrong for {queries} queries over {keys} keys"
    except Exception as error:  # no compiler, no driver, a kernel that does not compile: each raises something else
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def _warn(fault: str, hint: str) -> None:
    """Logs a fault once, for any number of shapes."""
    short = " ".join(fault.split())[:_MAX_FAULT_CHARACTERS]
    logger.warning("attention runs on torch's operators, which is slower: Triton cannot be used (%s)%s", short, hint)
