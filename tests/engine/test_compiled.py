"""The compiled decode step against the eager one, and what happens around it: cache, failure, death of the parent."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from service.engine.compilation import cache_path
from service.engine.engine import Engine
from service.engine.options import EngineOptions
from service.engine.request import GateWeight, Steering
from service.model.compiled import CompiledStep, compile_step, fingerprint
from service.model.linear import XLoraLinear
from tests.engine.driver import Engines, Run, greedy, run, sampled, words
from tests.engine.test_gate_settings import run_mixed
from tests.model.tiny import Tiny, Variant

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")

# What can go differently in a compiled step: the dummy row acts, one gate row for all sites.
VARIANTS: dict[str, dict[str, Any]] = {
    "as stored": {},
    "experts in the scaling pass, one row for all sites": {"scaling_pass_value": 0.25, "layerwise_scalings": False},
}


REQUESTS = [greedy("r", words(3, 9), 12, return_scalings="full")]


class Background:
    """An engine as it serves while its step is compiled beside it, for a cache in which a damaged package was."""

    def __init__(self, engines: Engines, cache: Path) -> None:
        self.options = {"compile": True, "compile_cache": str(cache)}
        self.folder = cache_path(engines.model, EngineOptions(str(engines.tiny.path), block_size=4, **self.options))
        self.folder.mkdir()
        (self.folder / "rows-1.pt2").write_bytes(b"not a package")
        said = BufferingHandler(capacity=1000)
        logger = logging.getLogger("service.engine.compilation")
        logger.addHandler(said)
        try:
            self.engine = engines.build(**self.options)
            assert self.engine.compilation is not None
            self.before = run(self.engine, REQUESTS)
            self.was_ready = self.engine._runner.compiled is not None
            assert self.engine.compilation.wait(600)
        finally:
            logger.removeHandler(said)
        self.said = [record.getMessage() for record in said.buffer]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all packages of this module are: the kernels are compiled by the first."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Stored in bfloat16, in which linears and experts stay where it is run as it is stored; variants are wide."""
    xlora = {"xlora_depth": 2, "layerwise_scalings": True}
    scales = {"alphas": 8, "rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "ranks": 4}
    return Tiny(
        tmp_path_factory.mktemp("tiny") / "kept",
        xlora=xlora,
        strength=0.3,
        dtype=torch.bfloat16,
        draft_head=8,
        **scales,
    )


@pytest.fixture(scope="module")
def engines(tiny: Tiny) -> Engines:
    engines = Engines(tiny.as_stored(), narrow=True)
    linears = [module for module in engines.model.causal_lm.modules() if isinstance(module, XLoraLinear)]
    assert {t.dtype for linear in linears for t in (*linear.parameters(), *linear.buffers())} == {torch.bfloat16}
    return engines


@pytest.fixture(scope="module")
def background(engines: Engines, cache: Path) -> Background:
    return Background(engines, cache)


class Compiled:
    """Engines of one model, eager and compiled."""

    def __init__(self, engines: Engines, folder: Path) -> None:
        self.engines, self.folder = engines, folder
        self.step = CompiledStep(folder, engines.model, 4)
        self.calls = 0

    def build(self, **options: Any) -> Engine:
        engine = self.engines.build(**options)
        engine._runner.compiled = self  # type: ignore[assignment]
        return engine

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        return self.step.forward(*args)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def compiled(request: pytest.FixtureRequest, tiny: Tiny, engines: Engines, cache: Path) -> Compiled:
    """The model as it is stored has the package that was compiled in the background, another one is compiled here."""
    if not request.param:
        return Compiled(engines, request.getfixturevalue("background").folder)
    with pytest.MonkeyPatch.context() as patch:  # with oneDNN, as large weights have it
        patch.setattr("service.model.linear.onednn_is_faster", lambda: True)
        patch.setattr("service.model.linear._ONEDNN_ROWS", ((0, 16),))
        engines = Engines(tiny.variant(**request.param))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler uses deprecated parts of torch
            compile_step(engines.model, engines.model.kv_layout(4), cache / "step", threads=1)
        return Compiled(engines, cache / "step")


def assert_same(ours: Run, expected: Run) -> None:
    assert ours.choices.keys() == expected.choices.keys()
    for key, choice in expected.choices.items():
        assert ours[key].tokens == choice.tokens
        np.testing.assert_allclose(ours[key].full, choice.full, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equals_eager(compiled: Compiled, lookahead: bool, count: int) -> None:
    """One row alone, a context of one block, odd numbers of rows, contexts of different length, both streams."""
    requests = [
        replace((greedy if i % 2 else sampled)(f"r{i}", words(i, 2 + 5 * i), 24), return_scalings="full")
        for i in range(count)
    ]
    expected = run(compiled.engines.build(lookahead=lookahead), requests)
    before = compiled.calls
    ours = run(compiled.build(lookahead=lookahead), requests)
    assert_same(ours, expected)
    assert [one.drafts for one in ours.choices.values()] == [one.drafts for one in expected.choices.values()]
    assert compiled.calls - before > 20, "the compiled step was not used"


def test_prompts_are_left_to_eager_kernels(compiled: Compiled) -> None:
    """Their heads would be computed for every row."""
    engine = compiled.build(lookahead=False)
    before = compiled.calls
    run(engine, [greedy("r", words(1, 60), 1)])
    assert compiled.calls == before
    run(engine, [greedy("r", words(2, 9), 1)])
    assert compiled.calls > before


def test_steered_equals_eager(compiled: Compiled, lookahead: bool) -> None:
    """What varies per request is in the stored rows: one compiled step serves every gate, amid unsteered requests."""
    weights = (GateWeight(0, 0.8), GateWeight(2, -0.4))
    gates = [None, Steering(only=(1,)), Steering(exclude=(1,), temperature=2.0), Steering(top_k=1), Steering(only=())]
    requests = [
        replace((greedy if i % 2 else sampled)(f"r{i}", words(3, 11), 24), return_scalings="full", steering=steering)
        for i, steering in enumerate([*gates, Steering(weights=weights)])
    ]
    requests += [replace(made, id=f"frozen {made.id}", freeze_after=4) for made in requests]
    eager = compiled.engines.build(lookahead=lookahead, prefix_cache=False)
    expected = Run({key: one for made in requests for key, one in run(eager, [made]).choices.items()})
    before = compiled.calls
    ours = run(compiled.build(lookahead=lookahead), requests)
    assert_same(ours, expected)
    assert compiled.calls - before > 20, "the compiled step was not used"
    alone = run(compiled.build(), [replace(requests[5], freeze_after=None)])["r5"]
    assert alone.tokens == expected["r5"].tokens


def test_gate_settings_equal_eager(compiled: Compiled, lookahead: bool) -> None:
    """Dummy rows and global weights of single requests, in one batch: the compiled step knows neither."""
    expected = run_mixed(compiled.engines.build(lookahead=lookahead))
    before = compiled.calls
    assert_same(run_mixed(compiled.build(lookahead=lookahead)), expected)
    assert compiled.calls - before > 20, "the compiled step was not used"


def test_equals_peft(tiny: Tiny, compiled: Compiled) -> None:
    """The oracle itself."""
    oracle = Variant(tiny, compiled.engines.checkpoint).oracle()
    prompt = words(5, 9)
    ours = run(compiled.build(), [greedy("r", prompt, 24)])["r"].tokens
    logits, _ = oracle.forward(prompt + ours)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ours


def test_a_slot_that_is_not_ours_is_left_alone(compiled: Compiled) -> None:
    """A compiled step that copied the pool, or wrote one slot too far, would spoil other requests."""
    engine = compiled.build()
    cache = engine._runner.kv_cache
    run(engine, [greedy("first", words(1, 9), 8)])
    held: set[int] = set()
    for pool in (*cache.keys, *cache.values):
        pool[-1] = 7.0
    pools = [pool.data_ptr() for pool in (*cache.keys, *cache.values)]
    untouched = cache.keys[0].clone()

    def remember(engine: Engine, _: object) -> None:
        for sequences in engine._sequences.values():
            held.update(block for s in sequences for stream in (s.scaling, s.real) for block in stream.blocks)

    run(engine, [greedy("second", words(2, 9), 8)], each_step=remember)
    others = [block for block in range(cache.num_blocks) if block not in held]
    assert others
    assert torch.equal(cache.keys[0][others], untouched[others])
    assert torch.equal(cache.gate_rows[cache.dummy_slot], engine._runner.model.dummy_row)
    assert pools == [pool.data_ptr() for pool in (*cache.keys, *cache.values)]


def test_fingerprint(tiny: Tiny) -> None:
    """The same model in another process finds its package; another block size, dtype or gate does not."""
    first, again = tiny.as_stored().model(), tiny.as_stored().model()
    name = fingerprint(first, first.kv_layout(4), 1)
    assert fingerprint(again, again.kv_layout(4), 1) == name
    half, other = tiny.as_stored().model(torch.bfloat16), tiny.variant(softmax_temperature=0.5).model()
    different = [
        fingerprint(first, first.kv_layout(8), 1),
        fingerprint(first, first.kv_layout(4), 2),
        fingerprint(half, half.kv_layout(4), 1),
        fingerprint(other, other.kv_layout(4), 1),
    ]
    assert len({name, *different}) == 5


def test_what_was_compiled_is_loaded_whatever_kernels_are_preferred_now(compiled: Compiled) -> None:
    """Which kernel is faster is measured in every process, and two processes may disagree."""
    model = compiled.engines.model
    linears = [module for module in model.causal_lm.modules() if isinstance(module, XLoraLinear)]
    with pytest.MonkeyPatch.context() as patch:
        for linear in linears:
            patch.setattr(linear, "onednn_rows", 64 if linear.onednn_rows == 16 else 16)
        other = CompiledStep(compiled.folder, model, 4)
    engine = compiled.build()
    engine._runner.compiled = other
    request = greedy("r", words(3, 9), 12, return_scalings="full")
    assert_same(run(engine, [request]), run(compiled.build(), [request]))


def test_compiles_in_the_background_and_finds_it_again(engines: Engines, background: Background) -> None:
    """A damaged package is there: serving goes on while it is compiled again; the next start needs no compiler."""
    assert any("cannot be loaded, compiling it again" in line for line in background.said)
    assert not background.was_ready, "it cannot be ready yet"
    assert background.engine._runner.compiled is not None
    assert_same(run(background.engine, REQUESTS), background.before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda _: None)
        again = engines.build(**background.options)
    assert again._runner.compiled is not None


def test_a_failed_compilation_leaves_the_engine_as_it_was(
    engines: Engines, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache directory that cannot be written, say."""
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        engine = engines.build(compile=True, compile_cache=str(tmp_path / "file" / "cache"))
        assert engine.compilation is not None
        assert engine.compilation.wait(300)
    assert "Not a directory" in caplog.text
    assert engine._runner.compiled is None
    run(engine, [greedy("r", words(3, 9), 4)])


def test_no_compiler_is_told_once(
    engines: Engines, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    engine = engines.build(compile=True, compile_cache=str(tmp_path))
    assert engine.compilation is not None
    assert engine.compilation.wait(60)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "install g++" in caplog.text
    run(engine, [greedy("r", words(3, 9), 4)])


def test_a_killed_compilation_is_told(
    engines: Engines, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel, for memory: there is no last word, and perhaps nobody to read the options."""
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(killed))
    engine = engines.build(compile=True, compile_cache=str(tmp_path / "cache"))
    assert engine.compilation is not None
    assert engine.compilation.wait(60)
    assert "serving without: the compiling process ended with -9" in caplog.text or "Broken pipe" in caplog.text


def test_two_that_compile_the_same_and_one_that_was_killed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first package stays; what a killed process has left long ago is removed, what is under way is not."""
    model, folder = tiny.as_stored().model(), tmp_path / "step"
    abandoned, running = tmp_path / "compiling-old", tmp_path / "compiling-new"
    abandoned.mkdir()
    running.mkdir()
    os.utime(abandoned, (1, 1))

    def other_is_faster(*_: Any, package_path: str, **__: Any) -> None:
        Path(package_path).write_text("second")
        folder.mkdir(exist_ok=True)
        (folder / "rows-1.pt2").write_text("first")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", other_is_faster)
    monkeypatch.setattr("service.model.kernel_library.build", lambda *_: None)
    compile_step(model, model.kv_layout(4), folder, threads=1)
    assert (folder / "rows-1.pt2").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compiling-new", "step"]


def test_the_compiling_process_dies_with_its_parent(engines: Engines, tmp_path: Path) -> None:
    """kill -9 of the server must not leave a minute of compiling behind."""
    options = EngineOptions(str(engines.tiny.path), compile=True, compile_cache=str(tmp_path))
    command = [sys.executable, "-m", "service.engine.compile_worker", str(tmp_path / "step")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdin is not None
    child.stdin.write(msgspec.json.encode(options) + b"\n")
    child.stdin.flush()
    time.sleep(0.5)
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(30) == 1
    assert not (tmp_path / "step").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
