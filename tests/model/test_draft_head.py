"""The draft head: its formula, and that it concerns scaling rows alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from service.checkpoint import DraftHeadWeights
from service.model.draft_head import DraftHead
from tests.support.bundles import make_draft_head
from tests.support.tiny import CPU, OneRequest, Tiny

HIDDEN, SIZE = 40, 12


@pytest.fixture
def weights() -> DraftHeadWeights:
    return make_draft_head(HIDDEN, SIZE, torch.Generator().manual_seed(0))


def head_of(weights: DraftHeadWeights, dtype: torch.dtype = torch.float32) -> DraftHead:
    return DraftHead(weights, device=CPU, dtype=dtype)


def recomputed(weights: DraftHeadWeights, h: Tensor) -> Tensor:
    """One row [H], number by number as the formula says."""
    z = weights.up.double() @ h.double() + weights.bias.double()
    return (h.double() + weights.down.double() @ (z / (1 + (-z).exp()))).float()


def test_formula(weights: DraftHeadWeights) -> None:
    """In scaling rows; a real row stays as it is, to the bit."""
    hidden = torch.randn(3, HIDDEN)
    seen = head_of(weights)(hidden[None], torch.tensor([1, 0, 1]))[0]
    torch.testing.assert_close(seen[0], recomputed(weights, hidden[0]))
    torch.testing.assert_close(seen[2], recomputed(weights, hidden[2]))
    assert torch.equal(seen[1], hidden[1])


def test_a_real_row_is_safe_from_a_wild_head(weights: DraftHeadWeights) -> None:
    """Overflow in a draft is not the next token's affair."""
    wild = DraftHeadWeights(weights.up * 1e30, weights.bias, weights.down * 1e30)
    hidden = torch.randn(2, HIDDEN)
    assert torch.equal(head_of(wild)(hidden, torch.tensor([1, 0]))[1], hidden[1])


def test_it_changes_drafts_and_nothing_else(tiny: Tiny) -> None:
    """Both passes of a text with and without it: the same scalings and logits of real rows; other logits of scaling
    rows, which are the base's by way of the formula.
    """
    model = tiny.as_stored().model()
    weights = make_draft_head(model.config.hidden_size, SIZE, torch.Generator().manual_seed(0))
    tokens = [5, 9, 200, 31, 7, 8]
    runs = {}
    states: list[Tensor] = []
    logits = model.classifier.logits

    def kept(hidden: Tensor) -> Tensor:
        states[:] = hidden if hidden.shape[0] == 6 and not states else states
        return logits(hidden)

    model.classifier.logits = kept  # type: ignore[method-assign]
    for head in (None, head_of(weights)):
        model.draft_head = head
        request = OneRequest(model, len(tokens))
        batch = request.batch(tokens, (0, 6), (0, 0))
        batch.logit_rows = torch.arange(6)
        drafts = model.forward(batch, request.cache)
        real = model.forward(request.batch(tokens, (6, 6), (0, 6)), request.cache)
        runs[head is not None] = drafts.logits, drafts.gate_logits, real.logits
    assert torch.equal(runs[True][1], runs[False][1])
    assert torch.equal(runs[True][2], runs[False][2])
    assert (runs[True][0].argmax(-1) != runs[False][0].argmax(-1)).any()
    seen = torch.stack([recomputed(weights, row) for row in states])
    head_weight = tiny.base(torch.float32).get_output_embeddings().weight
    torch.testing.assert_close(runs[True][0], seen @ head_weight.T, atol=1e-4, rtol=0)
