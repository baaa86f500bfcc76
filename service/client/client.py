"""Client of the service: `Client`, `AsyncClient`, and a command, `python -m service.client IMAGE…`.

    with Client("localhost:50051") as client:
        for image in client.classify(["cat.jpg", "ship.png"]):
            print(image.best.name, image.best.probability)

Images are paths, bytes of image files, PIL images, or uint8 arrays: [height, width, 3], or [n, 32, 32, 3] for many at
once, the fast way. Large lists are sent in batches that the server's limits allow. Calls are repeated, with growing
pauses, where the server could not take them (UNAVAILABLE, RESOURCE_EXHAUSTED, CANCELLED by a server that stops) and
never otherwise; classifying twice does no harm.
"""

import argparse
import asyncio
import io
import itertools
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc
import numpy as np
import tenacity
from numpy.typing import NDArray
from PIL import Image as PillowImage

from cifar_core.images import IMAGE_BYTES, IMAGE_SIZE
from service import ports
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc

DEFAULT_TARGET = "127.0.0.1:50051"
# CANCELLED is what gRPC itself answers for calls that a stopping server had received but not begun.
RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
FIRST_PAUSE, LAST_PAUSE = 0.05, 2.0
# Batches under way at once: one is computed while the next is sent.
IN_FLIGHT = 4

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | PillowImage.Image | NDArray[np.uint8]"


@dataclass(frozen=True)
class RankedClass:
    """A class with the probability, 0 to 1, that the image shows it; `index` is its place in the model's order."""

    name: str
    index: int
    probability: float


@dataclass(frozen=True)
class Classification:
    """The answer for one image: classes by falling probability, or none and the reason."""

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

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        super().__init__(f"{self.code.name}: {error.details()}")


