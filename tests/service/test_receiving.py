"""Slots for receiving messages, with sources whose messages arrive when the test says so."""

import asyncio
from collections.abc import Callable

import grpc
import pytest

from service import receiving
from service.errors import DeadlineExpired, Overloaded
from service.receiving import Receiver


class Sender:
    """A source. The message arrives when `arrive` is called."""

    def __init__(self) -> None:
        self.reading = asyncio.Event()
        self._messages: asyncio.Queue[object] = asyncio.Queue()

    async def read(self) -> object:
        self.reading.set()
        return await self._messages.get()

    def arrive(self, message: object = b"message") -> "Sender":
        self._messages.put_nowait(message)
        return self


def receiver(**options: object) -> Receiver:
    values = {"slots": 2, "per_connection": 2, "max_waiting": 10, "seconds": 60.0, **options}
    return Receiver(**values)  # type: ignore[arg-type]


def running(test: Callable[[], object]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


async def begin(read: "asyncio.Task[object]", sender: Sender) -> None:
    await asyncio.wait((read, asyncio.create_task(sender.reading.wait())), return_when=asyncio.FIRST_COMPLETED)


def test_a_message_that_has_arrived_is_read_at_once_and_frees_its_slot():
    async def test():
        slots = receiver(slots=1)
        for _ in range(3):
            assert await slots.read(Sender().arrive(), "a") == b"message"
        assert await slots.read(Sender().arrive(grpc.aio.EOF), "a") is grpc.aio.EOF

    running(test)


def test_no_more_messages_are_read_at_once_than_there_are_slots():
    async def test():
        slots = receiver(slots=2)
        senders = [Sender() for _ in range(4)]
        reads = [asyncio.create_task(slots.read(sender, name)) for sender, name in zip(senders, "abcd", strict=True)]
        for read, sender in zip(reads[:2], senders[:2], strict=True):
            await begin(read, sender)
        await asyncio.sleep(0.05)
        assert [sender.reading.is_set() for sender in senders] == [True, True, False, False]
        for sender in senders:
            sender.arrive()
        assert await asyncio.gather(*reads) == [b"message"] * 4

    running(test)


def test_one_connection_cannot_take_all_slots():
    async def test():
        slots = receiver(slots=3, per_connection=2)
        greedy = [Sender() for _ in range(5)]
        reads = [asyncio.create_task(slots.read(sender, "greedy")) for sender in greedy]
        await asyncio.sleep(0.05)
        assert sum(sender.reading.is_set() for sender in greedy) == 2
        # A call of another connection passes calls that wait only because of the limit of their connection.
        other = asyncio.create_task(slots.read(Sender().arrive(), "other"))
        assert await other == b"message"
        for read in reads:
            read.cancel()

    running(test)


def test_a_connection_with_all_its_slots_taken_delays_no_other_connection():
    async def test():
        slots = receiver(slots=3, per_connection=1)
        stalled = [asyncio.create_task(slots.read(Sender(), "stalled")) for _ in range(5)]
        await asyncio.sleep(0.01)
        # One of them is being received and four wait, although two slots are free.
        assert await asyncio.wait_for(slots.read(Sender().arrive(), "honest"), 0.5) == b"message"
        async with slots.stream("stream") as slot:
            assert await slots.read_stream(Sender().arrive(), slot) == b"message"
        slow = Sender()
        upload = asyncio.create_task(slots.read(slow, "slow"))
        await asyncio.sleep(2 * receiving.CONTENDED_SECONDS)  # nor does it shorten the time of others
        slow.arrive()
        assert await upload == b"message"
        for read in stalled:
            read.cancel()

    running(test)


def test_cancelled_calls_leave_nothing_in_the_queue():
    async def test():
        slots = receiver(slots=1, max_waiting=1000)
        occupying = Sender()
        first = asyncio.create_task(slots.read(occupying, "occupying"))
        await begin(first, occupying)
        waiting = [asyncio.create_task(slots.read(Sender(), f"{number % 7}")) for number in range(100)]
        await asyncio.sleep(0.01)
        for call in waiting:
            call.cancel()
        await asyncio.wait(waiting)
        assert not slots._queues
        occupying.arrive()
        assert await first == b"message"
        assert await slots.read(Sender().arrive(), "a") == b"message"

    running(test)


def test_a_stream_that_waits_for_its_answers_is_not_idle(monkeypatch):
    monkeypatch.setattr(receiving, "CONTENDED_STREAM_SECONDS", 0.2)

    async def test():
        slots = receiver(slots=2, per_connection=2)

        async def stream(unanswered: int) -> None:
            async with slots.stream("stream") as slot:
                slot.unanswered = unanswered
                await slots.read_stream(Sender(), slot)

        waiting = asyncio.create_task(stream(1))
        await asyncio.sleep(0)
        for _ in range(20):
            with pytest.raises(Overloaded):
                async with slots.stream("another"):
                    pass
            await asyncio.sleep(0.05)
        assert not waiting.done()
        waiting.cancel()

    running(test)


def test_a_stalled_message_is_ended_after_the_time_limit_and_counted():
    async def test():
        timeouts = []
        slots = receiver(seconds=0.05, on_timeout=lambda: timeouts.append(1))
        with pytest.raises(DeadlineExpired, match="did not arrive within"):
            await slots.read(Sender(), "a")
        assert timeouts == [1]
        assert await slots.read(Sender().arrive(), "a") == b"message"  # its slot is free again

    running(test)


def test_stalled_messages_are_ended_sooner_while_others_wait(monkeypatch):
    monkeypatch.setattr(receiving, "CONTENDED_SECONDS", 0.05)

    async def test():
        slots = receiver(slots=1, seconds=3600.0)
        stalled = asyncio.create_task(slots.read(Sender(), "stalled"))
        await asyncio.sleep(0.01)
        assert await slots.read(Sender().arrive(), "honest") == b"message"
        with pytest.raises(DeadlineExpired):
            await stalled

    running(test)


def test_proven_connections_are_served_before_new_ones_and_new_ones_before_those_that_stalled(monkeypatch):
    monkeypatch.setattr(receiving, "CONTENDED_SECONDS", 0.2)

    async def test():
        slots = receiver(slots=1, seconds=0.05)
        assert await slots.read(Sender().arrive(), "known")
        with pytest.raises(DeadlineExpired):
            await slots.read(Sender(), "stalled")
        occupying = Sender()
        first = asyncio.create_task(slots.read(occupying, "occupying"))
        await begin(first, occupying)
        order: list[str] = []

        async def read(name: str) -> None:
            await slots.read(Sender().arrive(), name)
            order.append(name)

        tasks = []
        for name in ("stalled", "new", "known"):
            tasks.append(asyncio.create_task(read(name)))
            await asyncio.sleep(0)
        occupying.arrive()
        await asyncio.gather(first, *tasks)
        assert order == ["known", "new", "stalled"]

    running(test)


def test_a_cancelled_call_gives_its_place_in_the_queue_to_the_next():
    async def test():
        slots = receiver(slots=1)
        occupying = Sender()
        first = asyncio.create_task(slots.read(occupying, "a"))
        await begin(first, occupying)
        cancelled = asyncio.create_task(slots.read(Sender(), "b"))
        next_one = asyncio.create_task(slots.read(Sender().arrive(), "c"))
        await asyncio.sleep(0)
        cancelled.cancel()
        occupying.arrive()
        assert await next_one == b"message"
        # Cancelled at the moment at which it got the slot:
        occupying = Sender()
        first = asyncio.create_task(slots.read(occupying, "a"))
        await begin(first, occupying)
        cancelled = asyncio.create_task(slots.read(Sender(), "b"))
        await asyncio.sleep(0)
        occupying.arrive()
        await first
        cancelled.cancel()
        assert await slots.read(Sender().arrive(), "c") == b"message"

    running(test)


def test_calls_beyond_the_largest_waiting_number_are_refused_with_a_retry_hint():
    async def test():
        slots = receiver(slots=1, max_waiting=2)
        reads = [asyncio.create_task(slots.read(Sender(), name)) for name in "abc"]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded) as caught:
            await slots.read(Sender().arrive(), "d")
        assert caught.value.retry_after == receiving.RETRY_SECONDS
        for read in reads:
            read.cancel()

    running(test)


