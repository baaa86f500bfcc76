"""Full load for long: whether throughput and memory stay flat, and no call fails; prints a line per quarter.

    python benchmarks/soak.py [--images 2000000] [--variant int8]

Needs what serving.py needs for its load generator, and nothing else to run on the machine.
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

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from servers import CLASSIFY, QUEUE, Running, Server, started  # noqa: E402
from serving import Bench, Load  # noqa: E402

LOAD = Load("soak", images=32, concurrency=4)


@contextmanager
def memory_of(running: Running) -> Iterator[list[float]]:
    """Resident MiB of a server's processes, a sample a second, for the length of a `with`."""
    samples: list[float] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(1.0):
            samples.append(running.resident_memory() / 2**20)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def main() -> None:
    """Prints the quarters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=2_000_000, help="at least so many; default: %(default)s")
    parser.add_argument("--variant", default="fp32", help="default: %(default)s")
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache/cifar-core/peers", help="for what is built")
    arguments = parser.parse_args()
    server = Server("ours", options=(*QUEUE, "--variant", arguments.variant))
    model = REPOSITORY / "exported/model.onnx"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model, 5, [server], arguments.peers, Path(folder))
        with started(server, Path(sys.executable), model, bench.threads, Path(folder, "log")) as running:
            bench.wait_until_it_answers(server, running)
            speed = bench.ask(server, running, LOAD, 0.0, 0)["images_per_second"]
            seconds = 1.05 * arguments.images / 4 / speed  # a little more, should it slow down
            images = 0
            print("quarter    images    images/s    memory, MiB    calls that failed")
            for quarter in range(1, 5):
                with memory_of(running) as samples:
                    command = [
                        str(bench.program), "--target", f"127.0.0.1:{running.port}", "--method", CLASSIFY,
                        "--payload", str(bench.payloads.of(server, LOAD)), "--seconds", f"{seconds:.0f}",
                        "--warmup", "0", "--concurrency", str(LOAD.concurrency),
                    ]  # fmt: skip
                    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                answered = told["answered"] * LOAD.images
                images += answered
                failed = sum(each["count"] for code, each in told["codes"].items() if code != "0")
                print(
                    f"{quarter:7d} {answered:9,d} {told['answered_in_time'] * LOAD.images / told['seconds']:11,.0f} "
                    f"{statistics.median(samples):14.1f} {failed:20d}",
                    flush=True,
                )
        print(f"{images:,} images; the server logged: {Path(folder, 'log').read_text().strip() or 'nothing'}")


if __name__ == "__main__":
    main()
