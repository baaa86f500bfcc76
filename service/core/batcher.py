"""The queue between requests and the engine: batches, deadlines, cancellation, back-pressure.

Must never know gRPC nor ONNX: it is given arrays of images and a function that computes a batch of them. Requests come
from one event loop; batches are computed in threads of the batcher's own, each of which forms its next batch by itself
the moment the last one is done, so that no turn of the event loop lies between two batches.
"""

import asyncio
import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from service.errors import DeadlineExpired, EngineFailed, Overloaded

logger = logging.getLogger(__name__)

# A client cancels at its deadline, and the news can come a moment before what is left of it here has passed.
DEADLINE_SLACK = 0.05

Images = NDArray[np.uint8]
# Arrays with one row per image, such as (logits, probabilities).
Outputs = tuple[NDArray[np.float32], ...]
Compute = Callable[[Images], Outputs]


class Observer(Protocol):
    """Is told what happens to images, from the event loop's thread."""

    def on_batch(self, images: int, queued_seconds: Sequence[float], seconds: float, failed: bool) -> None:
        """A batch was computed. `queued_seconds`: how long each request begun by it had waited."""

    def on_rejected(self, images: int) -> None:
        """A request found no room."""

    def on_expired(self, images: int) -> None:
        """A request's deadline passed; so many of its images never reached the engine."""

    def on_cancelled(self, images: int) -> None:
        """A request was cancelled; likewise."""


@dataclass(slots=True, eq=False)
class Request:
    """Images that wait for one answer."""

    images: Images
    compute: Compute
    deadline: float | None  # of time.monotonic()
    queued_at: float
    future: "asyncio.Future[Outputs]"
    taken: int = 0  # images given to the engine so far
    finished: int = 0  # images that came back
    outputs: Outputs | None = None
    dropped: bool = False  # nobody waits for the answer any more

    @property
    def waiting(self) -> int:
        return len(self.images) - self.taken


@dataclass(slots=True, frozen=True)
class Piece:
    """Consecutive images of one request, as a part of a batch."""

    request: Request
    start: int
    stop: int


@dataclass(slots=True, frozen=True)
class Batch:
    """What is to be told of a batch that was computed, or failed."""

    images: int
    queued_seconds: list[float]
    seconds: float
    error: Exception | None
    parallel: int  # batches that were computed when this one began, itself among them


class Queue:
    """Requests in turn. Not safe for threads; tells no time by itself.

    Each batch takes what fits from the request in front; one with images left then goes to the back, so that those
    behind a large request pass between its pieces, and several large ones share the engine.
    """

    def __init__(self, max_batch_size: int) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; it must be at least 1")
        self.max_batch_size = max_batch_size
        self.images = 0  # waiting, of all requests
        self._requests: collections.OrderedDict[Request, None] = collections.OrderedDict()

    def put(self, request: Request) -> None:
        self._requests[request] = None
        self.images += request.waiting

    def drop(self, request: Request) -> int:
        """Takes a request out, wherever it stands; returns how many of its images the engine never saw."""
        request.dropped = True
        if request not in self._requests:
            return 0
        del self._requests[request]
        self.images -= request.waiting
        return request.waiting

    def ready_at(self, max_delay: float) -> float | None:
        """When a batch may be taken: 0 at once, a time if it may still fill, None if nothing waits."""
        if not self._requests:
            return None
        if max_delay <= 0 or self.images >= self.max_batch_size:
            return 0.0
        return next(iter(self._requests)).queued_at + max_delay

    def take(self, now: float) -> list[Piece]:
        """At most `max_batch_size` images, of requests with the same `compute`, none past its deadline."""
        pieces: list[Piece] = []
        room = self.max_batch_size
        for request in self._requests:
            if request.deadline is not None and request.deadline <= now:
                continue  # its timer takes it out and tells its caller
            if pieces and request.compute != pieces[0].request.compute:
                continue
            count = min(room, request.waiting)
            pieces.append(Piece(request, request.taken, request.taken + count))
            room -= count
            if not room:
                break
        for piece in pieces:
            piece.request.taken = piece.stop
            self.images -= piece.stop - piece.start
            if piece.request.waiting:
                self._requests.move_to_end(piece.request)
            else:
                del self._requests[piece.request]
        return pieces


