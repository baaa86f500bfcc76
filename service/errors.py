"""Errors of the server's start and of single requests. They know no transport; each message says what to do."""

import time


class StartError(Exception):
    """The server cannot start. Printed as one line; the exit code is 2."""


class RequestError(Exception):
    """A request cannot be answered.

    Attributes:
        message: Text that is sent to the client.
        retry_after: Seconds after which the same request may succeed; None if repeating it would not help.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class InvalidRequest(RequestError):
    """The request breaks a rule or a limit; sending it again does not help."""


class NotFound(RequestError):
    """The request names a model or a version that is not served."""


class Unsupported(RequestError):
    """The request uses a part of the protocol that this server does not implement."""


class Overloaded(RequestError):
    """A limit on the load of the server is reached; the same request may succeed later."""


class DeadlineExpired(RequestError):
    """The deadline passed before the request was answered."""


# A client cancels at its deadline, and its cancellation can arrive shortly before the deadline has passed here.
_DEADLINE_SLACK = 0.05


def gave_up_at(deadline: float | None) -> bool:
    """Whether a client that gives up a request now does so because of its deadline, on time.monotonic()."""
    return deadline is not None and time.monotonic() >= deadline - _DEADLINE_SLACK


class ShuttingDown(RequestError):
    """The server is stopping and accepts no new requests."""


class EngineFailed(RequestError):
    """The model's computation failed."""


def quoted(name: str, limit: int = 80) -> str:
    """A name from a request, for an error message: in quotes, control characters escaped, cut to `limit` characters."""
    return repr(name if len(name) <= limit else f"{name[:limit]}…")
