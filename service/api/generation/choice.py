"""One choice of one request: what the engine says about it becomes text, tokens and scalings.

This file knows no HTTP and no JSON; streams, whole answers and the command line are made of its `Delta`s.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from service.api.gate_views.rows import RowBuffer, RowFormat, Rows
from service.api.generation.stop_strings import Patterns, StopStrings
from service.api.generation.tokenizer import ModelTokenizer
from service.api.generation.tool_calls import CallReader
from service.api.schemas.answers import Cost, DraftsAtDepth, Usage
from service.api.structured_output.keywords import FORMAT, code_of
from service.client.engine_client import Client
from service.contract.engine_info import EngineInfo
from service.contract.errors import InternalError, InvalidRequestError, TimedOutError
from service.contract.output import DraftCounts, SequenceOutput, SequenceUsage, TokenOutput
from service.contract.request import Request


@dataclass(slots=True)
class Delta:
    """The part of a choice that one token, or an end without a token, adds."""

    index: int
    text: str  # to append to the choice's text; "" while a character or a stop string is undecided
    token: TokenOutput | None = None
    token_text: str = ""  # the token's own text, whatever is held back
    at_start: bool = False  # whether no text stands before the token, where some tokenizers drop a space
    rows: Rows | None = None  # up to the position that produced the token
    finish_reason: str | None = None


class Choice:
    """The state of one choice; `index` counts over all choices of all prompts."""

    def __init__(
        self,
        index: int,
        request: Request,
        tokenizer: ModelTokenizer,
        stops: Patterns,
        ends: Collection[int],
        format: RowFormat,
        call: CallReader | None,
    ) -> None:
        self.index = index
        self.call = call  # where the text is a call of a function: the deltas' texts are its arguments
        self.request = request
        self.tokens = 0
        self.usage = SequenceUsage()
        self.finish_reason: str | None = None  # "stop" also when a stop string ended it: the engine does not know
        self._ends = ends
        self._detokenizer = tokenizer.detokenizer(request.prompt_token_ids)
        self._tokenizer = tokenizer
        self._stops = StopStrings(stops)
        self._rows = RowBuffer(format)

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def has_called(self) -> bool:
        """Whether it is a whole call, of which no stop string has cut off the end."""
        return self.call is not None and self.call.complete and not self._stops.found

    @property
    def _may_end(self) -> bool:
        """Whether a stop string counts that the latest token completes."""
        return self.request.sampling is None or self.tokens > self.request.sampling.min_tokens

    def accept(self, output: SequenceOutput) -> Iterator[Delta]:
        """One delta per token up to the end, and one without a token when the end came alone."""
        if output.gate is not None:
            self._rows.add(output.gate)
        if output.usage is not None:
            self.usage = output.usage
        if output.finish_reason == "error" and output.error_param is not None:
            raise self._refusal(output.error or "", output.error_param)
        if output.finish_reason == "error":
            raise InternalError(output.error or "the engine could not go on with this request")
        last = len(output.tokens) - 1
        for position, token in enumerate(output.tokens):
            yield self._delta(token, output.finish_reason if position == last else None)
            if self.ended:
                return  # by a stop string, perhaps: tokens after it do not count
        if last < 0 and output.finish_reason is not None:
            yield self.end(output.finish_reason)

    def _refusal(self, message: str, param: str) -> InvalidRequestError:
        """Return the engine's complaint of a request; it does not know which field asked for the form."""
        form = None if self.request.sampling is None else self.request.sampling.form
        if form is None or param != FORMAT:
            return InvalidRequestError(message, param=param)
        return InvalidRequestError(message, param=form.param, code=code_of(form.param))

    def end(self, reason: str) -> Delta:
        """The end without a token, with the text held back so far."""
        self.finish_reason = reason
        text = self._stopped(self._detokenizer.flush()) + self._stops.flush()
        return Delta(self.index, text, finish_reason=reason)

    def _stopped(self, text: str) -> str:
        """As much of the next text as certainly stands before a stop string; of a call, its arguments alone count."""
        return self._stops.push(text if self.call is None else self.call.push(text), may_end=self._may_end)

    def _delta(self, token: TokenOutput, reason: str | None) -> Delta:
        self.tokens += 1
        at_start = self._detokenizer.at_start
        if reason == "stop" and token.id in self._ends:  # its text is not part of the text
            visible, own = self._detokenizer.flush(), self._tokenizer.vocabulary.name(token.id)
        else:
            visible, own = self._detokenizer.push(token.id), ""
            if reason is not None:
                visible += self._detokenizer.flush()
        text = self._stopped(visible)
        if token.id in self._tokenizer.vocabulary.special_ids:
            text += self._stops.push_special(self._tokenizer.vocabulary.name(token.id), may_end=self._may_end)
        if self._stops.found:
            reason = "stop"
        elif reason is not None:
            text += self._stops.flush()
        self.finish_reason = reason
        rows = self._rows.take(len(self.request.prompt_token_ids) - 2 + self.tokens)
        return Delta(self.index, text, token, visible + own, at_start, rows, reason)


