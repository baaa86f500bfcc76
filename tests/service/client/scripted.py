"""A gRPC server in this process that fails as a test tells it to, and keeps limits that a test can change."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent import futures

import grpc

from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc

IMAGE_BYTES = 3072
CLASSES = 10


def name_of(content: bytes) -> str:
    """The class that `answer` gives to an image: another one for each image."""
    return hashlib.sha256(content).hexdigest()[:16]


def answer(request: messages.ClassifyRequest) -> messages.ClassifyResponse:
    """The response to a request, with classes by which each image can be recognised."""
    packed = request.packed_rgb
    contents = [image.encoded or image.rgb for image in request.images]
    contents += [packed[start : start + IMAGE_BYTES] for start in range(0, len(packed), IMAGE_BYTES)]
    return messages.ClassifyResponse(
        results=[
            messages.ImageResult(
                classes=[
                    messages.RankedClass(name=name_of(content), index=index, probability=1 / CLASSES)
                    for index in range(request.top_k or CLASSES)
                ]
            )
            for content in contents
        ],
        model_version="scripted",
    )


class Scripted(rpc.ImageClassifierServicer):
    """Fails as often as there are failures in the list, then answers.

    Attributes:
        failures: Status codes and trailing metadata of the next calls of Classify.
        limits: What GetModel names and Classify enforces.
        poison: A request that holds this image fails as a whole.
        seconds: How long Classify takes.
    """

    def __init__(self, *failures: tuple[grpc.StatusCode, tuple[tuple[str, str], ...]]) -> None:
        self.failures = list(failures)
        self.limits = messages.Limits(max_images=10, max_message_bytes=100_000)
        self.poison: bytes | None = None
        self.seconds = 0.0
        self.calls: list[int] = []  # the number of images of each
        self.model_calls = 0
        self._lock = threading.Lock()

    def GetModel(self, request, context):  # noqa: N802
        self.model_calls += 1
        return messages.GetModelResponse(limits=self.limits)

    def Classify(self, request, context):  # noqa: N802
        response = answer(request)
        with self._lock:
            self.calls.append(len(response.results))
            failure = self.failures.pop(0) if self.failures else None
        time.sleep(self.seconds)
        if failure:
            context.set_trailing_metadata(failure[1])
            context.abort(failure[0], "scripted")
        if self.poison and self.poison in [*(image.encoded for image in request.images)]:
            context.abort(grpc.StatusCode.INTERNAL, "poisoned")
        if request.ByteSize() > self.limits.max_message_bytes:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the message is too large")
        if len(response.results) > self.limits.max_images:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too many images")
        return response


@contextlib.contextmanager
def serve(servicer: Scripted) -> Iterator[str]:
    """Serves on a free port of the loopback interface; yields HOST:PORT."""
    server = grpc.server(futures.ThreadPoolExecutor(80))
    rpc.add_ImageClassifierServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)
