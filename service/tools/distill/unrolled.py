"""The draft layer over texts that are known: drafts of every depth from many positions at once.

Each depth goes on from the text's own tokens, as a draft that came true would. Gradients go through all depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from service.model.draft_head import DraftHead
from service.model.draft_layer import DraftLayer, Rotation
from service.tools.distill.lessons import Lesson
from service.tools.two_pass import TwoPassModel

_POSITIONS_AT_ONCE = 512
_KEYS = ("keys", "values")


@dataclass(frozen=True, slots=True)
class Anchors:
    """Positions of a text from which drafts are made."""

    lesson: Lesson
    positions: Tensor  # int64 [n]


@dataclass(frozen=True, slots=True)
class Drafts:
    """The drafts of one depth from n anchors, and what the real pass says in their places."""

    state: Tensor  # [n, H], for the base's head
    likeliest: Tensor  # int64 [n, K]
    shares: Tensor  # [n, K]
    inside: Tensor  # bool [n]: the text goes on so far


class Unrolled:
    """The layer, or only the base's head where there is none, over anchors."""

    def __init__(self, plain: TwoPassModel, layer: DraftLayer | None) -> None:
        self._layer = layer
        self._device = plain.causal_lm.device
        self._embeddings = plain.causal_lm.get_input_embeddings().weight
        self._rotation = None if layer is None else Rotation.of(plain.causal_lm, layer.head_dim)

    def drafts(self, anchors: Sequence[Anchors]) -> Iterator[Drafts]:
        """Of depth 1, whose state is the scaling pass's own, and of every further one."""
        state = self._gathered(anchors, 0, "hidden").float()
        yield self._drafts(state, anchors, 0)
        if self._layer is None:
            return
        keys, values = ([getattr(one.lesson, name).to(self._device).float() for one in anchors] for name in _KEYS)
        masks = [_mask(one).to(self._device) for one in anchors]
        positions = torch.cat([one.positions for one in anchors]).to(self._device)
        for depth in range(1, len(self._layer.agreement)):
            embedded = self._embeddings[self._gathered(anchors, depth, "tokens")].float()
            rotation = None if self._rotation is None else self._rotation(positions + depth)
            state = self._layer(state, embedded, depth, rotation, lambda query: _attended(query, keys, values, masks))
            yield self._drafts(state, anchors, depth)

    def _drafts(self, state: Tensor, anchors: Sequence[Anchors], ahead: int) -> Drafts:
        likeliest, shares = (self._gathered(anchors, ahead, name) for name in ("likeliest", "shares"))
        inside = torch.cat([one.positions + ahead < len(one.lesson.tokens) - 1 for one in anchors])
        return Drafts(state, likeliest.long(), shares, inside.to(self._device))

    def _gathered(self, anchors: Sequence[Anchors], ahead: int, name: str) -> Tensor:
        """What the lessons have so far ahead of the anchors, or at their ends."""
        rows = [
            getattr(one.lesson, name)[(one.positions + ahead).clamp(max=len(one.lesson.tokens) - 1)] for one in anchors
        ]
        return torch.cat(rows).to(self._device)


def _mask(anchors: Anchors) -> Tensor:
    """bool [n, T]: a text's positions up to the anchor."""
    return torch.arange(len(anchors.lesson.tokens)) <= anchors.positions[:, None]


def _attended(query: Tensor, keys: list[Tensor], values: list[Tensor], masks: list[Tensor]) -> Tensor:
    """query [n, heads, head_dim] of the anchors of several texts, each over its own text. Scores are divided by
    sqrt(head_dim), whatever the base's layer does.
    """
    found = []
    for rows, key, value, mask in zip(
        torch.split(query, [len(mask) for mask in masks]), keys, values, masks, strict=True
    ):
        each = query.shape[1] // key.shape[1]
        key, value = (tensor.transpose(0, 1).repeat_interleave(each, 0)[None] for tensor in (key, value))
        found.append(F.scaled_dot_product_attention(rows.transpose(0, 1)[None], key, value, attn_mask=mask)[0])
    return torch.cat(found, 1).transpose(0, 1)


@torch.no_grad()
def agreement(
    plain: TwoPassModel, head: DraftHead | None, layer: DraftLayer | None, lessons: Sequence[Lesson]
) -> list[float]:
    """At each depth, the share of drafts that are the real pass's best token, of those where all before were right."""
    unrolled = Unrolled(plain, layer)
    depth = 1 if layer is None else len(layer.agreement)
    right, made = [0] * depth, [0] * depth
    for lesson in lessons:
        for positions in torch.split(lesson.answer, _POSITIONS_AT_ONCE):
            alive = torch.ones(len(positions), dtype=torch.bool, device=plain.causal_lm.device)
            for number, drafts in enumerate(unrolled.drafts([Anchors(lesson, positions)])):
                state = drafts.state if head is None or number else head.drafting(drafts.state)
                alive = alive & drafts.inside
                made[number] += int(alive.sum())
                alive = alive & (plain.head(state).argmax(-1) == drafts.likeliest[:, 0])
                right[number] += int(alive.sum())
    return [hits / total if total else 0.0 for hits, total in zip(right, made, strict=True)]
