"""Serving speed as an application sees it: many concurrent calls of one image each, through Python clients.

    python benchmarks/application.py [--rounds 5] [--servers ours,Triton] [--variant int8]

Our client packs concurrent calls into shared requests; other clients send a request for each call. Servers are started
in turn, in several rounds and in random order. The last row is onnxruntime alone with batches of 64 images. The table
shows medians over the rounds. The peers and the files that they need are those of serving.py.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from servers import REPOSITORY, Server, all_servers, started
from serving import RAW, Bench, Figures, Load
from tabulate import tabulate

LOAD = Load("application", concurrency=64, batch=64)


@dataclass(frozen=True)
class Application:
    """An application: which client it uses for which server.

    Attributes:
        server: Name of the server.
        client: Client of application_load.py.
        text: Row of the table.
    """

    server: str
    client: str
    text: str


APPLICATIONS = (
    Application("ours", "async", "ours, AsyncClient"),
    Application("ours", "threads", "ours, Client shared by threads"),
    Application("ours", "async-separate", "ours, AsyncClient, a request for each call"),
    Application("ours", "tritonclient", "ours, tritonclient.grpc.aio"),
    Application("plain", "tritonclient", "plain servicer, tritonclient.grpc.aio"),
    Application("Triton", "tritonclient", "Triton, tritonclient.grpc.aio"),
    Application("MLServer", "tritonclient", "MLServer, tritonclient.grpc.aio"),
)


def run_application(application: Application, port: int, concurrency: int, seconds: float) -> Figures:
    """Runs one application in a process of its own; its figures."""
    command = [
        sys.executable, str(REPOSITORY / "benchmarks/application_load.py"), application.client,
        "--port", str(port), "--concurrency", str(concurrency), "--seconds", str(seconds),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return dict(json.loads(done.stdout))


def table(results: dict[str, list[Figures]], peers: Sequence[str]) -> str:
    """Markdown: a row for each application, with its ratio to each peer and to onnxruntime alone within a round."""

    def ratio(name: str, other: str) -> str:
        pairs = zip(results[name], results.get(other, []), strict=False)
        ratios = [one["images_per_second"] / two["images_per_second"] for one, two in pairs]
        if not ratios or name == other:
            return ""
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    rows = []
    for name, rounds in results.items():
        speeds = [each["images_per_second"] for each in rounds]
        rows.append(
            (
                name,
                f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})",
                f"{statistics.median(each['p50'] for each in rounds):.1f}",
                f"{statistics.median(each['p99'] for each in rounds):.1f}",
                *(ratio(name, peer) for peer in peers),
            )
        )
    headers = ("application", "images/s", "p50, ms", "p99, ms", *(f"÷ {peer}" for peer in peers))
    return tabulate(rows, headers, "github", disable_numparse=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each; default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=64, help="callers; default: %(default)s")
    parser.add_argument("--servers", help="names, separated by commas; all if left out")
    parser.add_argument("--variant", default="fp32", help="variant of the model; default: %(default)s")
    parser.add_argument(
        "--peers", type=Path, default=Path.home() / ".cache/cifar-core/peers", help="installs peers here"
    )
    given = parser.parse_args()
    known: dict[str, Server] = {each.name: each for each in all_servers()}
    known["ours"] = Server("ours", options=("--variant", given.variant))
    wanted = given.servers.split(",") if given.servers else list(dict.fromkeys(each.server for each in APPLICATIONS))
    model = REPOSITORY / "exported" / ("model.onnx" if given.variant == "fp32" else f"model.{given.variant}.onnx")
    results: dict[str, list[Figures]] = {each.text: [] for each in APPLICATIONS if each.server in wanted}
    results[RAW] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model, round(given.seconds), [known[name] for name in wanted], given.peers, Path(folder))
        for number in range(given.rounds):
            results[RAW].append(bench.raw(LOAD))
            for name in random.Random(number).sample(wanted, len(wanted)):
                server = known[name]
                with started(server, bench.pythons[name], model, bench.threads, Path(folder, "log")) as running:
                    bench.wait_until_it_answers(server, running)
                    for each in APPLICATIONS:
                        if each.server != name:
                            continue
                        figures = run_application(each, running.port, given.concurrency, given.seconds)
                        results[each.text].append(figures)
                        print(number + 1, each.text, figures, file=sys.stderr, flush=True)
    peers = [text for text in ("Triton, tritonclient.grpc.aio",) if text in results]
    print(f"{os.cpu_count()} cores, {given.variant}, {given.concurrency} callers, {given.rounds} rounds\n")
    print(table(results, [*peers, RAW]))


if __name__ == "__main__":
    main()
