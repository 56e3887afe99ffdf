"""POST /scalings: the scaling pass alone over a text, to look at the gate without generating."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Body, Depends, Response
from fastapi import Request as HttpRequest

from service.api.answers import ScalingsAnswer
from service.api.errors import GENERATION_ERRORS, documented
from service.api.examples import SCALINGS_ANSWER, SCALINGS_BODIES
from service.api.protocol import ScalingsBody
from service.api.record import RequestRecord, record_of
from service.api.rows import RowFormat, Rows, join
from service.api.run import CLIENT_CLOSED_REQUEST
from service.api.sse import ClientGoneError, until_disconnect
from service.api.state import Service, new_id, service_of
from service.engine.client import Client
from service.engine.request import Request, SequenceUsage
from service.errors import InternalError

router = APIRouter(tags=["generation"])


@router.post(
    "/scalings",
    summary="The gate's weights over a text",
    response_model=ScalingsAnswer,
    responses={
        200: {"content": {"application/json": {"example": SCALINGS_ANSWER}}},
        **documented(*GENERATION_ERRORS),
    },
)
async def scalings(
    http_request: HttpRequest,
    body: Annotated[ScalingsBody, Body(openapi_examples=SCALINGS_BODIES)],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """Row i is what the gate makes of the text up to token i: the weights with which token i + 1 would be predicted."""
    record = record_of(http_request.scope)
    try:
        content = await until_disconnect(http_request.receive, answer(body, service, record))
    except ClientGoneError:
        record.outcome = "cancelled"
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(content, media_type="application/json")


async def answer(body: ScalingsBody, service: Service, record: RequestRecord) -> bytes:
    """The whole answer as JSON."""
    ids = await service.codec.prompt_ids(body.prompt)
    request = Request(new_id("scal"), ids, None, body.return_scalings or "mean", 0)
    format = RowFormat(service.info, body.scalings_dtype)
    record.model, record.response_id, record.prompt_tokens = service.info.model, request.id, len(ids)
    now = asyncio.get_running_loop().time()
    with service.admission.admit([request], now):
        rows, usage = await scaling_rows(service.client, request, format, now + service.settings.request_timeout)
    record.queue_seconds = usage.queue_seconds
    service.metrics.prompt_tokens.inc(len(ids))
    experts = [expert["name"] for expert in service.info.experts]
    pieces = service.codec.pieces(ids)
    document = {
        "id": request.id,
        "model": service.info.model,
        "tokens": [{"id": id, "text": text} for id, text in zip(ids, pieces, strict=True)],
        "scalings": format.document(rows, 0),
        "usage": {
            "prompt_tokens": len(ids),
            "forward_passes": usage.forward_passes,
            "scaling_rows": usage.scaling_rows,
        },
        **summary(rows, experts),
    }
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


async def scaling_rows(
    client: Client, request: Request, format: RowFormat, deadline: float | None = None
) -> tuple[Rows, SequenceUsage]:
    """Runs the scaling pass and returns one row per position. Raises TimedOutError at the deadline."""
    parts: list[Rows] = []
    usage = SequenceUsage()
    async with client.submit(request, deadline=deadline) as outputs:
        async for output in outputs:
            if output.finish_reason == "error":
                raise InternalError(output.error or "the engine could not go on with this request")
            if output.gate is not None:
                parts.append(format.parse(output.gate))
            usage = output.usage or usage
    rows = join(parts)
    if rows is None or len(rows.mean) != len(request.prompt_token_ids):
        raise InternalError("the engine did not return a gate row for every position")
    return rows, usage


def summary(rows: Rows, experts: list[str]) -> dict[str, Any]:
    """Each expert's mean weight, and the share of positions at which it leads."""
    totals = rows.mean.mean(axis=0, dtype=np.float64).tolist()
    leads = np.bincount(rows.mean.argmax(axis=1), minlength=len(experts)) / len(rows.mean)
    return {
        "totals": dict(zip(experts, totals, strict=True)),
        "top1": dict(zip(experts, leads.tolist(), strict=True)),
    }
