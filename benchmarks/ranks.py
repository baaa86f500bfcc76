"""One run on several ranks beside one process and beside independent runs, on the cores of this machine.

    python benchmarks/ranks.py [--recipe deep-fast] [--data synthetic:2000] [--ranks 2] [--epochs 4] [--rounds 5]

Each round trains three times, in turn, so that changes in the speed of the machine affect all: one process with all
cores; ranks that torchrun starts, with an equal share of the cores each; and as many independent runs at once, with the
same share. The table shows the time of an epoch, which is the median over the epochs of a round but its first, in which
memory is allocated and kernels are compiled; and how many whole runs of the recipe that makes in an hour.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cifar_core.device import CPU, available_cores, describe_environment
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder

PYTHON = (sys.executable, "-m")
TRAIN = "cifar_core.train"


def epoch_seconds(commands: Sequence[Sequence[str]], threads: int, folder: Path) -> float:
    """Median duration of an epoch of commands that train at the same time, each in a folder of runs of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    places = [folder / str(number) for number in range(len(commands))]
    processes = [
        subprocess.Popen([*command, "--runs", str(place)], env=environment, stdout=subprocess.DEVNULL)
        for command, place in zip(commands, places, strict=True)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a run failed; its message is above")
    histories = [RunFolder(next(place.glob("*/*"))).history() for place in places]
    return float(statistics.median(line["seconds"] for history in histories for line in history[1:]))


def main() -> None:
    """Measures in rounds and prints the table."""
    parser = argparse.ArgumentParser(description="Measures one run on several ranks beside independent runs.")
    parser.add_argument("--recipe", default="deep-fast", help="recipe to train; default: %(default)s")
    parser.add_argument("--data", default="synthetic:2000", help="data to train on; default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks, and of runs at once; default: 2")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each run, at least 2; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; default: %(default)s")
    arguments = parser.parse_args()
    ranks, cores, recipe = arguments.ranks, available_cores(), get_recipe(arguments.recipe)
    share = max(1, cores // ranks)
    options = [arguments.recipe, "--device", "cpu", "--data", arguments.data, "--set", f"epochs={arguments.epochs}"]
    alone = [*PYTHON, TRAIN, *options]
    together = [*PYTHON, "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", TRAIN, *options]
    ways = {
        f"one process, {cores} threads": ([alone], cores),
        f"one run on {ranks} ranks, threads per rank: {share}": ([together], share),
        f"{ranks} runs at once, threads per run: {share}": ([alone] * ranks, share),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(arguments.rounds):
        for way, (commands, threads) in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds[way].append(epoch_seconds(commands, threads, Path(folder)))
        latest = "  ".join(f"{values[-1]:.2f}" for values in seconds.values())
        print(f"round {number + 1} of {arguments.rounds}: {latest} s/epoch", flush=True)
    machine = describe_environment(CPU)
    print(f"{arguments.recipe} on {arguments.data}, {machine['device']}, {cores} cores, torch {machine['torch']}")
    print(f"{'':40s}  s/epoch  (lowest to highest)  runs/hour")
    for way, (commands, _) in ways.items():
        middle = statistics.median(seconds[way])
        spread = f"({min(seconds[way]):.2f} to {max(seconds[way]):.2f})"
        print(f"{way:40s}  {middle:7.2f}  {spread:>19s}  {len(commands) * 3600 / (middle * recipe.epochs):9.1f}")


if __name__ == "__main__":
    main()