class Generation:
    """Some prompts, each with its choices, from submission to the last delta; leaving `deltas` early aborts them all.

    The choices of prompt i have the indices i * n to i * n + n - 1.
    """

    def __init__(
        self,
        client: Client,
        tokenizer: ModelTokenizer,
        requests: Sequence[Request],
        stops: list[str],
        format: RowFormat,
        called: Sequence[str] = (),
    ) -> None:
        """`called` are the names of functions of which each choice is to call one."""
        self.requests = requests
        self.choices: list[Choice] = []
        self.prompt_logprobs: dict[str, list[TokenOutput]] = {request.id: [] for request in requests}
        self._first: dict[str, int] = {}  # index of each request's first choice
        self._client = client
        patterns = Patterns(stops, tokenizer.vocabulary.special_texts)
        for request in requests:
            self._first[request.id] = len(self.choices)
            ends = ends_of(client.info, request)
            for _ in range(request.sampling.n if request.sampling else 0):
                call = CallReader(called) if called else None
                self.choices.append(Choice(len(self.choices), request, tokenizer, patterns, ends, format, call))

    async def deltas(self, deadline: float | None = None) -> AsyncGenerator[list[Delta], None]:
        """Every delta as it comes; those that came together are one list, in order. At the deadline (in the time of the
        event loop) all choices end.

        Raises the RequestError that refuses a request, and TimedOutError when the deadline came before any token.
        """
        asked = [request for request in self.requests if not _asks_nothing(request)]
        try:
            async with self._client.submit(*asked, deadline=deadline) as outputs:
                if ended := [choice.end("length") for choice in self.choices if _asks_nothing(choice.request)]:
                    yield ended
                async for output in outputs:
                    deltas: list[Delta] = []
                    try:
                        for one in (output, *outputs.ready()):
                            deltas += self._accept(one)
                    finally:
                        if deltas:
                            yield deltas
        except TimedOutError:
            if not any(choice.tokens for choice in self.choices):
                raise
            yield [choice.end("timeout") for choice in self.choices if not choice.ended]

    def _accept(self, output: SequenceOutput) -> Iterator[Delta]:
        """The deltas of one output; ends the choice in the engine where it has ended by its text."""
        choice = self.choices[self._first[output.request_id] + output.index]
        if choice.ended:
            return  # it came together with the one that brought the end
        if output.prompt_logprobs:
            self.prompt_logprobs[output.request_id] += output.prompt_logprobs
        for delta in choice.accept(output):
            if delta.finish_reason is not None and output.finish_reason is None:
                self._client.abort(output.request_id, output.index)
            yield delta

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; a prompt counts once, however many choices it has."""
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that no choice of their request had to compute."""
        least: dict[str, int] = {}
        for choice in self.choices:
            cached = choice.usage.cached_tokens
            least[choice.request.id] = min(cached, least.get(choice.request.id, cached))
        return sum(least.values())

    def usage(self) -> Usage:
        """The call's cost so far."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            **self.cost(),
        }

    def cost(self) -> Cost:
        """The engine's work for these choices."""
        usages = [choice.usage for choice in self.choices]
        drafts = DraftCounts()
        for usage in usages:
            drafts.add(usage.drafts)
        return {
            "forward_passes": sum(usage.forward_passes for usage in usages),
            "scaling_rows": sum(usage.scaling_rows for usage in usages),
            "real_rows": sum(usage.real_rows for usage in usages),
            "lookahead": {"hits": drafts.hits, "misses": drafts.misses},
            "speculation": {"tokens": drafts.speculated, "accepted": drafts.accepted},
            "drafts": {
                "lookahead": _by_depth(drafts.lookahead_kept, drafts.lookahead_dropped),
                "prompt_lookup": _by_depth(drafts.lookup_kept, drafts.lookup_dropped),
            },
        }


def _by_depth(kept: list[int], dropped: list[int]) -> list[DraftsAtDepth]:
    """Drafts of one source, depth by depth."""
    pairs = enumerate(zip_longest(kept, dropped, fillvalue=0), start=1)
    return [{"depth": depth, "drafted": right + wrong, "accepted": right} for depth, (right, wrong) in pairs]


def _asks_nothing(request: Request) -> bool:
    """Whether there is nothing to compute: no token to generate, none to score."""
    return request.sampling is not None and request.sampling.max_tokens == 0 and request.score_from is None


def ends_of(info: EngineInfo, request: Request) -> Collection[int]:
    """The tokens that end this request's choices."""
    if request.sampling is None:
        return ()
    return request.sampling.ends(info.eos_token_ids)
