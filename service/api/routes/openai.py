"""OpenAI's routes /v1/completions and /v1/models; chats are in chat.py. What is ours travels as `xlora`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from service.api import models
from service.api.generation.call import Call
from service.api.generation.caller import Caller
from service.api.generation.choice import Delta
from service.api.generation.deadlines import before
from service.api.generation.openai_frame import Frame, choice_xlora, delta_xlora
from service.api.generation.openai_logprobs import CompletionLogprobs
from service.api.generation.run import Run, respond
from service.api.generation.sse import event
from service.api.middleware.json_body import JsonRoute
from service.api.openapi import GENERATION_ERRORS, answered, documented
from service.api.schemas import examples
from service.api.schemas import openai_answers as answers
from service.api.schemas.openai import CompletionBody
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
    call = Call(http_request, service, "cmpl", body)
    async with before(call.deadline):
        run = await run_of(body, call)
    return await respond(call, run, CompletionWriter(run, body), body.stream)


async def run_of(body: CompletionBody, call: Caller) -> Run:
    """The run that a body asks for. Raises InvalidRequestError for what this model or this server cannot do, and
    NotFoundError for another model's name.
    """
    service = call.service
    xlora = models.steered(models.resolve(body.model, service.names, service.info), body.extension)
    prompts = await service.tokenizer.all_prompt_ids(body.prompt)
    form = await service.forms.of(body.response_format)
    return Run(
        call,
        prompts,
        body,
        xlora,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        form=form,
    )


@router.get(
    "/models", summary="The names a request may use", response_model=answers.ModelList, responses=documented(503)
)
async def list_models(service: ServiceDependency) -> Response:
    """One entry per name, with the context's length."""
    names = models.available(service.names, service.info)
    content: answers.ModelList = {"object": "list", "data": [_model(name, service) for name in names]}
    return JSONResponse(content)


@router.get("/models/{name:path}", summary="One name", response_model=answers.Model, responses=documented(404, 503))
async def get_model(name: str, service: ServiceDependency) -> Response:
    """The entry of GET /v1/models."""
    return JSONResponse(_model(models.resolve(name, service.names, service.info), service))


def _model(virtual: models.Virtual, service: Service) -> answers.Model:
    return {
        "id": virtual.id,
        "object": "model",
        "created": service.loaded_at,
        "owned_by": "xlora-service",
        "max_model_len": service.info.max_model_len,
    }


class CompletionWriter:
    """OpenAI's completion format; with `echo`, each choice begins with its prompt."""

    def __init__(self, run: Run, body: CompletionBody) -> None:
        self._run = run
        self._echo = bool(body.echo)
        self.echoed_tokens = run.generation.prompt_tokens * (body.n or 1) if self._echo else 0
        self._logprobs = CompletionLogprobs(run.tokenizer.vocabulary) if body.logprobs is not None else None
        self._frame = Frame(run, body)
        self._begun: set[int] = set()

    def document(self, deltas: Mapping[int, list[Delta]]) -> answers.CompletionAnswer:
        choices = [self._choice(choice.index, deltas[choice.index]) for choice in self._run.generation.choices]
        return {**self._frame.whole(), "object": "text_completion", "choices": choices}

    def event(self, delta: Delta) -> bytes:
        """One chunk; a choice's first has the echo."""
        choice: answers.CompletionDelta = {**self._text(delta.index, [delta]), **delta_xlora(self._run, delta)}
        chunk: answers.CompletionChunk = {**self._frame.chunk(delta), "object": "text_completion", "choices": [choice]}
        return event(chunk)

    def last_event(self) -> bytes:
        """The usage, for who asked for it."""
        if not self._frame.usage_last:
            return b""
        chunk: answers.CompletionChunk = {**self._frame.whole(), "object": "text_completion", "choices": []}
        return event(chunk)

    def _choice(self, index: int, deltas: list[Delta]) -> answers.CompletionChoice:
        return {**self._text(index, deltas), **choice_xlora(self._run, index, deltas)}

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
