"""Routes for operators: probes, metrics, what is served, and the tokenizer.

The probes answer HEAD as well: load balancers ask so.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Body, Depends, Response
from fastapi.responses import JSONResponse

from service.api.generation.tokenizer import ModelTokenizer
from service.api.middleware.json_body import JsonRoute
from service.api.off_loop import off_loop
from service.api.openapi import BODY_ERRORS, documented
from service.api.routes.admin import gate_state
from service.api.schemas.answers import DetokenizeAnswer, Health, Info, Status, TokenizeAnswer
from service.api.schemas.bodies import DetokenizeBody, TokenizeBody
from service.api.schemas.examples import DETOKENIZE_BODIES, TOKENIZE_BODIES
from service.api.state import Service, service_of
from service.contract.errors import InvalidRequestError

router = APIRouter(route_class=JsonRoute)

ServiceDependency = Annotated[Service, Depends(service_of)]
_RED: dict[int | str, dict[str, Any]] = {503: {"model": Status, "description": "Not so: `status` says why"}}


@router.head("/livez", include_in_schema=False)
@router.get("/livez", tags=["operation"], summary="Is the process fine?", response_model=Status, responses=_RED)
async def livez(service: ServiceDependency) -> Response:
    """200 while the process and the engine are fine, also while the model loads; 503 when the engine has died, or has
    given no sign of life for --engine-timeout.
    """
    dead = service.state == "engine dead"
    return _status("engine dead" if dead else "ok", 503 if dead else 200)


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", tags=["operation"], summary="Can it serve?", response_model=Status, responses=_RED)
async def readyz(service: ServiceDependency) -> Response:
    """200 after the model has loaded and a warm-up generation has run, until the server is told to stop; 503 meanwhile
    where the engine has work and has made no step for --stall-seconds.
    """
    return _status(service.state, 200 if service.ready else 503)


@router.head("/health", include_in_schema=False)
@router.get("/health", tags=["operation"], summary="A glance", response_model=Health, responses=documented(500))
async def health(service: ServiceDependency) -> Response:
    """Always 200; `status` is ok, loading, draining, stalled or engine dead."""
    content: Health = {
        "status": service.state,
        "model": service.info.model if service.state in ("ok", "stalled") else None,
        "uptime_seconds": round(time.monotonic() - service.started_at, 3),
        "requests_running": service.metrics.running,
        "requests_waiting": service.metrics.waiting,
    }
    return JSONResponse(content)


@router.get(
    "/metrics",
    tags=["operation"],
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(service: ServiceDependency) -> Response:
    """Prometheus' text format."""
    return Response(await service.scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/info", tags=["operation"], summary="What is served", response_model=Info, responses=documented(503))
async def info(service: ServiceDependency) -> Response:
    """Model, versions, the gate's configuration, experts, sites, limits and a hash over all weights."""
    engine = service.info
    content: Info = {
        "model": engine.model,
        "architecture": engine.architecture,
        "dtype": engine.dtype,
        "device": engine.device,
        "versions": engine.versions,
        "experts": engine.experts,
        "n_classes": len(engine.experts),
        "sites": engine.sites,
        "n_layers": len(engine.sites),
        "xlora_config": engine.xlora_config,
        "dummy_row": engine.dummy_row,
        "gate": gate_state(service),
        "limits": {
            "max_model_len": engine.max_model_len,
            "max_num_seqs": engine.max_num_seqs,
            "max_num_batched_tokens": engine.max_num_batched_tokens,
            "block_size": engine.block_size,
            "kv_blocks": engine.kv_blocks_total,
            "kv_bytes": engine.kv_bytes,
            "vocab_size": engine.vocab_size,
            "max_body_bytes": service.settings.max_body_bytes,
        },
        "sampling_defaults": {"max_tokens": service.sampling_defaults.max_tokens, **service.sampling_defaults.fields},
        "weights_sha256": engine.weights_sha256,
        "gate_profile": engine.gate_profile,
        "draft_head": engine.draft_head,
        "draft_layer": (
            {"depth": len(engine.draft_layer), "agreement": engine.draft_layer} if engine.draft_layer else None
        ),
    }
    return JSONResponse(content)


@router.post(
    "/tokenize",
    tags=["tokenizer"],
    summary="Text to token ids",
    response_model=TokenizeAnswer,
    responses=documented(*BODY_ERRORS),
)
async def tokenize(
    body: Annotated[TokenizeBody, Body(openapi_examples=TOKENIZE_BODIES)], service: ServiceDependency
) -> Response:
    """As /generate sees a prompt, and a chat's route its messages."""
    tokenizer, max_model_len = service.tokenizer, service.info.max_model_len
    text = body.text or ""
    written = None if body.messages is None else await tokenizer.chat_ids(body.chat())

    def answer() -> bytes:
        ids = written
        if ids is None:
            ids = tokenizer.tokenize(text, body.add_special_tokens is not False, tokenizer.max_tokenized)
        if ids is None or len(ids) > tokenizer.max_tokenized:
            raise _too_many(tokenizer, "text", f"more than {tokenizer.max_tokenized}" if ids is None else str(len(ids)))
        texts = tokenizer.texts(ids)
        content: TokenizeAnswer = {
            "token_ids": ids,
            "tokens": [{"id": id, "text": text} for id, text in zip(ids, texts, strict=True)],
            "count": len(ids),
            "max_model_len": max_model_len,
        }
        return orjson.dumps(content)

    return _json(await off_loop(answer, tokens=len(text) + len(written or ())))


@router.post(
    "/detokenize",
    tags=["tokenizer"],
    summary="Token ids to text",
    response_model=DetokenizeAnswer,
    responses=documented(*BODY_ERRORS),
)
async def detokenize(
    body: Annotated[DetokenizeBody, Body(openapi_examples=DETOKENIZE_BODIES)], service: ServiceDependency
) -> Response:
    """The inverse of /tokenize."""
    tokenizer, ids = service.tokenizer, body.token_ids
    if len(ids) > tokenizer.max_tokenized:
        raise _too_many(tokenizer, "token_ids", str(len(ids)))

    def answer() -> bytes:
        content: DetokenizeAnswer = {"text": tokenizer.decode(ids, body.skip_special_tokens is not False)}
        return orjson.dumps(content)

    return _json(await off_loop(answer, tokens=len(ids)))


def _too_many(tokenizer: ModelTokenizer, param: str, tokens: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"`{param}` has {tokens} tokens; at most {tokenizer.max_tokenized} are allowed in one call",
        param=param,
        code="too_large",
        hint="send it in parts",
    )


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def _status(status: str, code: int) -> Response:
    content: Status = {"status": status}
    return JSONResponse(content, status_code=code)
