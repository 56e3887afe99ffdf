"""The exception tree. Every error a user can meet is one of these: what was given, what is allowed, what to do.

XLoraError
├── StartupError          the process cannot start: exit code 1, one line on stderr
│   ├── SettingsError     a flag or an XLORA_* variable
│   └── CheckpointError   a file of the bundle: names file, tensor, expected and found
├── EngineLostError       the engine died or hangs while serving: exit code 3
└── RequestError          one request fails, everybody else goes on
    ├── InvalidRequestError    400  the request can never succeed as it is
    ├── UnauthorizedError      401  no key, or not one of ours
    ├── NotFoundError          404
    ├── MethodNotAllowedError  405
    ├── SlowBodyError          408  the body did not arrive in time
    ├── PayloadTooLargeError   413
    ├── OverloadedError        429  try again later
    ├── HeadersTooLargeError   431
    ├── InternalError          500  our fault; also when the engine is lost with the request in it
    ├── UnavailableError       503  loading, draining, or the engine has died: nothing was begun, another server may
    └── TimedOutError          504  the deadline passed before the first token

This file knows HTTP status codes and no framework. A leaf: it imports nothing of ours.
"""

from __future__ import annotations


class XLoraError(Exception):
    """Root of the tree: a message for the user and, where there is one, a hint what to do about it."""

    exit_code = 1  # of a process that ends with this error

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class StartupError(XLoraError):
    """The process cannot start."""


class SettingsError(StartupError):
    """A command-line flag or an environment variable is wrong."""


class CheckpointError(StartupError):
    """A bundle on disk is damaged, incomplete or not supported."""


class EngineLostError(XLoraError):
    """The engine died, or has not answered for too long, after the service had become ready."""

    exit_code = 3


class RequestError(XLoraError):
    """One request fails. `status` is the HTTP status, `type` and `code` follow OpenAI's error body.

    `retry_after_seconds` is set where the same request may succeed later.
    """

    status = 500
    type = "server_error"
    code = "internal_error"
    retry_after_seconds: int | None = None
    prompt_index: int | None = None  # of the prompt among those of a call in process

    def __init__(
        self, message: str, *, param: str | None = None, hint: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequestError(RequestError):
    """The request can never succeed as it is."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class UnauthorizedError(RequestError):
    """No key was sent, or it is not one of ours."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFoundError(RequestError):
    """No such path, model or expert."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowedError(RequestError):
    """The path exists, the method does not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class SlowBodyError(RequestError):
    """The client stopped sending in the middle of the body."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class PayloadTooLargeError(RequestError):
    """The body is over the limit; it was not read to its end."""

    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class HeadersTooLargeError(RequestError):
    """The request line and headers are over the limit."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class OverloadedError(RequestError):
    """The server is full; the same request may succeed later."""

    status = 429
    type = "overloaded_error"
    code = "overloaded"
    retry_after_seconds = 1


class InternalError(RequestError):
    """Our fault: the request was good."""


class UnavailableError(RequestError):
    """The engine is loading, draining or dead, and has not seen the request: a proxy may send it elsewhere."""

    status = 503
    type = "server_error"
    code = "unavailable"
    retry_after_seconds = 5


class TimedOutError(RequestError):
    """The request's deadline passed before its first token."""

    status = 504
    type = "timeout_error"
    code = "timeout"
