"""An engine over two processes says what an engine in one says, whatever it is asked; and ends when one of them does.

One group serves all tests of this module, one model after another; the last test kills its second rank.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.contract.errors import EngineLostError, SettingsError
from service.contract.options import EngineOptions
from service.contract.request import Request, SamplingParams
from service.contract.steering import GateWeight, Steering
from service.engine.engine import Engine
from service.engine.loader import (
    build_engine,
    load_checkpoint_and_model,
    load_engine,
    load_group_engine,
    read_checkpoint,
)
from service.engine.speculation.costs import StepCost
from service.engine.tensor_parallel.group import Group, check_options
from tests.model.loading.test_families import FAMILIES, build
from tests.support.driver import greedy, run, sampled, words
from tests.support.waiting import PATIENCE_SECONDS

OPTIONS = {"device": "cpu", "threads": 1, "block_size": 4, "max_model_len": 128, "max_num_batched_tokens": 24}
DEMO = Path(__file__).parents[3] / "model_store" / "demo"


class Pair:
    """The group, and which reasons for its end it has given."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.lost = threading.Event()
        self.group = Group(2, self._note)

    def _note(self, reason: str) -> None:
        self.reasons.append(reason)
        self.lost.set()

    def engine(self, path: Path, **options: Any) -> Engine:
        """Over both ranks."""
        wanted = EngineOptions(str(path), tensor_parallel=2, **{**OPTIONS, **options})
        return _of_fixed_cost(load_group_engine(self.group, read_checkpoint(wanted), wanted))


def alone(path: Path, **options: Any) -> Engine:
    """The same in this process alone."""
    wanted = EngineOptions(str(path), **{**OPTIONS, **options})
    return _of_fixed_cost(build_engine(*load_checkpoint_and_model(wanted), wanted))


def _of_fixed_cost(engine: Engine) -> Engine:
    """Drafts as often as any other: an abort meets both engines at the same token."""
    engine._scheduler.drafts.cost = StepCost.linear(0.08)
    return engine


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    pair = Pair()
    try:
        pair.group.join()
        yield pair
    finally:
        pair.group.close()


def requests(vocabulary: int) -> list[Request]:
    """One of every kind: what is special about each is decided by rank 0, and must reach the others."""
    shared = words(9, 17, vocabulary)
    sampling = SamplingParams(max_tokens=8, temperature=0.8, seed=4, ignore_eos=True, n=3, prompt_logprobs=1)
    return [
        greedy("greedy", words(1, 37, vocabulary), 12, return_scalings="full", scalings_start=0),
        sampled("sampled", words(2, 21, vocabulary), 12, seed=7, temperature=0.9),
        Request("choices", shared, sampling),
        greedy("only", shared, 8, steering=Steering(only=(1, 2)), return_scalings="full"),
        greedy("cool", shared, 8, steering=Steering(temperature=0.3, top_k=1), return_scalings="full"),
        greedy(
            "fixed",
            shared,
            12,
            steering=Steering(weights=(GateWeight(0, 0.7), GateWeight(1, 1.0, (0, 1)))),
            return_scalings="full",
        ),
        greedy("frozen", words(3, 9, vocabulary), 12, freeze_after=3, return_scalings="full"),
        greedy("copies", words(4, 6, vocabulary) * 4, 12),
        Request("gate", words(5, 30, vocabulary), None, return_scalings="full"),
    ]


def assert_same(ours: Engine, theirs: Engine, asked: list[Request], **how: Any) -> None:
    """Tokens, choices and prompt logprobs alike, scalings within 1e-5. An aborted request has as many tokens as there
    were by then, which depends on the drafts before.
    """
    mine, expected = run(ours, asked, **how), run(theirs, asked, **how)
    aborted = {(name, 0) for targets in how.get("aborts", {}).values() for name, _ in targets}
    assert mine.choices.keys() - aborted == expected.choices.keys() - aborted
    for key in aborted & mine.choices.keys() & expected.choices.keys():
        several = zip(mine[key].tokens, expected[key].tokens, strict=False)
        assert all(one == other for one, other in several), key
    for key in expected.choices.keys() - aborted:
        found, choice = mine[key], expected[key]
        assert (found.tokens, found.finish_reason) == (choice.tokens, choice.finish_reason), key
        found_logprobs = [[one.logprob for one in choice.prompt_logprobs] for choice in (found, choice)]
        np.testing.assert_allclose(*found_logprobs, atol=1e-4)
        if choice.fulls:
            np.testing.assert_allclose(found.full, choice.full, atol=1e-5, rtol=0, err_msg=str(key))


