"""Linears computed together: the same numbers as one by one, whoever comes first; norms that are replaced or left."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from service.checkpoint import Expert, LoraWeights
from service.model import siblings
from service.model.experts import stack_experts
from service.model.gate import Gate
from service.model.linear import XLoraLinear
from service.model.norms import RMSNorm, replace_norms
from service.model.siblings import Siblings
from tests.support.tiny import Tiny, run_once

CPU = torch.device("cpu")
IN, ROWS = 12, 5
NO_GATE = Gate([], layerwise=True, dtype=torch.float32, device=CPU)
OUTS, RANKS = (8, 4, 6), (2, 3, 1)


def linears(*, bias: bool) -> tuple[list[XLoraLinear], Gate]:
    gate = Gate([[rank] for rank in RANKS], layerwise=True, dtype=torch.float32, device=CPU)
    made = []
    for site, (out, rank) in enumerate(zip(OUTS, RANKS, strict=True)):
        expert = Expert("one", "", {"here": LoraWeights(torch.randn(rank, IN), torch.randn(out, rank), 0.5)})
        base = nn.Linear(IN, out, bias=bias).requires_grad_(False)
        made.append(XLoraLinear(base, stack_experts([expert], "here", torch.float32, CPU), gate, site))
    return made, gate


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("small", [True, False], ids=["joined", "apart"])
@pytest.mark.parametrize("first_row", [0, 2, ROWS])
def test_together_is_one_by_one(bias: bool, small: bool, first_row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without experts, in any order, on one input after another, and when one of them is not called."""
    monkeypatch.setattr(siblings, "_SMALL", 1 << 19 if small else 0)
    group, gate = linears(bias=bias)
    inputs = [torch.randn(1, ROWS, IN) for _ in range(3)]
    gate.set(torch.randn(ROWS - first_row, len(group), 1), first_row)
    expected = [[linear(x) for linear in group] for x in inputs]
    weights = [linear.weight.clone() for linear in group]
    Siblings(group)
    for x, ys in zip(inputs, expected, strict=True):
        for number in (1, 0, 2) if x is not inputs[1] else (2, 0):
            torch.testing.assert_close(group[number](x), ys[number], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(linear.weight, weight) for linear, weight in zip(group, weights, strict=True))
    shared = {linear.weight.untyped_storage().data_ptr() for linear in group}
    assert len(shared) == (1 if small else len(group))


def test_the_decoder_shows_who_reads_the_same(tiny: Tiny) -> None:
    """q and v, gate and up, as far as adapted; what follows another input stays alone."""
    model = tiny.as_stored().model()
    together: dict[int, list[str]] = {}
    for name, module in model.causal_lm.named_modules():
        if isinstance(module, XLoraLinear) and module.siblings is not None:
            together.setdefault(id(module.siblings[0]), []).append(name.rpartition(".")[2])
    assert together
    for names in together.values():
        assert len(names) > 1
        assert set(names) <= {"q_proj", "k_proj", "v_proj"} or set(names) <= {"gate_proj", "up_proj"}


def test_a_model_computes_the_same(tiny: Tiny) -> None:
    """All logits and scalings, with and without."""
    model = tiny.as_stored().model()
    ours = run_once(model, [5, 6, 7, 8])
    for module in model.causal_lm.modules():
        if isinstance(module, XLoraLinear):
            module.siblings = None
    apart = run_once(model, [5, 6, 7, 8])
    torch.testing.assert_close(ours[0], apart[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], apart[1], atol=1e-5, rtol=1e-5)


class _Plain(nn.Module):
    """Llama's norm, or Gemma's with `offset`."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.randn(IN)), 1e-5, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight + self.offset) * (x * scale)


def test_norms_are_replaced_where_they_are_the_same() -> None:
    """Gemma's formula, and a mean that is subtracted, would be silently wrong."""
    model = nn.ModuleDict({"llama": _Plain(0.0), "gemma": _Plain(1.0), "layer": nn.LayerNorm(IN, bias=False)})
    replace_norms(model, torch.float32, NO_GATE)
    assert {name for name, module in model.items() if isinstance(module, RMSNorm)} == {"llama"}
    x, llama = torch.randn(3, IN), model["llama"]
    with torch.inference_mode():
        torch.testing.assert_close(llama(x), F.rms_norm(x, (IN,), llama.weight, 1e-5))


def test_norms_are_left_where_hidden_states_are_of_another_dtype() -> None:
    """Weights kept in float32 beside bfloat16 hidden states: there the square would be rounded."""
    model = nn.ModuleDict({"llama": _Plain(0.0)})
    replace_norms(model, torch.bfloat16, NO_GATE)
    assert isinstance(model["llama"], _Plain)
