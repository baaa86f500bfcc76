"""The REST interface for image files: classification, and what is served."""

import base64
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_core.pixels import IMAGE_SIZE, ImageRejected
from service.core.decoding import Decoded
from service.core.inference import Answer as Outputs
from service.core.inference import Inference
from service.core.model_store import Model
from service.errors import InvalidRequest, quoted
from service.http.answers import Answer, Unreadable, json_answer
from service.http.bodies import File, files_of
from service.http.requests import Request

# A request names files in its answer; longer names are cut.
_MAX_NAME_CHARACTERS = 255


class Classifier:
    """Answers requests under /v1.

    Args:
        inference: Classifies the images.
        samples: Names of the pictures that come with the server.
    """

    def __init__(self, inference: Inference, samples: Sequence[str]) -> None:
        self._inference, self._samples = inference, list(samples)

    async def classify(self, request: Request) -> Answer:
        """The classes of the images in a request.

        Raises:
            InvalidRequest: A parameter or the body is wrong.
            Unreadable: No image can be read.
        """
        top_k, with_pixels = _top_k(request.query), _boolean(request.query, "pixels")
        limits = self._inference.limits
        files = files_of(request.body, request.headers.get("content-type", ""), limits.max_images)
        self._inference.check_ranked(len(files), top_k or 0, "send fewer images")
        size = len(request.body)
        request.body = b""  # the files hold it once more
        with self._inference.admit(len(files), size):
            contents = [file.content for file in files]
            decoded = await self._inference.decode(contents, request.client, request.deadline)
            readable = [image for image in decoded if not isinstance(image, ImageRejected)]
            outputs = await self._inference.compute(np.stack(readable), request.deadline) if readable else None
            results = _results(files, decoded, outputs, top_k, with_pixels)
        classified = sum("classes" in result for result in results)
        self._inference.count_images(classified, len(results) - classified)
        model = outputs.model if outputs else self._inference.model
        if outputs is None:
            raise Unreadable(f"none of the {len(files)} images can be read: see the error of each", results)
        seconds = time.monotonic() - request.arrived
        named = {"name": model.name, "version": model.version, "variant": model.variant}
        return json_answer({"model": named, "seconds": round(seconds, 6), "results": results})

    async def model(self, request: Request) -> Answer:
        """The model that is served, the limits, and the names of sample pictures."""
        del request
        return json_answer(self._description(self._inference.model))

    def _description(self, model: Model) -> dict[str, Any]:
        limits = self._inference.limits
        return {
            "name": model.name,
            "version": model.version,
            "variant": model.variant,
            "device": model.device,
            "classes": model.classes,
            "image_size": IMAGE_SIZE,
            "accuracy": model.test_accuracy,
            "limits": {
                "max_images": limits.max_images,
                "max_message_bytes": limits.max_message_bytes,
                "max_image_bytes": limits.image.max_bytes,
                "max_image_pixels": limits.image.max_pixels,
            },
            "samples": self._samples,
        }


def _top_k(query: Mapping[str, str]) -> int | None:
    text = query.get("top_k")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and int(text) > 0):
        raise InvalidRequest(f"top_k is {quoted(text)}; it must be a whole number of at least 1")
    return int(text)


def _boolean(query: Mapping[str, str], name: str) -> bool:
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise InvalidRequest(f"{name} is {quoted(text)}; it must be true or false")
    return text == "true"


def _results(
    files: Sequence[File], decoded: Sequence[Decoded], outputs: Outputs | None, top_k: int | None, with_pixels: bool
) -> list[dict[str, Any]]:
    """One result for each file, in their order."""
    rows = iter(_rows(outputs) if outputs else ())
    results = []
    for file, image in zip(files, decoded, strict=True):
        result: dict[str, Any] = {"file": file.name if file.name is None else file.name[:_MAX_NAME_CHARACTERS]}
        outcome = image if isinstance(image, ImageRejected) else next(rows)
        if isinstance(outcome, ImageRejected):
            result["error"] = {"code": "INTERNAL" if outcome.internal else "INVALID_ARGUMENT", "message": str(outcome)}
        else:
            assert outputs is not None and isinstance(image, np.ndarray)  # noqa: S101, PT018 -- for the type checker
            result["classes"] = _ranked(outcome, outputs.model.classes, top_k)
            if with_pixels:
                result["pixels"] = _base64(image)
        results.append(result)
    return results


def _rows(outputs: Outputs) -> list[list[float] | ImageRejected]:
    """For each image that was computed its probabilities, or why it has none."""
    rows: list[list[float] | ImageRejected] = outputs.probabilities.tolist()
    for row, rejection in outputs.rejections().items():
        rows[row] = rejection
    return rows


def _ranked(row: Sequence[float], classes: Sequence[str], top_k: int | None) -> list[dict[str, Any]]:
    """The classes by decreasing probability; if two are equal, the lower index comes first."""
    order = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:top_k]
    return [{"name": classes[index], "probability": row[index]} for index in order]


def _base64(image: NDArray[np.uint8]) -> str:
    return base64.b64encode(image.tobytes()).decode("ascii")
