"""Encodes the messages between the ranks of a tensor-parallel group: control messages as JSON, batches as numbers.

A batch is one frame of 64-bit integers, which need no parsing; 32-bit floats follow where rows steer the gate. Nothing
is pickled. Knows batches, not plans or requests, which stay with rank 0.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from service.model.batch import FIELDS, AttentionGroup, Batch, GateParameters, GivenGateRows

_WORD = 8  # bytes of an integer
_HEAD = 8  # integers at the start of a batch; the first is 0, and a control message begins with a brace
_GROUP_FIELDS = 6


def pack(message: dict[str, Any]) -> bytes:
    """Encodes a control message."""
    return json.dumps(message).encode()


def unpack(frame: bytes) -> dict[str, Any] | None:
    """Decodes a control message; None for a frame with a batch."""
    if not frame.startswith(b"{"):
        return None
    message: dict[str, Any] = json.loads(frame)
    return message


def pack_batch(batch: Batch) -> bytes:
    """Encodes a batch."""
    given, parameters = batch.given, batch.parameters
    head = [0, batch.fields.shape[1], batch.num_scaling_rows, int(batch.scaling_rows_are_gated), len(batch.logit_rows)]
    head += [len(batch.groups), 0 if given is None else len(given.slots), int(parameters is not None)]
    for group in batch.groups:
        width = group.block_table.shape[1]
        head += [group.start, group.segments, group.queries, width, group.keys, int(group.needs_mask)]
    integers = [batch.fields, batch.logit_rows, *(group.block_table for group in batch.groups)]
    others: list[Tensor] = []
    if given is not None:
        integers.append(given.slots)
        others.append(given.rows)
    if parameters is not None:
        integers.append(parameters.top_k)
        others += [parameters.temperature, parameters.weight, parameters.excluded.to(torch.float32)]
    numbers = torch.cat([tensor.flatten() for tensor in integers]).cpu()
    frame = torch.tensor(head).numpy().tobytes() + numbers.numpy().tobytes()
    return frame + b"".join(tensor.contiguous().cpu().numpy().tobytes() for tensor in others)


def unpack_batch(frame: bytes, shape: torch.Size, device: torch.device) -> Batch:
    """Decodes a batch to `device`; `shape` [S, E] is that of a gate row."""
    content = bytearray(frame)
    words = torch.frombuffer(content, dtype=torch.int64, count=len(content) // _WORD)
    _, row_count, scaling_rows, gated, logits, groups, given, steered = words[:_HEAD].tolist()
    first = _HEAD + groups * _GROUP_FIELDS
    heads = words[_HEAD:first].view(groups, _GROUP_FIELDS).tolist()
    sizes = [FIELDS * row_count, logits, *(segments * width for _, segments, _, width, _, _ in heads)]
    sizes += [given, row_count * steered]
    last = first + sum(sizes)
    rows, logit_rows, *tables, slots, top_k = words[first:last].to(device).split_with_sizes(sizes)
    batch = Batch(rows.view(FIELDS, row_count), scaling_rows, logit_rows, [], bool(gated))
    for (start, segments, queries, width, keys, needs_mask), table in zip(heads, tables, strict=True):
        positions = batch.positions[start : start + segments * queries].view(segments, queries)
        table = table.view(segments, width)
        batch.groups.append(AttentionGroup(start, segments, queries, positions, table, keys, bool(needs_mask)))
    if not given and not steered:
        return batch
    sites, experts = shape
    others = torch.frombuffer(content, dtype=torch.float32, offset=last * _WORD).to(device)
    own = row_count * steered
    gates, temperature, weight, excluded = others.split_with_sizes([given * sites * experts, own, own, own * experts])
    if given:
        batch.given = GivenGateRows(slots, gates.view(given, sites, experts))
    if steered:
        batch.parameters = GateParameters(temperature, top_k, excluded.view(row_count, experts) > 0, weight)
    return batch
