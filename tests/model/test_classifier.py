"""From hidden states to scalings: the MLP, top-k, the dummy row; against PEFT's own functions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.xlora.layer import XLoraLayer
from torch import Tensor, nn

from service.checkpoint import ClassifierWeights, XLoraConfig
from service.model.batch import GateParameters
from service.model.classifier import Classifier, keep_top_k
from tests.support.bundles import make_classifier
from tests.support.tiny import CPU

H, S, E = 16, 5, 4


def build(**xlora: Any) -> tuple[Classifier, ClassifierWeights]:
    """A random classifier and the numbers it was made of."""
    config = XLoraConfig.from_dict({"hidden_size": H, "xlora_size": 12, "layerwise_scalings": True, **xlora}, "test")
    pairs = make_classifier(config, sites=S, experts=E, generator=torch.Generator().manual_seed(3))
    weights = ClassifierWeights(tuple(pairs))
    return Classifier(weights, config, E, S, CPU), weights


def peft_top_k(scalings: Tensor, top_k: int | None, softmax: bool) -> Tensor:
    """PEFT's `XLoraLayer.get_maybe_topk_scalings` of rows [n, E]."""
    config: Any = SimpleNamespace(top_k_lora=top_k, enable_softmax_topk=softmax)
    nothing: Any = None
    layer = XLoraLayer(nothing, nothing, nothing, 0, config)
    return layer.get_maybe_topk_scalings(scalings[None, :, None])[0]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layerwise", [True, False])
def test_mlp(depth: int, relu: bool, bias: bool, layerwise: bool) -> None:
    """A layer, a ReLU or a bias too many or too few; a ReLU after the last layer; classes laid out [E, S]."""
    ours, weights = build(xlora_depth=depth, enable_relu_and_dropout=relu, use_bias=bias, layerwise_scalings=layerwise)
    layers: list[nn.Module] = []
    for weight, given in weights.layers:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
        linear.weight.data = weight
        if bias:
            assert given is not None
            linear.bias.data = given
        layers += [linear, nn.ReLU()] if relu else [linear]
    theirs = nn.Sequential(*layers[:-1] if relu else layers)
    hidden = torch.randn(7, H, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.logits(hidden), theirs(hidden).view(7, S if layerwise else 1, E), atol=1e-5, rtol=0)


