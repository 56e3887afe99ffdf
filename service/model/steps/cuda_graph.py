"""The decode step in CUDA graphs: one launch instead of some two thousand.

    batch  ->  static input buffers, filled up with idle rows  ->  replay  ->  the first rows of the static outputs

A graph has fixed shapes, so there is one per bucket of rows and of context length. Every row is a segment of its own: a
segment of several rows (drafts to verify, the rest of a prompt) becomes that many rows with the same block table, which
is exact because every row's key is written before any row attends. Larger batches run on the eager step.
Knows buckets, padding and buffers, which are the same on every device; capturing itself is a parameter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from service.model import gate_rows
from service.model.batch import AttentionGroup, Batch, DraftStart, GateParameters
from service.model.draft_layer import Choose, PureChoice
from service.model.kv_cache import KVCache
from service.model.steps.buckets import bucket, buckets
from service.model.steps.captured_drafts import CapturedDrafts
from service.model.steps.step import ForwardOutput, Step
from service.model.steps.warm_up import idle_batch, idle_start

logger = logging.getLogger(__name__)

Output = TypeVar("Output")

_MIN_CONTEXT = 512  # tokens, of the smallest bucket
_CONTEXT_GROWTH = 4  # kernels read only the blocks that a row needs, so a wide table costs almost nothing

Replay = Callable[[], ForwardOutput]  # runs all rows of the static inputs


class Capture(Protocol):
    """Captures work over static inputs. Returns a function that replays it into the same output tensors."""

    def __call__(self, work: Callable[[], Output], /) -> Callable[[], Output]:
        """Runs the work at least once."""


class GraphCapture:
    """Captures steps in CUDA graphs that share one memory pool for their intermediate results; each keeps its outputs.

    A replay may overwrite the intermediate results of other graphs: nothing but outputs may be read, until the next
    replay of the same graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Output], /) -> Callable[[], Output]:
        """Runs the work twice first, because libraries allocate and kernels compile on first use; then captures it."""
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(2):
                    work()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with (
                torch.cuda.stream(current),  # also where capturing fails: torch would stay on its own stream then
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                outputs = work()

        def replay() -> Output:
            graph.replay()
            return outputs

        return replay


class CapturedSteps:
    """A Step over one KV cache that replays captured graphs of `eager`, and runs `eager` for batches that fit none.

    When capturing fails, the reason is logged once, and every batch runs eagerly.
    """

    def __init__(
        self,
        eager: Step,
        kv_cache: KVCache,
        capture: Capture,
        *,
        max_rows: int,
        max_model_len: int,
        max_num_seqs: int = 1,
        draft_depth: int = 1,
    ) -> None:
        """Captures nothing yet. `max_rows`: rows of the largest step to capture. `draft_depth`: the depth of the
        model's draft layer, 1 without one.
        """
        self._eager, self._kv_cache, self._capture = eager, kv_cache, capture
        device, experts = kv_cache.gate_rows.device, kv_cache.gate_rows.shape[2]
        size = kv_cache.block_size
        self.row_buckets = buckets(1, 2, max_rows)
        self.width_buckets = buckets(-(-_MIN_CONTEXT // size), _CONTEXT_GROWTH, -(-max_model_len // size))
        scratch = kv_cache.scratch_slot
        # An idle row: token, position, KV slot, gate slot, new gate slot, is scaling. Nobody reads its results.
        self._idle = torch.tensor([0, 0, scratch, kv_cache.dummy_slot, scratch, 0], device=device)[:, None]
        self._fields = self._idle.repeat(1, max_rows)  # int64 [6, rows]
        self._all_rows = torch.arange(max_rows, device=device)
        # The rest of a table may name any block, because positions mask it.
        self._tables = torch.full(
            (max_rows, self.width_buckets[-1]), kv_cache.num_blocks, dtype=torch.int64, device=device
        )
        self._parameters = GateParameters.of_checkpoint(max_rows, experts, device)
        self._of_checkpoint = GateParameters.of_checkpoint(max_rows, experts, device)
        self._steered = False  # whether `_parameters` differ from the checkpoint's
        self._captured: dict[tuple[int, int], Replay] = {}
        self._logits: Tensor | None = None  # of all graphs: logits of each would take a gigabyte of all together
        self._failed = False
        self._max_num_seqs, self._draft_depth = max_num_seqs, draft_depth
        self._drafts: CapturedDrafts | None = None

    @property
    def captured(self) -> list[tuple[int, int]]:
        """The buckets (rows, blocks) that have been captured."""
        return sorted(self._captured)

    def warm_up(self, choices: Iterable[PureChoice] = ()) -> None:
        """Captures all row buckets for short contexts, and the draft layer with `choices` of one row, so that early
        requests need not wait for it.
        """
        for rows in reversed(self.row_buckets):  # the largest first: the others reuse what it needs in between
            self._step_for(rows, self.width_buckets[0])
        if self._draft_depth > 1:
            hidden = self._eager.forward(idle_batch(self._kv_cache, 2), self._kv_cache).hidden
            drafts = self._drafts_of(hidden)
            for choice in choices:
                drafts.warm_up(idle_start(self._kv_cache, hidden[:1]), choice)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """Step.forward. The output is valid until the next forward."""
        assert kv_cache is self._kv_cache, "graphs are captured over one KV cache"
        count, scaling_rows = batch.fields.shape[1], batch.num_scaling_rows
        if count <= self.row_buckets[-1]:
            width = max(group.block_table.shape[1] for group in batch.groups)
            rows = bucket(self.row_buckets, count)
            replay = self._step_for(rows, bucket(self.width_buckets, width))
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
        """Step.draft, captured where possible. The result is valid until the next call."""
        assert kv_cache is self._kv_cache, "graphs are captured over one KV cache"
        return self._drafts_of(start.state).draft(start, choose)

    def _drafts_of(self, hidden: Tensor) -> CapturedDrafts:
        if self._drafts is None:
            self._drafts = CapturedDrafts(
                *(self._eager, self._kv_cache, self._capture),
                hidden=hidden,
                depth=self._draft_depth,
                max_sequences=self._max_num_seqs,
                width_buckets=self.width_buckets,
            )
        return self._drafts

    def _fill(self, batch: Batch, count: int, rows: int) -> None:
        """Writes the batch to the static buffers: its `count` rows, and idle rows up to `rows`."""
        self._fields[:, :count].copy_(batch.fields)
        if count < rows:
            self._fields[:, count:rows] = self._idle
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
        """The replay of a bucket, which is captured on idle rows if needed; None when that fails."""
        if (rows, width) not in self._captured and not self._failed:
            self._fields[:] = self._idle

            def step() -> ForwardOutput:
                output = self._eager.forward(self._static_batch(rows, width), self._kv_cache)
                if self._logits is None:
                    self._logits = output.logits.new_empty(self.row_buckets[-1], output.logits.shape[1])
                return replace(output, logits=self._logits[:rows].copy_(output.logits))

            try:
                self._captured[rows, width] = self._capture(step)
            except RuntimeError:
                logger.exception("the step cannot be captured in a CUDA graph, serving eagerly")
                self._failed = True
        return self._captured.get((rows, width))

    def _static_batch(self, rows: int, width: int) -> Batch:
        """The buffers' first rows as a batch of uniform rows: each is a segment of its own, computes logits, and
        computes scalings, which real rows write to the scratch slot.
        """
        parameters = GateParameters(*(tensor[:rows] for tensor in self._parameters.tensors()))
        batch = Batch(
            self._fields[:, :rows], rows, self._all_rows[:rows], [], scaling_rows_are_gated=True, parameters=parameters
        )
        keys = width * self._kv_cache.block_size
        positions, tables = batch.positions[:, None], self._tables[:rows, :width]
        batch.groups = [AttentionGroup(0, rows, 1, positions, tables, keys, needs_mask=True)]
        return batch
