"""The parts of the OpenAPI document that FastAPI does not know: events, our errors, keys."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from service.api.generation.sse import DONE, event
from service.api.middleware.security import OPEN_ROUTES
from service.api.schemas.answers import ErrorAnswer, GenerateDelta, GenerateEnd
from service.api.schemas.openai_answers import ChatChunk, CompletionChunk

_REASONS = {
    400: "The request can never succeed as it is",
    401: "No key, or not one of ours",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "The queue is full; Retry-After says when to come again",
    500: "Our fault",
    503: "Loading, draining, or the engine has died: nothing was begun",
    504: "The deadline passed before the first token",
}
BODY_ERRORS = (400, 408, 413, 503)
GENERATION_ERRORS = (*BODY_ERRORS, 429, 500, 504)

_EVENTS: tuple[Any, ...] = (GenerateDelta, GenerateEnd, CompletionChunk, ChatChunk)
_SCHEMAS = "#/components/schemas/{model}"


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The entries of the errors a route can answer with."""
    return {status: {"model": ErrorAnswer, "description": _REASONS[status]} for status in statuses}


def answered(
    answer: Mapping[str, object], events: Sequence[Mapping[str, object]], kinds: Sequence[type]
) -> dict[int | str, dict[str, Any]]:
    """The entry of a good answer, with examples. The schema of a stream is that of one event, of which there are these
    kinds; one that follows the first may be an error, and the last is [DONE].
    """
    written = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(kind) for kind in (*kinds, ErrorAnswer)]},
    }
    data = {"anyOf": [written, {"const": "[DONE]"}]}
    one = {"type": "object", "required": ["data"], "properties": {"data": data}}
    example = b"".join([*map(event, events), DONE]).decode()
    stream = {"schema": one, "example": example}
    return {200: {"content": {"application/json": {"example": answer}, "text/event-stream": stream}}}


def finish(app: FastAPI, needs_key: bool) -> None:
    """FastAPI documents 422 for bad bodies, and ours are 400; and it does not know of events and keys."""
    schema = app.openapi()
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= _event_schemas()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if needs_key and path not in OPEN_ROUTES:
                content = {"application/json": {"schema": _reference(ErrorAnswer)}}
                operation["responses"]["401"] = {"description": "No valid key", "content": content}
                operation["security"] = [{"key": []}]
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}


@functools.cache
def _event_schemas() -> dict[str, Any]:
    """By name, with all that they refer to."""
    kinds: list[Any] = [(kind, "serialization", TypeAdapter(kind)) for kind in _EVENTS]
    _, found = TypeAdapter.json_schemas(kinds, ref_template=_SCHEMAS)
    definitions: dict[str, Any] = found["$defs"]
    return definitions


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": _SCHEMAS.format(model=kind.__name__)}
