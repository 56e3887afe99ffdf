"""The route that a request is for, found once, before anything is decided or read. Pure ASGI.

Who may ask, what is counted and what may be refused early all hang on this one answer and never on the requested
string: a comparison of our own would read some spelling of a path differently than the router does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.middleware.record import record_of
from service.contract.errors import NotFoundError

# Control characters and separators of lines. `$`, with which the router's patterns end, matches before a last newline.
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Entry(NamedTuple):
    """One route of the router: its own matching, and its path template."""

    matches: Callable[[Scope], tuple[Match, Scope]]
    path: str


class RouteMatch:
    """Writes the path of the matched route into the request's record. Refuses what can have no route."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = [Entry(route.matches, route.path or "") for route in iter_route_contexts(routes)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection or request. Raises NotFoundError for a path with a control character."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # there are none, and no key has been asked for
            return
        if scope["type"] == "http":
            if _CONTROL_CHARACTER.search(scope["path"]):
                raise NotFoundError("no path has a control character", hint="GET /docs lists them")
            record_of(scope).route = matched_path(self._routes, scope)
        await self._app(scope, receive, send)


def matched_path(routes: Sequence[Entry], scope: Scope) -> str:
    """The path template of the route that the router chooses; "" where it finds none.

    As in the router, the first that matches wholly is before any that does not take the method.
    """
    partial = ""
    for matches, path in routes:
        match, _ = matches(scope)
        if match is Match.FULL:
            return path
        if match is Match.PARTIAL:
            partial = partial or path
    return partial
