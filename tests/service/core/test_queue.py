import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.core.queue import Images, Queue, Request, compute_pieces, hand_out


def numbered(*numbers: int) -> Images:
    """Images that differ in their first byte."""
    return np.array(numbers, np.uint8).reshape(-1, 1)


def a_request(images: int, deadline: float | None, compute: object) -> Request:
    return Request(numbered(*range(images)), compute, deadline, 0.0)  # type: ignore[arg-type]


class AnySequence(RuleBasedStateMachine):
    """Arrivals, batches, cancellations and passing deadlines in any order, on a simulated clock."""

    @initialize(max_batch_size=st.integers(1, 7))
    def begin(self, max_batch_size: int) -> None:
        self.queue = Queue(max_batch_size)
        self.now = 0.0
        self.waiting: dict[Request, int] = {}  # with how many images were taken

    @rule(
        images=st.integers(1, 20),
        lifetime=st.none() | st.floats(0.0, 5.0),
        compute=st.sampled_from(["old", "new"]),
    )
    def arrive(self, images: int, lifetime: float | None, compute: str) -> None:
        request = a_request(images, None if lifetime is None else self.now + lifetime, compute)
        self.queue.put(request)
        self.waiting[request] = 0

    @rule(seconds=st.floats(0.0, 2.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(list(self.waiting)))
        unseen = self.queue.drop(request)
        assert unseen == len(request.images) - self.waiting.pop(request)
        assert self.queue.drop(request) == 0

    @rule()
    def take(self) -> None:
        pieces = self.queue.take(self.now)
        live = [request for request in self.waiting if request.deadline is None or request.deadline > self.now]
        assert bool(pieces) == bool(live)
        assert sum(piece.stop - piece.start for piece in pieces) <= self.queue.max_batch_size
        assert len({piece.request.compute for piece in pieces}) <= 1
        assert len({piece.request for piece in pieces}) == len(pieces)
        for piece in pieces:
            assert piece.request in live
            assert piece.start == self.waiting[piece.request]  # in order, without repeats or gaps
            assert piece.start < piece.stop
            self.waiting[piece.request] = piece.stop
            if piece.stop == len(piece.request.images):
                del self.waiting[piece.request]

    @precondition(lambda self: self.waiting)
    @rule()
    def everyone_without_a_deadline_is_served_in_the_end(self) -> None:
        turns = sum(len(request.images) for request in self.waiting)
        for _ in range(turns):
            self.take()
        assert all(request.deadline is not None for request in self.waiting)

    @invariant()
    def the_count_is_right(self) -> None:
        if hasattr(self, "queue"):
            assert self.queue.images == sum(len(request.images) - taken for request, taken in self.waiting.items())


TestAnySequence = AnySequence.TestCase


def test_a_piece_writes_only_its_own_rows():
    request = a_request(5, None, lambda images, alone: (images.astype(np.float32),))
    queue = Queue(2)
    queue.put(request)
    done = []
    while pieces := queue.take(0.0):
        done += hand_out(pieces, compute_pieces(pieces, alone=True))
    assert done == [request]
    assert request.outputs is not None
    assert request.outputs[0][:, 0].tolist() == [0, 1, 2, 3, 4]


def test_the_delay_is_counted_from_the_oldest_request():
    queue = Queue(8)
    for queued_at in (10.0, 13.0, 12.0):
        queue.put(Request(numbered(1), None, None, queued_at))  # type: ignore[arg-type]
    assert queue.ready_at(5.0) == 15.0


def test_the_delay_of_what_is_left_of_a_large_request_is_counted_from_its_arrival():
    queue = Queue(4)
    for images, queued_at in ((6, 0.0), (1, 50.0)):
        queue.put(Request(numbered(*range(images)), None, None, queued_at))  # type: ignore[arg-type]
    assert sum(piece.stop - piece.start for piece in queue.take(50.0)) == 4
    assert queue.ready_at(60.0) == 60.0
