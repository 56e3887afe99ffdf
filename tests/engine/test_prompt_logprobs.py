"""Logprobs of the prompt's own tokens (OpenAI's echo): PEFT's, complete, each once, whatever the scheduling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from service.contract.output import StepOutput
from service.contract.request import Request, SamplingParams
from service.contract.steering import Steering
from service.engine.engine import Engine
from tests.engine.test_engine import same
from tests.support.driver import Choice, Engines, greedy, run, words

PROMPT = words(1, 45)


def scored(name: str, prompt: list[int], alternatives: int = 2, max_tokens: int = 6, **sampling: Any) -> Request:
    return Request(
        name,
        prompt,
        SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            logprobs=alternatives,
            prompt_logprobs=alternatives,
            **sampling,
        ),
    )


def assert_equals_peft(engines: Engines, ours: Choice, prompt: list[int], alternatives: int = 2) -> None:
    """Token, logprob and best alternatives at every position from 1 on."""
    logits, _ = engines.tiny.as_stored().oracle().forward(prompt)
    logprobs = logits.log_softmax(-1)
    assert [token.id for token in ours.prompt_logprobs] == prompt[1:]
    if len(prompt) == 1:
        return
    found = torch.tensor([token.logprob for token in ours.prompt_logprobs])
    torch.testing.assert_close(found, logprobs[range(len(prompt) - 1), prompt[1:]], atol=1e-3, rtol=0)
    best = logprobs[:-1].topk(alternatives).values
    tops = torch.tensor([[value for _, value in token.top_logprobs] for token in ours.prompt_logprobs])
    torch.testing.assert_close(tops.reshape(best.shape), best, atol=1e-3, rtol=0)
    for line, token in zip(logprobs, ours.prompt_logprobs, strict=False):
        for id, value in token.top_logprobs:
            assert value == pytest.approx(float(line[id]), abs=1e-3)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 45])
@pytest.mark.parametrize("alternatives", [0, 2])
def test_equals_peft(engines: Engines, lookahead: bool, length: int, alternatives: int) -> None:
    """Off by one at either end: the first token has none, the last prompt position's is the generated token's own."""
    ours = run(engines.build(lookahead=lookahead), [scored("a", PROMPT[:length], alternatives)])["a"]
    assert_equals_peft(engines, ours, PROMPT[:length], alternatives)
    same(ours, run(engines.build(), [greedy("a", PROMPT[:length], 6)])["a"])


@pytest.mark.parametrize("rows", [1, 3, 7, 1024])
@pytest.mark.parametrize("budget", [9, 1024])
def test_memory_is_bounded(engines: Engines, rows: int, budget: int) -> None:
    """No step keeps the logits of more prompt positions than allowed, and all are complete with the first token."""
    engine = engines.build(max_num_batched_tokens=budget, prefix_cache=False)
    engine._scheduler.max_scored_rows = rows
    requests = [scored("a", PROMPT), scored("b", PROMPT[:30]), greedy("c", PROMPT, 6)]
    counts, complete = [], []

    def look(_: Engine, step: StepOutput) -> None:
        counts.append(sum(len(output.prompt_logprobs) for output in step.outputs))
        complete.extend(output.request_id for output in step.outputs if output.tokens)

    result = run(engine, requests, each_step=look)
    assert max(counts) == min(rows, max(counts))
    assert sum(counts) == 44 + 29
    assert_equals_peft(engines, result["a"], PROMPT)
    assert_equals_peft(engines, result["b"], PROMPT[:30])
    assert result["c"].prompt_logprobs == []


def test_the_loader_bounds_it(engines: Engines) -> None:
    """64 MiB of logits: 16 Mi of them."""
    assert engines.build()._scheduler.max_scored_rows == (16 << 20) // 320


def test_the_prefix_cache_is_not_used_for_them(engines: Engines) -> None:
    """Cached positions have no logits; what is computed again is found by others as before."""
    engine = engines.build()
    run(engine, [greedy("first", PROMPT, 4)])
    ours = run(engine, [scored("a", PROMPT)])["a"]
    assert_equals_peft(engines, ours, PROMPT)
    assert ours.usage is not None
    assert ours.usage.cached_tokens == 0
    after = run(engine, [greedy("last", PROMPT, 4)])["last"]
    assert after.usage is not None
    assert after.usage.cached_tokens == 44


def test_they_come_once_with_choice_0(engines: Engines) -> None:
    """Three choices share the prompt: it is scored once, and the others find its blocks."""
    made = scored("n", PROMPT, n=3)
    result = run(engines.build(), [made])
    assert_equals_peft(engines, result[("n", 0)], PROMPT)
    for index in (1, 2):
        assert result[("n", index)].prompt_logprobs == []
        usage = result[("n", index)].usage
        assert usage is not None
        assert usage.cached_tokens == 44


def test_preempted(engines: Engines) -> None:
    """Computed again, nothing is sent twice."""
    requests = [scored(f"{i}", words(60 + i, 18 + i), max_tokens=16) for i in range(5)]
    for prefix_cache in (True, False):
        engine = engines.build(max_model_len=64, blocks=36, prefix_cache=prefix_cache, max_num_batched_tokens=20)
        engine._scheduler.max_scored_rows = 4
        result = run(engine, requests)
        assert result.preemptions > 0
        for made in requests:
            assert_equals_peft(engines, result[made.id], made.prompt_token_ids)


def test_of_a_steered_gate(engines: Engines) -> None:
    """The real pass's logits are those of the request's own gate."""
    base = replace(scored("a", PROMPT), steering=Steering(only=()))
    result = run(engines.build(), [base, scored("b", PROMPT)])
    assert_equals_peft(engines, result["b"], PROMPT)
    gap = max(
        abs((ours.logprob or 0) - (theirs.logprob or 0))
        for ours, theirs in zip(result["a"].prompt_logprobs, result["b"].prompt_logprobs, strict=True)
    )
    assert gap > 0.1
