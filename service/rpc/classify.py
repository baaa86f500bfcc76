"""Servicer of cifar.v1.ImageClassifier: translates its messages to and from `Inference`."""

from collections.abc import Mapping, Sequence

import grpc
import numpy as np
from numpy.typing import NDArray

from cifar_core.pixels import IMAGE_SIZE, ImageRejected, packed_images, raw_image
from service.core.decoding import Decoded
from service.core.inference import Inference
from service.core.tensors import MAX_ID_CHARACTERS
from service.errors import InvalidRequest
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.rpc import ranked
from service.rpc.calls import Call
from service.rpc.statuses import Failure
from service.rpc.wire import FieldCounter

SERVICE = messages.DESCRIPTOR.services_by_name["ImageClassifier"].full_name
CLASSIFY_STREAM = f"{SERVICE}/ClassifyStream"

# The name of the field of an image that is set, and its value.
_Content = tuple[str | None, bytes]


def field_counter(max_images: int) -> FieldCounter:
    """The limit on the number of fields of a ClassifyRequest: an image needs two, its own and its content's."""
    return FieldCounter(messages.ClassifyRequest, 4 * max_images + 64)


class ImageClassifier:
    """See protos/cifar/v1/image_classifier.proto."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def Classify(  # noqa: N802 -- the protocol's name, as below
        self, request: messages.ClassifyRequest, call: Call
    ) -> messages.ClassifyResponse:
        """Classifies the images of one request."""
        if len(request.request_id) > MAX_ID_CHARACTERS:
            raise InvalidRequest(
                f"request_id has {len(request.request_id)} characters; at most {MAX_ID_CHARACTERS} are allowed"
            )
        request_id, top_k, as_table = request.request_id, request.top_k, request.as_table
        packed = _packed(request.packed_rgb)
        if not as_table:
            self._inference.check_ranked(len(request.images) + len(packed), top_k, "for a table with as_table")
        with self._inference.admit(len(request.images) + len(packed), call.message_bytes):
            contents = [_content(image) for image in request.images]
            del request  # it holds all images once more
            decoded = await self._decode(contents, call)
            readable = [image for image in decoded if not isinstance(image, ImageRejected)]
            parts = [np.stack(readable)] if readable else []
            if len(packed):
                parts.append(packed)
            rejected = {index: _error(image) for index, image in enumerate(decoded) if isinstance(image, ImageRejected)}
            if parts:
                images = parts[0] if len(parts) == 1 else np.concatenate(parts)
                answer = await self._inference.compute(images, call.deadline)
                model, probabilities = answer.model, answer.probabilities
                if answer.failed:
                    computed = [index for index in range(len(decoded) + len(packed)) if index not in rejected]
                    rejected |= {computed[row]: _error(reason) for row, reason in answer.rejections().items()}
                    probabilities = np.delete(probabilities, answer.failed, axis=0)
            else:
                model = self._inference.model
                probabilities = np.empty((0, len(model.classes)), np.float32)
            self._inference.count_images(len(probabilities), len(rejected))
            if as_table:
                response = messages.ClassifyResponse(table=_table(probabilities, model.classes, rejected))
            else:
                response = ranked.results(probabilities, model.classes, top_k, rejected)
            response.request_id, response.model_version = request_id, model.version
        return response

    async def ClassifyStream(  # noqa: N802
        self, request: messages.ClassifyRequest, call: Call
    ) -> messages.ClassifyResponse:
        """Answers one request of a stream; service.rpc.streams reads and writes the stream."""
        return await self.Classify(request, call)

    async def GetModel(  # noqa: N802
        self, request: messages.GetModelRequest, call: Call
    ) -> messages.GetModelResponse:
        """The model that is served, and the limits."""
        del request, call
        model, limits = self._inference.model, self._inference.limits
        return messages.GetModelResponse(
            name=model.name,
            version=model.version,
            classes=model.classes,
            input_height=IMAGE_SIZE,
            input_width=IMAGE_SIZE,
            variant=model.variant,
            device=model.device,
            test_accuracy=model.test_accuracy,
            trained_on=model.trained_on,
            limits=messages.Limits(
                max_images=limits.max_images,
                max_image_bytes=limits.image.max_bytes,
                max_image_pixels=limits.image.max_pixels,
                max_message_bytes=limits.max_message_bytes,
                max_queued_images=limits.max_queued_images,
            ),
        )

    async def _decode(self, contents: Sequence[_Content], call: Call) -> list[Decoded]:
        """The pixels of each image, or the reason why it cannot be read, in order."""
        files = [data for kind, data in contents if kind == "encoded"]
        from_files = iter(await self._inference.decode(files, call.connection, call.deadline))
        return [next(from_files) if kind == "encoded" else _raw(kind, data) for kind, data in contents]


def stream_failure(request: messages.ClassifyRequest | None, failure: Failure) -> messages.ClassifyResponse:
    """The response in a stream to a request that failed as a whole; `request` is None if it could not be parsed."""
    error = messages.ImageError(code=failure.code.value[0], message=failure.message)
    request_id = request.request_id[:MAX_ID_CHARACTERS] if request is not None else ""
    return messages.ClassifyResponse(request_id=request_id, error=error)


def _packed(data: bytes) -> NDArray[np.uint8]:
    try:
        return packed_images(data)
    except ImageRejected as rejection:  # it is unknown where each image begins, so none can be classified
        raise InvalidRequest(str(rejection)) from rejection


def _content(image: messages.Image) -> _Content:
    # Every access to a bytes field copies it, so each is read once.
    kind = image.WhichOneof("content")
    return kind, b"" if kind is None else getattr(image, kind)


def _raw(kind: str | None, data: bytes) -> Decoded:
    if kind is None:
        return ImageRejected("the image holds neither 'encoded' nor 'rgb'")
    try:
        return raw_image(data)
    except ImageRejected as rejection:
        return rejection


def _table(
    probabilities: NDArray[np.float32], classes: Sequence[str], errors: Mapping[int, messages.ImageError]
) -> messages.ProbabilityTable:
    if errors:
        rows = np.zeros((len(probabilities) + len(errors), len(classes)), np.float32)
        rows[[index for index in range(len(rows)) if index not in errors]] = probabilities
        probabilities = rows
    return messages.ProbabilityTable(
        classes=classes, probabilities=probabilities.astype("<f4", copy=False).tobytes(), errors=errors
    )


def _error(rejection: ImageRejected) -> messages.ImageError:
    code = grpc.StatusCode.INTERNAL if rejection.internal else grpc.StatusCode.INVALID_ARGUMENT
    return messages.ImageError(code=code.value[0], message=str(rejection))
