"""Handlers of methods that stream, with the same limits as unary calls.

`request_stream` answers each request of a stream by itself. `watch` is for one request and many responses.
`conversation` is for servicers of libraries that take an iterator of requests.
"""

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from service.errors import Overloaded, RequestError
from service.rpc.calls import Behaviour, Call, Calls, Response, Serialize, deadline_of
from service.rpc.statuses import Context, Failure, abort
from service.rpc.tracing import on_received
from service.rpc.wire import Parse, Request, check_small

# Largest number of requests of one stream whose answers have not been sent. Further requests stay in the connection,
# and gRPC's flow control slows the client down.
STREAM_WINDOW = 32
# Largest number of open health watches and reflection calls, which cost little but last long.
MAX_LONG_CALLS = 256
MAX_LONG_CALLS_PER_CONNECTION = 8
_RETRY_SECONDS = 1.0
# The event loop may run the timer of a deadline this much early.
_CLOCK_SECONDS = 0.001

Handler = Callable[[Parse, Serialize], "grpc.RpcMethodHandler[Any, Any]"]


def request_stream(
    calls: Calls,
    method: str,
    behaviour: Behaviour,
    on_failure: Callable[[Request, Failure], Response],
    *,
    ordered: bool = False,
) -> Handler:
    """A stream of requests. Several are answered at the same time.

    Args:
        calls: Counts the requests and reads them.
        method: Full name of the method, SERVICE/METHOD.
        behaviour: Answers one request.
        on_failure: Returns the response to a request that failed.
        ordered: Whether the responses are sent in the order of the requests; otherwise as soon as possible.
    """

    def make(parse: Parse, serialize: Serialize) -> "grpc.RpcMethodHandler[Any, Any]":
        async def handle(_requests: object, context: Context) -> None:
            connection = context.peer()
            stream = _RequestStream(calls, method, behaviour, on_failure, parse, context, connection, ordered)
            try:
                await calls.check(connection)
                async with calls.receiver.stream(connection) as slot:
                    await stream.run(slot, serialize)
            except RequestError as error:
                await calls.refuse(method, context, error)
            if stream.expired:
                await abort(
                    context,
                    Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before all requests were answered"),
                )
            if stream.stopped:
                await abort(
                    context, Failure(grpc.StatusCode.UNAVAILABLE, "the server is shutting down: ask another, or retry")
                )

        return grpc.stream_stream_rpc_method_handler(handle)

    return make


class _RequestStream:
    """One open stream."""

    def __init__(
        self,
        calls: Calls,
        method: str,
        behaviour: Behaviour,
        on_failure: Callable[[Request, Failure], Response],
        parse: Parse,
        context: Context,
        connection: str,
        ordered: bool,
    ) -> None:
        self._calls, self._method, self._behaviour, self._on_failure = calls, method, behaviour, on_failure
        self._parse, self._context, self._connection = parse, context, connection
        self._ordered = ordered
        # Tasks that compute an answer: in the order of the requests, or in the order in which they are done.
        self._answers: asyncio.Queue[asyncio.Task[Response] | None] = asyncio.Queue()
        self._accepted = _InFlight(calls)
        self._window = asyncio.Semaphore(STREAM_WINDOW)
        self.stopped = False  # the server stopped reading it
        self.expired = False  # a request was not answered because the deadline of the stream passed
        self._deadline = deadline_of(context)

    async def run(self, slot: Any, serialize: Serialize) -> None:  # noqa: ANN401 -- private to Receiver
        """Reads, answers and writes until the client ends the stream, or the server stops.

        Raises:
            RequestError: The next request did not arrive in time.
        """
        answering = asyncio.create_task(self._answer_all(slot))
        try:
            while (answer := await self._answers.get()) is not None:
                if not answer.done():
                    await asyncio.wait((answer,))
                if answer.cancelled():  # the reader failed, which is raised below
                    break
                await self._context.write(serialize(answer.result()))
                self._accepted.pop()
                slot.unanswered = len(self._accepted)
                self._window.release()
            await answering  # raises what ended it
        finally:
            answering.cancel()
            self._accepted.clear()

    async def _answer_all(self, slot: Any) -> None:  # noqa: ANN401
        try:
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._read_all(slot, group))
                with self._calls.reading(reading):
                    await asyncio.wait((reading,))
                self.stopped = reading.cancelled()
        except ExceptionGroup as errors:  # the reader's RequestError
            raise errors.exceptions[0] from None
        finally:
            self._answers.put_nowait(None)

    async def _read_all(self, slot: Any, group: asyncio.TaskGroup) -> None:  # noqa: ANN401
        while True:
            message = await self._calls.receiver.read_stream(self._context, slot)
            if message is grpc.aio.EOF:
                return
            await self._window.acquire()
            self._accepted.append()
            slot.unanswered = len(self._accepted)
            answer = group.create_task(self._answer(message))
            if self._ordered:
                self._answers.put_nowait(answer)
            else:
                answer.add_done_callback(self._answers.put_nowait)

    async def _answer(self, message: bytes) -> Response:
        call = Call(self._method, self._connection, self._deadline, len(message), self._context)
        request: Request = None

        async def parse_and_answer(_: None, call: Call) -> Response:
            nonlocal request
            request = self._parse(message)
            on_received()
            return await self._behaviour(request, call)

        try:
            with self._calls.span(call.method, self._context):
                return await self._calls.answer(parse_and_answer, None, call)
        except Failure as failure:
            # A request may have an earlier deadline of its own, which does not concern the others.
            if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED and self._deadline is not None:
                self.expired |= time.monotonic() >= self._deadline - _CLOCK_SECONDS
            return self._on_failure(request, failure)


