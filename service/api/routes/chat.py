"""OpenAI's chat completions, over the same calls as POST /generate. What is ours travels as `xlora`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Response
from fastapi import Request as HttpRequest

from service.api import models
from service.api.generation.call import Call
from service.api.generation.caller import Caller
from service.api.generation.choice import Delta
from service.api.generation.deadlines import before
from service.api.generation.openai_frame import Frame, choice_xlora, delta_xlora
from service.api.generation.openai_logprobs import chat_logprobs
from service.api.generation.run import Run, respond
from service.api.generation.sse import event
from service.api.generation.tool_forms import tool_form
from service.api.middleware.json_body import JsonRoute
from service.api.openapi import GENERATION_ERRORS, answered, documented
from service.api.schemas import examples
from service.api.schemas import openai_answers as answers
from service.api.schemas.openai import ChatBody
from service.api.state import Service, service_of
from service.contract.request import GrammarSpec

router = APIRouter(prefix="/v1", tags=["openai"], route_class=JsonRoute)

ServiceDependency = Annotated[Service, Depends(service_of)]


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
    """The messages become a prompt by the model's own chat template; with a tool_choice the answer is a call."""
    call = Call(http_request, service, "chatcmpl", body)
    async with before(call.deadline):
        run = await run_of(body, call)
    return await respond(call, run, ChatWriter(run, body), body.stream)


async def run_of(body: ChatBody, call: Caller) -> Run:
    """The run that a body asks for. Raises InvalidRequestError for what this model or this server cannot do, and
    NotFoundError for another model's name.
    """
    service = call.service
    xlora = models.steered(models.resolve(body.model, service.names, service.info), body.extension)
    prompt = await service.tokenizer.chat_ids(body.chat())
    if body.called:
        form: GrammarSpec | None = await tool_form(service.forms, body.called)
    else:
        form = await service.forms.of(body.response_format)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    called = [function.name for function in body.called.values()]
    return Run(call, [prompt], body, xlora, logprobs=logprobs, form=form, called=called)


class ChatWriter:
    """OpenAI's chat format; where a function is to be called, the text of each choice is its call."""

    echoed_tokens = 0

    def __init__(self, run: Run, body: ChatBody) -> None:
        self._run = run
        self._vocabulary = run.tokenizer.vocabulary
        self._logprobs = bool(body.logprobs)
        self._frame = Frame(run, body)
        self._begun: set[int] = set()
        self._called: set[int] = set()  # choices whose function has been named
        self._is_named = body.tool_choice is not None and body.tool_choice.mode == "function"

    def document(self, deltas: Mapping[int, list[Delta]]) -> answers.ChatAnswer:
        choices = [self._choice(choice.index, deltas[choice.index]) for choice in self._run.generation.choices]
        return {**self._frame.whole(), "object": "chat.completion", "choices": choices}

    def event(self, delta: Delta) -> bytes:
        """One chunk; a choice's first names the role."""
        call = self._run.generation.choices[delta.index].call
        message: answers.ChatMessageDelta = {} if call is not None else {"content": delta.text}
        if delta.index not in self._begun:
            message = {"role": "assistant", "content": None, **message}
        self._begun.add(delta.index)
        if call is not None and delta.text:
            message["tool_calls"] = [call.delta(delta.text, first=delta.index not in self._called)]
            self._called.add(delta.index)
        choice: answers.ChatDelta = {
            "index": delta.index,
            "delta": message,
            "logprobs": chat_logprobs(self._vocabulary, [delta]) if self._logprobs else None,
            **delta_xlora(self._run, delta),
        }
        choice["finish_reason"] = self._reason(delta.index, choice["finish_reason"])
        chunk: answers.ChatChunk = {**self._frame.chunk(delta), "object": "chat.completion.chunk", "choices": [choice]}
        return event(chunk)

    def last_event(self) -> bytes:
        """The usage, for who asked for it."""
        if not self._frame.usage_last:
            return b""
        chunk: answers.ChatChunk = {**self._frame.whole(), "object": "chat.completion.chunk", "choices": []}
        return event(chunk)

    def _choice(self, index: int, deltas: list[Delta]) -> answers.ChatChoice:
        text, call = "".join(delta.text for delta in deltas), self._run.generation.choices[index].call
        message: answers.ChatMessage = {"role": "assistant", "content": text, "refusal": None}
        if call is not None:
            message["content"] = None
            if calls := call.whole(text):
                message["tool_calls"] = calls
        choice: answers.ChatChoice = {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._vocabulary, deltas) if self._logprobs else None,
            **choice_xlora(self._run, index, deltas),
        }
        choice["finish_reason"] = self._reason(index, choice["finish_reason"])
        return choice

    def _reason(self, index: int, reason: answers.FinishReason | None) -> answers.FinishReason | None:
        """As OpenAI has it: who asked for this very function is told "stop"."""
        has_called = self._run.generation.choices[index].has_called
        return "tool_calls" if reason == "stop" and has_called and not self._is_named else reason
