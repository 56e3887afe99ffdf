"""Resolves the options that the operator leaves open, before any weight is read, so that the model fits the memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch

from service.checkpoint import Checkpoint
from service.contract.options import EngineOptions
from service.engine.memory_plan import FindBfloat16, MemoryPlan, plan_memory
from service.engine.sizing import NoRoom, as_text, possible_dtypes


def resolve_options(
    checkpoint: Checkpoint,
    options: EngineOptions,
    device: torch.device,
    gpu_bytes: int | None,
    find_bfloat16: FindBfloat16,
) -> tuple[EngineOptions, MemoryPlan]:
    """The options with the best dtype that fits, and the memory plan. On a CPU the options also get the context length
    and the size of the KV pool; on a GPU those follow once the weights are loaded, from the memory that is left.

    Raises NoRoom, with the arithmetic, where the model fits in none of the possible dtypes.
    """
    refusal: NoRoom | None = None
    for dtype in possible_dtypes(options.dtype, checkpoint, device, options.quantization):
        chosen = replace(options, dtype=dtype)
        try:
            plan = plan_memory(checkpoint, chosen, gpu_bytes, find_bfloat16)
        except NoRoom as error:
            refusal = error
            continue
        if device.type == "cpu":
            block_bytes = (plan.kv_slot_bytes + plan.gate_row_bytes) * plan.block_size
            pool_bytes = plan.num_blocks * block_bytes
            chosen = replace(chosen, max_model_len=plan.max_model_len, kv_memory_bytes=pool_bytes)
        return chosen, plan
    assert refusal is not None  # possible_dtypes is never empty
    if options.dtype != "auto":
        with suppress(NoRoom):
            _, other = resolve_options(checkpoint, replace(options, dtype="auto"), device, gpu_bytes, find_bfloat16)
            refusal = NoRoom(refusal.message, hint=f"this fits: --dtype {other.dtype}")
    raise refusal


def summarise(plan: MemoryPlan, options: EngineOptions) -> str:
    """The log line about the resolved options: dtype, context length, and memory."""
    context = f"texts of {plan.max_model_len:,} tokens"
    if options.max_model_len is None and plan.max_model_len < plan.base_max_model_len:
        context += f", the longest that fit (the base takes {plan.base_max_model_len:,})"
    sizes = f"weights {as_text(plan.weights.total)}, keys and values {as_text(plan.pool_bytes)}"
    return f"{plan.dtype}, {context}: {sizes} of {as_text(plan.memory.total)} that {plan.memory.origin} has"
