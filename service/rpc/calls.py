"""What surrounds every call: receiving, draining, counting, the log, and errors turned into gRPC statuses.

Handlers are wrapped once, where they are registered (`Calls.register`). Servicers receive a request and a `Call`,
return a response or raise an error of service.errors, and know nothing of what is done here.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
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
    quoted,
)
from service.rpc.connections import Connections
from service.rpc.receiving import Context, Receiver
from service.rpc.wire import FieldCounter

logger = logging.getLogger(__name__)

Request: TypeAlias = Any
Response: TypeAlias = Message
Behaviour: TypeAlias = "Callable[[Request, Call], Awaitable[Response]]"
Parse: TypeAlias = Callable[[bytes], Request]
Serialize: TypeAlias = Callable[[Response], bytes]

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
# While the server stops: clients that called within this time may call again,
ACTIVE_SECONDS = 2.0
# have stopped calling if none calls for this time,
QUIET_SECONDS = 0.5
# and are waited for no longer than this.
MAX_HOLD_SECONDS = 5.0


class Failure(Exception):
    """A gRPC status that ends a call, or one request of a stream."""

    def __init__(self, code: grpc.StatusCode, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.retry_after = code, message, retry_after


@dataclass(slots=True, eq=False)
class Call:
    """What a servicer may know of the call that it answers.

    Attributes:
        method: Service and method, `cifar.v1.ImageClassifier/Classify`.
        connection: Address of the client's end of the connection.
        deadline: When the client gives up, on time.monotonic(); None if never.
        message_bytes: Size of the request.
        context: gRPC's own object.
    """

    method: str
    connection: str
    deadline: float | None
    message_bytes: int
    context: Context


class Calls:
    """The calls that are being answered.

    Args:
        metrics: Counts them.
        receiver: Reads their messages.
        connections: Limits answers that clients do not read.
    """

    def __init__(self, metrics: Metrics, receiver: Receiver, connections: Connections) -> None:
        self.answered = 0
        self.receiver = receiver
        self.connections = connections
        self._metrics = metrics
        self._draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._readers: set[asyncio.Task[None]] = set()
        self._released = asyncio.Event()
        self._released.set()
        self._arrived = 0.0

    @property
    def draining(self) -> bool:
        """Whether new calls are refused because the server stops."""
        return self._draining

    @property
    def in_flight(self) -> int:
        """Number of calls accepted whose answers have not been sent yet."""
        return self._in_flight

    async def drain(self, grace: float) -> int:
        """Refuses new calls and waits until the answers of accepted ones are sent, at most `grace` seconds.

        Returns:
            The number of calls that are still unanswered.
        """
        self._draining = True
        for reader in self._readers:
            reader.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._idle.wait()
        return self._in_flight

    async def hold_new_calls(self) -> None:
        """Keeps new calls waiting instead of refusing them, until all active clients wait or none calls any more.

        gRPC answers calls with CANCELLED that it has received but not yet handed over when the server stops. A client
        that waits for the answer to a held call sends no such call.
        """
        self._released.clear()
        began = self._arrived = time.monotonic()
        while True:
            now = time.monotonic()
            if self.connections.all_held(since=began - ACTIVE_SECONDS) or now - began > MAX_HOLD_SECONDS:
                return
            if now - self._arrived > QUIET_SECONDS:
                return
            await asyncio.sleep(0.01)

    def refuse_held_calls(self) -> None:
        """Answers the calls that are held. Call it when the server accepts no more calls."""
        self._released.set()

    # Registration

    def register(
        self,
        server: grpc.aio.Server,
        add_servicer: Callable[[Any, Any], None],
        servicer: object,
        *,
        counters: Mapping[str, FieldCounter] | None = None,
        while_draining: frozenset[str] = frozenset(),
        streams: "Mapping[str, Callable[[Parse, Serialize], grpc.RpcMethodHandler[Any, Any]]] | None" = None,
    ) -> None:
        """Adds a servicer to a server, with everything in this module around its methods.

        Args:
            server: Not yet started.
            add_servicer: The generated function `add_…Servicer_to_server`.
            servicer: Unary methods are `async def Name(request, call)` and return the response.
            counters: By method name, what limits the number of fields of its requests.
            while_draining: Names of methods that are answered while the server stops.
            streams: By name of a method that streams, what makes its handler from the parser of its requests and the
                serializer of its responses; see service.rpc.streams.
        """
        add_servicer(servicer, _Registration(self, server, counters or {}, while_draining, streams or {}))

    def unary(
        self, method: str, behaviour: Behaviour, parse: Parse, serialize: Serialize, *, while_draining: bool
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a method with one request and one response.

        It is registered as a method with a stream of requests, which is the same on the wire: only then can the message
        be read under limits.
        """

        async def handle(_requests: object, context: Context) -> bytes:
            connection = context.peer()
            try:
                self.connections.check(connection)
                if self._draining:
                    await self._refuse_while_draining(connection, while_draining)
                message = await self.receiver.read(context, connection)
                if self._draining:
                    await self._refuse_while_draining(connection, while_draining)
                accepted = _Accepted(self, connection)
                on_done(context, accepted)
                if message is grpc.aio.EOF:
                    raise InvalidRequest("the call ended without a request message")
                call = Call(method, connection, deadline_of(context), len(message), context)
                response = serialize(await self.answer(behaviour, parse(message), call))
            except RequestError as error:  # raised while the request was received
                await self.refuse(method, context, error)
            except Failure as failure:
                await abort(context, failure)
            accepted.sending(len(response))
            return response

        return grpc.stream_unary_rpc_method_handler(handle)

    async def refuse(self, method: str, context: Context, error: RequestError) -> NoReturn:
        """Ends a call that was not accepted."""
        code = CODES[type(error)]
        self._metrics.on_request(method, code.name, 0.0)
        await abort(context, Failure(code, error.message, error.retry_after))

    async def check(self, connection: str) -> None:
        """Accepts a new stream.

        Raises:
            ShuttingDown: The server stops.
            Overloaded: The client does not read the answers to its earlier calls.
        """
        self.connections.check(connection)
        if self._draining:
            await self._refuse_while_draining(connection, while_draining=False)

    async def _refuse_while_draining(self, connection: str, while_draining: bool) -> None:
        if while_draining:
            return
        self._arrived = time.monotonic()
        with self.connections.held(connection):
            await self._released.wait()
        raise ShuttingDown("the server is shutting down: ask another, or retry", SHUTDOWN_RETRY_SECONDS)

    @contextlib.contextmanager
    def reading(self, reader: "asyncio.Task[None]") -> Iterator[None]:
        """Cancels the task that reads the requests of a stream when the server stops."""
        self._readers.add(reader)
        try:
            yield
        finally:
            self._readers.discard(reader)

    # One request

    async def answer(self, behaviour: Behaviour, request: Request, call: Call) -> Response:
        """The response of a servicer to one request.

        Raises:
            Failure: The request cannot be answered.
        """
        started = time.perf_counter()
        code = grpc.StatusCode.OK
        try:
            response = await behaviour(request, call)
        except RequestError as error:
            code = CODES[type(error)]
            raise Failure(code, error.message, error.retry_after) from error
        except asyncio.CancelledError:
            expired = call.deadline is not None and time.monotonic() >= call.deadline - DEADLINE_SLACK
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            code = grpc.StatusCode.INTERNAL
            logger.exception("%s failed", call.method)
            raise Failure(code, "the server failed on this request; its log has the reason") from error
        else:
            self.answered += 1
            return response
        finally:
            self._record(call, code, time.perf_counter() - started, request)

    def enter(self) -> None:
        """Counts a request as accepted."""
        self._in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        """Counts a request as answered."""
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()

    def _record(self, call: Call, code: grpc.StatusCode, seconds: float, request: Request) -> None:
        self._metrics.on_request(call.method, code.name, seconds)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "request",
                extra={
                    "method": call.method,
                    "code": code.name,
                    "milliseconds": round(seconds * 1000, 3),
                    "request_id": (getattr(request, "request_id", "") or getattr(request, "id", ""))[:80],
                    "peer": call.connection,
                },
            )


