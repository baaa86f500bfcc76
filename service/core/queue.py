"""The queue of requests that wait for the engine, and how their images are put into batches.

Pure data: no threads, no locks, no clock, no event loop. The batcher calls it under its own lock.
"""

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
"""A batch of images, uint8 [n, 32, 32, 3]."""
Outputs = tuple[NDArray[np.float32], ...]
"""Arrays with one row per image, such as (logits, probabilities)."""


class Compute(Protocol):
    """Computes a batch."""

    def __call__(self, images: Images, /, *, alone: bool) -> Outputs:
        """The outputs for the images, in their order.

        Args:
            images: uint8 [n, 32, 32, 3].
            alone: Whether the batch may use all cores; otherwise it takes one.
        """


@dataclass(slots=True, eq=False)
class Request:
    """Images of one caller, with the progress of their computation.

    Attributes:
        images: uint8 [n, 32, 32, 3].
        compute: Called with batches that hold images of this request.
        deadline: Time, on the clock used for `Queue.take`, after which no image is computed; None for no deadline.
        queued_at: Time of arrival, on the same clock.
        started_at: When the engine began with its first image, on the same clock; 0.0 before.
        taken: Number of images already handed to the engine.
        finished: Number of images already computed.
        outputs: One row per image; complete when `finished` equals the number of images.
        dropped: Whether the caller no longer waits for the answer.
    """

    images: Images
    compute: Compute
    deadline: float | None
    queued_at: float
    started_at: float = 0.0
    taken: int = 0
    finished: int = 0
    outputs: Outputs | None = None
    dropped: bool = False

    @property
    def waiting(self) -> int:
        """Number of images not yet handed to the engine."""
        return len(self.images) - self.taken


@dataclass(slots=True, frozen=True)
class Piece:
    """Consecutive images of one request, as a part of a batch."""

    request: Request
    start: int
    stop: int

    @property
    def images(self) -> Images:
        """The images of this piece; a view."""
        return self.request.images[self.start : self.stop]


class Queue:
    """The waiting requests, which take turns.

    Each batch takes as many images as fit from the request at the front. A request with images left then goes to the
    back: small requests behind a large one pass between its pieces, and several large ones share the engine.

    Args:
        max_batch_size: Largest number of images in a batch.
    """

    def __init__(self, max_batch_size: int) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; it must be at least 1")
        self.max_batch_size = max_batch_size
        self.images = 0
        """Number of waiting images of all requests."""
        self._requests: collections.OrderedDict[Request, None] = collections.OrderedDict()

    def put(self, request: Request) -> None:
        """Adds a request at the back."""
        self._requests[request] = None
        self.images += request.waiting

    def drop(self, request: Request) -> int:
        """Removes a request; returns the number of its images that were not handed to the engine."""
        request.dropped = True
        if request not in self._requests:
            return 0
        del self._requests[request]
        self.images -= request.waiting
        return request.waiting

    def ready_at(self, max_delay: float) -> float | None:
        """When the next batch may be taken: 0.0 for now, a time if the batch may still fill, None if nothing waits."""
        if not self._requests:
            return None
        if max_delay <= 0 or self.images >= self.max_batch_size:
            return 0.0
        # Not always the first one: what is left of a large request goes to the back.
        return min(request.queued_at for request in self._requests) + max_delay

    def take(self, now: float, limit: int | None = None) -> list[Piece]:
        """The next batch: images of requests with the same `compute`, none past its deadline.

        Empty if every waiting request is past its deadline.

        Args:
            now: The time.
            limit: Largest number of images, if it is to be smaller than `max_batch_size`.
        """
        pieces: list[Piece] = []
        free = self.max_batch_size if limit is None else min(limit, self.max_batch_size)
        for request in self._requests:
            if request.deadline is not None and request.deadline <= now:
                continue  # the timer of the request removes it and informs its caller
            if pieces and request.compute != pieces[0].request.compute:
                continue
            count = min(free, request.waiting)
            pieces.append(Piece(request, request.taken, request.taken + count))
            free -= count
            if not free:
                break
        for piece in pieces:
            piece.request.taken = piece.stop
            self.images -= piece.stop - piece.start
            if piece.request.waiting:
                self._requests.move_to_end(piece.request)
            else:
                del self._requests[piece.request]
        return pieces


def count_images(pieces: Sequence[Piece]) -> int:
    """Number of images of all pieces."""
    return sum(piece.stop - piece.start for piece in pieces)


def compute_pieces(pieces: Sequence[Piece], *, alone: bool) -> Outputs:
    """The outputs of a batch that consists of these pieces."""
    parts = [piece.images for piece in pieces]
    return pieces[0].request.compute(parts[0] if len(parts) == 1 else np.concatenate(parts), alone=alone)


def hand_out(pieces: Sequence[Piece], outputs: Outputs) -> list[Request]:
    """Gives each request its rows of a computed batch; returns the requests that are now complete."""
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
