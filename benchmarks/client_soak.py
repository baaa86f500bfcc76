"""Millions of single images through the clients that pack calls: is each answer that of its image, is memory flat?

    python benchmarks/client_soak.py [--images 2000000] [--variant int8] [--device cpu]

A server with the shipped model answers two processes at the same time: 64 tasks that share one AsyncClient, and 64
threads that share one Client. Each call classifies one image of a pool, and its answer is compared with what was
computed for this image before; of all pairs of images, fewer than one in a hundred have answers as similar as that. A
share of the calls is cancelled or has a deadline that may pass, which must not affect the others. Prints a row for each
client and quarter; the exit code is 1 if a call failed, was answered wrongly, or memory grew.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from tabulate import tabulate

from service.client import AsyncClient, ClassificationError, Client, Options
from service.launch import ServerProcess

REPOSITORY = Path(__file__).parents[1]
CALLERS = 64
POOL = 512
QUARTERS = 4
# Batches of other sizes round otherwise.
TOLERANCE = 0.02
# Of so many calls one is cancelled, and one has this deadline in seconds.
SELDOM = 50
MAX_FAILED = 1000
SHORT_DEADLINE = 0.02
MEMORY_GROWTH = 1.1
"""Largest memory of the last quarter, as a multiple of that of the second."""


def pool() -> NDArray[np.uint8]:
    """Different images, uint8 [512, 32, 32, 3]."""
    return np.random.default_rng(0).integers(0, 256, (POOL, 32, 32, 3), np.uint8)


class Tally:
    """What the callers of one process saw in a quarter."""

    def __init__(self, expected: NDArray[np.float32]) -> None:
        self.answered = self.wrong = self.failed = self.expired = self.cancelled = 0
        self.gave_up = False
        self._expected = expected

    def check(self, row: int, probabilities: NDArray[np.float32]) -> None:
        """Compares an answer with what was computed for the image before."""
        self.answered += 1
        if not np.abs(probabilities[0] - self._expected[row]).max() < TOLERANCE:
            self.wrong += 1

    def fail(self, error: ClassificationError, *, may_expire: bool) -> None:
        """Counts a call without an answer."""
        if may_expire and error.code.name == "DEADLINE_EXCEEDED":
            self.expired += 1
        else:
            self.failed += 1
            self.gave_up = self.failed >= MAX_FAILED  # the server is gone
            print(error, file=sys.stderr)

    def row(self, name: str, quarter: int, seconds: float) -> dict[str, Any]:
        """The quarter as a row of the table."""
        return {
            "client": name,
            "quarter": quarter,
            "images": self.answered,
            "images/s": self.answered / seconds,
            "wrong": self.wrong,
            "failed": self.failed,
            "expired": self.expired,
            "cancelled": self.cancelled,
            "memory, MiB": psutil.Process().memory_info().rss / 2**20,
        }


async def with_tasks(target: str, images: int, expected: NDArray[np.float32]) -> None:
    """64 tasks share an AsyncClient. Prints a row of JSON for each quarter."""
    pictures = pool()
    async with AsyncClient(target, Options(attempts=10)) as client:
        for quarter in range(1, QUARTERS + 1):
            tally, began = Tally(expected), time.monotonic()

            async def call(number: int, tally: Tally = tally, quarter: int = quarter) -> None:
                chance = random.Random(1000 * quarter + number)
                while tally.answered < images / QUARTERS and not tally.gave_up:
                    row, kind = chance.randrange(POOL), chance.randrange(SELDOM)
                    timeout = SHORT_DEADLINE if kind == 1 else None
                    task = asyncio.ensure_future(client.probabilities(pictures[row : row + 1], timeout))
                    if kind == 0:
                        await asyncio.sleep(chance.random() * SHORT_DEADLINE)
                        task.cancel()
                    try:
                        tally.check(row, await task)
                    except asyncio.CancelledError:
                        tally.cancelled += 1
                    except ClassificationError as error:
                        tally.fail(error, may_expire=kind == 1)

            await asyncio.gather(*(call(number) for number in range(CALLERS)))
            print(json.dumps(tally.row("AsyncClient", quarter, time.monotonic() - began)), flush=True)


def with_threads(target: str, images: int, expected: NDArray[np.float32]) -> None:
    """64 threads share a Client. Prints a row of JSON for each quarter."""
    pictures = pool()
    lock = threading.Lock()
    with Client(target, Options(attempts=10)) as client:
        for quarter in range(1, QUARTERS + 1):
            tally, began = Tally(expected), time.monotonic()

            def call(number: int, tally: Tally = tally, quarter: int = quarter) -> None:
                chance = random.Random(1000 * quarter + number)
                while tally.answered < images / QUARTERS and not tally.gave_up:
                    row, short = chance.randrange(POOL), chance.randrange(SELDOM) == 1
                    try:
                        answer = client.probabilities(pictures[row : row + 1], SHORT_DEADLINE if short else None)
                    except ClassificationError as error:
                        with lock:
                            tally.fail(error, may_expire=short)
                    else:
                        with lock:
                            tally.check(row, answer)

            threads = [threading.Thread(target=call, args=(number,)) for number in range(CALLERS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print(json.dumps(tally.row("Client", quarter, time.monotonic() - began)), flush=True)


def compute(target: str) -> NDArray[np.float32]:
    """The probabilities of the images of the pool, float32 [512, classes], in requests of 32 images."""
    with Client(target) as client:
        return np.concatenate([client.probabilities(part) for part in np.split(pool(), POOL // 32)])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Millions of single images through the clients that pack calls.")
    parser.add_argument("--images", type=int, default=2_000_000, help="number of images; default: %(default)s")
    parser.add_argument("--variant", default="int8", help="variant of the model; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="device of the server; default: %(default)s")
    parser.add_argument("--client", nargs=2, metavar=("KIND", "TARGET"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        kind, target = given.client
        if kind == "tasks":
            asyncio.run(with_tasks(target, given.images, compute(target)))
        else:
            with_threads(target, given.images, compute(target))
        return 0
    options = ("--variant", given.variant, "--device", given.device)
    with ServerProcess(*options, folder=REPOSITORY) as server:
        target = server.ready().target
        command = [sys.executable, __file__, "--images", str(given.images // 2), "--client"]
        clients = [
            subprocess.Popen([*command, kind, target], stdout=subprocess.PIPE, text=True)
            for kind in ("tasks", "threads")
        ]
        process, memory, rows = psutil.Process(server.process.pid), [], []
        try:
            while any(client.poll() is None for client in clients):
                memory.append(process.memory_info().rss / 2**20)
                time.sleep(2)
            for client in clients:
                rows += [json.loads(line) for line in client.stdout or ()]
        finally:
            for client in clients:
                client.kill()
        ended_well = all(client.returncode == 0 for client in clients) and server.stop() == 0
    if len(rows) < len(clients) * QUARTERS:
        print("a client ended early, see its error above", file=sys.stderr)
        return 1
    print(tabulate(rows, "keys", "github", intfmt=",", floatfmt=",.0f"))
    quarters = [float(np.median(part)) for part in np.array_split(memory, QUARTERS)]
    print(f"\nmemory of the server by quarter, MiB: {', '.join(f'{value:.0f}' for value in quarters)}")
    wrong, failed = (sum(row[key] for row in rows) for key in ("wrong", "failed"))
    print(f"{sum(row['images'] for row in rows):,} images answered, {wrong} wrong, {failed} calls failed")
    grew = quarters[-1] > MEMORY_GROWTH * quarters[1]
    for name in ("AsyncClient", "Client"):
        second, last = (row["memory, MiB"] for row in rows if row["client"] == name and row["quarter"] in (2, QUARTERS))
        grew = grew or last > MEMORY_GROWTH * second
    return int(wrong > 0 or failed > 0 or grew or not ended_well)


if __name__ == "__main__":
    sys.exit(main())
