"""Servicer of cifar.v1.ImageClassifier: messages to the rooms behind, and back."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
import numpy as np
from numpy.typing import NDArray

from cifar_core.images import IMAGE_SIZE, ImageRejected, packed_images, raw_image
from service.core.decoding import Decoded
from service.core.inference import Inference
from service.errors import InvalidRequest
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from service.rpc.calls import Calls, Context, Failure, abort, deadline_of, peer_of

SERVICE = messages.DESCRIPTOR.services_by_name["ImageClassifier"].full_name
CLASSIFY, CLASSIFY_STREAM, GET_MODEL = (f"{SERVICE}/{name}" for name in ("Classify", "ClassifyStream", "GetModel"))
# Requests of one stream whose answers have not been sent; further ones stay in the connection and hold the client back.
STREAM_WINDOW = 32


# Which of an image's fields is set, and what it holds.
Content = tuple[str | None, bytes]


class ImageClassifier(rpc.ImageClassifierServicer):
    """See protos/cifar/v1/image_classifier.proto."""

    def __init__(self, inference: Inference, calls: Calls) -> None:
        self._inference, self._calls = inference, calls

    async def Classify(  # noqa: N802 -- the protocol's name, as are those below
        self, request: messages.ClassifyRequest, context: Context
    ) -> messages.ClassifyResponse:
        """Classifies the images of one request."""
        return await self._calls.unary(CLASSIFY, self._classify, request, context)

    async def GetModel(  # noqa: N802
        self, request: messages.GetModelRequest, context: Context
    ) -> messages.GetModelResponse:
        """What is served, and the limits."""
        return await self._calls.unary(GET_MODEL, self._get_model, request, context)

    async def _classify(self, request: messages.ClassifyRequest, context: Context) -> messages.ClassifyResponse:
        deadline = deadline_of(context)
        packed = _packed(request.packed_rgb)
        contents = [_content(image) for image in request.images]
        size = packed.nbytes + sum(len(data) for _, data in contents)
        with self._inference.admit(len(contents) + len(packed), size):
            decoded = await self._read(contents)
            readable = [image for image in decoded if not isinstance(image, ImageRejected)]
            parts = [np.stack(readable)] if readable else []
            if len(packed):
                parts.append(packed)
            if parts:
                images = parts[0] if len(parts) == 1 else np.concatenate(parts)
                answer = await self._inference.compute(images, deadline)
                model, probabilities = answer.model, answer.probabilities
            else:
                model = self._inference.models.current
                probabilities = np.empty((0, len(model.classes)), np.float32)
        results = _ranked(probabilities, model.classes, request.top_k)
        rejected = len(decoded) - len(readable)
        self._inference.metrics.on_images(len(results), rejected)
        if rejected:
            results = _with_rejections(results, decoded)
        return messages.ClassifyResponse(request_id=request.request_id, results=results, model_version=model.version)

    async def ClassifyStream(  # noqa: N802
        self, request_iterator: AsyncIterator[messages.ClassifyRequest], context: Context
    ) -> AsyncIterator[messages.ClassifyResponse]:
        """Answers each request as Classify does, as soon as it can."""
        answers: asyncio.Queue[messages.ClassifyResponse | None] = asyncio.Queue()
        window = asyncio.Semaphore(STREAM_WINDOW)
        reader = asyncio.create_task(self._read_stream(request_iterator, context, peer_of(context), answers, window))
        try:
            while (answer := await answers.get()) is not None:
                yield answer
                window.release()
            await reader  # raises what ended it
        finally:
            reader.cancel()
        if self._calls.draining.is_set():
            await abort(context, Failure(grpc.StatusCode.UNAVAILABLE, "the server is shutting down: ask another"))

    async def _read_stream(
        self,
        requests: AsyncIterator[messages.ClassifyRequest],
        context: Context,
        peer: str,
        answers: "asyncio.Queue[messages.ClassifyResponse | None]",
        window: asyncio.Semaphore,
    ) -> None:
        async def answer(request: messages.ClassifyRequest) -> None:
            try:
                response = await self._calls.answer(CLASSIFY_STREAM, self._classify, request, context, peer)
            except Failure as failure:
                error = messages.ImageError(code=failure.code.value[0], message=failure.message)
                response = messages.ClassifyResponse(request_id=request.request_id, error=error)
            answers.put_nowait(response)

        async def read(group: asyncio.TaskGroup) -> None:
            async for request in requests:
                await window.acquire()
                group.create_task(answer(request))

        try:
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(read(group))
                draining = asyncio.create_task(self._calls.draining.wait())
                await asyncio.wait((reading, draining), return_when=asyncio.FIRST_COMPLETED)
                reading.cancel()
                draining.cancel()
        finally:
            answers.put_nowait(None)

    async def _read(self, contents: Sequence[Content]) -> list[Decoded]:
        """Each image as pixels, or why not, in order."""
        files = [data for kind, data in contents if kind == "encoded"]
        from_files = iter(await self._inference.decoder.decode(files) if files else [])
        return [next(from_files) if kind == "encoded" else _raw(kind, data) for kind, data in contents]

    async def _get_model(self, request: messages.GetModelRequest, context: Context) -> messages.GetModelResponse:
        del request, context
        model, limits = self._inference.models.current, self._inference.limits
        return messages.GetModelResponse(
            name=model.name,
            version=model.version,
            classes=model.classes,
            input_height=IMAGE_SIZE,
            input_width=IMAGE_SIZE,
            variant=model.variant,
            device=model.engine.device,
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


def _packed(data: bytes) -> NDArray[np.uint8]:
    try:
        return packed_images(data)
    except ImageRejected as rejection:  # where one of them ends is not known, so none can be answered
        raise InvalidRequest(str(rejection)) from rejection


def _content(image: messages.Image) -> Content:
    # Each access to a field of bytes copies it: once is enough.
    kind = image.WhichOneof("content")
    return kind, b"" if kind is None else getattr(image, kind)


def _raw(kind: str | None, data: bytes) -> Decoded:
    if kind is None:
        return ImageRejected("the image holds neither 'encoded' nor 'rgb'")
    try:
        return raw_image(data)
    except ImageRejected as rejection:
        return rejection


def _ranked(probabilities: NDArray[np.float32], classes: Sequence[str], top_k: int) -> list[messages.ImageResult]:
    """One result per row, the classes by falling probability, of equal ones the lower index first."""
    results = []
    for row in probabilities.tolist():
        result = messages.ImageResult()
        add = result.classes.add
        for index in sorted(range(len(row)), key=row.__getitem__, reverse=True)[: top_k or None]:
            add(name=classes[index], index=index, probability=row[index])
        results.append(result)
    return results


def _with_rejections(results: list[messages.ImageResult], decoded: Sequence[Decoded]) -> list[messages.ImageResult]:
    """The results in the order of the request: those of the files and raw images, then of the packed ones."""
    remaining = iter(results)
    ordered = []
    for image in decoded:
        if isinstance(image, ImageRejected):
            code = grpc.StatusCode.INTERNAL if image.internal else grpc.StatusCode.INVALID_ARGUMENT
            error = messages.ImageError(code=code.value[0], message=str(image))
            ordered.append(messages.ImageResult(error=error))
        else:
            ordered.append(next(remaining))
    ordered.extend(remaining)
    return ordered
