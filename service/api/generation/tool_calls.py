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
    """The call of one choice. Stop strings stand behind it: what they cut off is not in the arguments it is told."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names` are those that may be called: with one alone, the text is the arguments."""
        self.id = "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))
        self.name = names[0] if len(names) == 1 else None  # None: not known yet
        self._head = ""  # what has come while the name is not known
        self._begun = False  # whether some of the arguments has come
        self._depth = 0  # of open objects and lists
        self._in_string = self._escaped = False

    @property
    def complete(self) -> bool:
        """Whether the arguments, an object, are whole."""
        return self._begun and self._depth == 0

    def push(self, text: str) -> str:
        """Takes more text; returns as much of it as is of the arguments."""
        if self.name is None:
            self._head += text
            match = _HEAD.match(self._head)
            if match is None:
                return ""
            self.name, text = json.loads(match[1]), self._head[match.end() :]
        if not self._begun:
            text = text.lstrip()
        end = 0
        while end < len(text) and not self.complete:
            self._read(text[end])
            end += 1
        return text[:end]

    def delta(self, arguments: str, first: bool) -> answers.ToolCallDelta:
        """Return the delta that more arguments make; the first of them brings the name."""
        if not first:
            return {"index": 0, "function": {"arguments": arguments}}
        function: answers.CalledFunctionDelta = {"name": self._known_name(), "arguments": arguments}
        return {"index": 0, "id": self.id, "type": "function", "function": function}

    def whole(self, arguments: str) -> list[answers.ToolCall]:
        """The call, as far as it has come; none before its arguments have begun."""
        if not arguments:
            return []
        function: answers.CalledFunction = {"name": self._known_name(), "arguments": arguments}
        return [{"id": self.id, "type": "function", "function": function}]

    def _known_name(self) -> str:
        assert self.name is not None, "arguments follow the name"
        return self.name

    def _read(self, character: str) -> None:
        self._begun = True
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        else:
            self._depth += (character in "{[") - (character in "}]")
