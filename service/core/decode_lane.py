"""A lane: a queue of image files and the decode processes that work on it."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from cifar_core.pixels import IMAGE_SIZE, ImageLimits, ImageRejected
from service.core.decode_messages import NEEDED, Kind, ProcessLimits
from service.core.decode_process import DecodeProcess, discard_process, start_process
from service.core.fair_queue import DecodeRequest, FairQueue, Job
from service.errors import Overloaded

logger = logging.getLogger(__name__)

# For this long after a process exceeded a limit, processes get one file at a time, so that none waits behind an
# expensive one.
_CAUTIOUS_SECONDS = 2.0
_SENT_AHEAD_BYTES = 2**18
# If no process of a lane starts, the lane rejects its files instead of letting them wait.
_FAILED_STARTS = 3
_RETRY_SECONDS = 0.5
# A process that ends so soon after it was sent a file may have ended before it read the file.
_BEGUN_SECONDS = 0.05
_MAX_REPEATS = 3
# A process that was started on demand ends when it has had nothing to do for so long.
_IDLE_SECONDS = 10.0
_START_SECONDS = 15.0
_MAX_PAUSE_SECONDS = 5.0
_MAX_DOUBLINGS = 10  # 2.0**1024 is too large for a float


@dataclass(frozen=True)
class LaneOptions:
    """Options of a lane.

    Attributes:
        name: Name of the lane in the log.
        limits: Limits of a process for one file.
        processes: Number of processes.
        on_demand: Whether processes are started only when files wait.
        files_ahead: Largest number of files that are sent to a process at a time. More than one spares the process from
            waiting for the event loop after each file.
        max_seconds: Seconds of wall time after which a process that has not answered is killed. Far above the limit of
            CPU time, so that only a process that is stopped or gets no CPU reaches it.
        common_memory: Files with an estimated memory of up to this many bytes are decoded in all processes at the same
            time. Files that need more share the memory that one file may need.
    """

    name: str
    limits: ProcessLimits
    processes: int
    on_demand: bool
    files_ahead: int
    max_seconds: float
    common_memory: int


class Lane:
    """Sends files to processes, fairly, and replaces processes that end.

    Args:
        options: Options of this lane.
        image_limits: Limits on one image file.
        starter: Executor with a single thread, which starts the processes.
        on_large: Called with a job that needs more memory than `job.memory`, which is updated, or has too many pixels.
        on_limit: Called with a job whose process exceeded a limit: that of CPU time (False) or of wall time (True).
        on_ended: Called with "limit" or "crash" when a process that had started ends.
    """

    def __init__(
        self,
        options: LaneOptions,
        image_limits: ImageLimits,
        starter: Executor,
        on_large: Callable[[Job], None],
        on_limit: Callable[[Job, bool], None],
        on_ended: Callable[[str], None],
    ) -> None:
        self._options, self._image_limits, self._starter = options, image_limits, starter
        self._on_large, self._on_limit, self._on_ended = on_large, on_limit, on_ended
        self._queue, self._large = FairQueue(), FairQueue()
        self._large_was_last = False
        self._processes: list[DecodeProcess] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._task_of: dict[DecodeProcess, asyncio.Task[Any]] = {}
        self._failed_starts = 0
        self._last_ready = time.monotonic()
        self._cautious_until = 0.0
        if not options.on_demand:
            for _ in range(options.processes):
                self._start_process()

    @property
    def pids(self) -> list[int]:
        """Ids of the running processes."""
        return [process.pid for process in self._processes if process.pid is not None]

    @property
    def busy_processes(self) -> int:
        """Number of processes that have a file. Can be read in any thread."""
        return sum(bool(process.jobs) for process in self._processes)

    def add(self, jobs: Iterable[Job]) -> None:
        """Adds jobs to the queue."""
        for job in jobs:
            self._push(job)
        self._dispatch()

    def remove_request(self, request: DecodeRequest) -> None:
        """Removes all jobs of a request that nobody waits for any more."""
        self._queue.remove_request(request)
        self._large.remove_request(request)

    def remove_client(self, client: object) -> list[Job]:
        """Removes all jobs of a client from the queue and returns them."""
        return self._queue.remove_client(client)

    def watch(self) -> None:
        """Kills processes that have had a file for too long, or none for long. Call it regularly."""
        now = time.monotonic()
        for process in self._processes:
            patience = self._options.max_seconds if process.is_ready else _START_SECONDS
            if (process.jobs or not process.is_ready) and now - process.busy_since > patience:
                process.is_stuck = True
                process.kill()
        if self._options.on_demand:
            for process in list(self._processes):
                if process.is_ready and not process.jobs and now - process.busy_since > _IDLE_SECONDS:
                    process.is_ready = False  # it must not get a file before its task ends
                    self._tasks.remove(self._task_of[process])
                    self._task_of[process].cancel()
                    process.kill()
        self._dispatch()

    def close(self) -> None:
        """Kills the processes and rejects the waiting jobs."""
        for process in self._processes:
            process.kill()
        for task in self._tasks:
            task.cancel()
        self._reject_all("the server is shutting down: ask another, or retry")

    def _push(self, job: Job, *, first: bool = False) -> None:
        (self._large if job.memory > self._options.common_memory else self._queue).push(job, first=first)

    def _dispatch(self) -> None:
        if not any(process.is_ready for process in self._processes) and self._cannot_start:
            self._reject_all("no decode process can be started now, the server's log gives the reason: retry")
            return
        while process := self._free_process():
            job = self._next()
            if job is None:
                return
            process.send(job)
        if len(self._tasks) < self._options.processes and (self._queue.peek() or self._large.peek()):
            self._start_process()

    @property
    def _cannot_start(self) -> bool:
        # A lane without tasks has not tried: its processes start when they are needed.
        return bool(self._tasks) and (
            self._failed_starts >= _FAILED_STARTS or time.monotonic() - self._last_ready > _START_SECONDS
        )

    def _free_process(self) -> DecodeProcess | None:
        ahead = 1 if time.monotonic() < self._cautious_until else self._options.files_ahead
        free = [
            process
            for process in self._processes
            if process.is_ready
            and (not process.jobs or (len(process.jobs) < ahead and process.unanswered_bytes < _SENT_AHEAD_BYTES))
        ]
        return min(free, key=lambda process: len(process.jobs), default=None)

    def _next(self) -> Job | None:
        """The next job. Jobs that need much memory alternate with the others, and wait until memory is free."""
        large, common = self._large.peek(), self._queue.peek()
        if large and self._memory_in_use + large.memory > self._options.limits.max_memory:
            large = None
        if large and not (common and self._large_was_last):
            self._large_was_last = True
            return self._large.pop()
        self._large_was_last = False
        return self._queue.pop() if common else None

    @property
    def _memory_in_use(self) -> int:
        """Estimated memory of the running jobs that need much of it, in bytes."""
        jobs = (job for process in self._processes for job in process.jobs)
        return sum(job.memory for job in jobs if job.memory > self._options.common_memory)

    def _start_process(self) -> None:
        if not self._tasks:
            self._last_ready = time.monotonic()
        self._tasks.append(asyncio.get_running_loop().create_task(self._keep_process()))

    async def _keep_process(self) -> None:
        """Runs a process and replaces it whenever it ends, until cancelled."""
        while True:
            reason = await self._run_process()
            if reason is None:
                continue
            self._failed_starts += 1
            pause = min(0.1 * 2 ** min(self._failed_starts, _MAX_DOUBLINGS), _MAX_PAUSE_SECONDS)
            logger.error("a decode process cannot be started: %s; next try in %g s", reason, pause)
            self._dispatch()
            await asyncio.sleep(pause)

    async def _run_process(self) -> str | None:
        """Runs one process until it ends; returns the reason if it never became ready, otherwise None."""
        starting = self._starter.submit(start_process, self._options.limits, self._image_limits)
        try:
            started = await asyncio.wrap_future(starting)
        except (OSError, EOFError) as error:
            return str(error) or type(error).__name__
        except asyncio.CancelledError:
            starting.add_done_callback(discard_process)
            raise
        process = DecodeProcess(*started, self._starter, self._on_ready, self._on_reply)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 -- for the type checker: a coroutine always runs in a task here
        self._processes.append(process)
        self._task_of[process] = task
        try:
            code = await process.run()
        finally:
            self._processes.remove(process)
            del self._task_of[process]
        if not process.was_ready:
            return f"it ended with code {code} before it was ready"
        self._replace(process, code)
        return None

    def _on_ready(self) -> None:
        self._failed_starts = 0
        self._last_ready = time.monotonic()
        self._dispatch()

    def _on_reply(self, job: Job, kind: Kind, content: bytes) -> None:
        if kind is Kind.PIXELS:
            pixels = np.frombuffer(content, np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
            job.request.finish(job.index, pixels)
        elif kind is Kind.REJECTED:
            job.request.finish(job.index, ImageRejected(content.decode(errors="replace")))
        elif kind is Kind.LARGE:
            job.memory = min(max(job.memory, *NEEDED.unpack(content)), self._options.limits.max_memory)
            self._on_large(job)
        else:
            logger.error(
                "the decoder failed on an image of %d bytes:\n%s", len(job.data), content.decode(errors="replace")
            )
            job.request.finish(
                job.index, ImageRejected("the decoder failed on this image; the server's log says why", internal=True)
            )
        self._dispatch()

    def _replace(self, process: DecodeProcess, code: int | None) -> None:
        """Handles the jobs of a process that has ended: the first was being decoded, the others had not begun."""
        self._last_ready = time.monotonic()
        exceeded = process.is_stuck or code == -signal.SIGPROF
        self._on_ended("limit" if exceeded else "crash")
        logger.warning(
            "a decode process of the %s lane ended (%s) and is replaced",
            self._options.name,
            "no answer in time" if process.is_stuck else "CPU time of one image" if exceeded else f"code {code}",
        )
        job = process.jobs.popleft() if process.jobs else None
        if (
            job
            and not exceeded
            and job.repeats < _MAX_REPEATS
            and process.ended_at - process.busy_since < _BEGUN_SECONDS
        ):
            job.repeats += 1  # it was probably not the file that ended the process
            self._push(job, first=True)
            job = None
        for waiting in reversed(process.jobs):
            self._push(waiting, first=True)
        if exceeded:
            self._cautious_until = time.monotonic() + _CAUTIOUS_SECONDS
        if job and exceeded:
            self._on_limit(job, process.is_stuck)
        elif job:
            message = "the decode process ended while it decoded this image; the server's log gives the reason"
            job.request.finish(job.index, ImageRejected(message, internal=True))
        self._dispatch()

    def _reject_all(self, reason: str) -> None:
        for job in self._queue.remove_all() + self._large.remove_all():
            job.request.fail(Overloaded(reason, _RETRY_SECONDS))
