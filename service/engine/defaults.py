"""Options that the operator leaves open, decided so that the model fits the machine, before any weight is read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch

from service.checkpoint import Checkpoint
from service.checkpoint.base import stored_dtype
from service.contract.options import EngineOptions
from service.engine.memory_plan import ExpectBfloat16, MemoryPlan, plan_memory
from service.engine.sizing import NoRoom, as_text


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
    for dtype in _dtypes(options, checkpoint, device):
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
    assert refusal is not None
    if options.dtype != "auto":
        with suppress(NoRoom):
            _, other = settle(checkpoint, replace(options, dtype="auto"), device, gpu_bytes, expect_bfloat16)
            refusal = NoRoom(refusal.message, hint=f"this fits: --dtype {other.dtype}")
    raise refusal


def _dtypes(options: EngineOptions, checkpoint: Checkpoint, device: torch.device) -> list[str]:
    """What --dtype may become, the best first: on a CPU float32 is exact and no slower, a GPU takes the base's own."""
    if options.dtype != "auto":
        return [options.dtype]
    if device.type == "cpu" and options.quantization is not None:
        return ["bfloat16"]  # what torch's operators for packed weights are made for
    stored = stored_dtype(checkpoint.base_path)
    return list(dict.fromkeys(["float32", stored])) if device.type == "cpu" else [stored]


def summarise(plan: MemoryPlan) -> str:
    """What was chosen, as a line of the log."""
    context = f"texts of {plan.max_model_len:,} tokens"
    if plan.max_model_len < plan.base_max_model_len:
        context += f", the longest that fit (the base takes {plan.base_max_model_len:,})"
    sizes = f"weights {as_text(plan.weights.total)}, keys and values {as_text(plan.pool_bytes)}"
    return f"{plan.dtype}, {context}: {sizes} of {as_text(plan.memory.total)} that {plan.memory.origin} has"
