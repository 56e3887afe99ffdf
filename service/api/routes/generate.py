"""POST /generate: check the body, hand the request to the engine, write what comes back as JSON or as events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Response
from fastapi import Request as HttpRequest

from service.api.errors import GENERATION_ERRORS, answered, documented
from service.api.generation.call import RowEvents, Run, respond, scalings_of
from service.api.generation.choice import Piece
from service.api.generation.deadlines import before, deadline_of
from service.api.generation.sse import event
from service.api.middleware.json_body import JsonRoute
from service.api.middleware.record import record_of
from service.api.schemas.answers import GenerateAnswer
from service.api.schemas.bodies import GenerateBody
from service.api.schemas.examples import GENERATE_ANSWER, GENERATE_BODIES, GENERATE_EVENTS
from service.api.state import Service, new_id, service_of
from service.contract.output import TokenOutput

router = APIRouter(tags=["generation"], route_class=JsonRoute)


@router.post(
    "/generate",
    summary="Generate text, and see which experts wrote it",
    response_model=GenerateAnswer,
    responses=answered(GENERATE_ANSWER, GENERATE_EVENTS) | documented(*GENERATION_ERRORS),
)
async def generate(
    http_request: HttpRequest,
    body: Annotated[GenerateBody, Body(openapi_examples=GENERATE_BODIES)],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """The scalings of a generated token are those of the position that produced it, its predecessor."""
    deadline = deadline_of(record_of(http_request.scope), body, service.settings.request_timeout)
    async with before(deadline):
        prompt = await service.codec.prompt_ids(body.prompt)
        form = await service.forms.of(body.response_format)
    run = Run(service, new_id("gen"), [prompt], body, body, deadline=deadline, logprobs=body.logprobs, form=form)
    return await respond(http_request, run, GenerateWriter(run), body.stream)


class GenerateWriter:
    """Our own format."""

    echoed_tokens = 0

    def __init__(self, run: Run) -> None:
        self._run = run
        self._rows = RowEvents(run)

    def document(self, pieces: Mapping[int, list[Piece]]) -> dict[str, Any]:
        """The answer as one document."""
        outputs = [self._output(choice.index, pieces[choice.index]) for choice in self._run.generation.choices]
        return self._head() | {"outputs": outputs, "usage": self._usage()}

    def event(self, piece: Piece) -> bytes:
        """The same fields as an entry of `outputs`, with what this token added to each."""
        data: dict[str, Any] = {"id": self._run.id, "index": piece.index, "text": piece.text}
        token = piece.token
        data["token_ids"] = [] if token is None else [token.id]
        data["tokens"] = [] if token is None else [self._token(token, piece.token_text)]
        data["finish_reason"] = piece.finish_reason
        scalings = self._rows.of(piece)
        return event(data if scalings is None else data | {"scalings": scalings})

    def last_event(self) -> bytes:
        """The model, the seed and the usage."""
        return event(self._head() | {"usage": self._usage()})

    def _head(self) -> dict[str, Any]:
        return {"id": self._run.id, "model": self._run.info.model, "seed": self._run.seed, **self._run.steering}

    def _usage(self) -> dict[str, object]:
        generation = self._run.generation
        return {
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.completion_tokens,
            "cached_tokens": generation.cached_tokens,
            **generation.cost(),
        }

    def _output(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        tokens = [(piece.token, piece.token_text) for piece in pieces if piece.token is not None]
        output: dict[str, Any] = {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "token_ids": [token.id for token, _ in tokens],
            "tokens": [self._token(token, text) for token, text in tokens],
            "finish_reason": pieces[-1].finish_reason,
        }
        if self._run.wants_rows:
            output["scalings"] = scalings_of(self._run, index, pieces)
        return output

    def _token(self, token: TokenOutput, text: str) -> dict[str, Any]:
        data: dict[str, Any] = {"id": token.id, "text": text}
        if token.logprob is not None:
            name = self._run.codec.token_text
            data["logprob"] = token.logprob
            data["top_logprobs"] = [
                {"id": id, "text": name(id), "logprob": logprob} for id, logprob in token.top_logprobs
            ]
        return data
