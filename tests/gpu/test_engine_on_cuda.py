"""The whole engine on CUDA against the engine on the CPU, which is tested against PEFT."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.common import DEMO, prompt_tokens
from service.contract.request import Request
from service.model.attention import paged as attention
from service.model.steps.cuda_graph import CapturedSteps
from tests.gpu.conftest import Build
from tests.support.driver import Run, greedy, run, sampled

LENGTHS = (3, 40, 17, 64, 120)


def requests(tokens: int = 24) -> list[Request]:
    """Greedy and sampled, of mixed contexts, with their scalings."""
    return [
        replace((greedy if i % 2 else sampled)(f"r{i}", prompt_tokens(DEMO, length, i), tokens), return_scalings="full")
        for i, length in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def expected(build: Build) -> Run:
    return run(build("cpu"), requests())


def assert_same(ours: Run, theirs: Run, tolerance: float = 1e-3) -> None:
    for key, choice in theirs.choices.items():
        assert ours[key].tokens == choice.tokens
        np.testing.assert_allclose(ours[key].full, choice.full, atol=tolerance)


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
def test_fp32_equals_the_cpu(build: Build, cuda: torch.device, expected: Run, options: dict[str, int | bool]) -> None:
    """Tokens, greedy and sampled, and scalings; with and without graphs; varlen_attn's block size too."""
    engine = build(cuda, **options)
    assert_same(run(engine, requests()), expected)
    step = engine.runner.step
    assert isinstance(step, CapturedSteps) == (options.get("cuda_graphs") is not False)
    if isinstance(step, CapturedSteps):
        assert step.captured, "nothing was captured: the log says why"


def test_fp32_with_the_reference_attention(
    build: Build, cuda: torch.device, expected: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDPA over gathered blocks, captured in graphs as well."""
    monkeypatch.setattr(attention, "cuda_backend", lambda *_: attention.sdpa)
    assert_same(run(build(cuda), requests()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_stay_close_to_fp32(build: Build, cuda: torch.device, dtype: torch.dtype) -> None:
    """The next token of many prompts, and their scalings. Rounding flips near-ties, and nothing else."""
    prompts = [
        replace(greedy(f"p{i}", prompt_tokens(DEMO, 20 + 3 * i, i), 1), return_scalings="full", scalings_start=0)
        for i in range(32)
    ]
    theirs, ours = run(build("cpu"), prompts), run(build(cuda, dtype), prompts)
    assert sum(ours[key].tokens == choice.tokens for key, choice in theirs.choices.items()) >= 29
    difference = [np.abs(ours[key].full - choice.full).mean() for key, choice in theirs.choices.items()]
    assert max(difference) < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_graphs_change_little_in_16_bits(build: Build, cuda: torch.device, dtype: torch.dtype) -> None:
    """Other shapes may have other kernels: most requests get the same text, not by chance."""
    ours, theirs = (run(build(cuda, dtype, cuda_graphs=graphs), requests()) for graphs in (True, False))
    same = [a == b for key in theirs.choices for a, b in zip(ours[key].tokens[:8], theirs[key].tokens[:8], strict=True)]
    assert sum(same) >= 0.8 * len(same)


def test_decode_waits_for_the_device_once_a_step(build: Build, cuda: torch.device) -> None:
    """For the sampled ids. (Statistics of the gate are read every 64 positions.)"""
    engine = build(cuda, speculative_tokens=0)
    engine.add(greedy("r", prompt_tokens(DEMO, 20), 40))
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


def test_memory_is_returned(build: Build, cuda: torch.device) -> None:
    """Replays allocate nothing that stays."""
    engine = build(cuda)
    run(engine, requests())
    before = torch.cuda.memory_allocated()
    run(engine, requests())
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
