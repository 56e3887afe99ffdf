"""One forward pass as plain tensors: a flat batch of T rows, each with a token, a position, a KV stream and a gate row.

Rows are ordered so that two facts need no index: scaling rows come first (`num_scaling_rows` of them), and the rows of
one AttentionGroup are contiguous. The batch knows nothing of requests, sampling or scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

LINES = 6  # of `rows`


@dataclass(slots=True)
class AttentionGroup:
    """N segments of Q consecutive positions, each in a KV stream of its own; rows start .. start + N * Q."""

    start: int
    segments: int  # N
    queries: int  # Q
    positions: Tensor  # int64 [N, Q]
    block_table: Tensor  # int64 [N, blocks], padded with any valid block: padding is masked
    keys: int  # L: keys looked at, at most blocks * block_size
    needs_mask: bool  # False where every key in 0 .. L-1 is visible to every query
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _unused: Tensor | None = None
    _varlen: tuple[Tensor, Tensor, Tensor] | None = None

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Returns [N, 1, Q, L], 0 where the key is visible and -inf elsewhere, or None where every key is.

        `window` is a sliding window in tokens. Additive, and made once for all layers: SDPA would turn a bool mask into
        this in every layer.
        """
        if not self.needs_mask and (window is None or window >= self.keys):
            return None
        if window not in self._masks:
            key = torch.arange(self.keys, device=self.positions.device)
            query = self.positions[:, None, :, None]
            visible = key <= query
            if window is not None:
                visible &= key > query - window
            hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self._masks[window] = hidden.masked_fill_(~visible, float("-inf"))
        return self._masks[window]

    def unused(self) -> Tensor | None:
        """Returns bool [N, L]: keys behind a segment's last query, whose slots hold what others left there; None where
        there are none. Made once for all layers.
        """
        if self.needs_mask and self._unused is None:
            self._unused = torch.arange(self.keys, device=self.positions.device) > self.positions[:, -1:]
        return self._unused

    def varlen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the same as varlen_attn has it: row offsets int32 [N + 1], keys per segment int32 [N], block table
        int32 [N, blocks]. Made once for all layers.
        """
        if self._varlen is None:
            offsets = torch.arange(0, self.segments + 1, dtype=torch.int32, device=self.positions.device) * self.queries
            self._varlen = offsets, (self.positions[:, -1] + 1).int(), self.block_table.int()
        return self._varlen


@dataclass(slots=True)
class GateParameters:
    """How each of T rows wants its gate, where any of them wants it otherwise than the checkpoint has it. The first
    three are for the scalings that a scaling row brings, `weight` is for those that any row reads.
    """

    temperature: Tensor  # fp32 [T], of the softmax; 0: the checkpoint's
    top_k: Tensor  # int64 [T], experts kept at each site; 0: as many as the checkpoint keeps
    excluded: Tensor  # bool [T, E], experts that are left out before the softmax
    weight: Tensor  # fp32 [T], factor over the checkpoint's global_scaling_weight

    @classmethod
    def of_checkpoint(cls, rows: int, experts: int, device: torch.device) -> GateParameters:
        """Rows that want nothing of their own."""
        return cls(
            torch.zeros(rows, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros(rows, experts, dtype=torch.bool, device=device),
            torch.ones(rows, device=device),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in their order."""
        return self.temperature, self.top_k, self.excluded, self.weight


@dataclass(slots=True)
class GivenGateRows:
    """Gate rows that no classifier makes (fixed gates, dummy rows of an operator): stored before the rows run."""

    slots: Tensor  # int64 [n]
    rows: Tensor  # fp32 [n, S, E]


@dataclass(slots=True)
class DraftStart:
    """Where n sequences draft on from a scaling row each, whose own draft is known (draft_layer.py)."""

    state: Tensor  # [n, H], the row's last hidden state
    tokens: Tensor  # int64 [n], its draft
    group: AttentionGroup  # one query each, at the row's position, over the scaling stream
    depth: int  # tokens drafted in all, `tokens` included


@dataclass(slots=True)
class Batch:
    """T rows. `rows` is one int64 tensor [6, T], so that a step costs one copy to the device; its lines by name below.

    Scaling rows read the dummy row's gate slot, or one with another gate for them; rows that bring no scalings of their
    own to keep write to the scratch slot (kv_cache.py has both). So the rows of every step look alike, and a captured
    step needs no cases.
    """

    rows: Tensor
    num_scaling_rows: int
    logit_rows: Tensor  # int64 [L], rows whose logits are wanted
    groups: list[AttentionGroup]
    scaling_rows_are_gated: bool = False  # whether a scaling row has another gate row than the model's dummy row
    given: GivenGateRows | None = None
    parameters: GateParameters | None = None  # None: every row's gate is the checkpoint's
    input_ids: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    kv_slots: Tensor = field(init=False)  # where each row's key and value are written
    gate_slots: Tensor = field(init=False)  # where each row's scalings are read
    new_gate_slots: Tensor = field(init=False)  # where the scalings that a scaling row brings are written
    is_scaling: Tensor = field(init=False)  # 1 for scaling rows, whose logits are drafts; 0 for real rows

    def __post_init__(self) -> None:
        lines = self.rows.unbind(0)
        self.input_ids, self.positions, self.kv_slots, self.gate_slots, self.new_gate_slots, self.is_scaling = lines
