"""Everything that needs a CUDA device, in one command: tests, training, export, serving; prints a table at the end.

    python benchmarks/gpu.py [--script airbench94_muon.py] [--data ...]        `make gpu`

Runs the tests marked `cuda`, trains `sprint`, `fast` and `best` and airbench's script with one seed each, exports the
best of them, and compares the server on CUDA with onnxruntime alone. Ends with an error if there is no CUDA device.
`--rehearse` runs the same parts on the CPU with a few generated images, to find mistakes where there is no GPU.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from cifar_core.data import add_data_argument
from cifar_core.device import choose_device, describe_environment
from cifar_core.errors import CifarError, run_command
from cifar_core.pixels import IMAGE_SIZE
from cifar_core.study.markdown import markdown_table
from service.client import Client
from service.launch import ServerProcess

UInt8 = npt.NDArray[np.uint8]

REPOSITORY = Path(__file__).parents[1]
RECIPES = "sprint;fast;best"
REHEARSAL = "sprint epochs=1 batch_size=30;fast epochs=1 batch_size=30 widths=4,8,8 whiten_bias_epochs=1 hard_share=0.5"
LOADS = ((1, 1), (32, 1), (256, 1), (256, 4))
"""Images in a call, and calls at a time."""
SECONDS = 3.0
"""Duration of a measurement."""


def python(*arguments: str) -> None:
    """Runs a Python process; its output appears in ours.

    Raises:
        SystemExit: It failed.
    """
    print(f"\n$ python {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=False)
    if done.returncode != 0:
        raise SystemExit(f"error: python {' '.join(arguments)} ended with code {done.returncode}")


def images_per_second(call: Callable[[UInt8], object], batch: int, at_a_time: int) -> float:
    """How many images a function classifies per second, called by several threads, after a warm-up."""
    images = np.random.default_rng(0).integers(0, 256, (batch, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for _ in range(3):
        call(images)
    began = time.perf_counter()

    def work(_: int) -> int:
        count = 0
        while time.perf_counter() - began < SECONDS:
            call(images)
            count += batch
        return count

    with ThreadPoolExecutor(at_a_time) as pool:
        total = sum(pool.map(work, range(at_a_time)))
    return total / (time.perf_counter() - began)


def serving_rows(exported: Path, device: str) -> list[list[str]]:
    """Rows of the table: images per second of onnxruntime alone and through the server."""
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=[provider])
    if provider not in session.get_providers():
        raise SystemExit(f"error: onnxruntime could not start its {provider}; install the extra cuda")
    rows = []
    with ServerProcess("--model", exported, "--device", device) as server:
        server.ready()
        with Client(server.target) as client:
            for batch, at_a_time in LOADS:
                alone = images_per_second(lambda images: session.run(None, {"images": images}), batch, at_a_time)
                served = images_per_second(client.probabilities, batch, at_a_time)
                load = f"{batch} images a call, {at_a_time} calls at a time"
                rows.append([load, f"{alone:,.0f}", f"{served:,.0f}", f"{served / alone:.0%}"])
    return rows


def main() -> int:
    """Runs all parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_argument(parser)
    parser.add_argument("--script", type=Path, metavar="FILE", help="path of airbench94_muon.py, to measure it as well")
    parser.add_argument("--rehearse", action="store_true", help="run the parts on the CPU with small settings")
    parser.add_argument(
        "--output", type=Path, default=Path("reports/gpu"), metavar="DIR", help="folder for all results"
    )
    arguments = parser.parse_args()
    device = choose_device("cpu" if arguments.rehearse else "cuda")  # an error without a CUDA device
    if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise CifarError("this onnxruntime has no CUDA, which the server needs: use make gpu PROCESSOR=cuda")
    output = arguments.output.resolve() / ("rehearsal" if arguments.rehearse else "")
    data = ["--data", "synthetic:300"] if arguments.rehearse else []
    data = ["--data", arguments.data] if arguments.data else data
    began = time.perf_counter()
    if not arguments.rehearse:
        python("-m", "pytest", "-q", "-m", "cuda")
    script = ["--script", str(arguments.script.resolve())] if arguments.script else []
    recipes = REHEARSAL if arguments.rehearse else RECIPES
    runs = output / "runs"
    common = ("--no-export", "--device", device.type, "--runs", str(runs), "--output", str(output))
    python("benchmarks/time_to_accuracy.py", "--recipes", recipes, *common, *script, *data)
    python("-m", "cifar_core.export", "--runs", str(runs), "--output", str(output / "exported"), *data)
    rows = serving_rows(output / "exported", device.type)
    print(f"\n{describe_environment(device)['device']}; {(time.perf_counter() - began) / 60:.0f} minutes\n")
    print(markdown_table(("load", "onnxruntime alone, images/s", "server, images/s", "share"), rows))
    return 0


if __name__ == "__main__":
    run_command(main)
