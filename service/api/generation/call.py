"""One generating call, whatever its route: admitted, timed, observed, and written as a document or as events.

The routes differ in their bodies and in their Writers (generate.py, openai.py); everything between is here, once.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import orjson
from fastapi import Request as HttpRequest
from fastapi import Response

from service.api.gate_views.rows import RowFormat, join
from service.api.generation.admission import Ticket
from service.api.generation.choice import Generation, Piece
from service.api.generation.sse import DONE, ClientGoneError, EventStream, until_disconnect
from service.api.generation.tokenizer import draw_seed
from service.api.middleware.record import RequestRecord, record_of
from service.api.off_loop import off_loop
from service.api.schemas.fields import MAX_CHOICES, SamplingFields, XLoraFields
from service.api.schemas.steering import as_used, steering_of
from service.api.state import Service
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError
from service.contract.request import Request, SamplingParams, TextForm

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is there to read it
MAX_CALL_CHOICES = 16 * MAX_CHOICES  # prompts times n


class Run:
    """One call: its prompts, the caller's wishes, and what the engine makes of them."""

    def __init__(
        self,
        service: Service,
        id: str,
        prompts: Sequence[list[int]],
        body: SamplingFields,
        xlora: XLoraFields,
        *,
        deadline: float,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        form: TextForm | None = None,
    ) -> None:
        """Raises InvalidRequestError for what this model or this server cannot do; the engine hears nothing of it."""
        self.id = id
        self.deadline = deadline
        self.codec = service.codec
        self.info = service.info
        self.steering = as_used(xlora)
        self.row_format = RowFormat(service.info, xlora.scalings_dtype)
        self.wants_rows = xlora.return_scalings in ("mean", "full")
        self.sampling = _sampling(service, body, prompts, logprobs, prompt_logprobs, form)
        _check_rows_start(xlora, prompts)
        requests = [
            _request(f"{id}-{number}" if number else id, prompt, sampling, xlora, service.info)
            for number, (prompt, sampling) in enumerate(zip(prompts, self.sampling, strict=True))
        ]
        self.generation = Generation(service.client, self.codec, requests, body.stop or [], self.row_format)
        self._service = service

    @property
    def seed(self) -> int:
        """The seed of every prompt."""
        return self.sampling[0].seed

    def rows_start(self, index: int) -> int:
        """The position of the first row that a choice reports."""
        request = self.generation.choices[index].request
        start = request.scalings_start
        return len(request.prompt_token_ids) - 1 if start is None else start

    async def pieces(self, record: RequestRecord) -> AsyncGenerator[list[Piece], None]:
        """Lists of pieces that came together, while the queue's accounts, the metrics and the record are kept."""
        service, generation = self._service, self.generation
        record.model, record.response_id, record.sampling = self.info.model, self.id, self.sampling[0]
        with service.admission.admit(generation.requests, asyncio.get_running_loop().time()) as ticket:
            observer = Observer(service, generation, ticket, record)
            try:
                async with aclosing(generation.pieces(self.deadline)) as stream:
                    async for together in stream:
                        observer.observe(together)
                        yield together
                observer.finish()
            finally:
                observer.close()


class Writer(Protocol):
    """What a route makes of the pieces."""

    echoed_tokens: int  # prompt tokens that come back with each choice's first piece

    def event(self, piece: Piece) -> bytes:
        """One piece as one event."""

    def last_event(self) -> bytes:
        """What follows the last piece, before [DONE]; may be nothing."""

    def document(self, pieces: Mapping[int, list[Piece]]) -> dict[str, Any]:
        """The whole answer, from the pieces of each choice."""


async def respond(http_request: HttpRequest, run: Run, writer: Writer, stream: bool | None) -> Response:
    """The answer to one call; when the client goes away, and at the deadline, the engine's work on it ends."""
    record = record_of(http_request.scope)
    record.stream = bool(stream)
    if stream:
        return EventStream(_events(run, writer, record), run.deadline)
    try:
        content = await until_disconnect(http_request.receive, _whole(run, writer, record), run.deadline)
    except ClientGoneError:
        record.outcome = "cancelled"
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(content, media_type="application/json")


async def _whole(run: Run, writer: Writer, record: RequestRecord) -> bytes:
    pieces: dict[int, list[Piece]] = defaultdict(list)
    async with aclosing(run.pieces(record)) as stream:
        async for together in stream:
            for piece in together:
                pieces[piece.index].append(piece)

    def document() -> bytes:
        return orjson.dumps(writer.document(pieces), option=orjson.OPT_SERIALIZE_NUMPY)

    return await off_loop(document, tokens=writer.echoed_tokens + sum(map(len, pieces.values())))


async def _events(run: Run, writer: Writer, record: RequestRecord) -> AsyncGenerator[bytes, None]:
    async with aclosing(run.pieces(record)) as stream:
        async for together in stream:
            yield await off_loop(functools.partial(_joined, writer, together), tokens=writer.echoed_tokens)
    yield writer.last_event() + DONE


def _joined(writer: Writer, pieces: Sequence[Piece]) -> bytes:
    return b"".join([writer.event(piece) for piece in pieces])


