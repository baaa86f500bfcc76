"""Concurrent small calls share requests, and each keeps its own answer, error, deadline and cancellation."""

import asyncio
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.client import AsyncClient, ClassificationError, Client, Options
from service.client.aio_sharing import AsyncSharing
from service.client.answers import Results
from service.client.contents import Content
from service.client.retrying import Deadline, RequestFailed
from service.client.sync_sharing import SyncSharing
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from tests.service.client.scripted import CAPACITY, Scripted, answer, content_of, contents_of, row_in, row_of, serve
from tests.service.exports import expected, pictures

POISON = messages.Image(encoded=b"poison")


class FakeServer:
    """Fails on poison and on requests that are too large, and now and then for no reason."""

    def __init__(self, seed: int, unavailable: float) -> None:
        self._random, self._unavailable = random.Random(seed), unavailable
        self.under_way = self.most_under_way = self.requests = self.images = 0

    def begin(self) -> int:
        """How long the request takes, in turns of the event loop."""
        self.requests += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return self._random.randrange(6)

    def end(self, request: messages.ClassifyRequest) -> messages.ClassifyResponse:
        self.under_way -= 1
        if self._random.random() < self._unavailable:
            raise RequestFailed(grpc.StatusCode.UNAVAILABLE, "now and then")
        if POISON in request.images:
            raise RequestFailed(grpc.StatusCode.INTERNAL, "poisoned")
        images = len(contents_of(request))
        assert images <= CAPACITY.images
        self.images += images
        return answer(request)


def rows_of(results: Results) -> list[tuple[float, ...]]:
    return [tuple(row) for row in results.probabilities.tolist()]


calls = st.fixed_dictionaries(
    {
        "count": st.integers(1, 4),
        "files": st.booleans(),
        "poisoned": st.sampled_from([False] * 9 + [True]),
        "starts": st.integers(0, 12),
        "cancelled": st.none() | st.integers(1, 12),
    }
)


