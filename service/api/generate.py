"""POST /generate: check the body, hand the request to the engine, write what comes back as JSON or as events."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Body, Depends, Response
from fastapi import Request as HttpRequest

from service.api.choice import Generation, Piece
from service.api.errors import documented
from service.api.examples import GENERATE_ANSWER, GENERATE_BODIES, GENERATE_EVENTS
from service.api.protocol import GenerateAnswer, GenerateBody
from service.api.rows import RowFormat, Rows, join
from service.api.security import OUTCOME_KEY
from service.api.sse import DONE, ClientGoneError, EventStream, event, until_disconnect
from service.api.state import Service, new_id, service_of
from service.api.text import TextCodec
from service.engine.request import Request, TokenOutput
from service.errors import InvalidRequestError
from service.metrics import Metrics

router = APIRouter(tags=["generation"])

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is there to read it


@router.post(
    "/generate",
    summary="Generate text, and see which experts wrote it",
    response_model=GenerateAnswer,
    responses={
        200: {
            "content": {
                "application/json": {"example": GENERATE_ANSWER},
                "text/event-stream": {"schema": {"type": "string"}, "example": GENERATE_EVENTS},
            }
        },
        **documented(400, 413, 500, 503),
    },
)
async def generate(
    http_request: HttpRequest,
    body: Annotated[GenerateBody, Body(openapi_examples=GENERATE_BODIES)],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """The scalings of a generated token are those of the position that produced it, its predecessor."""
    answer = await prepare(body, service)
    if body.stream:
        return EventStream(answer.events())
    try:
        content = await until_disconnect(http_request.receive, answer.whole())
    except ClientGoneError:
        http_request.scope[OUTCOME_KEY] = "cancelled"
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(content, media_type="application/json")


async def prepare(body: GenerateBody, service: Service) -> GenerateWriter:
    """Everything that can be wrong with a request is found here, before the engine hears of it."""
    codec = service.codec
    prompt_ids = await codec.prompt_ids(body.prompt)
    if body.scalings_start is not None and body.scalings_start >= len(prompt_ids):
        raise InvalidRequestError(
            f"scalings_start is {body.scalings_start}; the prompt has {len(prompt_ids)} tokens",
            param="scalings_start",
            hint=f"positions 0 to {len(prompt_ids) - 1} can be the first",
        )
    request = Request(
        id=new_id("gen"),
        prompt_token_ids=prompt_ids,
        sampling=codec.sampling(body, len(prompt_ids)),
        return_scalings=body.return_scalings or "none",
        scalings_start=body.scalings_start,
    )
    format = RowFormat(service.info, body.scalings_dtype)
    generation = Generation(service.client, codec, request, body.stop or [], format)
    return GenerateWriter(generation, codec, format, service.info.model, service.metrics)


class GenerateWriter:
    """Writes one generation, either way."""

    def __init__(
        self, generation: Generation, codec: TextCodec, format: RowFormat, model: str, metrics: Metrics
    ) -> None:
        self._generation = generation
        self._codec = codec
        self._format = format
        self._model = model
        self._observer = Observer(metrics, generation)
        request = generation.request
        self._wants_rows = request.return_scalings != "none"
        start = request.scalings_start
        self._rows_start = len(request.prompt_token_ids) - 1 if start is None else start
        self._named: set[int] = set()  # choices whose experts and sites have been named in an event

    async def whole(self) -> bytes:
        """The answer as one document."""
        pieces: dict[int, list[Piece]] = defaultdict(list)
        async with aclosing(self._pieces()) as stream:
            async for piece in stream:
                if piece is not None:
                    pieces[piece.index].append(piece)
        answer = self._head() | {
            "outputs": [self._output(choice.index, pieces[choice.index]) for choice in self._generation.choices],
            "usage": self._generation.usage(),
        }
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as events; the first item is empty and means that the engine has accepted the request."""
        async with aclosing(self._pieces()) as stream:
            async for piece in stream:
                yield b"" if piece is None else event(self._event(piece))
        yield event(self._head() | {"usage": self._generation.usage()}) + DONE

    async def _pieces(self) -> AsyncGenerator[Piece | None, None]:
        async with aclosing(self._generation.pieces()) as stream:
            async for piece in stream:
                if piece is not None:
                    self._observer.observe(piece)
                yield piece
        self._observer.finish()

    def _head(self) -> dict[str, Any]:
        generation = self._generation
        return {"id": generation.request.id, "model": self._model, "seed": generation.sampling.seed}

    def _output(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        tokens = [piece for piece in pieces if piece.token is not None]
        output: dict[str, Any] = {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "token_ids": [piece.token.id for piece in tokens if piece.token is not None],
            "tokens": [self._token(piece.token, piece.token_text) for piece in tokens if piece.token is not None],
            "finish_reason": pieces[-1].finish_reason if pieces else None,
        }
        if self._wants_rows:
            rows = join([piece.rows for piece in pieces if piece.rows is not None])
            output["scalings"] = self._format.document(rows, self._rows_start)
        return output

    def _event(self, piece: Piece) -> dict[str, Any]:
        """The same fields as an entry of `outputs`, with what this token added to each."""
        data: dict[str, Any] = {"id": self._generation.request.id, "index": piece.index, "text": piece.text}
        token = piece.token
        data["token_ids"] = [] if token is None else [token.id]
        data["tokens"] = [] if token is None else [self._token(token, piece.token_text)]
        data["finish_reason"] = piece.finish_reason
        if self._wants_rows and piece.rows is not None:
            rows: Rows = piece.rows
            data["scalings"] = self._format.document(rows, rows.start, names=piece.index not in self._named)
            self._named.add(piece.index)
        return data

    def _token(self, token: TokenOutput, text: str) -> dict[str, Any]:
        data: dict[str, Any] = {"id": token.id, "text": text}
        if token.logprob is not None:
            data["logprob"] = token.logprob
            data["top_logprobs"] = [
                {"id": id, "text": self._codec.token_text(id), "logprob": logprob} for id, logprob in token.top_logprobs
            ]
        return data


class Observer:
    """One request's latencies and token counts, observed as they happen."""

    def __init__(self, metrics: Metrics, generation: Generation) -> None:
        self._metrics = metrics
        self._generation = generation
        self._started = time.perf_counter()
        self._last: dict[int, float] = {}  # by choice

    def observe(self, piece: Piece) -> None:
        """One piece has come."""
        if piece.token is None:
            return
        now = time.perf_counter()
        if not self._last:
            self._metrics.time_to_first_token.observe(now - self._started)
            self._metrics.prompt_tokens.inc(len(self._generation.request.prompt_token_ids))
        if piece.index in self._last:
            self._metrics.inter_token_latency.observe(now - self._last[piece.index])
        self._last[piece.index] = now
        self._metrics.generated_tokens.inc()

    def finish(self) -> None:
        """The last piece has come."""
        self._metrics.request_latency.observe(time.perf_counter() - self._started)
        usages = [choice.usage for choice in self._generation.choices]
        self._metrics.queue_time.observe(min(usage.queue_seconds for usage in usages))
        cached = min(usage.cached_tokens for usage in usages)
        self._metrics.observe_cache(cached, len(self._generation.request.prompt_token_ids))
