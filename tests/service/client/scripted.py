"""A gRPC server in this process that fails as a test tells it to, and keeps limits that a test can change."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
import numpy as np

from service.client.answers import Classification
from service.client.contents import Capacity, Content
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc

IMAGE_BYTES = 3072
CLASSES = 10
NAMES = tuple(f"class {index}" for index in range(CLASSES))
CAPACITY = Capacity(20, 50_000)


def row_of(content: bytes) -> tuple[float, ...]:
    """The probabilities that `answer` gives to an image: others for each image."""
    return tuple((np.frombuffer(hashlib.sha512(content).digest()[: 4 * CLASSES], "<u4") / 2**32).astype("f4").tolist())


def row_in(answer: Classification) -> tuple[float, ...]:
    """The probabilities in an answer with all classes."""
    return tuple(ranked.probability for ranked in sorted(answer.classes, key=lambda ranked: ranked.index))


def contents_of(request: messages.ClassifyRequest) -> list[bytes]:
    """The bytes of each image of a request."""
    packed = request.packed_rgb
    contents = [image.encoded or image.rgb for image in request.images]
    return contents + [packed[start : start + IMAGE_BYTES] for start in range(0, len(packed), IMAGE_BYTES)]


def content_of(number: int, count: int, files: bool) -> tuple[Content, list[tuple[float, ...]]]:
    """Images that no other number has, and the probabilities that the server gives them."""
    images = [b"%08d-%02d" % (number, place) for place in range(count)]
    if files:
        return Content(images=tuple(messages.Image(encoded=image) for image in images)), [*map(row_of, images)]
    raw = [image.ljust(IMAGE_BYTES, b".") for image in images]
    return Content(pixels=b"".join(raw)), [*map(row_of, raw)]


def answer(request: messages.ClassifyRequest) -> messages.ClassifyResponse:
    """The response to a request, with probabilities by which each image can be recognised."""
    assert request.as_table
    rows = np.array([row_of(content) for content in contents_of(request)], "<f4")
    table = messages.ProbabilityTable(classes=NAMES, probabilities=rows.tobytes())
    return messages.ClassifyResponse(table=table, model_version="scripted")


def ranked_answer(request: messages.ClassifyRequest) -> messages.ClassifyResponse:
    """The response of a server that does not know tables."""
    rows = [row_of(content) for content in contents_of(request)]
    response = messages.ClassifyResponse(model_version="scripted")
    for row in rows:
        ranked = sorted(enumerate(row), key=lambda pair: -pair[1])[: request.top_k or None]
        response.results.add().classes.extend(
            messages.RankedClass(name=NAMES[index], index=index, probability=value) for index, value in ranked
        )
    return response


class Scripted(rpc.ImageClassifierServicer):
    """Fails as often as there are failures in the list, then answers.

    Attributes:
        failures: Status codes and trailing metadata of the next calls of Classify.
        limits: What GetModel names and Classify enforces.
        poison: A request that holds this image fails as a whole.
        seconds: How long Classify takes.
        knows_tables: Whether it answers with a table if it is asked to; older servers do not.
    """

    def __init__(self, *failures: tuple[grpc.StatusCode, tuple[tuple[str, str], ...]]) -> None:
        self.failures = list(failures)
        self.limits = messages.Limits(max_images=10, max_message_bytes=100_000)
        self.poison: bytes | None = None
        self.seconds = 0.0
        self.knows_tables = True
        self.calls: list[int] = []  # the number of images of each
        self.model_calls = 0
        self._lock = threading.Lock()

    def GetModel(self, request, context):  # noqa: N802
        self.model_calls += 1
        return messages.GetModelResponse(limits=self.limits)

    def Classify(self, request, context):  # noqa: N802
        images = len(contents_of(request))
        with self._lock:
            self.calls.append(images)
            failure = self.failures.pop(0) if self.failures else None
        time.sleep(self.seconds)
        if failure:
            context.set_trailing_metadata(failure[1])
            context.abort(failure[0], "scripted")
        if self.poison and self.poison in [*(image.encoded for image in request.images)]:
            context.abort(grpc.StatusCode.INTERNAL, "poisoned")
        if request.ByteSize() > self.limits.max_message_bytes:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the message is too large")
        if images > self.limits.max_images:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too many images")
        return answer(request) if self.knows_tables else ranked_answer(request)


class Blocked(Scripted):
    """Answers no request until `go_on` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Semaphore(0)
        self.go_on = threading.Event()

    def Classify(self, request, context):  # noqa: N802
        self.arrived.release()
        self.go_on.wait(60)
        return super().Classify(request, context)


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
