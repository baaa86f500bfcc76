"""What a request, or the server's start, can fail of, apart from gRPC: each error says in words what to do about it."""


class StartError(Exception):
    """The server cannot start. Printed as one line; the exit code is 2."""


class RequestError(Exception):
    """A request cannot be answered. `retry_after` is in seconds; None: asking again would not help."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class InvalidRequest(RequestError):
    """The request is not one that the server can answer, now or later."""


class NotFound(RequestError):
    """The request names a model or a version that is not served."""


class Unsupported(RequestError):
    """The request asks for a part of the protocol that this server leaves out."""


class Overloaded(RequestError):
    """The server holds as many images as it may."""


class DeadlineExpired(RequestError):
    """The deadline passed before the answer was there."""


class ShuttingDown(RequestError):
    """The server takes no new requests."""


class EngineFailed(RequestError):
    """The computation failed."""
