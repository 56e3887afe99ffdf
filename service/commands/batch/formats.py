"""Lines of prompts and lines of answers, in two formats: ours, as POST /generate and POST /scalings answer, and that of
OpenAI's batch files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from service.api.errors import error_body
from service.api.generation.run import Run
from service.api.routes.chat import ChatWriter
from service.api.routes.generate import GenerateWriter
from service.api.routes.openai import CompletionWriter
from service.api.routes.scalings import Renderer
from service.api.schemas.answers import ScalingsFrame
from service.api.schemas.openai import CompletionBody
from service.api.state import new_id
from service.commands.batch.input_file import OPENAI_KEY, Line
from service.commands.batch.output_file import decoded, encoded
from service.contract.errors import InvalidRequestError, NotFoundError, RequestError
from service.library.bodies import body_of, chat_body, generate_job, scalings_body
from service.library.session import Session

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one line."""

    line: bytes  # of the output, with its end
    tokens: int = 0  # generated, or read where nothing is generated
    error: RequestError | None = None


class Format(Protocol):
    """One kind of line."""

    key: str  # the field of the id, in the output

    async def answer(self, session: Session, line: Line) -> Result:
        """The answer to a line, or its error. Raises EngineLostError where there is no engine any more."""

    def is_answer(self, document: Mapping[str, Any]) -> bool | None:
        """Whether a line of the output has an answer; False for an error, None for what is no line of this format."""


class _Ours:
    key = "id"
    _field: str  # that all answers have, and neither prompts nor the answers of another command

    def is_answer(self, document: Mapping[str, Any]) -> bool | None:
        """Return whether it has an answer."""
        if "error" in document:
            return False
        return True if self._field in document else None

    def _failed(self, line: Line, error: RequestError) -> Result:
        return Result(encoded({"id": line.id, **decoded(error_body(error))}), 0, error)


class GenerateFormat(_Ours):
    """Fields of POST /generate, or `messages` in place of the prompt."""

    _field = "outputs"

    def __init__(self, common: Mapping[str, Any]) -> None:
        """`common` are the fields of lines that do not say otherwise."""
        self._common = common

    async def answer(self, session: Session, line: Line) -> Result:
        """As POST /generate answers, with the line's id."""
        try:
            run, deltas = await session.generate(generate_job({**self._common, **line.fields}))
        except RequestError as error:
            return self._failed(line, error)
        document = cast(dict[str, Any], GenerateWriter(run).document(deltas))
        for output, choice in zip(document["outputs"], run.generation.choices, strict=True):
            if choice.call is not None:
                output["tool_calls"] = choice.call.whole(output["text"])
        return Result(encoded({**document, "id": line.id}), run.generation.completion_tokens)


class ScalingsFormat(_Ours):
    """Fields of POST /scalings, about one text a line."""

    _field = "tokens"

    def __init__(self, common: Mapping[str, Any], *, arrays_only: bool) -> None:
        """`arrays_only`: nothing may be asked for that is no array of scalings."""
        self._common = common
        self._arrays_only = arrays_only

    async def answer(self, session: Session, line: Line) -> Result:
        """As POST /scalings answers, with the line's id."""
        try:
            body = scalings_body({**self._common, **line.fields})
            for name in ("perplexity", "granularity"):
                if self._arrays_only and getattr(body, name) not in (None, False, "token"):
                    raise InvalidRequestError(
                        f"`{name}` has no place in a .npz file", param=name, hint="name the --output FILE.jsonl"
                    )
            _, looked = await session.scalings(body)
        except RequestError as error:
            return self._failed(line, error)
        frame = cast(ScalingsFrame, {**looked.frame("", session.info.model), "id": line.id})
        texts = looked.texts(session.tokenizer)
        document = Renderer(body, looked.view, session.info).render(texts, frame)
        return Result(document + b"\n", frame["usage"]["prompt_tokens"])


class OpenAIFormat:
    """Lines of OpenAI's batch files: `custom_id`, `method`, `url` and `body`."""

    key = OPENAI_KEY

    def is_answer(self, document: Mapping[str, Any]) -> bool | None:
        """Return whether there is a response of success."""
        response = document.get("response")
        if document.get("error"):
            return False
        return response.get("status_code") == 200 if isinstance(response, dict) else None

    async def answer(self, session: Session, line: Line) -> Result:
        """As OpenAI writes them; where a request fails, the response has the status and body that HTTP would have."""
        try:
            run, body = await self._body(session, line.fields)
        except RequestError as error:
            return Result(self._line(line, error.status, new_id("req"), decoded(error_body(error))), 0, error)
        return Result(self._line(line, 200, run.id, body), run.generation.completion_tokens)

    async def _body(self, session: Session, fields: Mapping[str, Any]) -> tuple[Run, Mapping[str, Any]]:
        url, asked = fields.get("url"), fields.get("body")
        if fields.get("method") != "POST" or url not in (CHATS, COMPLETIONS):
            raise NotFoundError(
                f"there is no {fields.get('method')!r:.20} {url!r:.60} here",
                param="url",
                hint=f"POST {CHATS} and POST {COMPLETIONS} may be asked for",
            )
        if not isinstance(asked, Mapping):
            raise InvalidRequestError("`body` must be an object", param="body")
        if asked.get("stream"):
            raise InvalidRequestError("`stream` has no place in a file", param="stream", hint="leave it out")
        if url == CHATS:
            chat = chat_body(asked)
            run, deltas = await session.converse(chat)
            return run, ChatWriter(run, chat).document(deltas)
        completion = body_of(CompletionBody, asked, COMPLETIONS)
        run, deltas = await session.complete(completion)
        return run, CompletionWriter(run, completion).document(deltas)

    def _line(self, line: Line, status: int, id: str, body: Mapping[str, Any]) -> bytes:
        response = {"status_code": status, "request_id": id, "body": body}
        return encoded({"id": new_id("batch_req"), OPENAI_KEY: line.id, "response": response, "error": None})
