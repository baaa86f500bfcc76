"""Does what all requests have in common: tokens, draining, reading, counting, logging, and turning errors into answers.

`Endpoint` wraps each handler once, where it is registered. Handlers receive a `Request` and return an `Answer`
or raise an error of service.errors.
"""

import asyncio
import contextlib
import logging
import math
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeAlias

from starlette.types import Receive, Scope, Send

from service.core.metrics import Metrics
from service.errors import DeadlineExpired, InvalidRequest, RequestError, ShuttingDown, gave_up_at, quoted
from service.http.answers import STATUSES, Answer, Unauthenticated, problem, problem_of
from service.http.bodies import check_headers, read_body
from service.http.connection import Connection
from service.receiving import Receiver
from service.tokens import Tokens
from service.tracing import Trace, Tracing

logger = logging.getLogger(__name__)

TIMEOUT_HEADER = "x-request-timeout"
# The retry hint of a server that stops. It is short, because another server may accept the request at once.
SHUTDOWN_RETRY_SECONDS = 0.1
_LARGEST_TIMEOUT = 86_400.0
# uvicorn delivers the latin-1 characters of headers as bytes.
_ENCODING = "latin-1"

Handler: TypeAlias = "Callable[[Request], Awaitable[Answer]]"


@dataclass(slots=True, eq=False)
class Request:
    """A request that a handler answers.

    Attributes:
        headers: Headers by name, in lower case; the first if a name is repeated.
        query: Parameters of the query by name.
        path: Parameters of the path by name.
        body: The body.
        client: Key of the client, for taking turns.
        deadline: When the client gives up, on time.monotonic(); None if never.
        arrived: When it arrived, on time.monotonic().
    """

    headers: Mapping[str, str]
    query: Mapping[str, str]
    path: Mapping[str, str]
    body: bytes
    client: str
    deadline: float | None
    arrived: float


@dataclass(frozen=True)
class Rules:
    """How the requests of one endpoint are treated.

    Attributes:
        method: Name in the metrics.
        reads_body: Whether the handler needs the body.
        needs_token: Whether a token is needed if the server requires tokens.
        while_draining: Whether requests are answered while the server stops.
    """

    method: str
    reads_body: bool = False
    needs_token: bool = True
    while_draining: bool = False