@dataclass(frozen=True)
class Options:
    """How to reach a server.

    Attributes:
        tls: Use TLS, with the system's authorities unless `ca` names another.
        ca: PEM file of who signed the server's certificate.
        certificate: PEM file of the client's own certificate, for mutual TLS; with `key`.
        key: PEM file of its private key.
        token: Sent as bearer token.
        timeout: Seconds for a whole call, all batches and repetitions; None for no limit.
        attempts: How often a batch is sent at most.
    """

    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: str | None = None
    timeout: float | None = 60.0
    attempts: int = 10

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for plaintext."""
        if not (self.tls or self.ca or self.certificate):
            return None
        read = [None if path is None else Path(path).read_bytes() for path in (self.ca, self.key, self.certificate)]
        return grpc.ssl_channel_credentials(*read)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What is sent with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Retries are ours: they know the whole call's deadline, and repeat no message that is too large.
    ("grpc.enable_retries", 0),
)


class Client:
    """Classifies over one connection. Safe for threads.

    Args:
        target: HOST:PORT.
        options: Security, deadline, attempts.
    """

    def __init__(self, target: str = DEFAULT_TARGET, options: Options | None = None) -> None:
        self.options = options or Options()
        credentials = self.options.credentials
        channel_options = (*CHANNEL_OPTIONS, *ports.channel_options(target))
        if credentials is None:
            self._channel = grpc.insecure_channel(target, channel_options)
        else:
            self._channel = grpc.secure_channel(target, credentials, channel_options)
        self._stub = rpc.ImageClassifierStub(self._channel)  # type: ignore[no-untyped-call]
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="classify")
        self._model: messages.GetModelResponse | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._pool.shutdown(cancel_futures=True)
        self._channel.close()

    def model(self) -> messages.GetModelResponse:
        """What the server serves now, and its limits.

        Raises:
            ClassificationError: The server does not answer.
        """
        self._model = self._call(self._stub.GetModel, messages.GetModelRequest(), _Deadline(self.options.timeout))
        return self._model

    def classify(
        self, images: Iterable[ImageSource] | NDArray[np.uint8], top_k: int = 0, timeout: float | None = None
    ) -> list[Classification]:
        """One answer per image, in order.

        Args:
            images: See the module's docstring.
            top_k: Classes per image; 0 for all.
            timeout: Seconds for the whole call instead of the options'.

        Raises:
            ClassificationError: A batch could not be answered as a whole. An image that cannot be read is no such
                error: its answer has no classes and says why.
            OSError: A path cannot be read.
            ValueError: An array is not of a form that images have.
            TypeError: `images` is one image instead of a list, or holds something that is none.
        """
        return [answer for response in self._responses(images, top_k, timeout) for answer in _answers(response)]

    def probabilities(self, images: NDArray[np.uint8], timeout: float | None = None) -> NDArray[np.float32]:
        """Probabilities of raw images, uint8 [n, 32, 32, 3]: float32 [n, classes], in the model's order of classes.

        Raises:
            ClassificationError: As `classify`.
        """
        return _joined([_table(response) for response in self._responses(images, 0, timeout)])

    def _responses(
        self, images: Iterable[ImageSource] | NDArray[np.uint8], top_k: int, timeout: float | None
    ) -> Iterator[messages.ClassifyResponse]:
        deadline = _Deadline(self.options.timeout if timeout is None else timeout)
        limits = (self._model or self.model()).limits
        requests = _requests(images, top_k, limits)
        # Not more at once than are under way: a long list of files is read as it is sent.
        while window := list(itertools.islice(requests, IN_FLIGHT)):
            if len(window) == 1:
                yield self._call(self._stub.Classify, window[0], deadline)
            else:
                yield from self._pool.map(lambda request: self._call(self._stub.Classify, request, deadline), window)

    def _call(self, method: Callable[..., Any], request: Any, deadline: "_Deadline") -> Any:  # noqa: ANN401
        for attempt in tenacity.Retrying(**_retrying(self.options, deadline)):
            with attempt:
                try:
                    return method(request, timeout=deadline.remaining(), metadata=self.options.metadata)
                except grpc.RpcError as error:
                    raise _Failed(error) from error
        raise AssertionError("retrying ended without an outcome")


class AsyncClient:
    """`Client` for asyncio: `async with AsyncClient(…) as client: await client.classify(…)`."""

    def __init__(self, target: str = DEFAULT_TARGET, options: Options | None = None) -> None:
        self.options = options or Options()
        credentials = self.options.credentials
        channel_options = (*CHANNEL_OPTIONS, *ports.channel_options(target))
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, channel_options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, channel_options)
        self._stub: Any = rpc.ImageClassifierStub(self._channel)  # type: ignore[no-untyped-call]
        self._model: messages.GetModelResponse | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()

    async def model(self) -> messages.GetModelResponse:
        """As `Client.model`."""
        self._model = await self._call(self._stub.GetModel, messages.GetModelRequest(), _Deadline(self.options.timeout))
        return self._model

    async def classify(
        self, images: Iterable[ImageSource] | NDArray[np.uint8], top_k: int = 0, timeout: float | None = None
    ) -> list[Classification]:
        """As `Client.classify`."""
        return [answer async for response in self._responses(images, top_k, timeout) for answer in _answers(response)]

    async def probabilities(self, images: NDArray[np.uint8], timeout: float | None = None) -> NDArray[np.float32]:
        """As `Client.probabilities`."""
        return _joined([_table(response) async for response in self._responses(images, 0, timeout)])

    async def _responses(
        self, images: Iterable[ImageSource] | NDArray[np.uint8], top_k: int, timeout: float | None
    ) -> AsyncIterator[messages.ClassifyResponse]:
        deadline = _Deadline(self.options.timeout if timeout is None else timeout)
        limits = (self._model or await self.model()).limits
        requests = _requests(images, top_k, limits)
        while window := list(itertools.islice(requests, IN_FLIGHT)):
            tasks = [asyncio.create_task(self._call(self._stub.Classify, request, deadline)) for request in window]
            try:
                for response in await asyncio.gather(*tasks):
                    yield response
            finally:
                for task in tasks:
                    task.cancel()

    async def _call(self, method: Callable[..., Any], request: Any, deadline: "_Deadline") -> Any:  # noqa: ANN401
        async for attempt in tenacity.AsyncRetrying(**_retrying(self.options, deadline)):
            with attempt:
                try:
                    return await method(request, timeout=deadline.remaining(), metadata=self.options.metadata)
                except grpc.RpcError as error:
                    raise _Failed(error) from error
        raise AssertionError("retrying ended without an outcome")


class _Failed(ClassificationError):
    """A failed attempt; `pause` is the server's own hint in seconds."""

    def __init__(self, error: grpc.RpcError) -> None:
        super().__init__(error)
        trailing: Any = error.trailing_metadata() or ()  # pairs, which their types do not say
        hint = dict(trailing).get("grpc-retry-pushback-ms")
        self.pause = None if hint is None else int(hint) / 1000
        # A message that is too large stays too large; gRPC has no status of its own for that.
        too_large = self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and self.pause is None
        self.again = self.code in RETRIED and not too_large


class _Deadline:
    def __init__(self, timeout: float | None) -> None:
        self._at = None if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        return None if self._at is None else max(0.001, self._at - time.monotonic())


def _retrying(options: Options, deadline: _Deadline) -> dict[str, Any]:
    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        hint = getattr(error, "pause", None) or 0.0
        # Doubling, and spread, so that clients refused together do not come back together.
        pause = min(LAST_PAUSE, FIRST_PAUSE * 2 ** (state.attempt_number - 1))
        return float(hint + pause * random.uniform(0.5, 1.5))

    def stop(state: tenacity.RetryCallState) -> bool:
        remaining = deadline.remaining()
        return state.attempt_number >= options.attempts or (remaining is not None and remaining <= state.upcoming_sleep)

    return {
        "retry": tenacity.retry_if_exception(lambda error: isinstance(error, _Failed) and error.again),
        "wait": wait,
        "stop": stop,
        "reraise": True,
    }


