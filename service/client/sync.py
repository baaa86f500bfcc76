"""`Client`, for threads."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from numpy.typing import NDArray

from service.client.answers import Classification, Results, classifications, probability_table
from service.client.base import BaseClient, check_top_k
from service.client.contents import Content, Images, check_pixels, contents
from service.client.options import DEFAULT_TARGET, Options
from service.client.packing import distribute, request_of
from service.client.retrying import Attempts, Deadline, RequestFailed
from service.client.sync_sharing import SyncSharing
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc


class Client(BaseClient):
    """Classifies images over one connection to each server. Several threads may use it at once.

    Small calls that threads make at the same time travel in shared requests; each keeps its own deadline, errors and
    retries.

    Args:
        target: Address of the server, HOST:PORT. Several servers take turns, and a request that one of them cannot
            accept is sent to the next: IP:PORT,IP:PORT,…, or dns:///NAME:PORT for all addresses of a name.
        options: Security, time limits and coalescing.

    Raises:
        OSError: A file that the options name cannot be read.
        ValueError: A file is not a PEM file, the token would be sent to another machine without TLS, or several
            addresses are not IP:PORT each.
    """

    def __init__(self, target: str = DEFAULT_TARGET, options: Options | None = None) -> None:
        super().__init__(target, options)
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self._grpc_target, self._channel_options)
        else:
            self._channel = grpc.secure_channel(self._grpc_target, self._credentials, self._channel_options)
        self._stub = rpc.ImageClassifierStub(self._channel)  # type: ignore[no-untyped-call]
        self._sharing = SyncSharing(self._shared_requests, self._classify_once, self._capacity)
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection. Calls in other threads fail at once with CANCELLED, and so do later calls."""
        self._closed.set()
        self._channel.close()

    def model(self) -> messages.GetModelResponse:
        """Asks the server which model it serves now, and for its limits.

        Raises:
            ClassificationError: The server does not answer.
        """
        return self._fetch_model(self._deadline(None))

    def classify(self, images: Images, top_k: int = 0, timeout: float | None = None) -> list[Classification]:
        """Classifies images.

        Args:
            images: A list of images: paths, bytes of image files, PIL images, or uint8 arrays [height, width, 3]. Or
                one uint8 array [n, 32, 32, 3], the fast way for many images.
            top_k: Number of classes to return per image, the most probable first; 0 for all.
            timeout: Seconds for the whole call, a year at most; None for the timeout of the options.

        Returns:
            One answer per image, in the same order. An image that the server cannot read, that cannot be encoded, or
            that is too large for a message to the server has an answer without classes that says why.

        Raises:
            ClassificationError: A request failed as a whole.
            OSError: A path cannot be read, or is not a regular file.
            ValueError: An array does not have the type and shape of images, top_k is negative, or timeout is not a
                number, or NaN, or negative.
            TypeError: `images` is a single image instead of a list, or no list, or holds something that is not an
                image; or top_k is not a whole number.
        """
        top_k = check_top_k(top_k)
        parts = self._results(images, self._deadline(timeout))
        return [answer for part in parts for answer in classifications(part, top_k)]

    def probabilities(self, images: NDArray[np.uint8], timeout: float | None = None) -> NDArray[np.float32]:
        """Classifies raw images, uint8 [n, 32, 32, 3].

        Returns:
            Probabilities, float32 [n, classes], in the model's order of classes. Without images, `classes` is the
            number that the server named when it was last asked for its limits.

        Raises:
            ClassificationError: A request failed as a whole.
            ValueError: The array does not have this type and shape, or timeout is not a number, or NaN, or negative.
        """
        if isinstance(images, np.ndarray):
            check_pixels(images)
        parts = self._results(images, self._deadline(timeout))
        return probability_table(parts, len(self._known_classes))

    def _results(self, images: Images, deadline: Deadline) -> list[Results]:
        self._check_open()
        if self._limits_may_have_changed:
            self._fetch_model(deadline)
        remaining = contents(images, self._capacity)
        results: list[Results] = []
        # Contents are made as they are sent, so that a long list of files is never in memory as a whole.
        while window := list(itertools.islice(remaining, self._window)):
            if len(window) == 1:
                results += self._send(window[0], deadline)
            else:
                outcomes = self._in_parallel(window, deadline)
                try:
                    while outcomes:
                        results += outcomes.pop(0).result()
                except BaseException:
                    deadline.end()  # the threads of the other parts do not repeat their requests
                    raise
                finally:
                    outcomes.clear()  # an error's traceback holds this frame, and would hold all parts through it
        return results

    def _in_parallel(self, window: list[Content], deadline: Deadline) -> "list[Future[list[Results]]]":
        """Sends each content in a thread of its own, which ends by the deadline."""
        outcomes = []
        for content in window:
            outcome: Future[list[Results]] = Future()
            # Not a pool: calls of other threads would wait for its threads beyond their deadlines. Daemons, because a
            # process that is interrupted must not wait for a server that does not answer.
            threading.Thread(
                target=self._send_into, args=(outcome, content, deadline), name="classify", daemon=True
            ).start()
            outcomes.append(outcome)
        return outcomes

    def _send_into(self, outcome: "Future[list[Results]]", content: Content, deadline: Deadline) -> None:
        try:
            outcome.set_result(self._send(content, deadline))
        except BaseException as error:  # noqa: BLE001 -- the thread that made the call raises it
            outcome.set_exception(error)
        finally:
            del outcome, content  # the traceback of the error holds this frame

    def _send(self, content: Content, deadline: Deadline) -> list[Results]:
        """The results of one content; in several parts if it does not fit into a request to the server."""
        refusal = None
        if content.fits(self._capacity()):
            try:
                return [self._repeat(deadline, self._exchange, content, deadline)]
            except RequestFailed as failure:
                if not failure.may_be_too_large:
                    raise
                refusal = failure
        for _ in range(self._models_to_ask):
            self._fetch_model(deadline)
        smaller = self._smaller(content, refusal)
        return [self._repeat(deadline, self._exchange, part, deadline) for part in smaller]

    def _exchange(self, content: Content, deadline: Deadline) -> Results:
        """One attempt, in a shared request if the content is small."""
        if (results := self._error_of(content)) is not None:
            return results
        if self._is_shared(content):
            return self._sharing.exchange(content, deadline)
        response = self._classify_once(request_of([content]), deadline)
        return distribute([content], response)[0]

    def _classify_once(self, request: messages.ClassifyRequest, deadline: Deadline) -> messages.ClassifyResponse:
        response: messages.ClassifyResponse = self._call(self._stub.Classify, request, deadline)
        return response

    def _fetch_model(self, deadline: Deadline) -> messages.GetModelResponse:
        request = messages.GetModelRequest()
        return self._remember(self._repeat(deadline, self._call, self._stub.GetModel, request, deadline))

    def _call(self, method: Callable[..., Any], request: Any, deadline: Deadline) -> Any:  # noqa: ANN401
        try:
            return method(request, timeout=deadline.remaining(), metadata=self.options.metadata)
        except ValueError:  # the channel is closed
            self._check_open()
            raise
        except grpc.RpcError as error:
            failure = RequestFailed.of(error)
            self._note_failure(failure)
            raise failure from error

    def _repeat(self, deadline: Deadline, attempt: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
        attempts = None
        while True:
            try:
                return attempt(*arguments)
            except RequestFailed as failure:
                self._check_open()
                attempts = attempts or Attempts(self.options.attempts, deadline)
                pause = attempts.pause_after(failure)
            self._closed.wait(pause)  # ends early when the client is closed

    def _check_open(self) -> None:
        """Raises RequestFailed if the client was closed."""
        if self._closed.is_set():
            raise RequestFailed(grpc.StatusCode.CANCELLED, "the client was closed")
