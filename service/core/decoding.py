"""Decodes the image files of many requests in processes of their own, which are replaced when a file ends them.

There are two lanes. The fast lane decodes files that take a few milliseconds. Files that are larger, or that take
longer than the fast lane allows, go to the slow lane, whose processes have a lower priority. Expensive files therefore
delay each other, but not the small images of other clients.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cifar_core.pixels import ImageLimits, ImageRejected
from service.core.decode_lane import Lane, LaneOptions
from service.core.decode_messages import ProcessLimits
from service.core.fair_queue import Decoded, DecodeRequest, Job

__all__ = ["Decoded", "Decoder"]

MAX_DECODE_SECONDS = 1.0
FAST_CPU_SECONDS = 0.03
FAST_PIXELS = 2**20
"""About a picture of 1024 x 1024, which takes 2 to 15 ms of CPU time, depending on the format."""
FAST_MEMORY = 48 * 2**20
MAX_MEMORY = 224 * 2**20
"""Bytes of memory that one image may need. Images that need more than `FAST_MEMORY` share this amount."""
FILES_AHEAD = 8
_FAST_WALL_SECONDS = 2.0
# The slow lane passes no file on.
_ANY_PIXELS = 2**62
_SLOW_NICENESS = 10
# With the lower priority, on a busy machine, a process may get a tenth of a CPU.
_SLOW_WALL_FACTOR = 30
# How long a client whose file exceeded the fast lane's CPU time stays in the slow lane, and how many are remembered.
_SLOW_CLIENT_SECONDS = 10.0
_SLOW_CLIENTS = 1024
_WATCH_SECONDS = 0.25


class Decoder:
    """Decodes files in processes. Must be created in a running event loop; returns before the processes have started.

    Args:
        processes: Number of processes of each lane.
        image_limits: Limits on one image file.
        max_decode_seconds: Seconds of CPU time that one image may take.
        on_ended: Called with "limit" or "crash" when a process ended and is replaced.
    """

    def __init__(
        self,
        processes: int,
        image_limits: ImageLimits,
        max_decode_seconds: float = MAX_DECODE_SECONDS,
        on_ended: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._max_decode_seconds = max_decode_seconds
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="decode-start")
        self._slow_clients: OrderedDict[str, float] = OrderedDict()
        fast = LaneOptions(
            name="fast",
            limits=ProcessLimits(min(FAST_CPU_SECONDS, max_decode_seconds / 2), FAST_PIXELS, MAX_MEMORY, niceness=0),
            processes=processes,
            on_demand=False,
            files_ahead=FILES_AHEAD,
            max_seconds=_FAST_WALL_SECONDS,
            common_memory=FAST_MEMORY,
        )
        slow = LaneOptions(
            name="slow",
            limits=ProcessLimits(max_decode_seconds, _ANY_PIXELS, MAX_MEMORY, _SLOW_NICENESS),
            processes=processes,
            on_demand=True,
            files_ahead=1,
            max_seconds=max(_FAST_WALL_SECONDS, _SLOW_WALL_FACTOR * max_decode_seconds),
            common_memory=FAST_MEMORY,
        )
        self._fast = Lane(fast, image_limits, self._starter, self._on_large, self._on_fast_limit, on_ended)
        self._slow = Lane(slow, image_limits, self._starter, self._on_large, self._on_slow_limit, on_ended)
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    @property
    def pids(self) -> list[int]:
        """Process ids of both lanes."""
        return self._fast.pids + self._slow.pids

    def busy_processes(self) -> int:
        """Number of processes of the fast lane that have a file; those of the slow lane leave others the CPU."""
        return self._fast.busy_processes

    async def decode(
        self, files: Sequence[bytes], deadline: float | None = None, client: str | None = None
    ) -> list[Decoded]:
        """Decodes files. When it is cancelled, files that no process has received yet are not decoded.

        Args:
            files: Contents of image files.
            deadline: Time on time.monotonic() after which no file is decoded; None for no deadline.
            client: Key of the client; clients take turns. None: this request counts as a client of its own.

        Returns:
            Per file, in order: uint8 [32, 32, 3], or the reason why it cannot be decoded.

        Raises:
            DeadlineExpired: The deadline passed.
        """
        if not files:
            return []
        request = DecodeRequest(files, client or object(), deadline, asyncio.get_running_loop().create_future())
        lane = self._slow if client and self._slow_clients.get(client, 0.0) > time.monotonic() else self._fast
        lane.add(Job(request, index, FAST_MEMORY) for index in range(len(files)))
        try:
            return await request.future
        finally:
            self._fast.remove_request(request)
            self._slow.remove_request(request)

    def close(self) -> None:
        """Ends the processes. Images that wait are rejected."""
        self._watching.cancel()
        self._fast.close()
        self._slow.close()
        self._starter.shutdown(wait=False, cancel_futures=True)

    def _on_large(self, job: Job) -> None:
        self._slow.add([job])

    def _on_fast_limit(self, job: Job, stuck: bool) -> None:
        """Moves a job to the slow lane, and if it took too much CPU time also the waiting jobs of its client."""
        jobs = [job]
        if not stuck:
            jobs += self._fast.remove_client(job.request.client)
            if isinstance(job.request.client, str):
                self._remember_slow(job.request.client)
        self._slow.add(jobs)

    def _on_slow_limit(self, job: Job, stuck: bool) -> None:
        if stuck:
            message = "decoding the image took too long because the server has no CPU time left; send it again later"
        else:
            message = (
                f"decoding the image takes more than {self._max_decode_seconds:g} s of CPU time, the limit "
                "(--max-decode-seconds): send fewer pixels, or save it as a baseline JPEG or a plain PNG"
            )
        job.request.finish(job.index, ImageRejected(message, internal=stuck))

    def _remember_slow(self, client: str) -> None:
        self._slow_clients[client] = time.monotonic() + _SLOW_CLIENT_SECONDS
        self._slow_clients.move_to_end(client)
        if len(self._slow_clients) > _SLOW_CLIENTS:
            self._slow_clients.popitem(last=False)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            self._fast.watch()
            self._slow.watch()
