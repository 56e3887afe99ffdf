"""benchmarks/gpu.py in small on the CPU: every section runs, and what it forces really happens."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import gpu
from benchmarks.common import run_engine
from benchmarks.forced import PlainBase
from benchmarks.synthetic import TINY, RealRowsOnly, build, weight_bytes
from service.contract.options import EngineOptions
from service.contract.request import Request, SamplingParams
from service.engine.loader import build_engine
from tests.support.torch_fixtures import one_thread  # noqa: F401

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--dtype", "float32", "--tiny"])
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
        gpu.main()
    return dict(json.loads(lines[-1]))


def test_every_section_has_a_result(result: dict[str, Any]) -> None:
    assert result["errors"] == {}
    assert set(result) >= {"copy", "warm_up", "parity", "step", "decode", "prefill", "attention", "graphs", "memory"}
    assert result["parity"]["difference"] < 1e-5


def test_drafts_agree_as_often_as_asked(result: dict[str, Any]) -> None:
    """And a step per token is what is left of two, where they always do."""
    rows = {(row["requests"], row.get("agreement")): row for row in result["decode"]}
    for requests in (1, 2):
        assert rows[requests, None]["forwards_per_token"] == 1
        assert (rows[requests, 1]["drafts_agreed"], rows[requests, 1]["forwards_per_token"]) == (1, 1)
        assert rows[requests, 0]["drafts_agreed"] in (0, None)
        assert rows[requests, 0]["forwards_per_token"] == 2
        assert 1 < rows[requests, 0.7]["forwards_per_token"] < 2


def test_weight_bytes() -> None:
    """By hand: every linear and norm and the head, not the embedding; then stacks and classifier."""
    model, _ = build(TINY, CPU, torch.float32)
    attention = 32 * 32 * 2 + 32 * 16 * 2
    base = 2 * (attention + 3 * 32 * 64 + 2 * 32) + 32 + 320 * 32
    assert weight_bytes(model, with_experts=False) == 4 * base
    widths = (32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3
    experts = 2 * 6 * widths + 14 * 3 * (32 + 1)
    assert weight_bytes(model, with_experts=True) == 4 * (base + experts)


def test_the_base_side_is_the_base() -> None:
    """Greedy tokens of the engine without gate and experts are those of the same weights through transformers."""
    model, checkpoint = build(TINY, CPU, torch.float32)
    config = copy.deepcopy(model.config)  # making a model of it changes its attention
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    options = EngineOptions("synthetic", max_model_len=128, speculative_tokens=0, lookahead=False, prefix_cache=False)
    engine = build_engine(model, checkpoint, options)
    prompts = [[20 + i * j for j in range(1, length)] for i, length in enumerate((5, 19, 40), start=1)]
    different = run_engine(engine, prompts, 12).tokens
    engine.runner.step = RealRowsOnly(PlainBase(model), TINY.vocabulary)  # type: ignore[assignment]
    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        engine.add(Request(str(number), prompt, params, freeze_after=1))
    tokens: dict[str, list[int]] = {str(number): [] for number in range(3)}
    while engine.has_work():
        for output in engine.step().outputs:
            tokens[output.request_id] += [token.id for token in output.tokens]
    for number, prompt in enumerate(prompts):
        text = list(prompt)
        for _ in range(12):
            with torch.inference_mode():
                text.append(int(plain(torch.tensor([text])).logits[0, -1].argmax()))
        assert tokens[str(number)] == text[len(prompt) :]
    assert tokens != different, "the experts change nothing"
