"""Serving speed beside Triton, MLServer, Ray Serve and LitServe, on the same cores and the same ONNX file.

    python benchmarks/serving.py [--rounds 5] [--servers ours,Triton] [--loads single-64]

Starts each server in turn, in several rounds, so that a drift of the machine touches all; prints medians over the
rounds, and writes every figure and a picture to `--output`. Needs g++ and libgrpc++-dev for the load generator,
h2load (nghttp2-client) for servers that speak HTTP, and nothing else to run on the machine. docs/performance.md says
what is measured and what its limits are.
"""

import argparse
import base64
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from servers import CLASSIFY, PEERS, SERVERS, Running, Server, install, started  # noqa: E402

from service.generated.cifar.v1 import image_classifier_pb2 as cifar  # noqa: E402
from service.generated.inference import open_inference_pb2 as inference  # noqa: E402

Figures = dict[str, Any]
RAW = "onnxruntime alone"


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes:
        name: In the table, and of `--loads`.
        images: Of each call.
        concurrency: Calls in flight, of a closed loop.
        share: Of the server's own capacity (what it answered at `single-64`), of an open loop with Poisson arrivals.
        batch: That onnxruntime alone computes to compare.
        encoded: JPEG files instead of pixels; only ours decodes them.
        longer: Times as long as the others.
    """

    name: str
    images: int = 1
    concurrency: int = 0
    share: float = 0.0
    batch: int = 1
    encoded: bool = False
    longer: int = 1


CAPACITY = "single-64"
LOADS = (
    Load("single-1", concurrency=1, batch=1),
    Load("single-8", concurrency=8, batch=8),
    Load(CAPACITY, concurrency=64, batch=64),
    Load("single-256", concurrency=256, batch=64),
    Load("batch-32x4", images=32, concurrency=4, batch=32),
    Load("jpeg-64", concurrency=64, batch=64, encoded=True),
    Load("poisson-50", share=0.5),
    Load("poisson-80", share=0.8),
    Load("poisson-95", share=0.95),
    Load("overload-150", share=1.5, longer=3),  # so that queues fill
)


def compile_load_generator(folder: Path) -> Path:
    """Builds load.cpp, once."""
    program, source = folder / "load", REPOSITORY / "benchmarks/load/load.cpp"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "grpc++", "protobuf"],  # noqa: S607
            check=True, capture_output=True, text=True,
        ).stdout.split()  # fmt: skip
        subprocess.run(["g++", "-std=c++17", "-O2", str(source), "-o", str(program), *flags], check=True)  # noqa: S607
    return program


class Payloads:
    """Requests of each form as files, of the same random pixels."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, server: Server, load: Load) -> Path:
        """The file that a load sends to a server."""
        kind = "http" if server.method is None else server.method.rsplit("/")[-1]
        file = self._folder / f"{kind}-{load.images}{'-jpeg' if load.encoded else ''}"
        if not file.exists():
            pixels = np.random.default_rng(0).integers(0, 256, (load.images, 32, 32, 3), dtype=np.uint8)
            file.write_bytes(self._encode(server, load, pixels))
        return file

    def _encode(self, server: Server, load: Load, pixels: np.ndarray) -> bytes:
        if load.encoded:
            sample = (REPOSITORY / "samples/cat.jpg").read_bytes()
            return cifar.ClassifyRequest(images=[cifar.Image(encoded=sample)] * load.images).SerializeToString()
        if server.method is None:
            return json.dumps({"images": base64.b64encode(pixels.tobytes()).decode()}).encode()
        if server.method == CLASSIFY:
            return cifar.ClassifyRequest(packed_rgb=pixels.tobytes()).SerializeToString()
        request = inference.ModelInferRequest(model_name="cifar10", raw_input_contents=[pixels.tobytes()])
        request.inputs.add(name="images", datatype="UINT8", shape=pixels.shape)
        request.outputs.add(name="probabilities")
        return request.SerializeToString()


