"""The input of a forward pass: a flat batch of T rows, each with a token, a position, a KV stream and a gate row.

Scaling rows come first (`num_scaling_rows` of them), and the rows of an AttentionGroup are contiguous, so neither needs
an index. The batch knows nothing of requests, sampling or scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

FIELDS = 6  # of `Batch.fields`


@dataclass(slots=True)
class AttentionGroup:
    """N segments of Q consecutive positions, each in a KV stream of its own; rows start .. start + N * Q."""

    start: int
    segments: int  # N
    queries: int  # Q
    positions: Tensor  # int64 [N, Q]
    block_table: Tensor  # int64 [N, blocks], padded with any valid block: padding is masked
    keys: int  # L: keys of the longest segment, at most blocks * block_size
    needs_mask: bool  # False where every key in 0 .. L-1 is visible to every query
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _unused: Tensor | None = None
    _varlen: tuple[Tensor, Tensor, Tensor] | None = None

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Returns the additive mask [N, 1, Q, L], 0 where the key is visible and -inf elsewhere; None where every key
        is. `window` is a sliding window in tokens.

        It is computed once for all layers, and additive because SDPA would convert a bool mask in every layer.
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
        """Returns bool [N, L]: keys behind a segment's last query, whose slots may hold anything; None without any.
        Computed once for all layers.
        """
        if self.needs_mask and self._unused is None:
            self._unused = torch.arange(self.keys, device=self.positions.device) > self.positions[:, -1:]
        return self._unused

    def varlen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the arguments of varlen_attn: row offsets int32 [N + 1], keys per segment int32 [N], block table
        int32 [N, blocks]. Computed once for all layers.
        """
        if self._varlen is None:
            offsets = torch.arange(0, self.segments + 1, dtype=torch.int32, device=self.positions.device) * self.queries
            self._varlen = offsets, (self.positions[:, -1] + 1).int(), self.block_table.int()
        return self._varlen


@dataclass(slots=True)
class GateParameters:
    """Gate parameters of T rows that differ from the checkpoint's. Temperature, top_k and excluded apply when a scaling
    row's scalings are computed; weight applies when a row reads its scalings.
    """

    temperature: Tensor  # fp32 [T], of the softmax; 0: the checkpoint's
    top_k: Tensor  # int64 [T], experts kept at each site; 0: the checkpoint's
    excluded: Tensor  # bool [T, E], experts that are excluded before the softmax
    weight: Tensor  # fp32 [T], a factor on top of the checkpoint's global_scaling_weight

    @classmethod
    def of_checkpoint(cls, rows: int, experts: int, device: torch.device) -> GateParameters:
        """Parameters under which every row has the checkpoint's gate."""
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
    """Gate rows that no classifier computes (fixed gates, an operator's dummy rows); stored before the rows run."""

    slots: Tensor  # int64 [n]
    rows: Tensor  # fp32 [n, S, E]


@dataclass(slots=True)
class DraftStart:
    """The input of the draft layer for n sequences: a scaling row of each, and its draft (draft_layer.py)."""

    state: Tensor  # [n, H], the row's last hidden state
    tokens: Tensor  # int64 [n], the draft that the row predicts
    group: AttentionGroup  # one query each, at the row's position, over the scaling stream
    depth: int  # draft tokens per sequence, `tokens` included


@dataclass(slots=True)
class Batch:
    """T rows. Their integers are one tensor, `fields` [6, T], so that a step costs one copy to the device.

    Every row has a slot to read its gate row from and one to write it to, so that captured steps need no special cases.
    Scaling rows read a dummy row's slot (the checkpoint's, or the request's own); rows that compute no gate row, or
    none to keep, write to the scratch slot (kv_cache.py).
    """

    fields: Tensor  # int64 [6, T]; the views below name its lines
    num_scaling_rows: int
    logit_rows: Tensor  # int64 [L], rows whose logits are needed
    groups: list[AttentionGroup]
    scaling_rows_are_gated: bool = False  # a scaling row reads another gate row than the checkpoint's dummy row
    given: GivenGateRows | None = None
    parameters: GateParameters | None = None  # None: every row has the checkpoint's gate
    input_ids: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    kv_slots: Tensor = field(init=False)  # each row writes its key and value there
    gate_slots: Tensor = field(init=False)  # each row reads its scalings there
    new_gate_slots: Tensor = field(init=False)  # each scaling row writes its scalings there
    is_scaling: Tensor = field(init=False)  # 1 for scaling rows, whose logits are drafts; 0 for real rows

    def __post_init__(self) -> None:
        views = self.fields.unbind(0)
        self.input_ids, self.positions, self.kv_slots, self.gate_slots, self.new_gate_slots, self.is_scaling = views
