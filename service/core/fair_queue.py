"""A queue of image files in which clients take turns, and the requests of each client take turns.

It has neither threads nor locks: use it in one event loop.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from numpy import uint8
from numpy.typing import NDArray

from cifar_core.pixels import ImageRejected
from service.errors import DeadlineExpired, RequestError

Decoded = NDArray[uint8] | ImageRejected


@dataclass(eq=False)
class DecodeRequest:
    """The files of one request.

    Attributes:
        files: Their contents.
        client: Key of the client; clients take turns.
        deadline: Time on time.monotonic() after which no file is decoded; None for no deadline.
        future: Receives all results, in order, together with the last one. Once it is done or cancelled, the remaining
            files are not decoded.
    """

    files: Sequence[bytes]
    client: Hashable
    deadline: float | None
    future: asyncio.Future[list[Decoded]]
    results: dict[int, Decoded] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        """Whether the caller still waits for the results. Fails the request if its deadline has passed."""
        if self.deadline is not None and not self.future.done() and time.monotonic() > self.deadline:
            self.future.set_exception(DeadlineExpired("the deadline passed before all images were decoded"))
        return not self.future.done()

    def fail(self, error: RequestError) -> None:
        """Fails the request as a whole."""
        if not self.future.done():
            self.future.set_exception(error)

    def finish(self, index: int, result: Decoded) -> None:
        """Records the result of one file."""
        self.results[index] = result
        if len(self.results) == len(self.files) and not self.future.done():
            self.future.set_result([self.results[number] for number in range(len(self.files))])


@dataclass(eq=False)
class Job:
    """One file of a request.

    Attributes:
        request: The request.
        index: Place of the file in the request.
        memory: Estimated memory for decoding it, in bytes.
        repeats: How often it was sent to another process, because its own had ended before it can have read the file.
    """

    request: DecodeRequest
    index: int
    memory: int
    repeats: int = 0

    @property
    def data(self) -> bytes:
        """Content of the file."""
        return self.request.files[self.index]


class FairQueue:
    """Jobs by client and request. Jobs whose request no longer waits are dropped."""

    def __init__(self) -> None:
        self._clients: OrderedDict[Hashable, OrderedDict[DecodeRequest, deque[Job]]] = OrderedDict()

    def push(self, job: Job, *, first: bool = False) -> None:
        """Adds a job after the other jobs of its request; before them if `first`."""
        requests = self._clients.setdefault(job.request.client, OrderedDict())
        jobs = requests.setdefault(job.request, deque())
        if first:
            jobs.appendleft(job)
        else:
            jobs.append(job)

    def peek(self) -> Job | None:
        """The next job; None if there is none."""
        while self._clients:
            client, requests = next(iter(self._clients.items()))
            request, jobs = next(iter(requests.items()))
            if request.waits:
                return jobs[0]
            del requests[request]
            if not requests:
                del self._clients[client]
        return None

    def pop(self) -> Job:
        """Removes and returns the job that `peek` returned. The next turn belongs to another client."""
        client, requests = next(iter(self._clients.items()))
        request, jobs = next(iter(requests.items()))
        job = jobs.popleft()
        if jobs:
            requests.move_to_end(request)
        else:
            del requests[request]
        if requests:
            self._clients.move_to_end(client)
        else:
            del self._clients[client]
        return job

    def remove_request(self, request: DecodeRequest) -> None:
        """Removes all jobs of a request."""
        requests = self._clients.get(request.client)
        if requests is not None and requests.pop(request, None) is not None and not requests:
            del self._clients[request.client]

    def remove_client(self, client: Hashable) -> list[Job]:
        """Removes all jobs of a client and returns them."""
        return [job for jobs in self._clients.pop(client, {}).values() for job in jobs]

    def remove_all(self) -> list[Job]:
        """Removes all jobs and returns them."""
        return [job for client in list(self._clients) for job in self.remove_client(client)]