@given(st.lists(calls, min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 2**31), st.sampled_from([0.0, 0.2]))
def test_no_call_gets_the_answer_or_the_error_of_another(plans, slots, seed, unavailable):
    server = FakeServer(seed, unavailable)

    async def turns(count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def send(request: messages.ClassifyRequest, _: Deadline) -> messages.ClassifyResponse:
        remaining = server.begin()
        try:
            await turns(remaining)
        except asyncio.CancelledError:
            server.under_way -= 1
            raise
        return server.end(request)

    async def call(sharing: AsyncSharing, number: int, plan: dict) -> None:
        content, rows = content_of(number, plan["count"], plan["files"] or plan["poisoned"])
        if plan["poisoned"]:
            content = Content(images=(*content.images, POISON))
        await turns(plan["starts"])
        try:
            results = await sharing.exchange(content, Deadline(None))
        except RequestFailed as failure:
            failed_by = failure.code.name
        else:
            failed_by = "poison was answered" if plan["poisoned"] else None
            assert rows_of(results) == rows
        may_fail_by = {"INTERNAL"} if plan["poisoned"] else {None}
        assert failed_by in may_fail_by | ({"UNAVAILABLE"} if unavailable else set())

    async def cancel(task: asyncio.Task, turn: int) -> None:
        await turns(turn)
        task.cancel()

    async def everything() -> None:
        sharing = AsyncSharing(slots, send, lambda: CAPACITY)
        tasks = [asyncio.create_task(call(sharing, number, plan)) for number, plan in enumerate(plans)]
        cancelling = [
            asyncio.create_task(cancel(task, plan["starts"] + plan["cancelled"]))
            for task, plan in zip(tasks, plans, strict=True)
            if plan["cancelled"] is not None
        ]
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        await asyncio.gather(*cancelling)
        for outcome, plan in zip(done, plans, strict=True):
            assert outcome is None or (isinstance(outcome, asyncio.CancelledError) and plan["cancelled"] is not None)
        await turns(20)
        assert server.under_way == 0
        # Every slot is free again.
        content, rows = content_of(10**6, 1, files=False)
        for _ in range(50):
            try:
                results = await asyncio.wait_for(sharing.exchange(content, Deadline(None)), 30)
            except RequestFailed:
                continue
            assert rows_of(results) == rows

    asyncio.run(everything())
    assert server.most_under_way <= slots


@pytest.mark.parametrize("seed", range(5))
def test_no_thread_gets_the_answer_or_the_error_of_another(seed):
    server, lock = FakeServer(seed, 0.05), threading.Lock()

    def send(request: messages.ClassifyRequest, _: Deadline) -> messages.ClassifyResponse:
        with lock:
            turns = server.begin()
        time.sleep(turns / 2000)
        with lock:
            return server.end(request)

    sharing = SyncSharing(2, send, lambda: CAPACITY)

    def call(number: int) -> str:
        choice = random.Random(number)
        poisoned = choice.random() < 0.05
        content, rows = content_of(number, choice.randrange(1, 5), poisoned or choice.random() < 0.5)
        if poisoned:
            content = Content(images=(*content.images, POISON))
        try:
            results = sharing.exchange(content, Deadline(30))
        except RequestFailed as failure:
            return f"poisoned {failure.code.name}" if poisoned else failure.code.name
        assert rows_of(results) == rows
        return "poison was answered" if poisoned else "answered"

    with ThreadPoolExecutor(32) as pool:
        outcomes = Counter(pool.map(call, range(1000)))
    assert set(outcomes) == {"answered", "UNAVAILABLE", "poisoned INTERNAL", "poisoned UNAVAILABLE"}
    assert outcomes["answered"] > 500
    assert server.most_under_way == 2
    assert server.requests < 900  # most calls shared a request


# Through gRPC


def gather(target: str, calls: int, options: Options, images: np.ndarray) -> list:
    """Makes that many calls at the same time, of one image each; returns answers and exceptions."""

    async def use():
        async with AsyncClient(target, options) as client:
            await client.model()
            waiting = [client.classify(images[number : number + 1]) for number in range(calls)]
            return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run(use())


def ask_at_once(kind: type, target: str, images: np.ndarray, timeouts: list) -> list:
    """Makes a call for each image at the same time; returns answers and exceptions."""
    calls = list(zip(images[:, np.newaxis], timeouts, strict=True))

    async def use_async():
        async with AsyncClient(target) as client:
            await client.model()
            waiting = [client.classify(image, timeout=timeout) for image, timeout in calls]
            return await asyncio.gather(*waiting, return_exceptions=True)

    if kind is AsyncClient:
        return asyncio.run(use_async())
    with Client(target) as client, ThreadPoolExecutor(len(calls)) as pool:
        client.model()
        waiting = [pool.submit(client.classify, image, timeout=timeout) for image, timeout in calls]
        return [one.exception() or one.result() for one in waiting]


@pytest.mark.parametrize(("coalesce", "requests"), [(True, (7, 20)), (False, (64, 64))])
def test_concurrent_calls_share_requests_unless_that_is_turned_off(coalesce, requests):
    servicer, images = Scripted(), pictures(64)
    servicer.seconds = 0.05
    with serve(servicer) as target:
        answers = gather(target, 64, Options(coalesce=coalesce), images)
    assert [row_in(answer[0]) for answer in answers] == [row_of(image.tobytes()) for image in images]
    assert requests[0] <= len(servicer.calls) <= requests[1]


def test_each_call_of_a_failed_shared_request_is_sent_again():
    servicer, images = Scripted(*[(grpc.StatusCode.UNAVAILABLE, ())] * 5), pictures(40)
    servicer.seconds = 0.01
    with serve(servicer) as target:
        answers = gather(target, 40, Options(), images)
    assert [row_in(answer[0]) for answer in answers] == [row_of(image.tobytes()) for image in images]


def test_shared_requests_become_smaller_once_the_server_refuses_large_ones():
    servicer, images = Scripted(), pictures(30)

    async def use(target):
        async with AsyncClient(target) as client:
            await client.model()
            servicer.limits = messages.Limits(max_images=3, max_message_bytes=100_000)
            servicer.seconds = 0.02
            for _ in range(2):
                servicer.calls.clear()
                waiting = [client.classify(images[number : number + 1]) for number in range(30)]
                answers = await asyncio.gather(*waiting)
                assert [row_in(one[0]) for one in answers] == [row_of(image.tobytes()) for image in images]

    with serve(servicer) as target:
        asyncio.run(use(target))
    assert max(servicer.calls) == 3  # of the second round


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("timeout", [9.3e9, 1e300, float("inf"), 10**400], ids=["300 years", "1e300", "inf", "10**400"])
def test_a_call_with_a_huge_timeout_disturbs_neither_itself_nor_the_others(kind, timeout):
    servicer, images = Scripted(), pictures(9)
    servicer.seconds = 0.1
    timeouts = [timeout if number % 3 == 0 else 30.0 for number in range(9)]
    with serve(servicer) as target:
        answers = ask_at_once(kind, target, images, timeouts)
    assert [row_in(answer[0]) for answer in answers] == [row_of(image.tobytes()) for image in images]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("timeout", [float("nan"), -1.0, "3"])
def test_a_call_with_an_unusable_timeout_is_refused_and_does_not_disturb_the_others(kind, timeout):
    servicer, images = Scripted(), pictures(9)
    servicer.seconds = 0.1
    timeouts = [timeout if number % 3 == 0 else 30.0 for number in range(9)]
    with serve(servicer) as target:
        answers = ask_at_once(kind, target, images, timeouts)
    for outcome, image, given_timeout in zip(answers, images, timeouts, strict=True):
        if given_timeout is timeout:
            assert isinstance(outcome, ValueError)
            assert f"timeout is {timeout!r}, but must be a number of seconds, 0 or more" in str(outcome)
        else:
            assert row_in(outcome[0]) == row_of(image.tobytes())


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_call_whose_deadline_passes_does_not_disturb_the_others(kind):
    servicer, images = Scripted(), pictures(9)
    servicer.seconds = 0.5
    timeouts = [0.2 if number % 3 == 2 else 30.0 for number in range(9)]
    with serve(servicer) as target:
        answers = ask_at_once(kind, target, images, timeouts)
    for number, outcome in enumerate(answers):
        if timeouts[number] < 1:
            assert isinstance(outcome, ClassificationError)
            assert outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            assert row_in(outcome[0]) == row_of(images[number].tobytes())


def test_a_thread_gives_up_at_its_deadline_although_its_shared_request_goes_on():
    seconds = iter([0.3, 1.5])

    def send(request: messages.ClassifyRequest, _: Deadline) -> messages.ClassifyResponse:
        time.sleep(next(seconds))
        return answer(request)

    sharing = SyncSharing(1, send, lambda: CAPACITY)

    def call(number: int, timeout: float) -> tuple[str, float]:
        began = time.monotonic()
        try:
            sharing.exchange(content_of(number, 1, False)[0], Deadline(timeout))
        except RequestFailed as failure:
            return failure.code.name, time.monotonic() - began
        return "answered", time.monotonic() - began

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(call, 0, 30.0)
        time.sleep(0.1)
        short, long = pool.submit(call, 1, 0.6), pool.submit(call, 2, 30.0)  # they share the second request
        assert first.result()[0] == "answered"
        assert short.result()[0] == "DEADLINE_EXCEEDED"
        assert short.result()[1] < 1.2
        assert long.result()[0] == "answered"


def test_a_request_is_cancelled_once_nobody_waits_for_it():
    servicer = Scripted()

    async def use(target):
        async with AsyncClient(target, Options(max_shared_requests=1)) as client:
            await client.model()
            servicer.seconds = 20
            waiting = [asyncio.create_task(client.classify(pictures(1))) for _ in range(3)]
            await asyncio.sleep(0.2)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            servicer.seconds = 0
            began = time.monotonic()
            assert await client.classify(pictures(1))
            return time.monotonic() - began

    with serve(servicer) as target:
        assert asyncio.run(use(target)) < 5


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_every_answer_of_many_concurrent_calls_to_a_real_server_is_right(server, kind):
    pool = pictures(512, seed=3)
    table = expected(0, pool)

    def plan(seed: int) -> tuple[np.ndarray, int, bool]:
        choice = np.random.default_rng(seed)
        return choice.integers(0, len(pool), int(choice.integers(1, 5))), int(choice.integers(0, 11)), seed % 10 == 0

    def check(answers: list, rows: np.ndarray, top_k: int, bad: bool) -> None:
        if bad:
            assert "its header is damaged" in answers.pop(0).error
        for one, row in zip(answers, rows, strict=True):
            assert len(one.classes) == (top_k or 10)
            assert all(abs(ranked.probability - table[row, ranked.index]) < 1e-5 for ranked in one.classes)
            assert one.best.index == table[row].argmax()

    def images(rows: np.ndarray, bad: bool) -> list | np.ndarray:
        return [b"no image", *pool[rows]] if bad else pool[rows]

    async def use_async():
        async with AsyncClient(server.target) as client:

            async def ask(user: int) -> None:
                for turn in range(15):
                    rows, top_k, bad = plan(user * 100 + turn)
                    check(await client.classify(images(rows, bad), top_k), rows, top_k, bad)

            await asyncio.gather(*(ask(user) for user in range(64)))

    def use_threads():
        with Client(server.target) as client, ThreadPoolExecutor(32) as threads:

            def ask(seed: int) -> None:
                rows, top_k, bad = plan(seed)
                check(client.classify(images(rows, bad), top_k), rows, top_k, bad)

            list(threads.map(ask, range(960)))

    if kind is AsyncClient:
        asyncio.run(use_async())
    else:
        use_threads()


def test_a_request_that_threads_share_has_the_latest_of_their_deadlines():
    go_on, seen = threading.Event(), []

    def send(request: messages.ClassifyRequest, deadline: Deadline) -> messages.ClassifyResponse:
        seen.append(deadline)
        assert go_on.wait(30)
        return answer(request)

    sharing, deadlines = SyncSharing(1, send, lambda: CAPACITY), [Deadline(seconds) for seconds in (60, 20, 50, 30)]
    with ThreadPoolExecutor(4) as pool:
        calls = []
        for number, deadline in enumerate(deadlines):
            calls.append(pool.submit(sharing.exchange, content_of(number, 1, False)[0], deadline))
            time.sleep(0.05)
        go_on.set()
        for call in calls:
            call.result(30)
    assert seen == [deadlines[0], deadlines[2]]
