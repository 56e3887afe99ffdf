"""Options that the operator leaves open, decided so that the model fits the machine, before any weight is read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch

from service.checkpoint import Checkpoint
from service.contract.options import EngineOptions
from service.engine.memory_plan import ExpectBfloat16, MemoryPlan, plan_memory
from service.engine.sizing import NoRoom, as_text, possible_dtypes


def settle(
    checkpoint: Checkpoint,
    options: EngineOptions,
    device: torch.device,
    gpu_bytes: int | None,
    expect_bfloat16: ExpectBfloat16,
) -> tuple[EngineOptions, MemoryPlan]:
    """The options with a dtype that fits, and the plan; on a CPU also with the context and the KV pool. A GPU's are
    divided when the weights are there, by what they leave.

    Raises NoRoom with the arithmetic where the model does not fit in any dtype that may be chosen.
    """
    refusal: NoRoom | None = None
    for dtype in possible_dtypes(options.dtype, checkpoint, device, options.quantization):
        chosen = replace(options, dtype=dtype)
        try:
            plan = plan_memory(checkpoint, chosen, gpu_bytes, expect_bfloat16)
        except NoRoom as error:
            refusal = error
            continue
        if device.type == "cpu":
            block_bytes = (plan.kv_slot_bytes + plan.gate_row_bytes) * plan.block_size
            pool_bytes = plan.num_blocks * block_bytes
            chosen = replace(chosen, max_model_len=plan.max_model_len, kv_memory_bytes=pool_bytes)
        return chosen, plan
    assert refusal is not None  # there is a dtype to try at least
    if options.dtype != "auto":
        with suppress(NoRoom):
            _, other = settle(checkpoint, replace(options, dtype="auto"), device, gpu_bytes, expect_bfloat16)
            refusal = NoRoom(refusal.message, hint=f"this fits: --dtype {other.dtype}")
    raise refusal


def summarise(plan: MemoryPlan, options: EngineOptions) -> str:
    """Return the line of the log that says how `options` were settled."""
    context = f"texts of {plan.max_model_len:,} tokens"
    if options.max_model_len is None and plan.max_model_len < plan.base_max_model_len:
        context += f", the longest that fit (the base takes {plan.base_max_model_len:,})"
    sizes = f"weights {as_text(plan.weights.total)}, keys and values {as_text(plan.pool_bytes)}"
    return f"{plan.dtype}, {context}: {sizes} of {as_text(plan.memory.total)} that {plan.memory.origin} has"
