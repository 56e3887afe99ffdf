"""Drafts of several tokens ahead in a real engine: right and wrong at every depth, they change nothing.

A random draft layer is hardly ever right, so most tests here write over what the scaling pass and the layer have
drafted: right or wrong as a test has it. What the layer itself drafts is compared with a recomputation of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from service.contract.request import Request, SamplingParams
from service.contract.steering import Steering
from service.engine import step_cost
from service.engine.engine import Engine
from service.engine.launched_step import LaunchedStep, SequenceResult
from service.engine.noise import gumbel_noise
from service.engine.sampler import SampleRow, noise_keys
from service.engine.sequence import Sequence
from service.engine.speculation.drafters import ANY_TOKEN
from service.model.batch import AttentionGroup, DraftStart
from tests.engine.test_captured_steps import CallAgain, with_captured_steps
from tests.engine.test_engine import mixed_requests, same
from tests.engine.test_grammar import formed_requests
from tests.engine.test_sampler import chi_square
from tests.engine.test_speculation import PLAIN
from tests.engine.test_step_cost import build as build_measured
from tests.support.driver import Choice, Engines, greedy, run, words
from tests.support.tiny import OneRequest

Key = tuple[str, int]
Right = Callable[[int], bool]  # whether the draft of a position of the output is right
ALL: dict[str, Any] = {"return_scalings": "full", "scalings_start": 0}
DEPTH = 4


def workload() -> list[Request]:
    """One of every kind that drafts."""
    return [
        *mixed_requests(),
        *(replace(made, id=f"form {made.id}") for made in formed_requests()[::2]),
        replace(greedy("steered", words(30, 12), 19, **ALL), steering=Steering(only=(0, 2), temperature=0.5)),
        replace(greedy("fixed", words(31, 12), 9, **ALL), steering=Steering(weights=())),
        greedy("frozen", words(32, 12), 19, freeze_after=7, **ALL),
        Request("prompt", words(33, 40), SamplingParams(max_tokens=6, logprobs=2, prompt_logprobs=2, seed=1)),
    ]


@pytest.fixture(scope="module")
def plain(engines: Engines) -> dict[Key, Choice]:
    """Every request alone and without drafts."""
    choices: dict[Key, Choice] = {}
    for made in workload():
        choices |= run(engines.build(**PLAIN), [made]).choices
    return choices


def force(engine: Engine, truth: dict[Key, Choice], right: Right) -> None:
    """Writes over the drafts that each step brings: as the text goes on, or another token."""
    collect, vocabulary = engine.runner.collect, engine.info.vocab_size

    def drafted(sequence: Sequence, position: int) -> int:
        text = truth[sequence.request.id, sequence.index].tokens
        place = position - sequence.prompt_len
        token = text[place] if place < len(text) else 5
        return token if right(place) else (token + 1) % vocabulary

    def collected(launched: LaunchedStep) -> list[SequenceResult]:
        results = collect(launched)
        for result in results:
            one = result.scheduled
            result.predictions = [
                drafted(one.sequence, one.predict_start + number) for number in range(len(result.predictions))
            ]
            differing = [
                position
                for position, (token, other) in enumerate(
                    zip(result.predictions, one.expected, strict=True), one.predict_start
                )
                if other not in (token, ANY_TOKEN)
            ]
            if differing:
                after = range(differing[0] + 1, differing[0] + 1 + len(result.deeper))
                result.deeper = [drafted(one.sequence, position) for position in after]
        return results

    engine.runner.collect = collected  # type: ignore[method-assign]


def equal(result: Any, plain: dict[Key, Choice]) -> None:
    """The same tokens, ends, scalings and logprobs."""
    assert result.choices.keys() == plain.keys()
    for key, theirs in plain.items():
        same(result[key], theirs)
        for which in ("token_outputs", "prompt_logprobs"):
            for token, expected in zip(getattr(result[key], which), getattr(theirs, which), strict=True):
                assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
                assert [id for id, _ in token.top_logprobs] == [id for id, _ in expected.top_logprobs]


PATTERNS: dict[str, Right] = {
    "all right": lambda place: True,
    "all wrong": lambda place: False,
    **{f"every {n}th wrong": lambda place, n=n: place % n != n - 1 for n in (2, 3, 5, 7)},  # type: ignore[misc]
    "every other pair wrong": lambda place: place % 4 < 2,
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlaps": True, "native_kernels": False},
        {"max_num_batched_tokens": 9},
        {"blocks": 80, "max_model_len": 96, "overlaps": True},
        {"block_size": 1, "prefix_cache": False, "speculative_tokens": 0},
    ],
    ids=str,
)
def test_equals_plain(engines: Engines, plain: dict[Key, Choice], options: dict[str, Any], pattern: str) -> None:
    """Greedy and seeded, steered, penalised, formed, frozen, several choices, stops, with budgets, want of blocks, and
    steps launched ahead.
    """
    engine = engines.build(adaptive=False, **options)
    force(engine, plain, PATTERNS[pattern])
    result = run(engine, workload())
    equal(result, plain)
    counts = [choice.usage.drafts for choice in result.choices.values() if choice.usage]
    kept = [sum(one.lookahead_kept[depth : depth + 1] != [] for one in counts) for depth in range(DEPTH)]
    if pattern == "all right":
        assert all(kept), "no draft was kept at some depth"
    if pattern == "all wrong":
        assert not any(one.hits for one in counts)
    if "blocks" in options:
        assert result.preemptions


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_forwards_per_token(engines: Engines, plain: dict[Key, Choice], depth: int) -> None:
    """With right drafts only, a step brings as many tokens as the scaling pass is ahead."""
    made = greedy("greedy", words(1, 21), 14, **ALL)
    engine = engines.build(adaptive=False, draft_depth=depth, speculative_tokens=0)
    force(engine, plain, PATTERNS["all right"])
    choice = run(engine, [made])["greedy"]
    same(choice, plain["greedy", 0])
    assert choice.usage is not None
    assert choice.usage.forward_passes == 1 + -(-13 // depth) + 1
    assert choice.usage.drafts.lookahead_kept == [len(range(first, 13, depth)) for first in range(depth)]


def test_captured_steps(engines: Engines, plain: dict[Key, Choice]) -> None:
    """Several rows of each stream in a bucket of single rows, and the draft layer behind static outputs."""
    engine = engines.build(adaptive=False, overlaps=True, native_kernels=False)
    capture = CallAgain()
    with_captured_steps(engine, capture, max_rows=96)
    force(engine, plain, PATTERNS["every 5th wrong"])
    equal(run(engine, workload()), plain)
    assert capture.draft_replays > 10


@pytest.mark.parametrize(
    ("options", "is_timed"), [({}, True), ({"draft_depth": 1}, False), ({"lookahead": False}, False)]
)
def test_the_layer_is_timed_where_it_is_used(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], is_timed: bool
) -> None:
    timed: list[int] = []
    monkeypatch.setattr(step_cost, "draft_idly", lambda *_: timed.append(1))
    engine = build_measured(engines, **options)
    assert bool(timed) == is_timed
    assert (len(engine._scheduler.drafts.rates) > 1) == is_timed


class OnePool:
    """Stands for CUDA graphs of one memory pool: a replay overwrites what all the others have returned."""

    def __init__(self) -> None:
        self._returned: list[list[torch.Tensor]] = []

    def __call__(self, work: Callable[[], Any], /) -> Callable[[], Any]:
        output = work()
        own = tensors_of(output)
        self._returned.append(own)

        def replay() -> Any:
            for tensor in (tensor for tensors in self._returned if tensors is not own for tensor in tensors):
                tensor.fill_(7)
            new = tensors_of(work())  # graphs of steps share the tensor of their logits
            for tensor, computed in zip(own, new, strict=True):
                tensor.copy_(computed)
            return output

        return replay


def tensors_of(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [getattr(output, field.name) for field in fields(output)]


@pytest.mark.parametrize("overlaps", [False, True])
def test_scalings_beside_captured_drafts(engines: Engines, overlaps: bool) -> None:
    """The rows of a scaling pass are read once the draft layer has been launched for others of the same step."""
    decoding = [greedy(f"{i}", words(i, 9), 24) for i in range(2)]
    looking = [Request(f"look {i}", words(40 + i, 12 + i), None, **ALL) for i in range(2)]
    expected = run(engines.build(**PLAIN), [*decoding, *looking])
    engine = engines.build(
        adaptive=False, overlaps=overlaps, native_kernels=False, max_num_batched_tokens=24, speculative_tokens=0
    )
    with_captured_steps(engine, OnePool(), max_rows=32)
    result = run(engine, decoding, joins={6: looking})
    for made in decoding:
        assert result[made.id].tokens == expected[made.id].tokens
    for made in looking:
        np.testing.assert_allclose(result[made.id].full, expected[made.id].full, atol=1e-5)


def test_aborted_at_every_step(engines: Engines, plain: dict[Key, Choice]) -> None:
    """Whatever is drafted for a request when it goes: its blocks come back, and the others do not notice."""
    stays = [made for made in workload() if made.id in ("greedy", "penalised")]
    goes = [made for made in workload() if made.id in ("n", "steered")]
    for overlaps in (False, True):
        engine = engines.build(adaptive=False, overlaps=overlaps)
        force(engine, plain, PATTERNS["every 7th wrong"])
        for step in range(1, 12, 2):
            result = run(engine, [stays[0], *goes, stays[1]], aborts={step: [("n", step % 3), ("steered", None)]})
            for made in stays:
                same(result[made.id], plain[made.id, 0])


def test_a_draft_layer_that_fails_costs_drafts_only(
    engines: Engines, plain: dict[Key, Choice], caplog: pytest.LogCaptureFixture
) -> None:
    engine = engines.build(adaptive=False)
    step = engine.runner.step

    def draft(*_: Any) -> torch.Tensor:
        raise RuntimeError("no memory for a tensor")

    engine.runner.step = SimpleNamespace(forward=step.forward, draft=draft)  # type: ignore[assignment]
    result = run(engine, workload())
    equal(result, plain)
    assert "the draft layer failed" in caplog.text
    assert all(len(choice.usage.drafts.lookahead_dropped) <= 1 for choice in result.choices.values() if choice.usage)


# -- what the layer drafts -------------------------------------------------------------------------------------------


def recomputed(engines: Engines, sequence: Sequence, text: list[int], depth: int) -> list[int]:
    """What the draft layer makes of `text`, whose last token is the scaling pass's own draft: from the scaling pass
    over all that stands before, with keys and values of nobody else.
    """
    model, last = engines.model, len(text) - 2
    alone = OneRequest(model, len(text))
    batch = alone.batch(text[:-1], (0, last + 1), (0, 0))
    hidden = model.forward(batch, alone.cache).hidden[-1:]
    table = torch.tensor([alone.scaling_blocks])
    group = AttentionGroup(0, 1, 1, torch.tensor([[last]]), table, last + 1, needs_mask=True)

    def choose(logits: torch.Tensor, at: int) -> torch.Tensor:
        params = sequence.sampling
        logits = logits.float()
        for id, bias in params.logit_bias.items():
            logits[0, id] += bias
        if params.is_greedy:
            return logits.argmax(-1)
        row = SampleRow(sequence, [0] * (len(text) - 2 + at - len(sequence.tokens)))
        noise = gumbel_noise(torch.from_numpy(noise_keys([row])), logits.shape[1])
        return (logits / params.temperature + noise).argmax(-1)

    start = DraftStart(hidden, torch.tensor(text[-1:]), group, depth)
    return model.draft(start, choose, alone.cache)[0].tolist()


@pytest.mark.parametrize("by", ["torch", "C++", "captured"])
def test_drafts_equal_a_recomputation(engines: Engines, by: str) -> None:
    """Greedy, sampled and biased ones together: each starts behind the first prediction that differs, attends over its
    own scaling stream up to there, and meets the noise of its place.
    """
    bias = {40: 3.0, 41: 2.0}
    requests = [
        greedy("greedy", words(1, 21), 12),
        Request("sampled", words(2, 9), SamplingParams(max_tokens=12, seed=3, ignore_eos=True)),
        Request("biased", words(5, 13), SamplingParams(max_tokens=9, logit_bias=bias, temperature=0.7, seed=4)),
        Request("deep", words(7, 40), SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)),
    ]
    engine = engines.build(adaptive=False, native_kernels=by == "C++", speculative_tokens=0, max_num_batched_tokens=48)
    if by == "captured":
        with_captured_steps(engine, CallAgain(), max_rows=64)
    collect, seen = engine.runner.collect, [0, 0]

    def collected(launched: LaunchedStep) -> list[SequenceResult]:
        results = collect(launched)
        for result in results:
            one, sequence = result.scheduled, result.scheduled.sequence
            compared = enumerate(zip(result.predictions, one.expected, strict=True))
            number = next((number for number, (token, other) in compared if other not in (token, ANY_TOKEN)), None)
            if number is not None and one.draft_depth > 1:
                before = [*sequence.tokens, *sequence.drafts][: one.predict_start + number]
                text = [*before, result.predictions[number]]
                assert result.deeper == recomputed(engines, sequence, text, one.draft_depth)
                seen[0] += 1
                seen[1] += number > 0 or one.predict_count > 1
        return results

    engine.runner.collect = collected  # type: ignore[method-assign]
    run(engine, requests)
    assert seen[0] > 30
    assert seen[1] > 10, "nobody started but behind the last row"


def test_the_sampled_distribution_is_left_alone(engines: Engines) -> None:
    """Every token given the ones before it follows the softmax of the oracle's logits: no draft is favoured, though
    four are drafted at a time and share the noise of their places.
    """
    few = words(7, 4)
    params = SamplingParams(max_tokens=5, logit_bias=dict.fromkeys(few, 30.0), temperature=3.0, ignore_eos=True)
    prompt, draws = [few[i] for i in (0, 1, 2, 3, 1, 0, 2, 0, 1)], 1600
    requests = [Request(str(seed), prompt, replace(params, seed=seed)) for seed in range(draws)]
    engine = engines.build(
        max_num_seqs=400, max_model_len=20, blocks=4000, adaptive=False, speculative_tokens=0,
        max_num_batched_tokens=4096,
    )  # fmt: skip
    result = run(engine, requests)
    texts = [tuple(result[str(number)].tokens) for number in range(draws)]
    deep = [
        sum(sum(getattr(choice.usage.drafts, name)[1:]) for choice in result.choices.values() if choice.usage)
        for name in ("lookahead_kept", "lookahead_dropped")
    ]
    assert min(deep) > draws / 10, "hardly a deep draft was right, or wrong"
    oracle, tested = engines.tiny.as_stored().oracle(), 0
    for length in range(5):
        said_before = [text[:length] for text in texts]
        for said in {one for one in said_before if said_before.count(one) >= 60}:
            following = [text[length] for text in texts if text[:length] == said]
            logits = oracle.logits([*prompt, *said])[-1].double()
            logits[few] += 30.0
            counts = np.bincount(following, minlength=320)
            statistic, limit = chi_square(counts, (logits / 3.0).softmax(-1).numpy())
            if limit > 0:
                tested += 1
                assert statistic < limit, (said, counts[few])
    assert tested >= 8
