"""Full load for a long time: do throughput and memory stay constant, and does no call fail? Prints a row per quarter.

    python benchmarks/soak.py [--images 2000000] [--variant int8]

It needs the same programs as serving.py for its load generator. Nothing else should run on the machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servers import CLASSIFY, QUEUE, REPOSITORY, Running, Server, started
from serving import Bench, Load
from tabulate import tabulate

LOAD = Load("soak", images=32, concurrency=4)


@contextmanager
def memory_of(running: Running) -> Iterator[list[float]]:
    """Memory of a server's processes in MiB, measured every second until the end of a `with`."""
    samples: list[float] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(1.0):
            samples.append(running.memory())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def quarter(bench: Bench, server: Server, running: Running, seconds: float) -> tuple[int, float, float, int]:
    """Loads the server for a time: images answered, images/s, median memory in MiB, calls that failed."""
    command = [
        str(bench.program), "--target", f"127.0.0.1:{running.port}", "--method", CLASSIFY,
        "--payload", str(bench.payloads.of(server, LOAD)), "--seconds", f"{seconds:.0f}",
        "--warmup", "0", "--concurrency", str(LOAD.concurrency),
    ]  # fmt: skip
    with memory_of(running) as samples:
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    failed = sum(each["count"] for code, each in result["codes"].items() if code != "0")
    speed = result["answered_in_time"] * LOAD.images / result["seconds"]
    return result["answered"] * LOAD.images, speed, statistics.median(samples), failed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Throughput and memory of the server under full load, by quarter.")
    parser.add_argument("--images", type=int, default=2_000_000, help="number of images; default: %(default)s")
    parser.add_argument("--variant", default="fp32", help="variant of the model; default: %(default)s")
    parser.add_argument(
        "--peers", type=Path, default=Path.home() / ".cache/cifar-core/peers", help="folder for the load generator"
    )
    arguments = parser.parse_args()
    server = Server("ours", options=(*QUEUE, "--variant", arguments.variant))
    model = REPOSITORY / "exported/model.onnx"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model, 5, [server], arguments.peers, Path(folder))
        with started(server, Path(sys.executable), model, bench.threads, Path(folder, "log")) as running:
            bench.wait_until_it_answers(server, running)
            speed = bench.ask(server, running, LOAD, 0.0, 0)["images_per_second"]
            seconds = 1.05 * arguments.images / 4 / speed  # 5 % more, in case it becomes slower
            rows = []
            for number in range(1, 5):
                rows.append((number, *quarter(bench, server, running, seconds)))
                print(*rows[-1], file=sys.stderr, flush=True)
            log = running.log()
    headers = ("quarter", "images", "images/s", "memory, MiB", "calls that failed")
    print(tabulate(rows, headers, "github", intfmt=",", floatfmt=",.1f"))
    print(f"\n{sum(row[1] for row in rows):,} images; the server logged:\n{log}")


if __name__ == "__main__":
    main()
