"""Computes the images of many requests in batches: threads, deadlines, cancellation, admission.

Knows neither gRPC nor ONNX: it receives arrays of images and a function that computes a batch. Requests come from one
event loop. Batches are computed in threads of the batcher; a thread takes its next batch itself as soon as one is
done, so that the event loop is not involved between two batches.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from service import tracing
from service.core.queue import Compute, Images, Outputs, Piece, Queue, Request, compute_pieces, count_images, hand_out
from service.errors import DeadlineExpired, EngineFailed, Overloaded

logger = logging.getLogger(__name__)

# From this number of waiting images on, several batches are computed at once, each on one core: then a core that also
# reads requests and writes answers does not delay the other cores after every layer. Fewer images are computed in one
# batch on all cores, which answers them sooner.
MIN_PARALLEL_IMAGES = 32
# The same number while decode processes use the cores as well. A batch on all cores would wait for them at each layer.
MIN_PARALLEL_WHILE_DECODING = 8


class Observer(Protocol):
    """Is notified of batches and of requests without an answer. Called in the event loop's thread."""

    def on_batch(self, images: int, queued_seconds: Sequence[float], seconds: float, failed: bool) -> None:
        """A batch was computed. `queued_seconds`: how long each request waited whose first images it holds."""

    def on_rejected(self, images: int) -> None:
        """A request was not admitted."""

    def on_dropped(self, images: int) -> None:
        """A request was cancelled or its deadline passed. `images`: how many of its images were not computed."""


@dataclass(slots=True, eq=False)
class _Submitted(Request):
    future: "asyncio.Future[Outputs]" = field(kw_only=True)


@dataclass(slots=True, frozen=True)
class _Computed:
    """Measurements of a batch that was computed or failed."""

    images: int
    queued_seconds: list[float]
    seconds: float
    error: Exception | None
    parallel: int  # number of batches that were being computed when this one began, including this one


