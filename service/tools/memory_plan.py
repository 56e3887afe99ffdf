"""The report of `xlora-serve check --plan`. Knows wording only; engine/memory_plan.py computes the plan."""

from __future__ import annotations

from service.engine.memory_plan import PROCESS_BYTES, MemoryPlan
from service.engine.sizing import as_text


def describe_plan(plan: MemoryPlan) -> str:
    """The plan in several lines."""
    processes = PROCESS_BYTES if plan.device == "cpu" else 0
    weights, position = plan.weights, 2 * (plan.kv_slot_bytes + plan.gate_row_bytes)
    linears, stacks = plan.stored_dtypes
    kind = plan.dtype if plan.quantization is None else f"{plan.quantization}, the rest {plan.dtype}"
    kind += f"; linears, without loss, {linears}" if linears != plan.dtype else ""
    lines = [
        f"memory       {plan.device}, {plan.dtype}" + f"; {plan.memory.origin} has {as_text(plan.memory.total)}",
        f"  base                     {as_text(weights.base)}  ({kind})",
        f"  experts                  {as_text(weights.experts)}  (their stacks, {stacks})",
        f"  classifier               {as_text(weights.classifier)}  (float32)",
        f"  KV pool                  {as_text(plan.pool_bytes)}  ({plan.num_blocks:,} blocks of {plan.block_size}"
        " positions, one for scratch)",
    ]
    drafts = {"draft head ": weights.draft_head, "draft layer": weights.draft_layer}
    lines[4:4] = [f"  {name}              {as_text(size)}  ({plan.dtype})" for name, size in drafts.items() if size]
    if plan.reserve_bytes is not None:
        lines.append(f"  left for activations     {as_text(plan.reserve_bytes)}")
    else:
        lines.append(f"  processes                {as_text(PROCESS_BYTES)}  (with activations, about)")
    return "\n".join(
        [
            *lines,
            f"  together                 {as_text(weights.total + plan.pool_bytes + processes)}",
            f"a position   {as_text(position)} in two streams: keys and values 2 x {as_text(plan.kv_slot_bytes)}, "
            f"gate rows 2 x {as_text(plan.gate_row_bytes)}",
            f"room for     {plan.tokens:,} positions: {plan.full_requests} requests of {plan.max_model_len:,} tokens "
            f"at once (--max-num-seqs {plan.max_num_seqs})",
        ]
    )