class _Accepted:
    """A call that counts as in flight until gRPC has sent its answer, or it has ended without one.

    Registered as the callback for that, so that a call needs one object for all that has to be undone.
    """

    __slots__ = ("_calls", "_connection", "_size")

    def __init__(self, calls: Calls, connection: str) -> None:
        self._calls, self._connection = calls, connection
        self._size: int | None = None
        calls.enter()

    def sending(self, size: int) -> None:
        """The answer, of `size` bytes, is about to be sent."""
        self._size = size
        self._calls.connections.sending(self._connection, size)

    def __call__(self, context: Context) -> None:
        """The call is over."""
        if self._size is not None:
            self._calls.connections.sent(self._connection, self._size)
        self._calls.leave()


class _Registration:
    """What generated code registers a servicer's methods with."""

    def __init__(
        self,
        calls: Calls,
        server: grpc.aio.Server,
        counters: Mapping[str, FieldCounter],
        while_draining: frozenset[str],
        streams: "Mapping[str, Callable[[Parse, Serialize], grpc.RpcMethodHandler[Any, Any]]]",
    ) -> None:
        self._calls, self._server, self._counters = calls, server, counters
        self._while_draining, self._streams = while_draining, streams

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Does nothing: the same methods are registered by name below."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Wraps the methods and adds them to the server."""
        wrapped = {}
        for name, handler in handlers.items():
            parse = functools.partial(parse_message, handler.request_deserializer, self._counters.get(name))
            if handler.unary_unary is None:
                wrapped[name] = self._streams[name](parse, handler.response_serializer)
                continue
            wrapped[name] = self._calls.unary(
                f"{service}/{name}",
                handler.unary_unary,
                parse,
                handler.response_serializer,
                while_draining=name in self._while_draining,
            )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))


def parse_message(deserialize: Parse, counter: FieldCounter | None, message: bytes) -> Request:
    """A request from its bytes.

    Raises:
        InvalidRequest: The bytes are no such message, or have more fields than `counter` allows.
    """
    if counter is not None:
        counter.check(message)
    try:
        return deserialize(message)
    except DecodeError as error:
        raise InvalidRequest(f"the request is not a message of its type: {quoted(str(error))}") from error


def on_done(context: Context, callback: Callable[[Context], None]) -> None:
    """Has `callback` called when a call is over: its answer was sent, or it ended without one."""
    add_done_callback: Any = context.add_done_callback  # its published type is wrong
    add_done_callback(callback)


async def abort(context: Context, failure: Failure) -> NoReturn:
    """Ends a call with a status. Trailing metadata says when to retry, in both of the forms that clients know."""
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


def deadline_of(context: Context) -> float | None:
    """When the client gives up, on time.monotonic(); None if never."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
