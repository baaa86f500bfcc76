"""Sends the shared requests of a `Client`. `packing` decides which calls share a request.

It has no thread: one of the calling threads sends the request of its group and hands the results to the others.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc

from service.client.answers import Results
from service.client.contents import Capacity, Content
from service.client.packing import Entry, SharedRequests, distribute, request_of
from service.client.retrying import Deadline, RequestFailed, deadline_exceeded
from service.generated.cifar.v1 import image_classifier_pb2 as messages

Send: TypeAlias = "Callable[[messages.ClassifyRequest, Deadline], messages.ClassifyResponse]"


@dataclass(eq=False)
class _Entry(Entry):
    """An entry whose thread waits for `wake`, until it has its outcome or has to send the request of a group."""

    wake: threading.Event = field(default_factory=threading.Event)
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

    def exchange(self, content: Content, deadline: Deadline) -> Results:
        """The results of one content, after one attempt.

        Raises:
            RequestFailed: The attempt failed, or the deadline passed.
        """
        entry = _Entry(content, deadline)
        with self._lock:
            self._requests.add(entry)
            self._choose_leaders()
        try:
            while entry.outcome is None:
                if group := self._wait(entry):
                    self._lead(group)
        except BaseException:
            self._give_up(entry)
            raise
        return entry.result()

    def _wait(self, entry: _Entry) -> list[_Entry] | None:
        """The group whose request this thread has to send, if any."""
        in_time = entry.wake.wait(entry.deadline.remaining())
        with self._lock:
            entry.wake.clear()
            group, entry.leads = entry.leads, None
            if group is None and entry.outcome is None and not in_time:
                raise deadline_exceeded()
            return group

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
                if entry.outcome is not None:
                    entry.wake.set()
            self._choose_leaders()

    def _choose_leaders(self) -> None:
        while group := self._requests.next_group(self._capacity()):
            # The entry with the latest deadline leads, because it can hand out the results when others have given up.
            leader = max(group, key=lambda entry: entry.deadline.at)
            leader.leads = group
            leader.wake.set()

    def _give_up(self, entry: _Entry) -> None:
        """Abandons an entry, interrupted or at its deadline. If its thread leads a group, another thread takes over."""
        with self._lock:
            self._requests.abandon(entry)
            if entry.leads:
                self._requests.failed(entry.leads, _interrupted())
                for other in entry.leads:
                    other.wake.set()
                entry.leads = None
                self._choose_leaders()


def _interrupted() -> RequestFailed:
    return RequestFailed(grpc.StatusCode.CANCELLED, "the thread that was to send the shared request was interrupted")
