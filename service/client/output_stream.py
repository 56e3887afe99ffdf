"""The engine's outputs about some requests, as their reader in the API process waits for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from service.contract.errors import XLoraError
from service.contract.output import SequenceOutput
from service.contract.request import Request


class OutputStream(AsyncIterator[SequenceOutput]):
    """The engine's outputs about some requests, as they come; ends after the last choice has ended.

    The reader wakes up once for all that one step brought: `ready` gives what else is there beside an iteration's item.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self._loop = asyncio.get_running_loop()
        self.open_choices = {(one.id, index) for one in requests for index in range(one.num_choices)}
        self._news: deque[SequenceOutput] = deque()
        self._error: XLoraError | None = None  # comes after the news
        self._reader: asyncio.Future[None] | None = None  # waits for news

    def deliver(self, output: SequenceOutput) -> None:
        """One more output, unless its choice was aborted meanwhile."""
        choice = (output.request_id, output.index)
        if choice not in self.open_choices:
            return
        if output.finish_reason is not None:
            self.open_choices.discard(choice)
        self._news.append(output)
        self._wake()

    def fail(self, error: XLoraError) -> None:
        """Nothing more will come, and this is why. Who has heard the end of every choice is not told."""
        if self.open_choices and self._error is None:
            self._error = error
        self._wake()

    def drop(self, request_id: str, index: int | None = None) -> None:
        """The reader wants no more of a request, or of one of its choices; the engine has nothing more to say."""

        def unwanted(id: str, number: int) -> bool:
            return id == request_id and index in (None, number)

        self.open_choices = {choice for choice in self.open_choices if not unwanted(*choice)}
        self._news = deque(output for output in self._news if not unwanted(output.request_id, output.index))
        self._wake()

    def ready(self) -> list[SequenceOutput]:
        """The outputs that have come and were not read yet; does not wait."""
        news = list(self._news)
        self._news.clear()
        return news

    async def __anext__(self) -> SequenceOutput:
        while not self._news:
            if self._error is not None:
                raise self._error
            if not self.open_choices:
                raise StopAsyncIteration
            self._reader = self._loop.create_future()
            await self._reader
        return self._news.popleft()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
