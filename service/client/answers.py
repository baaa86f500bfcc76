"""What a call returns: classifications, tables of probabilities, and the error of a call that failed as a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grpc
import numpy as np
from numpy.typing import NDArray

from service.generated.cifar.v1 import image_classifier_pb2 as messages

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


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


class ImageError(NamedTuple):
    """Why an image could not be classified.

    Attributes:
        message: What is wrong with it.
        code: The gRPC status code of the error: INVALID_ARGUMENT if the file is at fault.
    """

    message: str
    code: grpc.StatusCode

    @classmethod
    def of(cls, error: messages.ImageError) -> "ImageError":
        """The error in a response."""
        return cls(error.message, _CODES.get(error.code, grpc.StatusCode.UNKNOWN))


@dataclass(frozen=True, slots=True)
class Results:
    """The server's results for some images of a call, in the order of the images.

    Attributes:
        probabilities: float32 [images, classes]; may be read-only. The rows of images with errors mean nothing.
        classes: Names of the classes.
        errors: Why an image could not be classified, by its index.
        model_version: Version of the model that answered.
    """

    probabilities: NDArray[np.float32]
    classes: Sequence[str]
    errors: Mapping[int, ImageError]
    model_version: str

    @classmethod
    def of(cls, response: messages.ClassifyResponse, images: int) -> "Results":
        """The results in a response.

        Raises:
            ValueError: The response does not hold one result per image.
        """
        if response.HasField("table"):
            results = cls._of_table(response.table, images, response.model_version)
        else:  # from a server that does not know tables yet
            results = cls._of_ranked(response.results, images, response.model_version)
        if not results.classes and len(results.errors) < images:
            raise ValueError(f"the server sent neither classes nor errors for some of {images} images")
        return results

    @classmethod
    def _of_table(cls, table: messages.ProbabilityTable, images: int, model_version: str) -> "Results":
        classes, values = list(table.classes), table.probabilities
        if len(values) != 4 * images * len(classes):
            raise ValueError(
                f"the server sent a table of {len(values)} bytes for {images} images and {len(classes)} classes"
            )
        probabilities = np.frombuffer(values, "<f4").reshape(images, len(classes))
        errors = {index: ImageError.of(error) for index, error in table.errors.items()}
        if any(index >= images for index in errors):
            raise ValueError(f"the server sent an error for image {max(errors)}, but there are only {images}")
        return cls(probabilities, classes, errors, model_version)

    @classmethod
    def _of_ranked(cls, results: Sequence[messages.ImageResult], images: int, model_version: str) -> "Results":
        if len(results) != images:
            raise ValueError(f"the server sent {len(results)} results for {images} images")
        names = {ranked.index: ranked.name for result in results for ranked in result.classes}
        if sorted(names) != list(range(len(names))):
            raise ValueError("the server's results lack classes")
        probabilities = np.zeros((images, len(names)), np.float32)
        for row, result in zip(probabilities, results, strict=True):
            for ranked in result.classes:
                row[ranked.index] = ranked.probability
        errors = {
            index: ImageError.of(result.error) for index, result in enumerate(results) if result.HasField("error")
        }
        return cls(probabilities, [names[index] for index in range(len(names))], errors, model_version)

    @classmethod
    def of_error(cls, error: str, classes: Sequence[str], model_version: str) -> "Results":
        """The results for one image that was not sent, because of an error."""
        errors = {0: ImageError(error, grpc.StatusCode.INVALID_ARGUMENT)}
        return cls(np.zeros((1, len(classes)), np.float32), classes, errors, model_version)

    def part(self, start: int, end: int) -> "Results":
        """The results of the images from `start` to before `end`."""
        errors = self.errors
        if errors:
            errors = {index - start: error for index, error in errors.items() if start <= index < end}
        return Results(self.probabilities[start:end], self.classes, errors, self.model_version)


def classifications(results: Results, top_k: int) -> list[Classification]:
    """One answer per image, with at most `top_k` classes each; 0 for all.

    If the probabilities of two classes are equal, the lower index comes first.
    """
    answers = []
    for index, row in enumerate(results.probabilities.tolist()):
        error = results.errors.get(index)
        order = sorted(range(len(row)), key=row.__getitem__, reverse=True)[: top_k or None] if error is None else ()
        ranked = tuple(RankedClass(results.classes[number], number, row[number]) for number in order)
        answers.append(Classification(ranked, error.message if error else None, results.model_version))
    return answers


def probability_table(parts: Sequence[Results], classes: int = 0) -> NDArray[np.float32]:
    """Probabilities, float32 [images, classes], in the model's order of classes.

    Args:
        parts: The results of a call, in order.
        classes: Number of classes of the table if there are no parts.

    Raises:
        ClassificationError: An image was not classified, whose code is that of its error; or the parts are of models
            with different classes.
    """
    first = 0
    for part in parts:
        for index, error in part.errors.items():
            raise ClassificationError(error.code, f"the image with index {first + index}: {error.message}")
        first += len(part.probabilities)
    if not parts:
        return np.empty((0, classes), np.float32)
    if len(parts) == 1:
        return parts[0].probabilities.astype(np.float32)  # a copy that can be changed
    if any(list(part.classes) != list(parts[0].classes) for part in parts[1:]):
        raise ClassificationError(
            grpc.StatusCode.ABORTED,
            "the server's model was replaced during the call by one with other classes: repeat it",
        )
    return np.concatenate([part.probabilities for part in parts], dtype=np.float32)
