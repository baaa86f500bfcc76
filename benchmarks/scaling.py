"""How many servers for how many images a second: measures, and plans from what was measured.

    python benchmarks/scaling.py measure                                     # about 12 minutes; nothing else should run
    python benchmarks/scaling.py plan --rate 1000 --price 0.04     # prints a table, measures nothing

`measure` prints two tables and writes `--output`. The first has the capacity of a server on all cores, for each variant
of the model and each way of calling. The second compares measured latencies of one, two and three servers, each on one
core, with the estimate of queueing.py. On a machine with two cores the third server shares a core. The load generators
are those of serving.py and application.py, and run on the same cores as the servers.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from application import APPLICATIONS, run_application
from queueing import Servers
from servers import CLASSIFY, QUEUE, REPOSITORY, Server, started
from serving import Bench, Figures, Load, compile_load_generator
from tabulate import tabulate

from service.launch import ServerProcess

FIGURES = Path("reports/scaling.json")
SINGLE, BATCHED = Load("single-64", concurrency=64), Load("batch-32x4", images=32, concurrency=4)
ONE_AT_A_TIME = Load("single-1", concurrency=1)
COALESCED = "coalesced"
WAYS = {
    ONE_AT_A_TIME.name: "one image a call, one at a time",
    SINGLE.name: "one image a call, 64 in flight",
    COALESCED: "64 callers, AsyncClient packs their calls",
    BATCHED.name: "32 images a call, four in flight",
}
SHARES = (0.3, 0.5, 0.7, 0.8, 0.9)
# The measured point from which the variability of the service time is taken.
FITTED = (1, 0.7)
SERVERS = (1, 2, 3)


def progress(*message: object) -> None:
    """Prints a line on standard error."""
    print(time.strftime("%H:%M:%S"), *message, file=sys.stderr, flush=True)


def capacities(seconds: int, rounds: int, peers: Path, folder: Path) -> dict[str, dict[str, Figures]]:
    """Throughput, latency and processor time of one server on all cores, by variant and way of calling; medians."""
    found: dict[str, dict[str, list[Figures]]] = {}
    servers = {variant: Server(variant, options=(*QUEUE, "--variant", variant)) for variant in ("fp32", "int8")}
    model = REPOSITORY / "exported/model.onnx"
    bench = Bench(model, seconds, list(servers.values()), peers, folder)
    coalescing = next(each for each in APPLICATIONS if each.client == "async")
    for number in range(rounds):
        for variant, server in servers.items():
            with started(server, Path(sys.executable), model, bench.threads, folder / "log") as running:
                bench.wait_until_it_answers(server, running)
                figures = {
                    load.name: bench.ask(server, running, load, 0.0, number)
                    for load in (ONE_AT_A_TIME, SINGLE, BATCHED)
                }
                before = running.cpu_seconds()
                figures[COALESCED] = run_application(coalescing, running.port, 64, seconds)
                # The application's own count leaves out its warm-up of a second; the processor time does not.
                images = figures[COALESCED]["images_per_second"] * (seconds + 1)
                figures[COALESCED]["cpu_seconds_per_image"] = (running.cpu_seconds() - before) / images
            for way, each in figures.items():
                progress(variant, way, round(each["images_per_second"]))
                found.setdefault(variant, {}).setdefault(way, []).append(each)
    return {variant: {way: _median(each) for way, each in ways.items()} for variant, ways in found.items()}


def _median(rounds: Sequence[Figures]) -> Figures:
    keys = ("images_per_second", "p50", "p99", "cpu_seconds_per_image")
    return {key: statistics.median(each[key] for each in rounds) for key in keys}


@contextlib.contextmanager
def servers_on_own_cores(count: int) -> Iterator[str]:
    """Runs servers, each on one core, until the end of a `with`; yields their addresses for gRPC."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                ServerProcess(
                    "--threads", "1", "--decode-processes", "1", *QUEUE,
                    folder=REPOSITORY, prefix=("taskset", "-c", str(cores[number % len(cores)])),
                )
            )
            for number in range(count)
        ]  # fmt: skip
        yield "ipv4:" + ",".join(process.ready().target for process in processes)


def latencies(seconds: int, peers: Path, folder: Path) -> list[Figures]:
    """Latency of one, two and three servers at several loads, with their capacity; a row for each point."""
    program = compile_load_generator(peers)
    bench = Bench(REPOSITORY / "exported/model.onnx", seconds, [], peers, folder)
    payload = bench.payloads.of(Server("ours"), SINGLE)

    def ask(target: str, *how: str) -> Figures:
        command = [
            str(program), "--target", target, "--method", CLASSIFY, "--payload", str(payload),
            "--seconds", str(seconds), "--warmup", "1", *how,
        ]  # fmt: skip
        result: Figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        refused = sum(each["count"] for code, each in result["codes"].items() if code != "0")
        if refused:
            raise SystemExit(f"{target}: {refused} calls failed: {result['first_error']}")
        return {"rate": result["answered_in_time"] / result["seconds"], "p99": result["codes"]["0"]["p99"]}

    rows = []
    for count in SERVERS:
        with servers_on_own_cores(count) as target:
            idle = ask(target, "--concurrency", "1")["p99"]
            capacity = ask(target, "--concurrency", str(64 * count))["rate"]
            for share in SHARES:
                measured = ask(target, "--rate", f"{share * capacity:.2f}")["p99"]
                rows.append({"servers": count, "capacity": capacity, "idle_p99": idle, "share": share, "p99": measured})
                progress(rows[-1])
    return rows


