"""How a route reads its JSON body: bounded in what it is made of before it is parsed, and parsed fast.

Parsing and validating hold the event loop up, for everybody. What they cost grows with the number of values, and most
of all with that of lists, objects and strings: both are counted first. This file knows JSON and no fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json

from service.contract.errors import InvalidRequestError

MAX_PARTS = 1 << 16  # lists, objects and strings in one body, names of fields included
MAX_COMMAS = 1 << 19  # between values: as many as the prompts of one call may have tokens

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_QUOTE, _COMMA, _OPENING = ord('"'), ord(","), ord("{")
_CONTAINERS = frozenset({list, dict})
_LARGE = 2.0**63  # a number from here on is written as a float on purpose, or is no field's
_LOWER = 0x20  # "[" is "{" without this bit, and nothing else is


class JsonRoute(APIRoute):
    """A route that refuses a body with too many parts, and parses the others with pydantic's own parser."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind ours."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            request = JsonRequest(request.scope, request.receive)
            check_size(await request.body())
            try:
                return await handle(request)
            except RequestValidationError as error:
                raise _without_frames(error) from None

        return handle if self.body_field is None else handle_json


class JsonRequest(Request):
    """A request whose body is UTF-8."""

    async def json(self) -> Any:
        """The body's value; integers are exact, also as 16.0, and NaN and Infinity are left to the fields' own checks.

        Raises JSONDecodeError, as FastAPI expects it; the message says where the mistake is.
        """
        body = (await self.body()).removeprefix(_BYTE_ORDER_MARK)
        try:
            return whole_numbers(from_json(body))
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


def check_size(body: bytes) -> None:
    """Raises InvalidRequestError for a body of more than MAX_PARTS or MAX_COMMAS."""
    parts, commas = _at_most(body)
    if parts > MAX_PARTS or commas > MAX_COMMAS:
        parts, commas = count(body)
    bounds = ((parts, MAX_PARTS, "lists, objects and strings"), (commas, MAX_COMMAS, "commas between values"))
    for number, most, what in bounds:
        if number > most:
            raise InvalidRequestError(
                f"the body has {number} {what}; at most {most} are allowed",
                code="too_large",
                hint="send fewer of them in one request; how long a string is does not count",
            )


def whole_numbers(value: Any) -> Any:
    """The same with integers in place of numbers without a fraction, at every depth: JSON knows one kind of number, and
    JSON Schema calls 16.0 an integer. Changes the lists and objects where they are.
    """
    root = [value]
    pending: list[Any] = [root]
    while pending:
        one = pending.pop()
        items = one.values() if isinstance(one, dict) else one
        kinds = set(map(type, items))
        if float in kinds:
            if isinstance(one, dict):
                one |= {name: _whole(item) for name, item in one.items()}
            else:
                one[:] = map(_whole, one)
        if not kinds.isdisjoint(_CONTAINERS):
            pending.extend(item for item in items if item and type(item) in _CONTAINERS)
    return root[0]


def _whole(item: Any) -> Any:
    return int(item) if type(item) is float and item.is_integer() and -_LARGE < item < _LARGE else item


def _at_most(body: bytes) -> tuple[int, int]:
    """As `count`, but what stands inside strings counts too: a few looks that cost next to nothing."""
    return body.count(b"[") + body.count(b"{") + body.count(b'"') // 2, body.count(b",")


def count(body: bytes) -> tuple[int, int]:
    """How many lists, objects and strings a JSON text has, and how many commas between values; some numbers where it is
    not JSON.
    """
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # backslashes stand in strings only
    characters = np.frombuffer(plain, np.uint8)
    quotes = characters == _QUOTE
    inside = np.cumsum(quotes, dtype=np.uint8) & 1  # wraps around, and stays odd inside
    opening = (characters | _LOWER) == _OPENING
    parts = np.count_nonzero(opening > inside) + np.count_nonzero(quotes) // 2
    return int(parts), int(np.count_nonzero((characters == _COMMA) > inside))


def _without_frames(error: RequestValidationError) -> RequestValidationError:
    """The error without tracebacks: they lead to FastAPI's frames, which hold the error and the body. Together these
    would stay until a garbage collection comes by.
    """
    error.__cause__ = error.__context__ = None
    for detail in error.errors():
        reason = detail.get("ctx", {}).get("error")  # of a validator of ours
        if isinstance(reason, Exception):
            reason.__traceback__ = None
    return error.with_traceback(None)
