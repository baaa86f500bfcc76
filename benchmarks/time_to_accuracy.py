"""Test accuracy and training time of recipes, beside airbench's script on the same machine and data.

    python benchmarks/time_to_accuracy.py --recipes "sprint;sprint flip=none" --seeds 5 [--script airbench94_muon.py]

Each run is a process of its own, timed from start to end: importing, loading the data, training, validating, saving. A
second process evaluates it on the test images and is timed too. Recipes with changed values (`NAME KEY=VALUE ...`) make
an ablation. The script is run unchanged by peers/airbench_start.py; it is not part of this repository. The runs are
interleaved: seed 0 of the script and of all recipes, then seed 1, so that a change of the machine's speed affects all
alike. Each finished run leaves a file of results and is skipped when the command is started again; a run that was
interrupted starts anew, because its time would be wrong. Prints a Markdown table of the finished runs and writes all
measurements to `--output`. Nothing else should run on the machine.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch.utils.flop_counter import FlopCounterMode

from cifar_core.data import add_data_argument, load_dataset
from cifar_core.device import CPU, DEVICES, describe_environment
from cifar_core.export import export_run
from cifar_core.models import fuse_batch_norm
from cifar_core.pixels import IMAGE_SIZE
from cifar_core.predictors import build_model
from cifar_core.recipe import Recipe
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder, best_epoch, load_checkpoint
from cifar_core.study.markdown import markdown_table

REPOSITORY = Path(__file__).parents[1]
STUDY = 0.8196
"""Test accuracy of the study's deep model on the official images (section 1.3.7)."""
SCRIPT = "airbench's script"
ROUNDS = 7
"""Number of rounds in which the speed of inference is measured."""

Measurements = dict[str, Any]


def run_timed(*arguments: str) -> float:
    """Runs a Python process and returns its duration in seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def train(
    recipe: Recipe, overrides: Sequence[str], seed: int, runs: Path, data: Sequence[str], device: str
) -> Measurements:
    """Trains and evaluates one seed; returns the earlier measurement if there is one."""
    folder = RunFolder(runs / recipe.name / str(seed))
    measured = folder.path / "time_to_accuracy.json"
    if measured.exists():
        return dict(json.loads(measured.read_bytes()))
    if folder.path.exists():
        if folder.is_finished():
            raise SystemExit(
                f"{folder.path}: this run is finished, but was not timed by this command: use another --runs"
            )
        shutil.rmtree(folder.path)  # interrupted, and its time would be wrong
    name = recipe.name.partition("+")[0]
    changed = [argument for override in overrides for argument in ("--set", override)]
    training = run_timed(
        "-m", "cifar_core.train", name, "--seed", str(seed), "--runs", str(runs), "--device", device, *changed, *data
    )
    result = folder.path / "test.json"
    evaluating = run_timed("-m", "cifar_core.evaluate", "--model", str(folder.path), "--json", str(result), *data)
    history = folder.history()
    overhead = training - sum(line["seconds"] for line in history)  # starting, loading the data, saving
    reached = [
        overhead + sum(earlier["seconds"] for earlier in history[: line["epoch"]])
        for line in history
        if line["validation_accuracy"] is not None and line["validation_accuracy"] >= STUDY
    ]
    result_values = {
        "accuracy": json.loads(result.read_bytes())["accuracy"],
        "validation_accuracy": best_epoch(history, recipe.weights)["validation_accuracy"],
        "train_seconds": training,
        "evaluate_seconds": evaluating,
        "seconds_to_study": reached[0] if reached else None,
    }
    measured.write_text(json.dumps(result_values))
    return result_values


def run_script(script: Path, seed: int, runs: Path, data: Sequence[str]) -> Measurements:
    """Runs airbench's script once; returns the earlier measurement if there is one."""
    file = runs / script.stem / str(seed) / "time_to_accuracy.json"
    if file.exists():
        return dict(json.loads(file.read_bytes()))
    command = [sys.executable, str(REPOSITORY / "benchmarks/peers/airbench_start.py"), str(script)]
    done = subprocess.run([*command, "--seed", str(seed), *data], check=True, stdout=subprocess.PIPE, text=True)
    measured: Measurements = json.loads(done.stdout.splitlines()[-1])
    reached = [seconds for seconds, accuracy in measured["epochs"] if accuracy >= STUDY]
    values = measured | {"train_seconds": measured["seconds"], "seconds_to_study": reached[0] if reached else None}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))
    return values


def training_flops(recipe: Recipe, classes: int, images: int) -> float:
    """Floating-point operations of the forward and backward passes of a whole training, without the optimizer."""
    model = recipe.make_model(classes)
    sizes = [recipe.image_size(epoch) for epoch in range(recipe.epochs)]
    total = 0.0
    for size in set(sizes):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, size, size, 3, dtype=torch.uint8)).sum().backward()
        total += sizes.count(size) * images * counter.get_total_flops() / 2
    return total


def describe_network(folder: RunFolder) -> Measurements:
    """Parameters, and multiply-adds per image, of the network as it is exported."""
    network = fuse_batch_norm(build_model(load_checkpoint(folder.best)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8))
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "multiply_adds": counter.get_total_flops() // 2,
    }


