"""The scaling pass alone over texts: from a body to rows of the gate, and how likely each text is under each expert.

What is looked at, and in what grouping, is gate_views/view.py. This file knows no HTTP and no formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.api.gate_views.perplexity import Columns, Likelihoods
from service.api.gate_views.rows import RowFormat, Rows, join
from service.api.gate_views.view import View
from service.api.generation.caller import Caller
from service.api.generation.scoring import log_probabilities
from service.api.generation.tokenizer import ModelTokenizer
from service.api.schemas.answers import ScalingsFrame
from service.api.schemas.bodies import ScalingsBody
from service.client.engine_client import Client
from service.contract.engine_info import EngineInfo
from service.contract.errors import InternalError, InvalidRequestError
from service.contract.output import SequenceUsage
from service.contract.request import Request, ReturnScalings

MAX_WEIGHTS = 1 << 26  # float32 numbers that the rows of one call may have


@dataclass(frozen=True, slots=True)
class Text:
    """One text and the rows of its selected positions, over the selected sites, of all experts."""

    ids: list[int]  # of the selected positions
    token_texts: list[str]
    rows: Rows
    likelihoods: Likelihoods | None  # where asked for


@dataclass(frozen=True, slots=True)
class Looked:
    """The scaling passes of one call over its texts, and how likely each column finds them."""

    view: View
    columns: Columns
    requests: list[Request]  # one per text
    found: list[tuple[Rows, SequenceUsage]]
    scores: list[list[Request]]  # by text: of every column, where they are asked for
    logprobs: dict[str, list[float]]  # by the scores' ids
    perplexity: bool

    def texts(self, tokenizer: ModelTokenizer) -> list[Text]:
        """The texts with what was found. It takes time: not for the event loop."""
        texts = []
        for request, (rows, _), judged in zip(self.requests, self.found, self.scores, strict=True):
            ids, start = request.prompt_token_ids, request.scalings_start or 0
            likelihoods = Likelihoods.of(self.columns, len(ids) - start, [self.logprobs[one.id] for one in judged])
            seen = likelihoods if self.perplexity else None
            texts.append(Text(ids[start:], tokenizer.texts(ids)[start:], self.view.seen(rows), seen))
        return texts

    def frame(self, id: str, model: str) -> ScalingsFrame:
        """The part of a document that stands around the texts."""
        usages = [usage for _, usage in self.found]
        return {
            "id": id,
            "model": model,
            "usage": {
                "prompt_tokens": sum(len(request.prompt_token_ids) for request in self.requests),
                "forward_passes": sum(usage.forward_passes for usage in usages),
                "scaling_rows": sum(usage.scaling_rows for usage in usages),
            },
        }


async def look(body: ScalingsBody, call: Caller) -> Looked:
    """Runs the scaling passes and the scores. Raises InvalidRequestError before anything is computed."""
    service = call.service
    prompts = await service.tokenizer.all_prompt_ids(body.texts)
    view = View.of(body, service.info)
    positions = [view.positions(len(ids)) for ids in prompts]
    _check_sizes(view, positions, service.info)
    columns = Columns(view.experts, view.expert_names)
    if body.perplexity:
        columns.check_size(positions)
    kind: ReturnScalings = "full" if view.needs_sites else "mean"
    requests = [
        Request(f"{call.id}-{number}" if number else call.id, ids[: span.stop], None, kind, span.start)
        for number, (ids, span) in enumerate(zip(prompts, positions, strict=True))
    ]
    scores = [
        columns.requests(f"{request.id}-score", request.prompt_token_ids, span.start) if body.perplexity else []
        for request, span in zip(requests, positions, strict=True)
    ]
    call.begin(None, sum(len(request.prompt_token_ids) for request in requests))
    all_scores = [one for own in scores for one in own]
    with call.admit([*requests, *all_scores]) as permit:
        found = await scaling_rows(service.client, requests, RowFormat(service.info), call.deadline)
        logprobs = await log_probabilities(service.client, all_scores, permit, call.deadline)
    return Looked(view, columns, requests, found, scores, logprobs, bool(body.perplexity))


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
