"""Steps with the C++ kernels against steps without, and how the kernels come into a running engine."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.engine.engine import Engine
from service.engine.request import Steering, StepOutput
from service.model import decode_kernels, kernel_library
from tests.engine.test_gate_settings import run_mixed
from tests.support.driver import Engines, Run, greedy, run, sampled, words
from tests.support.tiny import Tiny, Variant

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the kernels need g++")

VARIANTS: dict[str, dict[str, Any]] = {
    "as stored": {},
    "two of the experts": {"top_k_lora": 2},
    "experts in the scaling pass, one row for all sites": {"scaling_pass_value": 0.25, "layerwise_scalings": False},
}


@pytest.fixture(scope="module", params=[True, False], ids=["fused decoder", "module by module"])
def is_fused(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def both(request: pytest.FixtureRequest, tiny: Tiny, is_fused: bool) -> Engines:
    engines = Engines(tiny.variant(**request.param) if request.param else tiny.as_stored())
    assert engines.model._fused is not None
    if not is_fused:
        engines.model._fused = None
    return engines


class Calls:
    """How often each operator was called."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = dict.fromkeys(
            [
                f"_decode_{name}"
                for name in (
                    "linear",
                    "siblings",
                    "self_attention",
                    "rotate",
                    "norm",
                    "layer",
                    "spread",
                    "scalings",
                    "drafting",
                )
            ],
            0,
        )
        for name in self.count:
            patch.setattr(decode_kernels, name, self._counted(name, getattr(decode_kernels, name)))

    def _counted(self, name: str, operator: Any) -> Any:
        def call(*args: Any) -> Any:
            self.count[name] += 1
            return operator(*args)

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def assert_same(ours: Run, expected: Run) -> None:
    assert ours.choices.keys() == expected.choices.keys()
    for key, choice in expected.choices.items():
        assert ours[key].tokens == choice.tokens
        assert ours[key].drafts == choice.drafts
        np.testing.assert_allclose(ours[key].full, choice.full, atol=1e-4)


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("lookahead", [True, False])
def test_the_same_without(both: Engines, is_fused: bool, calls: Calls, lookahead: bool, count: int) -> None:
    """Alone and together, where linears may be torch's again and attention is not; greedy and sampled."""
    requests = [replace(greedy(f"g{i}", words(i, 5 + 9 * i), 24), return_scalings="full") for i in range(count)]
    requests += [replace(sampled(f"s{i}", words(9 + i, 4), 12, seed=i), return_scalings="full") for i in range(count)]
    expected = run(both.build(lookahead=lookahead, native_kernels=False), requests)
    assert not any(calls.count.values())
    assert_same(run(both.build(lookahead=lookahead), requests), expected)
    assert calls.count["_decode_norm"] > 20
    assert calls.count["_decode_spread"] > 20
    assert bool(calls.count["_decode_scalings"]) == both.model.classifier.is_plain
    if is_fused:
        assert calls.count["_decode_linear"] >= 4  # the head's; with 7, in the last steps only
        assert calls.count["_decode_layer"] > 40
        assert not any(calls.count[f"_decode_{name}"] for name in ("siblings", "self_attention", "rotate"))
    else:
        assert calls.count["_decode_linear"] > 20
        assert calls.count["_decode_self_attention"] > 20
        assert calls.count["_decode_rotate"] > 20
        assert calls.count["_decode_siblings"] >= 8
        assert not calls.count["_decode_layer"]


def test_prompts_whose_keys_do_not_stay_near(both: Engines, calls: Calls) -> None:
    """Their rows attend together, with torch's attention; shorter ones are rows of their own, as in decode steps."""
    requests = [replace(greedy(f"g{i}", words(i, 3 + 25 * i), 6), return_scalings="full") for i in range(3)]
    expected = run(both.build(native_kernels=False), requests)
    called = []
    for near in (20, 1000):
        engine = both.build(prefix_cache=False)
        engine._runner.batches.near_positions = near
        before = calls.count["_decode_layer"] + calls.count["_decode_self_attention"]
        alone = run(engine, requests[2:])
        called.append(calls.count["_decode_layer"] + calls.count["_decode_self_attention"] - before)
        assert alone["g2"].tokens == expected["g2"].tokens
        assert_same(run(engine, requests), expected)
    assert 0 < called[0] < called[1]


