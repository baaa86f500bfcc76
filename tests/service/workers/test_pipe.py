import asyncio
import os
import threading

import pytest

from service.workers.pipe import HEARTBEAT_SECONDS, Kind, Message, Receiver, Sender


@pytest.fixture
def ends():
    reading, writing = os.pipe()
    receiver, sender = Receiver(reading), Sender(writing)
    yield receiver, sender, writing
    os.close(reading)


def test_messages_arrive_in_order_and_whole(ends):
    receiver, sender, writing = ends
    assert receiver.receive() == []
    sender.send(Kind.READY)
    sender.send(Kind.HEALTHY)
    os.write(writing, b"stu")
    assert receiver.receive() == [Message(Kind.READY), Message(Kind.HEALTHY)]
    os.write(writing, b"ck \n")
    assert receiver.receive() == [Message(Kind.STUCK)]
    os.close(writing)
    assert receiver.receive() is None


def test_a_line_that_is_no_message_is_skipped(ends):
    receiver, sender, writing = ends
    os.write(writing, b"a library printed this\n")
    sender.send(Kind.HEALTHY)
    assert receiver.receive() == [Message(Kind.HEALTHY)]
    os.close(writing)


def test_a_reason_of_many_lines_becomes_one_line_and_a_long_one_is_cut(ends):
    receiver, sender, writing = ends
    sender.send(Kind.REFUSED, "no\nmodel  here")
    sender.send(Kind.REFUSED, "ä" * 10_000)
    first, second = receiver.receive()
    assert first == Message(Kind.REFUSED, "no model here")
    assert 1000 < len(second.reason) < 4096
    os.close(writing)


def test_a_supervisor_that_does_not_read_never_blocks_its_worker(ends):
    _, sender, writing = ends
    sending = threading.Thread(target=lambda: [sender.send(Kind.HEALTHY) for _ in range(20_000)], daemon=True)
    sending.start()
    sending.join(30)
    assert not sending.is_alive()
    os.close(writing)


def test_heartbeats_say_whether_the_engine_is_healthy(ends):
    receiver, sender, writing = ends
    answers = iter([True, *[False] * 100])
    received: list[Message] = []

    async def beat() -> None:
        beating = asyncio.create_task(sender.beat(lambda: next(answers)))
        while len(received) < 2:
            await asyncio.sleep(HEARTBEAT_SECONDS / 5)
            received.extend(receiver.receive())
        beating.cancel()

    asyncio.run(beat())
    assert received[:2] == [Message(Kind.HEALTHY), Message(Kind.STUCK)]
    os.close(writing)
