"""Prompts to texts, for the routes that only generate: from a body to the engine's requests, and from what the engine
makes of them to a document or to events.

The routes differ in their bodies and in their Writers (generate.py, openai.py).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Protocol

import orjson
from fastapi import Response

from service.api.gate_views.rows import RowFormat, join
from service.api.generation.call import Call
from service.api.generation.caller import Caller
from service.api.generation.choice import Delta, Generation
from service.api.generation.sse import DONE, EventStream
from service.api.generation.tokenizer import ModelTokenizer, draw_seed
from service.api.off_loop import off_loop
from service.api.schemas.answers import WithScalings, WithScalingsDelta
from service.api.schemas.fields import MAX_CHOICES, SamplingFields, XLoraFields
from service.api.schemas.steering import as_used, steering_of
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError
from service.contract.request import GrammarSpec, Request, SamplingParams

MAX_CALL_CHOICES = 16 * MAX_CHOICES  # prompts times n


class Run:
    """The prompts of one call, how they are sampled and steered, and what the engine makes of them."""

    def __init__(
        self,
        call: Caller,
        prompts: Sequence[list[int]],
        body: SamplingFields,
        xlora: XLoraFields,
        *,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        form: GrammarSpec | None = None,
        called: Sequence[str] = (),
    ) -> None:
        """Raises InvalidRequestError for what this model or this server cannot do; the engine hears nothing of it."""
        self.call = call
        self.id = call.id
        self.tokenizer = call.service.tokenizer
        self.info = call.service.info
        self.steering = as_used(xlora)
        self._wants_rows = xlora.return_scalings in ("mean", "full")
        self._row_format = RowFormat(self.info, xlora.scalings_dtype)
        self._row_events: set[int] = set()  # the choices that have had one
        self._sampling = _sampling(self.tokenizer, body, prompts, logprobs, prompt_logprobs, form)
        _check_rows_start(xlora, prompts)
        requests = [
            _request(f"{self.id}-{number}" if number else self.id, prompt, sampling, xlora, self.info)
            for number, (prompt, sampling) in enumerate(zip(prompts, self._sampling, strict=True))
        ]
        self.generation = Generation(
            call.service.client, self.tokenizer, requests, body.stop or [], self._row_format, called
        )

    @property
    def seed(self) -> int:
        return self._sampling[0].seed

    def scalings(self, index: int, deltas: Sequence[Delta]) -> WithScalings:
        """The `scalings` object of a whole answer's choice, where it is asked for."""
        if not self._wants_rows:
            return {}
        request = self.generation.choices[index].request
        start = len(request.prompt_token_ids) - 1 if request.scalings_start is None else request.scalings_start
        rows = join([delta.rows for delta in deltas if delta.rows is not None])
        return {"scalings": self._row_format.document(rows, start)}

    def scalings_delta(self, delta: Delta) -> WithScalingsDelta:
        """The `scalings` object of an event, where there are rows."""
        if delta.rows is None:
            return {}
        first = delta.index not in self._row_events
        self._row_events.add(delta.index)
        return {"scalings": self._row_format.delta(delta.rows, first)}

    def deltas(self) -> AsyncGenerator[list[Delta], None]:
        self.call.begin(self._sampling[0])
        return self.call.deltas(self.generation)


class Writer(Protocol):
    """A route's writer, which makes its answer of the deltas."""

    echoed_tokens: int  # prompt tokens that come back with each choice's first delta

    def event(self, delta: Delta) -> bytes:
        """One delta as one event."""

    def last_event(self) -> bytes:
        """The events between the last delta and [DONE]; may be none."""

    def document(self, deltas: Mapping[int, list[Delta]]) -> Mapping[str, object]:
        """The whole answer, from the deltas of each choice."""


async def respond(call: Call, run: Run, writer: Writer, stream: bool | None) -> Response:
    """The answer to one call, as a document or as events."""
    call.record.stream = bool(stream)
    if stream:
        return EventStream(_events(run, writer), call.deadline)
    return await call.answer(_whole(run, writer))


async def collected(run: Run) -> dict[int, list[Delta]]:
    """All deltas of a run, by choice."""
    deltas: dict[int, list[Delta]] = defaultdict(list)
    async with aclosing(run.deltas()) as stream:
        async for together in stream:
            for delta in together:
                deltas[delta.index].append(delta)
    return deltas


async def _whole(run: Run, writer: Writer) -> bytes:
    deltas = await collected(run)

    def document() -> bytes:
        return orjson.dumps(writer.document(deltas), option=orjson.OPT_SERIALIZE_NUMPY)

    return await off_loop(document, tokens=writer.echoed_tokens + sum(map(len, deltas.values())))


async def _events(run: Run, writer: Writer) -> AsyncGenerator[bytes, None]:
    async with aclosing(run.deltas()) as stream:
        async for together in stream:
            yield await off_loop(functools.partial(_joined, writer, together), tokens=writer.echoed_tokens)
    yield writer.last_event() + DONE


def _joined(writer: Writer, deltas: Sequence[Delta]) -> bytes:
    return b"".join([writer.event(delta) for delta in deltas])


def _sampling(
    tokenizer: ModelTokenizer,
    body: SamplingFields,
    prompts: Sequence[list[int]],
    logprobs: int | None,
    prompt_logprobs: int | None,
    form: GrammarSpec | None,
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
        tokenizer.sampling(seeded, len(prompt), logprobs=logprobs, prompt_logprobs=prompt_logprobs, form=form)
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
    """The engine's view of one prompt. Where nothing is generated, the prompt may be scored in its place."""
    scored = sampling.max_tokens == 0 and sampling.prompt_logprobs is not None and len(prompt) > 1
    frozen = xlora.gate.freeze_after if xlora.gate is not None and sampling.max_tokens else None
    return Request(
        id=id,
        prompt_token_ids=prompt,
        sampling=sampling,
        return_scalings=xlora.return_scalings or "none",
        scalings_start=xlora.scalings_start,
        cache_salt=xlora.cache_salt or "",
        freeze_after=frozen,
        steering=steering_of(xlora, info),
        score_from=1 if scored else None,
    )
