"""Sizes of an engine, from its options: device, dtype, context length, rows per step, KV blocks.

Knows the arithmetic for a given model, loaded or on the meta device. memory_plan.py applies it before loading, to
decide whether the model fits; the loader and the ranks of a group apply it to what is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from service.checkpoint import Checkpoint
from service.checkpoint.base import stored_dtype
from service.contract.errors import SettingsError, StartupError
from service.contract.options import EngineOptions
from service.engine.machine import host_memory
from service.model.kv_cache import KVCache, KVLayout
from service.model.loading.context import Context, read_context
from service.model.xlora_model import XLoraModel

_MIB = 1 << 20
_CPU_KV_BYTES = 512 * _MIB  # the default of --kv-memory on a CPU, or one request of full length if that is more
_BATCHED_TOKENS = {"cpu": 256, "cuda": 1024}  # the default of --max-num-batched-tokens
MIN_CONTEXT = 1024  # tokens: without --max-model-len, a shorter context (or the base's, if shorter) is refused
CUDA_KV_FRACTION = 0.85  # of the memory that is free once the weights are loaded; activations take the rest


class NoRoom(StartupError):
    """The model does not fit the memory under these options."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of one engine."""

    max_model_len: int
    max_rows: int  # of a step
    layout: KVLayout
    num_blocks: int

    def within(self, num_blocks: int) -> int:
        """The context length with `num_blocks` blocks."""
        return min(self.max_model_len, num_blocks // 2 * self.layout.block_size)


def divide_memory(model: XLoraModel, options: EngineOptions, device: torch.device, free_bytes: int | None) -> Sizes:
    """The sizes of an engine over `model` on `device` with `free_bytes` besides the weights (None: a CPU, all of whose
    memory counts).

    Without --max-model-len the context length is the base's own, or the longest that fits. Raises SettingsError for an
    impossible option, StartupError when not even one request fits.
    """
    layout = model.kv_layout(options.block_size)
    budget = _kv_budget(options, device, free_bytes)
    max_model_len = _context(read_context(model.config), layout, options, budget)
    if device.type == "cpu" and options.kv_memory_bytes is None:
        budget = min(budget, max(_CPU_KV_BYTES, layout.blocks_for(max_model_len) * layout.block_bytes))
    num_blocks = plan_blocks(layout, max_model_len, options.max_num_seqs, budget)
    return Sizes(max_model_len, resolve_batched_tokens(options, device), layout, num_blocks)


def _kv_budget(options: EngineOptions, device: torch.device, free_bytes: int | None) -> int:
    """Bytes that the KV pool may take."""
    if options.kv_memory_bytes is not None:
        return options.kv_memory_bytes
    if device.type == "cuda" and free_bytes is not None:
        return int(free_bytes * CUDA_KV_FRACTION)
    return host_memory().total if free_bytes is None else free_bytes


def _context(context: Context, layout: KVLayout, options: EngineOptions, budget: int) -> int:
    """The context length in tokens."""
    asked = options.max_model_len
    if asked is None:
        longest = budget // layout.block_bytes // 2 * layout.block_size
        return max(min(context.default_tokens, longest), min(context.default_tokens, MIN_CONTEXT))
    if asked > context.max_tokens:
        raise SettingsError(
            f"--max-model-len {asked} is over the {context.max_tokens} tokens that the base's config.json allows",
            hint=f"--max-model-len {context.max_tokens} is the most",
        )
    return asked


def allocate_cache(model: XLoraModel, sizes: Sizes) -> KVCache:
    """The KV cache of a model, in these sizes."""
    return KVCache.allocate(sizes.layout, sizes.num_blocks, model.dummy_row)


def resolve_device(name: str) -> torch.device:
    """The device of --device; `auto` is a GPU where there is one. Raises SettingsError for a device that is missing."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices", hint="use --device cpu"
        )
    return device


def possible_dtypes(
    name: str, checkpoint: Checkpoint, device: torch.device, quantization: str | None = None
) -> list[str]:
    """The dtypes that --dtype allows, the best first. On a GPU, `auto` is the base's own dtype. On a CPU it is float32,
    which is exact and no slower, then the base's own in case float32 does not fit; with quantized weights it is
    bfloat16, which torch's operators for them are made for.
    """
    if name != "auto":
        return [name]
    if device.type == "cpu" and quantization is not None:
        return ["bfloat16"]
    stored = stored_dtype(checkpoint.base_path)
    return list(dict.fromkeys(["float32", stored])) if device.type == "cpu" else [stored]


def resolve_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The best of `possible_dtypes`. Raises SettingsError for an unknown name."""
    best = possible_dtypes(name, checkpoint, device)[0]
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if best not in dtypes:
        raise SettingsError(f"dtype {best!r} is not one of {', '.join(dtypes)}", hint="set --dtype")
    return dtypes[best]


def resolve_batched_tokens(options: EngineOptions, device: torch.device) -> int:
    """The row budget of a step (--max-num-batched-tokens). The default is the smallest that computes a long prompt
    about as fast as a larger one would (DECISIONS.md), and twice the rows of max_num_seqs sequences that decode.
    """
    return options.max_num_batched_tokens or max(_BATCHED_TOKENS[device.type], 4 * options.max_num_seqs)


def free_device_bytes(device: torch.device) -> int | None:
    """The bytes that are free on a GPU now; None on a CPU, whose memory other processes use too."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def plan_blocks(layout: KVLayout, max_model_len: int, max_num_seqs: int, budget: int) -> int:
    """The number of KV blocks that fit the budget in bytes, at most those of max_num_seqs requests of full length.

    Raises NoRoom when not even one request of max_model_len fits.
    """
    one = layout.blocks_for(max_model_len)
    blocks = min(one * max_num_seqs, max(budget, 0) // layout.block_bytes)
    if blocks < one:
        raise NoRoom(
            f"one request of {max_model_len} tokens needs {one * layout.block_bytes / _MIB:.0f} MiB of KV memory "
            f"(two streams), and there are {max(budget, 0) / _MIB:.0f} MiB",
            hint="raise --kv-memory or lower --max-model-len",
        )
    return blocks


def as_text(count: int) -> str:
    """A number of bytes as text, in the largest unit of which it has at least one."""
    for unit, name in ((1 << 30, "GiB"), (_MIB, "MiB"), (1 << 10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"
