"""How much may wait: bounds on choices that wait for a slot and on queued prompt tokens, and when to come again.

The engine works on so many choices at once as it has slots; the others wait. The bound on those is a share of the slots
by default, because then a wait is the same share of the time a choice takes, on any machine and for any model. Prompt
tokens are queued until their request's first token. This file knows no HTTP and no engine; time is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from service.contract.errors import OverloadedError
from service.contract.request import Request

_SMOOTHING = 0.1  # weight of the newest choice in the mean
_MAX_RETRY_SECONDS = 60


class Permit:
    """The slots and queued tokens of one caller's requests, until they end."""

    def __init__(self, admission: Admission, requests: Sequence[Request], now: float) -> None:
        self._admission = admission
        self._since = now
        self.choices = sum(one.num_choices for one in requests)  # not ended
        self._tokens = {one.id: len(one.prompt_token_ids) for one in requests}

    @property
    def tokens(self) -> int:
        return sum(self._tokens.values())

    def started(self, request_id: str) -> None:
        """The first token of a request has come; later calls change nothing."""
        self._admission.queued_tokens -= self._tokens.pop(request_id, 0)

    def ended(self, now: float, queue_seconds: float) -> None:
        """One choice has ended, after it has waited so long for the engine to begin."""
        self.choices -= 1
        self._admission.choices -= 1
        self._admission.observe_service(now - self._since - queue_seconds)

    def done(self, request_id: str, now: float, queue_seconds: float) -> None:
        """A request of one choice has ended that brings no tokens, after it has waited so long."""
        self.started(request_id)
        self.ended(now, queue_seconds)

    def close(self) -> None:
        """The requests have ended, however that came."""
        self._admission.queued_tokens -= self.tokens
        self._admission.choices -= self.choices
        self._tokens.clear()
        self.choices = 0


class Admission:
    """The accounts of everything queued or running."""

    def __init__(self, slots: int, max_waiting: int, max_tokens: int) -> None:
        self.running = 0  # callers between submission and end
        self.choices = 0  # of all callers, not ended
        self.queued_tokens = 0
        self._slots = slots
        self._max_waiting = max_waiting
        self._max_tokens = max_tokens
        self._service_seconds = 0.0  # smoothed, of one choice from its first step to its end

    @property
    def waiting(self) -> int:
        """Choices beyond the slots."""
        return max(0, self.choices - self._slots)

    @contextmanager
    def admit(self, requests: Sequence[Request], now: float, *, continued: bool = False) -> Iterator[Permit]:
        """Holds a place for the length of the block. Raises OverloadedError when there is none.

        What is over a bound by itself is admitted when nothing else waits: it would never be otherwise. So is what
        continues a call that has been admitted before.
        """
        permit = Permit(self, requests, now)
        if not continued:
            self.check(permit.choices, permit.tokens)
        self.choices += permit.choices
        self.queued_tokens += permit.tokens
        self.running += 1
        try:
            yield permit
        finally:
            permit.close()
            self.running -= 1

    def check(self, choices: int = 1, tokens: int = 1) -> None:
        """Raises OverloadedError where so much finds no place. Where the least finds none, no call does."""
        if self.waiting:
            self._check("choices", self.choices + choices - self._slots, self._max_waiting, "--max-queued-requests")
        if self.queued_tokens:
            self._check("prompt tokens", self.queued_tokens + tokens, self._max_tokens, "--max-queued-tokens")

    def observe_service(self, seconds: float) -> None:
        """How long the engine has just worked on a choice."""
        weight = _SMOOTHING if self._service_seconds else 1.0
        self._service_seconds += weight * (seconds - self._service_seconds)

    @property
    def expected_wait_seconds(self) -> float:
        """How long one more choice would wait: of slots that are all taken, one is free every service / slots."""
        if self.choices < self._slots:
            return 0.0
        return (self.waiting + 1) * self._service_seconds / self._slots

    def _check(self, what: str, wanted: int, most: int, flag: str) -> None:
        if wanted <= most:
            return
        error = OverloadedError(
            f"the server is full: {wanted} {what} would be waiting, and {most} may",
            hint=f"try again after the time in Retry-After; the server's {flag} sets the limit",
        )
        error.retry_after_seconds = min(max(1, math.ceil(self.expected_wait_seconds)), _MAX_RETRY_SECONDS)
        raise error
