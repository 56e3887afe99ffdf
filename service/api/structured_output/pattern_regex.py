"""A schema's `pattern`, an expression of ECMAScript, as one of llguidance that matches the JSON string as written.

JSON writes a quote, a backslash and the control characters as escapes; every string here has exactly one spelling, so
that what is written can be compared. Where ECMAScript, Python and the library differ about what a class contains, only
what all of them take is allowed: an answer is right whoever looks at it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

# A character of a string as JSON writes it.
CHARACTER = r'(?:[^"\\\x00-\x1f]|\\["\\bfnrt]|\\u00(?:0[0-7bef]|1[0-9a-f]))'

_MAX_DEPTH = 50  # of groups
_ESCAPED = [*map(chr, range(0x20)), '"', "\\"]  # what JSON does not write as it is
_NOT_RAW = r'"\\\x00-\x1f'
_WHITE = {"\t", "\n", "\v", "\f", "\r"}
_SPACES = r"\x20\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_ALL_SPACES = r"\s\x{feff}\x{180e}"
_WHITE_FOR_SOME = _WHITE | set(map(chr, range(0x1C, 0x20)))
_ANY = set(_ESCAPED)

# A class by its letter: what certainly belongs to it, and what may; each as raw characters, and escaped ones.
_CERTAIN: dict[str, tuple[str, set[str]]] = {
    "d": ("0-9", set()),
    "w": ("0-9A-Za-z_", set()),
    "s": (_SPACES, _WHITE),
    "D": (r"\P{Nd}", _ANY),
    "W": (r"[^\p{L}\p{M}\p{N}_]", _ANY),
    "S": (f"[^{_ALL_SPACES}]", _ANY - _WHITE_FOR_SOME),
}
_POSSIBLE: dict[str, tuple[str, set[str]]] = {
    "d": (r"\p{Nd}", set()),
    "w": (r"\p{L}\p{M}\p{N}_", set()),
    "s": (_ALL_SPACES, _WHITE_FOR_SOME),
    "D": ("[^0-9]", _ANY),
    "W": ("[^0-9A-Za-z_]", _ANY),
    "S": (f"[^{_SPACES}]", _ANY - _WHITE),
}
_OF_LETTERS = re.compile(r"\\[pP]\{(?:L|N|M|Script=)")  # of letters, digits and marks, none of which is escaped
_CONTROLS = {"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r", "0": "\0"}
_TOKEN = re.compile(
    r"""
      \\(?:u\{[0-9a-fA-F]{1,6}\} | u[0-9a-fA-F]{4} | x[0-9a-fA-F]{2} | c[a-zA-Z] | [pP]\{[\w=]+\} | .)
    | \(\?(?:<\w+>|P<\w+>|:|<?[=!]) | \{\d*(?:,\d*)?\}\?? | [*+?]\?? | .
    """,
    re.VERBOSE | re.DOTALL,
)


class PatternError(ValueError):
    """A pattern that cannot be held; the text says why."""


def pattern_regex(pattern: str) -> str:
    """The expression that matches the whole of a string, its quotes included. Raises PatternError."""
    return _Reader(pattern).read()


def literal(text: str) -> str:
    """A string as JSON writes it, the only way that the expressions here take it."""
    return json.dumps(text, ensure_ascii=False)


class _Reader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self._depth = 0  # of the groups that are open
        self._tokens = [match[0] for match in _TOKEN.finditer(pattern)]
        self._at = 0

    def read(self) -> str:
        options = [self._option()]
        while self._peek() == "|":
            self._at += 1
            options.append(self._option())
        if self._peek():
            raise PatternError("has a ) without its (")
        return f'"(?:{"|".join(options)})"'

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _next(self) -> str:
        if self._at == len(self._tokens):
            raise PatternError("ends within a class or a group")
        self._at += 1
        return self._tokens[self._at - 1]

    def _option(self) -> str:
        """One alternative of the whole; without its anchors anything may stand before and behind it."""
        before = self._take_anchor("^")
        parts = self._sequence()
        behind = self._take_anchor("$")
        if self._peek() not in ("|", ")", ""):
            raise PatternError(f"has {self._peek()!r} where only the beginning or the end is")
        return before + parts + behind

    def _take_anchor(self, anchor: str) -> str:
        if self._peek() != anchor:
            return f"{CHARACTER}*"
        self._at += 1
        return ""

    def _sequence(self) -> str:
        return "".join(self._items())

    def _items(self) -> Iterator[str]:
        repeatable = False
        while (token := self._peek()) and token not in ("|", ")", "$", "^"):
            self._at += 1
            if token[0] in "*+?" or (token[0] == "{" and token.strip("{}?")):
                if not repeatable:
                    raise PatternError(f"has {token!r} with nothing to repeat")
                if token.startswith("{,"):
                    raise PatternError(f"has {token!r}, which some engines read as a repetition and others as text")
                repeatable = False
                yield token[:-1] if len(token) > 1 and token[-1] == "?" else token
                continue
            repeatable = True
            if token[0] == "(":
                yield self._group(token)
            elif token == "[":
                yield self._class()
            else:
                yield "".join(map(self._character, token if token[0] == "{" else [token]))

    def _group(self, opening: str) -> str:
        if opening not in ("(", "(?:") and not opening.endswith(">"):
            raise PatternError(f"has {opening!r}: look-around and flags are not supported")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise PatternError(f"has groups more than {_MAX_DEPTH} deep")
        options = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            options.append(self._sequence())
        self._depth -= 1
        if self._peek() in ("^", "$"):
            raise PatternError(f"has {self._peek()!r} within a group")
        if self._next() != ")":
            raise PatternError("has a group without its end")
        return f"(?:{'|'.join(options)})"

    def _character(self, token: str) -> str:
        if token == ".":
            return _NO_LINE_BREAK
        single = _single(token)
        if single is not None:
            return _written("", {single}) if single in _ANY else _hex(single)
        raw, escaped = _escape(token, _CERTAIN)
        return _written(f"[{raw}]", escaped)

    def _class(self) -> str:
        negated = self._peek() == "^"
        self._at += negated
        raw, escaped = "", set[str]()
        while (token := self._next()) != "]":
            if len(token) > 1 and token[0] != "\\":  # a token of other places is characters here
                self._tokens[self._at - 1 : self._at] = token
                token = token[0]
            more, special = self._class_item(token, _POSSIBLE if negated else _CERTAIN)
            raw, escaped = raw + more, escaped | special
        if not raw and not escaped:
            raise PatternError("has an empty class")
        if negated:
            return _written(f"[^{raw}]", _ANY - escaped)
        return _written(f"[{raw}]" if raw else "", escaped)

    def _class_item(self, token: str, classes: dict[str, tuple[str, set[str]]]) -> tuple[str, set[str]]:
        first = _single(token)
        if first is None:
            return _escape(token, classes)
        if self._peek() != "-" or self._tokens[self._at + 1 : self._at + 2] in ([], ["]"]):
            return _span(first, first)
        self._at += 1
        token = self._next()
        last = _single(token) if len(token) == 1 or token[0] == "\\" else None
        if last is None or last < first:
            raise PatternError(f"has {token!r} at the end of a range")
        return _span(first, last)


def _span(first: str, last: str) -> tuple[str, set[str]]:
    return f"{_hex(first)}-{_hex(last)}", {one for one in _ESCAPED if first <= one <= last}


def _hex(character: str) -> str:
    return f"\\x{{{ord(character):x}}}"


def _single(token: str) -> str | None:
    """The character that a token is; None: it is a class."""
    if token == "\\":
        raise PatternError("ends with a backslash")
    if token[0] != "\\":
        return token
    kind, rest = token[1], token[2:]
    if kind in "dDwWsSpP":
        return None
    if kind in "ux" and rest:
        code = int(rest.strip("{}"), 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise PatternError(f"has {token!r}, which is no character")
        return chr(code)
    if kind == "c" and rest:
        return chr(ord(rest) % 32)
    if kind in _CONTROLS:
        return _CONTROLS[kind]
    if kind.isascii() and kind.isalnum():
        raise PatternError(f"has {token!r}, which this server does not know")
    return kind


def _escape(token: str, classes: dict[str, tuple[str, set[str]]]) -> tuple[str, set[str]]:
    if token[1] not in "pP":
        return classes[token[1]]
    if len(token) == 2:
        raise PatternError(f"has {token!r} without a property")
    are_known = _OF_LETTERS.match(token) is not None
    if classes is _CERTAIN:
        return token, _ANY if are_known and token[1] == "P" else set()
    return token, set() if are_known and token[1] == "p" else _ANY


def _written(raw: str, escaped: set[str]) -> str:
    """The characters of a class as JSON writes them."""
    parts = [f"[{raw}&&[^{_NOT_RAW}]]"] if raw else []
    spellings = [literal(one)[2:-1] for one in sorted(escaped)]  # behind the backslash
    letters = "".join(re.escape(one) for one in spellings if len(one) == 1)
    parts += [rf"\\[{letters}]"] if letters else []
    codes = "|".join(one[3:] for one in spellings if len(one) > 1)
    parts += [rf"\\u00(?:{codes})"] if codes else []
    return f"(?:{'|'.join(parts)})" if parts else "[^\\x{0}-\\x{10ffff}]"


_NO_LINE_BREAK = _written(r"[^\n\r\x{2028}\x{2029}]", _ANY - {"\n", "\r"})
