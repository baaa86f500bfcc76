"""Does what all calls have in common: receiving, draining, counting, logging, and turning errors into gRPC statuses.

Handlers are wrapped once, where they are registered (`Calls.register`). Servicers receive a request and a `Call`, and
return a response or raise an error of service.errors. They know nothing of this module but `Call`.
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
from google.protobuf.message import Message

from service.core.metrics import Metrics
from service.errors import InvalidRequest, RequestError, ShuttingDown, gave_up_at
from service.receiving import Receiver
from service.rpc.connections import Connections
from service.rpc.statuses import CODES, Context, Failure, abort
from service.rpc.tracing import on_received, request_span, traced
from service.rpc.wire import FieldCounter, Parse, Request, parse_message
from service.tracing import Tracing

logger = logging.getLogger(__name__)

Response: TypeAlias = Message
Behaviour: TypeAlias = "Callable[[Request, Call], Awaitable[Response]]"
Serialize: TypeAlias = Callable[[Response], bytes]

# The retry hint of a server that stops. It is short, because another server may accept the request at once.
SHUTDOWN_RETRY_SECONDS = 0.1
# A server that stops waits until each client that called within this time has a held call,
ACTIVE_SECONDS = 2.0
# or until no client has called for this time,
QUIET_SECONDS = 0.5
# but no longer than this.
MAX_HOLD_SECONDS = 5.0
# The end of the message of a call that its client gave up is seen a moment before its cancellation.
_CANCELLATION_SECONDS = 0.05


@dataclass(slots=True, eq=False)
class Call:
    """The call that a servicer answers.

    Attributes:
        method: Full name of the method, such as `cifar.v1.ImageClassifier/Classify`.
        connection: Address of the client's end of the connection.
        deadline: When the client gives up, on time.monotonic(); None if never.
        message_bytes: Size of the request message.
        context: gRPC's context of the call.
    """

    method: str
    connection: str
    deadline: float | None
    message_bytes: int
    context: Context


class Calls:
    """The calls that are being answered.

    Args:
        metrics: Counts the calls.
        receiver: Reads the messages of the calls.
        connections: Limits the number of answers that clients do not read.
        tracing: Makes the spans of requests with images; None if tracing is off.
    """

    def __init__(
        self, metrics: Metrics, receiver: Receiver, connections: Connections, tracing: Tracing | None = None
    ) -> None:
        self.answered = 0
        self.receiver = receiver
        self.connections = connections
        self._metrics, self._tracing = metrics, tracing
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
        """Refuses the calls that are held. Call it when the server accepts no more calls."""
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
        """Adds a servicer to a server and wraps its methods.

        Args:
            server: Server that is not yet started.
            add_servicer: The generated function `add_…Servicer_to_server`.
            servicer: Object whose unary methods are `async def Name(request, call)` and return the response.
            counters: Limits on the number of fields of requests, by method name.
            while_draining: Names of methods that are answered while the server stops.
            streams: Functions that make the handlers of streaming methods, by method name. They receive the parser of
                requests and the serializer of responses; see service.rpc.streams.
        """
        add_servicer(servicer, _Registration(self, server, counters or {}, while_draining, streams or {}))

    def unary(
        self,
        method: str,
        behaviour: Behaviour,
        parse: Parse,
        serialize: Serialize,
        *,
        while_draining: bool,
        with_spans: bool,
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a method with one request and one response.

        It is registered as a method with a stream of requests, which is the same on the wire: only then can the message
        be read under limits.
        """

        async def handle(_requests: object, context: Context) -> bytes:
            connection = context.peer()
            message, failure = b"", None
            try:
                self.connections.check(connection)
                if self._draining:
                    await self._refuse_while_draining(connection, while_draining)
                message = await self._receive(method, context, connection)
                if self._draining:
                    await self._refuse_while_draining(connection, while_draining)
                accepted = _Accepted(self, connection)
                on_done(context, accepted)
                call = Call(method, connection, deadline_of(context), len(message), context)
                answering = self.answer(behaviour, parse(message), call)
                on_received()
                message = b""  # it would be held in addition to the request until the answer is sent
                response = serialize(await answering)
            except RequestError as error:  # raised while the request was received
                failure = self._refusal(method, error)
            except Failure as raised:
                failure = raised
            if failure:
                message = b""  # a client that reads slowly would keep it in memory
                await abort(context, failure.without_history())
            accepted.sending(len(response))
            return response

        if self._tracing and with_spans:
            return grpc.stream_unary_rpc_method_handler(traced(self._tracing, method, handle))
        return grpc.stream_unary_rpc_method_handler(handle)

    async def _receive(self, method: str, context: Context, connection: str) -> bytes:
        """The message of a call. Counts the call if its client gives up meanwhile."""
        try:
            message = await self.receiver.read(context, connection)
            if message is grpc.aio.EOF:
                # Also if the client gave up; then this task is cancelled right after that.
                await asyncio.sleep(_CANCELLATION_SECONDS)
                raise InvalidRequest("the call ended without a request message")
        except asyncio.CancelledError:
            self._metrics.on_request(method, _given_up(deadline_of(context)).name, 0.0)
            raise
        received: bytes = message
        return received

    def span(self, method: str, context: Context) -> contextlib.AbstractContextManager[None]:
        """The span of one request of a stream, for the length of a `with` block; does nothing if tracing is off."""
        return request_span(self._tracing, method, context) if self._tracing else contextlib.nullcontext()

    async def refuse(self, method: str, context: Context, error: RequestError) -> NoReturn:
        """Ends a call that was not accepted."""
        await abort(context, self._refusal(method, error))

    def _refusal(self, method: str, error: RequestError) -> Failure:
        code = CODES[type(error)]
        self._metrics.on_request(method, code.name, 0.0)
        return Failure(code, error.message, error.retry_after)

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
        if self._draining:
            reader.cancel()
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
        request_id = _request_id(request) if logger.isEnabledFor(logging.DEBUG) else ""
        answering = behaviour(request, call)
        del request  # the servicer decides how long it is held
        try:
            response = await answering
            self.connections.check_answer(call.connection)
        except RequestError as error:
            code = CODES[type(error)]
            raise Failure(code, error.message, error.retry_after) from error
        except asyncio.CancelledError:
            code = _given_up(call.deadline)
            raise
        except Exception as error:
            code = grpc.StatusCode.INTERNAL
            logger.exception("%s failed", call.method)
            raise Failure(code, "the server failed on this request; its log has the reason") from error
        else:
            self.answered += 1
            return response
        finally:
            self._record(call, code, time.perf_counter() - started, request_id)

    def enter(self) -> None:
        """Counts a request as accepted."""
        self._in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        """Counts a request as answered."""
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()

    def _record(self, call: Call, code: grpc.StatusCode, seconds: float, request_id: str) -> None:
        self._metrics.on_request(call.method, code.name, seconds)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "request",
                extra={
                    "method": call.method,
                    "code": code.name,
                    "milliseconds": round(seconds * 1000, 3),
                    "request_id": request_id,
                    "peer": call.connection,
                },
            )