def test_copied_drafts_beyond_what_is_near(both: Engines, calls: Calls) -> None:
    """Short segments are computed row by row wherever their keys are."""
    request = greedy("r", words(3, 24), 20, return_scalings="full")
    assert request.sampling is not None
    requests = [replace(request, sampling=replace(request.sampling, logit_bias={7: 100.0}))]  # it repeats itself
    expected = run(both.build(adaptive=False, native_kernels=False), requests)
    engine = both.build(adaptive=False)
    engine._runner.batches.near_positions = 4
    ours = run(engine, requests)
    assert_same(ours, expected)
    usage = ours["r"].usage
    assert usage is not None
    assert usage.speculated_tokens > 0
    decoding = len(ours.steps) - 2  # the prompt is one step of each stream
    assert calls.count["_decode_layer"] + calls.count["_decode_self_attention"] >= 2 * decoding


def test_steered_and_copied_drafts_are_the_same(both: Engines, calls: Calls) -> None:
    """Several rows of one stream in a step, fixed gates, frozen ones, and cached prompts."""
    repeating = words(3, 6) * 4
    requests = [
        replace(
            greedy(f"r{i}", repeating, 20),
            return_scalings="full",
            steering=steering,
            freeze_after=4 if i == 2 else None,
        )
        for i, steering in enumerate([None, Steering(only=()), None, Steering(temperature=0.5, top_k=1)])
    ]
    expected = run(both.build(native_kernels=False), requests)
    engine = both.build()
    assert_same(run(engine, requests), expected)
    assert_same(run(engine, requests), expected)  # from the prefix cache
    assert calls.count["_decode_linear"] > 20


def test_gate_settings_are_the_same(both: Engines, is_fused: bool, calls: Calls) -> None:
    """Dummy rows and global weights of single requests."""
    expected = run_mixed(both.build(native_kernels=False))
    assert_same(run_mixed(both.build()), expected)
    assert calls.count["_decode_layer" if is_fused else "_decode_self_attention"] > 20


def test_equals_peft(tiny: Tiny, both: Engines, calls: Calls) -> None:
    oracle = Variant(tiny, both.checkpoint).oracle()
    prompt = words(3, 9)
    ours = run(both.build(), [greedy("r", prompt, 24)])["r"].tokens
    logits, _ = oracle.forward(prompt + ours)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ours
    assert calls.count["_decode_linear"] > 20


def test_a_slot_that_is_not_ours_is_left_alone(both: Engines) -> None:
    """A step that wrote one slot too far would spoil other requests."""
    engine = both.build()
    cache = engine._runner.kv_cache
    run(engine, [greedy("first", words(1, 9), 8)])
    for pool in (*cache.keys, *cache.values):
        pool[-1] = 7.0
    before = [pool.clone() for pool in (*cache.keys, *cache.values)]
    held: set[int] = set()

    def remember(engine: Engine, _: StepOutput) -> None:
        for sequences in engine._sequences.values():
            held.update(block for one in sequences for stream in (one.scaling, one.real) for block in stream.blocks)

    run(engine, [greedy("second", words(2, 9), 8)], each_step=remember)
    others = [block for block in range(cache.num_blocks) if block not in held]
    assert others
    for pool, untouched in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(pool[others], untouched[others])
    assert torch.equal(cache.gate_rows[cache.dummy_slot], engine._runner.model.dummy_row)


