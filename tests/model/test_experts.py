"""Stacked experts, the gate that spreads scalings over their ranks, the linear that applies them;
against the plain sum.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from service.checkpoint import Expert, LoraWeights
from service.model.adapted import AdaptedModule
from service.model.experts import stack_experts
from service.model.gate import Gate
from tests.support.tiny import CPU

IN, OUT, E = 10, 6, 4
SITES = ("layer.a", "layer.b")
RANKS = {"layer.a": [2, 0, 3, 1], "layer.b": [1, 4, 0, 0]}  # 0: the expert does not target the site


@pytest.fixture
def experts() -> list[Expert]:
    """Four experts of different ranks, scales and targets."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(E):
        weights = {}
        for site in SITES:
            if rank := RANKS[site][number]:
                a, b = torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator)
                weights[site] = LoraWeights(a, b, scale=0.5 + number)
        made.append(Expert(f"expert {number}", "", weights))
    return made


def plain_sum(experts: list[Expert], site: str, x: Tensor, scalings: Tensor) -> Tensor:
    """sum_e g_e scale_e B_e A_e x of rows x [n, in] with scalings [n, E]: PEFT's loop."""
    y = torch.zeros(x.shape[0], OUT)
    for number, expert in enumerate(experts):
        if site in expert.weights:
            lora = expert.weights[site]
            y += scalings[:, number : number + 1] * lora.scale * (x @ lora.a[...].T @ lora.b[...].T)
    return y


@pytest.mark.parametrize("site", SITES)
def test_stack(experts: list[Expert], site: str) -> None:
    """A and B of one expert at different offsets, or a scale folded in twice or not at all."""
    stack = stack_experts(experts, site, torch.float32, CPU)
    assert stack.ranks == RANKS[site]
    assert stack.a.shape == (sum(RANKS[site]), IN)
    assert stack.b_t.shape == (sum(RANKS[site]), OUT)
    x = torch.randn(3, IN)
    torch.testing.assert_close(
        x @ stack.a.T @ stack.b_t, plain_sum(experts, site, x, torch.ones(3, E)), atol=1e-5, rtol=1e-5
    )


def test_scale_is_folded_before_the_cast(experts: list[Expert]) -> None:
    """bf16(B) * scale rounds twice; bf16(B * scale) once."""
    lora = experts[3].weights["layer.a"]
    odd = Expert("odd", "", {"layer.a": LoraWeights(lora.a, lora.b, scale=1 / 3)})
    stack = stack_experts([odd], "layer.a", torch.bfloat16, CPU)
    assert torch.equal(stack.b_t, (lora.b / 3).T.to(torch.bfloat16)) or torch.equal(
        stack.b_t, (lora.b * (1 / 3)).T.to(torch.bfloat16)
    )


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("weight", [1.0, 1.7])
def test_gate_spreads_scalings_over_ranks(layerwise: bool, weight: float) -> None:
    """Each rank gets its own expert's scaling of its own site, times the global weight."""
    gate = Gate([RANKS[site] for site in SITES], layerwise=layerwise, dtype=torch.float32, device=CPU)
    gate.global_scaling_weight = weight
    scalings = torch.randn(3, len(SITES) if layerwise else 1, E)
    gate.set(scalings, first_row=2)
    assert gate.active
    assert gate.first_row == 2
    for number, site in enumerate(SITES):
        expected = scalings[:, number if layerwise else 0].repeat_interleave(torch.tensor(RANKS[site]), dim=1) * weight
        torch.testing.assert_close(gate.at(number), expected, atol=0, rtol=0)


def test_gate_switches_off(experts: list[Expert]) -> None:
    """The rows of the last forward must not act in one without real rows."""
    gate = Gate([RANKS["layer.a"]], layerwise=True, dtype=torch.float32, device=CPU)
    linear = AdaptedModule(nn.Linear(IN, OUT), stack_experts(experts, "layer.a", torch.float32, CPU), gate, 0)
    x = torch.randn(1, 3, IN)
    base = nn.functional.linear(x, linear.weight, linear.bias)
    gate.set(torch.ones(3, 1, E), first_row=0)
    assert not torch.equal(linear(x), base)
    gate.set(torch.empty(0, 1, E), first_row=3)
    assert not gate.active
    assert torch.equal(linear(x), base)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("first_row", [0, 2, 4])
