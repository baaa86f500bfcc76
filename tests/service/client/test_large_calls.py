"""Calls of several requests, which `Client` sends from threads of its own, and limits that change between calls."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from service.client import AsyncClient, ClassificationError, Client, Options
from tests.conftest import DEFAULT_SIGINT, REPOSITORY, prepared
from tests.service.client.scripted import Blocked, Scripted, row_in, row_of, serve
from tests.service.exports import pictures

LARGE = pictures(100)  # ten requests to a scripted server


def test_a_large_call_ends_by_its_deadline_while_other_threads_make_large_calls():
    servicer = Blocked()
    options = Options(coalesce=False)
    with serve(servicer) as target, Client(target, options) as client, ThreadPoolExecutor(2) as threads:
        client.model()
        long = threads.submit(client.classify, LARGE, timeout=50)
        for _ in range(4):
            assert servicer.arrived.acquire(timeout=60)
        began = time.monotonic()
        with pytest.raises(ClassificationError) as caught:
            client.classify(LARGE, timeout=0.5)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - began < 10
        assert not servicer.calls
        servicer.go_on.set()
        assert [row_in(answer) for answer in long.result(30)] == [row_of(image.tobytes()) for image in LARGE]


def test_a_process_that_is_interrupted_during_a_large_call_ends_although_the_server_answers_nothing():
    code = (
        "import sys\n"
        "from service.client import Client, Options\n"
        "from tests.service.exports import pictures\n"
        "client = Client(sys.argv[1], Options(timeout=50, coalesce=False))\n"
        "client.classify(pictures(100))\n"
    )
    servicer = Blocked()
    with serve(servicer) as target:
        process = subprocess.Popen(
            prepared(DEFAULT_SIGINT, [sys.executable, "-c", code, target]),
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
        )
        try:
            for _ in range(4):
                assert servicer.arrived.acquire(timeout=60)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)  # less than the call's own time limit
        finally:
            process.kill()
            servicer.go_on.set()
    assert b"KeyboardInterrupt" in errors


def test_an_image_that_was_too_large_is_sent_once_the_server_takes_larger_messages():
    servicer, image = Scripted(), b"x" * 150_000
    with serve(servicer) as target, Client(target) as client:
        assert "the image takes 150" in client.classify([image])[0].error
        assert not servicer.calls
        servicer.limits.max_message_bytes = 200_000
        assert row_in(client.classify([image])[0]) == row_of(image)
        servicer.limits.max_message_bytes = 100_000
        small = b"small"
        answers = client.classify([small, image, small])
        assert [answer.error is None for answer in answers] == [True, False, True]
        assert row_in(answers[2]) == row_of(small)


class OneFails(Blocked):
    """Of the four requests of a large call, the first fails when the others have arrived; these then wait."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Semaphore(0)

    def Classify(self, request, context):  # noqa: N802
        self.calls.append(1)
        if request.packed_rgb.startswith(LARGE[0].tobytes()):
            for _ in range(3):
                assert self.arrived.acquire(timeout=30)
            context.abort(grpc.StatusCode.INTERNAL, "scripted")
        context.add_callback(self.ended.release)
        self.arrived.release()
        self.go_on.wait(30)
        context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")


def test_after_one_request_of_a_large_call_failed_the_others_are_not_repeated():
    servicer = OneFails()
    with serve(servicer) as target, Client(target, Options(coalesce=False)) as client:
        with pytest.raises(ClassificationError, match="INTERNAL"):
            client.classify(LARGE)
        servicer.go_on.set()
        for _ in range(3):
            assert servicer.ended.acquire(timeout=10)
        time.sleep(0.5)  # longer than the pause before another attempt
        assert len(servicer.calls) == 4


def test_after_one_request_of_a_large_call_failed_the_asyncio_client_cancels_the_others():
    servicer = OneFails()

    async def use(target):
        async with AsyncClient(target, Options(coalesce=False)) as client:
            with pytest.raises(ClassificationError, match="INTERNAL"):
                await client.classify(LARGE)
            for _ in range(3):
                assert await asyncio.to_thread(servicer.ended.acquire, timeout=5)

    with serve(servicer) as target:
        try:
            asyncio.run(use(target))
        finally:
            servicer.go_on.set()
