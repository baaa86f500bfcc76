"""Compares the serving speed of our server with that of another commit, a plain servicer and four other products.

    python benchmarks/serving.py [--rounds 5] [--servers ours,Triton] [--loads single-64]
    python benchmarks/serving.py --checkout ../before --servers ours,before --loads single-1,single-64,batch-32x4

All servers use the same cores and the same ONNX file. They are started in turn, in several rounds and in random order,
so that a drift of the machine's speed affects all of them. The table shows medians over the rounds; all figures and a
plot are written to `--output`. The load generator needs g++ and libgrpc++-dev; servers that speak HTTP need h2load
(nghttp2-client). Nothing else should run on the machine. docs/performance.md says what is measured and how far to trust
it.
"""

import argparse
import base64
import io
import itertools
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
from PIL import Image
from servers import CLASSIFY, PEERS, REPOSITORY, Running, Server, all_servers, install, started
from tabulate import tabulate

from service.generated.cifar.v1 import image_classifier_pb2 as cifar
from service.generated.inference import open_inference_pb2 as inference

Figures = dict[str, Any]
RAW = "onnxruntime alone"


@dataclass(frozen=True)
class Load:
    """One kind of load.

    Attributes:
        name: Name in the table and for `--loads`.
        images: Images in each call.
        concurrency: Calls in flight, if the load is a closed loop.
        share: Rate of calls as a share of the server's own capacity (its throughput at `single-64`), if the load is an
            open loop with Poisson arrivals.
        batch: Batch size with which onnxruntime alone is measured for comparison.
        encoded: Whether to send JPEG files instead of pixels; only our server decodes them.
        longer: Factor on `--seconds`.
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
    Load("overload-150", share=1.5, longer=3),  # longer, so that queues fill
)


def compile_load_generator(folder: Path) -> Path:
    """Compiles load.cpp if it has changed; the program."""
    program, source = folder / "load", REPOSITORY / "benchmarks/load/load.cpp"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "grpc++", "protobuf"],  # noqa: S607
            check=True, capture_output=True, text=True,
        ).stdout.split()  # fmt: skip
        subprocess.run(["g++", "-std=c++17", "-O2", str(source), "-o", str(program), *flags], check=True)  # noqa: S607
    return program


def jpeg_file() -> bytes:
    """A photograph of 256×256 pixels, with colour at half resolution: the middle of a sample picture, enlarged."""
    with Image.open(REPOSITORY / "samples/cat.jpg") as sample:
        side = min(sample.size)
        left, top = (sample.width - side) // 2, (sample.height - side) // 2
        square = sample.crop((left, top, left + side, top + side)).resize((256, 256), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    square.save(file, "JPEG", quality=85, subsampling="4:2:0")
    return file.getvalue()


class Payloads:
    """Serialised requests as files; all hold the same random pixels."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, server: Server, load: Load) -> Path:
        """The file with the request that a load sends to a server."""
        kind = "http" if server.method is None else server.method.rsplit("/")[-1]
        file = self._folder / f"{kind}-{load.images}{'-jpeg' if load.encoded else ''}"
        if not file.exists():
            pixels = np.random.default_rng(0).integers(0, 256, (load.images, 32, 32, 3), dtype=np.uint8)
            file.write_bytes(self._encode(server, load, pixels))
        return file

    def _encode(self, server: Server, load: Load, pixels: np.ndarray) -> bytes:
        if load.encoded:
            return cifar.ClassifyRequest(images=[cifar.Image(encoded=jpeg_file())] * load.images).SerializeToString()
        if server.method is None:
            return json.dumps({"images": base64.b64encode(pixels.tobytes()).decode()}).encode()
        if server.method == CLASSIFY:
            return cifar.ClassifyRequest(packed_rgb=pixels.tobytes()).SerializeToString()
        request = inference.ModelInferRequest(model_name="cifar10", raw_input_contents=[pixels.tobytes()])
        request.inputs.add(name="images", datatype="UINT8", shape=pixels.shape)
        request.outputs.add(name="probabilities")
        return request.SerializeToString()


