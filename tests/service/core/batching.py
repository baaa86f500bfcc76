"""A batcher for tests, a computation that waits for permits, and an observer that records events."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np

from service.core.batcher import Batcher
from service.core.queue import Images, Outputs


class Events:
    """An observer that records everything."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.failed = self.rejected = self.dropped = self.spared = 0

    def on_batch(self, images: int, queued_seconds: Sequence[float], seconds: float, failed: bool) -> None:
        self.batches.append(images)
        self.failed += failed

    def on_rejected(self, images: int) -> None:
        self.rejected += 1

    def on_dropped(self, images: int) -> None:
        self.dropped += 1
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
    """Images that differ in their first byte."""
    return np.array(numbers, np.uint8).reshape(-1, 1)


def batcher(events: Events | None = None, **options: object) -> Batcher:
    sizes = {"max_batch_size": 4, "max_images": 1000, "max_bytes": 10**6, **options}
    return Batcher(observer=events or Events(), **sizes)  # type: ignore[arg-type]


def run(test: Callable[[], object]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


def rows(outputs: Outputs) -> list[int]:
    assert (outputs[1] == outputs[0] * 2).all()
    return outputs[0][:, 0].astype(int).tolist()


async def begun(gate: Gate, times: int = 1) -> None:
    await asyncio.get_running_loop().run_in_executor(None, gate.wait_until_begun, times)