def test_streams_hold_at_most_half_of_the_slots():
    async def test():
        slots = receiver(slots=4, per_connection=4)
        async with slots.stream("a") as slot, slots.stream("b"):
            with pytest.raises(Overloaded, match="streams is open already"):
                async with slots.stream("c"):
                    pass
            assert await slots.read_stream(Sender().arrive(), slot) == b"message"
            assert await slots.read(Sender().arrive(), "c") == b"message"
        async with slots.stream("c"):
            pass

    running(test)


def test_an_idle_stream_is_ended_only_while_others_wait(monkeypatch):
    monkeypatch.setattr(receiving, "CONTENDED_STREAM_SECONDS", 0.05)

    async def test():
        slots = receiver(slots=2, per_connection=2, seconds=0.01)

        async def idle() -> None:
            async with slots.stream("idle") as slot:
                await slots.read_stream(Sender(), slot)

        stream = asyncio.create_task(idle())
        await asyncio.sleep(0.2)
        assert not stream.done()
        with pytest.raises(Overloaded):
            async with slots.stream("another"):
                pass
        with pytest.raises(DeadlineExpired):
            await stream
        async with slots.stream("another"):
            pass

    running(test)


def test_the_behaviour_of_a_limited_number_of_connections_is_remembered(monkeypatch):
    monkeypatch.setattr(receiving, "MAX_REMEMBERED", 3)

    async def test():
        slots = receiver()
        for number in range(10):
            await slots.read(Sender().arrive(), f"{number}")
        assert list(slots._behaviour) == ["7", "8", "9"]

    running(test)


