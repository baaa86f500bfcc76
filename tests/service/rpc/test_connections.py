import asyncio
import contextlib
import time

import grpc
import pytest

from service.core.metrics import Metrics
from service.errors import Overloaded
from service.rpc import connections, streams
from service.rpc.calls import Call, Calls
from service.rpc.connections import Connections
from service.rpc.statuses import Failure


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_connection_that_reads_none_of_its_answers_is_refused_after_a_while(clock):
    known = Connections()
    known.sending("a", 100)
    clock[0] += connections.MAX_UNREAD_SECONDS
    known.check("a")
    clock[0] += 0.1
    with pytest.raises(Overloaded, match="1 answers on this connection have not been read"):
        known.check("a")
    known.check("b")
    known.sent("a", 100)
    known.check("a")


def test_a_connection_that_reads_slowly_but_steadily_is_served(clock):
    known = Connections()
    for _ in range(5):
        known.sending("a", 100)
    for _ in range(4):
        clock[0] += connections.MAX_UNREAD_SECONDS - 1
        known.sent("a", 100)
        known.check("a")


def test_while_many_bytes_are_unread_a_connection_has_less_time(clock):
    known = Connections()
    known.sending("a", connections.MAX_UNREAD_BYTES + 1)
    known.sending("b", 10)
    clock[0] += connections.MAX_UNREAD_SECONDS_WHEN_FULL + 0.1
    for name in "ab":
        with pytest.raises(Overloaded):
            known.check(name)
    known.check("c")


def test_once_many_bytes_are_unread_answers_to_connections_with_unread_ones_are_refused():
    known = Connections()
    known.sending("a", connections.MAX_UNREAD_BYTES + 1)
    with pytest.raises(Overloaded):
        known.check_answer("a")
    known.check_answer("b")
    known.sent("a", connections.MAX_UNREAD_BYTES + 1)
    known.check_answer("a")


def test_all_connections_are_held_if_each_recent_caller_has_a_waiting_call(clock):
    known = Connections()
    known.check("long ago")
    clock[0] += 100
    assert known.all_held(since=1050.0)
    known.check("a")
    known.check("b")
    with known.held("a"):
        assert not known.all_held(since=1050.0)
        with known.held("b"):
            assert known.all_held(since=1050.0)
    assert not known.all_held(since=1050.0)


def test_a_limited_number_of_connections_is_remembered(monkeypatch):
    monkeypatch.setattr(connections, "MAX_REMEMBERED", 3)
    known = Connections()
    for number in range(10):
        known.check(f"{number}")
    assert list(known._last_call) == ["7", "8", "9"]


def test_long_calls_are_limited_on_each_connection_and_in_total():
    calls = streams.LongCalls()
    with contextlib.ExitStack() as stack:
        for number in range(streams.MAX_LONG_CALLS):
            connection = f"{number // streams.MAX_LONG_CALLS_PER_CONNECTION}"
            stack.enter_context(calls.enter(connection))
            if number == streams.MAX_LONG_CALLS_PER_CONNECTION - 1:
                with pytest.raises(Overloaded), calls.enter(connection):
                    pass
        with pytest.raises(Overloaded), calls.enter("another"):
            pass
    assert not calls._open
    with calls.enter("another"):
        pass


def test_a_call_gets_an_error_in_place_of_its_answer_once_many_bytes_are_unread():
    async def test() -> None:
        known = Connections()
        calls = Calls(Metrics(), None, known)  # type: ignore[arg-type]

        async def behaviour(request: object, call: Call) -> object:
            known.sending("a", connections.MAX_UNREAD_BYTES + 1)  # of another call, meanwhile
            return "answer"

        with pytest.raises(Failure) as caught:
            await calls.answer(behaviour, "request", Call("service/Method", "a", None, 1, None))  # type: ignore[arg-type]
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert calls.answered == 0

    asyncio.run(test())