def test_the_demo_serves_every_kind_of_request_as_in_one_process(pair: Pair) -> None:
    """Six heads and two KV heads. Requests of all kinds share batches; later ones find the prefixes of earlier ones."""
    ours, theirs = pair.engine(DEMO), alone(DEMO, draft_depth=1)  # as deep as ranks draft
    asked = requests(1000)
    joins = {3: [greedy("late", [*words(1, 37, 1000), 5, 6], 12)], 5: [greedy("gone", words(6, 20, 1000), 60)]}
    aborts: dict[int, list[tuple[str, int | None]]] = {9: [("gone", None)]}
    for _ in range(2):  # the second time from the prefix cache
        assert_same(ours, theirs, asked, joins=joins, aborts=aborts)
    assert ours.info.device == "2 ranks, the first on cpu"


def test_preempted_requests_are_computed_again(pair: Pair) -> None:
    block = 4 * (
        1024 + 448
    )  # bytes of four positions' keys and values, of this rank's one KV head, and of their gate rows
    few = {"kv_memory_bytes": 70 * block, "max_model_len": 64, "speculative_tokens": 0}
    ours = pair.engine(DEMO, **few)
    assert ours.blocks.num_blocks == 70
    asked = [greedy(f"r{number}", words(number, 12, 1000), 40) for number in range(4)]
    result = run(ours, asked)
    assert result.preemptions > 0
    roomy = run(alone(DEMO), asked)
    assert {key: choice.tokens for key, choice in result.choices.items()} == {
        key: choice.tokens for key, choice in roomy.choices.items()
    }


@pytest.mark.parametrize("family", ["phi3", "mixtral"])
def test_families(pair: Pair, tmp_path: Path, family: str) -> None:
    """Every rank attends with all heads; a mixture whose experts are divided as well."""
    path = build(tmp_path / family, family, **FAMILIES[family])
    assert_same(pair.engine(path), alone(path), requests(320))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantization": "int8"}, "--quantization does not go together with --tensor-parallel 2"),
        ({"device": "cuda:1"}, "--device cuda:1 is a single one"),
        ({"device": "cuda"}, "needs as many GPUs, and this machine has 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SettingsError, match=reason):
        check_options(EngineOptions("model", tensor_parallel=2, **options))


def test_a_model_that_cannot_be_divided_is_refused_before_it_is_read() -> None:
    with pytest.raises(SettingsError, match="--tensor-parallel 4 does not divide the base model's 6 attention heads"):
        load_engine(EngineOptions(str(DEMO), device="cpu", tensor_parallel=4))


def test_on_a_machine_with_gpus_each_rank_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_options(EngineOptions("model", tensor_parallel=2))
    with pytest.raises(SettingsError, match="3 needs as many GPUs, and this machine has 2"):
        check_options(EngineOptions("model", tensor_parallel=3))
    with pytest.raises(SettingsError, match="CUDA_VISIBLE_DEVICES="):
        check_options(EngineOptions("model", tensor_parallel=2, device="cpu"))


def test_what_a_rank_says_before_it_ends_is_passed_on(tmp_path: Path) -> None:
    group = Group(2)
    [rank] = group._others
    try:
        group.receive(rank)  # it has started
        group.load(EngineOptions(str(tmp_path / "nowhere"), tensor_parallel=2))
        with pytest.raises(EngineLostError, match=r"rank 1 of 2 failed: .*nowhere"):
            group.agree_on_blocks(1)
    finally:
        group.close()


def test_a_killed_rank_ends_the_group_and_is_named(pair: Pair) -> None:
    """The last test here. A step that waits for it must end as well."""
    engine = pair.engine(DEMO)
    engine.add(greedy("a", words(1, 20, 1000), 50))
    engine.step()
    [rank] = pair.group._others
    os.kill(rank.process.pid, signal.SIGKILL)
    reason = "rank 1 of 2 was ended by SIGKILL, perhaps for want of memory"
    with pytest.raises(EngineLostError, match=reason):
        run(engine, [])
    assert pair.lost.wait(PATIENCE_SECONDS)
    assert pair.reasons == [reason]