class _Accepted:
    """A call that counts as in flight until gRPC has sent its answer, or it has ended without one.

    It is itself the callback for the end of the call, so that a call needs only one object.
    """

    __slots__ = ("_calls", "_connection", "_size")

    def __init__(self, calls: Calls, connection: str) -> None:
        self._calls, self._connection = calls, connection
        self._size: int | None = None
        calls.enter()

    def sending(self, size: int) -> None:
        """Records that an answer of `size` bytes is about to be sent."""
        self._size = size
        self._calls.connections.sending(self._connection, size)

    def __call__(self, context: Context) -> None:
        """Records that the call is over."""
        if self._size is not None:
            self._calls.connections.sent(self._connection, self._size)
        self._calls.leave()


class _Registration:
    """Stands in for the server when generated code registers the methods of a servicer."""

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
            counter = self._counters.get(name)
            parse = functools.partial(parse_message, handler.request_deserializer, counter)
            if handler.unary_unary is None:
                wrapped[name] = self._streams[name](parse, handler.response_serializer)
                continue
            wrapped[name] = self._calls.unary(
                f"{service}/{name}",
                handler.unary_unary,
                parse,
                handler.response_serializer,
                while_draining=name in self._while_draining,
                with_spans=counter is not None,  # the methods whose requests hold images have counters
            )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))


def _request_id(request: Request) -> str:
    identity: str = getattr(request, "request_id", "") or getattr(request, "id", "")
    return identity[:80]


def on_done(context: Context, callback: Callable[[Context], None]) -> None:
    """Calls `callback` when a call is over: its answer was sent, or it ended without one."""
    add_done_callback: Any = context.add_done_callback  # its type stub is wrong
    add_done_callback(callback)


def deadline_of(context: Context) -> float | None:
    """When the client gives up, on time.monotonic(); None if never."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _given_up(deadline: float | None) -> grpc.StatusCode:
    """The status of a call that its client gave up."""
    return grpc.StatusCode.DEADLINE_EXCEEDED if gave_up_at(deadline) else grpc.StatusCode.CANCELLED
