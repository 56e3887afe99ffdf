"""create_app: the routes, what stands before them, and the life of the engine around them. No torch here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from starlette.middleware import Middleware

from service import __version__
from service.api import errors, generate, ops, scalings, web
from service.api.security import BodyLimit, RequestCounter
from service.api.state import Service, run_startup
from service.engine.client import Client
from service.metrics import Metrics
from service.settings import Settings

_COUNTED = ("/generate", "/scalings", "/tokenize", "/detokenize")
_DESCRIPTION = """
Serves an X-LoRA model: several LoRA experts, mixed per token and per layer by a small gate. Every answer can say how.

Bodies are strict: unknown fields are errors, null means absent. Every error has the same shape.
"""


def create_app(client: Client, settings: Settings, metrics: Metrics, failed: asyncio.Event | None = None) -> FastAPI:
    """The application. It starts the client with the server and closes it at the end.

    `failed` is set when the model could not be loaded; `app.state.service.startup_error` then says why.
    """
    service = Service(client, settings, metrics)
    on_failure = failed or asyncio.Event()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(run_startup(service, on_failure))
        try:
            yield
        finally:
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await starting
            await client.close()

    app = FastAPI(
        title="X-LoRA service",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        middleware=[
            Middleware(RequestCounter, metrics=metrics, endpoints=_COUNTED),
            Middleware(BodyLimit, max_body_bytes=settings.max_body_bytes),
        ],
    )
    app.state.service = service
    errors.install(app)
    for module in (generate, scalings, ops):
        app.include_router(module.router)
    web.install(app)
    _drop_422(app)
    return app


def _drop_422(app: FastAPI) -> None:
    """FastAPI documents 422 for bad bodies; ours are 400."""
    schema = app.openapi()
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema.get("components", {}).get("schemas", {}).pop(name, None)
