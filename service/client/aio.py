"""`AsyncClient`, for asyncio."""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from numpy.typing import NDArray

from service.client.aio_sharing import AsyncSharing
from service.client.answers import Classification, Results, classifications, probability_table
from service.client.base import BaseClient, check_top_k
from service.client.contents import Content, Images, check_pixels, contents
from service.client.options import DEFAULT_TARGET, Options
from service.client.packing import distribute, request_of
from service.client.retrying import Attempts, Deadline, RequestFailed
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc


@dataclass(frozen=True)
class _Connected:
    loop: asyncio.AbstractEventLoop
    channel: grpc.aio.Channel
    stub: Any


class AsyncClient(BaseClient):
    """`Client` for asyncio: `async with AsyncClient(…) as client: await client.classify(…)`.

    Use it in one event loop, that of its first call. Small calls that are awaited at the same time travel in shared
    requests; each keeps its own deadline, errors and retries, and cancelling one does not affect the others.

    Arguments and errors are those of `Client`.
    """

    def __init__(self, target: str = DEFAULT_TARGET, options: Options | None = None) -> None:
        super().__init__(target, options)
        self._connected: _Connected | None = None
        self._sharing = AsyncSharing(self._shared_requests, self._classify_once, self._capacity)
        self._closed = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection. Calls that are still waiting fail at once with CANCELLED, and so do later calls."""
        self._closed.set()
        if self._connected is not None:
            await self._connected.channel.close()

    @property
    def _stub(self) -> Any:  # noqa: ANN401 -- its generated class has no types
        """The stub, whose channel belongs to the event loop of the first call.

        Raises:
            RuntimeError: This is another event loop.
        """
        loop = asyncio.get_running_loop()
        if self._connected is None:
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(self._grpc_target, self._channel_options)
            else:
                channel = grpc.aio.secure_channel(self._grpc_target, self._credentials, self._channel_options)
            self._connected = _Connected(loop, channel, rpc.ImageClassifierStub(channel))  # type: ignore[no-untyped-call]
        if self._connected.loop is not loop:
            raise RuntimeError("this AsyncClient was used in another event loop: make one in each event loop")
        return self._connected.stub

    async def model(self) -> messages.GetModelResponse:
        """Asks the server which model it serves and for its limits; see `Client.model`."""
        return await self._fetch_model(self._deadline(None))

    async def classify(self, images: Images, top_k: int = 0, timeout: float | None = None) -> list[Classification]:
        """Classifies images; see `Client.classify`."""
        top_k = check_top_k(top_k)
        parts = await self._results(images, self._deadline(timeout))
        return [answer for part in parts for answer in classifications(part, top_k)]

    async def probabilities(self, images: NDArray[np.uint8], timeout: float | None = None) -> NDArray[np.float32]:
        """Classifies raw images, uint8 [n, 32, 32, 3]; see `Client.probabilities`."""
        if isinstance(images, np.ndarray):
            check_pixels(images)
        parts = await self._results(images, self._deadline(timeout))
        return probability_table(parts, len(self._known_classes))

    async def _results(self, images: Images, deadline: Deadline) -> list[Results]:
        self._check_open()
        if self._limits_may_have_changed:
            await self._fetch_model(deadline)
        remaining = contents(images, self._capacity)
        results: list[Results] = []
        # Contents are made as they are sent, so that a long list of files is never in memory as a whole.
        while window := list(itertools.islice(remaining, self._window)):
            if len(window) == 1:
                results += await self._send(window[0], deadline)
                continue
            tasks = [asyncio.create_task(self._send(content, deadline)) for content in window]
            try:
                for part in await asyncio.gather(*tasks):
                    results += part
            finally:
                for task in tasks:
                    task.cancel()
        return results

    async def _send(self, content: Content, deadline: Deadline) -> list[Results]:
        """The results of one content; in several parts if it does not fit into a request to the server."""
        refusal = None
        if content.fits(self._capacity()):
            try:
                return [await self._repeat(deadline, self._exchange, content, deadline)]
            except RequestFailed as failure:
                if not failure.may_be_too_large:
                    raise
                refusal = failure
        for _ in range(self._models_to_ask):
            await self._fetch_model(deadline)
        smaller = self._smaller(content, refusal)
        return [await self._repeat(deadline, self._exchange, part, deadline) for part in smaller]

    async def _exchange(self, content: Content, deadline: Deadline) -> Results:
        """One attempt, in a shared request if the content is small."""
        if (results := self._error_of(content)) is not None:
            return results
        if self._is_shared(content):
            return await self._sharing.exchange(content, deadline)
        response = await self._classify_once(request_of([content]), deadline)
        return distribute([content], response)[0]

    async def _classify_once(self, request: messages.ClassifyRequest, deadline: Deadline) -> messages.ClassifyResponse:
        response: messages.ClassifyResponse = await self._call(self._stub.Classify, request, deadline)
        return response

    async def _fetch_model(self, deadline: Deadline) -> messages.GetModelResponse:
        request = messages.GetModelRequest()
        return self._remember(await self._repeat(deadline, self._call, self._stub.GetModel, request, deadline))

    async def _call(self, method: Callable[..., Any], request: Any, deadline: Deadline) -> Any:  # noqa: ANN401
        try:
            return await method(request, timeout=deadline.remaining(), metadata=self.options.metadata)
        except grpc.aio.UsageError:  # the channel is closed
            self._check_open()
            raise
        except asyncio.CancelledError:
            # gRPC also raises this in all calls when the channel is closed. Then nobody has cancelled this task.
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                self._check_open()
            raise
        except grpc.RpcError as error:
            failure = RequestFailed.of(error)
            self._note_failure(failure)
            raise failure from error

    async def _repeat(self, deadline: Deadline, attempt: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:  # noqa: ANN401
        attempts = None
        while True:
            try:
                return await attempt(*arguments)
            except RequestFailed as failure:
                self._check_open()
                attempts = attempts or Attempts(self.options.attempts, deadline)
                pause = attempts.pause_after(failure)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._closed.wait()  # ends the pause early when the client is closed

    def _check_open(self) -> None:
        """Raises RequestFailed if the client was closed."""
        if self._closed.is_set():
            raise RequestFailed(grpc.StatusCode.CANCELLED, "the client was closed")
