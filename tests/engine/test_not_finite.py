"""Numbers that are not finite stay with the request that brought them: it ends, nobody else notices.

One token of the vocabulary has NaN as its embedding, so that the defect is a real one of the model, in both passes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from service.contract.request import Request, SamplingParams
from service.contract.steering import GateWeight, Steering
from service.engine.engine import Engine
from service.engine.sequence import Sequence
from service.model.kv_cache import KVCache
from tests.support.driver import Engines, Run, greedy, run, words
from tests.support.tiny import Tiny

POISON = 319
WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "native": (torch.float32, {}),
    "float32": (torch.float32, {"native_kernels": False}),
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
}


class Ways:
    """Engines whose model has the poisonous token, one per way of computing."""

    def __init__(self, tiny: Tiny, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self._engines = Engines(tiny.as_stored(), dtype)
        [embedding] = [
            tensor for name, tensor in self._engines.model.causal_lm.named_parameters() if "embed_tokens" in name
        ]
        embedding[POISON] = torch.nan
        self._options = options
        self.exact = dtype == torch.float32

    def build(self, **options: Any) -> Engine:
        return self._engines.build(**self._options, **options)


@pytest.fixture(scope="module", params=WAYS)
def ways(request: pytest.FixtureRequest, tiny: Tiny) -> Ways:
    return Ways(tiny, *WAYS[request.param])


def honest() -> list[Request]:
    """Without the poisonous token, in their prompts and their answers; of one length, so that they share groups."""
    never = {POISON: -100.0}
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0, logit_bias=never)
    steering = Steering(weights=(GateWeight(0, 0.5),))
    return [
        Request("greedy", words(1, 21, POISON), params, "full"),
        Request("sampled", words(2, 9, POISON), replace(params, temperature=1.0, seed=3)),
        Request("n", words(6, 19, POISON), replace(params, temperature=0.9, n=3, seed=6)),
        Request("steered", words(7, 14, POISON), params, steering=steering),
    ]


def bad(name: str = "bad", at: int = 4, **request: Any) -> Request:
    prompt = words(9, 12, POISON)
    return greedy(name, [*prompt[:at], POISON, *prompt[at:]], 10, **request)


def assert_same(ours: Run, theirs: Run, ways: Ways) -> None:
    """In 16 bits what else is in a step changes the rounding: finite numbers are all that can be asked for."""
    for key, choice in theirs.choices.items():
        assert ours[key].error is None
        assert len(ours[key].tokens) == len(choice.tokens)
        logprobs = [token.logprob for token in ours[key].token_outputs]
        assert all(map(math.isfinite, logprobs))
        if ways.exact:
            assert ours[key].tokens == choice.tokens
            assert logprobs == pytest.approx([token.logprob for token in choice.token_outputs], abs=1e-4)


def assert_failed(result: Run, *names: str) -> None:
    for name in names:
        assert result[name].finish_reason == "error"
        assert "not finite" in str(result[name].error)
        assert not result[name].tokens


@pytest.fixture(scope="module")
def alone(ways: Ways) -> Run:
    result = Run()
    for made in honest():
        result.choices |= run(ways.build(prefix_cache=False, max_num_seqs=1), [made]).choices
    assert not any(POISON in choice.tokens for choice in result.choices.values())
    return result


@pytest.mark.parametrize(
    ("lookahead", "at", "rows"),
    [(True, 0, 1024), (True, 12, 5), (False, 0, 5), (False, 12, 1024)],
    ids=["ahead-first-whole", "ahead-last-chunked", "plain-first-chunked", "plain-last-whole"],
)
def test_it_ends_and_nobody_else_notices(ways: Ways, alone: Run, lookahead: bool, at: int, rows: int) -> None:
    """Beside the others, then before them: the blocks that it has left are theirs."""
    engine = ways.build(lookahead=lookahead, max_model_len=64, blocks=60, max_num_batched_tokens=rows)
    result = run(engine, [bad(at=at), *honest()])
    assert_failed(result, "bad")
    assert_same(result, alone, ways)
    for number in range(3):  # until there is no block of the pool that it has not had
        more = [bad(f"{number}-{one}", at, cache_salt=f"{number}-{one}") for one in range(4)]
        assert_failed(run(engine, more), *(request.id for request in more))
    assert_same(run(engine, honest()), alone, ways)


def test_every_kind_of_request_ends(ways: Ways) -> None:
    """Scaling pass alone, fixed gate, scores, frozen gate, several choices."""
    tokens = bad().prompt_token_ids
    scoring = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=1)
    engine = ways.build()
    requests = [
        Request("gate", tokens, None, "mean", 0),
        bad("fixed", steering=Steering(weights=(GateWeight(1, 1.0),))),
        bad("base", steering=Steering(only=())),
        bad("frozen", freeze_after=1),
        Request("scores", tokens, scoring, score_from=6),
        Request("choices", tokens, SamplingParams(max_tokens=5, n=2)),
    ]
    result = run(engine, [*requests, *honest()])
    assert_failed(result, "gate", "fixed", "base", "frozen", "scores", "choices")
    assert result[("choices", 1)].finish_reason == "error"


def test_in_the_middle_of_an_answer(ways: Ways) -> None:
    """The tokens before it are said; the poisonous one is the last that is."""
    engine = ways.build()
    forced = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, logit_bias={POISON: 100.0})
    result = run(engine, [Request("bad", words(1, 9, POISON), forced), *honest()])
    assert result["bad"].tokens == [POISON]
    assert result["bad"].finish_reason == "error"


@pytest.mark.parametrize("speculative", [0, 4])
def test_a_draft_that_is_dropped_may_be_anything(
    ways: Ways, alone: Run, speculative: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every draft is the poisonous token: never said, never an error, and what it has left behind harms nobody."""
    draft, retry, retried = Sequence.draft, Sequence.retry_without_drafts, []
    monkeypatch.setattr(Sequence, "draft", lambda self, tokens, drafter: draft(self, [POISON] * len(tokens), drafter))
    monkeypatch.setattr(
        Sequence, "retry_without_drafts", lambda self, *ends: retried.append(self) or retry(self, *ends)
    )
    result = run(ways.build(adaptive=False, speculative_tokens=speculative), honest())
    assert_same(result, alone, ways)
    assert retried


def test_nothing_of_it_is_counted_or_found_again(ways: Ways) -> None:
    """Statistics of the gate stay finite, and the next request of this prompt finds no block of it."""
    engine = ways.build(max_num_batched_tokens=32)
    long = [*words(1, 40, POISON), POISON, *words(2, 40, POISON)]
    for number in range(2):
        result = run(engine, [greedy(str(number), long, 4)])
        assert_failed(result, str(number))
        assert result[str(number)].usage.cached_tokens == 0
        for step in result.steps:
            assert all(map(math.isfinite, step.stats.gate.weight))


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pool begins with NaN in all slots."""
    allocate = KVCache.allocate

    def with_nan(*arguments: Any, **options: Any) -> KVCache:
        cache = allocate(*arguments, **options)
        for tensor in (*cache.keys, *cache.values, cache.gate_rows[:-1]):
            tensor.fill_(torch.nan)
        return cache

    monkeypatch.setattr(KVCache, "allocate", with_nan)