def _requests(
    images: Iterable[ImageSource] | NDArray[np.uint8], top_k: int, limits: messages.Limits
) -> Iterator[messages.ClassifyRequest]:
    """The images in as few requests as the limits allow."""
    room = limits.max_message_bytes - 1024  # for what a message holds besides its images
    if isinstance(images, np.ndarray) and images.ndim == 4:
        if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ValueError(
                f"the array is {images.dtype} {list(images.shape)}; it must be uint8 [n, {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
            )
        count = max(1, min(limits.max_images, room // (IMAGE_BYTES)))
        for start in range(0, len(images), count):
            packed = np.ascontiguousarray(images[start : start + count]).tobytes()
            yield messages.ClassifyRequest(packed_rgb=packed, top_k=top_k)
        return
    if isinstance(images, (str, os.PathLike, bytes, PillowImage.Image, np.ndarray)):
        raise TypeError(
            f"images is a single {type(images).__name__}; it must be a list of images, or one array of many"
        )
    request = messages.ClassifyRequest(top_k=top_k)
    size = 0
    for source in images:
        image = _image(source)
        length = len(image.encoded) + len(image.rgb) + 16
        if request.images and (len(request.images) >= limits.max_images or size + length > room):
            yield request
            request, size = messages.ClassifyRequest(top_k=top_k), 0
        request.images.append(image)
        size += length
    if request.images:
        yield request


def _image(source: ImageSource) -> messages.Image:
    if isinstance(source, bytes):
        return messages.Image(encoded=source)
    if isinstance(source, (str, os.PathLike)):
        return messages.Image(encoded=Path(source).read_bytes())
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(f"an image is {source.dtype} {list(source.shape)}; it must be uint8 [height, width, 3]")
        if source.shape == (IMAGE_SIZE, IMAGE_SIZE, 3):
            return messages.Image(rgb=source.tobytes())
        source = PillowImage.fromarray(source)
    if not isinstance(source, PillowImage.Image):
        raise TypeError(f"an image is {type(source).__name__}; it must be a path, bytes, a PIL image or a uint8 array")
    file = io.BytesIO()
    source.save(file, "PNG", compress_level=1, exif=source.getexif())
    return messages.Image(encoded=file.getvalue())


def _answers(response: messages.ClassifyResponse) -> Iterator[Classification]:
    for result in response.results:
        yield Classification(
            classes=tuple(RankedClass(ranked.name, ranked.index, ranked.probability) for ranked in result.classes),
            error=result.error.message if result.HasField("error") else None,
            model_version=response.model_version,
        )


def _joined(tables: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate(tables) if tables else np.empty((0, 0), np.float32)


def _table(response: messages.ClassifyResponse) -> NDArray[np.float32]:
    table = np.zeros((len(response.results), len(response.results[0].classes)), np.float32)
    for row, result in zip(table, response.results, strict=True):
        for ranked in result.classes:
            row[ranked.index] = ranked.probability
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Classifies the images named on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.client", description="Classifies images through a server.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    parser.add_argument("--server", default=DEFAULT_TARGET, metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=3, help="classes per image, 0 for all; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON, one image a line")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for everything; default: %(default)s")
    parser.add_argument("--tls", action="store_true", help="use TLS")
    parser.add_argument("--ca", type=Path, help="PEM file of who signed the server's certificate; means TLS")
    parser.add_argument("--certificate", type=Path, help="PEM file of the client's certificate, with --key")
    parser.add_argument("--key", type=Path, help="PEM file of its private key")
    parser.add_argument("--token-file", type=Path, help="file with a bearer token")
    chosen = parser.parse_args(arguments)
    try:
        token = chosen.token_file.read_text().strip() if chosen.token_file else None
        options = Options(chosen.tls, chosen.ca, chosen.certificate, chosen.key, token, chosen.timeout)
        with Client(chosen.server, options) as client:
            answers = client.classify(chosen.images, chosen.top_k)
    except (ClassificationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        for path, answer in zip(chosen.images, answers, strict=True):
            print(json.dumps({"image": str(path), **asdict(answer)}))
    else:
        print_table(chosen.images, answers)
    return 1 if any(answer.error for answer in answers) else 0


def print_table(names: Sequence[Path], answers: Sequence[Classification]) -> None:
    """A row per image and class, with a bar for each probability."""
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table(
        "image", "class", "", "probability", caption=f"model {answers[0].model_version}", caption_justify="left"
    )
    table.columns[3].justify = "right"
    for name, answer in zip(names, answers, strict=True):
        if answer.error is not None:
            table.add_row(name.name, f"[red]{answer.error}[/red]", end_section=True)
        for place, ranked in enumerate(answer.classes):
            bar = ProgressBar(total=1.0, completed=ranked.probability, width=20)
            last = place == len(answer.classes) - 1
            table.add_row("" if place else name.name, ranked.name, bar, f"{ranked.probability:.1%}", end_section=last)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
