"""Packs small calls that are made at the same time into shared requests. Pure logic: no I/O, threads or event loop.

A call is sent at once if fewer than `slots` shared requests are in progress. Otherwise it waits, together with all
calls that arrive meanwhile, until a slot is free; then they share a request. So a single caller never waits, and the
more callers there are, the more images share the cost of a request.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc

from service.client.answers import Results
from service.client.contents import Capacity, Content
from service.client.retrying import Deadline, RequestFailed
from service.generated.cifar.v1 import image_classifier_pb2 as messages

# Larger calls gain nothing by sharing and would make small calls wait, so they get requests of their own.
SMALL_IMAGES, SMALL_BYTES = 32, 2**18


def is_small(content: Content) -> bool:
    """Whether a content may share a request with others."""
    return content.count <= SMALL_IMAGES and content.size <= SMALL_BYTES


@dataclass(eq=False)
class Entry:
    """The content of one call on its way through a shared request.

    Attributes:
        content: Its images.
        deadline: When the call gives up.
        abandoned: Whether the caller no longer waits for the outcome.
        outcome: Its results, or the error instead of them; None until one of them is known.
    """

    content: Content
    deadline: Deadline
    abandoned: bool = False
    outcome: Results | BaseException | None = None

    def result(self) -> Results:
        """The results, or the exception that is the outcome. Call it once the outcome is known."""
        if isinstance(self.outcome, Results):
            return self.outcome
        raise self.outcome or RuntimeError("the outcome is not known yet")


E = TypeVar("E", bound=Entry)


class SharedRequests(Generic[E]):
    """The entries that wait and the entries in progress.

    Args:
        slots: Largest number of requests in progress at once.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._waiting: dict[E, None] = {}  # a queue, in order of arrival, from which any entry can be removed
        self._halves: deque[list[E]] = deque()
        self._under_way: list[list[E]] = []

    def add(self, entry: E) -> None:
        """Adds an entry that waits for a slot."""
        self._waiting[entry] = None

    def abandon(self, entry: E) -> None:
        """Records that the caller no longer waits for this entry; if it has not been sent, it never will be."""
        entry.abandoned = True
        self._waiting.pop(entry, None)

    def next_group(self, capacity: Capacity) -> list[E] | None:
        """Takes a slot and returns the entries of the next request; None if there is no slot or no entry.

        The entries fit into the capacity, except that a single entry may exceed it.
        """
        if not (self._waiting or self._halves) or len(self._under_way) >= self._slots:
            return None
        group = self._next_half() or self._from_waiting(capacity)
        if not group:
            return None
        self._under_way.append(group)
        return group

    def answered(self, group: list[E], parts: Sequence[Results]) -> None:
        """Frees the group's slot and gives each entry its results, which are in the same order."""
        self._under_way.remove(group)
        for entry, results in zip(group, parts, strict=True):
            entry.outcome = results

    def failed(self, group: list[E], failure: BaseException) -> None:
        """Frees the group's slot; its entries fail too, unless only one of them may have caused the failure.

        In that case the group is sent again in two halves, so that in the end only the entry at fault fails.
        """
        self._under_way.remove(group)
        remaining = [entry for entry in group if not entry.abandoned]
        if isinstance(failure, RequestFailed) and failure.caused_by_content and len(group) > 1:
            middle = (len(remaining) + 1) // 2
            self._halves += [half for half in (remaining[:middle], remaining[middle:]) if half]
            return
        for entry in remaining:
            entry.outcome = failure.copy() if isinstance(failure, RequestFailed) else failure

    def recover(self, pending: Collection[E], led: Sequence[list[E]], failure: RequestFailed) -> list[E]:
        """Repairs what an exception from a signal handler left half done, in any of the methods above.

        Frees the slots of groups that nobody sends any more. Entries that are then in no group and do not wait fail.

        Args:
            pending: The entries whose callers wait for an outcome.
            led: The groups that a caller sends.
            failure: The outcome of the others.

        Returns:
            The entries that have failed.
        """
        self._under_way = [group for group in self._under_way if any(group is each for each in led)]
        known = {*self._waiting, *(entry for group in (*self._halves, *self._under_way) for entry in group)}
        lost = [entry for entry in pending if entry.outcome is None and entry not in known]
        for entry in lost:
            entry.outcome = failure.copy()
        return lost

    def _next_half(self) -> list[E]:
        while self._halves:
            if group := [entry for entry in self._halves.popleft() if not entry.abandoned]:
                return group
        return []

    def _from_waiting(self, capacity: Capacity) -> list[E]:
        # An equal share for each slot, so that the server computes one request while the next one is prepared.
        images = sum(entry.content.count for group in (self._waiting, *self._under_way) for entry in group)
        share = min(capacity.images, -(-images // self._slots))
        group: list[E] = []
        count = size = 0
        for entry in self._waiting:
            count, size = count + entry.content.count, size + entry.content.size
            if group and (count > share or size > capacity.size):
                break
            group.append(entry)
        for entry in group:
            del self._waiting[entry]
        return group


def request_of(contents: Sequence[Content]) -> messages.ClassifyRequest:
    """One request for several contents; `distribute` takes its response apart."""
    return messages.ClassifyRequest(
        images=[image for content in contents for image in content.images],
        packed_rgb=b"".join([content.pixels for content in contents]),
        as_table=True,
    )


def distribute(contents: Sequence[Content], response: messages.ClassifyResponse) -> list[Results]:
    """The results of each content, from the response to `request_of(contents, …)`.

    Raises:
        RequestFailed: The response does not hold one result per image.
    """
    try:
        results = Results.of(response, sum(content.count for content in contents))
    except ValueError as error:
        raise RequestFailed(grpc.StatusCode.INTERNAL, str(error)) from error
    if len(contents) == 1:
        return [results]
    # The server answers all `images` of a request first, then its `packed_rgb`.
    next_image, next_pixels = 0, sum(len(content.images) for content in contents)
    parts = []
    for content in contents:
        start = next_pixels if content.pixels else next_image
        end = start + content.count
        if content.pixels:
            next_pixels = end
        else:
            next_image = end
        parts.append(results.part(start, end))
    return parts
