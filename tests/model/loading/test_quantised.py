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
from service.model.loading.quantised import QuantisedLinear, Quantization, quantise
from service.model.xlora_model import XLoraModel
from service.tools.two_pass import TwoPassModel
from tests.support.tiny import CPU, Tiny, assert_same, run_once

TOKENS = [3, 17, 200, 5, 29, 11, 2, 301, 9, 8, 7]
KINDS: dict[Quantization, tuple[float, float]] = {"int8": (0.01, 8.6), "int4": (0.12, 4.3)}  # error, bits a weight


@pytest.fixture(autouse=True)
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_error_and_size(kind: Quantization, dtype: torch.dtype) -> None:
    linear = nn.Linear(512, 384, dtype=dtype)
    error, bits = KINDS[kind]
    quantised = QuantisedLinear(linear, kind, CPU)
    widened = quantised.dequantised()
    assert widened.dtype == dtype
    assert 0 < (widened - linear.weight).float().norm() / linear.weight.float().norm() < error
    assert 8 * quantised.bytes / linear.weight.numel() < bits
    x = torch.randn(1, 5, 512, dtype=dtype)
    torch.testing.assert_close(quantised(x), nn.functional.linear(x, widened, linear.bias))
    torch.testing.assert_close(quantised(x[:, 2:3]), quantised(x)[:, 2:3])  # whatever the neighbours are


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_act_on_a_quantised_base(tmp_path: Path, kind: Quantization, architecture: str) -> None:
    """The plain two-pass computation over the widened weights: what is left of quantisation is only their error."""
    targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    xlora = {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": 0.2}
    options = {"architecture": architecture, "experts": ["a", "b"], "targets": targets, "xlora": xlora}
    tiny = Tiny(tmp_path / "bundle", hidden=64, strength=0.3, head=1.5, **options)
    plain = TwoPassModel(tiny.checkpoint, device=CPU, dtype=torch.float32)
    before = plain.forward(TOKENS)
    base = copy.deepcopy(tiny.base(torch.float32))
    quantise(base, kind, CPU)
    for name, module in base.named_modules():
        if isinstance(module, QuantisedLinear):
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
    linears = [m for m in model.causal_lm.modules() if isinstance(m, QuantisedLinear)]
    assert len(linears) == 2 * 7
    logits, scalings = run_once(model, TOKENS)
    assert logits.isfinite().all()
    assert scalings.dtype == torch.float32


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SettingsError, match=r"--quantization needs bitsandbytes .*xlora-service\[quantization\]"):
        QuantisedLinear(nn.Linear(64, 64), "int8", CPU)
