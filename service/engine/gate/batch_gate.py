"""Gate parameters of a batch, where requests or an operator's settings differ from the checkpoint's gate.

A fixed gate is one given row, stored in the real stream's slot of position 0. A request's own dummy row is stored in
the scaling stream's slot of position 0, whose gate row is otherwise unused: so it lives as long as the stream, and
cached blocks contain it. Everything else (temperature, top-k, excluded experts, weight) is a parameter per row.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from service.contract.checks import layer_of
from service.contract.steering import GateWeight
from service.engine.plan import ScheduledSequence
from service.engine.sequence import Sequence
from service.model.batch import GateParameters, GivenGateRows
from service.model.kv_cache import KVCache
from service.model.transfer import pack_to_device


def dummy_slot(kv_cache: KVCache, sequence: Sequence) -> int:
    """The slot of the gate row that a sequence's scaling pass reads."""
    if sequence.gate.dummy_row is None:
        return kv_cache.dummy_slot
    return sequence.scaling.blocks[0] * kv_cache.block_size


def given_rows(
    scheduled: Iterable[ScheduledSequence], kv_cache: KVCache, sites: SequenceOf[str]
) -> GivenGateRows | None:
    """The given gate rows (fixed gates, own dummy rows) of streams that begin in this step; None without any."""
    stored_sites, experts = kv_cache.gate_rows.shape[1:]
    slots: list[int] = []
    rows: list[npt.NDArray[np.float32]] = []
    for one in scheduled:
        sequence = one.sequence
        steering, dummy_row = sequence.request.steering, sequence.gate.dummy_row
        if steering is not None and steering.weights is not None and one.real_count and one.real_start == 0:
            slots.append(sequence.real.blocks[0] * kv_cache.block_size)
            rows.append(np.array(fixed_row(steering.weights, sites[:stored_sites], experts), np.float32).ravel())
        if dummy_row is not None and one.scaling_count and one.scaling_start == 0:
            slots.append(dummy_slot(kv_cache, sequence))
            rows.append(np.frombuffer(dummy_row, np.float32))
    if not slots:
        return None
    device = kv_cache.gate_rows.device
    places, packed = pack_to_device([np.array(slots, np.int64), np.concatenate(rows)], device)
    return GivenGateRows(places, packed.view(-1, stored_sites, experts))


def parameters(
    scheduled: SequenceOf[ScheduledSequence], rows: int, experts: int, device: torch.device
) -> GateParameters | None:
    """The gate parameters of a batch's rows; only rows of `scheduled` may differ from the checkpoint's gate. None where
    no row does.
    """
    if not scheduled:
        return None
    temperature, top_k, weight = [0.0] * rows, [0] * rows, [1.0] * rows
    excluded = bytearray(rows * experts)
    found = False
    for one in scheduled:
        steering, factor = one.sequence.request.steering, one.sequence.gate.weight
        if factor != 1.0:
            found = True
            weight[one.real_row : one.real_row + one.real_count] = [factor] * one.real_count
        if steering is None or steering.weights is not None:
            continue
        found = True
        mask = _excluded(steering.only, experts)
        first, count = one.scaling_row, one.scaling_count
        temperature[first : first + count] = [steering.temperature or 0.0] * count
        top_k[first : first + count] = [steering.top_k or 0] * count
        excluded[first * experts : (first + count) * experts] = mask * count
    if not found:
        return None
    columns: list[npt.NDArray[Any]] = [
        np.array(temperature, np.float32),
        np.array(top_k, np.int64),
        np.frombuffer(excluded, np.bool_),
        np.array(weight, np.float32),
    ]
    temperatures, top_ks, masks, weights = pack_to_device(columns, device)
    return GateParameters(temperatures, top_ks, masks.view(rows, experts), weights)


@lru_cache(maxsize=1024)
def _excluded(only: tuple[int, ...] | None, experts: int) -> bytes:
    """A mask of one row: 1 for every expert outside of `only`."""
    return bytes(only is not None and expert not in only for expert in range(experts))


def fixed_row(weights: SequenceOf[GateWeight], sites: SequenceOf[str], experts: int) -> list[list[float]]:
    """A fixed gate as a row [S, E]."""
    row = [[0.0] * experts for _ in sites]
    layers = [layer_of(site) for site in sites]
    for weight in weights:
        for site, layer in zip(row, layers, strict=True):
            if weight.layers is None or (layer is not None and weight.layers[0] <= layer <= weight.layers[1]):
                site[weight.expert] = weight.weight
    return row