def test_the_hidden_state_survives() -> None:
    """The in-place ReLU must not reach the caller's tensor, not even at depth 1 with an fp32 base."""
    for depth in (1, 2):
        ours, _ = build(xlora_depth=depth)
        hidden = torch.randn(3, H)
        before = hidden.clone()
        ours(hidden)
        assert torch.equal(hidden, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_whatever_the_base_is(dtype: torch.dtype) -> None:
    """A classifier or a softmax in the base's half precision would cost three digits."""
    ours, _ = build(xlora_depth=2)
    hidden = torch.randn(6, H).to(dtype)
    scalings = ours(hidden)
    assert scalings.dtype == torch.float32
    assert torch.equal(scalings, ours(hidden.float()))
    torch.testing.assert_close(scalings.sum(-1), torch.ones(6, S), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_is_inside_the_softmax(temperature: float) -> None:
    """softmax(z / t), not softmax(z) / t; and none at all where softmax is off."""
    ours, _ = build(softmax_temperature=temperature)
    z = torch.randn(3, S, E)
    torch.testing.assert_close(ours.scalings(z), (z / temperature).softmax(-1))
    raw, _ = build(softmax_temperature=temperature, enable_softmax=False)
    assert torch.equal(raw.scalings(z), z)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("own_k", [None, 1, 2])
@pytest.mark.parametrize("renormalise", [True, False])
def test_parameters_of_single_rows(softmax: bool, own_k: int | None, renormalise: bool) -> None:
    """Every row comes out as it would of a checkpoint with its parameters; its neighbours' do not reach it."""
    xlora = {"enable_softmax": softmax, "softmax_temperature": 1.7, "enable_softmax_topk": renormalise}
    ours, _ = build(**xlora, top_k_lora=own_k)
    z = torch.randn(40, S, E, generator=torch.Generator().manual_seed(0))
    exclusions: list[list[int]] = [[], [0], [1, 3], [0, 1, 2]]
    rows = list(itertools.product([0.0, 0.4], [0, 1, 2, 3, E], exclusions))
    parameters = GateParameters.of_checkpoint(40, E, CPU)
    for row, (temperature, top_k, excluded) in enumerate(rows):
        parameters.temperature[row], parameters.top_k[row] = temperature, top_k
        parameters.excluded[row, excluded] = True
    found = ours.scalings(z, parameters)
    for row, (temperature, top_k, excluded) in enumerate(rows):
        alone, _ = build(**{**xlora, "softmax_temperature": temperature or 1.7}, top_k_lora=top_k or own_k)
        of_row = z[row : row + 1].clone()
        of_row[..., excluded] = float("-inf") if softmax else 0.0
        torch.testing.assert_close(found[row : row + 1], alone.scalings(of_row), atol=0, rtol=0)


@pytest.mark.parametrize("own_k", [None, 3])
def test_ties_of_another_k_go_to_the_lower_expert(own_k: int | None) -> None:
    """The checkpoint's own k keeps what torch.topk keeps, also where a neighbour has another."""
    ours, _ = build(enable_softmax=False, top_k_lora=own_k)
    z = rows_with_edges()[:256, None].expand(-1, S, -1).contiguous()
    parameters = GateParameters.of_checkpoint(256, E, CPU)
    parameters.top_k[::2] = 2
    found = ours.scalings(z, parameters)
    assert torch.equal(found[1::2], ours.scalings(z)[1::2])
    for row, kept in zip(z[::2, 0].tolist(), found[::2, 0].tolist(), strict=True):
        best = sorted(range(E), key=lambda expert: (-row[expert], expert))[:2]
        assert kept == [value if expert in best else 0.0 for expert, value in enumerate(row)]


def rows_with_edges() -> Tensor:
    """[n, E]: random rows, negative ones, ties of every kind, zeros."""
    grid = torch.tensor(list(itertools.product([-1.0, 0.0, 0.5, 2.0], repeat=E)))
    noise = torch.randn(200, E, generator=torch.Generator().manual_seed(0))
    return torch.cat([grid, noise, -noise.abs(), noise.softmax(-1)])


@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("softmax", [True, False])
def test_keep_top_k_equals_peft(top_k: int | None, softmax: bool) -> None:
    """All rows at once, ties included: on the CPU both sides break them alike."""
    rows = rows_with_edges()
    ours, theirs = keep_top_k(rows, top_k, renormalise=softmax), peft_top_k(rows, top_k, softmax)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("softmax", [True, False])
def test_keep_top_k_properties(top_k: int | None, softmax: bool) -> None:
    """Never NaN; zero stays zero; at most k kept, and those the largest (the largest, not those of largest size)."""
    rows = rows_with_edges()
    before = rows.clone()
    kept = keep_top_k(rows, top_k, renormalise=softmax)
    assert torch.equal(rows, before), "the argument was changed in place"
    assert kept.isfinite().all()
    assert (kept[(rows == 0).all(-1)] == 0).all()
    chosen = kept != 0
    assert chosen.sum(-1).max() <= (top_k or E)
    dropped = ~chosen & (rows != 0)
    smallest_kept = rows.masked_fill(~chosen, float("inf")).amin(-1)
    largest_dropped = rows.masked_fill(~dropped, float("-inf")).amax(-1)
    has_both = chosen.any(-1)
    assert (smallest_kept >= largest_dropped)[has_both].all()
    if softmax:
        torch.testing.assert_close(kept.sum(-1), chosen.any(-1).float(), atol=1e-6, rtol=0)
    else:
        assert torch.equal(kept[chosen], rows[chosen])


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.25, -0.5, None])
def test_dummy_row(layerwise: bool, top_k: int | None, softmax: bool, value: float | None) -> None:
    """The gate of the scaling pass is PEFT's constant after PEFT's top-k; 0 stays 0 under top-k softmax;
    null is 1/E.
    """
    ours, _ = build(
        layerwise_scalings=layerwise, top_k_lora=top_k, enable_softmax_topk=softmax, scaling_pass_value=value
    )
    sites = S if layerwise else 1
    constant = torch.full((sites, E), 1 / E if value is None else value)
    row = ours.dummy_row()
    assert row.shape == (sites, E)
    torch.testing.assert_close(row, peft_top_k(constant, top_k, softmax), atol=0, rtol=0)


def test_no_rows() -> None:
    """A step without scaling rows asks the classifier for nothing."""
    ours, _ = build(top_k_lora=2, enable_softmax_topk=True)
    assert ours(torch.empty(0, H)).shape == (0, S, E)


def test_negative_control() -> None:
    """A classifier whose ReLU is left out, or whose sites and experts are swapped, gives other scalings."""
    ours, weights = build(xlora_depth=2)
    hidden = torch.randn(4, H)
    expected = ours(hidden)
    linear = Classifier(weights, replace(ours.config, enable_relu_and_dropout=False), E, S, CPU)
    swapped = Classifier(weights, ours.config, S, E, CPU)
    assert (linear(hidden) - expected).abs().max() > 1e-2
    assert (swapped.logits(hidden).transpose(1, 2) - ours.logits(hidden)).abs().max() > 1e-2