def measure_inference(exports: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Images per second in onnxruntime with all cores, by variant and batch size: medians of measurements in turns."""
    sessions = {
        (name, variant): onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        for name, folder in exports.items()
        for variant, file in (("fp32", "model.onnx"), ("int8", "model.int8.onnx"))
    }
    speeds: dict[tuple[str, str, int], list[float]] = {}
    images = np.random.default_rng(0).integers(0, 256, (32, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for number in range(ROUNDS + 1):
        for (name, variant), session in sessions.items():
            for batch in (1, 32):
                done, began = 0, time.perf_counter()
                while (seconds := time.perf_counter() - began) < 0.4:
                    session.run(None, {"images": images[:batch]})
                    done += batch
                if number:  # the first round is a warm-up
                    speeds.setdefault((name, variant, batch), []).append(done / seconds)
    result: dict[str, dict[str, float]] = {}
    for (name, variant, batch), values in speeds.items():
        result.setdefault(name, {})[f"{variant}-{batch}"] = statistics.median(values)
    return result


def spread(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    """Mean and standard deviation: `82.10 ± 0.32`."""
    mean = format(scale * statistics.fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(scale * statistics.stdev(values), form)}"


def table_row(
    name: str,
    runs: Sequence[Measurements],
    network: Measurements,
    speed: dict[str, float],
    script_seconds: float | None,
) -> list[str]:
    """The row of a recipe in the table."""
    seconds = statistics.fmean(run["train_seconds"] for run in runs)
    reached = [run["seconds_to_study"] for run in runs if run["seconds_to_study"] is not None]
    with_evaluation = [run["train_seconds"] + run.get("evaluate_seconds", 0.0) for run in runs]
    return [
        name,
        f"{network['parameters']:,}" if "parameters" in network else "–",
        f"{network['multiply_adds'] / 1e6:.1f}" if "multiply_adds" in network else "–",
        spread([run["accuracy"] for run in runs], ".2f", 100),
        str(len(runs)),
        spread([run["train_seconds"] for run in runs], ".0f"),
        f"{seconds / script_seconds:.2f}" if script_seconds else "–",
        f"{network['training_flops'] / 1e15:.3f}" if "training_flops" in network else "–",
        f"{network['training_flops'] / 1e9 / seconds:,.0f}" if "training_flops" in network else "–",
        spread(with_evaluation, ".0f"),
        f"{spread(reached, '.0f')} ({len(reached)} of {len(runs)})" if reached else "–",
        *(
            f"{speed[key]:,.0f}" if key in speed else "–"
            for key in ("fp32-1", "fp32-32", "int8-1", "int8-32")
        ),
    ]  # fmt: skip


HEADER = (
    "recipe", "parameters", "multiply-adds, millions", "test accuracy, %", "seeds", "seconds to train",
    "ratio to the script", "training PFLOP", "GFLOP/s", "with evaluation", "seconds to 81.96 %",
    "images/s, fp32, batch 1", "batch 32", "int8, batch 1", "batch 32",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_argument(parser)
    parser.add_argument(
        "--recipes",
        default="fast;medium;long;best;deep-fast;sprint",
        help="recipes, each as NAME or NAME KEY=VALUE ..., separated by semicolons; default: %(default)s",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="number of seeds of each recipe and of the script, beginning with 0; default: %(default)s",
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="device to train on; default: %(default)s")
    parser.add_argument("--script", type=Path, metavar="FILE", help="path of airbench94_muon.py, to measure it as well")
    parser.add_argument("--no-export", action="store_true", help="do not measure the speed in onnxruntime")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/timed"), metavar="DIR", help="folder for all runs; default: %(default)s"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("reports/time_to_accuracy"),
        metavar="DIR",
        help="folder for exports and results.json; default: %(default)s",
    )
    return parser


def main() -> None:
    """Trains and measures the recipes, and prints the table."""
    arguments = _parser().parse_args()
    folder = Path(arguments.data) if arguments.data else None
    # The processes run in the repository, so the path of a folder must not depend on the current one.
    data = ["--data", str(folder.resolve()) if folder.exists() else arguments.data] if folder else []
    dataset, runs_folder = load_dataset(arguments.data), arguments.runs.resolve()
    results: dict[str, list[Measurements]] = {}
    networks: dict[str, Measurements] = {SCRIPT: {}}
    exports: dict[str, Path] = {}
    chosen = [(get_recipe(name, changes), changes) for name, *changes in map(str.split, arguments.recipes.split(";"))]
    for seed in range(arguments.seeds):
        if arguments.script:
            results.setdefault(SCRIPT, []).append(run_script(arguments.script, seed, runs_folder, data))
        for recipe, overrides in chosen:
            run = train(recipe, overrides, seed, runs_folder, data, arguments.device)
            results.setdefault(recipe.name, []).append(run)
            print(f"{recipe.name}, seed {seed}: {run}", file=sys.stderr, flush=True)
    for recipe, _ in chosen:
        run_folder = RunFolder(runs_folder / recipe.name / "0")
        networks[recipe.name] = describe_network(run_folder)
        trained_on = len(dataset.train) - min(recipe.validation_images, len(dataset.train) // 10)
        networks[recipe.name]["training_flops"] = training_flops(recipe, len(dataset.classes), trained_on)
        if not arguments.no_export:
            exports[recipe.name] = arguments.output.resolve() / "exports" / recipe.name
            manifest = export_run(run_folder, dataset, exports[recipe.name])
            networks[recipe.name]["manifest"] = manifest.model_dump(mode="json")
    if arguments.script:
        networks[SCRIPT] = {"parameters": results[SCRIPT][0]["parameters"]}
    speeds = measure_inference(exports)
    machine = describe_environment(CPU)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(
        json.dumps({"machine": machine, "results": results, "networks": networks, "speeds": speeds}, indent=1)
    )
    print(f"{dataset.name}; {machine['device']}, {machine['threads']} threads, torch {machine['torch']}\n")
    script_runs = results.get(SCRIPT, [])
    script_seconds = statistics.fmean(run["train_seconds"] for run in script_runs) if script_runs else None
    rows = [
        table_row(name, runs, networks[name], speeds.get(name, {}), script_seconds) for name, runs in results.items()
    ]
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()
