"""A text that is a function call, read as it grows: the function's name, and what each delta adds to its arguments.

The grammar has seen to the form (tool_forms.py). This file knows no HTTP.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Sequence

from service.api.schemas import openai_answers as answers
from service.api.structured_output.lark import ARGUMENTS, NAME

_HEAD = re.compile(rf'\s*\{{\s*"{NAME}"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{ARGUMENTS}"\s*:')
_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # what templates of Mistral's family demand of the ids that come back in a history


class CallReader:
    """The call of one choice."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names` are those that may be called: with one alone, the text is the arguments."""
        self.id = "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))
        self.name = names[0] if len(names) == 1 else None  # None: not known yet
        self.arguments = ""
        self._head = ""  # what has come while the name is not known
        self._depth = 0  # of open objects and lists
        self._in_string = self._escaped = False

    @property
    def complete(self) -> bool:
        """Whether the arguments, an object, are whole."""
        return bool(self.arguments) and self._depth == 0

    def push(self, text: str) -> answers.ToolCallDelta | None:
        """Takes more text; returns what it adds to the call, if anything: first of all the name."""
        if self.name is None:
            self._head += text
            match = _HEAD.match(self._head)
            if match is None:
                return None
            self.name, text = json.loads(match[1]), self._head[match.end() :]
        added = self._take(text if self.arguments else text.lstrip())
        if not added:
            return None
        if self.arguments == added:
            function: answers.CalledFunctionDelta = {"name": self.name, "arguments": added}
            return {"index": 0, "id": self.id, "type": "function", "function": function}
        return {"index": 0, "function": {"arguments": added}}

    def whole(self) -> list[answers.ToolCall]:
        """The call, as far as it has come; none before its arguments have begun."""
        if self.name is None or not self.arguments:
            return []
        return [
            {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}},
        ]

    def _take(self, text: str) -> str:
        """Adds to the arguments as much of a text as is of them."""
        end = 0
        while end < len(text) and not (self._depth == 0 and (end or self.arguments)):
            self._read(text[end])
            end += 1
        self.arguments += text[:end]
        return text[:end]

    def _read(self, character: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        else:
            self._depth += (character in "{[") - (character in "}]")