class Admission:
    """Room for a request's images, given back at the end of the `with`."""

    __slots__ = ("_batcher", "_images", "_size")

    def __init__(self, batcher: "Batcher", images: int, size: int) -> None:
        self._batcher, self._images, self._size = batcher, images, size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batcher.admitted_images -= self._images
        self._batcher.admitted_bytes -= self._size


class Batcher:
    """Computes images in batches, for many requests at once.

    An idle engine takes what waits, without delay unless `max_queue_delay` says so. To be used from one event loop, and
    to be ended with `close`.

    Args:
        max_batch_size: Images given to `compute` at once.
        max_queue_delay: Seconds that an idle engine may wait for a batch to fill, counted from its oldest request.
        max_images: Images admitted at once, over all requests, from `admit` to the end of its `with`.
        max_bytes: Bytes of them, likewise.
        observer: Is told of every batch and of every request that got no answer.
        threads: Batches that are computed at once when there is a backlog; otherwise one is.
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
    ) -> None:
        self.max_images, self.max_bytes, self.max_queue_delay = max_images, max_bytes, max_queue_delay
        self.admitted_images = 0
        self.admitted_bytes = 0
        self._observer = observer
        self._queue = Queue(max_batch_size)
        self._changed = threading.Condition(threading.Lock())
        self._closing = False
        self._images_per_second = 1000.0  # a guess until the first batches; used for retry hints only
        self._loop = asyncio.get_running_loop()
        self._computing = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"engine-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting_images(self) -> int:
        """Images that wait for the engine; those being decoded or computed are not among them."""
        return self._queue.images

    @property
    def _backlog(self) -> bool:
        """Whether more waits than the next two batches: only then do several threads compute at once.

        One batch on all cores is sooner done than two on half of them each, and what comes in the meantime makes the
        next one larger. Where much waits anyway, threads that need not wait for one another get more done.
        """
        return self._queue.images >= 2 * self._queue.max_batch_size

    def admit(self, images: int, size: int) -> Admission:
        """Keeps room for the images of one request, `size` bytes in all: `with batcher.admit(…): …`.

        Raises:
            Overloaded: There is not that much room; `retry_after` guesses when there may be.
        """
        if self.admitted_images + images > self.max_images or self.admitted_bytes + size > self.max_bytes:
            self._observer.on_rejected(images)
            retry_after = min(5.0, max(0.02, self.admitted_images / self._images_per_second / 2))
            held = f"{self.admitted_images} images ({self.admitted_bytes} bytes)"
            raise Overloaded(
                f"the server holds {held}, of at most {self.max_images} ({self.max_bytes} bytes): "
                f"ask again in {retry_after * 1000:.0f} ms",
                retry_after,
            )
        self.admitted_images += images
        self.admitted_bytes += size
        return Admission(self, images, size)

    async def submit(self, images: Images, compute: Compute, deadline: float | None = None) -> Outputs:
        """The outputs of `compute` for the images, in their order.

        Args:
            images: uint8 [n, …], n at least 1; not to be changed until the answer.
            compute: Called in one of the engine's threads with at most `max_batch_size` images, perhaps of several
                requests.
            deadline: On time.monotonic(). Past it no more images are computed and the caller is told at once.

        Raises:
            DeadlineExpired: The deadline passed first.
            EngineFailed: `compute` raised for a batch that held some of these images.
        """
        if not len(images):
            raise ValueError("no images")
        request = Request(images, compute, deadline, time.monotonic(), self._loop.create_future())
        timer = None
        if deadline is not None:  # the loop's clock is time.monotonic()
            timer = self._loop.call_at(deadline, self._expire, request)
        with self._changed:
            self._queue.put(request)
            if not self._computing or self._backlog:
                self._changed.notify()
        try:
            return await request.future
        except asyncio.CancelledError:
            if _expired(request.future):  # and counted, in the moment before the caller went
                raise
            unseen = self._drop(request)
            if deadline is not None and time.monotonic() >= deadline - DEADLINE_SLACK:
                self._observer.on_expired(unseen)
            else:
                self._observer.on_cancelled(unseen)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    async def close(self) -> None:
        """Ends the engine's threads after what is queued has been computed."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            await self._loop.run_in_executor(None, thread.join)

    def _expire(self, request: Request) -> None:
        if request.future.done():
            return
        unseen = self._drop(request)
        self._observer.on_expired(unseen)
        request.future.set_exception(
            DeadlineExpired(f"the deadline passed with {unseen} of {len(request.images)} images still waiting")
        )

    def _drop(self, request: Request) -> int:
        with self._changed:
            return self._queue.drop(request)

    # In the engine's threads

    def _work(self) -> None:
        pieces = self._next()
        while pieces:
            parallel, started = self._computing, time.monotonic()
            queued = [started - piece.request.queued_at for piece in pieces if piece.start == 0]
            outputs: Outputs = ()
            error: Exception | None = None
            try:
                outputs = compute_pieces(pieces)
            except Exception as raised:  # whatever it is, it is these requests' answer; the next batch has its turn
                logger.exception("a batch of %d images failed", count_images(pieces))
                error = raised
            batch = Batch(count_images(pieces), queued, time.monotonic() - started, error, parallel)
            # What is not the engine's business is done by the loop, while the next batch is computed.
            self._loop.call_soon_threadsafe(self._settle, pieces, outputs, batch)
            pieces = self._next(finished=1)

    def _next(self, finished: int = 0) -> list[Piece]:
        """Waits for the next batch; empty when closed.

        Args:
            finished: Batches that the thread has computed since it asked last. Between them and the next nobody sees an
                idle engine, which would wake another thread for what this one is about to take.
        """
        with self._changed:
            self._computing -= finished
            while True:
                ready_at = 0.0 if self._closing else self._queue.ready_at(self.max_queue_delay)
                now = time.monotonic()
                if self._computing and not self._backlog and not self._closing:
                    ready_at = None  # the thread that computes will come for it
                if ready_at is not None and ready_at <= now and (pieces := self._queue.take(now)):
                    self._computing += 1
                    if self._backlog:
                        self._changed.notify()  # there is something for another thread too
                    return pieces
                if self._closing:
                    return []
                # Expired requests alone give no batch: wait for their timers, or for others to come.
                self._changed.wait(ready_at - now if ready_at is not None and ready_at > now else None)

    # In the event loop

    def _settle(self, pieces: list[Piece], outputs: Outputs, batch: Batch) -> None:
        speed = batch.parallel * batch.images / max(batch.seconds, 1e-6)
        self._images_per_second += 0.1 * (speed - self._images_per_second)
        self._observer.on_batch(batch.images, batch.queued_seconds, batch.seconds, batch.error is not None)
        if batch.error is None:
            for request in hand_out(pieces, outputs):
                if request.outputs is not None and not request.future.done():
                    request.future.set_result(request.outputs)
            return
        for request in (piece.request for piece in pieces):
            if not request.future.done():
                self._drop(request)
                failure = EngineFailed("the computation of a batch with these images failed; the server's log says why")
                failure.__cause__ = batch.error
                request.future.set_exception(failure)


