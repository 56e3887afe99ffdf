"""POST /scalings: the scaling pass alone over texts, to look at the gate without generating.

What is looked at, and in what grouping, is gate_views/view.py.
"""

from __future__ import annotations

import asyncio
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import numpy as np
import orjson
from fastapi import APIRouter, Body, Depends, Response
from fastapi import Request as HttpRequest

from service.api.gate_views.perplexity import Columns, Likelihoods
from service.api.gate_views.rows import FloatArray, RowFormat, Rows, join, npy
from service.api.gate_views.view import View, divergence, over_sites, shares, summarise
from service.api.generation.call import Call
from service.api.generation.scoring import log_probabilities
from service.api.middleware.json_body import JsonRoute
from service.api.openapi import GENERATION_ERRORS, documented
from service.api.schemas.answers import (
    OneText,
    ScalingsAnswer,
    ScalingsBatchAnswer,
    ScalingsFrame,
    ScalingsGroups,
)
from service.api.schemas.bodies import ScalingsBody
from service.api.schemas.examples import SCALINGS_ANSWER, SCALINGS_BODIES, SCALINGS_CSV
from service.api.state import Service, service_of
from service.client.engine_client import Client
from service.contract.engine_info import EngineInfo
from service.contract.errors import InternalError, InvalidRequestError
from service.contract.output import SequenceUsage
from service.contract.request import Request, ReturnScalings

_T = TypeVar("_T")

MAX_WEIGHTS = 1 << 26  # float32 numbers that the rows of one call may have

router = APIRouter(tags=["generation"], route_class=JsonRoute)

_MEDIA_TYPES = {
    "json": "application/json",
    "npy": "application/octet-stream",
    "csv": "text/csv; charset=utf-8",
}
_CONTENT = {
    "application/json": {"example": SCALINGS_ANSWER},
    "text/csv": {"schema": {"type": "string"}, "example": SCALINGS_CSV},
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
}


