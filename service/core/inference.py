"""What both protocols share: images, once they are arrays, are computed by the model that is served now.

Must never know a protocol's messages.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cifar_core.images import ImageLimits
from service.core.batcher import Admission, Batcher
from service.core.decoding import Decoder
from service.core.metrics import Metrics
from service.core.model_store import Model, ModelStore
from service.errors import InvalidRequest


@dataclass(frozen=True)
class Limits:
    """What one request may hold, and the server at once."""

    image: ImageLimits
    max_images: int
    max_message_bytes: int
    max_queued_images: int


@dataclass(frozen=True)
class Answer:
    """What a model computed, one row per image; float32 [n, classes]."""

    model: Model
    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]


class Inference:
    """The way of images through the server, in the order of the methods: admit, decode, compute."""

    def __init__(self, models: ModelStore, batcher: Batcher, decoder: Decoder, limits: Limits, metrics: Metrics) -> None:
        self.models, self.decoder, self.limits, self.metrics = models, decoder, limits, metrics
        self._batcher = batcher

    def admit(self, images: int, size: int) -> Admission:
        """Keeps room for a request's images, `size` bytes, for the length of a `with`.

        Raises:
            InvalidRequest: There is none, or there are more than a request may hold.
            Overloaded: The server holds as many as it may.
        """
        if not images:
            raise InvalidRequest("the request holds no images")
        if images > self.limits.max_images:
            raise InvalidRequest(
                f"the request holds {images} images; at most {self.limits.max_images} are allowed: send several"
            )
        return self._batcher.admit(images, size)

    async def compute(self, images: NDArray[np.uint8], deadline: float | None) -> Answer:
        """What one model, the one that is served now, makes of images, uint8 [n, 32, 32, 3].

        Raises:
            DeadlineExpired: The deadline, on time.monotonic(), passed first.
            EngineFailed: The computation failed.
        """
        model = self.models.current
        logits, probabilities = await self._batcher.submit(images, model.engine.compute, deadline)
        return Answer(model, logits, probabilities)