def _expired(future: "asyncio.Future[Outputs]") -> bool:
    return future.done() and not future.cancelled() and isinstance(future.exception(), DeadlineExpired)


def count_images(pieces: Sequence[Piece]) -> int:
    """Images of all pieces."""
    return sum(piece.stop - piece.start for piece in pieces)


def compute_pieces(pieces: Sequence[Piece]) -> Outputs:
    """Computes a batch."""
    parts = [piece.request.images[piece.start : piece.stop] for piece in pieces]
    return pieces[0].request.compute(parts[0] if len(parts) == 1 else np.concatenate(parts))


def hand_out(pieces: Sequence[Piece], outputs: Outputs) -> list[Request]:
    """Gives each request its rows of a batch; returns the requests that are complete now. Not safe for threads."""
    complete = []
    row = 0
    for piece in pieces:
        request, count = piece.request, piece.stop - piece.start
        rows = tuple(output[row : row + count] for output in outputs)
        row += count
        if count == len(request.images):
            request.outputs = rows
        else:
            if request.outputs is None:
                request.outputs = tuple(np.empty((len(request.images), *part.shape[1:]), part.dtype) for part in rows)
            for whole, new in zip(request.outputs, rows, strict=True):
                whole[piece.start : piece.stop] = new
        request.finished += count
        if request.finished == len(request.images) and not request.dropped:
            complete.append(request)
    return complete
