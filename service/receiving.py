"""Reads request messages under a limit on how many are being received at once, and a time limit for each.

Knows no transport. gRPC and HTTP share one `Receiver`, so that the limit holds for both together. Clients that stall in
the middle of their messages could make the server hold a full message for every call: gRPC allocates space for a
message as soon as somebody reads it, long before it has arrived. Until a message is read, a call holds no more than the
first window of its transport. So a message is read only while its call has one of a fixed number of slots. If calls
wait for a slot, connections whose last message arrived in time are served first, then new connections, then connections
that stalled; among equals, the connection with the fewest slots is served first.
"""

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from service.errors import DeadlineExpired, Overloaded

# While other calls wait for a slot, a message has this long to arrive, and an open stream this long to send its next.
CONTENDED_SECONDS = 1.0
CONTENDED_STREAM_SECONDS = 5.0
RETRY_SECONDS = 0.5
# Seconds between two checks for overdue messages.
CHECK_SECONDS = 0.1
# Number of connections whose behaviour is remembered.
MAX_REMEMBERED = 4096
_IN_TIME, _UNKNOWN, _STALLED = 0, 1, 2


class Source(Protocol):
    """Where messages come from, such as the context of a gRPC call or the body of an HTTP request."""

    async def read(self) -> Any:  # noqa: ANN401 -- gRPC's type
        """The next message, when it has arrived as a whole; a mark of the transport's own at the end."""


class _Slot:
    """The right of one call to receive."""

    __slots__ = ("connection", "contended_seconds", "limit", "overdue", "since", "task", "unanswered")

    def __init__(self, connection: str, contended_seconds: float) -> None:
        self.connection, self.contended_seconds = connection, contended_seconds
        # About the current read: its task, when it began, its limit in seconds, and whether it has exceeded the limit.
        self.task: asyncio.Task[Any] | None = None
        self.since = 0.0
        self.limit: float | None = None
        self.overdue = False
        self.unanswered = 0  # requests of a stream that the server has to answer: meanwhile its client may wait


