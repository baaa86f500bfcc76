"""Batches that form from requests: sizes, delays, turns, several models and several threads."""

import asyncio
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.queue import Outputs
from service.errors import DeadlineExpired
from tests.service.core.batching import Events, Gate, batcher, begun, numbered, rows, run

# Forming batches


def test_requests_that_wait_while_the_engine_is_busy_become_one_batch():
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

    run(test)


def test_an_idle_engine_computes_a_single_image_at_once():
    async def test():
        gate = Gate(open_=True)
        batches = batcher(max_batch_size=32)
        assert rows(await batches.submit(numbered(1), gate)) == [1]
        await batches.close()

    run(test)


def test_an_idle_engine_waits_for_a_full_batch_if_a_delay_is_allowed():
    async def test():
        gate = Gate(open_=True)
        batches = batcher(max_batch_size=3, max_queue_delay=60.0)
        answers = await asyncio.gather(*(batches.submit(numbered(number), gate) for number in (1, 2, 3)))
        assert [rows(answer) for answer in answers] == [[1], [2], [3]]
        assert gate.seen == [[1, 2, 3]]
        await batches.close()

    run(test)


def test_a_batch_that_does_not_fill_is_computed_when_its_oldest_request_has_waited_for_the_delay():
    async def test():
        gate = Gate(open_=True)
        batches = batcher(max_batch_size=3, max_queue_delay=0.05)
        started = time.monotonic()
        await batches.submit(numbered(1), gate)
        assert time.monotonic() - started >= 0.05
        await batches.close()

    run(test)


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

    run(test)


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

    run(test)


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

    run(test)


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
        assert len(seen) == len(set(seen))  # no image twice
        assert all(len(batch) <= max_batch_size for batch in gate.seen)
        for (numbers, _), outcome in zip(requests, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, asyncio.CancelledError | DeadlineExpired)
                if isinstance(outcome, DeadlineExpired):
                    assert not set(numbers) & set(seen)
            else:
                assert rows(outcome) == numbers
        assert batches.admitted_images == batches.admitted_bytes == batches.waiting_images == 0

    run(test)


# Several threads


def test_a_second_thread_computes_as_soon_as_a_whole_batch_waits():
    async def test():
        gate, events = Gate(), Events()
        batches = batcher(events, threads=2)
        tasks = [asyncio.create_task(batches.submit(numbered(0), gate))]
        await begun(gate)
        tasks += [asyncio.create_task(batches.submit(numbered(number), gate)) for number in range(1, 4)]
        await asyncio.sleep(0.1)
        assert gate.seen == [[0]]  # three wait, less than a batch of four
        tasks.append(asyncio.create_task(batches.submit(numbered(4, 5, 6, 7, 8), gate)))
        await begun(gate)
        assert gate.seen == [[0], [1, 2, 3, 4]]  # while the first is still being computed
        assert gate.alone == [True, False]
        gate.permits.release(100)
        answers = [rows(await task) for task in tasks]
        assert answers == [[0], [1], [2], [3], [4, 5, 6, 7, 8]]
        await batches.close()
        assert sorted(number for batch in gate.seen for number in batch) == list(range(9))
        assert max(events.batches) <= 4

    run(test)


def test_images_that_are_too_few_for_two_batches_are_computed_in_one_on_all_cores():
    async def test():
        gate = Gate(open_=True)
        batches = batcher(threads=2, max_batch_size=64)
        numbers = list(range(40))
        assert rows(await batches.submit(numbered(*numbers), gate)) == numbers
        assert gate.seen == [numbers]
        assert gate.alone == [True]
        await batches.close()

    run(test)


def test_many_waiting_images_are_shared_among_the_free_threads_and_none_of_the_batches_uses_all_cores():
    async def test():
        gate = Gate()
        batches = batcher(threads=2, max_batch_size=64)
        numbers = list(range(80))
        task = asyncio.create_task(batches.submit(numbered(*numbers), gate))
        await begun(gate, 2)
        assert sorted(len(batch) for batch in gate.seen) == [40, 40]
        assert gate.alone == [False, False]
        gate.permits.release(2)
        assert rows(await task) == numbers
        await batches.close()

    run(test)


def test_while_other_parts_of_the_server_use_the_cores_each_batch_takes_one_and_fewer_images_are_shared():
    async def test():
        gate, busy = Gate(), 1
        batches = batcher(threads=2, max_batch_size=64, busy_cores=lambda: busy)
        task = asyncio.create_task(batches.submit(numbered(*range(20)), gate))
        await begun(gate, 2)
        assert sorted(len(batch) for batch in gate.seen) == [10, 10]
        assert gate.alone == [False, False]
        gate.permits.release(2)
        await task
        gate.permits.release(2)
        await batches.submit(numbered(*range(7)), gate)
        assert (gate.seen[2], gate.alone[2]) == (list(range(7)), False)
        busy = 0
        await batches.submit(numbered(*range(20)), gate)
        assert (gate.seen[3], gate.alone[3]) == (list(range(20)), True)
        await batches.close()

    run(test)


def test_a_batch_uses_all_cores_unless_others_leave_at_most_one():
    async def test():
        busy = 0
        batches = batcher(threads=4, max_batch_size=64, busy_cores=lambda: busy)
        for busy, alone in ((0, True), (1, True), (2, True), (3, False), (4, False)):  # noqa: B007 -- read above
            gate = Gate(open_=True)
            await batches.submit(numbered(*range(7)), gate)
            assert gate.alone == [alone]
        await batches.close()

    run(test)


def test_how_long_batches_run_is_counted_from_the_oldest_one():
    async def test():
        gate = Gate()
        batches = batcher(threads=2)
        tasks = [asyncio.create_task(batches.submit(numbered(0), gate))]
        await begun(gate)
        await asyncio.sleep(0.2)
        tasks.append(asyncio.create_task(batches.submit(numbered(1, 2, 3, 4), gate)))
        await begun(gate)  # beside the first
        assert batches.running_seconds() >= 0.2
        gate.permits.release(2)
        await asyncio.gather(*tasks)
        await batches.close()

    run(test)
