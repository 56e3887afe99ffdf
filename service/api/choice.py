"""One choice of one request: what the engine says about it becomes text, tokens and scalings.

This file knows no HTTP and no JSON; streams, whole answers and the command line are made of its `Piece`s.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Iterator
from dataclasses import dataclass

from service.api.rows import RowBuffer, RowFormat, Rows
from service.api.text import TextCodec
from service.engine.client import Client
from service.engine.detokenizer import StopStrings
from service.engine.request import EngineInfo, Request, SequenceOutput, SequenceUsage, TokenOutput
from service.errors import InternalError


@dataclass(slots=True)
class Piece:
    """What one token, or the end without a token, brought a choice."""

    index: int
    text: str  # to append to the choice's text; "" while a character or a stop string is undecided
    token: TokenOutput | None = None
    token_text: str = ""  # the token's own text, whatever is held back
    rows: Rows | None = None  # up to the position that produced the token
    finish_reason: str | None = None


class Choice:
    """The state of one choice."""

    def __init__(
        self, index: int, request: Request, codec: TextCodec, stops: list[str], ends: Collection[int], format: RowFormat
    ) -> None:
        self.index = index
        self.tokens = 0
        self.usage = SequenceUsage()
        self.stopped = False  # by a stop string: the engine does not know
        self._ends = ends
        self._prompt_tokens = len(request.prompt_token_ids)
        self._detokenizer = codec.detokenizer(request.prompt_token_ids)
        self._codec = codec
        self._stops = StopStrings(stops)
        self._rows = RowBuffer(format)

    def accept(self, output: SequenceOutput) -> Iterator[Piece]:
        """One piece per token, and one without a token when the end came alone."""
        if output.gate is not None:
            self._rows.add(output.gate)
        if output.usage is not None:
            self.usage = output.usage
        if output.finish_reason == "error":
            raise InternalError(output.error or "the engine could not go on with this request")
        last = len(output.tokens) - 1
        for position, token in enumerate(output.tokens):
            piece = self._piece(token, output.finish_reason if position == last else None)
            yield piece
            if self.stopped:
                return
        if last < 0 and output.finish_reason is not None:
            text = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
            yield Piece(self.index, text, finish_reason=output.finish_reason)

    def _piece(self, token: TokenOutput, reason: str | None) -> Piece:
        self.tokens += 1
        if reason == "stop" and token.id in self._ends:  # its text is not part of the text
            visible, own = self._detokenizer.flush(), self._codec.token_text(token.id)
        else:
            visible, own = self._detokenizer.push(token.id), ""
            if reason is not None:
                visible += self._detokenizer.flush()
        text = self._stops.push(visible)
        if self._stops.found:
            self.stopped, reason = True, "stop"
        elif reason is not None:
            text += self._stops.flush()
        rows = self._rows.take(self._prompt_tokens - 2 + self.tokens)
        return Piece(self.index, text, token, visible + own, rows, reason)


class Generation:
    """One generating request from submission to its last piece; leaving `pieces` early aborts it."""

    def __init__(self, client: Client, codec: TextCodec, request: Request, stops: list[str], format: RowFormat) -> None:
        if request.sampling is None:
            raise ValueError("a request without sampling generates nothing")
        self.request = request
        self.sampling = request.sampling
        ends = ends_of(client.info, request)
        self.choices = [Choice(index, request, codec, stops, ends, format) for index in range(request.sampling.n)]
        self._client = client

    async def pieces(self) -> AsyncGenerator[Piece | None, None]:
        """None once the engine has accepted the request, then every piece as it comes."""
        async with self._client.submit(self.request) as outputs:
            yield None
            async for output in outputs:
                choice = self.choices[output.index]
                for piece in choice.accept(output):
                    yield piece
                if choice.stopped and output.finish_reason is None:
                    self._client.abort(self.request.id, output.index)

    def usage(self) -> dict[str, object]:
        """The `usage` object. cached_tokens counts what no choice of this request had to compute."""
        usages = [choice.usage for choice in self.choices]
        return {
            "prompt_tokens": len(self.request.prompt_token_ids),
            "completion_tokens": sum(choice.tokens for choice in self.choices),
            "cached_tokens": min(usage.cached_tokens for usage in usages),
            "forward_passes": sum(usage.forward_passes for usage in usages),
            "scaling_rows": sum(usage.scaling_rows for usage in usages),
            "real_rows": sum(usage.real_rows for usage in usages),
            "lookahead": {
                "hits": sum(usage.draft_hits for usage in usages),
                "misses": sum(usage.draft_misses for usage in usages),
            },
        }


def ends_of(info: EngineInfo, request: Request) -> Collection[int]:
    """The tokens that end this request's choices."""
    assert request.sampling is not None
    return {*request.sampling.stop_token_ids, *(() if request.sampling.ignore_eos else info.eos_token_ids)}
