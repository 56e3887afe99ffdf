"""How likely given tokens are: the engine's scores, as numbers per request. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from service.api.generation.admission import Permit
from service.client.engine_client import Client
from service.contract.errors import InternalError
from service.contract.request import Request, SamplingParams
from service.contract.steering import Steering

_SCORING = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)


def score_request(
    id: str,
    tokens: list[int],
    start: int,
    steering: Steering | None,
    *,
    freeze_after: int | None = None,
    cache_salt: str = "",
) -> Request:
    """Asks for the log-probabilities of tokens[start:] under a gate; start is 1 at least, and there is such a token."""
    return Request(
        id,
        tokens,
        _SCORING,
        cache_salt=cache_salt,
        freeze_after=freeze_after,
        steering=steering,
        score_from=start,
    )


async def log_probabilities(
    client: Client, requests: Sequence[Request], permit: Permit, deadline: float | None = None
) -> dict[str, list[float]]:
    """Natural logs, by request id, one per scored token. `permit` gives up each one's place when it ends.

    Raises TimedOutError at the deadline.
    """
    found: dict[str, list[float]] = {request.id: [] for request in requests}
    if not requests:
        return found
    async with client.submit(*requests, deadline=deadline) as outputs:
        async for output in outputs:
            if output.finish_reason == "error":
                raise InternalError(output.error or "the engine could not go on with this request")
            found[output.request_id] += [token.logprob or 0.0 for token in output.prompt_logprobs]
            if output.finish_reason is not None:
                waited = 0.0 if output.usage is None else output.usage.queue_seconds
                permit.done(output.request_id, asyncio.get_running_loop().time(), waited)
    for request in requests:
        if len(found[request.id]) != len(request.prompt_token_ids) - (request.score_from or 0):
            raise InternalError("the engine did not score every token")
    return found
