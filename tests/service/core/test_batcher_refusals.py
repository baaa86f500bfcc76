"""Requests that get no answer: deadlines, cancellation, errors of the computation, and limits."""

import asyncio
import time

import numpy as np
import pytest

from service.core.queue import Images, Outputs
from service.errors import DeadlineExpired, EngineFailed, Overloaded
from tests.service.core.batching import Events, Gate, batcher, begun, numbered, rows, run


def test_a_deadline_that_passes_while_a_batch_runs_fails_the_call_at_once_and_its_images_are_not_computed():
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
        assert (events.dropped, events.spared) == (1, 3)

    run(test)


def test_a_deadline_in_the_past_fails_at_once():
    async def test():
        gate, events = Gate(open_=True), Events()
        batches = batcher(events, max_queue_delay=60.0)
        with pytest.raises(DeadlineExpired):
            await batches.submit(numbered(1), gate, time.monotonic() - 1)
        await batches.close()
        assert gate.seen == []
        assert (events.dropped, events.spared) == (1, 1)

    run(test)


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

    run(test)


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
        assert (events.dropped, events.spared) == (1, 2)

    run(test)


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
        assert (events.dropped, events.spared) == (1, 2)

    run(test)


def test_an_error_fails_only_its_own_batch():
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

    run(test)


def test_a_request_beyond_the_limit_of_images_is_refused_at_once_with_a_retry_hint():
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

    run(test)


def test_a_request_beyond_the_limit_of_bytes_is_refused():
    async def test():
        batches = batcher(max_bytes=1000)
        with batches.admit(1, 900), pytest.raises(Overloaded, match=r"900 bytes\) and may hold .*\(1000 bytes"):
            batches.admit(1, 101)
        assert batches.admitted_bytes == 0
        await batches.close()

    run(test)


def test_a_request_without_images_is_a_programming_error():
    async def test():
        batches = batcher()
        with pytest.raises(ValueError, match="no images"):
            await batches.submit(numbered(), Gate(open_=True))
        await batches.close()

    run(test)


def test_closing_computes_the_queued_images_first():
    async def test():
        gate = Gate()
        batches = batcher()
        tasks = [asyncio.create_task(batches.submit(numbered(number), gate)) for number in range(9)]
        await begun(gate)
        closing = asyncio.create_task(batches.close())
        gate.permits.release(10)
        assert [rows(await task) for task in tasks] == [[number] for number in range(9)]
        await closing

    run(test)


def test_images_of_a_failed_request_that_still_wait_are_not_computed():
    async def test():
        gate, seen = Gate(), []
        batches = batcher()

        def compute(images: Images, *, alone: bool) -> Outputs:
            seen.append(images[:, 0].tolist())
            if len(seen) == 1:
                raise RuntimeError("unlucky")
            return gate(images, alone=alone)

        with pytest.raises(EngineFailed):  # while the engine computes the second piece
            await batches.submit(numbered(*range(12)), compute)
        assert batches.waiting_images == 0
        gate.permits.release(5)
        await batches.close()
        assert [8, 9, 10, 11] not in seen

    run(test)


def test_requests_of_exactly_as_many_bytes_as_allowed_are_admitted():
    async def test():
        batches = batcher(max_bytes=1000)
        with batches.admit(1, 900), batches.admit(1, 100):
            assert batches.admitted_bytes == 1000
        await batches.close()

    run(test)


@pytest.mark.parametrize(("held", "least", "most"), [(10, 0.02, 0.1), (2000, 0.5, 2), (10**6, 5, 5)])
def test_the_retry_hint_grows_with_the_number_of_images_that_are_held(held: int, least: float, most: float):
    async def test():
        batches = batcher(max_images=held)
        with batches.admit(held, 1), pytest.raises(Overloaded) as caught:
            batches.admit(1, 1)
        assert least <= caught.value.retry_after <= most
        await batches.close()

    run(test)
