"""The path of every request through the server, shared by all transports: admit, decode, compute.

Transports call only `Inference`. This module does not know the messages of any protocol.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cifar_core.images import ImageLimits
from service.core.batcher import Admission, Batcher
from service.core.decoding import Decoded, Decoder
from service.core.metrics import Metrics, Statistics
from service.core.model_store import Model, ModelStore
from service.errors import InvalidRequest


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


@dataclass(frozen=True)
class Answer:
    """The outputs of a model, one row per image; float32 [n, classes] each."""

    model: Model
    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]


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

    @property
    def statistics(self) -> Statistics:
        """How requests to the current model spent their time, in this process."""
        return self._metrics.statistics

    def admit(self, images: int, size: int) -> Admission:
        """Reserves space for a request until the end of a `with` block.

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
        return self._batcher.admit(images, size)

    async def decode(self, files: Sequence[bytes], client: str, deadline: float | None) -> list[Decoded]:
        """The pixels of image files, uint8 [32, 32, 3] each, or the reason why a file cannot be read; in order.

        Args:
            files: Contents of image files.
            client: Key of the client. Clients take turns, so that one with many large files does not delay the others.
            deadline: Time on time.monotonic() after which no file is decoded; None for no deadline.
        """
        return await self._decoder.decode(files, deadline, client)

    async def compute(self, images: NDArray[np.uint8], deadline: float | None) -> Answer:
        """The outputs of the current model for images, uint8 [n, 32, 32, 3].

        Raises:
            DeadlineExpired: The deadline, on time.monotonic(), passed first.
            EngineFailed: The computation failed.
        """
        model = self.model
        logits, probabilities = await self._batcher.submit(images, model.engine.compute, deadline)
        return Answer(model, logits, probabilities)

    def update_gauges(self) -> None:
        """Shows in the metrics how many images the server holds now."""
        self._metrics.waiting.set(self._batcher.waiting_images)
        self._metrics.admitted.set(self._batcher.admitted_images)

    def count_images(self, classified: int, rejected: int) -> None:
        """Records how many images of a request were classified and how many could not be read."""
        self._metrics.on_images(classified, rejected)