def estimates(rows: Sequence[Figures]) -> list[tuple[Figures, float, float]]:
    """Each measured point with two estimates of its p99 in ms: constant service time, and the fitted variability."""

    def servers(row: Figures, variability: float) -> Servers:
        return Servers(row["servers"], row["capacity"], row["idle_p99"] / 1000, variability)

    point = next(row for row in rows if (row["servers"], row["share"]) == FITTED)
    variability = servers(point, 0.0).fitted(point["share"] * point["capacity"], point["p99"] / 1000).variability
    points = []
    for row in rows:
        rate = row["share"] * row["capacity"]
        constant, fitted = (1000 * servers(row, each).p99(rate) for each in (0.0, variability))
        points.append((row, constant, fitted))
    return points


def measure(given: argparse.Namespace) -> None:
    """Measures, writes the figures and prints the tables."""
    with tempfile.TemporaryDirectory() as folder:
        figures: dict[str, Any] = {
            "cores": len(os.sched_getaffinity(0)),
            "date": time.strftime("%Y-%m-%d"),
            "capacities": capacities(given.seconds, given.rounds, given.peers, Path(folder)),
            "latencies": latencies(2 * given.seconds, given.peers, Path(folder)),
        }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(tables(figures))


def tables(figures: dict[str, Any]) -> str:
    """Markdown: capacity by variant and way of calling, and measured latencies beside their estimates."""
    capacity = [
        (
            variant, WAYS[way], f"{each['images_per_second']:,.0f}",
            f"{each['images_per_second'] / figures['cores']:,.0f}",
            f"{1000 * each['cpu_seconds_per_image']:.2f}", f"{each['p99']:.1f}",
        )
        for variant, ways in figures["capacities"].items()
        for way, each in ways.items()
    ]  # fmt: skip
    headers = ("variant", "way of calling", "images/s", "images/s per core", "CPU, ms/image", "p99, ms")
    latency = [
        (
            row["servers"], f"{row['capacity']:,.0f}", f"{100 * row['share']:.0f} %", f"{row['p99']:.1f}",
            f"{constant:.1f}", f"{fitted:.1f}" + (" (fitted here)" if (row["servers"], row["share"]) == FITTED else ""),
        )
        for row, constant, fitted in estimates(figures["latencies"])
    ]  # fmt: skip
    columns = ("servers", "capacity, calls/s", "load", "p99, ms", "estimate, constant", "estimate, fitted")
    return "\n\n".join(
        (
            tabulate(capacity, headers, "github", disable_numparse=True),
            tabulate(latency, columns, "github", disable_numparse=True),
        )
    )


def plan(given: argparse.Namespace) -> None:
    """Prints how many cores and replicas a rate needs, and what a million images cost."""
    try:
        figures = json.loads(given.figures.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {given.figures} has no figures ({error}): measure them first with the command 'measure'")
    rows = []
    for variant, ways in figures["capacities"].items():
        for way, each in ways.items():
            per_core = each["images_per_second"] / figures["cores"] * given.utilization
            replicas = max(2, -(-given.rate // (per_core * given.cores)))
            cost = 1e6 / per_core / 3600 * given.price
            rows.append((variant, WAYS[way], f"{per_core:,.0f}", f"{replicas:,.0f}", f"{cost:.3f}"))
    headers = (
        "variant",
        "way of calling",
        "images/s per core",
        f"replicas of {given.cores} cores",
        "per million images",
    )
    print(f"{given.rate:,} images/s at {100 * given.utilization:.0f} % load, {given.price:g} per core-hour:\n")
    print(tabulate(rows, headers, "github", disable_numparse=True))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="measure capacity and latency on this machine")
    measuring.add_argument("--seconds", type=int, default=4, help="length of each load; default: %(default)s")
    measuring.add_argument("--rounds", type=int, default=3, help="rounds of the first table; default: %(default)s")
    measuring.add_argument("--output", type=Path, default=FIGURES, help="default: %(default)s")
    measuring.add_argument(
        "--peers", type=Path, default=Path.home() / ".cache/cifar-core/peers", help="folder for the load generator"
    )
    measuring.set_defaults(run=measure)
    planning = commands.add_parser("plan", help="compute replicas and cost from measured figures")
    planning.add_argument("--rate", type=int, required=True, help="images per second")
    planning.add_argument("--price", type=float, required=True, help="price of a core for an hour, in any currency")
    planning.add_argument(
        "--utilization", type=float, default=0.6, help="share of the capacity to use; default: %(default)s"
    )
    planning.add_argument("--cores", type=int, default=2, help="cores of a replica; default: %(default)s")
    planning.add_argument("--figures", type=Path, default=FIGURES, help="what `measure` wrote; default: %(default)s")
    planning.set_defaults(run=plan)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
