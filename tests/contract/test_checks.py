"""What must hold of a request before it leaves the API's process: nobody looks at it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.contract.checks import checked_request
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError
from service.contract.request import Request, SamplingParams
from service.contract.steering import GateWeight, Steering
from tests.support.fake_engine import fake_info, write_bundle

NAN, INF = float("nan"), float("inf")
SCORING = SamplingParams(max_tokens=0, prompt_logprobs=0)
BY_LAYER = Steering(weights=(GateWeight(0, 1.0, (0, 0)),))


@pytest.fixture
def info(tmp_path: Path) -> EngineInfo:
    """3 experts in 2 layers, 259 token ids, a context of 96 tokens, a pool of 12 blocks of 16."""
    return fake_info(write_bundle(tmp_path))


def request(prompt: int = 20, max_tokens: int = 4, **fields: Any) -> Request:
    return Request("a", [7] * prompt, SamplingParams(max_tokens=max_tokens), **fields)


def refused(made: Request, info: EngineInfo) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        checked_request(made, info)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("bad", [-1, 259, 2**70])
def test_ids_that_do_not_exist(info: EngineInfo, bad: int) -> None:
    """On a GPU an index out of range ends the process, and a negative one would bias another token."""
    for param, made in (
        ("prompt", Request("a", [8, bad], SamplingParams(max_tokens=128))),
        ("prompt", Request("a", [8, bad], None)),
        ("logit_bias", Request("a", [8], SamplingParams(max_tokens=128, logit_bias={3: 1.0, bad: 2.0}))),
    ):
        error = refused(made, info)
        assert (error.param, error.code) == (param, "unknown_token")
        assert "ids go from 0 to 258" in error.message
        assert str(bad)[:20] in error.message


def test_the_context(info: EngineInfo) -> None:
    """prompt + max_tokens up to the context is fine, one more is refused with the numbers."""
    assert checked_request(request(90, 6), info) == request(90, 6)
    error = refused(request(90, 7), info)
    assert (error.param, error.code) == ("max_tokens", "context_length_exceeded")
    assert error.message == "prompt (90 tokens) + max_tokens (7) = 97 is over the context of 96 tokens"
    assert error.hint == "lower max_tokens to 6 or shorten the prompt"
    assert refused(request(96, 1), info).param == "prompt"
    look = replace(request(96), sampling=None)
    assert checked_request(look, info) == look
    assert refused(replace(look, prompt_token_ids=[7] * 97), info).param == "prompt"


def test_the_pool(info: EngineInfo) -> None:
    """Two streams of 33 tokens have 3 blocks each; a fixed gate has one stream, and so has a look at the gate."""
    small = replace(info, kv_blocks_total=5)
    error = refused(request(30, 3), small)
    assert "needs 6 KV blocks, and the server has 5" in error.message
    assert error.code == "context_length_exceeded"
    for fits in (request(30, 2), request(76, 4, steering=BY_LAYER), replace(request(80), sampling=None)):
        assert checked_request(fits, small) == fits
    assert "needs 6" in refused(request(77, 4, steering=BY_LAYER), small).message


def test_nothing_at_all(info: EngineInfo) -> None:
    assert refused(request(0), info).param == "prompt"
    assert refused(request(5, 0), info).param == "max_tokens"


@pytest.mark.parametrize(
    ("after", "sampling"), [(0, SamplingParams(max_tokens=128)), (-1, SamplingParams(max_tokens=128)), (2, None)]
)
def test_freezing_too_early(info: EngineInfo, after: int, sampling: SamplingParams | None) -> None:
    """No token 0 exists to freeze after, and a scaling pass alone generates none."""
    error = refused(Request("a", [7], sampling, freeze_after=after), info)
    assert (error.param, "freeze_after" in error.message) == ("gate.freeze_after", True)


@pytest.mark.parametrize(("wrong", "param"), [
    ({"score_from": 0}, "score_from"),
    ({"score_from": 20}, "score_from"),
    ({"sampling": replace(SCORING, max_tokens=1)}, "score_from"),
    ({"sampling": replace(SCORING, prompt_logprobs=None)}, "score_from"),
    ({"sampling": replace(SCORING, n=2)}, "score_from"),
    ({"sampling": None}, "score_from"),
    ({"return_scalings": "mean"}, "return_scalings"),
])  # fmt: skip
def test_scores(info: EngineInfo, wrong: dict[str, Any], param: str) -> None:
    good = Request("a", [7] * 20, SCORING, score_from=19)
    assert checked_request(good, info) == good
    assert refused(replace(good, **wrong), info).param == param


# -- steering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steering", "canonical"),
    [
        (Steering(), None),
        (Steering(only=(2, 0, 1)), None),
        (Steering(only=(2, 0)), Steering(only=(0, 2))),
        (Steering(exclude=(1,)), Steering(only=(0, 2))),
        (Steering(only=(2, 1), exclude=(1,), top_k=1), Steering(only=(2,), top_k=1)),
        (Steering(only=()), Steering(weights=())),
        (Steering(exclude=(0, 1, 2), temperature=0.5), Steering(weights=())),
        (BY_LAYER, BY_LAYER),
    ],
)
def test_canonical(info: EngineInfo, steering: Steering, canonical: Steering | None) -> None:
    """Equal gates have equal keys, and who is checked again is as before."""
    checked = checked_request(request(steering=steering), info)
    assert checked.steering == canonical
    assert checked_request(checked, info) == checked


@pytest.mark.parametrize(
    ("steering", "param", "match"),
    [
        (Steering(only=(0, 3)), "experts.only", "expert 3 is not one of the 3"),
        (Steering(only=(-1,)), "experts.only", "expert -1"),
        (Steering(exclude=(3,)), "experts.exclude", "expert 3"),
        (Steering(weights=(GateWeight(3, 1.0),)), "experts.weights", "expert 3"),
        (Steering(weights=(GateWeight(-1, 1.0),)), "experts.weights", "expert -1"),
        *((Steering(weights=(GateWeight(0, bad),)), "experts.weights", "not between") for bad in (NAN, INF, -101.0)),
        *(
            (Steering(weights=(GateWeight(0, 1.0, layers),)), "experts.weights", "within 0 to 1")
            for layers in ((0, 2), (1, 0), (-1, 0))
        ),
        (Steering(weights=(), only=(1,)), "experts.weights", "do not go with"),
        (Steering(weights=(), exclude=(1,)), "experts.weights", "do not go with"),
        (Steering(weights=(), temperature=2.0), "experts.weights", "do not go with"),
        (Steering(weights=(), top_k=1), "experts.weights", "do not go with"),
        *((Steering(temperature=bad), "gate.temperature", "finite number over 0") for bad in (0.0, -1.0, NAN, INF)),
        *((Steering(top_k=bad), "gate.top_k", "not 1 to 3") for bad in (0, 4)),
    ],
)
def test_steering_that_no_model_of_this_size_follows(
    info: EngineInfo, steering: Steering, param: str, match: str
) -> None:
    error = refused(request(steering=steering), info)
    assert (error.param, match in error.message) == (param, True)


def test_steering_that_this_checkpoint_does_not_follow(info: EngineInfo) -> None:
    """What this gate cannot do is not silently ignored."""
    raw = replace(info, xlora_config=info.xlora_config | {"enable_softmax": False})
    error = refused(request(steering=Steering(temperature=2.0)), raw)
    assert (error.param, "no softmax" in error.message) == ("gate.temperature", True)
    one_row = replace(info, xlora_config=info.xlora_config | {"layerwise_scalings": False})
    assert "one row for all layers" in refused(request(steering=BY_LAYER), one_row).message
    for steering in (Steering(only=()), BY_LAYER):
        assert "no scaling pass" in refused(Request("a", [7], None, steering=steering), info).message
