"""POST /compare: one prompt under several gates, and how likely each finds what the others wrote.

Two rounds in the engine, each one batch amid everybody else's: the texts are generated, then every gate scores the
texts that it has not written itself.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import orjson
from fastapi import APIRouter, Body, Depends, Response
from fastapi import Request as HttpRequest

from service.api.gate_views.rows import RowFormat, join
from service.api.generation.call import Call
from service.api.generation.caller import Caller
from service.api.generation.choice import Delta, Generation
from service.api.generation.scaling_pass import MAX_WEIGHTS
from service.api.generation.scoring import log_probabilities, score_request
from service.api.middleware.json_body import JsonRoute
from service.api.openapi import GENERATION_ERRORS, documented
from service.api.schemas.answers import CompareAnswer, CompareOutput, LogLikelihood, WithScalings
from service.api.schemas.bodies import CompareBody, CompareSetting
from service.api.schemas.examples import COMPARE_ANSWER, COMPARE_BODIES
from service.api.schemas.steering import as_used, steering_of
from service.api.state import Service, service_of
from service.contract.checks import check_token_ids
from service.contract.errors import InvalidRequestError, TimedOutError
from service.contract.request import GrammarSpec, Request
from service.contract.steering import Steering

MAX_SCORED_TOKENS = 1 << 16  # of all settings over all outputs

router = APIRouter(tags=["generation"], route_class=JsonRoute)

_GateKey = tuple[Steering | None, int | None]  # equal gates judge equally
_ScoreKey = tuple[_GateKey, tuple[int, ...]]  # a gate's judgement of an output


@router.post(
    "/compare",
    summary="One prompt under several gates, each judged by all",
    response_model=CompareAnswer,
    responses={200: {"content": {"application/json": {"example": COMPARE_ANSWER}}}, **documented(*GENERATION_ERRORS)},
)
async def compare(
    http_request: HttpRequest,
    body: Annotated[CompareBody, Body(openapi_examples=COMPARE_BODIES)],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """Row i of `log_likelihood` is what setting i makes of the outputs: how likely they are under its gate."""
    call = Call(http_request, service, "cmp", body)
    return await call.answer(answer(body, call))


async def answer(body: CompareBody, call: Call) -> bytes:
    """The whole answer. Raises InvalidRequestError before anything is computed."""
    return orjson.dumps(await compared(body, call), option=orjson.OPT_SERIALIZE_NUMPY)


async def compared(body: CompareBody, call: Caller) -> CompareAnswer:
    """The answer as a document. Raises InvalidRequestError before anything is computed."""
    prompt = await call.service.tokenizer.prompt_ids(body.prompt)
    form = await call.service.forms.of(body.response_format)
    return await Comparison(call, body, prompt, form).run()


@dataclass(slots=True)
class Output:
    """The output that one setting wrote, or was given."""

    setting: CompareSetting
    gate: _GateKey
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None  # under its own gate; None until they are known
    deltas: list[Delta] = field(default_factory=list)

    @property
    def key(self) -> _ScoreKey:
        """Of its own gate's judgement."""
        return self.gate, tuple(self.ids)


