"""The engine's half of the scalings log against PEFT's own: what the classifier said, of each kept position, once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.contract.output import StepOutput
from service.contract.request import Request, SamplingParams
from service.contract.steering import GateWeight, Steering
from service.engine.engine import Engine
from service.engine.out_of_memory import OutOfMemory
from tests.support.driver import Array, Engines, Key, greedy, run, sampled, words
from tests.support.tiny import Tiny, Variant

PROMPT = words(1, 21)
LOGGED_GATES = {
    "free": {},
    "only": {"steering": Steering(only=(1,))},
    "cold": {"steering": Steering(temperature=0.3, top_k=1)},
}


def logged(steps: Iterable[StepOutput]) -> dict[Key, dict[int, Array]]:
    """The rows [S, E] by choice and position; a position that comes twice is an error."""
    rows: dict[Key, dict[int, Array]] = {}
    for step in steps:
        for part in step.stats.logged:
            own = rows.setdefault((part.request_id, part.index), {})
            for offset, row in enumerate(np.frombuffer(part.rows, np.float32).reshape(part.count, -1)):
                assert part.start + offset not in own, "logged twice"
                own[part.start + offset] = row
    return rows


def said_by_peft(variant: Variant, tokens: list[int]) -> Array:
    """[T, S * E]: the last entry of PEFT's own log."""
    oracle = variant.oracle()
    oracle.xlora.enable_scalings_logging()
    oracle.logits(tokens)
    oracle.xlora.disable_scalings_logging()
    [*_, said] = oracle.xlora.get_scalings_log()
    oracle.xlora.clear_scalings_log()
    array: Array = said[0].flatten(1).numpy()
    return array


