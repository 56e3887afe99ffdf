"""The process that writes chats with a model's template: one JSON conversation a line in, one JSON text a line out.

    python -m service.api.generation.render_worker DIRECTORY MAX_BYTES

The template is the model's and the messages are a stranger's: together they may loop for ever, or take all memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from service.api.processes.child_loop import answer_lines, limit_process
from service.chat_template import Chat, ChatTemplate, refusal
from service.contract.errors import InvalidRequestError

_MAX_MEMORY_BYTES = 1 << 30  # of address space


class Rendered(msgspec.Struct, frozen=True):
    """A text, or why there is none."""

    text: str = ""
    error: str | None = None


def main(argv: list[str]) -> int:
    """Entry point of the process."""
    limit_process(_MAX_MEMORY_BYTES)
    template, max_bytes = ChatTemplate.load(Path(argv[1])), int(argv[2])
    assert template is not None, "a model without a template needs no such process"
    decoder = msgspec.json.Decoder(Chat)
    answer_lines(lambda line: _answer(template, decoder.decode(line), max_bytes))
    return 0


def _answer(template: ChatTemplate, chat: Chat, max_bytes: int) -> bytes:
    try:
        return _rendered(template, chat, max_bytes)
    except InvalidRequestError as error:
        return msgspec.json.encode(Rendered(error=error.message))


def _rendered(template: ChatTemplate, chat: Chat, max_bytes: int) -> bytes:
    try:
        answer = msgspec.json.encode(Rendered(template.render(chat)))
    except UnicodeEncodeError:
        raise refusal("it writes half of a surrogate pair, which is no text") from None
    if len(answer) > max_bytes:
        raise refusal(f"it makes {len(answer)} bytes of them; at most {max_bytes} are allowed")
    return answer


if __name__ == "__main__":
    sys.exit(main(sys.argv))
