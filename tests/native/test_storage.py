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

from service.checkpoint import load_checkpoint
from service.contract.options import EngineOptions
from service.engine.engine import Engine
from service.engine.loader import build_engine, load_model_of
from service.model.adapted import AdaptedModule
from service.model.xlora_model import XLoraModel
from service.native import library
from service.native.decoder import Decoder
from service.native.step import NativeStep
from tests.support.damage import edit_json, edit_tensors
from tests.support.driver import greedy, run, sampled, words
from tests.support.tiny import Tiny

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")

XLORA = {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": 0.1}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def stored(path: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Tiny:
    options = {"targets": ALL, "ranks": 8, "alphas": 16, "experts": ["math", "code"], **options}
    return Tiny(path / "bundle", dtype=dtype, xlora=XLORA, strength=0.3, head=2.0, **options)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A bundle that loses nothing in bfloat16."""
    return stored(tmp_path_factory.mktemp("halved"))


def model_of(tiny: Tiny, **options: Any) -> XLoraModel:
    """The model of an engine, as it is kept."""
    return loaded(tiny, **options).runner.model


def loaded(tiny: Tiny, **options: Any) -> Engine:
    """An engine over the bundle as the server loads it."""
    chosen = EngineOptions(str(tiny.path), "cpu", threads=1, **options)
    return build_engine(load_model_of(tiny.checkpoint, chosen, lambda _: None), tiny.checkpoint, chosen)


def linears(model: XLoraModel) -> list[AdaptedModule]:
    return [module for module in model.causal_lm.modules() if isinstance(module, AdaptedModule)]


def dtypes(model: XLoraModel, name: str) -> set[torch.dtype]:
    tensors = [*model.causal_lm.named_parameters(), *model.causal_lm.named_buffers()]
    return {tensor.dtype for own, tensor in tensors if own.rpartition(".")[2] == name or own.endswith(f"{name}.weight")}


def weight_bytes(model: XLoraModel) -> int:
    tensors = [t for linear in linears(model) for t in (*linear.parameters(), *linear.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_what_is_kept_so(halved: Tiny) -> None:
    model = model_of(halved)
    for name in (*ALL, "lora_a", "lora_b_t", "lm_head"):
        assert dtypes(model, name) == {torch.bfloat16}, name
    for name in ("embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"):
        assert dtypes(model, name) == {torch.float32}, name
    assert 2 * weight_bytes(model) == weight_bytes(model_of(halved, native_kernels=False))


def test_the_engine_says_the_same(halved: Tiny) -> None:
    """As in float32, alone and among many."""
    requests = [replace(greedy(f"g{i}", words(i, 5 + i), 16), return_scalings="full") for i in range(40)]
    requests += [replace(sampled(f"s{i}", words(9 + i, 4), 12, seed=i), return_scalings="full") for i in range(3)]
    runs = []
    for native in (False, True):
        engine = loaded(halved, max_num_seqs=48, max_num_batched_tokens=200, native_kernels=native)
        assert isinstance(engine.runner.step, NativeStep) == native
        runs.append((run(engine, requests), run(engine, requests[:1])))
    (wide, wide_alone), (narrow, narrow_alone) = runs
    for key, choice in (*wide.choices.items(), *wide_alone.choices.items()):
        other = narrow if key in narrow.choices else narrow_alone
        assert other[key].tokens == choice.tokens
        np.testing.assert_allclose(other[key].full, choice.full, atol=1e-4)
    prompt = words(0, 5)
    logits, _ = halved.oracle.forward(prompt + narrow_alone["g0"].tokens)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == narrow_alone["g0"].tokens


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
    model = model_of(stored(tmp_path, **options))
    assert {linear.weight.dtype for linear in linears(model)} == {weights}
    assert dtypes(model, "lora_a") == dtypes(model, "lora_b_t") == {experts}


def test_a_head_that_shares_its_weight_with_the_embedding_stays(tmp_path: Path) -> None:
    """Tokens are looked up in it."""
    tiny = stored(tmp_path, base_config={"tie_word_embeddings": True})
    model = model_of(tiny)
    assert model.causal_lm.lm_head.weight.dtype == torch.float32
    assert model.causal_lm.lm_head.weight is next(model.decoder.embed_tokens.parameters())  # type: ignore[union-attr]
    assert {linear.weight.dtype for linear in linears(model)} == {torch.bfloat16}


def test_a_file_in_float32_with_values_of_bfloat16_is_kept_so(tmp_path: Path) -> None:
    tiny = stored(tmp_path, torch.float32)
    rounded = edit_tensors("base/model.safetensors", lambda tensors: [t.copy_(t.bfloat16()) for t in tensors.values()])
    rounded(tiny.path)
    edit_json("bundle.json", lambda data: data.pop("sha256"))(tiny.path)
    tiny.checkpoint = load_checkpoint(tiny.path)
    model = model_of(tiny)
    assert {linear.weight.dtype for linear in linears(model)} == {torch.bfloat16}
    assert dtypes(model, "lora_a") == dtypes(model, "embed_tokens") == {torch.float32}


def test_values_decide_and_not_the_configuration(tmp_path: Path) -> None:
    tiny = stored(tmp_path, torch.float32)
    path = tiny.checkpoint.base_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    assert {linear.weight.dtype for linear in linears(model_of(tiny))} == {torch.float32}


def test_experts_in_float32_on_a_base_in_bfloat16(tmp_path: Path) -> None:
    """As PEFT saves adapters that it has trained."""
    tiny = stored(tmp_path)
    wide = [
        replace(
            expert,
            weights={
                site: replace(w, a=w.a[...].float() + 1e-5, b=w.b[...].float()) for site, w in expert.weights.items()
            },
        )
        for expert in tiny.checkpoint.experts
    ]
    tiny.checkpoint = replace(tiny.checkpoint, experts=wide)
    runs = []
    for native in (True, False):
        engine = loaded(tiny, native_kernels=native)
        runs.append(run(engine, [greedy("r", words(3, 12), 24, return_scalings="full")]))
        assert dtypes(engine.runner.model, "lora_a") == {torch.float32}
        expected = torch.bfloat16 if native else torch.float32
        assert {linear.weight.dtype for linear in linears(engine.runner.model)} == {expected}
    assert runs[0]["r"].tokens == runs[1]["r"].tokens
    np.testing.assert_allclose(runs[0]["r"].full, runs[1]["r"].full, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"native_kernels": False}, {"dtype": "bfloat16"}, {"native_cache": "nowhere"}], ids=str
)
def test_without_kernels_that_upcast_all_is_of_the_arithmetics_dtype(
    halved: Tiny, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "native_cache" in options:
        monkeypatch.setattr("shutil.which", lambda _: None)
        options = {"native_cache": str(tmp_path)}
    engine = loaded(halved, **options)
    model = engine.runner.model
    assert {linear.weight.dtype for linear in linears(model)} == {model.dtype}
    assert len(run(engine, [greedy("r", words(3, 9), 4)])["r"].tokens) == 4


def test_loading_waits_for_the_compiler(halved: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's operators could not compute with what is kept in bfloat16 until then."""
    built = library.library_in(Path(EngineOptions("").native_cache).expanduser())
    monkeypatch.setattr(library, "build", lambda path: shutil.copy(built, path))
    engine = loaded(halved, native_cache=str(tmp_path))
    assert isinstance(engine.runner.step, NativeStep)
    assert dtypes(engine.runner.model, "q_proj") == {torch.bfloat16}


def test_experts_alone_are_waited_for_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base in float32 with experts that bfloat16 holds: they would change beneath torch's steps."""
    tiny = stored(tmp_path, torch.float32)
    halved = [
        replace(
            expert,
            weights={
                site: replace(w, a=w.a[...].bfloat16(), b=w.b[...].bfloat16(), scale=2.0)
                for site, w in expert.weights.items()
            },
        )
        for expert in tiny.checkpoint.experts
    ]
    checkpoint = replace(tiny.checkpoint, experts=tuple(halved))
    options = EngineOptions(str(tiny.path), "cpu", threads=1, native_cache=str(tmp_path / "cache"))
    built = library.library_in(Path(EngineOptions("").native_cache).expanduser())
    monkeypatch.setattr(library, "build", lambda path: shutil.copy(built, path))
    engine = build_engine(load_model_of(checkpoint, options, lambda _: None), checkpoint, options)
    assert isinstance(engine.runner.step, NativeStep)
    assert dtypes(engine.runner.model, "lora_a") == {torch.bfloat16}
    assert dtypes(engine.runner.model, "q_proj") == {torch.float32}


def test_a_failed_build_changes_nothing(halved: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("no space")

    monkeypatch.setattr(library, "build", fail)
    engine = loaded(halved, native_cache=str(tmp_path))
    assert dtypes(engine.runner.model, "q_proj") == {torch.float32}
    assert len(run(engine, [greedy("r", words(3, 9), 4)])["r"].tokens) == 4


def test_no_weight_is_upcast_on_the_way(halved: Tiny) -> None:
    """The base is read as it is stored; what steps do not read in bfloat16 comes to float32 one by one."""
    model = load_model_of(halved.checkpoint, EngineOptions(str(halved.path), device="cpu"), lambda _: None)
    assert dtypes(model, "q_proj") == dtypes(model, "lm_head") == {torch.bfloat16}
    assert dtypes(model, "embed_tokens") == dtypes(model, "input_layernorm") == {torch.float32}
    assert model.causal_lm.config.dtype == torch.float32


def test_a_decoder_that_is_of_another_kind_after_all_is_upcast(halved: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names said that it is Llama's, values do not: torch computes it, in float32."""
    expected = run(loaded(halved, native_kernels=False), [greedy("r", words(3, 9), 4)])["r"]
    monkeypatch.setattr(Decoder, "of", lambda model: None)
    engine = loaded(halved)
    model = engine.runner.model
    assert {tensor.dtype for tensor in model.causal_lm.parameters()} == {torch.float32}
    found = run(engine, [greedy("r", words(3, 9), 4)])["r"]
    assert found.tokens == expected.tokens
    assert {tensor.dtype for tensor in model.causal_lm.buffers()} == {torch.float32}
