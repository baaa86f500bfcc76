"""Measures offline scoring: speed as a share of onnxruntime alone, and memory over a million images.

    python benchmarks/scoring.py [--images 40000] [--rounds 3] [--variant int8]
    python benchmarks/scoring.py --memory 1000000 --variant int8

onnxruntime alone computes arrays that are in memory already, in both ways in which it can use all cores: a batch on all
of them, and a batch on each. The better one counts. Nothing else should run on the machine.
"""

import argparse
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from tabulate import tabulate

REPOSITORY = Path(__file__).parents[1]
EXPORT = REPOSITORY / "exported"
CORES = len(os.sched_getaffinity(0))
BATCH = 64
PIXELS, FILES = "Parquet, raw pixels", "JPEG files, 32 x 32"
PHOTOS = "JPEG files, 640 x 480"
DISTINCT = 10_000
_SAMPLE_SECONDS = 0.5

Images = NDArray[np.uint8]


def pictures(count: int) -> Images:
    """Smooth random images, uint8 [count, 32, 32, 3], which JPEG compresses about as well as photographs."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 6, 6, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in coarse])


def write_parquet(file: Path, images: Images, count: int) -> None:
    """Writes `count` rows of raw pixels, the images again and again, in the default row groups of pyarrow."""
    rows = [image.tobytes() for image in images]
    schema = pa.schema([("image", pa.binary(3072))])
    with pq.ParquetWriter(file, schema, use_dictionary=False, compression="none") as writer:
        for first in range(0, count, 2**20):
            indices = range(first, min(count, first + 2**20))
            column = pa.array([rows[index % len(rows)] for index in indices], pa.binary(3072))
            writer.write_table(pa.table([column], schema), row_group_size=2**20)


def write_files(folder: Path, images: Images, size: tuple[int, int]) -> list[Path]:
    """Writes the images as JPEG files of this width and height."""
    folder.mkdir()
    files = []
    for number, image in enumerate(images):
        content = io.BytesIO()
        Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
        files.append(folder / f"{number:05d}.jpg")
        files[-1].write_bytes(content.getvalue())
    return files


def write_list(file: Path, files: list[Path], count: int) -> None:
    """Writes a list of `count` lines, the files again and again."""
    with file.open("w") as lines:
        for number in range(count):
            lines.write(f"{files[number % len(files)]}\n")


def _compute(session: Any, batch: Images) -> object:  # noqa: ANN401 -- onnxruntime has no types
    return session.run(None, {"images": batch})


def alone(variant: str, images: Images, count: int) -> dict[str, float]:
    """Images/s of onnxruntime on arrays, for a batch on all cores and for a batch on each core."""
    manifest = json.loads((EXPORT / "manifest.json").read_bytes())
    graph = (EXPORT / manifest["variants"][variant]["file"]).read_bytes()
    batches = [images[first : first + BATCH] for first in range(0, len(images) - BATCH + 1, BATCH)]
    work = [batches[number % len(batches)] for number in range(count // BATCH)]
    speeds = {}
    for name, threads, workers in (("a batch on all cores", CORES, 1), ("a batch on each core", 1, CORES)):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        compute = functools.partial(_compute, session)
        for batch in batches[:4]:
            compute(batch)
        with ThreadPoolExecutor(workers) as executor:
            started = time.perf_counter()
            for _ in executor.map(compute, work):
                pass
            speeds[name] = len(work) * BATCH / (time.perf_counter() - started)
    return speeds


def command(source: Path, output: Path, variant: str) -> list[str]:
    """The command that scores an input."""
    return [sys.executable, "-m", "service.score", str(source), str(output), "--variant", variant, "--device", "cpu"]


def scored(source: Path, output: Path, variant: str) -> float:
    """Images/s of a whole run of the command, with the start of Python, loading the model and writing the rows."""
    started = time.perf_counter()
    subprocess.run(command(source, output, variant), check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    rows: int = json.loads((output / "_score.json").read_bytes())["rows"]
    return rows / seconds


def compare(folder: Path, images: int, rounds: int, variant: str) -> str:
    """A table of speeds; each figure is the median over the rounds."""
    distinct = pictures(min(DISTINCT, images))
    sources = {PIXELS: folder / "pixels.parquet", FILES: folder / "small.txt", PHOTOS: folder / "photos.txt"}
    write_parquet(sources[PIXELS], distinct, images)
    write_list(sources[FILES], write_files(folder / "small", distinct, (32, 32)), images)
    write_list(sources[PHOTOS], write_files(folder / "photos", distinct[:500], (640, 480)), images // 4)
    speeds: dict[str, list[float]] = {}
    for number in range(rounds):
        measured = {f"onnxruntime alone, {name}": speed for name, speed in alone(variant, distinct, images).items()}
        for name, source in sources.items():
            measured[name] = scored(source, folder / f"out-{name}-{number}", variant)
        for name, speed in measured.items():
            speeds.setdefault(name, []).append(speed)
        print(f"round {number + 1}: {json.dumps(measured)}", file=sys.stderr, flush=True)
    best = max(
        (name for name in speeds if name.startswith("onnxruntime")), key=lambda name: statistics.median(speeds[name])
    )
    rows = [
        (name, statistics.median(values), statistics.median(map(lambda a, b: 100 * a / b, values, speeds[best])))
        for name, values in speeds.items()
    ]
    return tabulate(rows, ("input", "images/s", "% of onnxruntime alone"), "github", floatfmt=",.0f", intfmt=",")


def memory(folder: Path, images: int, variant: str) -> str:
    """A table of memory by quarter of a run, for pixels and for files."""
    distinct = pictures(DISTINCT)
    sources = {PIXELS: folder / "pixels.parquet", FILES: folder / "small.txt"}
    write_parquet(sources[PIXELS], distinct, images)
    write_list(sources[FILES], write_files(folder / "small", distinct, (32, 32)), images)
    rows = []
    for name, source in sources.items():
        started = time.perf_counter()
        output = folder / f"out-{name}"
        run = subprocess.Popen(command(source, output, variant), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        samples = list(memory_of(psutil.Process(run.pid), output))
        if run.wait():
            sys.exit(f"the run ended with exit code {run.returncode}")
        parts = max(part for part, _ in samples) + 1
        quarters = [[mib for part, mib in samples if quarter == part * 4 // parts] for quarter in range(4)]
        speed = images / (time.perf_counter() - started)
        rows.append(
            (name, speed, *(statistics.median(quarter) for quarter in quarters), max(mib for _, mib in samples))
        )
        print(rows[-1], file=sys.stderr, flush=True)
    headers = ("input", "images/s", "1st quarter, MiB", "2nd", "3rd", "4th", "highest")
    return tabulate(rows, headers, "github", floatfmt=",.0f")


def memory_of(process: psutil.Process, output: Path) -> Iterator[tuple[int, float]]:
    """Parts written, and memory of a process and its children in MiB (proportional set size), until it ends."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        total = 0.0
        for each in [process, *process.children(recursive=True)]:
            try:
                total += each.memory_full_info().pss / 2**20
            except psutil.NoSuchProcess:
                continue
        parts = len(list(output.glob("part-*"))) if output.exists() else 0
        if parts:
            yield parts, total
        time.sleep(_SAMPLE_SECONDS)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Speed and memory of offline scoring.")
    parser.add_argument("--images", type=int, default=40_000, help="number of images; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; default: %(default)s")
    parser.add_argument("--variant", default="fp32", help="variant of the model; default: %(default)s")
    parser.add_argument("--memory", type=int, metavar="IMAGES", help="measure memory over so many images instead")
    parser.add_argument(
        "--folder", type=Path, help="folder for the inputs, 3 GB for a million images; default: temporary"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        if arguments.memory:
            print(memory(Path(name), arguments.memory, arguments.variant))
        else:
            print(compare(Path(name), arguments.images, arguments.rounds, arguments.variant))


if __name__ == "__main__":
    main()
