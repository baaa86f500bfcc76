"""Sends the shared requests of a `Client`. `packing` decides which calls share a request.

It has no thread: one of the calling threads sends the request of its group and hands the results to the others.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc

from service.client.answers import Results
from service.client.contents import Capacity, Content
from service.client.packing import Entry, SharedRequests, distribute, request_of
from service.client.retrying import Deadline, RequestFailed, deadline_exceeded
from service.generated.cifar.v1 import image_classifier_pb2 as messages

Send: TypeAlias = "Callable[[messages.ClassifyRequest, Deadline], messages.ClassifyResponse]"

# A thread that a signal handler interrupted may have left its group unsent, and those that wait for it asleep. They
# look for themselves then.
_MAX_WAIT_SECONDS = 1.0


@dataclass(eq=False)
class _Entry(Entry):
    """An entry whose thread waits for `wake`, until it has its outcome or has to send the request of a group.

    A queue costs much less than an Event, which is written in Python. It may wake the thread more often than needed.

    Attributes:
        leads: The group whose request its thread has to send, from the choice of the thread to the group's outcome.
    """

    wake: "queue.SimpleQueue[None]" = field(default_factory=queue.SimpleQueue)
    leads: "list[_Entry] | None" = None


class SyncSharing:
    """Lets calls from several threads share requests.

    Args:
        slots: Largest number of shared requests in progress at once.
        send: Sends a request once; raises RequestFailed.
        capacity: Returns how much one request may hold now.
    """

    def __init__(self, slots: int, send: Send, capacity: Callable[[], Capacity]) -> None:
        self._requests = SharedRequests[_Entry](slots)
        self._send, self._capacity = send, capacity
        self._lock = threading.Lock()  # held for everything that concerns `_requests` and the entries' fields
        self._pending: set[_Entry] = set()  # those whose threads are in `exchange`

    def exchange(self, content: Content, deadline: Deadline) -> Results:
        """The results of one content, after one attempt.

        Raises:
            RequestFailed: The attempt failed, or the deadline passed.
        """
        entry = _Entry(content, deadline)
        try:
            with self._lock:
                self._pending.add(entry)
                self._requests.add(entry)
                leaders = self._choose_leaders()
            _wake(leaders)
            while entry.outcome is None:
                if group := self._wait(entry):
                    self._lead(group)
        except BaseException:  # its deadline passed, or a signal handler raised an error anywhere
            self._give_up(entry)
            raise
        finally:
            self._pending.discard(entry)
        return entry.result()

    def _wait(self, entry: _Entry) -> list[_Entry] | None:
        """The group whose request this thread has to send, if any."""
        remaining = entry.deadline.remaining()
        try:
            entry.wake.get(timeout=_MAX_WAIT_SECONDS if remaining is None else min(remaining, _MAX_WAIT_SECONDS))
        except queue.Empty:
            self._recover()
        if entry.outcome is not None:  # then it leads no group
            return None
        with self._lock:
            if entry.leads is None and entry.outcome is None and time.monotonic() >= entry.deadline.at:
                raise deadline_exceeded()
            return entry.leads

    def _lead(self, group: list[_Entry]) -> None:
        """Sends a group's request and hands out the results, or the failure."""
        latest = max((entry.deadline for entry in group), key=lambda deadline: deadline.at)
        try:
            contents = [entry.content for entry in group]
            parts = distribute(contents, self._send(request_of(contents), latest))
        except RequestFailed as failure:
            self._finish(group, failure)
        except BaseException:
            # This thread was interrupted, or the client was closed: the other threads try again.
            self._finish(group, _interrupted())
            raise
        else:
            self._finish(group, parts)

    def _finish(self, group: list[_Entry], outcome: list[Results] | RequestFailed) -> None:
        with self._lock:
            if isinstance(outcome, RequestFailed):
                self._requests.failed(group, outcome)
            else:
                self._requests.answered(group, outcome)
            for entry in group:
                if entry.leads is group:
                    entry.leads = None
            leaders = self._choose_leaders()
        # The leaders first, because the server waits for their requests. The lock is free by now: a thread that wakes
        # would otherwise only wait for it.
        _wake(leaders)
        _wake(entry for entry in group if entry.outcome is not None)

    def _choose_leaders(self) -> list[_Entry]:
        """Finds a thread for each group that may be sent now. Returns their entries, which the caller wakes."""
        leaders = []
        while group := self._requests.next_group(self._capacity()):
            # The entry with the latest deadline leads, because it can hand out the results when others have given up.
            leader = max(group, key=lambda entry: entry.deadline.at)
            leader.leads = group
            leaders.append(leader)
        return leaders

    def _give_up(self, entry: _Entry) -> None:
        """Abandons an entry, interrupted or at its deadline. If its thread leads a group, another thread takes over."""
        with self._lock:
            self._pending.discard(entry)
            self._requests.abandon(entry)
        self._recover()

    def _recover(self) -> None:
        """Lets other threads try again what an interrupted one left half done; see `SharedRequests.recover`."""
        with self._lock:
            pending = list(self._pending)
            led = [entry.leads for entry in pending if entry.leads is not None]
            lost = self._requests.recover(pending, led, _interrupted())
            leaders = self._choose_leaders()
        _wake(leaders)
        _wake(lost)


def _wake(entries: Iterable[_Entry]) -> None:
    for entry in entries:
        entry.wake.put(None)


def _interrupted() -> RequestFailed:
    return RequestFailed(grpc.StatusCode.CANCELLED, "the thread that was to send the shared request was interrupted")
