"""What goes wrong with one request stays with it: the others get what they would have got."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from service.contract.request import Request, SamplingParams
from service.engine import sampler
from service.engine.engine import Engine
from service.engine.sampler import SampleRow
from service.engine.sequence import Sequence
from tests.engine.test_engine import mixed_requests, same
from tests.support.driver import Engines, Run, greedy, run, sampled, words


def poisoned() -> Request:
    """Its penalties are what fails."""
    return replace(sampled("poison", words(9, 12), 10, presence_penalty=0.5), return_scalings="mean")


@pytest.fixture(scope="module")
def alone(engines: Engines) -> Run:
    """Every mixed request alone, without the fault."""
    result = Run()
    for made in mixed_requests():
        result.choices |= run(engines.build(prefix_cache=False), [made]).choices
    return result


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_failing_sampler_ends_one_request(
    engines: Engines, lookahead: bool, alone: Run, after: int, prefix_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first token, or later; with predictions and prompt logprobs of others in the same batch."""
    history = sampler._history

    def fail(rows: SequenceOf[SampleRow], *others: Any) -> Any:
        if any(row.sequence.request.id == "poison" and row.sequence.output_len >= after for row in rows):
            raise ValueError("a grammar with a hole")
        return history(rows, *others)

    monkeypatch.setattr(sampler, "_history", fail)
    engine = engines.build(lookahead=lookahead, prefix_cache=prefix_cache)
    result = run(engine, [poisoned(), *mixed_requests()])
    assert result["poison"].finish_reason == "error"
    assert result["poison"].error == "sampling failed (ValueError)"
    assert result["poison"].usage is not None
    assert len(result["poison"].tokens) <= after + 1
    for key, choice in alone.choices.items():
        same(result[key], choice)
        assert result[key].error is None


def test_prompt_logprobs_beside_a_failure(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of three kinds are told apart when each sequence is sampled alone."""
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    others = [Request(f"{i}", words(i, 9 + i), params) for i in range(3)]
    expected = run(engines.build(adaptive=False), others)
    calls = []
    sample = sampler.sample

    def fail(logits: Tensor, rows: SequenceOf[SampleRow]) -> Tensor:
        calls.append(len(rows))
        if len(calls) % 4 == 1:
            raise ValueError("now and then")
        return sample(logits, rows)

    monkeypatch.setattr("service.engine.model_runner.sample", fail)
    result = run(engines.build(adaptive=False), others)
    for made in others:
        same(result[made.id], expected[made.id])
        for kind in ("token_outputs", "prompt_logprobs"):
            ours, theirs = getattr(result[made.id], kind), getattr(expected[made.id], kind)
            assert [token.id for token in ours] == [token.id for token in theirs]
            assert [token.logprob for token in ours] == pytest.approx([token.logprob for token in theirs], abs=1e-4)


def test_a_failure_in_the_engine_ends_one_request(
    engines: Engines, alone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the forward, while its tokens are taken in."""
    accept = Sequence.accept

    def fail(self: Sequence, token: int) -> bool:
        if self.request.id == "poison" and self.output_len == 3:
            raise KeyError(token)
        return accept(self, token)

    monkeypatch.setattr(Sequence, "accept", fail)
    result = run(engines.build(), [*mixed_requests(), poisoned()])
    assert (result["poison"].finish_reason, result["poison"].error) == (
        "error", "the engine failed on this request (KeyError)",
    )  # fmt: skip
    for key, choice in alone.choices.items():
        same(result[key], choice)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 9 TB")]
)
def test_out_of_memory_ends_the_largest(
    engines: Engines, alone: Run, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is too large for the memory as long as it has the large one's rows."""
    engine = engines.build()
    forward, freed = engine.runner.step.forward, []

    def run_out(batch: Any, cache: Any) -> Any:
        if batch.fields.shape[1] > 200:
            raise error
        return forward(batch, cache)

    monkeypatch.setattr(engine.runner.step, "forward", run_out)
    monkeypatch.setattr(engine.runner, "free_memory", lambda: freed.append(True))
    requests = [*mixed_requests()[:2], greedy("large", words(1, 200), 4), *mixed_requests()[2:]]
    result = run(engine, requests)
    assert result["large"].finish_reason == "error"
    assert result["large"].error == "the server is out of memory"
    assert freed == [True]
    for key, choice in alone.choices.items():
        same(result[key], choice)


def test_out_of_memory_for_everyone(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other ends, the latest of equals first; then the next request is served."""
    engine = engines.build()
    with monkeypatch.context() as patch:

        def run_out(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(engine.runner.step, "forward", run_out)
        result = run(engine, [greedy(str(i), words(i, 9), 4) for i in range(3)])
        ended = [output.request_id for step in result.steps for output in step.outputs]
        assert ended == ["2", "1", "0"]
    assert run(engine, [greedy("next", words(1, 9), 4)])["next"].finish_reason == "length"


def test_other_errors_of_the_model_are_not_swallowed(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that is wrong is everybody's: the engine's process ends and says so."""
    engine: Engine = engines.build()

    def fail(*_: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(engine.runner.step, "forward", fail)
    engine.add(greedy("a", words(1, 9), 4))
    with pytest.raises(RuntimeError, match="do not fit"):
        engine.step()


def test_memory_is_given_back(engines: Engines) -> None:
    engines.build().runner.free_memory()