class Bench:
    """Everything that stays the same over a run."""

    def __init__(self, model: Path, seconds: int, servers: Sequence[Server], peers: Path, folder: Path) -> None:
        self.model = model.resolve()
        self.seconds = seconds
        self.threads = len(os.sched_getaffinity(0))
        self.logs = folder
        self.payloads = Payloads(folder)
        self.program = compile_load_generator(peers)
        self.pythons = {server.name: install(server, peers) for server in servers}

    def raw(self, load: Load) -> Figures:
        """What onnxruntime does alone, in batches as a server could form them."""
        environment = {**os.environ, "MODEL": str(self.model), "THREADS": str(self.threads)}
        done = subprocess.run(
            [sys.executable, "raw.py", str(load.batch), str(self.seconds)],
            cwd=PEERS, env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        return dict(json.loads(done.stdout))

    def ask(self, server: Server, running: Running, load: Load, rate: float, seed: int) -> Figures:
        """Puts a load on a running server."""
        payload, before = self.payloads.of(server, load), running.cpu_seconds()
        if server.method is None:
            figures = self._ask_http(running.port, load, payload)
        else:
            how = ["--rate", f"{rate:.2f}"] if load.share else ["--concurrency", str(load.concurrency)]
            connections = min(server.connections, load.concurrency or server.connections)
            command = [
                str(self.program), "--target", f"127.0.0.1:{running.port}", "--method", server.method,
                "--payload", str(payload), "--seconds", str(self.seconds * load.longer), "--warmup", "1",
                "--seed", str(seed), "--connections", str(connections), *how,
            ]  # fmt: skip
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            figures = _of_grpc(json.loads(done.stdout), load)
        answered = max(1, figures.pop("answered"))
        figures["cpu_seconds_per_image"] = (running.cpu_seconds() - before) / (answered * load.images)
        figures["offered"] = rate if load.share else None
        return figures

    def _ask_http(self, port: int, load: Load, payload: Path) -> Figures:
        log = self.logs / "h2load"
        log.unlink(missing_ok=True)
        command = [
            "h2load", "--h1", "-c", str(load.concurrency), "-D", str(self.seconds), "--warm-up-time", "1",
            "-H", "content-type: application/json", "-d", str(payload), "--log-file", str(log),
            f"http://127.0.0.1:{port}/predict",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        rows = [line.split("\t") for line in log.read_text().splitlines()]
        times = sorted(int(row[2]) / 1000 for row in rows if row[1] == "200")
        share = (self.seconds + 1) / self.seconds  # the log tells of what came after the warm-up
        return {
            "images_per_second": len(times) * load.images / self.seconds,
            "p50": times[len(times) // 2] if times else 0.0,
            "p99": times[int(0.99 * len(times))] if times else 0.0,
            "answered": int(len(times) * share),
            "client_cpu_seconds_per_image": None,
            "codes": {"0": len(times), "http": len(rows) - len(times)},
        }

    def wait_until_it_answers(self, server: Server, running: Running) -> None:
        """Asks for one image until it comes."""
        load, patience = Load("ready", concurrency=1), time.monotonic() + 90
        seconds, self.seconds = self.seconds, 1
        try:
            while time.monotonic() < patience:
                try:
                    if self.ask(server, running, load, 0.0, 0)["images_per_second"] > 0:
                        return
                except subprocess.CalledProcessError:
                    time.sleep(0.5)
        finally:
            self.seconds = seconds
        log = (self.logs / "server.log").read_text(errors="replace")[-2000:]
        raise SystemExit(f"{server.name} does not answer; it printed:\n{log}")

    def round(self, server: Server, loads: Sequence[Load], seed: int, tell: Callable[[str], None]) -> Figures:
        """Starts a server, puts every load on it, and stops it. Figures by load."""
        result: Figures = {}
        with started(server, self.pythons[server.name], self.model, self.threads, self.logs / "server.log") as running:
            self.wait_until_it_answers(server, running)
            for load in loads:
                if (load.encoded and server.method != CLASSIFY) or (load.share and server.method is None):
                    continue
                tell(f"{server.name}: {load.name}")
                rate = load.share * result.get(CAPACITY, {}).get("images_per_second", 0.0)
                if load.share and not rate:
                    continue
                result[load.name] = self.ask(server, running, load, rate, seed)
                running.note_memory()
            result["peak_mebibytes"] = running.peak_memory / 2**20
        return result


def _of_grpc(told: Figures, load: Load) -> Figures:
    good = told["codes"].get("0", {"count": 0, "p50": 0.0, "p99": 0.0})
    bad = {code: each for code, each in told["codes"].items() if code != "0"}
    images = told["answered_in_time"] * load.images
    return {
        "images_per_second": images / told["seconds"],
        "p50": good["p50"],
        "p99": good["p99"],
        "answered": told["answered"],
        "client_cpu_seconds_per_image": told["client_cpu_seconds"] / max(images, 1),
        "refused_p99": max((each["p99"] for each in bad.values()), default=None),
        "codes": {code: each["count"] for code, each in told["codes"].items()},
        "first_error": told["first_error"],
    }


def median(rounds: Sequence[Figures], load: str, key: str) -> float | None:
    """Of a figure over the rounds."""
    values = [each[load][key] for each in rounds if load in each and each[load].get(key) is not None]
    return statistics.median(values) if values else None


def table(results: dict[str, list[Figures]], loads: Sequence[Load]) -> str:
    """Markdown: a block per load, a line per server."""
    blocks = []
    for load in loads:
        lines = [
            f"**{load.name}**",
            "",
            "| server | images/s (lowest to highest) | ours is × | p50, ms | p99, ms | CPU, ms/image | refused, % |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        ours = [each.get(load.name, {}).get("images_per_second") for each in results.get("ours", [])]
        for name, rounds in results.items():
            speeds = [each[load.name]["images_per_second"] for each in rounds if load.name in each]
            if not speeds:
                continue
            ratios = [
                mine / each[load.name]["images_per_second"]
                for mine, each in zip(ours, rounds, strict=False)
                if mine and load.name in each and each[load.name]["images_per_second"]
            ]
            refused = [_refused(each[load.name]) for each in rounds if load.name in each]
            cells = (
                name,
                f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})",
                f"{statistics.median(ratios):.2f}" if ratios and name != "ours" else "",
                _number(median(rounds, load.name, "p50"), ".2f"),
                _number(median(rounds, load.name, "p99"), ".2f"),
                _number(1000 * (median(rounds, load.name, "cpu_seconds_per_image") or 0), ".2f"),
                _number(statistics.median(refused), ".1f"),
            )
            lines.append("| " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    memory = ["**peak memory**, MiB", "", "| server | |", "| --- | --- |"]
    for name, rounds in results.items():
        held = [each["peak_mebibytes"] for each in rounds if "peak_mebibytes" in each]
        if held:
            memory.append(f"| {name} | {statistics.median(held):,.0f} |")
    return "\n\n".join([*blocks, "\n".join(memory)])


def _refused(figures: Figures) -> float:
    """Per cent of the calls that had no answer."""
    codes = figures.get("codes") or {"0": 1}
    return float(100 * (1 - codes.get("0", 0) / sum(codes.values())))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def draw(results: dict[str, list[Figures]], file: Path) -> None:
    """Throughput against p99 latency at one image a call, a line per server, a point per concurrency."""
    from matplotlib import pyplot, style

    from cifar_core.figures import COLOURS, STYLE

    # One colour for all of ours, a style of line each.
    styles = iter(("-", "--", "-.", ":"))
    others = iter(("blue", "green", "purple", "sky"))
    with style.context(STYLE):
        figure, axes = pyplot.subplots(figsize=(8.0, 4.6), layout="constrained")
        for (name, rounds), marker in zip(results.items(), "xos^DvP*X", strict=False):
            points = [
                (median(rounds, load.name, "images_per_second"), median(rounds, load.name, "p99"))
                for load in LOADS
                if load.concurrency and load.images == 1 and not load.encoded
            ]
            xs, ys = [x for x, y in points if x and y], [y for x, y in points if x and y]
            if not xs or name == RAW:
                continue
            colour, line = ("orange", next(styles)) if name.startswith("ours") else (next(others), "-")
            axes.plot(xs, ys, line, marker=marker, color=COLOURS[colour], label=name)
        axes.set(xlabel="images/s, one a call", ylabel="p99, ms", yscale="log", xlim=(0, None))
        figure.legend(loc="outside right center", fontsize=10)
        figure.savefig(file, dpi=150, metadata={"Software": None})
        pyplot.close(figure)


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = [server.name for server in SERVERS]
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=int, default=3, help="of each load, after a second of warm-up; %(default)s")
    parser.add_argument("--servers", default=";".join(names), help="names with ; between; default: all: %(default)s")
    parser.add_argument("--loads", default=",".join(load.name for load in LOADS), help="default: all: %(default)s")
    parser.add_argument("--model", type=Path, default=REPOSITORY / "exported/model.onnx", help="default: %(default)s")
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache/cifar-core/peers", help="for what is built")
    parser.add_argument("--output", type=Path, default=Path("reports/serving"), help="default: %(default)s")
    arguments = parser.parse_args()
    wanted = arguments.servers.split(";")
    chosen = [server for server in SERVERS if server.name in wanted]
    loads = [load for load in LOADS if load.name in arguments.loads.split(",")]
    if unknown := set(wanted) - set(names):
        parser.error(f"no server is called {', '.join(unknown)}; there are: {'; '.join(names)}")
    results: dict[str, list[Figures]] = {RAW: [], **{server.name: [] for server in chosen}}
    arguments.output.mkdir(parents=True, exist_ok=True)

    def tell(what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.model, arguments.seconds, chosen, arguments.peers, Path(folder))
        for number in range(arguments.rounds):
            tell(f"round {number + 1} of {arguments.rounds}")
            order = list(chosen)
            random.Random(number).shuffle(order)
            results[RAW].append({load.name: bench.raw(load) for load in loads if load.concurrency})
            for server in order:
                results[server.name].append(bench.round(server, loads, number, tell))
            (arguments.output / "serving.json").write_text(json.dumps(results, indent=1))
    draw(results, arguments.output / "serving.png")
    print(f"{platform.processor() or platform.machine()}, {bench.threads} cores, {arguments.rounds} rounds\n")
    print(table(results, loads))


if __name__ == "__main__":
    main()