@router.post(
    "/scalings",
    summary="The gate's weights over a text, or over several",
    response_model=ScalingsAnswer | ScalingsBatchAnswer,
    responses={200: {"content": _CONTENT}, **documented(*GENERATION_ERRORS)},
)
async def scalings(
    http_request: HttpRequest,
    body: Annotated[ScalingsBody, Body(openapi_examples=SCALINGS_BODIES)],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """Row i is what the gate makes of the text up to token i: the weights with which token i + 1 would be predicted."""
    call = Call(http_request, service, "scal")
    return await call.answer(answer(body, call), _MEDIA_TYPES[body.format or "json"])


@dataclass(frozen=True, slots=True)
class Text:
    """One text and the rows of its selected positions, over the selected sites, of all experts."""

    ids: list[int]  # of the selected positions
    token_texts: list[str]
    rows: Rows
    likelihoods: Likelihoods | None  # where asked for


@dataclass(frozen=True, slots=True)
class Table:
    """What one text looks like at the asked granularity: one row per token or group, one column per expert."""

    names: list[str]
    mean: FloatArray  # [rows, E]
    entropy: list[float | None]
    top1: list[list[float]]  # [rows, E]; of groups only


async def answer(body: ScalingsBody, call: Call) -> bytes:
    """The whole answer in the asked format. Raises InvalidRequestError before anything is computed."""
    service = call.service
    prompts = await service.tokenizer.all_prompt_ids(body.texts)
    view = View.of(body, service.info)
    positions = [view.positions(len(ids)) for ids in prompts]
    _check_sizes(view, positions, service.info)
    columns = Columns(view.experts, view.expert_names)
    if body.perplexity:
        columns.check_size(positions)
    id = call.id
    kind: ReturnScalings = "full" if view.needs_sites else "mean"
    requests = [
        Request(f"{id}-{number}" if number else id, ids[: span.stop], None, kind, span.start)
        for number, (ids, span) in enumerate(zip(prompts, positions, strict=True))
    ]
    scores = [
        columns.requests(f"{request.id}-score", request.prompt_token_ids, span.start) if body.perplexity else []
        for request, span in zip(requests, positions, strict=True)
    ]
    tokens = sum(len(request.prompt_token_ids) for request in requests)
    call.begin(None)
    call.record.prompt_tokens = tokens
    format = RowFormat(service.info)
    all_scores = [one for own in scores for one in own]
    with call.admit([*requests, *all_scores]) as permit:
        found = await scaling_rows(service.client, requests, format, call.deadline)
        logprobs = await log_probabilities(service.client, all_scores, permit, call.deadline)
    usages = [usage for _, usage in found]
    call.record.queue_seconds = min(usage.queue_seconds for usage in usages)
    service.metrics.prompt_tokens.inc(tokens)
    frame: ScalingsFrame = {
        "id": id,
        "model": service.info.model,
        "usage": {
            "prompt_tokens": tokens,
            "forward_passes": sum(usage.forward_passes for usage in usages),
            "scaling_rows": sum(usage.scaling_rows for usage in usages),
        },
    }

    def rendered() -> bytes:
        texts = []
        for request, (rows, _), judged in zip(requests, found, scores, strict=True):
            ids = request.prompt_token_ids
            start = request.scalings_start or 0
            likelihoods = Likelihoods.of(columns, len(ids) - start, [logprobs[one.id] for one in judged])
            token_texts = service.tokenizer.texts(ids)[start:]
            texts.append(Text(ids[start:], token_texts, view.seen(rows), likelihoods if body.perplexity else None))
        return Renderer(body, view, service.info).render(texts, frame)

    return await asyncio.to_thread(rendered)


async def scaling_rows(
    client: Client, requests: Sequence[Request], format: RowFormat, deadline: float | None = None
) -> list[tuple[Rows, SequenceUsage]]:
    """Runs the scaling passes; one row per position from each request's `scalings_start` on (0 when None).

    Raises TimedOutError at the deadline.
    """
    parts: dict[str, list[Rows]] = {request.id: [] for request in requests}
    usages = {request.id: SequenceUsage() for request in requests}
    async with client.submit(*requests, deadline=deadline) as outputs:
        async for output in outputs:
            if output.finish_reason == "error":
                raise InternalError(output.error or "the engine could not go on with this request")
            if output.gate is not None:
                parts[output.request_id].append(format.parse(output.gate))
            usages[output.request_id] = output.usage or usages[output.request_id]
    found = []
    for request in requests:
        rows = join(parts[request.id])
        if rows is None or len(rows.mean) != len(request.prompt_token_ids) - (request.scalings_start or 0):
            raise InternalError("the engine did not return a gate row for every position")
        found.append((rows, usages[request.id]))
    return found


class Renderer:
    """Turns texts with their rows into the answer's bytes. It takes time: not for the event loop."""

    def __init__(self, body: ScalingsBody, view: View, info: EngineInfo) -> None:
        self._body = body
        self._view = view
        self._columns = Columns(view.experts, view.expert_names)
        self._format = RowFormat(info, body.scalings_dtype, view.site_names, view.expert_names)

    def render(self, texts: Sequence[Text], frame: ScalingsFrame) -> bytes:
        """`frame` is of the JSON document."""
        match self._body.format:
            case None | "json":
                document = self._batch(texts, frame) if self._body.is_batch else self._single(texts[0], frame)
                return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
            case "npy":
                return self._npy(texts[0])
            case "csv":
                return self._csv(texts)

    def _single(self, text: Text, frame: ScalingsFrame) -> ScalingsAnswer:
        return {**frame, **self._one(text)}

    def _batch(self, texts: Sequence[Text], frame: ScalingsFrame) -> ScalingsBatchAnswer:
        found = [shares(text.rows) for text in texts]
        return {
            **frame,
            "texts": [
                {**self._one(text), "shares": self._by_expert([_finite(share) for share in one])}
                for text, one in zip(texts, found, strict=True)
            ],
            "divergence": [[_finite(divergence(p, q)) for q in found] for p in found],
        }

    def _one(self, text: Text) -> OneText:
        summary = summarise(text.rows)
        document: OneText = {
            "tokens": [{"id": id, "text": one} for id, one in zip(text.ids, text.token_texts, strict=True)],
            "totals": self._by_expert(summary.mean.tolist()),
            "top1": self._by_expert(summary.top1.tolist()),
            "entropy": _finite(summary.entropy),
        }
        if self._view.granularity == "token":
            document["scalings"] = self._format.document(self._view.columns(text.rows), text.rows.start)
        else:
            document["groups"] = self._groups(text)
        if text.likelihoods is not None:
            document["perplexity"] = self._columns.document(text.likelihoods)
        return document

    def _groups(self, text: Text) -> ScalingsGroups:
        table = self._table(text)
        return {
            "granularity": self._view.granularity,
            "experts": self._view.expert_names,
            "names": table.names,
            "mean": table.mean,
            "entropy": table.entropy,
            "top1": table.top1,
        }

    def _by_expert(self, values: Sequence[_T]) -> dict[str, _T]:
        """Values of all experts -> those of the selected, by name."""
        return {name: values[index] for name, index in zip(self._view.expert_names, self._view.experts, strict=True)}

    def _table(self, text: Text) -> Table:
        view, rows = self._view, text.rows
        if view.granularity == "token":
            mean = np.ascontiguousarray(rows.mean[:, view.experts])
            return Table(text.token_texts, mean, [_finite(value) for value in rows.entropy.tolist()], [])
        groups = view.groups()
        found = [summarise(over_sites(rows, sites)) for sites in groups.values()]
        return Table(
            list(groups),
            np.stack([summary.mean[view.experts] for summary in found]).astype(np.float32),
            [_finite(summary.entropy) for summary in found],
            [summary.top1[view.experts].tolist() for summary in found],
        )

    def _npy(self, text: Text) -> bytes:
        rows = self._view.columns(text.rows)
        array = self._table(text).mean if rows.full is None else rows.full
        return npy(array.astype(self._body.scalings_dtype or "float32"))

    def _csv(self, texts: Sequence[Text]) -> bytes:
        view = self._view
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer)
        names = ["position", "token_id", "token"] if view.granularity == "token" else [view.granularity]
        judges = [f"logprob_{label}" for label in self._columns.labels] if self._body.perplexity else []
        writer.writerow(["text", *names, *view.expert_names, "entropy_nats", *judges])
        for number, text in enumerate(texts):
            table = self._table(text)
            for row, (name, weights, entropy) in enumerate(zip(table.names, table.mean, table.entropy, strict=True)):
                where = [text.rows.start + row, text.ids[row]] if view.granularity == "token" else []
                logprobs = [] if text.likelihoods is None else [column[row] for column in text.likelihoods.columns]
                values = [*weights.tolist(), entropy, *logprobs]
                writer.writerow([number, *where, name, *map(_number, values)])
            if text.likelihoods is not None:
                totals = [text.likelihoods.perplexity(column) for column in range(len(judges))]
                blank = [""] * (len(view.expert_names) + 1)
                writer.writerow([number, "", "", "perplexity", *blank, *map(_number, totals)])
        return buffer.getvalue().encode()


def _check_sizes(view: View, positions: Sequence[range], info: EngineInfo) -> None:
    """Raises InvalidRequestError for more than this server can hold."""
    per_position = len(info.experts) * (len(info.sites) if view.needs_sites else 1)
    weights = sum(map(len, positions)) * per_position
    if weights > MAX_WEIGHTS:
        raise InvalidRequestError(
            f"the rows have {weights} weights ({per_position} per position); at most {MAX_WEIGHTS} are allowed",
            param="select",
            code="too_large",
            hint="take fewer texts, or fewer positions with select.start and select.stop",
        )


def _number(value: float | None) -> str:
    """A cell of a table."""
    return "" if value is None else f"{value:.9g}"


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