def assert_as_peft(rows: dict[int, Array], variant: Variant, tokens: list[int], positions: range) -> None:
    assert sorted(rows) == list(positions)
    said = said_by_peft(variant, tokens)
    found = np.stack([rows[position] for position in positions])
    if not variant.checkpoint.xlora.layerwise_scalings:
        found = np.tile(found, said.shape[1] // found.shape[1])
    np.testing.assert_allclose(found, said[positions.start : positions.stop], atol=1e-5, rtol=0)


@pytest.mark.parametrize("xlora", [
    {}, {"top_k_lora": 1}, {"top_k_lora": 2, "enable_softmax_topk": True, "softmax_temperature": 0.5},
    {"enable_softmax": False, "top_k_lora": 2}, {"layerwise_scalings": False, "scaling_pass_value": 0.3},
], ids=str)  # fmt: skip
def test_equals_pefts_log(tiny: Tiny, xlora: dict[str, Any]) -> None:
    """Rows after top-k, as responses have them; rows of drafts that missed."""
    variant = tiny.variant(**xlora)
    engine = Engines(variant).build(adaptive=False)
    engine.log_scalings(True)
    result = run(engine, [greedy("a", PROMPT, 16)])
    assert result["a"].usage is not None
    assert result["a"].usage.drafts.misses + result["a"].usage.drafts.speculated > 0
    assert_as_peft(logged(result.steps)["a", 0], variant, PROMPT + result["a"].tokens, range(36))


@pytest.mark.parametrize("name", LOGGED_GATES)
def test_steering_is_not_in_it(engines: Engines, name: str) -> None:
    """The classifier's own words, whatever was made of them; PEFT's, on the steered text."""
    engine = engines.build()
    engine.log_scalings(True)
    result = run(engine, [greedy("a", PROMPT, 16, **LOGGED_GATES[name])])
    assert_as_peft(logged(result.steps)["a", 0], engines.tiny.as_stored(), PROMPT + result["a"].tokens, range(36))


def test_where_no_classifier_runs_there_is_nothing(engines: Engines) -> None:
    """Fixed gates, positions behind a frozen one, cached ones; nor are looks and scores in it."""
    engine = engines.build()
    engine.log_scalings(True)
    requests = [
        greedy("fixed", PROMPT[:9], 6, steering=Steering(weights=(GateWeight(0, 1.0),))),
        greedy("frozen", PROMPT[:10], 8, freeze_after=3),
        Request("look", PROMPT, None),
        Request("score", PROMPT, SamplingParams(max_tokens=0, prompt_logprobs=0), score_from=1),
    ]
    rows = logged(run(engine, requests).steps)
    assert {key: sorted(own) for key, own in rows.items()} == {("frozen", 0): list(range(12))}
    run(engine, [greedy("first", PROMPT, 6)])
    again = run(engine, [greedy("again", PROMPT, 6)])
    assert again["again"].usage is not None
    cached = again["again"].usage.cached_tokens
    assert cached == 20
    assert_as_peft(
        logged(again.steps)["again", 0], engines.tiny.as_stored(), PROMPT + again["again"].tokens, range(cached, 26)
    )


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_each_position_once_amid_preemption(engines: Engines, prefix_cache: bool) -> None:
    """Computed twice, logged once, also where the cache has what had not left; and samples, choices, chunks."""
    limits = {"blocks": 40, "max_model_len": 80, "max_num_batched_tokens": 13}
    engine = engines.build(**limits, adaptive=False, prefix_cache=prefix_cache)
    engine.log_scalings(True)
    several = replace(
        sampled("n", PROMPT[:12], 20), sampling=SamplingParams(max_tokens=20, n=3, seed=3, ignore_eos=True)
    )
    requests = [greedy(f"g{i}", words(i, 30), 30) for i in range(4)] + [several]
    result = run(engine, requests)
    assert result.preemptions
    rows = logged(result.steps)
    for i in range(4):
        text = words(i, 30) + result[f"g{i}"].tokens
        assert_as_peft(rows[f"g{i}", 0], engines.tiny.as_stored(), text, range(59))
    for index in range(3):
        text = PROMPT[:12] + result["n", index].tokens
        own = rows["n", index]
        assert max(own) == 30
        assert_as_peft(own, engines.tiny.as_stored(), text, range(min(own), 31))


def test_off_by_default_and_switched_on_in_the_middle(engines: Engines) -> None:
    """What was computed while it was off never comes, not even later: it may have been of a draft that missed."""
    engine = engines.build(adaptive=False)
    states = {0: False, 4: True, 8: False, 12: True}
    steps = iter(range(1000))

    def switch(*_: Any) -> None:
        state = states.get(next(steps))
        if state is not None:
            engine.log_scalings(state)

    result = run(engine, [greedy("a", PROMPT, 40)], each_step=switch)
    rows = logged(result.steps)["a", 0]
    assert 0 < len(rows) < 60
    said = said_by_peft(engines.tiny.as_stored(), PROMPT + result["a"].tokens)
    for position, row in rows.items():
        np.testing.assert_allclose(row, said[position], atol=1e-5, rtol=0)
    assert not logged(run(engines.build(), [greedy("a", PROMPT, 4)]).steps)


def test_switched_on_again_it_goes_on(engines: Engines) -> None:
    """Other bounds while it is on: rows that wait to become final are not lost."""
    engine = engines.build(adaptive=False)
    engine.log_scalings(True)
    result = run(engine, [greedy("a", PROMPT, 16)], each_step=lambda *_: engine.log_scalings(True))
    assert sorted(logged(result.steps)["a", 0]) == list(range(36))


def test_rows_that_never_become_final_are_forgotten(engines: Engines) -> None:
    """An aborted request leaves nothing behind in the engine."""
    engine = engines.build()
    engine.log_scalings(True)
    run(engine, [greedy("a", PROMPT, 40)], aborts={5: [("a", None)]})
    assert not engine._sequences
    assert len(logged(run(engine, [greedy("b", words(9, 5), 3)]).steps)["b", 0]) == 7


def begun(engines: Engines) -> tuple[Engine, list[StepOutput], list[int], int]:
    """An engine amid a request: its steps so far, the text, how much of it is final, of which some has not left."""
    engine = engines.build(adaptive=False)
    engine.log_scalings(True)
    engine.add(greedy("a", PROMPT, 60))
    steps = [engine.step() for _ in range(12)]
    [sequence] = engine._sequences["a"]
    assert len(logged(steps)["a", 0]) < sequence.final, "nothing is left"
    return engine, steps, list(sequence.tokens), sequence.final


def test_what_a_dropped_request_leaves_comes_with_the_next_report(engines: Engines) -> None:
    """Its client has gone, but its text was served up to there."""
    engine, steps, text, final = begun(engines)
    engine.abort("a")
    steps.append(engine.report())
    assert_as_peft(logged(steps)["a", 0], engines.tiny.as_stored(), text, range(final))
    assert not logged([engine.report()])


def test_a_preempted_request_that_is_dropped_leaves_as_much(engines: Engines) -> None:
    """Whose rows are computed from the start again, if at all."""
    engine, steps, text, final = begun(engines)
    engine._scheduler._preempt(engine._sequences["a"][0])
    engine.abort("a")
    steps.append(engine.report())
    assert_as_peft(logged(steps)["a", 0], engines.tiny.as_stored(), text, range(final))


def test_a_request_shed_for_memory_leaves_as_much(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, steps, text, final = begun(engines)

    def run_out(*_: Any, **__: Any) -> None:
        raise OutOfMemory

    monkeypatch.setattr(engine.runner, "launch", run_out)
    steps.append(engine.step())
    assert not engine._sequences
    assert_as_peft(logged(steps)["a", 0], engines.tiny.as_stored(), text, range(final))