class Receiver:
    """Hands out the slots.

    Args:
        slots: Number of messages that may be received at once. Each open stream holds a slot; streams get at most half.
        per_connection: Largest number of slots of one connection.
        max_waiting: Largest number of calls that wait for a slot.
        seconds: Time limit for one message of a unary call to arrive.
        on_timeout: Called for every message that did not arrive in time.
    """

    def __init__(
        self,
        *,
        slots: int,
        per_connection: int,
        max_waiting: int,
        seconds: float,
        on_timeout: Callable[[], None] = lambda: None,
    ) -> None:
        self._free = slots
        self._free_streams = max(1, slots // 2)
        self._per_connection = per_connection
        self._max_waiting = max_waiting
        self._seconds = seconds
        self._on_timeout = on_timeout
        self._waiting = 0
        self._queues: collections.OrderedDict[str, collections.deque[asyncio.Future[None]]] = collections.OrderedDict()
        self._held: dict[str, int] = {}
        self._behaviour: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._reading: set[_Slot] = set()
        self._check: asyncio.TimerHandle | None = None
        self._refused_stream = False

    async def read(self, source: Source, connection: str) -> Any:  # noqa: ANN401 -- as Source.read
        """The one message of a call, as `source` returns it.

        Raises:
            DeadlineExpired: It did not arrive in time.
            Overloaded: Too many calls wait to be received.
        """
        if not self._take(connection):
            await self._wait(connection)
        try:
            return await self._read(source, _Slot(connection, min(CONTENDED_SECONDS, self._seconds)), self._seconds)
        finally:
            self._release(connection)

    @contextlib.asynccontextmanager
    async def stream(self, connection: str) -> AsyncIterator[_Slot]:
        """A slot for a stream, for the length of an `async with` block; pass it to `read_stream`.

        Raises:
            Overloaded: The largest number of streams is open already, on this connection or in total.
        """
        if not self._free_streams or not self._take(connection):
            self._refused_stream = self._held.get(connection, 0) < self._per_connection
            raise Overloaded("the largest number of streams is open already: use Classify, or retry", RETRY_SECONDS)
        self._free_streams -= 1
        try:
            yield _Slot(connection, CONTENDED_STREAM_SECONDS)
        finally:
            self._free_streams += 1
            self._release(connection)

    async def read_stream(self, source: Source, slot: _Slot) -> Any:  # noqa: ANN401
        """The next message of a stream, as `source` returns it. There is a time limit only while other calls wait.

        Raises:
            DeadlineExpired: It did not arrive while other calls waited for the slot.
        """
        return await self._read(source, slot, None)

    async def _read(self, source: Source, slot: _Slot, limit: float | None) -> Any:  # noqa: ANN401
        slot.task, slot.since, slot.limit = asyncio.current_task(), time.monotonic(), limit
        self._reading.add(slot)
        if self._check is None:
            self._check_later()
        try:
            message = await source.read()
        except asyncio.CancelledError:
            if not slot.overdue or slot.task is None or slot.task.uncancel():
                raise
            self._remember(slot.connection, _STALLED)
            self._on_timeout()
            raise DeadlineExpired(
                f"the request message did not arrive within {time.monotonic() - slot.since:.1f} s (--receive-timeout, "
                "shorter while other requests wait): send it without pauses, or in smaller parts"
            ) from None
        finally:
            self._reading.discard(slot)
        if self._behaviour.get(slot.connection) != _IN_TIME:
            self._remember(slot.connection, _IN_TIME)
        return message

    def _check_later(self) -> None:
        # One timer serves all reads, because a timer for each read would slow down every call.
        self._check = asyncio.get_running_loop().call_later(CHECK_SECONDS, self._end_overdue)

    def _end_overdue(self) -> None:
        """Ends the reads that have taken too long."""
        now = time.monotonic()
        contended = self._refused_stream or (not self._free and any(map(self._may_have_more, self._queues)))
        for slot in self._reading:
            limit = slot.limit
            if slot.unanswered:
                slot.since = now
            if contended:
                limit = slot.contended_seconds if limit is None else min(limit, slot.contended_seconds)
            if limit is not None and now - slot.since >= limit and not slot.overdue and slot.task is not None:
                slot.overdue = True
                slot.task.cancel()
        self._refused_stream = False
        self._check = None
        if self._reading:
            self._check_later()

    def _remember(self, connection: str, behaviour: int) -> None:
        self._behaviour[connection] = behaviour
        if len(self._behaviour) > MAX_REMEMBERED:
            self._behaviour.popitem(last=False)

    def _rank(self, connection: str) -> tuple[int, int]:
        return self._behaviour.get(connection, _UNKNOWN), self._held.get(connection, 0)

    def _take(self, connection: str) -> bool:
        """Takes a free slot if the connection may have another.

        No call of another connection is passed over: while a slot is free, only connections wait that have all of
        theirs.
        """
        if not self._free or not self._may_have_more(connection):
            return False
        self._free -= 1
        self._held[connection] = self._held.get(connection, 0) + 1
        return True

    def _may_have_more(self, connection: str) -> bool:
        return self._held.get(connection, 0) < self._per_connection

    async def _wait(self, connection: str) -> None:
        if self._waiting >= self._max_waiting:
            raise Overloaded("too many requests are waiting to be received: retry", RETRY_SECONDS)
        turn = asyncio.get_running_loop().create_future()
        self._queues.setdefault(connection, collections.deque()).append(turn)
        self._waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the slot was handed over just now
                self._release(connection)
            else:
                self._leave_queue(connection, turn)
            raise
        finally:
            self._waiting -= 1

    def _leave_queue(self, connection: str, turn: "asyncio.Future[None]") -> None:
        turns = self._queues.get(connection, collections.deque())
        with contextlib.suppress(ValueError):  # `_hand_over` has removed it already
            turns.remove(turn)
        if not turns:
            self._queues.pop(connection, None)

    def _release(self, connection: str) -> None:
        self._free += 1
        held = self._held[connection] - 1
        if held:
            self._held[connection] = held
        else:
            del self._held[connection]
        if self._queues:
            self._hand_over()

    def _hand_over(self) -> None:
        """Gives free slots to waiting calls, the best ranked connection first; equals take turns."""
        while self._free:
            open_to = [each for each in self._queues if self._may_have_more(each)]
            if not open_to:
                return
            connection = min(open_to, key=self._rank)
            turns = self._queues[connection]
            turn = turns.popleft()
            if turns:
                self._queues.move_to_end(connection)
            else:
                del self._queues[connection]
            if turn.done():  # its call was cancelled a moment ago
                continue
            self._free -= 1
            self._held[connection] = self._held.get(connection, 0) + 1
            turn.set_result(None)
