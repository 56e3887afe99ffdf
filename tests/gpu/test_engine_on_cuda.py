"""The whole engine on CUDA against the engine on the CPU, which is tested against PEFT."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from service.contract.options import EngineOptions
from service.contract.request import GrammarSpec, Request, SamplingParams
from service.engine.loader import load_engine
from service.model.steps.cuda_graph import CapturedSteps
from tests.gpu.conftest import DEMO, Build
from tests.support.driver import Run, greedy, run
from tests.support.gpu_requests import assert_same, every_kind, plain, prompt


@pytest.fixture(scope="module")
def expected(build: Build) -> Run:
    """Of every kind on the CPU, with nothing that makes a step large or small."""
    return run(build("cpu"), every_kind())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cuda_graphs": False},
        {"lookahead": False, "speculative_tokens": 0},
        {"max_num_batched_tokens": 48},
        {"block_size": 64},
        {"block_size": 256},
    ],
    ids=str,
)
def test_fp32_equals_the_cpu(build: Build, gpu: torch.device, expected: Run, options: dict[str, int | bool]) -> None:
    """Tokens, scalings and log-probabilities of every kind of request; captured and eager; varlen_attn's block size."""
    engine = build(gpu, **options)
    assert_same(run(engine, every_kind()), expected)
    step = engine.runner.step
    if gpu.type == "cuda":
        assert isinstance(step, CapturedSteps) == (options.get("cuda_graphs") is not False)
    if isinstance(step, CapturedSteps):
        assert step.captured, "nothing was captured: the log says why"


def test_requests_that_come_and_go(build: Build, gpu: torch.device, expected: Run) -> None:
    """Some join while others run, two are aborted in flight, and one of three choices: the others notice nothing."""
    requests = every_kind()
    gone, leaving, choice = "filtered", "r3", ("n", 1)
    joins = {i // 2: [request] for i, request in enumerate(requests) if i % 2}
    here = [request for i, request in enumerate(requests) if i % 2 == 0]
    names = [request.id for request in here]
    assert gone in names or any(r.id == gone for one in joins.values() for r in one)
    aborts = {14: [(gone, None), choice], 6: [(leaving, None)]}
    result = run(build(gpu), here, joins=joins, aborts=aborts)
    for key, theirs in expected.choices.items():
        ours = result.choices.get(key)
        if key in ((gone, 0), (leaving, 0), choice):
            assert ours is None or ours.tokens == theirs.tokens[: len(ours.tokens)]
        else:
            assert ours is not None
            assert ours.tokens == theirs.tokens, key
    assert len(result[leaving].tokens) < len(expected[leaving].tokens), "nothing was aborted in flight"


def test_preempted_requests(build: Build, gpu: torch.device) -> None:
    """A pool that does not hold them all: what is computed again is what was computed before."""
    theirs = run(build("cpu"), plain(40))
    result = run(build(gpu, blocks=34, max_model_len=256), plain(40))
    assert result.preemptions > 0
    assert_same(result, theirs)


def test_cached_prefixes(build: Build, gpu: torch.device) -> None:
    """Prompts that the pool still holds: both streams go on from their blocks."""
    long = greedy("first", prompt(120), 16, return_scalings="full")
    later = [replace(long, id=f"later {i}", prompt_token_ids=[*prompt(100), *prompt(9 + i, i)]) for i in range(3)]
    theirs = run(build("cpu", prefix_cache=False), [long, *later])
    engine = build(gpu)
    assert_same(run(engine, [long]), Run({key: one for key, one in theirs.choices.items() if key[0] == "first"}))
    second = run(engine, later)
    assert_same(second, Run({key: one for key, one in theirs.choices.items() if key[0] != "first"}))
    for choice in second.choices.values():
        assert choice.usage is not None
        assert choice.usage.cached_tokens >= 64


def test_more_requests_than_a_graph_has_rows(build: Build, gpu: torch.device) -> None:
    """Some wait, steps change their size all the time."""
    requests = [greedy(f"q{i}", prompt(5 + 3 * i, i), 6 + i % 7, return_scalings="mean") for i in range(24)]
    theirs, ours = run(build("cpu"), requests), run(build(gpu, max_num_seqs=8), requests)
    assert_same(ours, theirs)


def test_grammars(build: Build, gpu: torch.device) -> None:
    """Masks of a grammar beside requests that have none."""
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    form = GrammarSpec(regex="[a-z]{4,12}")
    requests = [Request("form", prompt(20), SamplingParams(30, seed=3, form=form)), *plain(12)]
    assert_same(run(build(gpu), requests), run(build("cpu"), requests))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_stay_close_to_fp32(build: Build, gpu: torch.device, dtype: torch.dtype) -> None:
    """The next token of many prompts, and their scalings. Rounding flips near-ties, and nothing else."""
    prompts = [
        replace(greedy(f"p{i}", prompt(20 + 3 * i, i), 1), return_scalings="full", scalings_start=0) for i in range(32)
    ]
    theirs, ours = run(build("cpu"), prompts), run(build(gpu, dtype), prompts)
    assert sum(ours[key].tokens == choice.tokens for key, choice in theirs.choices.items()) >= 29
    difference = [np.abs(ours[key].full - choice.full).mean() for key, choice in theirs.choices.items()]
    assert max(difference) < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_graphs_change_little_in_16_bits(build: Build, gpu: torch.device, dtype: torch.dtype) -> None:
    """Other shapes may have other kernels: most requests get the same text, not by chance."""
    ours, theirs = (run(build(gpu, dtype, cuda_graphs=graphs), plain()) for graphs in (True, False))
    same = [a == b for key in theirs.choices for a, b in zip(ours[key].tokens[:8], theirs[key].tokens[:8], strict=True)]
    assert sum(same) >= 0.8 * len(same)


def test_decode_waits_for_the_device_once_a_step(build: Build, cuda: torch.device) -> None:
    """For the sampled ids. (Statistics of the gate are read every 64 positions.)"""
    engine = build(cuda, speculative_tokens=0)
    engine.add(greedy("r", prompt(20), 40))
    for _ in range(12):
        engine.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(10):
                engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= 11, waits


def test_memory_is_bounded(build: Build, cuda: torch.device) -> None:
    """What requests of every kind take is given back, and the same requests again need no more at their peak."""
    engine = build(cuda)
    run(engine, every_kind())
    before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    for _ in range(3):
        run(engine, every_kind())
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    assert torch.cuda.max_memory_allocated() <= peak + (4 << 20)


def test_tensor_parallel_equals_one_gpu(build: Build, cuda: torch.device, expected: Run) -> None:
    """Two ranks with a GPU each."""
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    options = EngineOptions(
        str(DEMO), device="cuda", dtype="float32", tensor_parallel=2, max_model_len=512, kv_memory_bytes=64 << 20
    )
    engine = load_engine(options)
    try:
        assert_same(run(engine, every_kind()), expected)
    finally:
        engine.runner.step._group.close()
