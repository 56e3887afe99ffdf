"""Greedy generation with two KV streams, in batches of equally long prompts.

Each position is computed once in the scaling stream (base, gate 0) and once in the real stream; the scaling stream's
own argmax is kept too: how often it equals the token chosen is the hit rate of the server's lookahead draft.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from demo_builder.mixture import XLora


@dataclass
class Generated:
    """One continuation with its end token, and what gate and base did at each position that produced a token."""

    ids: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)  # [S, E] per token; empty without a classifier
    prompt_rows: Tensor | None = None  # [T-1, S, E], the prompt without its last position
    finished: bool = False

    @property
    def hits(self) -> int:
        """Tokens that the scaling pass predicted."""
        return sum(a == b for a, b in zip(self.ids, self.drafts, strict=True))


@torch.no_grad()
def generate(
    model: XLora, prompts: list[list[int]], eos: int, limit: int, fixed: Tensor | None = None
) -> list[Generated]:
    """Continue every prompt greedily. `fixed` [E] replaces the classifier's scalings (zeros: the base model)."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    out = [Generated() for _ in prompts]
    for indices in by_length.values():
        _generate_block(
            model, torch.tensor([prompts[i] for i in indices]), [out[i] for i in indices], eos, limit, fixed
        )
    return out


def _generate_block(
    model: XLora, ids: Tensor, out: list[Generated], eos: int, limit: int, fixed: Tensor | None
) -> None:
    scaling, real = DynamicCache(), DynamicCache()
    for step in range(limit):
        hidden = model.hidden(ids, None, past_key_values=scaling)
        drafts = model.base.lm_head(hidden[:, -1]).argmax(-1)
        rows = model.classifier(hidden) if fixed is None else model.fixed_rows(fixed.expand(*ids.shape, -1))
        chosen = model.base.lm_head(model.hidden(ids, rows, past_key_values=real)[:, -1]).argmax(-1)
        for i, g in enumerate(out):
            if g.finished:
                continue
            if step == 0:
                g.prompt_rows = rows[i, :-1]
            g.ids.append(int(chosen[i]))
            g.drafts.append(int(drafts[i]))
            g.rows.append(rows[i, -1])
            g.finished = g.ids[-1] == eos
        if all(g.finished for g in out):
            return
        ids = chosen[:, None]