class Requests:
    """The requests that are being answered.

    Args:
        metrics: Counts them.
        receiver: Reads their bodies.
        tokens: The valid tokens; None if requests need none.
        tracing: Makes spans; None if tracing is off.
        max_body_bytes: Largest size of a body.
        max_connection_age: Seconds after which the answer to a request also closes its connection.
    """

    def __init__(
        self,
        metrics: Metrics,
        receiver: Receiver,
        tokens: Tokens | None,
        tracing: Tracing | None,
        *,
        max_body_bytes: int,
        max_connection_age: float,
    ) -> None:
        self.answered = 0
        self.in_flight = 0
        self.draining = False
        self._metrics, self._receiver, self._tokens, self._tracing = metrics, receiver, tokens, tracing
        self._max_body_bytes, self._max_connection_age = max_body_bytes, max_connection_age
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self, seconds: float) -> int:
        """Refuses new requests and waits until accepted ones are answered, at most `seconds`.

        Returns:
            The number of requests that are still unanswered.
        """
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            logger.debug("%d requests are unanswered", self.in_flight)
        return self.in_flight

    # Called by Endpoint and _Exchange

    def trace(self, rules: Rules, scope: Scope) -> "contextlib.AbstractContextManager[Trace | None]":
        """The span of a request with images."""
        if self._tracing is None or not rules.reads_body:
            return contextlib.nullcontext()
        method, _, route = rules.method.partition(" ")
        attributes = {"http.request.method": method, "http.route": route, "url.path": scope["path"]}
        headers = [(name.decode(_ENCODING), value.decode(_ENCODING)) for name, value in scope["headers"]]
        return self._tracing.request(rules.method, headers, attributes, time.monotonic())

    def check_token(self, headers: Mapping[str, str]) -> None:
        """Accepts a request with a valid token.

        Raises:
            Unauthenticated: It has none, although the server requires tokens.
        """
        if self._tokens is not None and self._tokens.find(headers.get("authorization", "").encode(_ENCODING)) is None:
            raise Unauthenticated("a valid token is needed: send the header 'Authorization: Bearer TOKEN'")

    def check_draining(self) -> None:
        """Accepts a request unless the server stops.

        Raises:
            ShuttingDown: The server stops.
        """
        if self.draining:
            raise ShuttingDown("the server is shutting down: ask another, or retry", SHUTDOWN_RETRY_SECONDS)

    async def read(self, receive: Receive, connection: Connection, headers: Mapping[str, str]) -> bytes:
        """The body of a request; see service.http.bodies."""
        check_headers(headers, self._max_body_bytes)
        return await read_body(receive, connection, self._receiver, self._max_body_bytes)

    def enter(self) -> None:
        """Counts a request as accepted."""
        self.in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        """Counts an accepted request as answered, or as given up by its client."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    def record(self, method: str, code: str, seconds: float, peer: str) -> None:
        """Counts and logs a request that is over."""
        if code == "OK":
            self.answered += 1
        self._metrics.on_request(method, code, seconds)
        if logger.isEnabledFor(logging.DEBUG):
            milliseconds = round(seconds * 1000, 3)
            logger.debug("request", extra={"method": method, "code": code, "milliseconds": milliseconds, "peer": peer})

    def closes(self, connection: Connection) -> bool:
        """Whether a connection is closed after the answer to its current request."""
        return self.draining or connection.must_close or connection.age(time.monotonic()) > self._max_connection_age


class Endpoint:
    """An ASGI application that answers requests with a handler.

    Args:
        requests: Counts them.
        rules: How they are treated.
        handler: Answers one request.
    """

    def __init__(self, requests: Requests, rules: Rules, handler: Handler) -> None:
        self._requests, self._rules, self._handler = requests, rules, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        connection: Connection = scope["state"]["connection"]
        connection.last_request = time.monotonic()
        task = connection.task = asyncio.current_task()
        try:
            exchange = _Exchange(self._requests, self._rules, scope, receive, connection)
            with self._requests.trace(self._rules, scope) as trace:
                await exchange.run(self._handler, send, trace)
        except asyncio.CancelledError:
            # The client has disconnected. uvicorn would log the error of a task that ends in another way.
            logger.debug("a client disconnected before its answer was sent")
        finally:
            if connection.task is task:
                connection.task = None


class _Exchange:
    """One request and its answer."""

    def __init__(
        self, requests: Requests, rules: Rules, scope: Scope, receive: Receive, connection: Connection
    ) -> None:
        self._requests, self._rules, self._receive, self._connection = requests, rules, receive, connection
        self._scope = scope
        self._arrived = time.monotonic()
        self._deadline: float | None = None
        self._code = "OK"
        self._accepted = False

    async def run(self, handler: Handler, send: Send, trace: Trace | None) -> None:
        """Answers the request."""
        try:
            answer = await self._answer(handler, trace)
            if trace is not None:
                error = self._code if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR else None
                trace.finish({"http.response.status_code": int(answer.status)}, error)
            await self._send(answer, send)
        except asyncio.CancelledError:
            self._code = self._code_if_cancelled()
            raise
        finally:
            if self._accepted:
                self._requests.leave()
            seconds = time.monotonic() - self._arrived
            self._requests.record(self._rules.method, self._code, seconds, self._connection.peer)

    def _code_if_cancelled(self) -> str:
        if self._connection.is_malformed:  # the connection has answered that the body cannot be read
            return "INVALID_ARGUMENT"
        return "DEADLINE_EXCEEDED" if gave_up_at(self._deadline) else "CANCELLED"

    async def _answer(self, handler: Handler, trace: Trace | None) -> Answer:
        try:
            request = await self._request()
            if trace is not None:
                trace.phase("receive", trace.arrived, time.monotonic())
            answer = await handler(request)
        except RequestError as error:
            self._code = STATUSES[type(error)][1]
            return problem_of(error)
        except Exception:
            self._code = "INTERNAL"
            logger.exception("%s failed", self._rules.method)
            return problem(
                HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed on this request; its log has the reason"
            )
        if answer.status == HTTPStatus.SERVICE_UNAVAILABLE:  # the answer of a health path
            self._code = "UNAVAILABLE"
        return answer

    async def _request(self) -> Request:
        """The request, once it is accepted."""
        requests, rules, scope = self._requests, self._rules, self._scope
        headers = _headers(scope)
        if rules.needs_token:
            requests.check_token(headers)
        self._deadline = _deadline(headers.get(TIMEOUT_HEADER), self._arrived)
        body = b""
        if rules.reads_body:
            # Also while the server stops: a connection that is closed while its client sends is reset, and the client
            # would not see the answer.
            body = await requests.read(self._receive, self._connection, headers)
        if not rules.while_draining:
            requests.check_draining()
        if rules.reads_body and self._deadline is not None and time.monotonic() >= self._deadline:
            raise DeadlineExpired("the deadline passed before the body had arrived")
        requests.enter()
        self._accepted = True
        return Request(
            headers, _query(scope), scope.get("path_params", {}), body,
            self._connection.peer, self._deadline, self._arrived,
        )  # fmt: skip

    async def _send(self, answer: Answer, send: Send) -> None:
        headers = answer.all_headers()
        if self._requests.closes(self._connection):
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": int(answer.status), "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})


def _headers(scope: Scope) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode(_ENCODING), value.decode(_ENCODING))
    return headers


def _query(scope: Scope) -> dict[str, str]:
    query: bytes = scope["query_string"]
    if not query:
        return {}
    return dict(urllib.parse.parse_qsl(query.decode(_ENCODING), keep_blank_values=True))


def _deadline(timeout: str | None, arrived: float) -> float | None:
    """When the client gives up, on time.monotonic(), from the header that names seconds."""
    if timeout is None:
        return None
    try:
        seconds = float(timeout)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _LARGEST_TIMEOUT:
        raise InvalidRequest(
            f"X-Request-Timeout is {quoted(timeout)}; it must be a number of seconds above 0 and at most "
            f"{_LARGEST_TIMEOUT:g}"
        )
    return arrived + seconds
