"""XLora against the HTTP routes over the same engine: the same text, tokens, numbers and errors."""

from __future__ import annotations

import asyncio
import base64
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from service import XLora
from service.api.app import create_app
from service.contract.errors import InvalidRequestError
from service.contract.options import EngineOptions
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.bundles import make_bundle

Post = Callable[[str, dict[str, Any]], dict[str, Any]]
STEERED = {"experts": {"exclude": ["beta"]}, "gate": {"temperature": 0.5, "freeze_after": 3}}


class Shared:
    """The client of an XLora, as an application sees one that has been started already."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def start(self, options: EngineOptions, on_progress: Callable[[str], None]) -> None:
        """It runs."""

    async def close(self) -> None:
        """It is another's."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XLora]:
    bundle = make_bundle(tmp_path_factory.mktemp("library") / "tiny", xlora={"layerwise_scalings": True})
    with XLora(str(bundle), threads=1, native_kernels=False, progress=False) as model:
        yield model


@pytest.fixture(scope="module")
def post(model: XLora) -> Iterator[Post]:
    """Asks an application over the model's own engine, on the model's own loop."""
    app = create_app(Shared(model._session.client), Settings(), Metrics(CollectorRegistry()))
    lifespan = app.router.lifespan_context(app)
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")

    async def ready() -> None:
        await lifespan.__aenter__()
        while not app.state.service.ready:
            await asyncio.sleep(0.01)

    async def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        return (await http.post(path, json=body)).json()

    async def end() -> None:
        await http.aclose()
        await lifespan.__aexit__(None, None, None)

    model._loop.run(ready())
    yield lambda path, body: model._loop.run(ask(path, body))
    model._loop.run(end())


def full_of(scalings: dict[str, Any]) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(scalings["full"])))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "seed": 1, "scalings_start": 0},
        {"seed": 7, "n": 2, "logprobs": 2, "scalings_dtype": "float16", **STEERED},
        {"seed": 3, "response_format": {"type": "regex", "pattern": "[a-z]{3,9}"}},
    ],
)
def test_generate(model: XLora, post: Post, fields: dict[str, Any]) -> None:
    fields = {"max_tokens": 12, "return_scalings": "full", **fields}
    wanted = post("/generate", {"prompt": "the cat", **fields})
    found = model.generate("the cat", **fields)
    assert (found.seed, found.model) == (wanted["seed"], wanted["model"])
    assert dict(found.steering) == {name: wanted[name] for name in ("experts", "gate") if name in wanted}
    assert found.usage["completion_tokens"] == wanted["usage"]["completion_tokens"]
    for output, one in zip(found.outputs, wanted["outputs"], strict=True):
        assert (output.text, list(output.token_ids), output.finish_reason) == (
            one["text"],
            one["token_ids"],
            one["finish_reason"],
        )
        assert [token.text for token in output.tokens] == [token["text"] for token in one["tokens"]]
        assert output.gate is not None
        np.testing.assert_allclose(output.gate.full, full_of(one["scalings"]), atol=1e-6)
        np.testing.assert_allclose(output.gate.mean, one["scalings"]["mean"], atol=1e-6)
        assert output.gate.full.dtype == full_of(one["scalings"]).dtype
        assert (output.gate.start, list(output.gate.sites)) == (one["scalings"]["start"], one["scalings"]["sites"])
        if "logprobs" in fields:
            for token, other in zip(output.tokens, one["tokens"], strict=True):
                assert token.logprob == pytest.approx(other["logprob"], abs=1e-5)
                assert [best.text for best in token.top_logprobs] == [best["text"] for best in other["top_logprobs"]]


def test_many_prompts_have_the_answers_of_each_alone(model: XLora, post: Post) -> None:
    prompts = [f"number {number}" for number in range(30)]
    wanted = [post("/generate", {"prompt": one, "seed": 5, "max_tokens": 6})["outputs"][0] for one in prompts]
    found = list(model.generate(prompts, seed=5, max_tokens=6))
    assert [list(one.token_ids) for one in found] == [one["token_ids"] for one in wanted]
    assert [one.text for one in found] == [one["text"] for one in wanted]


@pytest.mark.parametrize(
    "fields",
    [
        {"return_scalings": "full", "select": {"start": 1, "experts": ["beta"]}},
        {"perplexity": True},
        {"granularity": "module_type"},
    ],
)
def test_scalings(model: XLora, post: Post, fields: dict[str, Any]) -> None:
    wanted = post("/scalings", {"prompt": "the cat sat", **fields})
    found = model.scalings("the cat sat", **fields)
    assert [list(found.token_ids), list(found.token_texts)] == [
        [token[name] for token in wanted["tokens"]] for name in ("id", "text")
    ]
    if "scalings" in wanted:
        np.testing.assert_allclose(found.gate.mean, wanted["scalings"]["mean"], atol=1e-6)
        assert list(found.gate.experts) == wanted["scalings"]["experts"]
    if "full" in wanted.get("scalings", {}):
        np.testing.assert_allclose(found.scalings, full_of(wanted["scalings"]), atol=1e-6)
    if "groups" in wanted:
        assert found.groups is not None
        np.testing.assert_allclose(found.groups.mean, wanted["groups"]["mean"], atol=1e-6)
        assert list(found.groups.names) == wanted["groups"]["names"]
    if "perplexity" in wanted:
        assert found.perplexity["base"] == pytest.approx(wanted["perplexity"]["base"]["perplexity"], rel=1e-4)
        assert math.isnan(found.logprobs["xlora"][0])
        np.testing.assert_allclose(
            found.logprobs["xlora"][1:], wanted["perplexity"]["xlora"]["logprobs"][1:], rtol=1e-4
        )


def test_compare(model: XLora, post: Post) -> None:
    settings = [{}, {"label": "base", "experts": {"only": []}}]
    body = {"prompt": "the cat", "settings": settings, "seed": 2, "max_tokens": 5, "return_scalings": "full"}
    wanted = post("/compare", body)
    found = model.compare("the cat", settings, seed=2, max_tokens=5, scalings="full")
    assert [one.text for one in found.outputs] == [one["text"] for one in wanted["outputs"]]
    assert [one.label for one in found.outputs] == [None, "base"]
    np.testing.assert_allclose(found.log_likelihood, wanted["log_likelihood"]["sum"], rtol=1e-4)
    np.testing.assert_allclose(found.log_likelihood_per_token, wanted["log_likelihood"]["per_token"], rtol=1e-4)
    assert found.outputs[0].gate is not None
    np.testing.assert_allclose(found.outputs[0].gate.full, full_of(wanted["outputs"][0]["scalings"]), atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 9},
        {"nonsense": 1},
        {"experts": {"only": ["alhpa"]}},
        {"max_tokens": 10**6},
        {"prompt": []},
        {"response_format": {"type": "regex", "pattern": "("}},
        {"scalings_start": 99, "return_scalings": "mean"},
    ],
)
def test_errors(model: XLora, post: Post, fields: dict[str, Any]) -> None:
    wanted = post("/generate", {"prompt": "the cat", **fields})["error"]
    with pytest.raises(InvalidRequestError) as caught:
        model.generate({"prompt": "the cat", **fields})
    error = caught.value
    assert (error.message, error.param, error.code, error.hint) == (
        wanted["message"],
        wanted["param"],
        wanted["code"],
        wanted.get("hint"),
    )