class _InFlight:
    """The requests of one stream that count as in flight: accepted, and their answers not sent yet."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._count = 0
        self._ended = False

    def __len__(self) -> int:
        return self._count

    def append(self) -> None:
        """A request was accepted."""
        if not self._ended:
            self._count += 1
            self._calls.enter()

    def pop(self) -> None:
        """An answer was sent."""
        if self._count:
            self._count -= 1
            self._calls.leave()

    def clear(self) -> None:
        """The stream has ended: its requests get no answers any more."""
        while self._count:
            self.pop()
        self._ended = True


async def _read_small(calls: Calls, context: Context, connection: str, parse: Parse) -> Request | None:
    """A request of a long call, which is held as long as the call lasts; None at the end.

    Raises:
        InvalidRequest: It is larger than such a request needs.
    """
    message = await calls.receiver.read(context, connection)
    if message is grpc.aio.EOF:
        return None
    check_small(message)
    return parse(message)


class LongCalls:
    """Limits how many long calls are open."""

    def __init__(self) -> None:
        self._open: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def enter(self, connection: str) -> Iterator[None]:
        """Counts a call for the length of a `with` block.

        Raises:
            Overloaded: The largest number of long calls is open already.
        """
        if self._open.total() >= MAX_LONG_CALLS or self._open[connection] >= MAX_LONG_CALLS_PER_CONNECTION:
            raise Overloaded("the largest number of health watches and reflection calls is open: retry", _RETRY_SECONDS)
        self._open[connection] += 1
        try:
            yield
        finally:
            self._open[connection] -= 1
            if not self._open[connection]:
                del self._open[connection]


def watch(
    calls: Calls, long_calls: LongCalls, method: str, behaviour: Callable[[Request, Context], Awaitable[None]]
) -> Handler:
    """A method with one request whose responses `behaviour` writes to the context."""

    def make(parse: Parse, serialize: Serialize) -> "grpc.RpcMethodHandler[Any, Any]":
        async def handle(_requests: object, context: Context) -> None:
            connection = context.peer()
            try:
                with long_calls.enter(connection):
                    request = await _read_small(calls, context, connection, parse)
                    if request is not None:
                        await behaviour(request, context)
            except RequestError as error:
                await calls.refuse(method, context, error)

        return grpc.stream_stream_rpc_method_handler(handle, response_serializer=serialize)

    return make


def conversation(
    calls: Calls,
    long_calls: LongCalls,
    method: str,
    behaviour: Callable[[AsyncIterator[Request], Context], Any],
) -> Handler:
    """A method with many requests and responses, of a servicer that takes an iterator of requests."""

    def make(parse: Parse, serialize: Serialize) -> "grpc.RpcMethodHandler[Any, Any]":
        async def requests(context: Context, connection: str) -> AsyncIterator[Request]:
            while (request := await _read_small(calls, context, connection, parse)) is not None:
                yield request

        async def handle(_requests: object, context: Context) -> None:
            connection = context.peer()
            try:
                with long_calls.enter(connection):
                    async for response in behaviour(requests(context, connection), context):
                        await context.write(response)
            except RequestError as error:
                await calls.refuse(method, context, error)

        return grpc.stream_stream_rpc_method_handler(handle, response_serializer=serialize)

    return make
