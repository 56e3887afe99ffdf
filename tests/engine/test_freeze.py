"""A frozen gate: from generated token n + 1 on the row that produced token n, which a recomputation must show too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from service.contract.errors import InvalidRequestError
from service.contract.request import Request, SamplingParams
from tests.engine.gate.test_gate_rows import assert_observed_once
from tests.engine.test_engine import same
from tests.support.driver import Choice, Engines, greedy, run, words
from tests.support.oracle import PeftOracle

PROMPT = words(1, 21)
ALL: dict[str, Any] = {"return_scalings": "full", "scalings_start": 0}


@contextmanager
def frozen(oracle: PeftOracle, position: int) -> Iterator[PeftOracle]:
    """PEFT with the scalings of `position` at every later one."""
    predict = oracle.classifier.forward

    def freeze(*args: Any, **kwargs: Any) -> Tensor:
        scalings: Tensor = predict(*args, **kwargs).clone()
        scalings[:, position + 1 :] = scalings[:, position : position + 1]
        return scalings

    oracle.classifier.forward = freeze
    try:
        yield oracle
    finally:
        del oracle.classifier.forward


def assert_equals_peft(engines: Engines, ours: Choice, prompt: list[int], after: int) -> None:
    """Greedy tokens and every gate row are those of a full recomputation with frozen rows."""
    with frozen(engines.tiny.as_stored().oracle(), len(prompt) + after - 2) as oracle:
        logits, scalings = oracle.forward(prompt + ours.tokens[:-1])
    best = logits[len(prompt) - 1 :].topk(2)
    clear = best.values[:, 0] - best.values[:, 1] >= 1e-3
    assert clear.sum() >= len(ours.tokens) - 1
    assert (best.indices[clear, 0].numpy() == np.array(ours.tokens)[clear]).all()
    np.testing.assert_allclose(ours.full, scalings, atol=1e-5, rtol=0)


@pytest.mark.parametrize("speculative", [0, 8])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 7, 19, 20, 21])
def test_equals_peft_with_frozen_rows(engines: Engines, lookahead: bool, after: int, speculative: int) -> None:
    """Off by one in which token freezes, at block borders (the frozen position is 20 .. 40) and at the end."""
    engine = engines.build(lookahead=lookahead, speculative_tokens=speculative, adaptive=False)
    made = greedy("a", PROMPT, 20, freeze_after=after, **ALL)
    ours = run(engine, [made])
    assert_equals_peft(engines, ours["a"], PROMPT, after)
    assert_observed_once(ours, [made], 3)
    same(run(engine, [made])["a"], ours["a"])  # from the prefix cache
    free = run(engines.build(), [greedy("a", PROMPT, 20, **ALL)])["a"]
    assert ours["a"].tokens[:after] == free.tokens[:after]
    assert (ours["a"].tokens == free.tokens) == (after >= 19), "frozen and free tell these rows apart"


def test_one_forward_per_token_and_no_scaling_stream(engines: Engines) -> None:
    """Freezing pays: one row per token, and the scaling stream's blocks go back."""
    held: list[tuple[int, int]] = []
    engine = engines.build(lookahead=False, speculative_tokens=0)

    def look(engine: Any, step: Any) -> None:
        for sequence in engine._scheduler.running:
            held.append((sequence.output_len, len(sequence.scaling.blocks)))

    usage = run(engine, [greedy("a", PROMPT, 20, freeze_after=3)], each_step=look)["a"].usage
    assert usage is not None
    assert usage.scaling_rows == 21 + 2
    assert usage.real_rows == 21 + 19
    assert usage.forward_passes == 2 * 3 + 17
    assert all(blocks == 0 for tokens, blocks in held if tokens > 2)
    assert all(blocks == 6 for tokens, blocks in held if tokens < 2)


def test_amid_others(engines: Engines) -> None:
    """Frozen and free requests in one batch, choices of one too: each gets what it gets alone."""
    requests = [
        greedy("frozen", PROMPT, 16, freeze_after=2, **ALL),
        greedy("free", PROMPT, 16, **ALL),
        Request("n", words(3, 9), SamplingParams(max_tokens=14, seed=3, n=3, ignore_eos=True), **ALL, freeze_after=5),
        Request("late", words(4, 30), SamplingParams(max_tokens=14, ignore_eos=True), "full", freeze_after=1),
        Request("look", words(5, 25), None, **ALL),
    ]
    alone = {made.id: run(engines.build(lookahead=False, speculative_tokens=0), [made]) for made in requests}
    for options in ({}, {"adaptive": False}, {"max_num_batched_tokens": 9}, {"block_size": 1}, {"block_size": 16}):
        together = run(engines.build(**options), requests)
        for made in requests:
            for key, choice in alone[made.id].choices.items():
                same(together[key], choice)


def test_preempted(engines: Engines, lookahead: bool) -> None:
    """Recomputed, the scaling stream ends where it ended, and the same row serves the rest."""
    requests = [
        Request(
            f"{i}", words(60 + i, 8 + i), SamplingParams(max_tokens=24, seed=i, temperature=i % 2, ignore_eos=True),
            **ALL, freeze_after=1 + 4 * i,
        )
        for i in range(6)
    ]  # fmt: skip
    expected = run(engines.build(lookahead=lookahead), requests)
    for prefix_cache in (True, False):
        small = engines.build(lookahead=lookahead, max_model_len=64, blocks=34, prefix_cache=prefix_cache)
        result = run(small, requests)
        assert result.preemptions > 0
        assert_observed_once(result, requests, 3)
        for made in requests:
            same(result[made.id], expected[made.id])


def test_frozen_positions_are_not_cached(engines: Engines) -> None:
    """Their keys and values were computed with another gate than the text has without freezing."""
    engine, fresh = engines.build(block_size=1), engines.build(prefix_cache=False)
    ours = run(engine, [greedy("a", PROMPT, 20, freeze_after=4)])["a"]
    longer = greedy("b", PROMPT + ours.tokens, 5, **ALL)
    free = run(engine, [longer])["b"]
    same(free, run(fresh, [longer])["b"])
    assert free.usage is not None
    assert free.usage.cached_tokens == len(PROMPT) + 3
    # Now the scaling stream's blocks of the whole text are there; had the frozen real ones been, they would be found.
    same(run(engine, [longer])["b"], free)


@pytest.mark.parametrize(("after", "sampling"), [(0, SamplingParams()), (-1, SamplingParams()), (2, None)])
def test_refused(engines: Engines, after: int, sampling: SamplingParams | None) -> None:
    """No token 0 exists to freeze after, and a scaling pass alone generates none."""
    engine = engines.build()
    with pytest.raises(InvalidRequestError, match="freeze_after") as caught:
        engine.add(Request("a", PROMPT, sampling, freeze_after=after))
    assert caught.value.param == "gate.freeze_after"
    assert not engine.has_work()