class Bench:
    """What stays the same over a run: model, tools, virtual environments."""

    def __init__(self, model: Path, seconds: int, servers: Sequence[Server], peers: Path, folder: Path) -> None:
        self.model = model.resolve()
        self.seconds = seconds
        self.threads = len(os.sched_getaffinity(0))
        self.logs = folder
        self.payloads = Payloads(folder)
        self.program = compile_load_generator(peers)
        self.pythons = {server.name: install(server, peers) for server in servers}

    def raw(self, load: Load) -> Figures:
        """Measures onnxruntime alone, with the batches that a server could form."""
        environment = {**os.environ, "MODEL": str(self.model), "THREADS": str(self.threads)}
        done = subprocess.run(
            [sys.executable, "raw.py", str(load.batch), str(self.seconds)],
            cwd=PEERS, env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        return dict(json.loads(done.stdout))

    def ask(self, server: Server, running: Running, load: Load, rate: float, seed: int) -> Figures:
        """Puts a load on a running server; its figures."""
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
        share = (self.seconds + 1) / self.seconds  # the log leaves out the warm-up, the processor time does not
        return {
            "images_per_second": len(times) * load.images / self.seconds,
            "p50": times[len(times) // 2] if times else 0.0,
            "p99": times[int(0.99 * len(times))] if times else 0.0,
            "answered": int(len(times) * share),
            "client_cpu_seconds_per_image": None,
            "codes": {"0": len(times), "http": len(rows) - len(times)},
        }

    def wait_until_it_answers(self, server: Server, running: Running) -> None:
        """Sends single images until one is answered."""
        load, end = Load("ready", concurrency=1), time.monotonic() + 90
        seconds, self.seconds = self.seconds, 1
        try:
            while time.monotonic() < end:
                try:
                    if self.ask(server, running, load, 0.0, 0)["images_per_second"] > 0:
                        return
                except subprocess.CalledProcessError:
                    time.sleep(0.5)
        finally:
            self.seconds = seconds
        raise SystemExit(f"{server.name} does not answer; it printed:\n{running.log()[-2000:]}")

    def round(self, server: Server, loads: Sequence[Load], seed: int, progress: Callable[[str], None]) -> Figures:
        """Starts a server, puts every load on it and stops it; figures by load."""
        result: Figures = {}
        with started(server, self.pythons[server.name], self.model, self.threads, self.logs / "server.log") as running:
            self.wait_until_it_answers(server, running)
            for load in loads:
                if (load.encoded and server.method != CLASSIFY) or (load.share and server.method is None):
                    continue
                progress(f"{server.name}: {load.name}")
                rate = load.share * result.get(CAPACITY, {}).get("images_per_second", 0.0)
                if load.share and not rate:
                    continue
                result[load.name] = self.ask(server, running, load, rate, seed)
                running.note_memory()
            result["peak_mebibytes"] = running.peak_memory
        return result


def _of_grpc(result: Figures, load: Load) -> Figures:
    good = result["codes"].get("0", {"count": 0, "p50": 0.0, "p99": 0.0})
    bad = {code: each for code, each in result["codes"].items() if code != "0"}
    images = result["answered_in_time"] * load.images
    return {
        "images_per_second": images / result["seconds"],
        "p50": good["p50"],
        "p99": good["p99"],
        "answered": result["answered"],
        "client_cpu_seconds_per_image": result["client_cpu_seconds"] / max(images, 1),
        "refused_p99": max((each["p99"] for each in bad.values()), default=None),
        "codes": {code: each["count"] for code, each in result["codes"].items()},
        "first_error": result["first_error"],
    }


def median(rounds: Sequence[Figures], load: str, key: str) -> float | None:
    """Median of a figure over the rounds; None if no round has it."""
    values = [each[load][key] for each in rounds if load in each and each[load].get(key) is not None]
    return statistics.median(values) if values else None


def table(results: dict[str, list[Figures]], loads: Sequence[Load]) -> str:
    """Markdown: a table for each load with a row for each server, and one of memory."""
    headers = (
        "server",
        "images/s (lowest to highest)",
        "ours is ×",
        "p50, ms",
        "p99, ms",
        "CPU, ms/image",
        "refused, %",
    )
    blocks = []
    for load in loads:
        rows = [_row(name, results, load) for name in results if any(load.name in each for each in results[name])]
        blocks.append(f"**{load.name}**\n\n{tabulate(rows, headers, 'github', disable_numparse=True)}")
    memory = [
        (name, f"{statistics.median(peaks):,.0f}")
        for name, rounds in results.items()
        if (peaks := [each["peak_mebibytes"] for each in rounds if "peak_mebibytes" in each])
    ]
    blocks.append(tabulate(memory, ("server", "peak memory, MiB"), "github", disable_numparse=True))
    return "\n\n".join(blocks)


def _row(name: str, results: dict[str, list[Figures]], load: Load) -> tuple[str, ...]:
    rounds = results[name]
    measured = [each[load.name] for each in rounds if load.name in each]
    speeds = [each["images_per_second"] for each in measured]
    # Ratios within a round: the servers of one round ran on the same machine at nearly the same time.
    ratios = [
        ours[load.name]["images_per_second"] / each[load.name]["images_per_second"]
        for ours, each in zip(results.get("ours", []), rounds, strict=False)
        if load.name in ours and load.name in each and each[load.name]["images_per_second"]
    ]
    return (
        name,
        f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})",
        f"{statistics.median(ratios):.2f}" if ratios and name != "ours" else "",
        _number(median(rounds, load.name, "p50"), ".2f"),
        _number(median(rounds, load.name, "p99"), ".2f"),
        _number(1000 * (median(rounds, load.name, "cpu_seconds_per_image") or 0), ".2f"),
        _number(statistics.median(_refused(each) for each in measured), ".1f"),
    )


