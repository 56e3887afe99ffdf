"""The engine with a real tiny model: whatever is scheduled around a request, its tokens and its gate rows do not
change.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from service.contract.request import Request, SamplingParams
from tests.engine.test_sampler import chi_square
from tests.support.driver import Choice, Engines, Run, greedy, run, sampled, words

PROMPT = words(1, 21)
EOS = 1


def same(ours: Choice, theirs: Choice) -> None:
    """Equal tokens and end, and gate rows that differ by rounding at most."""
    assert ours.tokens == theirs.tokens
    assert ours.finish_reason == theirs.finish_reason
    assert ours.start == theirs.start
    if theirs.means:
        np.testing.assert_allclose(ours.mean, theirs.mean, atol=1e-5, rtol=0)
        np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-4, rtol=0)
    if theirs.fulls:
        np.testing.assert_allclose(ours.full, theirs.full, atol=1e-5, rtol=0)


def mixed_requests() -> list[Request]:
    """One of every kind: greedy, sampled, filtered, penalised, biased, several choices, stop ids, scalings or none."""
    everything: dict[str, Any] = {"return_scalings": "full", "scalings_start": 0}
    return [
        greedy("greedy", words(1, 21), 14, **everything),
        Request("sampled", words(2, 9), SamplingParams(max_tokens=12, seed=3, ignore_eos=True), **everything),
        Request(
            "filtered", words(3, 30),
            SamplingParams(max_tokens=10, temperature=0.8, top_p=0.9, top_k=40, seed=4), "mean",
        ),
        Request(
            "penalised", words(4, 5),
            SamplingParams(max_tokens=16, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.4, seed=5),
            **everything,
        ),
        Request(
            "biased", words(5, 13),
            SamplingParams(max_tokens=9, temperature=0.0, logit_bias={40: 3.0, 41: -5.0}, logprobs=2),
        ),
        Request("n", words(6, 19), SamplingParams(max_tokens=8, n=3, seed=6, ignore_eos=True), **everything),
        Request("stop", words(7, 6), SamplingParams(max_tokens=40, seed=7, stop_token_ids=tuple(range(20, 60)))),
        greedy("one", words(8, 17), 1, **everything),
        greedy("short", [9], 6, **everything),
        Request("look", words(10, 26), None, **everything),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(engines: Engines) -> Run:
    """Every mixed request run alone, without drafts and cache, its prompt in one piece: the reference for the rest."""
    result = Run()
    engine = engines.build(lookahead=False, speculative_tokens=0, prefix_cache=False)
    for request in mixed_requests():
        result.choices |= run(engine, [request]).choices
    return result


def test_the_reference_is_varied(alone: Run) -> None:
    """If every request generated the same few tokens, invariance would be no news."""
    assert len({tuple(alone[("n", i)].tokens) for i in range(3)}) == 3
    assert alone["stop"].finish_reason == "stop"
    assert all(len(set(alone[name].tokens)) > 3 for name in ("greedy", "sampled", "filtered", "penalised", "biased"))


# -- nothing around a request changes it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"max_num_batched_tokens": budget} for budget in (16, 7, 3)),
        {"block_size": 1},
        {"block_size": 64},
        {"max_num_seqs": 2},
        {"adaptive": False},
        {"speculative_tokens": 0},
        {"prefix_cache": False},
    ],
    ids=str,
)
def test_all_together_equals_alone(engines: Engines, alone: Run, lookahead: bool, options: dict[str, Any]) -> None:
    """Lookahead, chunked prefill, batching, block size, slots: none may change a token or a gate row, however
    sampled.
    """
    together = run(engines.build(lookahead=lookahead, **options), mixed_requests())
    assert together.choices.keys() == alone.choices.keys()
    for key, choice in alone.choices.items():
        same(together[key], choice)


@pytest.mark.parametrize("budget", [7, 16, 20])
@pytest.mark.parametrize("length", [1, 7, 8, 40, 61])
def test_chunked_prefill_equals_whole(engines: Engines, lookahead: bool, budget: int, length: int) -> None:
    """A chunk border inside a block, at its end, one short of the prompt; rows lost or computed twice at the seam."""
    request = greedy("a", words(length, length), 6, return_scalings="full", scalings_start=0)
    whole = run(engines.build(lookahead=lookahead), [request])["a"]
    chunked = run(engines.build(lookahead=lookahead, max_num_batched_tokens=budget), [request])["a"]
    same(chunked, whole)
    assert chunked.usage is not None
    assert whole.usage is not None
    assert chunked.usage.real_rows == whole.usage.real_rows == length + 5


@pytest.mark.parametrize("seed", range(3))
def test_amid_strangers_equals_alone(engines: Engines, alone: Run, lookahead: bool, seed: int) -> None:
    """Twelve strangers of random lengths join and leave, some by abort, while ours run."""
    chance = random.Random(seed)
    joins: dict[int, list[Request]] = {}
    aborts: dict[int, list[tuple[str, int | None]]] = {}
    for number in range(12):
        name, step = f"stranger {number}", chance.randrange(30)
        params = SamplingParams(
            max_tokens=chance.randint(1, 25), seed=number, temperature=chance.choice([0.0, 1.0]), n=chance.randint(1, 2)
        )
        joins.setdefault(step, []).append(Request(name, words(100 + number, chance.randint(1, 50)), params, "mean"))
        if chance.random() < 0.4:
            aborts.setdefault(step + chance.randint(1, 12), []).append((name, None))
    for request in mixed_requests():
        joins.setdefault(chance.randrange(15), []).append(request)
    engine = engines.build(lookahead=lookahead, max_num_batched_tokens=chance.choice([24, 64, 1024]))
    amid = run(engine, [], joins=joins, aborts=aborts)
    for key, choice in alone.choices.items():
        same(amid[key], choice)


def test_lookahead_saves_steps_and_changes_nothing(engines: Engines) -> None:
    """Greedy and sampled, one at a time: tokens, rows and logprobs equal; forwards = 2 per token less the hits."""
    for request in (
        greedy("a", PROMPT, 40, return_scalings="full"),
        Request(
            "a",
            PROMPT,
            SamplingParams(max_tokens=40, seed=9, ignore_eos=True, logprobs=3, frequency_penalty=0.3),
            "full",
        ),
    ):
        plain = run(engines.build(lookahead=False, speculative_tokens=0), [request])["a"]
        ahead = run(engines.build(draft_depth=1, speculative_tokens=0, adaptive=False), [request])["a"]
        same(ahead, plain)
        for ours, theirs in zip(ahead.token_outputs, plain.token_outputs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in ours.top_logprobs] == [token for token, _ in theirs.top_logprobs]
        assert plain.usage is not None
        assert ahead.usage is not None
        assert (plain.usage.forward_passes, plain.usage.drafts.hits, plain.usage.drafts.misses) == (80, 0, 0)
        usage = ahead.usage
        assert usage.drafts.hits > 4, "hardly a draft was right: the test shows little"
        assert usage.drafts.misses > 4, "hardly a draft was wrong: the test shows little"
        assert usage.drafts.hits + usage.drafts.misses == 39
        assert usage.forward_passes == 80 - usage.drafts.hits
        assert usage.real_rows == plain.usage.real_rows == plain.usage.scaling_rows == len(PROMPT) + 39
        assert usage.scaling_rows == len(PROMPT) + 39 + usage.drafts.misses


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_lookahead_leaves_the_sampled_distribution_alone(engines: Engines, temperature: float) -> None:
    """First tokens, and second tokens after each frequent first one, follow the softmax of the oracle's logits:
    no draft is favoured.
    """
    prompt, draws = words(31, 5), 1600
    requests = [sampled(str(i), prompt, 3, seed=i, temperature=temperature) for i in range(draws)]
    result = run(engines.build(max_num_seqs=400, max_model_len=16, blocks=1600, adaptive=False), requests)
    texts = [result[str(i)].tokens for i in range(draws)]
    hits = sum(choice.usage.drafts.hits for choice in result.choices.values() if choice.usage)
    assert 0.1 < hits / (2 * draws) < 0.9
    oracle = engines.tiny.as_stored().oracle()
    firsts = np.bincount([text[0] for text in texts], minlength=320)
    probabilities = (oracle.logits(prompt)[-1].double() / temperature).softmax(-1).numpy()
    statistic, limit = chi_square(firsts, probabilities)
    assert statistic < limit
    tested = 0
    for first in np.argsort(-firsts)[:6].tolist():
        seconds = np.bincount([text[1] for text in texts if text[0] == first], minlength=320)
        probabilities = (oracle.logits([*prompt, first])[-1].double() / temperature).softmax(-1).numpy()
        statistic, limit = chi_square(seconds, probabilities)
        if limit > 0:  # more than one bin
            tested += 1
            assert statistic < limit
    assert tested >= 2


# -- n choices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 4, 5, 21])
def test_choices_with_a_shared_prompt(engines: Engines, lookahead: bool, length: int) -> None:
    """Each of n = 4 gets what it gets when no block is shared; one choice may leave, or end early, without hurting
    the others.
    """
    params = SamplingParams(max_tokens=10, seed=8, n=4, ignore_eos=True)
    request = Request("n", words(40, length), params, "full", 0)
    shared = run(engines.build(lookahead=lookahead), [request])
    separate = run(engines.build(lookahead=lookahead, block_size=32), [request])
    for index in range(4):
        same(shared[("n", index)], separate[("n", index)])
        ours, theirs = shared[("n", index)].usage, separate[("n", index)].usage
        assert ours is not None
        assert theirs is not None
        assert ours.cached_tokens == (0 if index == 0 else (length - 1) // 4 * 4)
        assert theirs.cached_tokens == 0
    left = run(engines.build(lookahead=lookahead), [request], aborts={4: [("n", 0)], 7: [("n", 2)]})
    for index in (1, 3):
        same(left[("n", index)], separate[("n", index)])
    assert left[("n", 0)].finish_reason is None


def test_seeds_and_choices_differ(engines: Engines) -> None:
    """Choice 1 of a seed is neither choice 0 nor choice 0 of the next seed."""
    runs = run(engines.build(), [sampled(str(s), PROMPT, 8, seed=s, n=3) for s in range(3)])
    assert len({tuple(choice.tokens) for choice in runs.choices.values()}) == 9


# -- preemption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [32, 45])
def test_preemption(engines: Engines, lookahead: bool, blocks: int) -> None:
    """Eight requests that overflow a small pool all end with the tokens and rows they get alone."""
    requests = [
        Request(f"{i}", words(60 + i, 8 + i), params, "full", 0)
        for i, params in enumerate(
            SamplingParams(max_tokens=24 + i, seed=i, temperature=i % 2, ignore_eos=True) for i in range(8)
        )
    ]
    roomy = engines.build(lookahead=lookahead, max_model_len=64)
    expected = {request.id: run(roomy, [request])[request.id] for request in requests}
    small = engines.build(lookahead=lookahead, max_model_len=64, blocks=blocks)
    result = run(small, requests)
    assert result.preemptions > 0
    for name, choice in expected.items():
        same(result[name], choice)


def test_preempted_choices(engines: Engines, lookahead: bool) -> None:
    """Followers that lose their shared blocks and come back, with or without their leader."""
    requests = [
        Request(f"{i}", words(80 + i, 14), SamplingParams(max_tokens=18, seed=i, n=3, ignore_eos=True), "full", 0)
        for i in range(3)
    ]
    expected = run(engines.build(lookahead=lookahead, max_model_len=64), requests)
    result = run(engines.build(lookahead=lookahead, max_model_len=64, blocks=34), requests)
    assert result.preemptions > 0
    for key, choice in expected.choices.items():
        same(result[key], choice)


# -- abort -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [("victim", None), ("victim", 0), ("victim", 1)])
def test_abort_at_every_step(engines: Engines, lookahead: bool, target: tuple[str, int | None]) -> None:
    """Whatever a request is doing when its client goes away: its blocks come back and the others do not notice."""
    victim = Request("victim", words(50, 18), SamplingParams(max_tokens=5, n=2, seed=1, ignore_eos=True), "full", 0)
    others = [greedy("a", words(51, 10), 6, return_scalings="full"), sampled("b", words(52, 15), 6)]
    engine = engines.build(lookahead=lookahead, max_num_batched_tokens=12)
    undisturbed = run(engine, [others[0], victim, others[1]])
    for step in range(len(undisturbed.steps) + 1):
        result = run(engine, [others[0], victim, others[1]], aborts={step: [target, target]})
        for key, choice in undisturbed.choices.items():
            if key[0] != "victim" or (target[1] is not None and key[1] != target[1]):
                same(result[key], choice)
            elif key in result.choices:
                assert result[key].tokens == choice.tokens[: len(result[key].tokens)]


def test_an_aborted_request_stops_costing(engines: Engines) -> None:
    """No row is computed for it in the next step, and its last word is not reported."""
    engine = engines.build()
    engine.add(greedy("a", PROMPT, 20))
    engine.step()
    engine.abort("a")
    assert not engine.has_work()
    assert engine.blocks.used == 0
    engine.abort("a")
    engine.abort("never heard of")


# -- admission -------------------------------------------------------------------------------------------------------


def test_the_context_and_the_pool_to_the_last_token(engines: Engines) -> None:
    """What checked_request lets through at most is served."""
    engine = engines.build(max_model_len=32, blocks=16)
    assert len(run(engine, [greedy("fits", words(1, 20), 12)])["fits"].tokens) == 12
    engine = engines.build(max_model_len=32, blocks=16)
    object.__setattr__(engine.info, "max_model_len", 1000)  # the loader would not start with a pool below the context
    assert run(engine, [Request("look", words(1, 64), None, "mean", 0)])["look"].rows == 64


def test_everyone_fits_in_turn(engines: Engines) -> None:
    """Requests that each need the whole pool wait for one another."""
    engine = engines.build(max_model_len=32, blocks=16)
    result = run(engine, [greedy(str(i), words(i, 20), 12) for i in range(3)])
    assert all(choice.finish_reason == "length" for choice in result.choices.values())
    assert result.preemptions == 0 or len(result.choices) == 3


# -- the end of a choice ---------------------------------------------------------------------------------------------


def test_max_tokens_one(engines: Engines, lookahead: bool) -> None:
    """One token: two passes, no draft."""
    result = run(engines.build(lookahead=lookahead), [greedy("a", PROMPT, 1, return_scalings="full")])["a"]
    assert len(result.tokens) == 1
    assert result.finish_reason == "length"
    assert result.usage is not None
    assert (result.usage.forward_passes, result.usage.drafts.hits, result.usage.drafts.misses) == (2, 0, 0)
    assert (result.start, result.rows) == (len(PROMPT) - 1, 1)


def test_eos_ends_and_is_reported(engines: Engines, lookahead: bool) -> None:
    """The EOS token is part of the output; ignore_eos goes on to the length."""
    engine = engines.build(lookahead=lookahead)
    assert engine.info.eos_token_ids == [EOS]
    ends = run(engine, [Request("a", PROMPT, SamplingParams(max_tokens=9, temperature=0.0, logit_bias={EOS: 100.0}))])[
        "a"
    ]
    assert (ends.tokens, ends.finish_reason) == ([EOS], "stop")
    ignored = SamplingParams(max_tokens=9, temperature=0.0, logit_bias={EOS: 100.0}, ignore_eos=True)
    goes_on = run(engine, [Request("a", PROMPT, ignored)])["a"]
    assert (goes_on.tokens, goes_on.finish_reason) == ([EOS] * 9, "length")


def test_stop_token_ids(engines: Engines, lookahead: bool) -> None:
    """The first of them ends the choice and is reported; they work although EOS is ignored;
    each choice ends on its own.
    """
    engine = engines.build(lookahead=lookahead)
    free = run(engine, [sampled("a", PROMPT, 20, seed=5, n=2)])
    tokens = free["a"].tokens
    stop = tokens[8]
    first = tokens.index(stop)
    params = SamplingParams(max_tokens=20, seed=5, n=2, ignore_eos=True, stop_token_ids=(stop, 319))
    stopped = run(engine, [Request("a", PROMPT, params)])
    assert stopped["a"].tokens == tokens[: first + 1]
    assert stopped["a"].finish_reason == "stop"
    other = free[("a", 1)].tokens
    end = next((i + 1 for i, token in enumerate(other) if token in (stop, 319)), 20)
    assert stopped[("a", 1)].tokens == other[:end]


def test_logprobs_equal_the_oracle(engines: Engines, lookahead: bool) -> None:
    """Natural logarithms of the raw distribution at each token, under penalties and temperature too."""
    params = SamplingParams(
        max_tokens=12, temperature=0.6, top_k=20, repetition_penalty=1.2, logprobs=4, seed=2, ignore_eos=True
    )
    result = run(engines.build(lookahead=lookahead), [Request("a", PROMPT, params)])["a"]
    logits = engines.tiny.as_stored().oracle().logits(PROMPT + result.tokens[:-1])
    expected = logits[len(PROMPT) - 1 :].log_softmax(-1)
    for line, token in zip(expected, result.token_outputs, strict=True):
        assert token.logprob == pytest.approx(float(line[token.id]), abs=1e-4)
        best = line.topk(4)
        assert [value for _, value in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [value for value, _ in token.top_logprobs] == best.indices.tolist()


# -- bf16 ------------------------------------------------------------------------------------------------------------


def test_bf16(engines: Engines, record_property: Any) -> None:
    """It runs, mixed and preempted too, and most next tokens are fp32's (the share is reported, not promised)."""
    rounded = Engines(engines.tiny.as_stored(), torch.bfloat16)
    result = run(rounded.build(max_num_batched_tokens=16), mixed_requests())
    assert all(choice.finish_reason for choice in result.choices.values())
    requests = [greedy(str(i), words(200 + i, 12), 1, return_scalings="full", scalings_start=0) for i in range(60)]
    exact, ours = run(engines.build(), requests), run(rounded.build(), requests)
    share = float(np.mean([exact[str(i)].tokens == ours[str(i)].tokens for i in range(60)]))
    record_property("share_of_tokens_equal_to_fp32", share)
    assert share > 0.7
    error = np.mean([np.abs(exact[str(i)].full - ours[str(i)].full).mean() for i in range(60)])
    record_property("mean_scaling_error", float(error))
    assert error < 0.02
