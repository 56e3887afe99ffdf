"""POST /scalings: the scaling pass alone over texts, to look at the gate without generating.

What is looked at is generation/scaling_pass.py; this is how it is written.
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

from service.api.gate_views.perplexity import Columns
from service.api.gate_views.rows import FloatArray, RowFormat, npy
from service.api.gate_views.view import View, divergence, over_sites, shares, summarise
from service.api.generation.call import Call
from service.api.generation.scaling_pass import Text, look
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
from service.contract.engine_info import EngineInfo

_T = TypeVar("_T")

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
class Table:
    """The view of one text at the asked granularity: one row per token or group, one column per expert."""

    names: list[str]
    mean: FloatArray  # [rows, E]
    entropy: list[float | None]
    top1: list[list[float]]  # [rows, E]; of groups only


async def answer(body: ScalingsBody, call: Call) -> bytes:
    """The whole answer in the asked format. Raises InvalidRequestError before anything is computed."""
    service = call.service
    looked = await look(body, call)
    frame = looked.frame(call.id, service.info.model)
    call.record.queue_seconds = min(usage.queue_seconds for _, usage in looked.found)
    service.metrics.prompt_tokens.inc(frame["usage"]["prompt_tokens"])

    def rendered() -> bytes:
        return Renderer(body, looked.view, service.info).render(looked.texts(service.tokenizer), frame)

    return await asyncio.to_thread(rendered)


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


def _number(value: float | None) -> str:
    """A cell of a table."""
    return "" if value is None else f"{value:.9g}"


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
