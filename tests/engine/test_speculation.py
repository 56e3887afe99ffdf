"""Drafts of several tokens, from the scaling pass and from earlier text: they save forwards and change nothing.

A tiny random model does not repeat itself, so most requests here may say only a few different tokens: what follows two
of them has often followed them before, and is right about as often as it is wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from service.contract.request import Request, SamplingParams
from tests.engine.gate.test_gate_rows import assert_observed_once
from tests.engine.test_engine import same
from tests.engine.test_greedy_parity import DEMO
from tests.engine.test_sampler import chi_square
from tests.support.driver import Choice, Engines, greedy, run, words
from tests.support.tiny import Tiny

ALL: dict[str, Any] = {"return_scalings": "full", "scalings_start": 0}
FEW = words(7, 4)
ONLY_FEW = dict.fromkeys(FEW, 50.0)
PLAIN: dict[str, Any] = {"lookahead": False, "speculative_tokens": 0, "prefix_cache": False}


def of_few_tokens(name: str, prompt: int = 20, max_tokens: int = 40, **sampling: Any) -> Request:
    """A request of few different tokens, in its prompt and its output."""
    chance = torch.Generator().manual_seed(len(name))
    tokens = [FEW[i] for i in torch.randint(0, len(FEW), (prompt,), generator=chance).tolist()]
    params = {"max_tokens": max_tokens, "logit_bias": ONLY_FEW, "ignore_eos": True, **sampling}
    return Request(name, tokens, SamplingParams(**params), **ALL)


def requests_of_few_tokens() -> list[Request]:
    return [
        of_few_tokens("greedy", temperature=0.0, logprobs=3),
        of_few_tokens("sampled", seed=3, logprobs=2),
        of_few_tokens("penalised", seed=4, frequency_penalty=0.3, presence_penalty=0.5, repetition_penalty=1.2),
        of_few_tokens("cold", temperature=0.5, top_k=3, seed=5),
        of_few_tokens("choices", max_tokens=20, n=3, seed=6),
        of_few_tokens("stop", seed=8, stop_token_ids=(FEW[0],)),
        of_few_tokens("held", seed=8, stop_token_ids=(FEW[0],), min_tokens=15),
        of_few_tokens("held greedy", temperature=0.0, stop_token_ids=tuple(FEW[1:]), min_tokens=9),
        of_few_tokens("one", max_tokens=1),
        of_few_tokens("two", max_tokens=2, prompt=3),
        replace(of_few_tokens("frozen", seed=9), freeze_after=5),
    ]


def accepted(choice: Choice) -> tuple[int, int]:
    """Copied drafts that were kept, and those that were dropped."""
    assert choice.usage is not None
    return choice.usage.drafts.accepted, choice.usage.drafts.speculated - choice.usage.drafts.accepted


@pytest.fixture(scope="module")
def plain(engines: Engines) -> dict[tuple[str, int], Choice]:
    """Every request alone and without any optimisation."""
    choices: dict[tuple[str, int], Choice] = {}
    for made in requests_of_few_tokens():
        choices |= run(engines.build(**PLAIN), [made]).choices
    return choices


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaptive": False},
        {"adaptive": False, "speculative_tokens": 1},
        {"adaptive": False, "speculative_tokens": 30},
        {"adaptive": False, "lookahead": False},
        {"adaptive": False, "lookahead": False, "prefix_cache": False},
        {"adaptive": False, "max_num_batched_tokens": 24},
        {"adaptive": False, "max_num_batched_tokens": 5},
        {"adaptive": False, "block_size": 1},
        {"adaptive": False, "block_size": 16},
        {"adaptive": False, "blocks": 64, "max_model_len": 64},
    ],
    ids=str,
)
def test_together_equals_plain(engines: Engines, plain: dict[tuple[str, int], Choice], options: dict[str, Any]) -> None:
    """Tokens, scalings and logprobs, with drafts right and wrong in either stream, cut by budgets, blocks and ends."""
    requests = requests_of_few_tokens()
    result = run(engines.build(**options), requests)
    for key, choice in plain.items():
        same(result[key], choice)
        for ours, theirs in zip(result[key].token_outputs, choice.token_outputs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in ours.top_logprobs] == [token for token, _ in theirs.top_logprobs]
    assert_observed_once(result, requests, 3)
    outcomes = [accepted(choice) for choice in result.choices.values()]
    assert min(map(sum, zip(*outcomes, strict=True))) > 10, "hardly a copied draft was right, or wrong"
    if "blocks" in options:
        assert result.preemptions > 0


def test_min_tokens_come_before_what_ends_a_text(engines: Engines, plain: dict[tuple[str, int], Choice]) -> None:
    """As if the ends were forbidden so long, by a bias that nothing overcomes, and as ever afterwards."""
    for name, least in (("held", 15), ("held greedy", 9)):
        [request] = [one for one in requests_of_few_tokens() if one.id == name]
        assert request.sampling is not None
        stops = request.sampling.stop_token_ids
        biased = replace(
            request.sampling,
            logit_bias={**ONLY_FEW, **dict.fromkeys(stops, -1000.0)},
            max_tokens=least,
            min_tokens=0,
            stop_token_ids=(),
        )
        found = plain[(name, 0)].tokens
        assert found[:least] == run(engines.build(**PLAIN), [replace(request, sampling=biased)])[name].tokens
        assert not set(found[:-1]) & set(stops)
        assert plain[(name, 0)].finish_reason == "stop"
    assert plain[("stop", 0)].tokens.index(FEW[0]) < 15, "nothing was held back"


def test_several_tokens_in_one_step(engines: Engines) -> None:
    """They arrive together, with as many gate rows; nothing follows a stop in the middle of a run of right drafts."""
    engine = engines.build(adaptive=False)
    made = of_few_tokens("sampled", temperature=0.1, seed=1, max_tokens=60)
    result = run(engine, [replace(made, scalings_start=None)])
    pieces = [piece for step in result.steps for piece in step.outputs]
    assert max(len(piece.tokens) for piece in pieces) > 2
    assert all(piece.gate is not None and piece.gate.count == len(piece.tokens) for piece in pieces)
    several = next(piece for piece in pieces if len(piece.tokens) > 2)
    tokens = result["sampled"].tokens
    for stop in {token.id for token in several.tokens}:
        assert made.sampling is not None
        ended = run(engine, [replace(made, sampling=replace(made.sampling, stop_token_ids=(stop,)))])["sampled"]
        assert ended.tokens == tokens[: tokens.index(stop) + 1]
        assert ended.finish_reason == "stop"
        assert ended.rows == len(made.prompt_token_ids) + len(ended.tokens) - 1


def test_aborted_at_every_step(engines: Engines, plain: dict[tuple[str, int], Choice]) -> None:
    """Whatever is drafted for a request when it goes: its blocks come back, and the others do not notice."""
    requests = requests_of_few_tokens()[:2]
    victim = of_few_tokens("victim", seed=2, n=2, max_tokens=12)
    engine = engines.build(adaptive=False)
    for step in range(0, 24, 3):
        result = run(
            engine, [requests[0], victim, requests[1]], aborts={step: [("victim", step % 2), ("victim", None)]}
        )
        for made in requests:
            same(result[made.id], plain[made.id, 0])


@pytest.mark.parametrize("lookahead", [True, False])
def test_the_sampled_distribution_is_left_alone(engines: Engines, lookahead: bool) -> None:
    """Every token given the ones before it follows the softmax of the oracle's logits: no draft is favoured.

    The prompt has said everything before, so that the first, second and third tokens are drafted by copying.
    """
    a, b, c, d = FEW
    prompt, draws = [a, b, c, d, b, a, c, a, b], 1600
    params = SamplingParams(max_tokens=4, logit_bias=dict.fromkeys(FEW, 30.0), temperature=3.0, ignore_eos=True)
    requests = [Request(str(seed), prompt, replace(params, seed=seed)) for seed in range(draws)]
    engine = engines.build(max_num_seqs=400, max_model_len=16, blocks=3200, lookahead=lookahead, adaptive=False)
    result = run(engine, requests)
    texts = [tuple(result[str(i)].tokens) for i in range(draws)]
    kept, dropped = map(sum, zip(*(accepted(choice) for choice in result.choices.values()), strict=True))
    assert kept > draws / 10, "hardly a copied draft was right: the test shows little"
    assert dropped > draws / 10, "hardly a copied draft was wrong: the test shows little"
    oracle = engines.tiny.as_stored().oracle()
    tested = 0
    for length in range(4):
        for said, times in Counter(text[:length] for text in texts).items():
            if times < 60:
                continue
            counts = np.bincount([text[length] for text in texts if text[:length] == said], minlength=320)
            logits = oracle.logits([*prompt, *said])[-1].double()
            logits[FEW] += 30.0
            statistic, limit = chi_square(counts, (logits / 3.0).softmax(-1).numpy())
            if limit > 0:  # more than one bin
                tested += 1
                assert statistic < limit, (said, counts[FEW])
    assert tested >= 8


# -- what it saves ---------------------------------------------------------------------------------------------------


def test_fewer_forwards_than_tokens_on_text_that_repeats_itself(record_property: Any) -> None:
    """The demo bundle, asked a question it has just answered: clearly below one forward per token, with the tokens
    of one draft at a time.
    """
    engines = Engines(Tiny(DEMO).as_stored())
    tokenizer = Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json"))
    examples = [one for one in json.loads((DEMO / "examples.json").read_text()) if one["domain"] == "code"][:3]
    text = "".join(one["prompt"] + one["answer"] + "\n" for one in examples) + examples[0]["prompt"]
    made = greedy("a", tokenizer.encode(text).ids, 40, return_scalings="mean")
    one_ahead = run(engines.build(block_size=16, speculative_tokens=0, draft_depth=1), [made])["a"]
    ours = run(engines.build(block_size=16, draft_depth=1), [made])["a"]
    all_ahead = run(engines.build(block_size=16), [made])["a"]
    same(ours, one_ahead)
    same(all_ahead, one_ahead)
    assert ours.usage is not None
    assert one_ahead.usage is not None
    assert all_ahead.usage is not None
    assert all_ahead.usage.forward_passes <= 0.65 * 40
    record_property("forwards_per_token", ours.usage.forward_passes / 40)
    assert ours.usage.forward_passes <= 0.75 * 40
    assert one_ahead.usage.forward_passes >= 1.05 * 40


@pytest.mark.parametrize(("depth", "most"), [(1, 50), (None, 70)], ids=["one token ahead", "the draft layer's depth"])
def test_drafting_stops_where_it_does_not_pay(tiny: Tiny, depth: int | None, most: int) -> None:
    """Experts so strong that the scaling pass predicts next to nothing: hardly more rows than without drafts, and the
    same number of forwards.
    """
    variant = tiny.variant(global_scaling_weight=6.0)
    engines = Engines(variant)
    made = Request("a", words(3, 12), SamplingParams(max_tokens=200, temperature=1.0, seed=1, ignore_eos=True))
    usages = [
        run(engines.build(draft_depth=depth, **options), [made])["a"].usage
        for options in ({}, {"adaptive": False, "speculative_tokens": 0}, PLAIN)
    ]
    adaptive, always, never = usages
    assert adaptive is not None
    assert always is not None
    assert never is not None
    assert always.drafts.hits < 0.1 * always.drafts.misses, "the drafts are too good for this test"
    assert always.drafts.misses > 150
    wasted = adaptive.drafts.misses + adaptive.drafts.speculated - adaptive.drafts.accepted
    assert wasted < most
    assert adaptive.forward_passes <= never.forward_passes


def test_drafts_are_the_same_every_time(engines: Engines) -> None:
    """The decision to draft knows no clock: rows and outcomes repeat exactly."""
    usages = []
    for _ in range(2):
        result = run(engines.build(), requests_of_few_tokens())
        usages.append([replace(choice.usage, queue_seconds=0.0) for choice in result.choices.values() if choice.usage])
    assert usages[0] == usages[1]
