"""From messages to the text of a prompt, by the model's chat template in a process that can be killed.

This file knows no HTTP and no tokenizer.
"""

from __future__ import annotations

import sys
from pathlib import Path

from service.api.generation.render_worker import Rendered
from service.api.processes.bounded_process import BoundedProcess, Bounds, ChildDiedError, TookTooLongError
from service.chat_template import Chat, ChatTemplate, refusal
from service.contract.errors import InvalidRequestError

MAX_RENDER_SECONDS = 2.0

_WAIT_SECONDS = 3.0  # for others' chats: longer than one that is given up, and its successor's start, take
_MAX_ASKING = 256  # chats at once; one takes less than a millisecond
_TEMPLATE_BYTES = 1 << 20  # room for what the template itself says


class ChatRenderer:
    """One model's chat template, where it has one."""

    def __init__(self, directory: Path, max_body_bytes: int, render_seconds: float = MAX_RENDER_SECONDS) -> None:
        """Reads the template beside a tokenizer.json; raises what ChatTemplate.load does."""
        self._process: BoundedProcess[Rendered] | None = None
        if ChatTemplate.load(directory) is not None:
            max_bytes = 2 * max_body_bytes + _TEMPLATE_BYTES
            self._process = BoundedProcess(
                [sys.executable, "-m", "service.api.generation.render_worker", str(directory), str(max_bytes)],
                "the process that renders the chat template",
                "messages",
                Rendered,
                Bounds(render_seconds, _WAIT_SECONDS, _MAX_ASKING, max_bytes),
            )

    def start(self) -> None:
        """Begins to start the process: it takes a tenth of a second, which the first chat need not wait."""
        if self._process is not None:
            self._process.start()

    async def render(self, chat: Chat) -> str:
        """The text that the assistant goes on with; the template writes the special tokens.

        Raises InvalidRequestError where the model has no template, or its template makes no text of these messages,
        and what BoundedProcess.ask raises.
        """
        if self._process is None:
            raise InvalidRequestError(
                "this model has no chat template", param="messages", code="no_chat_template", hint="use /v1/completions"
            )
        try:
            rendered = await self._process.ask(chat)
        except UnicodeEncodeError:
            raise InvalidRequestError("the chat has a lone surrogate, which is no text", param="messages") from None
        except TookTooLongError as error:
            raise refusal(f"it {error}") from None
        except ChildDiedError as error:
            raise refusal(f"its process {error}, perhaps for want of memory") from None
        if rendered.error is not None:
            raise InvalidRequestError(rendered.error, param="messages")
        return rendered.text

    def close(self) -> None:
        """Ends the process, at once."""
        if self._process is not None:
            self._process.close()
