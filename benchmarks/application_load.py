"""An application that classifies many single images at once; prints its throughput and latencies as JSON.

    python benchmarks/application_load.py async --port 50051 --seconds 5 --concurrency 64

`application.py` starts it. Each caller repeats: choose an image, classify it alone, wait for the answer.
"""

import argparse
import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Probabilities = NDArray[np.float32]
POOL = 512
# Outputs of a batch differ in the last digits from those of an image alone.
TOLERANCE = 1e-3


class Record:
    """What the callers have seen.

    Args:
        seconds: Length of the measurement, after the warm-up.
        warmup: Seconds before it.
        expected: Probabilities of each image of the pool, if answers are checked.
        limit: Number of calls after which callers stop; None for no limit.
    """

    def __init__(self, seconds: float, warmup: float, expected: Probabilities | None, limit: int | None) -> None:
        self.begin = time.perf_counter() + warmup
        self.end = self.begin + seconds
        self.milliseconds: list[float] = []
        self.wrong = 0
        self.calls = 0
        self._expected, self._limit = expected, limit

    @property
    def goes_on(self) -> bool:
        """Whether callers make another call."""
        return time.perf_counter() < self.end and (self._limit is None or self.calls < self._limit)

    def add(self, index: int, started: float, answer: Probabilities) -> None:
        """Records the answer to one call."""
        now = time.perf_counter()
        self.calls += 1
        if self.begin <= started and now <= self.end:
            self.milliseconds.append(1000 * (now - started))
        if self._expected is not None and not np.allclose(answer, self._expected[index], atol=TOLERANCE):
            self.wrong += 1


async def call_all(classify: Callable[[Image], Awaitable[Probabilities]], concurrency: int, record: Record) -> None:
    """Runs the callers as tasks of one event loop."""
    images = pool()

    async def caller(seed: int) -> None:
        indices = np.random.default_rng(seed)
        while record.goes_on:
            index = int(indices.integers(POOL))
            started = time.perf_counter()
            record.add(index, started, await classify(images[index : index + 1]))

    async with asyncio.TaskGroup() as group:
        for seed in range(concurrency):
            group.create_task(caller(seed))


def pool() -> Image:
    """The images, uint8 [POOL, 32, 32, 3]."""
    return np.random.default_rng(0).integers(0, 256, (POOL, 32, 32, 3), dtype=np.uint8)


async def with_our_client(port: int, concurrency: int, record: Record, *, coalesce: bool) -> None:
    """Calls through `AsyncClient`."""
    from service.client import AsyncClient, Options

    async with AsyncClient(f"127.0.0.1:{port}", Options(coalesce=coalesce)) as client:

        async def classify(image: Image) -> Probabilities:
            answer: Probabilities = (await client.probabilities(image))[0]
            return answer

        await call_all(classify, concurrency, record)


async def with_tritonclient(port: int, concurrency: int, record: Record) -> None:
    """Calls through NVIDIA's client for asyncio, with the Open Inference Protocol."""
    import tritonclient.grpc.aio as triton

    async with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        outputs = [triton.InferRequestedOutput("probabilities")]

        async def classify(image: Image) -> Probabilities:
            tensor = triton.InferInput("images", image.shape, "UINT8")
            tensor.set_data_from_numpy(image)
            result = await client.infer("cifar10", [tensor], outputs=outputs)
            answer: Probabilities = result.as_numpy("probabilities")[0]
            return answer

        await call_all(classify, concurrency, record)


def with_threads(port: int, concurrency: int, record: Record) -> None:
    """Calls through one `Client` that all threads share."""
    from service.client import Client

    images = pool()
    lock = threading.Lock()
    with Client(f"127.0.0.1:{port}") as client:

        def caller(seed: int) -> None:
            indices = np.random.default_rng(seed)
            while record.goes_on:
                index = int(indices.integers(POOL))
                started = time.perf_counter()
                answer = client.probabilities(images[index : index + 1])[0]
                with lock:
                    record.add(index, started, answer)

        threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(concurrency)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def expected_of(model: Path) -> Probabilities:
    """Probabilities of the pool's images, computed by onnxruntime here."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    images = pool()
    rows: Probabilities = np.concatenate([session.run(["probabilities"], {"images": images[i : i + 1]})[0]
                                          for i in range(POOL)])  # fmt: skip
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=("async", "async-separate", "threads", "tritonclient"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--concurrency", type=int, default=64, help="number of callers; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0, help="length; default: %(default)s")
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds before it; default: %(default)s")
    parser.add_argument("--calls", type=int, help="stop after this many calls")
    parser.add_argument("--check", type=Path, help="ONNX file with which every answer is checked")
    given = parser.parse_args()
    expected = expected_of(given.check) if given.check else None
    record = Record(given.seconds, given.warmup, expected, given.calls)
    began = time.perf_counter()
    if given.client == "threads":
        with_threads(given.port, given.concurrency, record)
    elif given.client == "tritonclient":
        asyncio.run(with_tritonclient(given.port, given.concurrency, record))
    else:
        coalesce = given.client == "async"
        asyncio.run(with_our_client(given.port, given.concurrency, record, coalesce=coalesce))
    measured = min(given.seconds, time.perf_counter() - began - given.warmup)
    times = np.array(record.milliseconds or [0.0])
    print(
        json.dumps(
            {
                "images_per_second": len(record.milliseconds) / measured,
                "p50": float(np.percentile(times, 50)),
                "p99": float(np.percentile(times, 99)),
                "calls": record.calls,
                "wrong": record.wrong,
            }
        )
    )


if __name__ == "__main__":
    main()
