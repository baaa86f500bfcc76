"""The path of every request through the server, shared by all transports: admit, decode, compute.

Transports call only `Inference`. This module does not know the messages of any protocol.
"""

import asyncio
import time
from collections.abc import Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cifar_core.pixels import ImageLimits, ImageRejected
from service import tracing
from service.core.batcher import Admission, Batcher
from service.core.decoding import Decoded, Decoder
from service.core.engine import NOT_FINITE, rows_not_finite
from service.core.metrics import Metrics
from service.core.model_store import Model, ModelStore
from service.core.statistics import COMPUTE_INPUT, COMPUTE_OUTPUT, FAIL, SUCCESS, Recorder, Statistics
from service.errors import EngineFailed, InvalidRequest, Overloaded


@dataclass(frozen=True)
class Limits:
    """Limits on one request, and on all requests that the server holds.

    Attributes:
        image: Limits on one encoded image.
        max_images: Largest number of images in one request.
        max_message_bytes: Largest size of one request in bytes.
        max_queued_images: Largest number of images in all requests that the server holds.
    """

    image: ImageLimits
    max_images: int
    max_message_bytes: int
    max_queued_images: int


MAX_RANKED_CLASSES = 2**20
"""Classes with their names in one answer: 20 MB over gRPC and 60 MB over HTTP for names of usual length."""


@dataclass(frozen=True)
class Answer:
    """The outputs of a model, one row per image; float32 [n, classes] each.

    Attributes:
        model: The model.
        logits: Its logits.
        probabilities: Its probabilities.
        failed: Rows in which they are not finite, in ascending order; see service.core.engine.
    """

    model: Model
    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    failed: Sequence[int]

    def rejections(self) -> dict[int, ImageRejected]:
        """Why the rows of `failed` have no probabilities."""
        return {row: ImageRejected(NOT_FINITE, internal=True) for row in self.failed}

    def check_all(self) -> None:
        """Accepts the outputs if each image has finite probabilities: a tensor has no place for the error of one image.

        Raises:
            EngineFailed: An image has none.
        """
        if self.failed:
            raise EngineFailed(
                f"the model computes no finite probabilities for {len(self.failed)} of {len(self.logits)} images, "
                f"first for the one with index {self.failed[0]}: leave out such images"
            )


class Admitted:
    """A request from its admission to its answer: a `with` block. Space is reserved for it, and its time is measured.

    The statistics count it when the block ends: as a success if the engine computed images and no error was raised, as
    a failure if an error was raised, else not at all. Requests that break a rule are not counted.
    """

    __slots__ = ("_admission", "_started", "_token", "computed_at", "computing_at", "recorder")

    def __init__(self, admission: Admission, recorder: Recorder) -> None:
        self._admission = admission
        self.recorder = recorder  # of the version of the model that computes the images
        self._started = time.perf_counter()
        # When the images were ready to be computed, and when they were computed, on time.perf_counter().
        self.computing_at = self.computed_at = 0.0

    def __enter__(self) -> Self:
        self._token: Token[Admitted | None] = _admitted.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _admitted.reset(self._token)
        self._admission.release()
        if isinstance(error, InvalidRequest):
            return
        ended = time.perf_counter()
        recorder = self.recorder
        if error is not None:
            recorder.add(FAIL, ended - self._started)
        elif self.computed_at:
            recorder.add(COMPUTE_INPUT, self.computing_at - self._started)
            recorder.add(COMPUTE_OUTPUT, ended - self.computed_at)
            recorder.add(SUCCESS, ended - self._started)


# The request that the current task answers.
_admitted: ContextVar[Admitted | None] = ContextVar("admitted", default=None)


