"""Parts of a step by themselves, for benchmarks/gpu.py: backends of attention, and the kernels that a step launches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.synthetic import Shape
from service.model.attention import backends, varlen
from service.model.attention.reference import sdpa
from service.model.batch import AttentionGroup, Batch
from service.model.kv_cache import KVCache, KVLayout
from service.model.xlora_model import XLoraModel

Record = Callable[[dict[str, Any]], None]


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Of one call, the mean of `repeats` after two that do not count."""
    for _ in range(2):
        call()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def attention(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    cases: Sequence[tuple[int, int, int]],
    blocks: Sequence[int],
    record: Record,
) -> list[dict[str, Any]]:
    """Every backend in the shapes of one layer. Cases are (streams, queries, keys) of the last positions."""
    rows = []
    for segments, queries, keys in cases:
        for block in blocks:
            case = _Case(shape, dtype, device, segments, queries, keys, block)
            for name in case.backends:
                row = {"backend": name, "block": block, "streams": segments, "queries": queries, "keys": keys}
                try:
                    row |= case.measure(name)
                except Exception as error:  # one that does not run here leaves the others their figures
                    row["failed"] = f"{type(error).__name__}: {error}"[:300]
                record(row)
                rows.append(row)
    return rows


class _Case:
    """`segments` streams of `keys` keys in blocks of `block`, of which the last `queries` positions attend."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        segments: int,
        queries: int,
        keys: int,
        block: int,
    ) -> None:
        self._device = device
        width = -(-keys // block)
        layout = KVLayout(1, shape.kv_heads, shape.head_dim, block, 1, 1, dtype)
        cache = KVCache.allocate(layout, segments * width, torch.zeros(1, 1, device=device))
        for pool in (*cache.keys, *cache.values):
            pool.normal_()
        table = torch.randperm(segments * width, device=device).view(segments, width)
        positions = torch.arange(keys - queries, keys, device=device).expand(segments, -1).contiguous()
        group = AttentionGroup(0, segments, queries, positions, table, keys, needs_mask=queries > 1)
        query = torch.randn(segments * queries, shape.heads, shape.head_dim, device=device, dtype=dtype)
        self._arguments = (query, group, 0, cache, shape.head_dim**-0.5, None, None)
        self._read = 2 * segments * keys * shape.kv_heads * shape.head_dim * dtype.itemsize
        self.backends: dict[str, backends.Backend] = {"sdpa": sdpa}
        if device.type == "cuda":
            if backends.triton_attend is not None:
                self.backends["triton"] = backends.triton_attend
            if varlen.works(device, dtype, shape.heads, shape.kv_heads, shape.head_dim, block):
                self.backends["varlen"] = varlen.attend

    def measure(self, name: str) -> dict[str, float]:
        """Seconds of a call, bytes of keys and values per second, and the largest difference from the reference."""

        def call() -> torch.Tensor:
            return self.backends[name](*self._arguments)

        error = (call() - sdpa(*self._arguments)).abs().max().item()
        seconds = seconds_of(replayed(call, self._device), 50, self._device)
        return {"seconds": seconds, "bytes_per_second": self._read / seconds, "error": error}


def replayed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`call` in a CUDA graph, so that its time on the device is measured and not its launch."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def kernels(model: XLoraModel, cache: KVCache, batch: Batch, record: Record) -> dict[str, Any]:
    """How many an eager step of `batch` launches, and which take longest."""
    device = model.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    model.forward(batch, cache)
    with torch.profiler.profile(activities=activities) as profile:
        model.forward(batch, cache)
        synchronize(device)
    if device.type != "cuda":
        return {"launched": 0, "longest": []}
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    events = [event for event in events if str(event.device_type).endswith("CUDA")]
    events.sort(key=lambda event: -event.self_device_time_total)
    longest = [
        {"name": event.key[:90], "count": event.count, "microseconds": event.self_device_time_total}
        for event in events[:15]
    ]
    for row in longest:
        record(row)
    return {"launched": sum(event.count for event in events), "longest": longest}


def idle_batch(cache: KVCache, rows: int, *, position: int, scaling_rows: int = 0) -> Batch:
    """`rows` rows at `position`, each in blocks of its own with whatever is in them; `scaling_rows` of them first."""
    device, width = cache.gate_rows.device, -(-(position + 1) // cache.block_size)
    table = (torch.arange(rows * width, device=device) % cache.num_blocks).view(rows, width)
    slots = table[:, position // cache.block_size] * cache.block_size + position % cache.block_size
    positions = torch.full((rows,), position, device=device)
    gates = torch.full_like(positions, cache.dummy_slot)
    gates[scaling_rows:] = slots[scaling_rows:]
    new_gates = torch.full_like(positions, cache.scratch_slot)
    group = AttentionGroup(0, rows, 1, positions[:, None], table, position + 1, needs_mask=False)
    is_scaling = (torch.arange(rows, device=device) < scaling_rows).long()
    lines = torch.stack([positions + 16, positions, slots, gates, new_gates, is_scaling])
    return Batch(lines, scaling_rows, torch.arange(rows, device=device), [group])