def test_linear(experts: list[Expert], bias: bool, first_row: int) -> None:
    """Rows before first_row are the plain linear, exactly; the others are W x + b + sum_e g_e scale_e B_e A_e x."""
    gate = Gate([RANKS[site] for site in SITES], layerwise=True, dtype=torch.float32, device=CPU)
    x, scalings = torch.randn(1, 5, IN), torch.randn(5 - first_row, 2, E)
    gate.set(scalings, first_row)
    for number, site in enumerate(SITES):
        base = nn.Linear(IN, OUT, bias=bias)
        y = AdaptedModule(base, stack_experts(experts, site, torch.float32, CPU), gate, number)(x)
        plain = base(x)
        assert torch.equal(y[0, :first_row], plain[0, :first_row])
        expected = plain[0, first_row:] + plain_sum(experts, site, x[0, first_row:], scalings[:, number])
        torch.testing.assert_close(y[0, first_row:], expected, atol=1e-5, rtol=1e-5)


def test_weights_are_held_once(experts: list[Expert]) -> None:
    """The base's weight is shared with the linear it came from, not copied."""
    base = nn.Linear(IN, OUT)
    gate = Gate([RANKS["layer.a"]], layerwise=True, dtype=torch.float32, device=CPU)
    linear = AdaptedModule(base, stack_experts(experts, "layer.a", torch.float32, CPU), gate, 0)
    assert linear.weight.data_ptr() == base.weight.data_ptr()


def test_the_head_looks_at_no_other_rows_gate(experts: list[Expert]) -> None:
    """A row that the gate is closed for takes nothing of the first open row's, not even NaN."""
    gate = Gate([RANKS["layer.a"]], layerwise=True, dtype=torch.float32, device=CPU)
    stack = stack_experts(experts, "layer.a", torch.float32, CPU)
    head = AdaptedModule(nn.Linear(IN, OUT), stack, gate, 0, is_head=True)
    scalings = torch.rand(2, 1, E)
    scalings[0] = torch.nan
    gate.set(scalings, 3)
    gate.logit_rows = torch.tensor([1, 4])
    x = torch.randn(1, 2, IN)
    with torch.inference_mode():
        y = head(x)
    plain = nn.functional.linear(x[0], head.weight, head.bias)
    torch.testing.assert_close(y[0, 0], plain[0])
    own = plain_sum(experts, "layer.a", x[0, 1:], scalings[1:, 0])
    torch.testing.assert_close(y[0, 1], plain[1] + own[0], atol=1e-5, rtol=1e-5)


class ScaledEmbedding(nn.Embedding):
    """As Gemma 3's: what it looks up is scaled, and so is the experts' part."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize("first_row", [0, 2])
def test_embedding(experts: list[Expert], first_row: int) -> None:
    """A is looked up by id: the product with a one-hot row, without one."""
    gate = Gate([RANKS["layer.b"]], layerwise=True, dtype=torch.float32, device=CPU)
    base, ids = ScaledEmbedding(IN, OUT), torch.tensor([[3, 9, 0, 3, 1]])
    adapted = AdaptedModule(base, stack_experts(experts, "layer.b", torch.float32, CPU), gate, 0)
    scalings = torch.randn(5 - first_row, 1, E)
    gate.set(scalings, first_row)
    plain, one_hot = base(ids)[0].detach(), nn.functional.one_hot(ids[0, first_row:], IN).float()
    with torch.inference_mode():
        y = adapted(ids)[0]
    assert torch.equal(y[:first_row], plain[:first_row])
    expected = plain[first_row:] + 3.0 * plain_sum(experts, "layer.b", one_hot, scalings[:, 0])
    torch.testing.assert_close(y[first_row:], expected, atol=1e-5, rtol=1e-5)
    assert adapted.weight is base.weight  # where transformers looks for it


def test_a_module_that_computes_itself(experts: list[Expert]) -> None:
    """A quantised linear has no weight of its base's kind: the experts come to what it computes."""

    class Quantised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * x[..., :OUT]

    gate = Gate([RANKS["layer.a"]], layerwise=True, dtype=torch.float32, device=CPU)
    adapted = AdaptedModule(Quantised(), stack_experts(experts, "layer.a", torch.float32, CPU), gate, 0)
    x, scalings = torch.randn(1, 3, IN), torch.randn(3, 1, E)
    gate.set(scalings, 0)
    expected = 2.0 * x[0, :, :OUT] + plain_sum(experts, "layer.a", x[0], scalings[:, 0])
    torch.testing.assert_close(adapted(x)[0], expected, atol=1e-5, rtol=1e-5)
