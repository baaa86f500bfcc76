"""A queue of image files that is fair to clients: they take turns, and so do the requests of each client.

Has neither threads nor locks.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from numpy import uint8
from numpy.typing import NDArray

from cifar_core.images import ImageRejected
from service.errors import DeadlineExpired

Decoded = NDArray[uint8] | ImageRejected


@dataclass(eq=False)
class Request:
    """The files of one request.

    Attributes:
        files: Their contents.
        client: Whom turns are shared out to.
        deadline: On time.monotonic(); None if there is none.
        future: Set to all results in order when the last is there. Once it is done, or cancelled, files that remain are
            not decoded.
    """

    files: Sequence[bytes]
    client: Hashable
    deadline: float | None
    future: asyncio.Future[list[Decoded]]
    results: dict[int, Decoded] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        """Somebody still waits for the results. Ends the request if its deadline has passed."""
        if self.deadline is not None and not self.future.done() and time.monotonic() > self.deadline:
            self.future.set_exception(DeadlineExpired("the deadline passed before all images were decoded"))
        return not self.future.done()

    def finish(self, index: int, result: Decoded) -> None:
        """Notes the result of one file."""
        self.results[index] = result
        if len(self.results) == len(self.files) and not self.future.done():
            self.future.set_result([self.results[place] for place in range(len(self.files))])


@dataclass(eq=False)
class Job:
    """One file of a request. `memory` is the estimate of what decoding it needs, in bytes."""

    request: Request
    index: int
    memory: int

    @property
    def data(self) -> bytes:
        """Content of the file."""
        return self.request.files[self.index]


class FairQueue:
    """Jobs of clients, of requests; those that nobody waits for any longer are dropped."""

    def __init__(self) -> None:
        self._clients: OrderedDict[Hashable, OrderedDict[Request, deque[Job]]] = OrderedDict()

    def push(self, job: Job, *, first: bool = False) -> None:
        """Adds a job behind those of its request, or before them."""
        requests = self._clients.setdefault(job.request.client, OrderedDict())
        jobs = requests.setdefault(job.request, deque())
        if first:
            jobs.appendleft(job)
        else:
            jobs.append(job)

    def peek(self) -> Job | None:
        """The job whose turn it is."""
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
        """Removes the job that `peek` returned; it is then the turn of another client."""
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

    def remove_client(self, client: Hashable) -> list[Job]:
        """Removes all jobs of a client and returns them."""
        return [job for jobs in self._clients.pop(client, {}).values() for job in jobs]

    def remove_all(self) -> list[Job]:
        """Removes all jobs and returns them."""
        return [job for client in list(self._clients) for job in self.remove_client(client)]
