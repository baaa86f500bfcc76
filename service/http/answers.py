"""What the server sends: answers, and errors as problem details (RFC 9457)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from pydantic_core import to_json

from service.errors import (
    DeadlineExpired,
    EngineFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestError,
    ShuttingDown,
    Unsupported,
)

JSON = "application/json"
PROBLEM = "application/problem+json"
BINARY = "application/octet-stream"


class Unauthenticated(RequestError):
    """The request has no valid token."""


class TooLarge(InvalidRequest):
    """The request has more bytes or images than are allowed."""


class UnsupportedEncoding(InvalidRequest):
    """The body is compressed."""


class ReceiveTimeout(RequestError):
    """The body did not arrive in time."""


class Unreadable(InvalidRequest):
    """No image of the request could be read.

    Args:
        message: Says that, for the client.
        results: The result of each image, in the form of the answer.
    """

    def __init__(self, message: str, results: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.results = results


# For each error the status, and the code that the metrics and gRPC use for it.
STATUSES: dict[type[RequestError], tuple[HTTPStatus, str]] = {
    InvalidRequest: (HTTPStatus.BAD_REQUEST, "INVALID_ARGUMENT"),
    TooLarge: (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "INVALID_ARGUMENT"),
    UnsupportedEncoding: (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "INVALID_ARGUMENT"),
    Unreadable: (HTTPStatus.UNPROCESSABLE_ENTITY, "INVALID_ARGUMENT"),
    Unsupported: (HTTPStatus.BAD_REQUEST, "UNIMPLEMENTED"),
    NotFound: (HTTPStatus.NOT_FOUND, "NOT_FOUND"),
    Unauthenticated: (HTTPStatus.UNAUTHORIZED, "UNAUTHENTICATED"),
    ReceiveTimeout: (HTTPStatus.REQUEST_TIMEOUT, "DEADLINE_EXCEEDED"),
    Overloaded: (HTTPStatus.TOO_MANY_REQUESTS, "RESOURCE_EXHAUSTED"),
    ShuttingDown: (HTTPStatus.SERVICE_UNAVAILABLE, "UNAVAILABLE"),
    DeadlineExpired: (HTTPStatus.GATEWAY_TIMEOUT, "DEADLINE_EXCEEDED"),
    EngineFailed: (HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL"),
}


@dataclass(frozen=True)
class Answer:
    """An answer to a request.

    Attributes:
        status: Its status.
        body: Its body.
        content_type: Media type of the body.
        headers: Further headers.
    """

    status: HTTPStatus = HTTPStatus.OK
    body: bytes = b""
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)

    def all_headers(self) -> list[tuple[bytes, bytes]]:
        """All headers, in the form of ASGI."""
        headers = [(b"x-content-type-options", b"nosniff")]
        if self.status is not HTTPStatus.NOT_MODIFIED:
            headers += [
                (b"content-type", self.content_type.encode("latin-1")),
                (b"content-length", str(len(self.body)).encode("latin-1")),
            ]
        return headers + [(name.lower().encode(), value.encode("latin-1")) for name, value in self.headers.items()]


def json_answer(content: object, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    """An answer with a JSON body."""
    return Answer(status, to_json(content))


def problem(
    status: HTTPStatus, detail: str, members: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """An error as problem details.

    Args:
        status: The status.
        detail: What is wrong, and the way out.
        members: Further members of the body.
        headers: Further headers.
    """
    # The clients of the Open Inference Protocol read the member "error".
    content = {
        "type": "about:blank", "title": status.phrase, "status": status.value, "detail": detail, "error": detail,
        **(members or {}),
    }  # fmt: skip
    return Answer(status, to_json(content), PROBLEM, headers or {})


def problem_of(error: RequestError) -> Answer:
    """The answer to a request that failed with an error."""
    status, _ = STATUSES[type(error)]
    members: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        members["retry_after"] = error.retry_after
        headers["retry-after"] = str(math.ceil(error.retry_after))  # whole seconds are all that the header allows
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, Unreadable):
        members["results"] = error.results
    return problem(status, error.message, members, headers)
