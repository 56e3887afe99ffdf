"""`perplexity` of POST /scalings over the fake engine: what is scored, how it is written, what is refused."""

from __future__ import annotations

import csv
import io
import math

import pytest
from fastapi.testclient import TestClient

from service.api.gate_views import perplexity
from service.api.gate_views.perplexity import Columns, Likelihoods
from service.contract.steering import GateWeight, Steering
from tests.api.routes.test_scalings import PROMPT, ask, error
from tests.support.fake_engine import EXPERTS, FakeEngine


def test_each_column_is_scored_once(http: TestClient, engine: FakeEngine) -> None:
    """X-LoRA, the base, and the selected experts alone; the first token has no predecessor."""
    answer = ask(http, perplexity=True, select={"experts": ["tales", "math"]})
    scores = [one for one in engine.requests if one.score_from is not None]
    experts = [Steering(weights=(GateWeight(place, 1.0),)) for place in (0, 2)]
    assert [one.steering for one in scores] == [None, Steering(weights=()), *experts]
    assert all(one.score_from == 1 and one.prompt_token_ids == PROMPT for one in scores)
    found = answer["perplexity"]
    assert list(found) == ["xlora", "base", "experts"]
    assert list(found["experts"]) == ["math", "tales"]
    assert found["base"]["logprobs"] == [None] + [-0.5] * 19
    assert found["xlora"]["perplexity"] == pytest.approx(math.exp(0.5))


@pytest.mark.parametrize(("start", "stop", "scored"), [(0, 1, 0), (0, 2, 1), (5, 9, 4), (19, 20, 1)])
def test_a_part(http: TestClient, engine: FakeEngine, start: int, stop: int, scored: int) -> None:
    """One logprob per selected token; a text's first alone has no perplexity."""
    answer = ask(http, perplexity=True, select={"start": start, "stop": stop})
    found = answer["perplexity"]["experts"]["code"]
    assert found["logprobs"] == [None] * (stop - start - scored) + [-0.5] * scored
    assert (found["perplexity"] is None) == (not scored)
    assert len(answer["tokens"]) == stop - start
    assert all(one.score_from == max(1, start) for one in engine.requests if one.score_from is not None)


def test_as_a_table(http: TestClient) -> None:
    """A column per judge, and a line with the perplexities after each text."""
    answer = ask(http, prompt=[PROMPT, PROMPT[:4]], perplexity=True, format="csv")
    header, *lines = csv.reader(io.StringIO(answer.text))
    judges = ["logprob_xlora", "logprob_base", *(f"logprob_expert_{name}" for name in EXPERTS)]
    assert header == ["text", "position", "token_id", "token", *EXPERTS, "entropy_nats", *judges]
    assert len(lines) == 20 + 1 + 4 + 1
    assert lines[0][-5:] == [""] * 5
    assert lines[1][-5:] == ["-0.5"] * 5
    assert lines[20] == ["0", "", "", "perplexity", "", "", "", "", *["1.64872127"] * 5]
    assert [line[0] for line in lines] == ["0"] * 21 + ["1"] * 5


def test_without_it_nothing_is_scored(http: TestClient, engine: FakeEngine) -> None:
    assert "perplexity" not in ask(http, perplexity=False)
    assert "logprob" not in ask(http, format="csv").text
    assert all(one.score_from is None for one in engine.requests)


def test_refused(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(http, perplexity=True, granularity="site")["param"] == "perplexity"
    assert error(http, perplexity=True, format="npy")["param"] == "perplexity"
    assert error(http, perplexity="yes")["param"] == "perplexity"
    monkeypatch.setattr(perplexity, "MAX_SCORED_TOKENS", 60)
    assert error(http, perplexity=True)["code"] == "too_large"
    ask(http, perplexity=True, select={"experts": ["math"]})
    ask(http, perplexity=True, select={"stop": 12})


def test_a_perplexity_beyond_all_numbers_is_null() -> None:
    """JSON has no infinity."""
    likelihoods = Likelihoods.of(Columns([], []), 1, [[-800.0], [-1.0]])
    assert likelihoods.perplexity(0) is None
    assert likelihoods.perplexity(1) == pytest.approx(math.e)