def _refused(figures: Figures) -> float:
    """Percentage of the calls that were not answered."""
    codes = figures.get("codes") or {"0": 1}
    return float(100 * (1 - codes.get("0", 0) / sum(codes.values())))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def draw(results: dict[str, list[Figures]], file: Path) -> None:
    """Plots p99 latency over throughput for calls of one image; each server is a line, each concurrency a point."""
    from matplotlib import pyplot, style

    from cifar_core.study.figures import COLOURS, STYLE

    # All forms of our server have one colour and differ in the style of the line.
    styles = itertools.cycle(("-", "--", "-.", ":"))
    others = itertools.cycle(("blue", "green", "purple", "sky"))
    with style.context(STYLE):
        figure, axes = pyplot.subplots(figsize=(8.0, 4.6), layout="constrained")
        for (name, rounds), marker in zip(results.items(), itertools.cycle("xos^DvP*Xd<>h"), strict=False):
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
        axes.set(xlabel="images/s, one image a call", ylabel="p99, ms", yscale="log", xlim=(0, None))
        figure.legend(loc="outside right center", fontsize=10)
        figure.savefig(file, dpi=150, metadata={"Software": None})
        pyplot.close(figure)


def arguments() -> argparse.Namespace:
    """The command line, with servers and loads looked up by their names."""
    parser = argparse.ArgumentParser(
        description="Compares the serving speed of our server with that of others.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each server is started and measured")
    parser.add_argument("--seconds", type=int, default=3, help="seconds of each load, after a second of warm-up")
    parser.add_argument("--checkout", type=Path, help='folder of another checkout, measured as "before"')
    parser.add_argument("--servers", help="names, separated by commas; all if left out")
    parser.add_argument("--loads", help="names, separated by commas; all if left out")
    parser.add_argument("--model", type=Path, default=REPOSITORY / "exported/model.onnx", help="the ONNX file")
    parser.add_argument(
        "--peers", type=Path, default=Path.home() / ".cache/cifar-core/peers", help="installs peers here"
    )
    parser.add_argument("--output", type=Path, default=Path("reports/serving"), help="folder for all figures")
    given = parser.parse_args()
    servers = {server.name: server for server in all_servers(given.checkout and given.checkout.resolve())}
    loads = {load.name: load for load in LOADS}
    for option, known in (("servers", servers), ("loads", loads)):
        names = getattr(given, option).split(",") if getattr(given, option) else list(known)
        if unknown := set(names) - set(known):
            parser.error(f"--{option}: {', '.join(sorted(unknown))} is not one of {', '.join(known)}")
        setattr(given, option, [each for name, each in known.items() if name in names])
    return given


def main() -> None:
    """Runs the rounds and prints the table."""
    given = arguments()
    servers: list[Server] = given.servers
    results: dict[str, list[Figures]] = {RAW: [], **{server.name: [] for server in servers}}
    given.output.mkdir(parents=True, exist_ok=True)

    def progress(message: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.model, given.seconds, servers, given.peers, Path(folder))
        for number in range(given.rounds):
            progress(f"round {number + 1} of {given.rounds}")
            order = random.Random(number).sample(servers, len(servers))
            results[RAW].append({load.name: bench.raw(load) for load in given.loads if load.concurrency})
            for server in order:
                results[server.name].append(bench.round(server, given.loads, number, progress))
            (given.output / "serving.json").write_text(json.dumps(results, indent=1))
    draw(results, given.output / "serving.png")
    print(f"{platform.processor() or platform.machine()}, {bench.threads} cores, {given.rounds} rounds\n")
    print(table(results, given.loads))


if __name__ == "__main__":
    main()