class Inference:
    """Classifies images. A request calls `admit`, then `decode` for image files, then `compute`."""

    def __init__(
        self, models: ModelStore, batcher: Batcher, decoder: Decoder, limits: Limits, metrics: Metrics
    ) -> None:
        self.limits = limits
        self._models, self._batcher, self._decoder, self._metrics = models, batcher, decoder, metrics

    @property
    def model(self) -> Model:
        """The model that is served now."""
        return self._models.current

    @property
    def max_queue_delay(self) -> float:
        """Seconds that an idle engine may wait for a batch to fill."""
        return self._batcher.max_queue_delay

    async def statistics(self) -> Statistics:
        """How requests to the current model spent their time, in all workers of the server."""
        # With several workers, their files are read, which takes a few milliseconds.
        return await asyncio.to_thread(self._metrics.statistics.read, self.model.number)

    def admit(self, images: int, size: int) -> Admitted:
        """Reserves space for a request until the end of a `with` block, which should build the answer too.

        The time in the block is the request's time in the statistics.

        Args:
            images: Number of images in the request.
            size: Size of the request in bytes.

        Raises:
            InvalidRequest: The request holds no images, or more than `max_images`.
            Overloaded: The server is full.
        """
        if not images:
            raise InvalidRequest("the request holds no images")
        if images > self.limits.max_images:
            raise InvalidRequest(
                f"the request holds {images} images; at most {self.limits.max_images} are allowed: "
                "split it into several requests"
            )
        try:
            return Admitted(self._batcher.admit(images, size), self._metrics.recorder)
        except Overloaded:
            self._metrics.recorder.add(FAIL, 0.0)
            raise

    async def decode(self, files: Sequence[bytes], client: str, deadline: float | None) -> list[Decoded]:
        """The pixels of image files, uint8 [32, 32, 3] each, or the reason why a file cannot be read; in order.

        Args:
            files: Contents of image files.
            client: Key of the client. Clients take turns, so that one with many large files does not delay the others.
            deadline: Time on time.monotonic() after which no file is decoded; None for no deadline.
        """
        trace = tracing.current()
        if trace is None or not files:
            return await self._decoder.decode(files, deadline, client)
        started = time.monotonic()
        try:
            return await self._decoder.decode(files, deadline, client)
        finally:
            trace.phase("decode", started, time.monotonic(), {"files": len(files)})

    async def compute(self, images: NDArray[np.uint8], deadline: float | None) -> Answer:
        """The outputs of the current model for images, uint8 [n, 32, 32, 3].

        Raises:
            DeadlineExpired: The deadline, on time.monotonic(), passed first.
            EngineFailed: The computation failed.
        """
        model, admitted = self.model, _admitted.get()
        if admitted is not None:
            admitted.recorder = self._metrics.recorder
            admitted.computing_at = time.perf_counter()
        logits, probabilities = await self._batcher.submit(images, model.engine.compute, deadline)
        if admitted is not None:
            admitted.computed_at = time.perf_counter()
        return Answer(model, logits, probabilities, rows_not_finite(probabilities))

    def check_ranked(self, images: int, top_k: int, alternative: str) -> None:
        """Refuses a request whose answer would name too many classes.

        Args:
            images: Number of images.
            top_k: Number of classes for each; 0 for all.
            alternative: What else the caller can do.

        Raises:
            InvalidRequest: It would name more than `MAX_RANKED_CLASSES`.
        """
        each = min(top_k or len(self.model.classes), len(self.model.classes))
        if images * each > MAX_RANKED_CLASSES:
            raise InvalidRequest(
                f"the answer would name {each:,} classes for each of {images:,} images; an answer names at most "
                f"{MAX_RANKED_CLASSES:,} in all: ask for fewer with top_k, or {alternative}"
            )

    def update_gauges(self) -> None:
        """Shows in the metrics how many images the server holds now."""
        self._metrics.waiting.set(self._batcher.waiting_images)
        self._metrics.admitted.set(self._batcher.admitted_images)

    def count_images(self, classified: int, rejected: int) -> None:
        """Records how many images of a request were classified and how many could not be read."""
        self._metrics.on_images(classified, rejected)