class Admission:
    """Space reserved for a request, released at the end of the `with` block."""

    __slots__ = ("_batcher", "_images", "_size")

    def __init__(self, batcher: "Batcher", images: int, size: int) -> None:
        self._batcher, self._images, self._size = batcher, images, size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Gives the space back; call it once, or use a `with` block."""
        self._batcher.admitted_images -= self._images
        self._batcher.admitted_bytes -= self._size


class Batcher:
    """Computes images in batches, for many requests at once.

    An idle engine takes the waiting images at once, up to the size of a batch, or shares them among several threads if
    there are at least `MIN_PARALLEL_IMAGES` for each, or `MIN_PARALLEL_WHILE_DECODING` while others use the cores. Only
    if `max_queue_delay` is set does it wait for a batch to fill. Use the batcher from one event loop, and call `close`
    at the end.

    Args:
        max_batch_size: Largest number of images given to `compute` at once.
        max_queue_delay: Seconds that an idle engine may wait for a batch to fill, counted from its oldest request.
        max_images: Largest number of images in all admitted requests. A request is admitted from `admit` to the end of
            its `with` block.
        max_bytes: Largest number of bytes of all admitted requests.
        observer: Is notified of every batch and of every request that gets no answer.
        threads: Largest number of batches computed at the same time.
        busy_cores: Returns how many cores other parts of the server use now; called in any thread. If they leave at
            most one of `threads`, each batch is computed on one core.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_images: int,
        max_bytes: int,
        observer: Observer,
        max_queue_delay: float = 0.0,
        threads: int = 1,
        busy_cores: Callable[[], int] = lambda: 0,
    ) -> None:
        self.max_images, self.max_bytes, self.max_queue_delay = max_images, max_bytes, max_queue_delay
        self.admitted_images = 0
        self.admitted_bytes = 0
        self._observer = observer
        self._queue = Queue(max_batch_size)
        self._busy_cores = busy_cores
        self._changed = threading.Condition(threading.Lock())
        self._closing = False
        self._images_per_second = 1000.0  # a guess until the first batches; used for retry hints only
        self._loop = asyncio.get_running_loop()
        self._running: dict[int, float] = {}  # when each running batch began, by number of the thread
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"engine-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting_images(self) -> int:
        """Number of images that wait for the engine; those being decoded or computed are not counted."""
        return self._queue.images

    def running_seconds(self) -> float:
        """How long the oldest running batch has been computing, in seconds; 0.0 if none runs."""
        return time.monotonic() - min(self._running.copy().values(), default=time.monotonic())

    def admit(self, images: int, size: int) -> Admission:
        """Reserves space for one request of `size` bytes: `with batcher.admit(…): …`.

        Raises:
            Overloaded: There is not enough space; `retry_after` estimates when there will be.
        """
        if self.admitted_images + images > self.max_images or self.admitted_bytes + size > self.max_bytes:
            self._observer.on_rejected(images)
            retry_after = min(5.0, max(0.02, self.admitted_images / self._images_per_second / 2))
            raise Overloaded(
                f"the server holds {self.admitted_images} images ({self.admitted_bytes} bytes) and may hold "
                f"{self.max_images} ({self.max_bytes} bytes): retry in {retry_after * 1000:.0f} ms",
                retry_after,
            )
        self.admitted_images += images
        self.admitted_bytes += size
        return Admission(self, images, size)

    async def submit(self, images: Images, compute: Compute, deadline: float | None = None) -> Outputs:
        """The outputs of `compute` for the images, in their order.

        Args:
            images: uint8 [n, 32, 32, 3], n at least 1; must not change before this method returns.
            compute: Called in a thread of the engine with at most `max_batch_size` images, possibly of several
                requests.
            deadline: Time on time.monotonic() at which the call fails and after which none of its images is computed.

        Raises:
            DeadlineExpired: The deadline passed first.
            EngineFailed: `compute` raised for a batch that held some of these images.
        """
        if not len(images):
            raise ValueError("no images")
        request = _Submitted(images, compute, deadline, time.monotonic(), future=self._loop.create_future())
        timer = None
        if deadline is not None:  # the loop's clock is time.monotonic()
            timer = self._loop.call_at(deadline, self._expire, request)
        with self._changed:
            self._queue.put(request)
            if not self._running or self._is_enough_for_another:
                self._changed.notify()
        try:
            return await request.future
        except asyncio.CancelledError:
            if request.future.cancelled():  # otherwise its deadline passed, or it was computed, a moment before
                self._observer.on_dropped(self._drop(request))
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if (trace := tracing.current()) is not None:
                _add_phases(trace, request)

    async def close(self, timeout: float = 60.0) -> bool:
        """Ends the threads after the queued images have been computed; False if they still run after `timeout` s."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        end = time.monotonic() + timeout
        for thread in self._threads:
            await self._loop.run_in_executor(None, thread.join, max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _expire(self, request: _Submitted) -> None:
        if request.future.done():
            return
        unseen = self._drop(request)
        self._observer.on_dropped(unseen)
        request.future.set_exception(
            DeadlineExpired(f"the deadline passed with {unseen} of {len(request.images)} images still waiting")
        )

    def _drop(self, request: _Submitted) -> int:
        with self._changed:
            return self._queue.drop(request)

    # In the threads of the engine

    def _work(self, number: int) -> None:
        while batch := self._next(number):
            pieces, parallel = batch
            started = self._running[number]
            for piece in pieces:
                if piece.start == 0:
                    piece.request.started_at = started
            queued = [started - piece.request.queued_at for piece in pieces if piece.start == 0]
            outputs: Outputs = ()
            error: Exception | None = None
            try:
                outputs = compute_pieces(pieces, alone=parallel == 1 and not self._cores_are_shared)
            except Exception as raised:  # any error fails these requests only; the next batch is computed
                logger.exception("a batch of %d images failed", count_images(pieces))
                error = raised
            computed = _Computed(count_images(pieces), queued, time.monotonic() - started, error, parallel)
            # The rest is done by the event loop while this thread computes the next batch.
            self._loop.call_soon_threadsafe(self._settle, pieces, outputs, computed)

    def _next(self, number: int) -> tuple[list[Piece], int] | None:
        """Waits for the next batch of a thread that has finished its last one; None when the batcher is closed.

        Returns:
            The batch, and the number of batches that run now, including this one and the next if it starts at once.
        """
        with self._changed:
            self._running.pop(number, None)
            while True:
                ready_at = 0.0 if self._closing else self._queue.ready_at(self.max_queue_delay)
                now = time.monotonic()
                if self._running and not self._is_enough_for_another and not self._closing:
                    ready_at = None  # the thread that is computing will take it
                if ready_at is not None and ready_at <= now and (pieces := self._queue.take(now, self._share())):
                    self._running[number] = now
                    another = self._is_enough_for_another
                    if another:
                        self._changed.notify()
                    starts_at_once = another and (self._queue.ready_at(self.max_queue_delay) or 0.0) <= now
                    return pieces, len(self._running) + starts_at_once
                if self._closing:
                    return None
                # If only expired requests wait, their timers will remove them.
                self._changed.wait(ready_at - now if ready_at is not None and ready_at > now else None)

    @property
    def _is_enough_for_another(self) -> bool:
        """Whether another batch is worth computing beside those that run, and a thread is free for it."""
        return self._queue.images >= self._min_parallel_images() and len(self._running) < len(self._threads)

    @property
    def _cores_are_shared(self) -> bool:
        return self._busy_cores() >= max(1, len(self._threads) - 1)

    def _min_parallel_images(self) -> int:
        images = MIN_PARALLEL_WHILE_DECODING if self._cores_are_shared else MIN_PARALLEL_IMAGES
        return min(images, self._queue.max_batch_size)

    def _share(self) -> int:
        """How many of the waiting images the next batch takes, so that it and those beside it get equal numbers."""
        free = len(self._threads) - len(self._running)
        batches = max(1, min(free, self._queue.images // self._min_parallel_images()))
        return -(-self._queue.images // batches)

    # In the event loop

    def _settle(self, pieces: list[Piece], outputs: Outputs, computed: _Computed) -> None:
        speed = computed.parallel * computed.images / max(computed.seconds, 1e-6)
        self._images_per_second += 0.1 * (speed - self._images_per_second)
        self._observer.on_batch(computed.images, computed.queued_seconds, computed.seconds, computed.error is not None)
        if computed.error is None:
            for request in hand_out(pieces, outputs):
                if isinstance(request, _Submitted) and request.outputs is not None and not request.future.done():
                    request.future.set_result(request.outputs)
            return
        for request in (piece.request for piece in pieces):
            if isinstance(request, _Submitted) and not request.future.done():
                self._drop(request)
                failure = EngineFailed("the computation of a batch with these images failed; see the server's log")
                failure.__cause__ = computed.error
                request.future.set_exception(failure)


def _add_phases(trace: tracing.Trace, request: Request) -> None:
    """Adds the spans of a request that is over. One that was dropped while it waited has not reached the engine."""
    ended, images = time.monotonic(), {"images": len(request.images)}
    trace.phase("queue", request.queued_at, request.started_at or ended, images)
    if request.started_at:
        trace.phase("engine", request.started_at, ended, images)
