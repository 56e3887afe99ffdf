"""OpenAI's routes: /v1/completions, /v1/chat/completions and /v1/models, over the same calls as POST /generate.

What is ours travels as `xlora`: in the body; in the answer and each chunk (`seed`, `experts` and `gate` where the
request is steered, by its `model` or its `xlora`, and what the engine did); and in
each choice (`scalings`, when asked for).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from service.api import models
from service.api.errors import GENERATION_ERRORS, answered, documented
from service.api.generation.call import RowEvents, Run, respond, scalings_of
from service.api.generation.choice import Piece
from service.api.generation.deadlines import before, deadline_of
from service.api.generation.sse import event
from service.api.middleware.json_body import JsonRoute
from service.api.middleware.record import record_of
from service.api.schemas.examples import (
    CHAT_ANSWER,
    CHAT_BODIES,
    CHAT_EVENTS,
    COMPLETION_ANSWER,
    COMPLETION_BODIES,
    COMPLETION_EVENTS,
)
from service.api.schemas.openai import (
    ChatAnswer,
    ChatBody,
    CompletionAnswer,
    CompletionBody,
    Model,
    ModelList,
    OpenAIFields,
)
from service.api.state import Service, new_id, service_of
from service.contract.output import TokenOutput

router = APIRouter(prefix="/v1", tags=["openai"], route_class=JsonRoute)

ServiceDependency = Annotated[Service, Depends(service_of)]


@router.post(
    "/completions",
    summary="OpenAI's text completion",
    response_model=CompletionAnswer,
    responses=answered(COMPLETION_ANSWER, COMPLETION_EVENTS) | documented(404, *GENERATION_ERRORS),
)
async def completions(
    http_request: HttpRequest,
    body: Annotated[CompletionBody, Body(openapi_examples=COMPLETION_BODIES)],
    service: ServiceDependency,
) -> Response:
    """Several prompts at once; the choices of prompt i have the indices i * n to i * n + n - 1."""
    xlora = models.steered(models.resolve(body.model, service.info), body.extension)
    deadline = deadline_of(record_of(http_request.scope), body, service.settings.request_timeout)
    async with before(deadline):
        prompts = await service.codec.all_prompt_ids(body.prompt)
        form = await service.forms.of(body.response_format)
    run = Run(
        service,
        new_id("cmpl"),
        prompts,
        body,
        xlora,
        deadline=deadline,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        form=form,
    )
    return await respond(http_request, run, CompletionWriter(run, body), body.stream)


@router.post(
    "/chat/completions",
    summary="OpenAI's chat completion",
    response_model=ChatAnswer,
    responses=answered(CHAT_ANSWER, CHAT_EVENTS) | documented(404, *GENERATION_ERRORS),
)
async def chat_completions(
    http_request: HttpRequest,
    body: Annotated[ChatBody, Body(openapi_examples=CHAT_BODIES)],
    service: ServiceDependency,
) -> Response:
    """The messages become a prompt by the model's own chat template."""
    xlora = models.steered(models.resolve(body.model, service.info), body.extension)
    deadline = deadline_of(record_of(http_request.scope), body, service.settings.request_timeout)
    async with before(deadline):
        prompt = await service.codec.chat_ids([message.to_template() for message in body.messages])
        form = await service.forms.of(body.response_format)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    run = Run(service, new_id("chatcmpl"), [prompt], body, xlora, deadline=deadline, logprobs=logprobs, form=form)
    return await respond(http_request, run, ChatWriter(run, body), body.stream)


@router.get("/models", summary="The names a request may use", response_model=ModelList, responses=documented(503))
async def list_models(service: ServiceDependency) -> Response:
    """One entry per name."""
    names = models.available(service.info)
    return JSONResponse({"object": "list", "data": [_model(name, service) for name in names]})


@router.get("/models/{name:path}", summary="One name", response_model=Model, responses=documented(404, 503))
async def get_model(name: str, service: ServiceDependency) -> Response:
    """The entry of GET /v1/models."""
    return JSONResponse(_model(models.resolve(name, service.info), service))


def _model(virtual: models.Virtual, service: Service) -> dict[str, Any]:
    return {"id": virtual.id, "object": "model", "created": service.loaded_at, "owned_by": "xlora-service"}


