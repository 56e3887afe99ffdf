"""POST /generate: check the body, hand the request to the engine, write what comes back as JSON or as events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Response
from fastapi import Request as HttpRequest

from service.api.generation.call import Call
from service.api.generation.caller import Caller
from service.api.generation.choice import Delta
from service.api.generation.deadlines import before
from service.api.generation.run import Run, respond
from service.api.generation.sse import event
from service.api.middleware.json_body import JsonRoute
from service.api.openapi import GENERATION_ERRORS, answered, documented
from service.api.schemas import answers
from service.api.schemas.bodies import GenerateBody
from service.api.schemas.examples import GENERATE_ANSWER, GENERATE_BODIES, GENERATE_EVENTS
from service.api.state import Service, service_of
from service.contract.output import TokenOutput

router = APIRouter(tags=["generation"], route_class=JsonRoute)


@router.post(
    "/generate",
    summary="Generate text, and see which experts wrote it",
    response_model=answers.GenerateAnswer,
    responses=answered(GENERATE_ANSWER, GENERATE_EVENTS, [answers.GenerateDelta, answers.GenerateEnd])
    | documented(*GENERATION_ERRORS),
)
async def generate(
    http_request: HttpRequest,
    body: Annotated[GenerateBody, Body(openapi_examples=GENERATE_BODIES)],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """The scalings of a generated token are those of the position that produced it, its predecessor."""
    call = Call(http_request, service, "gen", body)
    async with before(call.deadline):
        run = await run_of(body, call)
    return await respond(call, run, GenerateWriter(run), body.stream)


async def run_of(body: GenerateBody, call: Caller) -> Run:
    """The run that a body asks for. Raises InvalidRequestError for what this model or this server cannot do."""
    prompt = await call.service.tokenizer.prompt_ids(body.prompt)
    form = await call.service.forms.of(body.response_format)
    return Run(call, [prompt], body, body, logprobs=body.logprobs, form=form)


class GenerateWriter:
    """Our own format."""

    echoed_tokens = 0

    def __init__(self, run: Run) -> None:
        self._run = run

    def document(self, deltas: Mapping[int, list[Delta]]) -> answers.GenerateAnswer:
        outputs = [self._output(choice.index, deltas[choice.index]) for choice in self._run.generation.choices]
        return {**self._head(), "outputs": outputs, "usage": self._run.generation.usage()}

    def event(self, delta: Delta) -> bytes:
        """The same fields as an entry of `outputs`, with what this token added to each."""
        token = delta.token
        written: answers.GenerateDelta = {
            "id": self._run.id,
            "index": delta.index,
            "text": delta.text,
            "token_ids": [] if token is None else [token.id],
            "tokens": [] if token is None else [self._token(token, delta.token_text)],
            "finish_reason": delta.finish_reason,
            **self._run.scalings_delta(delta),
        }
        return event(written)

    def last_event(self) -> bytes:
        """The model, the seed and the usage."""
        end: answers.GenerateEnd = {**self._head(), "usage": self._run.generation.usage()}
        return event(end)

    def _head(self) -> answers.GenerateHead:
        return {"id": self._run.id, "model": self._run.info.model, "seed": self._run.seed, **self._run.steering}

    def _output(self, index: int, deltas: list[Delta]) -> answers.Output:
        tokens = [(delta.token, delta.token_text) for delta in deltas if delta.token is not None]
        return {
            "index": index,
            "text": "".join(delta.text for delta in deltas),
            "token_ids": [token.id for token, _ in tokens],
            "tokens": [self._token(token, text) for token, text in tokens],
            "finish_reason": deltas[-1].finish_reason,
            **self._run.scalings(index, deltas),
        }

    def _token(self, token: TokenOutput, text: str) -> answers.Token:
        written: answers.Token = {"id": token.id, "text": text}
        if token.logprob is not None:
            name = self._run.tokenizer.vocabulary.name
            written["logprob"] = token.logprob
            written["top_logprobs"] = [
                {"id": id, "text": name(id), "logprob": logprob} for id, logprob in token.top_logprobs
            ]
        return written
