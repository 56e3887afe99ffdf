"""OpenAI's routes: /v1/completions, /v1/chat/completions and /v1/models, over the same calls as POST /generate.

What is ours travels as `xlora`: in the body; in the answer and each chunk (`seed`, `experts` and `gate` where the
request is steered, by its `model` or its `xlora`, and what the engine did); and in each choice (`scalings`, when asked
for).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from service.api import models
from service.api.generation.call import Call
from service.api.generation.choice import Delta
from service.api.generation.deadlines import before
from service.api.generation.openai_logprobs import CompletionLogprobs, chat_logprobs
from service.api.generation.run import Run, respond
from service.api.generation.sse import event
from service.api.middleware.json_body import JsonRoute
from service.api.openapi import GENERATION_ERRORS, answered, documented
from service.api.schemas import examples
from service.api.schemas import openai_answers as answers
from service.api.schemas.openai import ChatBody, CompletionBody, OpenAIFields
from service.api.state import Service, service_of
from service.contract.output import TokenOutput

router = APIRouter(prefix="/v1", tags=["openai"], route_class=JsonRoute)

ServiceDependency = Annotated[Service, Depends(service_of)]


@router.post(
    "/completions",
    summary="OpenAI's text completion",
    response_model=answers.CompletionAnswer,
    responses=answered(examples.COMPLETION_ANSWER, examples.COMPLETION_EVENTS, [answers.CompletionChunk])
    | documented(404, *GENERATION_ERRORS),
)
async def completions(
    http_request: HttpRequest,
    body: Annotated[CompletionBody, Body(openapi_examples=examples.COMPLETION_BODIES)],
    service: ServiceDependency,
) -> Response:
    """Several prompts at once; the choices of prompt i have the indices i * n to i * n + n - 1."""
    xlora = models.steered(models.resolve(body.model, service.info), body.extension)
    call = Call(http_request, service, "cmpl", body)
    async with before(call.deadline):
        prompts = await service.tokenizer.all_prompt_ids(body.prompt)
        form = await service.forms.of(body.response_format)
    run = Run(
        call,
        prompts,
        body,
        xlora,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        form=form,
    )
    return await respond(run, CompletionWriter(run, body), body.stream)


@router.post(
    "/chat/completions",
    summary="OpenAI's chat completion",
    response_model=answers.ChatAnswer,
    responses=answered(examples.CHAT_ANSWER, examples.CHAT_EVENTS, [answers.ChatChunk])
    | documented(404, *GENERATION_ERRORS),
)
async def chat_completions(
    http_request: HttpRequest,
    body: Annotated[ChatBody, Body(openapi_examples=examples.CHAT_BODIES)],
    service: ServiceDependency,
) -> Response:
    """The messages become a prompt by the model's own chat template."""
    xlora = models.steered(models.resolve(body.model, service.info), body.extension)
    call = Call(http_request, service, "chatcmpl", body)
    async with before(call.deadline):
        prompt = await service.tokenizer.chat_ids([message.to_template() for message in body.messages])
        form = await service.forms.of(body.response_format)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    run = Run(call, [prompt], body, xlora, logprobs=logprobs, form=form)
    return await respond(run, ChatWriter(run, body), body.stream)


@router.get(
    "/models", summary="The names a request may use", response_model=answers.ModelList, responses=documented(503)
)
async def list_models(service: ServiceDependency) -> Response:
    """One entry per name."""
    names = models.available(service.info)
    content: answers.ModelList = {"object": "list", "data": [_model(name, service) for name in names]}
    return JSONResponse(content)


@router.get("/models/{name:path}", summary="One name", response_model=answers.Model, responses=documented(404, 503))
async def get_model(name: str, service: ServiceDependency) -> Response:
    """The entry of GET /v1/models."""
    return JSONResponse(_model(models.resolve(name, service.info), service))


def _model(virtual: models.Virtual, service: Service) -> answers.Model:
    return {"id": virtual.id, "object": "model", "created": service.loaded_at, "owned_by": "xlora-service"}


class _Frame:
    """What chunks and documents of both routes have around their choices."""

    def __init__(self, run: Run, body: OpenAIFields) -> None:
        options = body.stream_options
        self.usage_last = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._generation = run.generation
        self._told_tokens = 0  # that chunks have brought so far
        self._as_used: answers.AsUsed = {"seed": run.seed, **run.steering}
        self._head: answers.OpenAIHead = {
            "id": run.id,
            "created": int(time.time()),
            "model": body.model or run.info.model,
            "system_fingerprint": f"fp_{(run.info.weights_sha256 or run.info.fingerprint)[:12]}",
        }
        usage: answers.ChunkUsage = {"usage": None} if self.usage_last else {}
        self._silent: answers.OpenAIChunk = {**self._head, "xlora": self._as_used, **usage}

    def whole(self) -> answers.OpenAIAnswer:
        """Of a whole answer, and of the chunk without choices, for who asked for the usage."""
        usage = self._usage(self._generation.completion_tokens)
        return {**self._head, "usage": usage, "xlora": {**self._as_used, **self._generation.cost()}}

    def chunk(self, delta: Delta) -> answers.OpenAIChunk:
        """Of the chunk that brings a delta."""
        self._told_tokens += delta.token is not None
        if self._usage_always:
            return {**self._head, "xlora": self._as_used, "usage": self._usage(self._told_tokens)}
        return self._silent

    def _usage(self, completion: int) -> answers.OpenAIUsage:
        prompt = self._generation.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._generation.cached_tokens},
        }


