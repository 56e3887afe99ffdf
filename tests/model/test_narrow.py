"""Weights kept in bfloat16 under float32 arithmetic: which ones, and that nothing but their size changes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.engine.loader import load_checkpoint_and_model
from service.engine.options import EngineOptions
from service.model import decode_kernels
from service.model.linear import XLoraLinear
from service.model.xlora_model import XLoraModel, load_model
from tests.support.driver import Engines, greedy, run, sampled, words
from tests.support.tiny import CPU, OneRequest, Tiny

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the kernels need g++")

XLORA = {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": 0.1}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def stored(path: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Tiny:
    options = {"targets": ALL, "ranks": 8, "alphas": 16, "experts": ["math", "code"], **options}
    return Tiny(path / "bundle", dtype=dtype, xlora=XLORA, strength=0.3, head=2.0, **options)


@pytest.fixture(scope="module")
def narrow_tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return stored(tmp_path_factory.mktemp("narrow"))


def load(tiny: Tiny, *, narrow: bool, dtype: torch.dtype = torch.float32) -> XLoraModel:
    return load_model(tiny.checkpoint, device=CPU, dtype=dtype, narrow=narrow)


def dtypes(model: XLoraModel, name: str) -> set[torch.dtype]:
    tensors = [*model.causal_lm.named_parameters(), *model.causal_lm.named_buffers()]
    return {tensor.dtype for own, tensor in tensors if own.rpartition(".")[2] == name or own.endswith(f"{name}.weight")}


def test_what_is_kept_narrow(narrow_tiny: Tiny) -> None:
    model = load(narrow_tiny, narrow=True)
    for name in (*ALL, "lora_a", "lora_b_t", "lm_head"):
        assert dtypes(model, name) == {torch.bfloat16}, name
    for name in ("embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"):
        assert dtypes(model, name) == {torch.float32}, name
    assert model.is_narrow
    assert model._fused is not None
    siblings = {linear.siblings[0] for linear in linears(model) if linear.siblings is not None}
    assert {one._weight.dtype for one in siblings} == {torch.bfloat16}, "held once"


def linears(model: XLoraModel) -> list[XLoraLinear]:
    return [module for module in model.causal_lm.modules() if isinstance(module, XLoraLinear)]


def test_torchs_operators_give_the_same_bits(narrow_tiny: Tiny) -> None:
    """Prefill, and every step before there are kernels."""
    text = words(3, 14)
    wide, narrow = (OneRequest(load(narrow_tiny, narrow=kept), 14).run(text, [5, 4, 5]) for kept in (False, True))
    for ours, expected in zip(narrow, wide, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("is_fused", [True, False])
def test_the_engine_says_the_same(narrow_tiny: Tiny, is_fused: bool) -> None:
    """Alone and among many: few rows, many, more than the kernels take."""
    requests = [replace(greedy(f"g{i}", words(i, 5 + i), 16), return_scalings="full") for i in range(40)]
    requests += [replace(sampled(f"s{i}", words(9 + i, 4), 12, seed=i), return_scalings="full") for i in range(3)]
    runs = []
    for kept in (False, True):
        engines = Engines(narrow_tiny.as_stored(), narrow=kept)
        assert engines.model.is_narrow == kept
        if not is_fused:
            engines.model._fused = None
        engine = engines.build(max_num_seqs=48, max_num_batched_tokens=200)
        assert engine._runner.native
        runs.append((run(engine, requests), run(engine, requests[:1])))
    (wide, wide_alone), (narrow, narrow_alone) = runs
    for key, choice in (*wide.choices.items(), *wide_alone.choices.items()):
        other = narrow if key in narrow.choices else narrow_alone
        assert other[key].tokens == choice.tokens
        np.testing.assert_allclose(other[key].full, choice.full, atol=1e-4)
    prompt = words(0, 5)
    logits, _ = narrow_tiny.oracle.forward(prompt + narrow_alone["g0"].tokens)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == narrow_alone["g0"].tokens


def test_half_the_memory(narrow_tiny: Tiny) -> None:
    def weights(model: XLoraModel) -> int:
        tensors = [t for linear in linears(model) for t in (*linear.parameters(), *linear.buffers())]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    assert 2 * weights(load(narrow_tiny, narrow=True)) == weights(load(narrow_tiny, narrow=False))


@pytest.mark.parametrize(
    ("options", "weights", "experts"),
    [
        ({"dtype": torch.float32}, torch.float32, torch.float32),
        ({"alphas": 12}, torch.bfloat16, torch.float32),
        ({"architecture": "gemma2"}, torch.float32, torch.float32),
    ],
    ids=["stored in float32", "a scale that is no power of two", "another architecture"],
)
def test_what_would_lose_something_stays(
    tmp_path: Path, options: dict[str, Any], weights: torch.dtype, experts: torch.dtype
) -> None:
    model = load(stored(tmp_path, **options), narrow=True)
    assert {linear.weight.dtype for linear in linears(model)} == {weights}
    assert dtypes(model, "lora_a") == dtypes(model, "lora_b_t") == {experts}


def test_a_base_that_is_not_what_its_configuration_says_stays(tmp_path: Path) -> None:
    """Values decide, not config.json."""
    tiny = stored(tmp_path, torch.float32)
    path = tiny.checkpoint.base_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    assert not load(tiny, narrow=True).is_narrow


def test_experts_in_float32_on_a_base_in_bfloat16(tmp_path: Path) -> None:
    """As PEFT saves adapters that it has trained."""
    tiny = stored(tmp_path)
    wide = [
        replace(
            expert,
            weights={site: replace(w, a=w.a.float() + 1e-5, b=w.b.float()) for site, w in expert.weights.items()},
        )
        for expert in tiny.checkpoint.experts
    ]
    tiny.checkpoint = replace(tiny.checkpoint, experts=wide)
    text, runs = words(3, 12), []
    for kept in (True, False):
        engines = Engines(tiny.as_stored(), narrow=kept)
        assert dtypes(engines.model, "lora_a") == {torch.float32}
        assert {linear.weight.dtype for linear in linears(engines.model)} == {torch.bfloat16 if kept else torch.float32}
        runs.append(run(engines.build(), [greedy("r", text, 24, return_scalings="full")])["r"])
    assert runs[0].tokens == runs[1].tokens
    np.testing.assert_allclose(runs[0].full, runs[1].full, atol=1e-4)


def test_experts_that_stay_narrow_beside_others_that_cannot(tmp_path: Path) -> None:
    """Linears that are computed together agree on one dtype."""
    tiny = Tiny(tmp_path / "mixed", dtype=torch.bfloat16, xlora=XLORA, strength=0.3, alphas=12, rslora=False)
    tiny.checkpoint = replace(
        tiny.checkpoint,
        experts=[
            replace(
                e, weights={site: replace(w, scale=2.0 if "k_proj" in site else 1.5) for site, w in e.weights.items()}
            )
            for e in tiny.checkpoint.experts
        ],
    )
    runs = []
    for kept in (True, False):
        engines = Engines(tiny.as_stored(), narrow=kept)
        for linear in linears(engines.model):
            assert linear.get_buffer("lora_a").dtype == linear.get_buffer("lora_b_t").dtype
        runs.append(
            [run(engines.build(native_kernels=native), [greedy("r", words(3, 9), 16)]) for native in (True, False)]
        )
    assert len({tuple(one["r"].tokens) for both in runs for one in both}) == 1


@pytest.mark.parametrize(
    "options", [{"native_kernels": False}, {"dtype": "bfloat16"}, {"native_cache": "nowhere"}], ids=str
)
def test_without_kernels_that_widen_nothing_is_narrow(
    narrow_tiny: Tiny, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "native_cache" in options:
        monkeypatch.setattr("shutil.which", lambda _: None)
        options = {"native_cache": str(tmp_path)}
    model, _ = load_checkpoint_and_model(EngineOptions(str(narrow_tiny.path), "cpu", threads=1, **options))
    assert not model.is_narrow
    assert len({linear.weight.dtype for linear in linears(model)}) == 1


def test_by_default_they_are(narrow_tiny: Tiny) -> None:
    model, _ = load_checkpoint_and_model(EngineOptions(str(narrow_tiny.path), "cpu", threads=1))
    assert model.is_narrow


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 16, 43])
def test_the_kernel(native_kernels: None, rows: int) -> None:
    """Every mixture of narrow and wide gives what wide alone gives."""
    for depth in (3, 16, 40, 200, 1048):
        x, weight = torch.randn(1, rows, depth), torch.randn(50, depth).bfloat16()
        a, b_t, gate = torch.randn(7, depth).bfloat16(), torch.randn(7, 50).bfloat16(), torch.rand(rows, 7)
        expected = decode_kernels.adapted_linear(x, weight.float(), None, a.float(), b_t.float(), gate, 0)
        for own in (weight, weight.float()):
            for stack in ((a, b_t), (a.float(), b_t.float())):
                ours = decode_kernels.adapted_linear(x, own, None, *stack, gate, 0)
                torch.testing.assert_close(ours, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    with pytest.raises(RuntimeError, match="fitting shapes"):
        decode_kernels.adapted_linear(x, weight, None, a, b_t.float(), gate, 0)
    with pytest.raises(RuntimeError, match="fitting shapes"):
        decode_kernels.adapted_linear(x.bfloat16(), weight.float(), None, None, None, None, 0)
