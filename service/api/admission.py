"""How much may wait: bounds on queued choices and prompt tokens, and how soon a refused caller should try again.

Something is queued from its submission to its first token, whether it waits for its turn or is being read. This file
knows no HTTP and no engine; time is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from service.engine.client import choices_of
from service.engine.request import Request
from service.errors import OverloadedError

_SMOOTHING = 0.2  # weight of the newest wait in the mean
_LONGEST_RETRY_SECONDS = 60


class Ticket:
    """What one caller's requests add to the queue until their first tokens."""

    def __init__(self, admission: Admission, requests: Sequence[Request], now: float) -> None:
        self._admission = admission
        self._waiting = {one.id: (choices_of(one), len(one.prompt_token_ids)) for one in requests}
        self._since = now

    @property
    def choices(self) -> int:
        """Choices still queued."""
        return sum(choices for choices, _ in self._waiting.values())

    @property
    def tokens(self) -> int:
        """Prompt tokens still queued."""
        return sum(tokens for _, tokens in self._waiting.values())

    def started(self, request_id: str, now: float) -> None:
        """The first token of a request has come; later calls change nothing."""
        if request_id in self._waiting:
            choices, tokens = self._waiting.pop(request_id)
            self._admission.dequeue(choices, tokens)
            self._admission.observe_wait(now - self._since)

    def close(self) -> None:
        """The requests have ended, however that came."""
        self._admission.dequeue(self.choices, self.tokens)
        self._waiting.clear()


class Admission:
    """The accounts of everything queued or running."""

    def __init__(self, max_choices: int, max_tokens: int) -> None:
        self.running = 0  # callers between submission and end
        self.queued_choices = 0
        self.queued_tokens = 0
        self._max_choices = max_choices
        self._max_tokens = max_tokens
        self._wait_seconds = 1.0  # smoothed, from submission to first token

    @contextmanager
    def admit(self, requests: Sequence[Request], now: float, *, continued: bool = False) -> Iterator[Ticket]:
        """Holds a place for the length of the block. Raises OverloadedError when there is none.

        What is over a bound by itself is admitted when nothing else is queued: it would never be otherwise. So is what
        continues a call that has been admitted before.
        """
        ticket = Ticket(self, requests, now)
        if self.queued_choices and not continued:
            self._check("choices", self.queued_choices + ticket.choices, self._max_choices, "--max-queued-requests")
            self._check("prompt tokens", self.queued_tokens + ticket.tokens, self._max_tokens, "--max-queued-tokens")
        self.queued_choices += ticket.choices
        self.queued_tokens += ticket.tokens
        self.running += 1
        try:
            yield ticket
        finally:
            ticket.close()
            self.running -= 1

    def dequeue(self, choices: int, tokens: int) -> None:
        """They wait no longer."""
        self.queued_choices -= choices
        self.queued_tokens -= tokens

    def observe_wait(self, seconds: float) -> None:
        """How long a request has just been queued."""
        self._wait_seconds += _SMOOTHING * (seconds - self._wait_seconds)

    def _check(self, what: str, wanted: int, most: int, flag: str) -> None:
        if wanted <= most:
            return
        error = OverloadedError(
            f"the server is full: {wanted} {what} would be waiting, and {most} may",
            hint=f"try again after the time in Retry-After; the server's {flag} sets the limit",
        )
        error.retry_after_seconds = min(max(1, math.ceil(self._wait_seconds)), _LONGEST_RETRY_SECONDS)
        raise error
