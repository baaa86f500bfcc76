"""What lies around every call: counting, draining, the log, and errors turned into gRPC statuses.

The servicers raise service.errors; here, and only here, they become status codes.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from service.core.batcher import DEADLINE_SLACK
from service.core.metrics import Metrics
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

logger = logging.getLogger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

CODES: dict[type[RequestError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExpired: grpc.StatusCode.DEADLINE_EXCEEDED,
    ShuttingDown: grpc.StatusCode.UNAVAILABLE,
    EngineFailed: grpc.StatusCode.INTERNAL,
}
# Another server may take the request at once.
SHUTDOWN_RETRY_SECONDS = 0.1
HOLD_SECONDS = 0.1


class Failure(Exception):
    """A status instead of a response."""

    def __init__(self, code: grpc.StatusCode, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.retry_after = code, message, retry_after


@dataclass(frozen=True)
class Malformed:
    """Stands for a request whose bytes are no message of its type."""

    reason: str
    request_id: str = ""


class Registrar:
    """What generated code registers servicers with: gives the server their methods, with requests parsed by `_parse`.

    By itself gRPC answers malformed bytes with UNKNOWN, and writes a traceback into the log for each.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Nothing: the same methods are registered by name."""

    def add_registered_method_handlers(
        self, service: str, handlers: "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"
    ) -> None:
        """Gives them to the server."""
        tolerant = {}
        for name, handler in handlers.items():
            make: Any
            behaviour: Any
            make, behaviour = (
                (grpc.stream_stream_rpc_method_handler, handler.stream_stream)
                if handler.request_streaming
                else (grpc.unary_unary_rpc_method_handler, handler.unary_unary)
            )
            parse = functools.partial(_parse, handler.request_deserializer)
            tolerant[name] = make(
                behaviour, request_deserializer=parse, response_serializer=handler.response_serializer
            )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, tolerant),))


def _parse(parser: Callable[[bytes], Any] | None, data: bytes) -> Any:  # noqa: ANN401 -- any message
    try:
        return parser(data) if parser else data
    except DecodeError as error:
        return Malformed(str(error))


class Calls:
    """The calls that are being answered. After `drain` new ones are refused."""

    def __init__(self, metrics: Metrics) -> None:
        self.draining = asyncio.Event()
        self.answered = 0
        self._metrics = metrics
        self._in_flight = 0
        self._released = asyncio.Event()
        self._released.set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self, grace: float) -> int:
        """Refuses new calls and waits for those in flight, `grace` seconds at most; returns how many are left.

        When it returns, calls that still come are held until `release`. A call that gRPC has received but not yet
        handed over is ended by it with CANCELLED when the server stops; a client whose call is held sends no such call.
        """
        self.draining.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._idle.wait()
        left = self._in_flight
        self._released.clear()
        await asyncio.sleep(HOLD_SECONDS)
        return left

    def release(self) -> None:
        """Refuses the calls that are held; to be called when the server takes no more of them."""
        self._released.set()

    async def unary(
        self,
        method: str,
        behaviour: Callable[[Request, Context], Awaitable[Response]],
        request: Request,
        context: Context,
        *,
        while_draining: bool = False,
    ) -> Response:
        """The response to a call with one request, or the status that ends it."""
        try:
            peer = peer_of(context)
            return await self.answer(method, behaviour, request, context, peer, while_draining=while_draining)
        except Failure as failure:
            await abort(context, failure)

    async def answer(
        self,
        method: str,
        behaviour: Callable[[Request, Context], Awaitable[Response]],
        request: Request,
        context: Context,
        peer: str,
        *,
        while_draining: bool = False,
    ) -> Response:
        """The response of `behaviour` to one request, whose client is called `peer` in the log (see `peer_of`).

        Raises:
            Failure: It has none, for whatever reason but that nobody waits for it any more.
        """
        started = time.perf_counter()
        code = grpc.StatusCode.OK
        self._begin()
        try:
            await self._check(request, while_draining)
            response = await behaviour(request, context)
        except RequestError as error:
            code = CODES[type(error)]
            raise Failure(code, error.message, error.retry_after) from error
        except asyncio.CancelledError:
            remaining = context.time_remaining()
            expired = remaining is not None and remaining <= DEADLINE_SLACK
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            code = grpc.StatusCode.INTERNAL
            logger.exception("%s failed", method)
            raise Failure(code, "the server failed on this request; its log says why") from error
        else:
            return response
        finally:
            self._end(method, code, time.perf_counter() - started, request, peer)

    async def _check(self, request: object, while_draining: bool) -> None:
        if isinstance(request, Malformed):
            raise InvalidRequest(f"the request is no message of its type: {request.reason}")
        if self.draining.is_set() and not while_draining:
            await self._released.wait()
            raise ShuttingDown("the server is shutting down: ask another, or again", SHUTDOWN_RETRY_SECONDS)

    def _begin(self) -> None:
        self._in_flight += 1
        self._metrics.in_flight.set(self._in_flight)
        self._idle.clear()

    def _end(self, method: str, code: grpc.StatusCode, seconds: float, request: object, peer: str) -> None:
        self._in_flight -= 1
        self._metrics.in_flight.set(self._in_flight)
        self._metrics.on_request(method, code.name, seconds)
        if code is grpc.StatusCode.OK:
            self.answered += 1
        if not self._in_flight:
            self._idle.set()
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "request",
                extra={
                    "method": method,
                    "code": code.name,
                    "milliseconds": round(seconds * 1000, 3),
                    "request_id": getattr(request, "request_id", "") or getattr(request, "id", ""),
                    "peer": peer,
                },
            )


async def abort(context: Context, failure: Failure) -> NoReturn:
    """Ends a call with a status; its trailing metadata tells when to ask again, in both ways that clients know."""
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    if failure.retry_after is not None:
        retry = RetryInfo(retry_delay=Duration(nanos=0))
        retry.retry_delay.FromNanoseconds(int(failure.retry_after * 1e9))
        detail = AnyMessage()
        detail.Pack(retry)
        status = Status(code=failure.code.value[0], message=failure.message, details=[detail])
        metadata = (
            ("grpc-retry-pushback-ms", str(int(failure.retry_after * 1000))),
            ("grpc-status-details-bin", status.SerializeToString()),
        )
    await context.abort(failure.code, failure.message, trailing_metadata=metadata)
    raise AssertionError("abort returned")


def peer_of(context: Context) -> str:
    """The client's address for the log at debug, or nothing where none is written. To be asked as a call begins.

    Once the call has ended, cancelled by its client for one, gRPC follows a null pointer to find it, and the process
    dies (grpcio 1.85); the requests of a stream can outlive it by a moment.
    """
    return context.peer() if logger.isEnabledFor(logging.DEBUG) else ""


def deadline_of(context: Context) -> float | None:
    """When the client gives up, on time.monotonic(); None if never."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
