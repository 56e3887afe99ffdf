"""Sizes of an engine, from its options: device, dtype, context, rows of a step, and how the memory is divided.

Knows the arithmetic; the loader, the ranks of a group and `check --plan` do with it what they like.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import torch

from service.checkpoint import Checkpoint
from service.checkpoint.base import stored_dtype
from service.contract.errors import SettingsError, StartupError
from service.contract.options import EngineOptions
from service.model.kv_cache import KVCache, KVLayout
from service.model.loading.context import read_context
from service.model.xlora_model import XLoraModel

_MIB = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_CPU_KV_BYTES = 512 * _MIB  # what --kv-memory defaults to on a CPU, if the requests allowed at once need that much
_BATCHED_TOKENS = {"cpu": 256, "cuda": 1024}  # what --max-num-batched-tokens defaults to
CUDA_KV_SHARE = 0.85  # of what is free once the weights are loaded; the rest is for activations


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of one engine."""

    max_model_len: int
    max_rows: int  # of a step
    layout: KVLayout
    num_blocks: int


def divide_memory(model: XLoraModel, options: EngineOptions, device: torch.device, free_bytes: int | None) -> Sizes:
    """The sizes of an engine over `model` on `device`, whose `free_bytes` the weights have left (None: a CPU).

    Raises SettingsError for an impossible option, StartupError when not even one request of full length fits.
    """
    context = read_context(model.config)
    max_model_len = options.max_model_len or context.usual
    if max_model_len > context.most:
        raise SettingsError(
            f"--max-model-len {max_model_len} is over the {context.most} tokens that the base's config.json allows",
            hint=f"--max-model-len {context.most} is the most",
        )
    layout = model.kv_layout(options.block_size)
    num_blocks = plan_blocks(layout, max_model_len, options, free_bytes)
    return Sizes(max_model_len, resolve_batched_tokens(options, device), layout, num_blocks)


def allocate_cache(model: XLoraModel, sizes: Sizes) -> KVCache:
    """The pool of a model."""
    return KVCache.allocate(sizes.layout, sizes.num_blocks, model.dummy_row)


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises SettingsError for a device this machine has not."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices", hint="use --device cpu"
        )
    return device


def resolve_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU (exact, and no slower there) and the base's own on CUDA."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else stored_dtype(checkpoint.base_path)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise SettingsError(f"dtype {name!r} is not one of {', '.join(dtypes)}", hint="set --dtype")
    return dtypes[name]


def resolve_batched_tokens(options: EngineOptions, device: torch.device) -> int:
    """Most rows in one step: as few as compute a long prompt about as fast as more would (DECISIONS.md), and twice what
    decoding needs when every seat is taken.
    """
    return options.max_num_batched_tokens or max(_BATCHED_TOKENS[device.type], 4 * options.max_num_seqs)


def free_device_bytes(device: torch.device) -> int | None:
    """What is free on a GPU now; None on a CPU, whose memory others share."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def plan_blocks(layout: KVLayout, max_model_len: int, options: EngineOptions, free_bytes: int | None) -> int:
    """How many KV blocks fit the budget, and never more than max_num_seqs requests of full length could use.

    `free_bytes` of a GPU once the weights are loaded, None on a CPU. Raises StartupError when not even one request of
    max_model_len fits.
    """
    one = layout.blocks_for(max_model_len)
    most = one * options.max_num_seqs
    budget = options.kv_memory_bytes
    if budget is None and free_bytes is not None:
        budget = int(free_bytes * CUDA_KV_SHARE)
    if budget is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        budget = min(max(_CPU_KV_BYTES, one * layout.block_bytes), memory)
    blocks = min(most, budget // layout.block_bytes)
    if blocks < one:
        raise StartupError(
            f"one request of {max_model_len} tokens needs {one * layout.block_bytes / _MIB:.0f} MiB of KV memory "
            f"(two streams), and there are {budget / _MIB:.0f} MiB",
            hint="raise --kv-memory or lower --max-model-len",
        )
    return blocks


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed, where the C library is glibc.

    A step frees and takes the same megabytes of activations again; handed back to the kernel in between they cost a
    page fault per 4 KiB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)  # the largest there is
        mallopt(_M_TRIM_THRESHOLD, 1024 * _MIB)
