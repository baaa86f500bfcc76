"""What a call returns: classifications, tables of probabilities, and the error of a call that failed as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from service.generated.cifar.v1 import image_classifier_pb2 as messages


@dataclass(frozen=True)
class RankedClass:
    """A class, with the probability that the image shows it.

    Attributes:
        name: Name of the class.
        index: Index of the class in the outputs of the model, from 0.
        probability: Probability of the class, from 0 to 1.
    """

    name: str
    index: int
    probability: float


@dataclass(frozen=True)
class Classification:
    """The answer for one image.

    Attributes:
        classes: The classes, the most probable first; empty if there is an error.
        error: Why the image could not be classified; None if it could.
        model_version: Version of the model that answered.
    """

    classes: tuple[RankedClass, ...]
    error: str | None
    model_version: str

    @property
    def best(self) -> RankedClass:
        """The most probable class.

        Raises:
            ValueError: The image was not classified.
        """
        if self.error is not None:
            raise ValueError(f"the image was not classified: {self.error}")
        return self.classes[0]


class ClassificationError(Exception):
    """A call failed as a whole.

    Attributes:
        code: The gRPC status code.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code


@dataclass(frozen=True)
class Results:
    """The server's results for some images of a call, in the order of the images."""

    rows: Sequence[messages.ImageResult]
    model_version: str


def classifications(results: Results, top_k: int) -> list[Classification]:
    """One answer per image, with at most `top_k` classes each; 0 for all."""
    # A shared request asks for the most classes that any of its calls wants.
    return [
        Classification(
            tuple(
                RankedClass(ranked.name, ranked.index, ranked.probability) for ranked in result.classes[: top_k or None]
            ),
            result.error.message if result.HasField("error") else None,
            results.model_version,
        )
        for result in results.rows
    ]


def probability_table(parts: Sequence[Results]) -> NDArray[np.float32]:
    """Probabilities, float32 [images, classes], in the model's order of classes.

    Raises:
        ClassificationError: An image was not classified.
    """
    rows = [row for part in parts for row in part.rows]
    if not rows:
        return np.empty((0, 0), np.float32)
    table = np.zeros((len(rows), len(rows[0].classes)), np.float32)
    for values, row in zip(table, rows, strict=True):
        if row.HasField("error"):
            raise ClassificationError(grpc.StatusCode.INTERNAL, row.error.message)
        for ranked in row.classes:
            values[ranked.index] = ranked.probability
    return table