class CompletionWriter:
    """OpenAI's completion format; with `echo`, each choice begins with its prompt."""

    def __init__(self, run: Run, body: CompletionBody) -> None:
        self._run = run
        self._echo = bool(body.echo)
        self.echoed_tokens = run.generation.prompt_tokens * (body.n or 1) if self._echo else 0
        self._logprobs = CompletionLogprobs(run.tokenizer.vocabulary) if body.logprobs is not None else None
        self._frame = _Frame(run, body)
        self._begun: set[int] = set()

    def document(self, deltas: Mapping[int, list[Delta]]) -> answers.CompletionAnswer:
        """The answer as one document."""
        choices = [self._choice(choice.index, deltas[choice.index]) for choice in self._run.generation.choices]
        return {**self._frame.whole(), "object": "text_completion", "choices": choices}

    def event(self, delta: Delta) -> bytes:
        """One chunk; a choice's first has the echo."""
        choice: answers.CompletionDelta = {**self._text(delta.index, [delta]), **_delta_xlora(self._run, delta)}
        chunk: answers.CompletionChunk = {**self._frame.chunk(delta), "object": "text_completion", "choices": [choice]}
        return event(chunk)

    def last_event(self) -> bytes:
        """The usage, for who asked for it."""
        if not self._frame.usage_last:
            return b""
        chunk: answers.CompletionChunk = {**self._frame.whole(), "object": "text_completion", "choices": []}
        return event(chunk)

    def _choice(self, index: int, deltas: list[Delta]) -> answers.CompletionChoice:
        return {**self._text(index, deltas), **_choice_xlora(self._run, index, deltas)}

    def _text(self, index: int, deltas: list[Delta]) -> answers.CompletionText:
        text = "".join(delta.text for delta in deltas)
        tokens: list[tuple[str, TokenOutput | None]] = [
            (delta.token_text, delta.token) for delta in deltas if delta.token is not None
        ]
        if self._echo and index not in self._begun:
            prompt = list(self._prompt(index))
            text = "".join(token_text for token_text, _ in prompt) + text
            tokens = [*prompt, *tokens]
        self._begun.add(index)
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs.of(index, tokens) if self._logprobs else None,
        }

    def _prompt(self, index: int) -> Iterator[tuple[str, TokenOutput | None]]:
        """The prompt's tokens; the first has no logprob, and none has when nobody asked."""
        request = self._run.generation.choices[index].request
        outputs: list[TokenOutput] = self._run.generation.prompt_logprobs[request.id]
        texts = self._run.tokenizer.texts(request.prompt_token_ids)
        for position, text in enumerate(texts):
            yield text, outputs[position - 1] if 0 < position <= len(outputs) else None


class ChatWriter:
    """OpenAI's chat format."""

    echoed_tokens = 0

    def __init__(self, run: Run, body: ChatBody) -> None:
        self._run = run
        self._vocabulary = run.tokenizer.vocabulary
        self._logprobs = bool(body.logprobs)
        self._frame = _Frame(run, body)
        self._begun: set[int] = set()

    def document(self, deltas: Mapping[int, list[Delta]]) -> answers.ChatAnswer:
        """The answer as one document."""
        choices = [self._choice(choice.index, deltas[choice.index]) for choice in self._run.generation.choices]
        return {**self._frame.whole(), "object": "chat.completion", "choices": choices}

    def event(self, delta: Delta) -> bytes:
        """One chunk; a choice's first names the role."""
        message: answers.ChatMessageDelta = {"content": delta.text}
        if delta.index not in self._begun:
            message["role"] = "assistant"
        self._begun.add(delta.index)
        choice: answers.ChatDelta = {
            "index": delta.index,
            "delta": message,
            "logprobs": chat_logprobs(self._vocabulary, [delta]) if self._logprobs else None,
            **_delta_xlora(self._run, delta),
        }
        chunk: answers.ChatChunk = {**self._frame.chunk(delta), "object": "chat.completion.chunk", "choices": [choice]}
        return event(chunk)

    def last_event(self) -> bytes:
        """The usage, for who asked for it."""
        if not self._frame.usage_last:
            return b""
        chunk: answers.ChatChunk = {**self._frame.whole(), "object": "chat.completion.chunk", "choices": []}
        return event(chunk)

    def _choice(self, index: int, deltas: list[Delta]) -> answers.ChatChoice:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None},
            "logprobs": chat_logprobs(self._vocabulary, deltas) if self._logprobs else None,
            **_choice_xlora(self._run, index, deltas),
        }


def _choice_xlora(run: Run, index: int, deltas: Sequence[Delta]) -> answers.ChoiceXLora:
    reason = deltas[-1].finish_reason
    ours: answers.ChoiceDetails = {**run.scalings(index, deltas), **_end(reason)}
    written: answers.ChoiceXLora = {"finish_reason": _openai_reason(reason)}
    if ours:
        written["xlora"] = ours
    return written


def _delta_xlora(run: Run, delta: Delta) -> answers.DeltaXLora:
    ours: answers.DeltaDetails = {**run.scalings_delta(delta), **_end(delta.finish_reason)}
    written: answers.DeltaXLora = {"finish_reason": _openai_reason(delta.finish_reason)}
    if ours:
        written["xlora"] = ours
    return written


def _openai_reason(reason: str | None) -> answers.FinishReason | None:
    """Who was cut short, by whatever it was, is cut short to OpenAI's clients."""
    if reason is None:
        return None
    return "stop" if reason == "stop" else "length"


def _end(reason: str | None) -> answers.WithEnd:
    """The reason, where OpenAI has no word for it."""
    return {} if reason in (None, "stop", "length") else {"finish_reason": reason}
