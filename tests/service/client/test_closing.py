"""Closing a client while other threads or tasks use it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from service.client import AsyncClient, ClassificationError, Client, Options
from tests.service.client.scripted import Blocked, Scripted, serve
from tests.service.conftest import until
from tests.service.exports import pictures


def failure_of(call) -> ClassificationError:
    with pytest.raises(ClassificationError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("images", "coalesce"), [(1, True), (1, False), (100, True)], ids=["shared", "single", "in parallel"]
)
def test_calls_under_way_fail_at_once_when_the_client_is_closed(images, coalesce):
    servicer = Blocked()
    with serve(servicer) as target, ThreadPoolExecutor(6) as threads:
        client = Client(target, Options(coalesce=coalesce, timeout=600))
        client.model()
        calls = [threads.submit(failure_of, lambda: client.classify(pictures(images))) for _ in range(6)]
        servicer.arrived.acquire()
        client.close()
        failures = [call.result(timeout=60) for call in calls]  # the server still answers nothing
        assert {failure.code for failure in failures} == {grpc.StatusCode.CANCELLED}
        assert not servicer.calls
        servicer.go_on.set()


def test_a_call_that_pauses_before_its_next_attempt_ends_when_the_client_is_closed():
    servicer = Scripted((grpc.StatusCode.UNAVAILABLE, (("grpc-retry-pushback-ms", "600000"),)))
    with serve(servicer) as target, ThreadPoolExecutor(1) as threads:
        client = Client(target, Options(timeout=3600))
        client.model()
        call = threads.submit(failure_of, lambda: client.classify(pictures(1)))
        until(lambda: bool(servicer.calls))
        client.close()
        assert call.result(timeout=60).code is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("images", [1, 100])
def test_a_closed_client_says_so(images):
    with serve(Scripted()) as target:
        with Client(target) as client:
            assert client.classify(pictures(1))
        for _ in range(2):
            assert str(failure_of(lambda: client.classify(pictures(images)))) == "CANCELLED: the client was closed"
        client.close()


@pytest.mark.parametrize("coalesce", [True, False])
def test_tasks_that_wait_fail_at_once_when_the_asyncio_client_is_closed(coalesce):
    servicer = Blocked()

    async def use(target):
        client = AsyncClient(target, Options(coalesce=coalesce, timeout=600))
        await client.model()
        calls = [asyncio.create_task(client.classify(pictures(1))) for _ in range(6)]
        await asyncio.to_thread(servicer.arrived.acquire)
        await client.close()
        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        assert {outcome.code for outcome in outcomes} == {grpc.StatusCode.CANCELLED}
        with pytest.raises(ClassificationError, match="CANCELLED: the client was closed"):
            await client.classify(pictures(1))

    with serve(servicer) as target:
        asyncio.run(use(target))
        servicer.go_on.set()


def test_a_task_that_pauses_before_its_next_attempt_ends_when_the_asyncio_client_is_closed():
    servicer = Scripted((grpc.StatusCode.UNAVAILABLE, (("grpc-retry-pushback-ms", "600000"),)))

    async def use(target):
        client = AsyncClient(target, Options(timeout=3600))
        await client.model()
        call = asyncio.create_task(client.classify(pictures(1)))
        await asyncio.to_thread(until, lambda: bool(servicer.calls))
        await client.close()
        with pytest.raises(ClassificationError, match="CANCELLED"):
            await asyncio.wait_for(call, 60)

    with serve(servicer) as target:
        asyncio.run(use(target))


def test_a_closed_client_refuses_calls_that_need_no_server(tmp_path):
    with serve(Scripted()) as target:
        client = Client(target)
        client.classify([b"image"])
        client.close()
        for call in (lambda: client.classify([]), lambda: client.probabilities(pictures(1)[:0])):
            assert failure_of(call).code is grpc.StatusCode.CANCELLED
