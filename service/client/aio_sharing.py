"""Sends the shared requests of an `AsyncClient`. `packing` decides which calls share a request."""

import asyncio
import functools
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc

from service.client.answers import Results
from service.client.contents import Capacity, Content
from service.client.packing import Entry, SharedRequests, distribute, request_of
from service.client.retrying import Deadline, RequestFailed, deadline_exceeded
from service.generated.cifar.v1 import image_classifier_pb2 as messages

_LATE_SECONDS = 0.1

Send: TypeAlias = "Callable[[messages.ClassifyRequest, Deadline], Awaitable[messages.ClassifyResponse]]"


@dataclass(eq=False)
class _Entry(Entry):
    finished: "asyncio.Future[None]" = field(kw_only=True)
    sending: "_Sending | None" = None


@dataclass(eq=False)
class _Sending:
    """A shared request in progress, and the task that waits for its response."""

    group: list[_Entry]
    task: "asyncio.Task[list[Results]]"


class AsyncSharing:
    """Lets calls that run in one event loop share requests.

    Args:
        slots: Largest number of shared requests in progress at once.
        send: Sends a request once; raises RequestFailed.
        capacity: Returns how much one request may hold now.
    """

    def __init__(self, slots: int, send: Send, capacity: Callable[[], Capacity]) -> None:
        self._requests = SharedRequests[_Entry](slots)
        self._send, self._capacity = send, capacity
        self._start_is_scheduled = False
        self._pending: set[_Entry] = set()
        # One timer for the earliest deadline, because most deadlines never pass and each timer costs time.
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    async def exchange(self, content: Content, deadline: Deadline) -> Results:
        """The results of one content, after one attempt.

        Raises:
            RequestFailed: The attempt failed, or the deadline passed.
        """
        entry = _Entry(content, deadline, finished=asyncio.get_running_loop().create_future())
        self._requests.add(entry)
        self._schedule_start()
        self._pending.add(entry)
        if deadline.at < self._timer_at:
            self._set_timer(deadline.at)
        try:
            await entry.finished
        finally:
            self._pending.discard(entry)
            if entry.outcome is None:
                self._abandon(entry)
        return entry.result()

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = asyncio.get_running_loop().call_later(max(0.0, at - time.monotonic()), self._expire)

    def _expire(self) -> None:
        if time.monotonic() - self._timer_at > _LATE_SECONDS:
            # Something has blocked the event loop. Answers that have arrived meanwhile are handled first.
            self._timer = asyncio.get_running_loop().call_later(_LATE_SECONDS, self._expire_now)
        else:
            self._expire_now()

    def _expire_now(self) -> None:
        now = time.monotonic()
        for entry in self._pending:
            if entry.deadline.at <= now and not entry.finished.done():
                self._abandon(entry)
                entry.outcome = deadline_exceeded()
                entry.finished.set_result(None)
        self._timer, self._timer_at = None, math.inf
        remaining = [entry.deadline.at for entry in self._pending if entry.deadline.at > now]
        if remaining and min(remaining) < math.inf:
            self._set_timer(min(remaining))

    def _schedule_start(self) -> None:
        # Not at once: when a response arrives, its callers run one after another and often make their next calls, which
        # should share a request. A single call is sent in the next turn of the event loop, microseconds later.
        if not self._start_is_scheduled:
            self._start_is_scheduled = True
            asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        self._start_is_scheduled = False
        while group := self._requests.next_group(self._capacity()):
            sending = _Sending(group, asyncio.create_task(self._ask(group)))
            for entry in group:
                entry.sending = sending
            sending.task.add_done_callback(functools.partial(self._finish, group))

    async def _ask(self, group: list[_Entry]) -> list[Results]:
        latest = max((entry.deadline for entry in group), key=lambda deadline: deadline.at)
        contents = [entry.content for entry in group]
        return distribute(contents, await self._send(request_of(contents), latest))

    def _finish(self, group: list[_Entry], task: "asyncio.Task[list[Results]]") -> None:
        failure = RequestFailed(grpc.StatusCode.CANCELLED, "cancelled") if task.cancelled() else task.exception()
        if failure is None:
            self._requests.answered(group, task.result())
        else:
            self._requests.failed(group, failure)
        for entry in group:
            if entry.outcome is not None and not entry.finished.done():
                entry.finished.set_result(None)
        self._schedule_start()

    def _abandon(self, entry: _Entry) -> None:
        self._requests.abandon(entry)
        if entry.sending and all(other.abandoned for other in entry.sending.group):
            entry.sending.task.cancel()  # nobody waits for the response
