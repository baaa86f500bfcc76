"""Threads that share requests go on when one of them is interrupted, as by Ctrl-C or a signal handler that raises."""

import itertools
import linecache
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest

from service.client import packing, sync_sharing
from service.client.retrying import Deadline, RequestFailed
from service.client.sync_sharing import SyncSharing
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from tests.service.client.scripted import CAPACITY, answer, content_of


def test_a_thread_that_is_interrupted_while_it_sends_lets_the_others_try_again():
    go_on = threading.Event()
    outcomes: list[object] = []

    def send(request: messages.ClassifyRequest, _: Deadline) -> messages.ClassifyResponse:
        if not go_on.is_set():
            go_on.wait(30)
            raise KeyboardInterrupt
        return answer(request)

    sharing = SyncSharing(1, send, lambda: CAPACITY)

    def call(number: int) -> None:
        try:
            outcomes.append(sharing.exchange(content_of(number, 1, False)[0], Deadline(30)))
        except (KeyboardInterrupt, RequestFailed) as error:
            outcomes.append(error)

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(call, number) for number in range(1, 5)]
        time.sleep(0.2)  # one of them sends, three wait for the slot
        go_on.set()
        for one in waiting:
            one.result(30)
    interrupted = [one for one in outcomes if isinstance(one, KeyboardInterrupt)]
    failed = [one for one in outcomes if isinstance(one, RequestFailed)]
    assert len(interrupted) == 1
    assert all(one.temporary for one in failed)
    assert sharing.exchange(content_of(9, 1, False)[0], Deadline(30)).model_version


def test_a_thread_that_is_interrupted_before_it_sends_leaves_no_slot_taken(monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    sharing = SyncSharing(1, lambda request, _: answer(request), lambda: CAPACITY)
    with monkeypatch.context() as patched:
        patched.setattr(sharing, "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sharing.exchange(content_of(0, 1, False)[0], Deadline(30))
    assert sharing.exchange(content_of(1, 1, False)[0], Deadline(5)).model_version


def test_threads_that_an_interrupted_one_did_not_wake_go_on_by_themselves(monkeypatch):
    sharing = SyncSharing(1, lambda request, _: answer(request), lambda: CAPACITY)
    monkeypatch.setattr(sync_sharing, "_wake", lambda entries: None)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(sharing.exchange, content_of(number, 1, False)[0], Deadline(30)) for number in range(3)]
        assert all(call.result(20).model_version for call in calls)


@pytest.mark.parametrize("others", [0, 2])
def test_an_exception_of_a_signal_handler_at_any_line_leaves_no_slot_taken_and_no_thread_behind(monkeypatch, others):
    monkeypatch.setattr(sync_sharing, "_MAX_WAIT_SECONDS", 0.02)
    for point in itertools.count():
        sharing = SyncSharing(1, lambda request, _: answer(request), lambda: CAPACITY)
        with ThreadPoolExecutor(max(others, 1)) as pool:
            waiting = [pool.submit(_repeated, sharing, number) for number in range(others)]
            interrupted = _interrupted_at(point, sharing)
            assert all(one.result(20) for one in waiting)
        assert _repeated(sharing, 9)
        if not interrupted:
            break
    assert point > 30


def _repeated(sharing: SyncSharing, number: int) -> str:
    """The version of the model that answers. As in a client, an attempt that another thread ended is repeated."""
    for _ in range(100):
        try:
            return sharing.exchange(content_of(number, 1, False)[0], Deadline(5)).model_version
        except RequestFailed as failure:
            if not failure.temporary:
                raise
    raise AssertionError("no attempt succeeded")


def _interrupted_at(point: int, sharing: SyncSharing) -> bool:
    """Whether a call came to its line number `point` in the modules under test, where it was interrupted."""
    lines = itertools.count()
    raised = False

    def trace_lines(frame: FrameType, event: str, _: object) -> object:
        nonlocal raised
        # A signal handler cannot run between the acquisition of a lock and the block that releases it.
        is_lock = "with self._lock" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not is_lock and next(lines) == point:
            raised = True
            raise KeyboardInterrupt
        return trace_lines

    def trace_calls(frame: FrameType, event: str, argument: object) -> object:
        is_ours = frame.f_code.co_filename in (sync_sharing.__file__, packing.__file__)
        return trace_lines(frame, event, argument) if is_ours else None

    before = sys.gettrace()
    sys.settrace(trace_calls)
    try:
        sharing.exchange(content_of(8, 1, False)[0], Deadline(30))
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return raised
