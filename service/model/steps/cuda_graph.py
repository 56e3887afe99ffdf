"""The decode step captured in CUDA graphs: one launch in place of some two thousand.

    batch  ->  static input buffers, filled up with idle rows  ->  replay  ->  the first rows of the static outputs

A graph has fixed shapes, so there is one per bucket of rows and of context. A row needs no neighbours: a segment of
several rows (drafts to verify, the rest of a prompt) is run as that many rows with the same block table, which is exact
because every row's key is written before any row attends. Larger batches are left to the eager model.
Buckets, padding and buffers are the same on every device; what it means to capture is a parameter.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from service.model import gate_rows
from service.model.batch import AttentionGroup, Batch, DraftStart, GateParameters
from service.model.draft_layer import Choose
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput, Step

logger = logging.getLogger(__name__)

_SMALLEST_CONTEXT = 512  # tokens
_CONTEXT_GROWTH = 4  # the kernels read what a row needs, so a wide table costs next to nothing

Replay = Callable[[], ForwardOutput]  # over static inputs, of all their rows
Capture = Callable[[Replay], Replay]


class GraphCapture:
    """Captures steps in CUDA graphs, all of them in one memory pool.

    A replay may overwrite what another graph computed: outputs are good until the next one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Replay) -> Replay:
        """Runs the step twice (libraries allocate and kernels compile on first use), then captures it."""
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(2):
                    step()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = step()

        def replay() -> ForwardOutput:
            graph.replay()
            return outputs

        return replay


class CapturedSteps:
    """The steps of `eager` over one KV cache, captured where they fit.

    Where capturing fails, the reason is logged once and every batch is run eagerly.
    """

    def __init__(self, eager: Step, kv_cache: KVCache, capture: Capture, *, max_rows: int, max_model_len: int) -> None:
        """Captures nothing yet. `max_rows`: rows of the largest step to capture."""
        self._eager, self._kv_cache, self._capture = eager, kv_cache, capture
        device, experts = kv_cache.gate_rows.device, kv_cache.gate_rows.shape[2]
        size = kv_cache.block_size
        self.row_buckets = buckets(1, 2, max_rows)
        self.width_buckets = buckets(-(-_SMALLEST_CONTEXT // size), _CONTEXT_GROWTH, -(-max_model_len // size))
        scratch = kv_cache.scratch_slot
        # token, position, KV slot, gate slot, new gate slot, is scaling: a row whose outcome nobody reads
        self._idle = torch.tensor([0, 0, scratch, kv_cache.dummy_slot, scratch, 0], device=device)[:, None]
        self._rows = self._idle.repeat(1, max_rows)  # int64 [6, rows]
        self._all_rows = torch.arange(max_rows, device=device)
        # Where no table is written, any block will do: positions hide it.
        self._tables = torch.full(
            (max_rows, self.width_buckets[-1]), kv_cache.num_blocks, dtype=torch.int64, device=device
        )
        self._parameters = GateParameters.of_checkpoint(max_rows, experts, device)
        self._of_checkpoint = GateParameters.of_checkpoint(max_rows, experts, device)
        self._steered = False  # whether `_parameters` differ from the checkpoint's
        self._captured: dict[tuple[int, int], Replay] = {}
        self._failed = False

    @property
    def captured(self) -> list[tuple[int, int]]:
        """The buckets (rows, blocks) captured so far."""
        return sorted(self._captured)

    def warm_up(self) -> None:
        """Captures every number of rows for short contexts, so that no early request waits for it."""
        for rows in reversed(self.row_buckets):  # the largest first: the others fit into its memory
            self._step_for(rows, self.width_buckets[0])

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """Runs T rows once. What it returns is good until the next forward."""
        assert kv_cache is self._kv_cache, "graphs are captured over one KV cache"
        count, scaling_rows = batch.rows.shape[1], batch.num_scaling_rows
        if count <= self.row_buckets[-1]:
            width = max(group.block_table.shape[1] for group in batch.groups)
            rows = _bucket(self.row_buckets, count)
            replay = self._step_for(rows, _bucket(self.width_buckets, width))
            if replay is not None:
                gate_rows.write_given(batch, kv_cache.gate_rows)
                self._fill(batch, count, rows)
                found = replay()
                logits = found.logits.index_select(0, batch.logit_rows)
                return ForwardOutput(
                    logits, found.gate_logits[:scaling_rows], found.scalings[:scaling_rows], found.hidden
                )
        return self._eager.forward(batch, kv_cache)

    def draft(self, start: DraftStart, choose: Choose, kv_cache: KVCache) -> Tensor:
        """Runs the draft layer eagerly: what it starts from is in the static outputs until the next forward."""
        return self._eager.draft(start, choose, kv_cache)

    def _fill(self, batch: Batch, count: int, rows: int) -> None:
        """Writes the batch into the static buffers: `count` rows and idle ones up to `rows`."""
        self._rows[:, :count].copy_(batch.rows)
        if count < rows:
            self._rows[:, count:rows] = self._idle
        for group in batch.groups:
            width = group.block_table.shape[1]
            own = self._tables[group.start : group.start + group.segments * group.queries, :width]
            own.view(group.segments, group.queries, width).copy_(group.block_table[:, None])
        if batch.parameters is not None:
            for static, given in zip(self._parameters.tensors(), batch.parameters.tensors(), strict=True):
                static[:count].copy_(given)
        elif self._steered:
            for static, given in zip(self._parameters.tensors(), self._of_checkpoint.tensors(), strict=True):
                static.copy_(given)
        self._steered = batch.parameters is not None

    @torch.inference_mode()
    def _step_for(self, rows: int, width: int) -> Replay | None:
        """The step of a bucket, captured on idle rows where there is none yet; None where that has failed."""
        if (rows, width) not in self._captured and not self._failed:
            self._rows[:] = self._idle

            def step() -> ForwardOutput:
                return self._eager.forward(self._static_batch(rows, width), self._kv_cache)

            try:
                self._captured[rows, width] = self._capture(step)
            except RuntimeError:
                logger.exception("the step cannot be captured in a CUDA graph, serving eagerly")
                self._failed = True
        return self._captured.get((rows, width))

    def _static_batch(self, rows: int, width: int) -> Batch:
        """The buffers' first rows as a batch whose rows all look alike: each is a segment of its own, has logits, and
        brings scalings, which go to the scratch slot where nobody wants them.
        """
        parameters = GateParameters(*(tensor[:rows] for tensor in self._parameters.tensors()))
        batch = Batch(
            self._rows[:, :rows], rows, self._all_rows[:rows], [], scaling_rows_are_gated=True, parameters=parameters
        )
        keys = width * self._kv_cache.block_size
        positions, tables = batch.positions[:, None], self._tables[:rows, :width]
        batch.groups = [AttentionGroup(0, rows, 1, positions, tables, keys, needs_mask=True)]
        return batch


def buckets(smallest: int, growth: int, largest: int) -> list[int]:
    """smallest, smallest * growth, ... up to `largest`, which is always one of them."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= growth
    return [*sizes, largest]


def _bucket(sizes: list[int], needed: int) -> int:
    """The smallest size that is enough."""
    return sizes[bisect.bisect_left(sizes, needed)]
