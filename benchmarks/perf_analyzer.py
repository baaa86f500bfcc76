"""Measures the server with NVIDIA's load generator perf_analyzer, unchanged, over the Open Inference Protocol.

    python benchmarks/perf_analyzer.py [--seconds 5] [--options '--variant int8'] [--streaming]

The program is part of the wheel of tritonclient. It needs libcudart.so.12, although it uses no GPU, and Debian's
libb64. All three are downloaded into a temporary folder, which is removed at the end: nothing is installed. Prints one
row for each load. Nothing else should run on the machine.
"""

import argparse
import csv
import os
import shlex
import stat
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from service.launch import ServerProcess

REPOSITORY = Path(__file__).parents[1]
WHEELS = ("tritonclient==2.41.0", "nvidia-cuda-runtime-cu12==12.9.79")
DEBIAN = "libb64-0d"
PLATFORM = "manylinux1_x86_64"
START_AND_STOP_SECONDS = 240


@dataclass(frozen=True)
class Load:
    """One kind of load: requests of `batch` images each, `concurrency` of them in flight."""

    concurrency: int
    batch: int


LOADS = (Load(1, 1), Load(64, 1), Load(1, 32), Load(4, 32))


class PerfAnalyzer:
    """The program and the libraries that it needs, in a folder.

    Args:
        folder: Where to put them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for wheel in WHEELS:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            platforms = ["--platform", PLATFORM, "--platform", "manylinux2014_x86_64"]
            subprocess.run([*pip, *platforms, "--dest", str(folder), wheel], check=True)
        for path in folder.glob("*.whl"):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
        apt = ["apt-get", "--option", "APT::Sandbox::User=root", "download", "--quiet", DEBIAN]
        subprocess.run(apt, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for path in folder.glob("*.deb"):
            subprocess.run(["dpkg", "--extract", str(path), str(folder)], check=True)  # noqa: S607
        self._program = next(folder.glob("*.data/data/bin/perf_analyzer"), folder / "perf_analyzer")
        self._program.chmod(self._program.stat().st_mode | stat.S_IXUSR)
        libraries = {path.parent for path in folder.rglob("lib*.so*")}
        self._environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, sorted(libraries)))}

    def measure(self, target: str, load: Load, seconds: float, stability: float, streaming: bool) -> dict[str, str]:
        """Sends one load until the measurement is stable; the row of figures that the program writes.

        Raises:
            subprocess.CalledProcessError: The program failed; its output is printed.
        """
        figures = self._folder / "figures.csv"
        done = subprocess.run(
            [
                str(self._program), "-m", "cifar10", "-u", target, "-i", "grpc", "-b", str(load.batch),
                "--concurrency-range", str(load.concurrency), "-p", str(int(seconds * 1000)), "-s", str(stability),
                "-f", str(figures), *(["--streaming"] if streaming else []),
            ],
            env=self._environment, capture_output=True, text=True, timeout=START_AND_STOP_SECONDS,
        )  # fmt: skip
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
            done.check_returncode()
        with figures.open(newline="") as file:
            return next(csv.DictReader(file))


def main() -> None:
    """Measures all loads with one server."""
    parser = argparse.ArgumentParser(description="Measures the server with NVIDIA's perf_analyzer.")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one measurement; it is repeated")
    parser.add_argument(
        "--stability", type=float, default=10.0, help="per cent by which three measurements in a row may differ"
    )
    parser.add_argument("--options", default="", help="options of the server")
    parser.add_argument("--streaming", action="store_true", help="send the requests over streams (ModelStreamInfer)")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as name:
        program = PerfAnalyzer(Path(name))
        with ServerProcess(*shlex.split(arguments.options), folder=REPOSITORY) as server:
            server.ready()
            for load in LOADS:
                seen = program.measure(server.target, load, arguments.seconds, arguments.stability, arguments.streaming)
                milliseconds = [
                    f"{float(seen[column]) / 1000:.1f}"
                    for column in ("p50 latency", "p99 latency", "Server Queue", "Server Compute Infer")
                ]
                rate = f"{float(seen['Inferences/Second']):,.0f}"
                rows.append([load.batch, load.concurrency, rate, *milliseconds])
    headers = ["images a call", "in flight", "images/s", "p50, ms", "p99, ms", "queue, ms", "engine, ms"]
    print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
