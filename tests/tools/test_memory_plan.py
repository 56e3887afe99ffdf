"""The plan of `check --plan` against the engine that it speaks of: same bytes, same blocks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from service.checkpoint import load_checkpoint
from service.contract.errors import SettingsError, StartupError
from service.contract.options import EngineOptions
from service.engine import loader, sizing
from service.engine.memory_plan import weight_bytes
from service.tools.memory_plan import describe_plan
from tests.support.bundles import make_bundle
from tests.support.damage import edit_json, edit_tensors

DEMO = Path(__file__).parents[2] / "model_store/demo"
MIB = 1 << 20


def plan_of(options: EngineOptions, gpu_bytes: int | None = None) -> Any:
    checkpoint = load_checkpoint(options.model, examine_weights=False)
    return loader.plan_for(checkpoint, options, gpu_bytes)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that is the embedding, biases, and experts that differ in rank and site."""
    base = {"tie_word_embeddings": True, "attention_bias": True}
    return make_bundle(
        tmp_path_factory.mktemp("plan") / "tied", base_config=base, xlora={"xlora_depth": 3}, draft_head=4
    )


@pytest.fixture(scope="module")
def partly_narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in bfloat16, with experts at some sites whose scales are no powers of two."""
    return make_bundle(tmp_path_factory.mktemp("plan") / "narrow", dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks here what steps cost; to time them takes most of an engine's start."""
    monkeypatch.setattr(loader, "measure_steps", lambda *_: None)


def test_the_plan_is_what_the_engine_allocates(tied: Path, partly_narrow: Path) -> None:
    cases = itertools.product((DEMO, tied, partly_narrow), (None, "int8", "int4"), ("float32", "bfloat16"))
    for (model, quantization, dtype), length in zip(cases, itertools.cycle((None, 100, 333)), strict=False):
        options = EngineOptions(
            *(str(model), "cpu", dtype, length, 3),
            max_num_batched_tokens=length,
            quantization=quantization,
            threads=1,
        )
        plan, engine = plan_of(options), loader.load_engine(options)
        runner = engine.runner
        assert plan.weights == weight_bytes(runner.model), options
        assert plan.pool_bytes == runner.kv_cache.bytes, options
        assert plan.num_blocks == engine.info.kv_blocks_total, options
        assert plan.max_model_len == engine.info.max_model_len
        assert engine.info.max_num_batched_tokens == (length or 256)
        assert (plan.kv_slot_bytes + plan.gate_row_bytes) * plan.block_size * plan.num_blocks == engine.info.kv_bytes


def with_copied_head(path: Path) -> None:
    edit_tensors("base/model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 1}))(
        path
    )


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"architecture": "gemma2", "dtype": torch.bfloat16}, None),  # Llama's names, and another formula
        ({"architecture": "granite", "dtype": torch.bfloat16}, None),
        ({"dtype": torch.float32}, edit_json("base/config.json", lambda data: data.update(dtype="bfloat16"))),
        ({"dtype": torch.bfloat16}, edit_json("base/config.json", lambda data: data.update(dtype="float32"))),
        ({"dtype": torch.bfloat16, "base_config": {"tie_word_embeddings": True}}, with_copied_head),
    ],
    ids=["gemma2", "granite", "config says bfloat16", "config says float32", "a tied head in the file"],
)
def test_what_is_kept_in_bfloat16_is_known_before(tmp_path: Path, options: dict[str, Any], change: Any) -> None:
    """By what the base computes and what its files hold, not by names and config.json."""
    path = make_bundle(tmp_path / "bundle", **options)
    if change is not None:
        change(path)
    edit_json("bundle.json", lambda data: data.pop("sha256", None))(path)
    chosen = EngineOptions(str(path), "cpu", dtype="float32", threads=1)
    model = loader.load_engine(chosen).runner.model
    assert plan_of(chosen).weights == weight_bytes(model)


def test_the_bytes_are_those_of_storages_that_exist(tied: Path) -> None:
    """The oracle of the count itself: storages by address, so that nothing shared is counted twice."""
    model = loader.load_engine(EngineOptions(str(tied), "cpu", threads=1)).runner.model
    assert model.draft_head is not None
    modules = model.causal_lm, model.classifier, model.draft_head
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert weight_bytes(model).total == sum(storages.values())


def test_rows_of_a_step_follow_the_device_and_the_seats() -> None:
    """Who decodes has two rows: with as many rows as seats the last ones would never have theirs."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert sizing.resolve_batched_tokens(EngineOptions("any"), cpu) == 256
    assert sizing.resolve_batched_tokens(EngineOptions("any"), cuda) == 1024
    assert sizing.resolve_batched_tokens(EngineOptions("any", max_num_seqs=200), cpu) == 800
    assert sizing.resolve_batched_tokens(EngineOptions("any", max_num_seqs=200, max_num_batched_tokens=7), cpu) == 7


def test_a_gpu_is_divided_as_the_loader_divides_it(tied: Path) -> None:
    """No GPU is needed: 85 % of what the weights leave, in whole blocks, never more than the requests can use."""
    options = EngineOptions(str(tied), max_num_seqs=100_000, max_num_batched_tokens=1024)
    plan = plan_of(options, 16 * MIB)
    block_bytes = (plan.kv_slot_bytes + plan.gate_row_bytes) * 16
    assert plan.num_blocks == int((16 * MIB - plan.weights.total) * 0.85) // block_bytes
    assert plan.reserve_bytes == 16 * MIB - plan.weights.total - plan.pool_bytes > 0
    assert plan_of(EngineOptions(str(tied), max_num_seqs=2), 1 << 34).full_requests == 2


def test_what_does_not_fit_is_said_with_its_numbers(tied: Path) -> None:
    with pytest.raises(StartupError, match=r"the weights need .*; the GPU has 100\.00 KiB for weights"):
        plan_of(EngineOptions(str(tied)), 100 << 10)
    with pytest.raises(StartupError, match="one request of 1024 tokens needs"):
        plan_of(EngineOptions(str(tied)), plan_of(EngineOptions(str(tied))).weights.total + 1000)
    with pytest.raises(StartupError, match=r"--kv-memory leaves .* for activations"):
        plan_of(
            EngineOptions(str(tied), kv_memory_bytes=16 * MIB, max_num_seqs=100_000, max_num_batched_tokens=9), 16 * MIB
        )
    with pytest.raises(SettingsError, match="--max-model-len 1025 is over"):
        plan_of(EngineOptions(str(tied), max_model_len=1025))


def test_no_weight_of_the_base_is_read(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(tied, examine_weights=False)
    (checkpoint.base_path / "model.safetensors").rename(checkpoint.base_path / "away")
    try:
        monkeypatch.setattr(torch.cuda, "mem_get_info", None)
        text = describe_plan(loader.plan_for(checkpoint, EngineOptions(str(tied)), 80 << 30))
    finally:
        (checkpoint.base_path / "away").rename(checkpoint.base_path / "model.safetensors")
    assert "80.00 GiB" in text
    assert "requests of 1,024 tokens at once (--max-num-seqs 64)" in text
