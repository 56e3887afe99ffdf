"""The draft layer in CUDA graphs: one launch instead of some forty for every drafted token.

    start  ->  static buffers (stale rows beyond n are ignored)  ->  replay  ->  first n rows, first depth - 1 columns

A graph always drafts to the layer's full depth. It includes the choice of tokens, if that depends on tensors alone
(PureChoice); with any other choice the layer runs eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from service.model.batch import AttentionGroup, DraftStart
from service.model.draft_layer import Choose, PureChoice
from service.model.kv_cache import KVCache
from service.model.steps.buckets import bucket, buckets
from service.model.steps.step import Step

logger = logging.getLogger(__name__)

_MAX_SEQUENCES = 32  # with more, the layer is a small part of a step

Replay = Callable[[], Tensor]  # over static inputs, int64 [sequences, depth - 1]


class CapturedDrafts:
    """The draft layer of `eager` over one KV cache, captured. When capturing fails, it is logged, and runs eagerly."""

    def __init__(
        self,
        eager: Step,
        kv_cache: KVCache,
        capture: Callable[[Replay], Replay],
        *,
        hidden: Tensor,
        depth: int,
        max_sequences: int,
        width_buckets: Sequence[int],
    ) -> None:
        """`hidden` [.., H] is any hidden state, for its size and dtype; `depth` is the layer's; `width_buckets` are the
        widths of block tables.
        """
        self._eager, self._kv_cache, self._capture, self._depth = eager, kv_cache, capture, depth
        self.sizes = buckets(1, 2, min(max_sequences, _MAX_SEQUENCES))
        self._widths = width_buckets
        count, device = self.sizes[-1], hidden.device
        self._state = hidden.new_zeros(count, hidden.shape[-1])
        self._tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self._positions = torch.zeros(count, 1, dtype=torch.int64, device=device)
        self._tables = torch.full((count, width_buckets[-1]), kv_cache.num_blocks, dtype=torch.int64, device=device)
        self._inputs: dict[object, tuple[Tensor, ...]] = {}  # static inputs of choices, by function
        self._captured: dict[tuple[object, int, int], Replay] = {}
        self._failed = False

    @torch.inference_mode()
    def draft(self, start: DraftStart, choose: Choose) -> Tensor:
        """Step.draft. The result is valid until the next call."""
        count, width = start.group.block_table.shape
        if not isinstance(choose, PureChoice) or count > self.sizes[-1] or self._failed:
            return self._eager.draft(start, choose, self._kv_cache)
        size, wide = bucket(self.sizes, count), bucket(self._widths, width)
        self._fill(start, choose, size)
        replay = self._replay(choose, size, wide)
        if replay is None:
            return self._eager.draft(start, choose, self._kv_cache)
        return replay()[:count, : start.depth - 1]

    @torch.inference_mode()
    def warm_up(self, start: DraftStart, choice: PureChoice) -> None:
        """Captures the graphs of all bucket sizes for short contexts, with a choice of this kind."""
        self._fill(start, choice, self.sizes[-1])
        for size in reversed(self.sizes):
            self._replay(choice, size, self._widths[0])

    def _fill(self, start: DraftStart, choice: PureChoice, size: int) -> None:
        """Writes the inputs to the first of `size` rows. Later rows keep stale values, but at position 0: a stale
        position could be beyond this width's block table, where kernels would read out of bounds.
        """
        count, width = start.group.block_table.shape
        self._state[:count].copy_(start.state)
        self._tokens[:count].copy_(start.tokens)
        self._positions[:count].copy_(start.group.positions)
        self._positions[count:size] = 0
        self._tables[:count, :width].copy_(start.group.block_table)
        if choice.function not in self._inputs:
            self._inputs[choice.function] = tuple(
                given.new_zeros(self.sizes[-1], *([self._depth - 1] * (given.ndim - 1))) for given in choice.inputs
            )
        for static, given in zip(self._inputs[choice.function], choice.inputs, strict=True):
            own = static[:count]
            (own if given.ndim == 1 else own[:, : given.shape[1]]).copy_(given)

    def _replay(self, choice: PureChoice, size: int, width: int) -> Replay | None:
        """The replay of a bucket, which is captured if needed; None when that fails."""
        key = (choice.function, size, width)
        if key not in self._captured:
            own = PureChoice(choice.function, tuple(static[:size] for static in self._inputs[choice.function]))

            def draft() -> Tensor:
                return self._eager.draft(self._static_start(size, width), own, self._kv_cache)

            try:
                self._captured[key] = self._capture(draft)
            except RuntimeError:
                logger.exception("the draft layer cannot be captured in a CUDA graph, it runs eagerly")
                self._failed = True
                return None
        return self._captured[key]

    def _static_start(self, size: int, width: int) -> DraftStart:
        """A start over the buffers' first rows; a new one for each run, because an AttentionGroup caches its masks."""
        keys = width * self._kv_cache.block_size
        positions, tables = self._positions[:size], self._tables[:size, :width]
        group = AttentionGroup(0, size, 1, positions, tables, keys, needs_mask=True)
        return DraftStart(self._state[:size], self._tokens[:size], group, self._depth)