class Comparison:
    """The settings of one call, checked, and what they make of each other."""

    def __init__(self, call: Caller, body: CompareBody, prompt: list[int], form: GrammarSpec | None) -> None:
        self._call, self._body, self._prompt = call, body, prompt
        self._service = service = call.service
        most = _max_tokens(body, len(service.info.sites) * len(service.info.experts))
        self._sampling = service.tokenizer.sampling(body, len(prompt), logprobs=0, form=form, most=most)
        self._format = RowFormat(service.info, body.scalings_dtype)
        self._outputs: list[Output] = []
        requests = []
        for number, setting in enumerate(body.settings):
            with _of_setting(number):
                request = self._request(number, setting)
                self._check_given(setting)
            self._outputs.append(Output(setting, (request.steering, request.freeze_after), setting.token_ids or []))
            if setting.token_ids is None:
                requests.append(request)
        self._check_sizes(len(requests))
        self._written = [output for output in self._outputs if output.setting.token_ids is None]
        stops = body.stop or []
        self._generation = Generation(service.client, service.tokenizer, requests, stops, self._format)

    async def run(self) -> CompareAnswer:
        """Generates, scores, and tells."""
        self._call.begin(self._sampling)
        if self._written:
            await self._generate()
        scores = await self._judge()
        for output in self._outputs:
            output.logprobs = scores.get(output.key)
        return {
            "id": self._call.id,
            "model": self._service.info.model,
            "seed": self._sampling.seed,
            "outputs": await asyncio.to_thread(self._documents),
            "log_likelihood": self._matrix(scores),
            "usage": {**self._generation.usage(), "scored_tokens": sum(map(len, scores.values()))},
        }

    async def _generate(self) -> None:
        async with aclosing(self._call.deltas(self._generation)) as stream:
            async for together in stream:
                for delta in together:
                    self._written[delta.index].deltas.append(delta)
        for output in self._written:
            tokens = [delta.token for delta in output.deltas if delta.token is not None]
            output.ids = [token.id for token in tokens]
            output.logprobs = [token.logprob or 0.0 for token in tokens]

    async def _judge(self) -> dict[_ScoreKey, list[float]]:
        """Log-probabilities of every output under every gate, each computed once; what the time was too short for is
        left out.
        """
        known = {one.key: one.logprobs for one in self._outputs if one.logprobs is not None}
        wanted = {(judge.gate, tuple(text.ids)) for judge in self._outputs for text in self._outputs if text.ids}
        keys = sorted(wanted - known.keys(), key=repr)
        requests = [self._score(f"{self._call.id}-score-{number}", key) for number, key in enumerate(keys)]
        try:
            with self._call.admit(requests, continued=bool(self._written)) as permit:
                found = await log_probabilities(self._service.client, requests, permit, self._call.deadline)
        except TimedOutError:
            if not self._written:
                raise
            return known
        return known | {key: found[request.id] for key, request in zip(keys, requests, strict=True)}

    def _score(self, id: str, key: _ScoreKey) -> Request:
        (steering, freeze_after), ids = key
        salt = self._body.cache_salt or ""
        tokens = [*self._prompt, *ids]
        return score_request(id, tokens, len(self._prompt), steering, freeze_after=freeze_after, cache_salt=salt)

    def _matrix(self, scores: dict[_ScoreKey, list[float]]) -> LogLikelihood:
        rows = [[scores.get((judge.gate, tuple(text.ids))) for text in self._outputs] for judge in self._outputs]
        sums = [[math.fsum(cell) if cell else None for cell in row] for row in rows]
        means = [[math.fsum(cell) / len(cell) if cell else None for cell in row] for row in rows]
        return {"sum": sums, "per_token": means}

    def _documents(self) -> list[CompareOutput]:
        return [self._document(index, output) for index, output in enumerate(self._outputs)]

    def _document(self, index: int, output: Output) -> CompareOutput:
        if output.setting.token_ids is None:
            texts = [delta.token_text for delta in output.deltas if delta.token is not None]
            text, finish_reason = "".join(delta.text for delta in output.deltas), output.deltas[-1].finish_reason
        else:
            texts = self._service.tokenizer.texts(output.ids)
            text, finish_reason = "".join(texts), None
        logprobs: Sequence[float | None] = output.logprobs or [None] * len(texts)
        return {
            "index": index,
            "label": output.setting.label,
            **as_used(output.setting),
            "text": text,
            "finish_reason": finish_reason,
            "token_ids": output.ids,
            "tokens": [
                {"id": id, "text": token_text, "logprob": logprob}
                for id, token_text, logprob in zip(output.ids, texts, logprobs, strict=True)
            ],
            **self._scalings(output),
        }

    def _scalings(self, output: Output) -> WithScalings:
        if self._body.return_scalings not in ("mean", "full") or output.setting.token_ids is not None:
            return {}
        rows = join([delta.rows for delta in output.deltas if delta.rows is not None])
        return {"scalings": self._format.document(rows, len(self._prompt) - 1)}

    def _request(self, number: int, setting: CompareSetting) -> Request:
        return Request(
            id=f"{self._call.id}-{number}" if number else self._call.id,
            prompt_token_ids=self._prompt,
            sampling=self._sampling,
            return_scalings=self._body.return_scalings or "none",
            cache_salt=self._body.cache_salt or "",
            freeze_after=setting.gate.freeze_after if setting.gate is not None else None,
            steering=steering_of(setting, self._service.info),
        )

    def _check_given(self, setting: CompareSetting) -> None:
        ids, most = setting.token_ids or [], self._service.info.max_model_len
        if len(self._prompt) + len(ids) > most:
            raise InvalidRequestError(
                f"prompt ({len(self._prompt)} tokens) and output ({len(ids)}) are over the context of {most} tokens",
                param="token_ids",
                code="context_length_exceeded",
            )
        check_token_ids(ids, "token_ids", self._service.info)

    def _check_sizes(self, written: int) -> None:
        info, settings = self._service.info, len(self._outputs)
        most = self._sampling.max_tokens if written else 0
        scored = settings * sum(len(output.ids) or most for output in self._outputs)
        if scored > MAX_SCORED_TOKENS:
            raise InvalidRequestError(
                f"{settings} settings over {settings} outputs are up to {scored} tokens to score; at most "
                f"{MAX_SCORED_TOKENS} are allowed",
                param="max_tokens" if written else "settings",
                code="too_large",
                hint=f"{'lower max_tokens' if written else 'give shorter outputs'}, or compare fewer settings",
            )
        weights = written * most * len(info.sites) * len(info.experts)
        if self._body.return_scalings == "full" and weights > MAX_WEIGHTS:
            raise InvalidRequestError(
                f"the scalings would have {weights} weights; at most {MAX_WEIGHTS} are allowed",
                param="return_scalings",
                code="too_large",
                hint='lower max_tokens, or ask for "mean"',
            )


def _max_tokens(body: CompareBody, weights_of_token: int) -> int:
    """The longest outputs that are within the bounds of a call: what a caller gets who does not say."""
    settings = len(body.settings)
    given = sum(len(setting.token_ids or ()) for setting in body.settings)
    written = max(1, sum(setting.token_ids is None for setting in body.settings))
    most = (MAX_SCORED_TOKENS // settings - given) // written
    if body.return_scalings == "full":
        most = min(most, MAX_WEIGHTS // (written * weights_of_token))
    return most


@contextmanager
def _of_setting(number: int) -> Iterator[None]:
    """Ascribes errors inside to one of the settings."""
    try:
        yield
    except InvalidRequestError as error:
        error.param = f"settings[{number}].{error.param}"
        raise
