"""Routes that change the server for everybody: the gate at run time, and the scalings log.

They act within this process's engine, for as long as it lives.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Response

from service.api.gate_views.scalings_log import DEFAULT_BYTES, DEFAULT_TOKENS
from service.api.middleware.json_body import JsonRoute
from service.api.openapi import BODY_ERRORS, documented
from service.api.schemas.answers import GateState, GateValues, LogRows, LogState, LogSummary
from service.api.schemas.bodies import GateBody, LogBody
from service.api.schemas.examples import GATE_BODIES, LOG_BODIES
from service.api.state import Service, service_of
from service.contract.checks import check_settings, stored_settings
from service.contract.steering import GateSettings

router = APIRouter(tags=["operation"], route_class=JsonRoute)

ServiceDependency = Annotated[Service, Depends(service_of)]


def gate_state(service: Service) -> GateState:
    """The settings that requests are admitted under, and the checkpoint's."""
    return {**_values(service.gate), "checkpoint": _values(stored_settings(service.info.xlora_config))}


def _values(settings: GateSettings) -> GateValues:
    return {
        "scaling_pass_value": settings.scaling_pass_value,
        "top_k_lora": settings.top_k_lora,
        "global_scaling_weight": settings.global_scaling_weight,
    }


@router.get("/gate", summary="The gate's settings", response_model=GateState, responses=documented(503))
async def get_gate(service: ServiceDependency) -> GateState:
    """The gate settings of requests that arrive now, and those of the checkpoint."""
    return gate_state(service)


@router.patch(
    "/gate", summary="Change the gate at run time", response_model=GateState, responses=documented(*BODY_ERRORS)
)
async def change_gate(
    body: Annotated[GateBody, Body(openapi_examples=GATE_BODIES)], service: ServiceDependency
) -> GateState:
    """PEFT's set_scaling_pass_value, set_topk_lora and set_global_scaling_weight, for requests that arrive afterwards;
    those that run keep theirs. A request's own `gate.top_k` goes before.
    """
    return _set_gate(service, replace(service.gate, **body.model_dump(include=body.model_fields_set)))


@router.delete("/gate", summary="The checkpoint's gate again", response_model=GateState, responses=documented(503))
async def reset_gate(service: ServiceDependency) -> GateState:
    """For requests that arrive afterwards."""
    return _set_gate(service, stored_settings(service.info.xlora_config))


def _set_gate(service: Service, settings: GateSettings) -> GateState:
    service.check_serving()
    check_settings(settings, service.info)
    service.client.set_gate(settings)
    service.gate = settings
    return gate_state(service)


@router.get("/scalings/log", summary="The scalings log", response_model=LogSummary, responses=documented(503))
async def get_log(service: ServiceDependency) -> LogSummary:
    """Switch, bounds, and what the rows say in a few numbers. Rows are the classifier's: before top-k and steering."""
    log = service.scalings_log
    state, snapshot = log.state(), log.snapshot()
    rows: LogRows = await asyncio.to_thread(snapshot.summary)
    return {**state, **rows}


@router.get(
    "/scalings/log.npz",
    summary="The rows of the scalings log",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        **documented(503),
    },
)
async def get_rows(service: ServiceDependency) -> Response:
    """Runs of consecutive positions by their length L, as in PEFT's get_bucketed_scalings_log: scalings_L
    [runs, L, sites, experts], order_L, start_L, request_L, choice_L; experts; sites. One site where all share a row.
    """
    snapshot = service.scalings_log.snapshot()
    return Response(await asyncio.to_thread(snapshot.npz), media_type="application/octet-stream")


@router.put(
    "/scalings/log", summary="Switch the scalings log", response_model=LogState, responses=documented(*BODY_ERRORS)
)
async def switch_log(
    body: Annotated[LogBody, Body(openapi_examples=LOG_BODIES)], service: ServiceDependency
) -> LogState:
    """On: rows of positions computed from now on, the newest that fit both bounds. Off: the rows stay."""
    service.check_serving()
    log = service.scalings_log
    if body.enabled:
        log.enable(body.max_tokens or DEFAULT_TOKENS, body.max_bytes or DEFAULT_BYTES)
    else:
        log.disable()
    service.client.log_scalings(body.enabled)
    return log.state()


@router.delete("/scalings/log", summary="Clear the scalings log", response_model=LogState, responses=documented(503))
async def clear_log(service: ServiceDependency) -> LogState:
    """Forgets the rows; the log stays on if it is."""
    service.scalings_log.clear()
    return service.scalings_log.state()
