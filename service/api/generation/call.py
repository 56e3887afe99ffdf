"""The life of a call that the engine works for, whatever its route: its deadline, its place in the queue, its record,
the metrics, and its client, who may go away.

Routes say what they ask of the engine and what they write; everything they share is here, once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response

from service.api.generation.admission import Permit
from service.api.generation.choice import Delta, Generation
from service.api.generation.deadlines import deadline_of
from service.api.generation.sse import ClientGoneError, until_disconnect
from service.api.middleware.record import record_of
from service.api.schemas.fields import OneTextFields
from service.api.state import Service, new_id
from service.contract.request import Request, SamplingParams

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is there to read it


class Call:
    """One call, from the body that has been read to the end of its answer."""

    def __init__(
        self, http_request: HttpRequest, service: Service, prefix: str, body: OneTextFields | None = None
    ) -> None:
        """`prefix` is of its id; `body` may have a timeout. Raises InvalidRequestError for one above the server's."""
        self.service = service
        self.id = new_id(prefix)
        self.record = record_of(http_request.scope)
        self.deadline = deadline_of(self.record, body, service.settings.request_timeout)
        self._receive = http_request.receive

    def begin(self, sampling: SamplingParams | None, prompt_tokens: int | None = None) -> None:
        """The call has been checked: its record names it from now on."""
        self.record.model, self.record.response_id = self.service.info.model, self.id
        self.record.sampling, self.record.prompt_tokens = sampling, prompt_tokens

    def admit(self, requests: Sequence[Request], *, continued: bool = False) -> AbstractContextManager[Permit]:
        """A place in the queue, as Admission.admit gives it."""
        return self.service.admission.admit(requests, asyncio.get_running_loop().time(), continued=continued)

    async def deltas(self, generation: Generation) -> AsyncGenerator[list[Delta], None]:
        """The generated deltas, in lists of those that came together, while the queue's accounts, the metrics and the
        record are kept.
        """
        with self.admit(generation.requests) as permit:
            observer = Observer(self, generation, permit)
            try:
                async with aclosing(generation.deltas(self.deadline)) as stream:
                    async for together in stream:
                        observer.observe(together)
                        yield together
                observer.finish()
            finally:
                observer.close()

    async def answer(self, work: Coroutine[Any, Any, bytes], media_type: str = "application/json") -> Response:
        """The answer that `work` makes. When the client goes away, and at the deadline, the work ends."""
        try:
            content = await until_disconnect(self._receive, work, self.deadline)
        except ClientGoneError:
            self.record.outcome = "cancelled"
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return Response(content, media_type=media_type)


class Observer:
    """One generation's latencies, token counts and gate, as they happen: for the metrics and for the record."""

    def __init__(self, call: Call, generation: Generation, permit: Permit) -> None:
        self._metrics = call.service.metrics
        self._experts = [expert["name"] for expert in call.service.info.experts]
        self._generation = generation
        self._permit = permit
        self._record = call.record
        self._clock = asyncio.get_running_loop().time
        self._started = self._clock()
        self._last: dict[int, float] = {}  # by choice
        self._forwards: dict[int, int] = {}  # by choice: those that have been counted
        self._record.prompt_tokens = generation.prompt_tokens

    def observe(self, deltas: Sequence[Delta]) -> None:
        now = self._clock()
        tokens = forwards = 0
        gaps: list[float] = []
        for delta in deltas:
            last = self._last.get(delta.index)
            forwards += self._new_forwards(delta.index)
            if last is None:
                self._permit.started(self._generation.choices[delta.index].request.id)
            if delta.finish_reason is not None:
                self._permit.ended(now, self._generation.choices[delta.index].usage.queue_seconds)
            if delta.token is None:
                continue
            if not self._last:
                self._begin(now)
            if last is not None:
                gaps.append(now - last)
            self._last[delta.index] = now
            tokens += 1
        self._metrics.observe_tokens(tokens, gaps, forwards)

    def _new_forwards(self, index: int) -> int:
        """The forwards of a choice that have not been counted."""
        forwards = self._generation.choices[index].usage.forward_passes
        new, self._forwards[index] = forwards - self._forwards.get(index, 0), forwards
        return new

    def _begin(self, now: float) -> None:
        self._record.first_token_seconds = time.perf_counter() - self._record.started
        self._metrics.time_to_first_token.observe(now - self._started)
        self._metrics.prompt_tokens.inc(self._generation.prompt_tokens)

    def finish(self) -> None:
        generation, record = self._generation, self._record
        self._metrics.request_latency.observe(self._clock() - self._started)
        record.queue_seconds = min(choice.usage.queue_seconds for choice in generation.choices)
        self._metrics.queue_time.observe(record.queue_seconds)
        record.cached_tokens = generation.cached_tokens
        self._metrics.observe_cache(record.cached_tokens, generation.prompt_tokens)

    def close(self) -> None:
        """The generation has ended, perhaps early."""
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
