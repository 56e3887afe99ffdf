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
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Body, Depends, Response
from fastapi import Request as HttpRequest

from service.api.errors import GENERATION_ERRORS, documented
from service.api.gate_views.rows import RowFormat, join
from service.api.generation.call import CLIENT_CLOSED_REQUEST, Observer
from service.api.generation.choice import Generation, Piece
from service.api.generation.deadlines import deadline_of
from service.api.generation.scoring import log_probabilities, score_request
from service.api.generation.sse import ClientGoneError, until_disconnect
from service.api.generation.tokenizer import draw_seed
from service.api.middleware.json_body import JsonRoute
from service.api.middleware.record import RequestRecord, record_of
from service.api.routes.scalings import MAX_WEIGHTS
from service.api.schemas.answers import CompareAnswer
from service.api.schemas.bodies import CompareBody, CompareSetting
from service.api.schemas.examples import COMPARE_ANSWER, COMPARE_BODIES
from service.api.schemas.steering import as_used, steering_of
from service.api.state import Service, new_id, service_of
from service.contract.checks import check_token_ids, checked_steering
from service.contract.errors import InvalidRequestError, TimedOutError
from service.contract.request import Request, TextForm
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
    record = record_of(http_request.scope)
    deadline = deadline_of(record, body, service.settings.request_timeout)
    try:
        content = await until_disconnect(http_request.receive, answer(body, service, record, deadline), deadline)
    except ClientGoneError:
        record.outcome = "cancelled"
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(content, media_type="application/json")


async def answer(body: CompareBody, service: Service, record: RequestRecord, deadline: float) -> bytes:
    """The whole answer. Raises InvalidRequestError before anything is computed."""
    prompt = await service.codec.prompt_ids(body.prompt)
    form = await service.forms.of(body.response_format)
    comparison = Comparison(service, body, prompt, form)
    document = await comparison.run(record, deadline)
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


@dataclass(slots=True)
class Output:
    """What one setting wrote, or was given."""

    setting: CompareSetting
    gate: _GateKey
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None  # under its own gate; None until they are known
    pieces: list[Piece] = field(default_factory=list)

    @property
    def key(self) -> _ScoreKey:
        """Of its own gate's judgement."""
        return self.gate, tuple(self.ids)


class Comparison:
    """One call, checked."""

    def __init__(self, service: Service, body: CompareBody, prompt: list[int], form: TextForm | None) -> None:
        self._service, self._body, self._prompt = service, body, prompt
        self._id = new_id("cmp")
        seeded = body.model_copy(update={"seed": draw_seed() if body.seed is None else body.seed})
        self._sampling = service.codec.sampling(seeded, len(prompt), logprobs=0, form=form)
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
        self._generation = Generation(service.client, service.codec, requests, stops, self._format)

    async def run(self, record: RequestRecord, deadline: float) -> dict[str, Any]:
        """Generates, scores, and tells."""
        record.model, record.response_id, record.sampling = self._service.info.model, self._id, self._sampling
        if self._written:
            await self._generate(record, deadline)
        scores = await self._judge(deadline)
        for output in self._outputs:
            output.logprobs = scores.get(output.key)
        return {
            "id": self._id,
            "model": self._service.info.model,
            "seed": self._sampling.seed,
            "outputs": await asyncio.to_thread(self._documents),
            "log_likelihood": self._matrix(scores),
            "usage": {
                "prompt_tokens": self._generation.prompt_tokens,
                "completion_tokens": self._generation.completion_tokens,
                "cached_tokens": self._generation.cached_tokens,
                "scored_tokens": sum(map(len, scores.values())),
                **self._generation.cost(),
            },
        }

    async def _generate(self, record: RequestRecord, deadline: float) -> None:
        service, generation = self._service, self._generation
        with service.admission.admit(generation.requests, asyncio.get_running_loop().time()) as ticket:
            observer = Observer(service, generation, ticket, record)
            try:
                async with aclosing(generation.pieces(deadline)) as stream:
                    async for pieces in stream:
                        observer.observe(pieces)
                        for piece in pieces:
                            self._written[piece.index].pieces.append(piece)
                observer.finish()
            finally:
                observer.close()
        for output in self._written:
            tokens = [piece.token for piece in output.pieces if piece.token is not None]
            output.ids = [token.id for token in tokens]
            output.logprobs = [token.logprob or 0.0 for token in tokens]

    async def _judge(self, deadline: float) -> dict[_ScoreKey, list[float]]:
        """Log-probabilities of every output under every gate, each computed once; what the time was too short for is
        left out.
        """
        known = {one.key: one.logprobs for one in self._outputs if one.logprobs is not None}
        wanted = {(judge.gate, tuple(text.ids)) for judge in self._outputs for text in self._outputs if text.ids}
        keys = sorted(wanted - known.keys(), key=repr)
        requests = [self._score(f"{self._id}-score-{number}", key) for number, key in enumerate(keys)]
        try:
            now = asyncio.get_running_loop().time()
            with self._service.admission.admit(requests, now, continued=bool(self._written)) as ticket:
                found = await log_probabilities(self._service.client, requests, ticket, deadline)
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

    def _matrix(self, scores: dict[_ScoreKey, list[float]]) -> dict[str, Any]:
        rows = [[scores.get((judge.gate, tuple(text.ids))) for text in self._outputs] for judge in self._outputs]
        sums = [[math.fsum(cell) if cell else None for cell in row] for row in rows]
        means = [[math.fsum(cell) / len(cell) if cell else None for cell in row] for row in rows]
        return {"sum": sums, "per_token": means}

    def _documents(self) -> list[dict[str, Any]]:
        return [self._document(index, output) for index, output in enumerate(self._outputs)]

    def _document(self, index: int, output: Output) -> dict[str, Any]:
        codec = self._service.codec
        document: dict[str, Any] = {"index": index, "label": output.setting.label, **as_used(output.setting)}
        if output.setting.token_ids is None:
            texts = [piece.token_text for piece in output.pieces if piece.token is not None]
            document["text"] = "".join(piece.text for piece in output.pieces)
            document["finish_reason"] = output.pieces[-1].finish_reason
        else:
            texts = codec.pieces(output.ids)
            document |= {"text": "".join(texts), "finish_reason": None}
        logprobs: Sequence[float | None] = output.logprobs or [None] * len(texts)
        document["token_ids"] = output.ids
        document["tokens"] = [
            {"id": id, "text": text, "logprob": logprob}
            for id, text, logprob in zip(output.ids, texts, logprobs, strict=True)
        ]
        if self._body.return_scalings in ("mean", "full") and output.setting.token_ids is None:
            rows = join([piece.rows for piece in output.pieces if piece.rows is not None])
            document["scalings"] = self._format.document(rows, len(self._prompt) - 1)
        return document

    def _request(self, number: int, setting: CompareSetting) -> Request:
        return Request(
            id=f"{self._id}-{number}" if number else self._id,
            prompt_token_ids=self._prompt,
            sampling=self._sampling,
            return_scalings=self._body.return_scalings or "none",
            cache_salt=self._body.cache_salt or "",
            freeze_after=setting.gate.freeze_after if setting.gate is not None else None,
            steering=checked_steering(steering_of(setting, self._service.info), self._service.info),
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


@contextmanager
def _of_setting(number: int) -> Iterator[None]:
    """What is wrong inside is wrong with one of the settings."""
    try:
        yield
    except InvalidRequestError as error:
        error.param = f"settings[{number}].{error.param}"
        raise
