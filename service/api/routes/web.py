"""GET / and /web/*: the inspector page, plain files of service/web. Knows headers, and nothing about the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.staticfiles import StaticFiles

FILES = Path(__file__).parents[2] / "web"

_HEADERS = {
    # Only our own files run and nothing is fetched from elsewhere; blob: is for what the page exports and draws.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again every time, sent only when it has changed
}


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """A file, or 304, with our headers."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


def install(app: FastAPI) -> None:
    """Adds the page; its URLs are relative, so that it works behind a path prefix."""
    files = _Files(directory=FILES)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    app.mount("/web", files)
