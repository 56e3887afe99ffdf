"""Gate settings changed at run time, against PEFT's own setters: for later requests, and for them alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from service.contract.checks import check_settings, stored_settings
from service.contract.errors import InvalidRequestError
from service.contract.request import Request, SamplingParams
from service.contract.steering import GateSettings, GateWeight, Steering
from service.engine.engine import Engine
from tests.engine.test_engine import same
from tests.support.driver import Choice, Engines, greedy, run, words
from tests.support.tiny import Tiny, Variant

PROMPT = words(1, 21)
ALL: dict[str, Any] = {"return_scalings": "full", "scalings_start": 0}
SETTINGS = {
    "experts in the scaling pass": GateSettings(0.25, None, 1.0),
    "1/E in the scaling pass": GateSettings(None, None, 1.0),
    "negative": GateSettings(-0.5, None, 1.0),
    "the best one": GateSettings(0.0, 1, 1.0),
    "the best two, also of the scaling pass": GateSettings(0.4, 2, 1.0),
    "stronger": GateSettings(0.0, None, 1.7),
    "off": GateSettings(0.3, None, 0.0),
    "everything": GateSettings(0.35, 2, -0.6),
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "as stored": {},
    "one row for all sites, everything set": {
        "layerwise_scalings": False, "scaling_pass_value": 0.2, "top_k_lora": 2, "global_scaling_weight": 1.3,
    },
    "raw gate, top-k softmax": {"enable_softmax": False, "top_k_lora": 2, "enable_softmax_topk": True},
}  # fmt: skip


@contextmanager
def peft_set(variant: Variant, settings: GateSettings) -> Iterator[Any]:
    """PEFT after its three setters."""
    oracle = variant.oracle()
    config = oracle.xlora.xlora_config
    before = config.top_k_lora, config.global_scaling_weight
    oracle.xlora.set_scaling_pass_value(settings.scaling_pass_value)
    oracle.xlora.set_topk_lora(settings.top_k_lora)
    oracle.xlora.set_global_scaling_weight(settings.global_scaling_weight)
    try:
        yield oracle
    finally:
        config.top_k_lora, config.global_scaling_weight = before


def with_logprobs(name: str, prompt: list[int] = PROMPT, count: int = 10, **request: Any) -> Request:
    sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, logprobs=0)
    return Request(name, prompt, sampling, **{**ALL, **request})


def assert_follows(ours: Choice, oracle: Any, prompt: list[int] = PROMPT) -> None:
    """Gate rows (without the global weight) and logprobs are those of a full recomputation, tokens its best ones."""
    logits, scalings = oracle.forward(prompt + ours.tokens[:-1])
    np.testing.assert_allclose(ours.full, scalings, atol=1e-5, rtol=0)
    logits = logits[len(prompt) - 1 :]
    expected = logits.log_softmax(-1)[range(len(ours.tokens)), ours.tokens]
    found = torch.tensor([token.logprob for token in ours.token_outputs])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (logits.max(-1).values - logits[range(len(ours.tokens)), ours.tokens] < 1e-3).all()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_equals_peft_after_its_setters(tiny: Tiny, checkpoint: str) -> None:
    """A top-k that the dummy row does not see, a weight left in the returned scalings, a null read as 0."""
    variant = tiny.variant(**CHECKPOINTS[checkpoint])
    engine = Engines(variant).build(adaptive=False)
    texts = set()
    for name, settings in SETTINGS.items():
        engine.set_gate(settings)
        ours = run(engine, [with_logprobs(name)])[name]
        with peft_set(variant, settings) as oracle:
            assert_follows(ours, oracle)
        texts.add(tuple(np.round([token.logprob for token in ours.token_outputs], 3)))
    same_row = 2 if variant.checkpoint.xlora.enable_softmax_topk else 0  # a softmax over equal values forgets the value
    assert len(texts) == len(SETTINGS) - same_row, "the settings tell themselves apart"


def change_between(engine: Engine) -> tuple[list[Request], dict[int, list[Request]]]:
    """Requests under several settings at once: some are running when the settings change. Returns the first ones, and
    those that join later; the settings change with them.
    """
    joins: dict[int, list[Request]] = {}
    for number, name in enumerate(SETTINGS):
        joins[3 * number + 2] = [with_logprobs(f"{name} {i}", PROMPT[: 9 + 4 * i], 12) for i in range(3)]
    return [with_logprobs("before 0", PROMPT[:9], 40), with_logprobs("before 1", PROMPT[:13], 30)], joins


def run_mixed(engine: Engine) -> Any:
    """Steps until idle, the settings changing on the way."""
    first, joins = change_between(engine)
    add = engine.add

    def add_under_its_settings(request: Request) -> None:
        name = request.id[:-2]
        if name in SETTINGS:
            engine.set_gate(SETTINGS[name])
        add(request)

    engine.add = add_under_its_settings  # type: ignore[method-assign]
    try:
        return run(engine, first, joins=joins)
    finally:
        del engine.add  # type: ignore[method-assign]
        engine.set_gate(stored_settings(engine.info.xlora_config))


@pytest.mark.parametrize("options", [
    {}, {"lookahead": False}, {"max_num_batched_tokens": 7},
    {"blocks": 40, "max_model_len": 80}, {"prefix_cache": False},
], ids=str)  # fmt: skip
def test_running_requests_keep_theirs(engines: Engines, options: dict[str, Any]) -> None:
    """Every setting in one batch with every other, with chunks, preemption and shared prompts; then those of the
    checkpoint again, whose cached blocks are still its own.
    """
    engine = engines.build(adaptive=False, **options)
    ours = run_mixed(engine)
    assert not options.get("blocks") or ours.preemptions
    variant = engines.tiny.as_stored()
    for i in range(2):
        with peft_set(variant, stored_settings(engine.info.xlora_config)) as oracle:
            assert_follows(ours[f"before {i}"], oracle, PROMPT[: 9 + 4 * i])
    for name, settings in SETTINGS.items():
        with peft_set(variant, settings) as oracle:
            for i in range(3):
                assert_follows(ours[f"{name} {i}"], oracle, PROMPT[: 9 + 4 * i])
    again = run(engine, [with_logprobs("again")])["again"]
    with peft_set(variant, stored_settings(engine.info.xlora_config)) as oracle:
        assert_follows(again, oracle)


def test_cached_blocks_are_those_of_equal_settings(engines: Engines) -> None:
    """Found under the same settings, never under others; an equal gate by another name is equal."""
    engine = engines.build()
    cached = {}
    for name in ("stored", *SETTINGS, "stored", *SETTINGS):
        settings = SETTINGS.get(name, stored_settings(engine.info.xlora_config))
        engine.set_gate(settings)
        cached[name] = [*cached.get(name, []), run(engine, [with_logprobs("a")])["a"].usage]
    for name, (first, second) in cached.items():
        assert (first.cached_tokens, second.cached_tokens) == (0, 20), name


def test_a_request_says_more_than_the_settings(engines: Engines) -> None:
    """Its own top-k counts; a fixed gate has none, but the global weight; steering goes with both."""
    engine = engines.build()
    engine.set_gate(GateSettings(0.0, 1, 1.0))
    own = run(engine, [greedy("a", PROMPT, steering=Steering(top_k=2, temperature=0.5), **ALL)])["a"]
    engine.set_gate(GateSettings(0.0, None, 1.0))
    same(own, run(engine, [greedy("a", PROMPT, steering=Steering(top_k=2, temperature=0.5), **ALL)])["a"])
    fixed = Steering(weights=(GateWeight(0, 1.0), GateWeight(2, 0.5)))
    half = Steering(weights=(GateWeight(0, 0.5), GateWeight(2, 0.25)))
    engine.set_gate(GateSettings(0.3, 1, 0.5))
    weighed = run(engine, [greedy("a", PROMPT, steering=fixed, **ALL)])["a"]
    engine.set_gate(GateSettings(0.0, None, 1.0))
    assert weighed.tokens == run(engine, [greedy("a", PROMPT, steering=half)])["a"].tokens
    np.testing.assert_array_equal(
        weighed.full[0], run(engine, [greedy("a", PROMPT, steering=fixed, **ALL)])["a"].full[0]
    )


def test_looks_scores_and_frozen_gates_follow(engines: Engines) -> None:
    """POST /scalings, given text and a frozen gate under the settings of the moment."""
    engine = engines.build()
    engine.set_gate(SETTINGS["everything"])
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=0)
    ours = run(engine, [
        Request("look", PROMPT, None, **ALL), Request("score", PROMPT, sampling, score_from=1),
        with_logprobs("frozen", freeze_after=1),
    ])  # fmt: skip
    with peft_set(engines.tiny.as_stored(), SETTINGS["everything"]) as oracle:
        logits, scalings = oracle.forward(PROMPT)
    np.testing.assert_allclose(ours["look"].full, scalings, atol=1e-5, rtol=0)
    expected = logits.log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]
    found = torch.tensor([token.logprob for token in ours["score"].prompt_logprobs])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    np.testing.assert_allclose(ours["frozen"].full[len(PROMPT) - 1 :], np.stack(10 * [scalings[-1]]), atol=1e-5)


@pytest.mark.parametrize(("settings", "param"), [
    (GateSettings(math.nan, None, 1.0), "scaling_pass_value"),
    (GateSettings(101.0, None, 1.0), "scaling_pass_value"),
    (GateSettings(0.0, 0, 1.0), "top_k_lora"),
    (GateSettings(0.0, 4, 1.0), "top_k_lora"),
    (GateSettings(0.0, None, math.inf), "global_scaling_weight"),
])  # fmt: skip
def test_what_no_model_can_follow(engines: Engines, settings: GateSettings, param: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        check_settings(settings, engines.build().info)
    assert error.value.param == param


def test_a_checkpoint_without_experts_stays_so(tiny: Tiny) -> None:
    """Its weight of 0 is part of every captured step, and no factor makes another number of it."""
    info = Engines(tiny.variant(global_scaling_weight=0.0)).build().info
    check_settings(GateSettings(0.5, 1, 0.0), info)
    with pytest.raises(InvalidRequestError, match="own global_scaling_weight is 0"):
        check_settings(GateSettings(0.0, None, 1.0), info)
