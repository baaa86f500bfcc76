import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.batcher import Batcher
from service.core.queue import Images, Outputs
from service.errors import DeadlineExpired, EngineFailed, Overloaded


class Events:
    """An observer that records everything."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.failed = self.rejected = self.expired = self.cancelled = self.spared = 0

    def on_batch(self, images: int, queued_seconds: Sequence[float], seconds: float, failed: bool) -> None:
        self.batches.append(images)
        self.failed += failed

    def on_rejected(self, images: int) -> None:
        self.rejected += 1

    def on_expired(self, images: int) -> None:
        self.expired += 1
        self.spared += images

    def on_cancelled(self, images: int) -> None:
        self.cancelled += 1
        self.spared += images


class Gate:
    """A computation that waits for a permit before each batch, and returns the images that it was given."""

    def __init__(self, open_: bool = False) -> None:
        self.begun = threading.Semaphore(0)
        self.permits = threading.Semaphore(1_000_000 if open_ else 0)
        self.seen: list[list[int]] = []
        self.alone: list[bool] = []

    def __call__(self, images: Images, *, alone: bool) -> Outputs:
        self.seen.append(images[:, 0].tolist())
        self.alone.append(alone)
        self.begun.release()
        assert self.permits.acquire(timeout=30)
        return images.astype(np.float32), images.astype(np.float32) * 2

    def wait_until_begun(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.begun.acquire(timeout=30)


def numbered(*numbers: int) -> Images:
    """Images that can be told apart by their first byte."""
    return np.array(numbers, np.uint8).reshape(-1, 1)


def batcher(events: Events | None = None, **options: float) -> Batcher:
    sizes = {"max_batch_size": 4, "max_images": 1000, "max_bytes": 10**6, **options}
    return Batcher(observer=events or Events(), **sizes)  # type: ignore[arg-type]


def running(test: Callable[[], object]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


def rows(outputs: Outputs) -> list[int]:
    assert (outputs[1] == outputs[0] * 2).all()
    return outputs[0][:, 0].astype(int).tolist()


async def begun(gate: Gate, times: int = 1) -> None:
    await asyncio.get_running_loop().run_in_executor(None, gate.wait_until_begun, times)


# Forming batches


def test_what_waits_while_the_engine_is_busy_becomes_one_batch():
    async def test():
        gate, events = Gate(), Events()
        batches = batcher(events)
        first = asyncio.create_task(batches.submit(numbered(1), gate))
        await begun(gate)
        others = [asyncio.create_task(batches.submit(numbered(number), gate)) for number in (2, 3, 4)]
        await asyncio.sleep(0)
        gate.permits.release(2)
        assert rows(await first) == [1]
        assert [rows(await other) for other in others] == [[2], [3], [4]]
        assert gate.seen == [[1], [2, 3, 4]]
        await batches.close()
        assert events.batches == [1, 3]

    running(test)


def test_an_idle_engine_computes_a_single_image_at_once():
    async def test():
        gate = Gate(open_=True)
        batches = batcher(max_batch_size=32)
        assert rows(await batches.submit(numbered(1), gate)) == [1]
        await batches.close()

    running(test)


def test_an_idle_engine_waits_for_a_full_batch_if_a_delay_is_allowed():
    async def test():
        gate = Gate(open_=True)
        batches = batcher(max_batch_size=3, max_queue_delay=60.0)
        answers = await asyncio.gather(*(batches.submit(numbered(number), gate) for number in (1, 2, 3)))
        assert [rows(answer) for answer in answers] == [[1], [2], [3]]
        assert gate.seen == [[1, 2, 3]]
        await batches.close()

    running(test)


def test_a_batch_that_does_not_fill_is_computed_when_its_oldest_request_has_waited_for_the_delay():
    async def test():
        gate = Gate(open_=True)
        batches = batcher(max_batch_size=3, max_queue_delay=0.05)
        started = time.monotonic()
        await batches.submit(numbered(1), gate)
        assert time.monotonic() - started >= 0.05
        await batches.close()

    running(test)


def test_single_images_pass_between_the_pieces_of_a_large_request():
    async def test():
        gate = Gate()
        batches = batcher()
        large = asyncio.create_task(batches.submit(numbered(*range(20)), gate))
        await begun(gate)
        small = asyncio.create_task(batches.submit(numbered(100), gate))
        await asyncio.sleep(0)
        gate.permits.release(3)
        assert rows(await small) == [100]
        assert not large.done()
        gate.permits.release(10)
        assert rows(await large) == list(range(20))
        assert gate.seen[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [100, 8, 9, 10]]
        await batches.close()

    running(test)


def test_large_requests_share_the_engine():
    async def test():
        gate = Gate()
        batches = batcher()
        first = asyncio.create_task(batches.submit(numbered(*range(12)), gate))
        await begun(gate)
        second = asyncio.create_task(batches.submit(numbered(*range(100, 112)), gate))
        await asyncio.sleep(0)
        gate.permits.release(10)
        assert rows(await first) == list(range(12))
        assert rows(await second) == list(range(100, 112))
        assert [batch[0] for batch in gate.seen] == [0, 4, 100, 8, 104, 108]
        await batches.close()

    running(test)


def test_images_for_different_models_are_not_mixed():
    async def test():
        old, new = Gate(), Gate(open_=True)
        batches = batcher()
        first = asyncio.create_task(batches.submit(numbered(1), old))
        await begun(old)
        rest = [
            asyncio.create_task(batches.submit(numbered(number), gate))
            for number, gate in ((2, old), (3, new), (4, old), (5, new))
        ]
        await asyncio.sleep(0)
        old.permits.release(10)
        assert rows(await first) == [1]
        assert [rows(await request) for request in rest] == [[2], [3], [4], [5]]
        assert old.seen == [[1], [2, 4]]
        assert new.seen == [[3, 5]]
        await batches.close()

    running(test)


# Requests that get no answer


def test_a_deadline_that_passes_while_a_batch_runs_fails_the_caller_at_once_and_spares_the_engine():
    async def test():
        gate, events = Gate(), Events()
        batches = batcher(events)
        running_batch = asyncio.create_task(batches.submit(numbered(1), gate))
        await begun(gate)
        with pytest.raises(DeadlineExpired, match="3 of 3 images still waiting"):
            await batches.submit(numbered(7, 8, 9), gate, time.monotonic() + 0.01)
        assert not running_batch.done()  # so the answer did not wait for the batch
        gate.permits.release(5)
        await running_batch
        await batches.close()
        assert gate.seen == [[1]]
        assert (events.expired, events.spared) == (1, 3)

    running(test)


def test_a_deadline_in_the_past_fails_at_once():
    async def test():
        gate, events = Gate(open_=True), Events()
        batches = batcher(events, max_queue_delay=60.0)
        with pytest.raises(DeadlineExpired):
            await batches.submit(numbered(1), gate, time.monotonic() - 1)
        await batches.close()
        assert gate.seen == []
        assert (events.expired, events.spared) == (1, 1)

    running(test)


def test_pieces_of_a_large_request_that_have_not_begun_are_dropped_at_its_deadline():
    async def test():
        gate, events = Gate(), Events()
        batches = batcher(events)
        with pytest.raises(DeadlineExpired, match="6 of 10"):
            await batches.submit(numbered(*range(10)), gate, time.monotonic() + 0.05)
        gate.permits.release(5)
        assert rows(await batches.submit(numbered(77), gate)) == [77]
        await batches.close()
        assert gate.seen == [[0, 1, 2, 3], [77]]
        assert events.spared == 6

    running(test)


def test_a_cancelled_request_never_reaches_the_engine():
    async def test():
        gate, events = Gate(), Events()
        batches = batcher(events)
        first = asyncio.create_task(batches.submit(numbered(1), gate))
        await begun(gate)
        second = asyncio.create_task(batches.submit(numbered(2, 3), gate))
        third = asyncio.create_task(batches.submit(numbered(4), gate))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        gate.permits.release(5)
        assert rows(await first) == [1]
        assert rows(await third) == [4]
        with pytest.raises(asyncio.CancelledError):
            await second
        await batches.close()
        assert gate.seen == [[1], [4]]
        assert (events.cancelled, events.spared) == (1, 2)

    running(test)


def test_a_request_cancelled_at_the_moment_of_its_deadline_is_counted_once():
    async def test():
        gate, events = Gate(), Events()
        batches = batcher(events)
        first = asyncio.create_task(batches.submit(numbered(1), gate))
        await begun(gate)
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + 0.05
        second = asyncio.create_task(batches.submit(numbered(2, 3), gate, deadline))
        await asyncio.sleep(0)
        loop.call_at(deadline + 0.01, second.cancel)
        time.sleep(0.1)  # both are due in one turn of the loop: the deadline, then the cancellation
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.permits.release(5)
        assert rows(await first) == [1]
        await batches.close()
        assert (events.expired, events.cancelled, events.spared) == (1, 0, 2)

    running(test)


def test_an_error_fails_its_own_batch_and_no_other():
    async def test():
        events = Events()
        batches = batcher(events)

        def compute(images: Images, *, alone: bool) -> Outputs:
            if 13 in images:
                raise RuntimeError("unlucky")
            return images.astype(np.float32), images.astype(np.float32) * 2

        with pytest.raises(EngineFailed) as caught:
            await batches.submit(numbered(1, 2, 3, 4, 13), compute)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert rows(await batches.submit(numbered(5), compute)) == [5]
        await batches.close()
        assert events.failed == 1

    running(test)


def test_a_request_beyond_the_limit_of_images_is_refused_at_once_with_a_time_to_retry():
    async def test():
        events = Events()
        batches = batcher(events, max_images=10)
        with batches.admit(7, 100):
            with pytest.raises(Overloaded, match=r"holds 7 images .* may hold 10") as caught:
                batches.admit(4, 100)
            assert 0.02 <= caught.value.retry_after <= 5
            with batches.admit(3, 100):
                assert batches.admitted_images == 10
        with batches.admit(10, 100):
            pass
        await batches.close()
        assert events.rejected == 1

    running(test)


def test_a_request_beyond_the_limit_of_bytes_is_refused():
    async def test():
        batches = batcher(max_bytes=1000)
        with batches.admit(1, 900), pytest.raises(Overloaded, match=r"900 bytes\) and may hold .*\(1000 bytes"):
            batches.admit(1, 101)
        assert batches.admitted_bytes == 0
        await batches.close()

    running(test)


def test_a_request_without_images_is_a_programming_error():
    async def test():
        batches = batcher()
        with pytest.raises(ValueError, match="no images"):
            await batches.submit(numbered(), Gate(open_=True))
        await batches.close()

    running(test)


def test_closing_computes_what_is_queued():
    async def test():
        gate = Gate()
        batches = batcher()
        tasks = [asyncio.create_task(batches.submit(numbered(number), gate)) for number in range(9)]
        await begun(gate)
        closing = asyncio.create_task(batches.close())
        gate.permits.release(10)
        assert [rows(await task) for task in tasks] == [[number] for number in range(9)]
        await closing

    running(test)


# For any sequence


Action = tuple[str, int]


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(1, 11)),
            st.tuples(st.just("expire"), st.integers(1, 11)),
            st.tuples(st.just("cancel"), st.integers(0, 30)),
            st.tuples(st.just("release"), st.integers(1, 3)),
        ),
        max_size=25,
    ),
    st.integers(1, 6),
    st.integers(1, 3),
)
def test_every_live_request_is_answered_once_with_its_own_images_in_order(
    actions: list[Action], max_batch_size: int, threads: int
):
    async def test():
        gate, events = Gate(), Events()
        batches = batcher(events, max_batch_size=max_batch_size, max_images=255, threads=threads)
        requests: list[tuple[list[int], asyncio.Task[Outputs]]] = []
        number = 0

        async def ask(numbers: list[int], deadline: float | None) -> Outputs:
            with batches.admit(len(numbers), len(numbers)):
                return await batches.submit(numbered(*numbers), gate, deadline)

        for action, size in actions:
            if action in ("submit", "expire") and number + size < 255:
                numbers = list(range(number, number + size))
                number += size
                deadline = time.monotonic() - 1 if action == "expire" else None
                requests.append((numbers, asyncio.create_task(ask(numbers, deadline))))
            elif action == "cancel" and requests:
                requests[size % len(requests)][1].cancel()
            elif action == "release":
                gate.permits.release(size)
            await asyncio.sleep(0)
        gate.permits.release(1000)
        outcomes = await asyncio.gather(*(task for _, task in requests), return_exceptions=True)
        await batches.close()

        seen = [image for batch in gate.seen for image in batch]
        assert len(seen) == len(set(seen))  # none twice
        assert all(len(batch) <= max_batch_size for batch in gate.seen)
        for (numbers, _), outcome in zip(requests, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, asyncio.CancelledError | DeadlineExpired)
                if isinstance(outcome, DeadlineExpired):
                    assert not set(numbers) & set(seen)
            else:
                assert rows(outcome) == numbers
        assert batches.admitted_images == batches.admitted_bytes == batches.waiting_images == 0

    running(test)


# Several threads


def test_a_second_thread_computes_only_while_more_than_two_batches_wait():
    async def test():
        gate, events = Gate(), Events()
        batches = batcher(events, threads=2)
        tasks = [asyncio.create_task(batches.submit(numbered(0), gate))]
        await begun(gate)
        tasks += [asyncio.create_task(batches.submit(numbered(number), gate)) for number in range(1, 8)]
        await asyncio.sleep(0.1)
        assert gate.seen == [[0]]  # seven wait, less than two batches of four
        tasks.append(asyncio.create_task(batches.submit(numbered(8, 9, 10, 11, 12), gate)))
        await begun(gate)
        assert gate.seen == [[0], [1, 2, 3, 4]]  # while the first is still being computed
        assert gate.alone == [True, False]
        gate.permits.release(100)
        answers = [rows(await task) for task in tasks]
        assert answers == [*([number] for number in range(8)), [8, 9, 10, 11, 12]]
        await batches.close()
        assert sorted(number for batch in gate.seen for number in batch) == list(range(13))
        assert max(events.batches) <= 4

    running(test)
