"""Keyword arguments and lines of files as the bodies of the HTTP routes, checked the same way.

This file knows fields and no engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from service.api.errors import explain
from service.api.schemas.bodies import CompareBody, GenerateBody, ScalingsBody
from service.api.schemas.openai import ChatBody
from service.contract.errors import InvalidRequestError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]

# Fields of a chat that POST /generate does not have.
_CHAT_FIELDS = frozenset(ChatBody.model_fields) & {
    *("messages", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs"),
    *("add_generation_prompt", "continue_final_message"),
}
_FIELD_OF_SCALINGS = "return_scalings"
_Body = TypeVar("_Body", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """One prompt and how it is continued; the prompt of `body` is empty where there is a chat."""

    body: GenerateBody
    chat: ChatBody | None = None


def is_one_prompt(prompts: object) -> bool:
    """Whether something is one prompt, and no collection of prompts: a text, token ids, messages, or an object."""
    if isinstance(prompts, str | bytes | bytearray | Mapping):
        return True
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1 and prompts.dtype.kind in "iu"
    if not isinstance(prompts, Sequence) or not prompts:
        return False
    first = prompts[0]
    return _is_number(first) or (isinstance(first, Mapping) and not first.keys().isdisjoint(("role", "content")))


def check_many(prompts: object) -> None:
    """Raises InvalidRequestError for what is no collection of prompts."""
    if not isinstance(prompts, Iterable | AsyncIterable):
        raise no_prompt(prompts)


def fields_of(prompt: Prompt, common: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one prompt: its own, where it is an object of fields, over those of the call.

    Raises InvalidRequestError for what is no prompt at all.
    """
    if isinstance(prompt, Mapping):
        return {**common, **prompt}
    if isinstance(prompt, str):
        return {**common, "prompt": prompt}
    if isinstance(prompt, list | tuple | range | np.ndarray):
        items = [_plain(item) for item in prompt]
        is_chat = bool(items) and isinstance(items[0], Mapping)
        return {**common, "messages" if is_chat else "prompt": items}
    raise no_prompt(prompt)


def no_prompt(value: object) -> InvalidRequestError:
    """The error of something that is no prompt."""
    message = f"a prompt is a text, token ids or messages, and not {type(value).__name__}"
    hint = "give its .tolist()" if hasattr(value, "tolist") else None  # a tensor
    return InvalidRequestError(message, param="prompt", hint=hint)


def scalings_field(fields: Mapping[str, Any], scalings: str | None) -> dict[str, Any]:
    """The fields with `scalings`, the short name of `return_scalings`. Raises InvalidRequestError where both are given
    and differ.
    """
    if scalings is None:
        return dict(fields)
    if fields.get(_FIELD_OF_SCALINGS, scalings) != scalings:
        raise InvalidRequestError(
            f"scalings is {scalings!r} and return_scalings {fields[_FIELD_OF_SCALINGS]!r}",
            param="scalings",
            hint="give one of them: they are the same",
        )
    return {**fields, _FIELD_OF_SCALINGS: scalings}


def generate_job(fields: Mapping[str, Any]) -> GenerateJob:
    """The fields of POST /generate, with `messages` and what goes with them in place of `prompt`, checked."""
    _refuse(fields, "stream", "answers come whole; with several prompts, one after the other")
    if "messages" not in fields:
        return GenerateJob(body_of(GenerateBody, fields, "/generate"))
    if "prompt" in fields:
        raise InvalidRequestError("prompt and messages are both given", param="messages", hint="give one of them")
    chat = {name: value for name, value in fields.items() if name in _CHAT_FIELDS}
    others = {name: value for name, value in fields.items() if name not in _CHAT_FIELDS}
    body = body_of(GenerateBody, {**others, "prompt": []}, "/generate")
    checked = chat_body(chat)
    if body.ignore_eos and checked.called:
        raise InvalidRequestError("ignore_eos goes with no tool call", param="ignore_eos")
    return GenerateJob(body, checked)


def scalings_body(fields: Mapping[str, Any]) -> ScalingsBody:
    """The fields of POST /scalings about one text, checked."""
    _refuse(fields, "format", "answers are arrays")
    body = body_of(ScalingsBody, fields, "/scalings")
    if body.is_batch:
        raise InvalidRequestError("prompt is a list of texts", param="prompt", hint="give each text by itself")
    return body


def chat_body(fields: Mapping[str, Any]) -> ChatBody:
    """The fields of OpenAI's chat completions, checked."""
    return body_of(ChatBody, fields, "/v1/chat/completions")


def compare_body(fields: Mapping[str, Any]) -> CompareBody:
    """The fields of POST /compare, checked."""
    return body_of(CompareBody, fields, "/compare")


def body_of(model: type[_Body], fields: Mapping[str, Any], path: str) -> _Body:
    """A body as the route at `path` would have it. Raises InvalidRequestError as that route answers."""
    try:
        return model.model_validate(_plain(fields))
    except ValidationError as error:
        raise explain(error.errors(), path) from None


def _refuse(fields: Mapping[str, Any], name: str, reason: str) -> None:
    if fields.get(name):
        raise InvalidRequestError(f"`{name}` has no place here: {reason}", param=name, hint="leave it out")


def _is_number(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Mappings, tuples and NumPy's numbers as JSON would bring them: bodies take nothing else."""
    if isinstance(value, str):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {_name(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    return value


def _name(name: Any) -> Any:
    """The name of a field as it is. Raises InvalidRequestError for a lone surrogate, which pydantic cannot report."""
    try:
        if isinstance(name, str):
            name.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(f"the field {name!r:.60} has a lone surrogate in its name") from None
    return name


def count_of(prompts: Iterable[Any]) -> int | None:
    """How many prompts there are, where they can say."""
    return len(prompts) if isinstance(prompts, Sized) else None
