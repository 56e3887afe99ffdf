"""What rank 0 of a tensor-parallel group tells the others: control messages as JSON, steps as plain numbers.

A step is one frame of 64-bit integers, so that it costs no parsing; values of gate rows follow their slots as 32-bit
floats. Nothing is pickled. Knows batches, not plans or requests: those stay with rank 0.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from service.model.batch import LINES, AttentionGroup, Batch

_FORWARD, _GATE_ROWS = 0, 1  # the first integer; a control message begins with a brace
_WORD = 8  # bytes of an integer
_GROUP_FIELDS = 6


def pack(message: dict[str, Any]) -> bytes:
    """A control message."""
    return json.dumps(message).encode()


def unpack(frame: bytes) -> dict[str, Any] | None:
    """A control message again; None for a step."""
    if not frame.startswith(b"{"):
        return None
    message: dict[str, Any] = json.loads(frame)
    return message


def pack_batch(batch: Batch) -> bytes:
    """Everything a forward needs."""
    gated = int(batch.scaling_rows_are_gated)
    head = [_FORWARD, batch.rows.shape[1], batch.num_scaling_rows, gated, len(batch.logit_rows), len(batch.groups)]
    for group in batch.groups:
        width = group.block_table.shape[1]
        head += [group.start, group.segments, group.queries, width, group.keys, int(group.needs_mask)]
    tables = [group.block_table.flatten() for group in batch.groups]
    numbers = torch.cat([batch.rows.flatten(), batch.logit_rows, *tables]).cpu()
    return torch.tensor(head).numpy().tobytes() + numbers.numpy().tobytes()


def unpack_batch(frame: bytes, device: torch.device) -> Batch | None:
    """The batch again, on `device`; None for another frame."""
    numbers = torch.frombuffer(bytearray(frame[: len(frame) // _WORD * _WORD]), dtype=torch.int64)
    if numbers[0] != _FORWARD:
        return None
    row_count, scaling_rows, gated, logits, groups = numbers[1:6].tolist()
    first = 6 + groups * _GROUP_FIELDS
    heads = numbers[6:first].view(groups, _GROUP_FIELDS).tolist()
    sizes = [LINES * row_count, logits, *(segments * width for _, segments, _, width, _, _ in heads)]
    rows, logit_rows, *tables = numbers[first:].to(device).split_with_sizes(sizes)
    batch = Batch(rows.view(LINES, row_count), scaling_rows, logit_rows, [], bool(gated))
    for (start, segments, queries, width, keys, needs_mask), table in zip(heads, tables, strict=True):
        positions = batch.positions[start : start + segments * queries].view(segments, queries)
        table = table.view(segments, width)
        batch.groups.append(AttentionGroup(start, segments, queries, positions, table, keys, bool(needs_mask)))
    return batch


def pack_gate_rows(slots: list[int], rows: Tensor) -> bytes:
    """Gate rows [n, S, E] to be stored in `slots`."""
    values = rows.float().cpu().contiguous()
    return torch.tensor([_GATE_ROWS, len(slots), *slots]).numpy().tobytes() + values.numpy().tobytes()


def unpack_gate_rows(frame: bytes, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slots int64 [n] and rows fp32 [n, S, E]; `shape` is [S, E]."""
    content = bytearray(frame)
    [count] = torch.frombuffer(content, dtype=torch.int64, count=1, offset=_WORD).tolist()
    slots = torch.frombuffer(content, dtype=torch.int64, count=count, offset=2 * _WORD)
    rows = torch.frombuffer(content, dtype=torch.float32, offset=(2 + count) * _WORD)
    return slots.to(device), rows.view(count, *shape).to(device)
