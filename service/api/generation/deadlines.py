"""When a call must have ended. Deadlines are in the time of the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.api.middleware.record import RequestRecord
from service.api.schemas.fields import OneTextFields
from service.contract.errors import InvalidRequestError, TimedOutError

GRACE_SECONDS = 0.5  # after the deadline: for the end as the engine's requests have it, with what they have generated


def deadline_of(record: RequestRecord, body: OneTextFields | None, limit: float) -> float:
    """When a call must have ended: its own timeout, or the server's limit in seconds, after the request's arrival.

    Raises InvalidRequestError for a timeout above the limit.
    """
    wanted = None if body is None else body.timeout
    if wanted is not None and wanted > limit:
        raise InvalidRequestError(
            f"timeout is {wanted:g}; this server allows {limit:g} seconds at most (--request-timeout)",
            param="timeout",
        )
    passed = time.perf_counter() - record.started
    return asyncio.get_running_loop().time() + (limit if wanted is None else wanted) - passed


@asynccontextmanager
async def before(deadline: float) -> AsyncIterator[None]:
    """Cancels what the block awaits at the deadline. Raises TimedOutError then."""
    timeout = asyncio.timeout_at(deadline)
    try:
        async with timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise TimedOutError("the request has reached its timeout") from None