def test_a_receiver_with_a_single_slot_takes_a_stream_too():
    async def test():
        slots = receiver(slots=1, per_connection=1)
        async with slots.stream("a") as slot:
            assert await slots.read_stream(Sender().arrive(), slot) == b"message"

    running(test)


def test_among_equals_the_connection_with_the_fewest_slots_is_served_first():
    async def test():
        slots, order = receiver(slots=3, per_connection=3), []
        senders = [Sender() for _ in range(3)]
        reads = [asyncio.create_task(slots.read(sender, name)) for sender, name in zip(senders, "aac", strict=True)]
        for first, sender in zip(reads, senders, strict=True):
            await begin(first, sender)

        async def read(name: str) -> None:
            await slots.read(Sender().arrive(), name)
            order.append(name)

        tasks = []
        for name in "ab":
            tasks.append(asyncio.create_task(read(name)))
            await asyncio.sleep(0)
        senders[2].arrive()
        await asyncio.gather(*tasks)
        assert order == ["b", "a"]
        for first in reads:
            first.cancel()

    running(test)


def test_connections_that_are_equal_take_turns():
    async def test():
        slots, order = receiver(slots=1), []

        async def read(name: str) -> None:
            await slots.read(Sender().arrive(), name)
            order.append(name)

        await read("a")
        await read("b")
        occupying, tasks = Sender(), []
        first = asyncio.create_task(slots.read(occupying, "c"))
        await begin(first, occupying)
        for name in "aaabb":
            tasks.append(asyncio.create_task(read(name)))
            await asyncio.sleep(0)
        occupying.arrive()
        await asyncio.gather(first, *tasks)
        assert "".join(order) == "ab" + "ababa"

    running(test)
