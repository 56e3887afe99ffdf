"""A quantised base computes exactly what its own widened weights say; only those differ from the base's."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from service.contract.errors import SettingsError
from service.model.loading.passes import load_model
from service.model.loading.quantised import PackedLinear, QuantisedLinear, Quantization, quantise
from service.model.xlora_model import XLoraModel
from service.tools.two_pass import TwoPassModel
from tests.support.tiny import CPU, Tiny, assert_same, run_once

TOKENS = [3, 17, 200, 5, 29, 11, 2, 301, 9, 8, 7]
KINDS: dict[Quantization, tuple[float, float]] = {"int8": (0.012, 8.6), "int4": (0.12, 5.01)}  # error, bits a weight


def made(library: str, linear: nn.Linear, kind: Quantization) -> QuantisedLinear | PackedLinear:
    if library == "torch":
        return PackedLinear(linear, kind)
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    return QuantisedLinear(linear, kind, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", ["torch", "bitsandbytes"])
def test_error_and_size(library: str, kind: Quantization, dtype: torch.dtype) -> None:
    linear = nn.Linear(512, 384, dtype=dtype)
    error, bits = KINDS[kind]
    quantised = made(library, linear, kind)
    widened = quantised.dequantised()
    assert widened.dtype == dtype
    assert 0 < (widened - linear.weight).float().norm() / linear.weight.float().norm() < error
    size = quantised.bytes if isinstance(quantised, QuantisedLinear) else sum(b.nbytes for b in quantised.buffers())
    assert 8 * size / linear.weight.numel() < bits
    x = torch.randn(1, 5, 512, dtype=dtype)
    rounding = {"rtol": 0.016, "atol": 0.01 if dtype == torch.bfloat16 else 1e-5}
    torch.testing.assert_close(quantised(x), nn.functional.linear(x, widened, linear.bias), **rounding)
    torch.testing.assert_close(quantised(x[:, 2:3]), quantised(x)[:, 2:3])  # whatever the neighbours are


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (24, 40), (65, 64), (64, 129), (9, 72), (16, 1000)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_size_is_packed(kind: Quantization, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """Sizes that torch's layouts do not have are padded; 0 in every weight and rows of 0 as well."""
    linear = nn.Linear(inputs, outputs, dtype=dtype)
    with torch.no_grad():
        linear.weight[0] = 0
    packed = PackedLinear(linear, kind)
    weight = packed.dequantised()
    assert weight.shape == linear.weight.shape
    assert not weight[0].any()
    x = torch.randn(2, 9, inputs, dtype=dtype)
    rounding = {"rtol": 0.016, "atol": 0.05 if dtype == torch.bfloat16 else 1e-5}
    torch.testing.assert_close(packed(x), nn.functional.linear(x, weight, linear.bias), **rounding)
    torch.testing.assert_close(packed(x[0, 0]), packed(x)[0, 0], **rounding)
    many = torch.randn(70, inputs, dtype=dtype)  # int8 is upcast for so many
    torch.testing.assert_close(packed(many)[:3], packed(many[:3]), **rounding)
    outline = PackedLinear(nn.Linear(inputs, outputs, device="meta", dtype=dtype), kind)
    assert [b.shape for b in outline.buffers()] == [b.shape for b in packed.buffers()]
    assert [b.nbytes for b in outline.buffers()] == [b.nbytes for b in packed.buffers()]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", ["torch", "bitsandbytes"])
def test_experts_act_on_a_quantised_base(tmp_path: Path, library: str, kind: Quantization, architecture: str) -> None:
    """The plain two-pass computation over the widened weights: what is left of quantisation is only their error."""
    if library == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    xlora = {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": 0.2}
    options = {"architecture": architecture, "experts": ["a", "b"], "targets": targets, "xlora": xlora}
    tiny = Tiny(tmp_path / "bundle", hidden=64, strength=0.3, head=1.5, **options)
    plain = TwoPassModel(tiny.checkpoint, device=CPU, dtype=torch.float32)
    before = plain.forward(TOKENS)
    base = copy.deepcopy(tiny.base(torch.float32))
    quantise(base, kind, CPU, for_cpu=library == "torch")
    for name, module in base.named_modules():
        if isinstance(module, QuantisedLinear | PackedLinear):
            weight = plain.causal_lm.get_submodule(name).weight
            widened = module.dequantised()
            weight.data.copy_(widened if weight.shape == widened.shape and architecture != "gpt2" else widened.T)
    ours = run_once(XLoraModel(tiny.checkpoint, base, device=CPU, dtype=torch.float32), TOKENS, [4, 4, 3])
    assert_same(ours, plain.forward(TOKENS))
    assert (ours[0] - before[0]).abs().max() > 1e-3  # it is quantised
    assert type(base.lm_head) is nn.Linear


@pytest.mark.parametrize("kind", KINDS)
def test_loading(tmp_path: Path, kind: Quantization) -> None:
    checkpoint = Tiny(tmp_path / "bundle").checkpoint
    model = load_model(checkpoint, device=CPU, dtype=torch.float32, quantization=kind)
    linears = [m for m in model.causal_lm.modules() if isinstance(m, PackedLinear)]
    assert len(linears) == 2 * 7
    logits, scalings = run_once(model, TOKENS)
    assert logits.isfinite().all()
    assert scalings.dtype == torch.float32


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        SettingsError, match=r"--quantization on a GPU needs bitsandbytes .*xlora-service\[quantization\]"
    ):
        QuantisedLinear(nn.Linear(64, 64), "int8", CPU)
