"""What requests admitted under an operator's gate settings read instead of the checkpoint's gate rows.

A dummy row of their own lies in the scaling stream's slot of position 0, whose gate row has no other use: it comes and
goes with the stream, and cached blocks bring it along. A global weight of their own is applied to copies of the stored
rows, in the spare rows of the pool, so that what is stored and returned stays without it, and that every way to run a
step (eager or captured) finds it where it looks anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from service.engine.scheduler import Scheduled
from service.engine.sequence import Sequence
from service.model.kv_cache import KVCache
from service.model.transfer import to_device

_Store = Callable[[list[int], Tensor], None]  # writes gate rows [n, S, E] into slots, wherever they are kept


def dummy_slot(kv_cache: KVCache, sequence: Sequence) -> int:
    """Where the gate row of a sequence's scaling pass is."""
    if sequence.gate.dummy_row is None:
        return kv_cache.dummy_slot
    return sequence.scaling.blocks[0] * kv_cache.block_size


def write_dummy_rows(kv_cache: KVCache, shares: Iterable[Scheduled], store: _Store) -> None:
    """Stores the dummy rows of scaling streams that begin in this step."""
    for share in shares:
        row = share.sequence.gate.dummy_row
        if row is not None and share.scaling_count and share.scaling_start == 0:
            stored = kv_cache.gate_rows
            values = torch.frombuffer(bytearray(row), dtype=torch.float32).view(1, *stored.shape[1:])
            store([dummy_slot(kv_cache, share.sequence)], values.to(stored.device))


def weigh(kv_cache: KVCache, gate_slots: Tensor, weights: dict[int, float], store: _Store) -> None:
    """Lets some rows of a batch read weighted copies of their scalings: weights by row; gate_slots int64 [T], changed
    in place.
    """
    if not weights:
        return
    stored, first = kv_cache.gate_rows, kv_cache.first_spare_slot
    rows = to_device(list(weights), stored.device)
    spare = list(range(first, first + len(weights)))
    factors = torch.tensor(list(weights.values()), device=stored.device)[:, None, None]
    store(spare, stored.index_select(0, gate_slots[rows]) * factors)
    gate_slots[rows] = to_device(spare, stored.device)
