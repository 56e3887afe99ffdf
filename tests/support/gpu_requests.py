"""Requests of every kind over the demo, for comparing one device with another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.common import DEMO, prompt_tokens
from service.contract.request import Request, SamplingParams
from service.contract.steering import GateWeight, Steering
from tests.support.driver import Choice, Run, greedy, sampled

FULL: dict[str, Any] = {"return_scalings": "full"}
EVERYTHING: dict[str, Any] = {**FULL, "scalings_start": 0}
LENGTHS = (3, 40, 17, 64, 120)
STEERINGS = {
    "only": Steering(only=(0,)),
    "exclude": Steering(exclude=(1,)),
    "fixed": Steering(weights=(GateWeight(0, 0.7), GateWeight(1, 0.3))),
    "base": Steering(weights=()),
    "sharp": Steering(temperature=0.3),
    "top_k": Steering(top_k=1),
}


def prompt(length: int, seed: int = 0) -> list[int]:
    """Of the demo's examples."""
    return prompt_tokens(DEMO, length, seed)


def plain(tokens: int = 24) -> list[Request]:
    """Greedy and sampled, of mixed contexts, with their scalings."""
    return [
        replace((greedy if i % 2 else sampled)(f"r{i}", prompt(length, i), tokens), return_scalings="full")
        for i, length in enumerate(LENGTHS)
    ]


def every_kind() -> list[Request]:
    """One of every kind that needs no grammar."""
    filters: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01}
    penalties: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    steered = [
        greedy(name, prompt(20 + i, 10 + i), 12, steering=s, **FULL) for i, (name, s) in enumerate(STEERINGS.items())
    ]
    return [
        *plain(),
        sampled("filtered", prompt(30, 1), 16, seed=2, **filters),
        sampled("penalised", prompt(25, 2), 16, seed=3, **penalties),
        sampled("biased", prompt(19, 3), 12, seed=4, logit_bias={40: 3.0, 41: -100.0}),
        sampled("logprobs", prompt(21, 4), 10, seed=5, logprobs=3, prompt_logprobs=1),
        sampled("n", prompt(33, 5), 12, seed=6, n=3),
        Request("stops", prompt(18, 6), SamplingParams(40, min_tokens=3, seed=7, stop_token_ids=tuple(range(20, 60)))),
        replace(greedy("frozen", prompt(22, 7), 14, **FULL), freeze_after=4),
        Request("look", prompt(50, 8), None, "full", 0),
        Request("score", prompt(45, 9), SamplingParams(0, prompt_logprobs=2), score_from=5),
        greedy("repeats", prompt(12, 3) * 4, 24, **FULL),  # drafts copied from earlier text
        *steered,
    ]  # fmt: skip


def assert_same(ours: Run, theirs: Run, tolerance: float = 1e-3) -> None:
    """Equal tokens and ends; scalings and log-probabilities that differ by rounding at most."""
    assert ours.choices.keys() == theirs.choices.keys()
    for key, choice in theirs.choices.items():
        assert ours.choices[key].tokens == choice.tokens, key
        _assert_close(ours.choices[key], choice, tolerance)


def _assert_close(ours: Choice, theirs: Choice, tolerance: float) -> None:
    assert (ours.finish_reason, ours.error, ours.start) == (theirs.finish_reason, None, theirs.start)
    for name in ("means", "fulls"):
        if getattr(theirs, name):
            found, expected = (np.concatenate(getattr(one, name)) for one in (ours, theirs))
            np.testing.assert_allclose(found, expected, atol=tolerance)
    for name in ("token_outputs", "prompt_logprobs"):
        found, expected = ([token.logprob for token in getattr(one, name)] for one in (ours, theirs))
        assert len(found) == len(expected)
        if expected and expected[0] is not None:
            np.testing.assert_allclose(found, expected, atol=10 * tolerance)