class _Frame:
    """What chunks and documents of both routes have around their choices."""

    def __init__(self, run: Run, body: OpenAIFields, object: str) -> None:
        options = body.stream_options
        self._usage_last = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._run = run
        self._told_tokens = 0  # that chunks have brought so far
        self._wishes = {"seed": run.seed, **run.steering}
        self._head = {
            "id": run.id,
            "object": object,
            "created": int(time.time()),
            "model": body.model or run.info.model,
            "system_fingerprint": f"fp_{run.info.weights_sha256[:12]}",
        }

    def document(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A whole answer."""
        return self._head | {"choices": choices, "usage": self._whole_usage(), "xlora": self._xlora()}

    def event(self, piece: Piece, choice: dict[str, Any]) -> bytes:
        """One chunk: `choice` is what it says of the piece."""
        self._told_tokens += piece.token is not None
        chunk = self._head | {"choices": [choice], "xlora": self._wishes}
        if self._usage_always:
            chunk["usage"] = self._usage(self._told_tokens)
        elif self._usage_last:
            chunk["usage"] = None
        return event(chunk)

    def last_event(self) -> bytes:
        """The chunk without choices, for who asked for the usage."""
        if not self._usage_last:
            return b""
        return event(self._head | {"choices": [], "usage": self._whole_usage(), "xlora": self._xlora()})

    def _whole_usage(self) -> dict[str, Any]:
        return self._usage(self._run.generation.completion_tokens)

    def _usage(self, completion: int) -> dict[str, Any]:
        generation = self._run.generation
        prompt = generation.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
        }

    def _xlora(self) -> dict[str, Any]:
        return self._wishes | self._run.generation.cost()


class CompletionWriter:
    """OpenAI's completion format; with `echo`, each choice begins with its prompt."""

    def __init__(self, run: Run, body: CompletionBody) -> None:
        self._run = run
        self._echo = bool(body.echo)
        self.echoed_tokens = run.generation.prompt_tokens * (body.n or 1) if self._echo else 0
        self._logprobs = body.logprobs is not None
        self._frame = _Frame(run, body, "text_completion")
        self._rows = RowEvents(run)
        self._offsets: dict[int, int] = {}  # characters of each choice's tokens so far
        self._begun: set[int] = set()

    def document(self, pieces: Mapping[int, list[Piece]]) -> dict[str, Any]:
        """The answer as one document."""
        return self._frame.document([self._choice(c.index, pieces[c.index]) for c in self._run.generation.choices])

    def event(self, piece: Piece) -> bytes:
        """One chunk; a choice's first has the echo."""
        choice = self._part(piece.index, [piece])
        scalings = self._rows.of(piece)
        return self._frame.event(piece, choice if scalings is None else choice | {"xlora": {"scalings": scalings}})

    def last_event(self) -> bytes:
        """The usage, for who asked for it."""
        return self._frame.last_event()

    def _choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        choice = self._part(index, pieces)
        if self._run.wants_rows:
            choice["xlora"] = {"scalings": scalings_of(self._run, index, pieces)}
        return choice

    def _part(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens: list[tuple[str, TokenOutput | None]] = [
            (piece.token_text, piece.token) for piece in pieces if piece.token is not None
        ]
        if self._echo and index not in self._begun:
            prompt = list(self._prompt(index))
            text = "".join(piece for piece, _ in prompt) + text
            tokens = [*prompt, *tokens]
        self._begun.add(index)
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprob_lists(index, tokens) if self._logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
        }

    def _prompt(self, index: int) -> Iterator[tuple[str, TokenOutput | None]]:
        """The prompt's tokens; the first has no logprob, and none has when nobody asked."""
        request = self._run.generation.choices[index].request
        outputs: list[TokenOutput] = self._run.generation.prompt_logprobs[request.id]
        texts = self._run.codec.pieces(request.prompt_token_ids)
        for position, text in enumerate(texts):
            yield text, outputs[position - 1] if 0 < position <= len(outputs) else None

    def _logprob_lists(self, index: int, tokens: Sequence[tuple[str, TokenOutput | None]]) -> dict[str, Any]:
        offsets = []
        for text, _ in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": [text for text, _ in tokens],
            "token_logprobs": [None if token is None else token.logprob for _, token in tokens],
            "top_logprobs": [None if token is None else self._alternatives(token) for _, token in tokens],
            "text_offset": offsets,
        }

    def _alternatives(self, token: TokenOutput) -> dict[str, float]:
        """By text; of several tokens with one text the likeliest stays. The token itself is always among them."""
        found: dict[str, float] = {}
        for id, logprob in [*token.top_logprobs, (token.id, token.logprob or 0.0)]:
            found.setdefault(self._run.codec.token_text(id), logprob)
        return found


class ChatWriter:
    """OpenAI's chat format."""

    echoed_tokens = 0

    def __init__(self, run: Run, body: ChatBody) -> None:
        self._run = run
        self._logprobs = bool(body.logprobs)
        self._frame = _Frame(run, body, "chat.completion.chunk" if body.stream else "chat.completion")
        self._rows = RowEvents(run)
        self._begun: set[int] = set()

    def document(self, pieces: Mapping[int, list[Piece]]) -> dict[str, Any]:
        """The answer as one document."""
        return self._frame.document([self._choice(c.index, pieces[c.index]) for c in self._run.generation.choices])

    def event(self, piece: Piece) -> bytes:
        """One chunk; a choice's first names the role."""
        role = {} if piece.index in self._begun else {"role": "assistant"}
        self._begun.add(piece.index)
        choice: dict[str, Any] = {
            "index": piece.index,
            "delta": role | {"content": piece.text},
            "logprobs": self._token_logprobs([piece]),
            "finish_reason": piece.finish_reason,
        }
        scalings = self._rows.of(piece)
        return self._frame.event(piece, choice if scalings is None else choice | {"xlora": {"scalings": scalings}})

    def last_event(self) -> bytes:
        """The usage, for who asked for it."""
        return self._frame.last_event()

    def _choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._token_logprobs(pieces),
            "finish_reason": pieces[-1].finish_reason,
        }
        if self._run.wants_rows:
            choice["xlora"] = {"scalings": scalings_of(self._run, index, pieces)}
        return choice

    def _token_logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        tokens = [piece.token for piece in pieces if piece.token is not None]
        content = [
            self._entry(token.id, token.logprob or 0.0)
            | {"top_logprobs": [self._entry(id, logprob) for id, logprob in token.top_logprobs]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        text = self._run.codec.token_text(id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