class Observer:
    """One call's latencies, token counts and gate, as they happen: for the metrics and for the record."""

    def __init__(self, service: Service, generation: Generation, ticket: Ticket, record: RequestRecord) -> None:
        self._metrics = service.metrics
        self._experts = [expert["name"] for expert in service.info.experts]
        self._generation = generation
        self._ticket = ticket
        self._record = record
        self._clock = asyncio.get_running_loop().time
        self._started = self._clock()
        self._last: dict[int, float] = {}  # by choice
        record.prompt_tokens = generation.prompt_tokens

    def observe(self, pieces: Sequence[Piece]) -> None:
        """Some pieces have come, at once."""
        now = self._clock()
        tokens = 0
        gaps: list[float] = []
        for piece in pieces:
            last = self._last.get(piece.index)
            if last is None:
                self._ticket.started(self._generation.choices[piece.index].request.id)
            if piece.finish_reason is not None:
                self._ticket.ended(now, self._generation.choices[piece.index].usage.queue_seconds)
            if piece.token is None:
                continue
            if not self._last:
                self._begin(now)
            if last is not None:
                gaps.append(now - last)
            self._last[piece.index] = now
            tokens += 1
        self._metrics.observe_tokens(tokens, gaps)

    def _begin(self, now: float) -> None:
        """The first token of all has come."""
        self._record.first_token_seconds = time.perf_counter() - self._record.started
        self._metrics.time_to_first_token.observe(now - self._started)
        self._metrics.prompt_tokens.inc(self._generation.prompt_tokens)

    def finish(self) -> None:
        """The last piece has come."""
        generation, record = self._generation, self._record
        self._metrics.request_latency.observe(self._clock() - self._started)
        record.queue_seconds = min(choice.usage.queue_seconds for choice in generation.choices)
        self._metrics.queue_time.observe(record.queue_seconds)
        record.cached_tokens = generation.cached_tokens
        self._metrics.observe_cache(record.cached_tokens, generation.prompt_tokens)

    def close(self) -> None:
        """The call has ended, perhaps early."""
        record = self._record
        record.completion_tokens = self._generation.completion_tokens
        record.finish_reasons = [choice.finish_reason for choice in self._generation.choices]
        if "timeout" in record.finish_reasons:
            record.outcome = "timeout"
        usages = [choice.usage for choice in self._generation.choices]
        positions = sum(usage.gate_positions for usage in usages)
        if positions:
            record.gate_entropy_nats = sum(usage.gate_entropy_sum for usage in usages) / positions
            known = [usage.gate_share_sum for usage in usages if usage.gate_positions]
            shares = [sum(column) for column in zip(*known, strict=True)]
            record.top_expert = self._experts[max(range(len(shares)), key=shares.__getitem__)]


def scalings_of(run: Run, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The `scalings` object of a whole answer's choice."""
    rows = join([piece.rows for piece in pieces if piece.rows is not None])
    return run.row_format.document(rows, run.rows_start(index))


class RowEvents:
    """The `scalings` object of events: experts and sites are named in the first of each choice only."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._named: set[int] = set()

    def of(self, piece: Piece) -> dict[str, Any] | None:
        """What this piece adds; None when nothing, as when nobody asked."""
        if piece.rows is None:
            return None
        document = self._run.row_format.document(piece.rows, piece.rows.start, names=piece.index not in self._named)
        self._named.add(piece.index)
        return document


def _sampling(
    service: Service,
    body: SamplingFields,
    prompts: Sequence[list[int]],
    logprobs: int | None,
    prompt_logprobs: int | None,
    form: TextForm | None,
) -> list[SamplingParams]:
    """The parameters of each prompt: they differ in max_tokens alone, where that is what still fits."""
    if len(prompts) * (body.n or 1) > MAX_CALL_CHOICES:
        raise InvalidRequestError(
            f"{len(prompts)} prompts with n={body.n} are {len(prompts) * (body.n or 1)} choices; "
            f"at most {MAX_CALL_CHOICES} are allowed",
            param="n",
        )
    seeded = body.model_copy(update={"seed": draw_seed() if body.seed is None else body.seed})
    return [
        service.codec.sampling(seeded, len(prompt), logprobs=logprobs, prompt_logprobs=prompt_logprobs, form=form)
        for prompt in prompts
    ]


def _check_rows_start(xlora: XLoraFields, prompts: Sequence[list[int]]) -> None:
    shortest = min(len(prompt) for prompt in prompts)
    if xlora.scalings_start is not None and xlora.scalings_start >= shortest:
        raise InvalidRequestError(
            f"scalings_start is {xlora.scalings_start}; the prompt has {shortest} tokens",
            param="scalings_start",
            hint=f"positions 0 to {shortest - 1} can be the first",
        )


def _request(id: str, prompt: list[int], sampling: SamplingParams, xlora: XLoraFields, info: EngineInfo) -> Request:
    """The engine's view of one prompt."""
    return Request(
        id=id,
        prompt_token_ids=prompt,
        sampling=sampling,
        return_scalings=xlora.return_scalings or "none",
        scalings_start=xlora.scalings_start,
        cache_salt=xlora.cache_salt or "",
        freeze_after=xlora.gate.freeze_after if xlora.gate is not None else None,
        steering=steering_of(xlora, info),
    )