def test_they_come_while_requests_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start on a machine: tokens from before and after are of one text. The next start has them at once."""
    engines = Engines(tiny.as_stored())
    requests = [replace(greedy(f"r{i}", words(i, 9 * i), 40), return_scalings="full") for i in (1, 2)]
    expected = run(engines.build(native_kernels=False), requests)
    kernels = kernel_library.library_in(Path("~/.cache/xlora-serve").expanduser())
    waiting: list[Any] = []
    steps: list[StepOutput] = []
    monkeypatch.setattr("service.engine.native.threading.Thread", lambda **kwargs: _Held(waiting, **kwargs))
    engine = engines.build(native_cache=str(tmp_path))
    assert not engine._runner.native

    def arrive(engine: Engine, output: StepOutput) -> None:
        steps.append(output)
        if len(steps) == 10:
            shutil.copy(kernels, tmp_path)
            waiting[0]()
            assert engine._runner.native

    assert_same(run(engine, requests, each_step=arrive), expected)
    assert engines.build(native_cache=str(tmp_path))._runner.native


class _Held:
    """A thread that does its work when the test says so."""

    def __init__(self, waiting: list[Any], target: Any, **_: Any) -> None:
        self._target, self._waiting = target, waiting

    def start(self) -> None:
        self._waiting.append(self._target)


def test_without_a_compiler_it_serves(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    engines = Engines(tiny.as_stored())
    engine = engines.build(native_cache=str(tmp_path))
    assert engine.kernels is not None
    assert engine.kernels.wait(60)
    assert [text for text in engines.news if "no native kernels" in text and "install g++" in text] == engines.news
    assert not caplog.records
    check_serves_without(engine)


def test_a_portable_library_needs_no_compiler(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the image has them, beside the source; the best that suits the CPU is taken, and on a CPU of a lower level it
    is as if there were none.
    """
    monkeypatch.setattr(kernel_library, "_INSTALLED", tmp_path / "package")
    loaded: list[Path] = []
    monkeypatch.setattr(kernel_library, "load", loaded.append)
    levels = kernel_library._PORTABLE[platform.machine()]
    libraries = dict(zip(levels, kernel_library.build_portable(), strict=True))
    here = set(kernel_library.cpu_flags().split())
    monkeypatch.setattr("shutil.which", lambda _: None)
    cache = str(tmp_path / "cache")
    for level, library in libraries.items():
        if levels[level] <= here:
            assert use_library(library).returncode == 0
        monkeypatch.setattr(kernel_library, "cpu_flags", lambda level=level: f"flags : {' '.join(levels[level])}")
        engines = Engines(tiny.as_stored())
        assert engines.build(native_cache=cache)._runner.native
        assert engines.news == [f"native kernels are in use: {library}"]
    assert loaded == list(libraries.values())
    monkeypatch.setattr(kernel_library, "cpu_flags", lambda: "flags : sse2")
    engine = Engines(tiny.as_stored()).build(native_cache=cache)
    assert engine.kernels is not None
    assert engine.kernels.wait(60)
    assert not engine._runner.native


def use_library(library: Path) -> subprocess.CompletedProcess[bytes]:
    """In a process of its own: a library makes itself known to torch, which wants to hear it once."""
    script = (
        "import sys, pathlib, torch; from service.model import decode_kernels as kernels, kernel_library\n"
        "kernel_library.load(pathlib.Path(sys.argv[1])); x, weight = torch.randn(1, 2, 40), torch.randn(24, 40)\n"
        "torch.testing.assert_close(kernels.linear(x, weight), torch.nn.functional.linear(x, weight))"
    )
    return subprocess.run([sys.executable, "-c", script, str(library)], check=False, timeout=120)


def test_a_cache_that_cannot_be_written_is_told(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    engine = Engines(tiny.as_stored()).build(native_cache=str(tmp_path / "file" / "cache"))
    assert engine.kernels is not None
    assert engine.kernels.wait(60)
    assert "Not a directory" in caplog.text
    check_serves_without(engine)


def test_a_damaged_library_is_told(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kernel_library.library_in(tmp_path).write_text("no library")
    kernel_library._libraries, before = {}, kernel_library._libraries
    try:
        engine = Engines(tiny.as_stored()).build(native_cache=str(tmp_path))
    finally:
        kernel_library._libraries = before
    assert "no native kernels" in caplog.text
    check_serves_without(engine)


def test_weights_that_are_not_dense_do_without(tiny: Tiny) -> None:
    engines = Engines(tiny.as_stored())
    linear = engines.model.causal_lm.lm_head
    linear.weight = torch.nn.Parameter(linear.weight.detach().T.contiguous().T, requires_grad=False)
    engine = engines.build()
    assert engine.kernels is None
    check_serves_without(engine)


def check_serves_without(engine: Engine) -> None:
    assert not engine._runner.native
    assert len(run(engine, [greedy("r", words(3, 9), 4)])["r"].tokens) == 4
