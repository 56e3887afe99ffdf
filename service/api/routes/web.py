"""The pages: the inspector at /, the API's documentation at /docs and /redoc, their files under /web, and the examples
of the bundle for the inspector's menu. Knows headers and files, and nothing about the pages.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.staticfiles import StaticFiles

from service.api.state import Service, service_of

FILES = Path(__file__).parents[2] / "web"
PAGES = {"/": "index.html", "/docs": "docs.html", "/redoc": "redoc.html"}
MAX_EXAMPLES, MAX_EXAMPLES_BYTES = 200, 1 << 20

# Only our own files run and nothing is fetched from elsewhere; blob: is for what the page exports and draws.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Redoc writes <style> elements while it runs, and searches in a worker that it makes of a text.
_REDOC_POLICY = _POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'") + "; worker-src blob:"
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again every time, sent only when it has changed
}


class _Files(StaticFiles):
    def file_response(self, full_path: Any, *args: Any, **kwargs: Any) -> Response:
        """A file, or 304, with our headers."""
        response = super().file_response(full_path, *args, **kwargs)
        response.headers.update(_HEADERS)
        if Path(full_path).name == PAGES["/redoc"]:
            response.headers["Content-Security-Policy"] = _REDOC_POLICY
        return response


def install(app: FastAPI) -> None:
    """Adds the pages; their URLs are relative, so that they work behind a path prefix."""
    files = _Files(directory=FILES, packages=[("fastapi_offline", "static")])

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    @app.get("/redoc", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response(PAGES[request.scope["route"].path], request.scope)

    @app.get("/examples", include_in_schema=False)
    async def examples(service: Annotated[Service, Depends(service_of)]) -> Response:
        return JSONResponse(await asyncio.to_thread(read_examples, Path(service.settings.model)))

    app.mount("/web", files)


def read_examples(bundle: Path) -> list[dict[str, str]]:
    """The prompts of the bundle's examples.json, each with its domain where it has one; none where there is no such
    file, or none that can be read: a menu is not worth an error.
    """
    path = bundle / "examples.json"
    try:
        if path.stat().st_size > MAX_EXAMPLES_BYTES:
            return []
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    entries = found[:MAX_EXAMPLES] if isinstance(found, list) else []
    return [
        {name: entry[name] for name in ("domain", "prompt") if isinstance(entry.get(name), str)}
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("prompt"), str)
    ]
