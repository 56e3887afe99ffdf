"""create_app: the routes, what stands before them, and the life of the engine around them. No torch here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from service import __version__
from service.api import errors, openapi
from service.api.middleware.early_refusal import EarlyRefusal
from service.api.middleware.error_boundary import ErrorBoundary
from service.api.middleware.keys import Keys
from service.api.middleware.record import Recorder, SpanWriter
from service.api.middleware.route_match import RouteMatch
from service.api.middleware.security import BodyLimit, Guard
from service.api.routes import admin, chat, compare, generate, openai, ops, scalings, web
from service.api.state import Service, run_startup
from service.client.engine_client import Client
from service.observability.metrics import Metrics
from service.settings import Settings

_GENERATING = ("/generate", "/compare", "/scalings", "/v1/completions", "/v1/chat/completions")  # what is admitted
_RECORDED = (*_GENERATING, "/tokenize", "/detokenize")
_DESCRIPTION = """
Serves an X-LoRA model: several LoRA experts, mixed per token and per layer by a small gate. Every answer can say how.

Bodies are strict: unknown fields are errors, null means absent. Every error has the same shape.
"""


def create_app(
    client: Client,
    settings: Settings,
    metrics: Metrics,
    failed: asyncio.Event | None = None,
    spans: Sequence[SpanWriter] = (),
) -> FastAPI:
    """The application. It starts the client with the server and closes it at the end.

    `failed` is set when the model could not be loaded or the engine was lost; `app.state.service.error` then says why.
    Raises SettingsError for keys that cannot be read.
    """
    service = Service(client, settings, metrics)
    on_failure = failed or asyncio.Event()
    api_keys = Keys(settings.api_key_file, settings.api_keys, "api-key")
    admin_keys = Keys(settings.admin_key_file, settings.admin_keys, "admin-key")
    service.keys = [api_keys, admin_keys]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(run_startup(service, on_failure))
        try:
            yield
        finally:
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await starting
            await service.close()

    app = FastAPI(
        title="X-LoRA service",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # web.py has both pages, with files that need no other host
        redoc_url=None,
    )
    app.state.service = service
    errors.install(app)
    for module in (generate, compare, openai, chat, scalings, ops, admin):
        app.include_router(module.router)
    web.install(app)
    app.user_middleware = [  # outermost first
        Middleware(Recorder, metrics=metrics, endpoints=_RECORDED, spans=spans),
        Middleware(ErrorBoundary),
        Middleware(RouteMatch, routes=app.routes),
        *_cors(settings),
        Middleware(Guard, api_keys=api_keys, admin_keys=admin_keys),
        Middleware(EarlyRefusal, service=service, routes=_GENERATING),
        Middleware(BodyLimit, max_body_bytes=settings.max_body_bytes),
    ]
    openapi.finish(app, bool(api_keys))
    return app


def _cors(settings: Settings) -> list[Middleware]:
    """Nothing by default: pages of other origins may not read answers."""
    if not settings.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["*"],  # whatever a page asks for: clients send headers of their own, as x-stainless-lang
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    ]
