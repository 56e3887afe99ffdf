"""Scores of given text: log-probabilities as if it had been generated, whatever the gate and the scheduling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from service.contract.request import Request, SamplingParams
from service.contract.steering import Steering
from tests.engine.gate.test_steering import BY_LAYER, GATES, steered, weights
from tests.engine.test_engine import same
from tests.support.driver import Choice, Engines, greedy, run, words

TEXT = words(7, 45)
SCORING = SamplingParams(max_tokens=0, prompt_logprobs=0)


def score(name: str, text: list[int], start: int, **request: Any) -> Request:
    return Request(name, text, SCORING, score_from=start, **request)


def logprobs(choice: Choice) -> torch.Tensor:
    return torch.tensor([token.logprob for token in choice.prompt_logprobs])


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("start", [1, 30, 44])
def test_equals_peft_with_this_gate(engines: Engines, name: str, start: int) -> None:
    """Exactly the wanted tokens, at exactly their values; nothing is generated."""
    ours = run(engines.build(), [score("a", TEXT, start, steering=GATES[name])])["a"]
    with steered(engines.tiny.as_stored(), GATES[name]) as forward:
        expected = forward(TEXT)[0].log_softmax(-1)[range(start - 1, 44), TEXT[start:]]
    assert (ours.tokens, ours.finish_reason) == ([], "length")
    assert [token.id for token in ours.prompt_logprobs] == TEXT[start:]
    torch.testing.assert_close(logprobs(ours), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("steering", [None, GATES["only two"], BY_LAYER], ids=["free", "steered", "fixed"])
@pytest.mark.parametrize("freeze_after", [None, 1, 4])
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 5}, {"prefix_cache": False}], ids=str)
def test_what_was_generated_scores_as_it_was(
    engines: Engines, steering: Steering | None, freeze_after: int | None, options: dict[str, Any]
) -> None:
    """The same log-probabilities that generation gave, with a gate frozen in its middle, in chunks, from the cache."""
    engine = engines.build(**options)
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
    asked = {"steering": steering, "freeze_after": freeze_after}
    made = run(engine, [Request("made", TEXT[:21], sampling, **asked)])["made"]
    ours = run(engine, [score("a", TEXT[:21] + made.tokens, 21, **asked)])["a"]
    expected = torch.tensor([token.logprob for token in made.token_outputs])
    torch.testing.assert_close(logprobs(ours), expected, atol=1e-4, rtol=0)
    if options.get("prefix_cache", True):
        assert ours.usage is not None
        assert ours.usage.cached_tokens == 20, "the prompt was computed before"


def test_amid_others_and_preempted(engines: Engines) -> None:
    """Every gate at once in a pool that is too small; neither side changes the other, and each token is scored once."""
    requests = [score(name, TEXT, 5 + i, steering=gate) for i, (name, gate) in enumerate(GATES.items())]
    requests += [greedy(f"g{i}", TEXT[:21], 12, return_scalings="full") for i in range(3)]
    alone = {request.id: run(engines.build(), [request])[request.id] for request in requests}
    together = run(engines.build(blocks=40, max_model_len=80, max_num_batched_tokens=33), requests)
    assert together.preemptions
    for request in requests:
        ours = together[request.id]
        assert [token.id for token in ours.prompt_logprobs] == [t.id for t in alone[request.id].prompt_logprobs]
        torch.testing.assert_close(logprobs(ours), logprobs(alone[request.id]), atol=1e-4, rtol=0)
        if request.score_from is None:
            same(ours, alone[request.id])


def test_a_text_as_long_as_the_context(engines: Engines) -> None:
    """Nothing is generated, so no token is left for it."""
    text = words(3, 256)
    ours = run(engines.build(), [score("a", text, 255, steering=weights(1.0))])["a"]
    assert [token.id for token in ours.prompt_logprobs] == text[-1:]


def test_scores_are_not_in_the_metrics(engines: Engines) -> None:
    """The metrics describe what was served; a look at one expert alone would distort them."""
    result = run(engines.build(), [score("a", TEXT, 1), score("b", TEXT, 1, steering=GATES["only one"])])
    assert not any(step.stats.gate.prompt_entropy or step.stats.gate.generated_entropy for step in result.steps)
