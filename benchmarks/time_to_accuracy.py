"""How accurate a recipe becomes and how long that takes, beside airbench's script on the same machine and data.

    python benchmarks/time_to_accuracy.py --recipes "sprint;sprint flip=none" --seeds 5 [--script airbench94_muon.py]

Each run is a process of its own, timed from its start to its end: importing, loading the data, training, validating,
saving. A second process evaluates it on the test images and is timed too. Changed recipes (`NAME KEY=VALUE ...`) make
an ablation. The script is run as it is (peers/airbench_start.py); it is not part of this repository. Prints a table of
Markdown and writes every figure to `--output`. Nothing else should run on the machine.
"""

import argparse
import json
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
from cifar_core.device import describe_environment
from cifar_core.evaluate import build_model
from cifar_core.export import export_run
from cifar_core.models import folded
from cifar_core.recipes import Recipe, get_recipe
from cifar_core.run_folder import RunFolder, load_checkpoint

REPOSITORY = Path(__file__).parents[1]
STUDY = 0.8196
"""What the study's deep model attains on the official test images (section 1.3.7)."""
SCRIPT = "airbench's script"
ROUNDS = 7

Figures = dict[str, Any]


def run_timed(*arguments: str) -> float:
    """Seconds that a Python process takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def train(recipe: Recipe, overrides: Sequence[str], seed: int, runs: Path, data: Sequence[str]) -> Figures:
    """Trains and evaluates one seed; what was measured before is taken as it is."""
    folder = RunFolder(runs / recipe.name / str(seed))
    measured = folder.path / "time_to_accuracy.json"
    if measured.exists():
        return dict(json.loads(measured.read_bytes()))
    name = recipe.name.partition("+")[0]
    changed = [each for override in overrides for each in ("--set", override)]
    training = run_timed(
        "-m", "cifar_core.train", name, "--seed", str(seed), "--runs", str(runs), "--device", "cpu", *changed, *data
    )
    result = folder.path / "test.json"
    evaluating = run_timed("-m", "cifar_core.evaluate", "--model", str(folder.path), "--json", str(result), *data)
    history = folder.history()
    outside = training - sum(line["seconds"] for line in history)  # start, data, saving
    passed = [
        outside + sum(each["seconds"] for each in history[: line["epoch"]])
        for line in history
        if line["validation_accuracy"] >= STUDY
    ]
    told = {
        "accuracy": json.loads(result.read_bytes())["accuracy"],
        "validation_accuracy": max(line["validation_accuracy"] for line in history),
        "train_seconds": training,
        "evaluate_seconds": evaluating,
        "seconds_to_study": passed[0] if passed else None,
    }
    measured.write_text(json.dumps(told))
    return told


def run_script(script: Path, seed: int, data: Sequence[str]) -> Figures:
    """One run of airbench's script."""
    command = [sys.executable, str(REPOSITORY / "benchmarks/peers/airbench_start.py"), str(script)]
    done = subprocess.run([*command, "--seed", str(seed), *data], check=True, stdout=subprocess.PIPE, text=True)
    told: Figures = json.loads(done.stdout.splitlines()[-1])
    passed = [seconds for seconds, accuracy in told["epochs"] if accuracy >= STUDY]
    return told | {"train_seconds": told["seconds"], "seconds_to_study": passed[0] if passed else None}


def describe_network(folder: RunFolder) -> Figures:
    """Parameters and multiply-adds of an image, of the network as it is exported."""
    network = folded(build_model(load_checkpoint(folder.best)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    return {
        "parameters": sum(each.numel() for each in network.parameters()),
        "multiply_adds": counter.get_total_flops() // 2,
    }


def measure_inference(exports: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Images per second in onnxruntime with all cores, by variant and batch size; medians, taking turns."""
    sessions = {
        (name, variant): onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        for name, folder in exports.items()
        for variant, file in (("fp32", "model.onnx"), ("int8", "model.int8.onnx"))
    }
    speeds: dict[tuple[str, str, int], list[float]] = {}
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    for number in range(ROUNDS + 1):
        for (name, variant), session in sessions.items():
            for batch in (1, 32):
                done, began = 0, time.perf_counter()
                while (seconds := time.perf_counter() - began) < 0.4:
                    session.run(None, {"images": images[:batch]})
                    done += batch
                if number:  # the first pays for allocations
                    speeds.setdefault((name, variant, batch), []).append(done / seconds)
    result: dict[str, dict[str, float]] = {}
    for (name, variant, batch), values in speeds.items():
        result.setdefault(name, {})[f"{variant}-{batch}"] = statistics.median(values)
    return result


def spread(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    """Mean and standard deviation: `82.10 ± 0.32`."""
    mean = format(scale * statistics.fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(scale * statistics.stdev(values), form)}"


def line_of(name: str, runs: Sequence[Figures], network: Figures, speed: dict[str, float]) -> list[str]:
    """A recipe's line of the table."""
    passed = [each["seconds_to_study"] for each in runs if each["seconds_to_study"] is not None]
    whole = [each["train_seconds"] + each.get("evaluate_seconds", 0.0) for each in runs]
    return [
        name,
        f"{network['parameters']:,}" if "parameters" in network else "–",
        f"{network['multiply_adds'] / 1e6:.1f}" if "multiply_adds" in network else "–",
        spread([each["accuracy"] for each in runs], ".2f", 100),
        str(len(runs)),
        spread([each["train_seconds"] for each in runs], ".0f"),
        spread(whole, ".0f"),
        f"{spread(passed, '.0f')} ({len(passed)} of {len(runs)})" if passed else "–",
        *(
            f"{speed[key]:,.0f}" if key in speed else "–"
            for key in ("fp32-1", "fp32-32", "int8-1", "int8-32")
        ),
    ]  # fmt: skip


HEAD = (
    "recipe", "parameters", "multiply-adds, millions", "test accuracy, %", "seeds", "seconds to train",
    "with evaluation", "seconds to 81.96 %", "images/s, fp32, batch 1", "batch 32", "int8, batch 1", "batch 32",
)  # fmt: skip


def main() -> None:
    """Runs what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_argument(parser)
    parser.add_argument("--recipes", default="sprint;deep-fast;best", help="NAME or NAME KEY=VALUE ..., with ; between")
    parser.add_argument("--seeds", type=int, default=1, help="of each recipe, from 0; default: %(default)s")
    parser.add_argument("--script", type=Path, help="airbench94_muon.py, wherever it lies")
    parser.add_argument("--script-seeds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--no-export", action="store_true", help="leave out onnxruntime's speed")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders lie; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("reports/time_to_accuracy"), help="default: %(default)s")
    arguments = parser.parse_args()
    data = ["--data", str(Path(arguments.data).resolve())] if arguments.data else []
    dataset, runs_place = load_dataset(arguments.data), arguments.runs.resolve()
    results: dict[str, list[Figures]] = {}
    networks: dict[str, Figures] = {SCRIPT: {}}
    exports: dict[str, Path] = {}
    for text in arguments.recipes.split(";"):
        recipe_name, *overrides = text.split()
        recipe = get_recipe(recipe_name, overrides)
        for seed in range(arguments.seeds):
            told = train(recipe, overrides, seed, runs_place, data)
            results.setdefault(recipe.name, []).append(told)
            print(f"{recipe.name}, seed {seed}: {told}", file=sys.stderr, flush=True)
        folder = RunFolder(runs_place / recipe.name / "0")
        networks[recipe.name] = describe_network(folder)
        if not arguments.no_export:
            exports[recipe.name] = arguments.output.resolve() / "exports" / recipe.name
            networks[recipe.name]["manifest"] = export_run(folder, dataset, exports[recipe.name])
    if arguments.script:
        results[SCRIPT] = [run_script(arguments.script, seed, data) for seed in range(arguments.script_seeds)]
        networks[SCRIPT] = {"parameters": results[SCRIPT][0]["parameters"]}
    speeds = measure_inference(exports)
    machine = describe_environment(torch.device("cpu"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(
        json.dumps({"machine": machine, "results": results, "networks": networks, "speeds": speeds}, indent=1)
    )
    print(f"{dataset.name}; {machine['device']}, {machine['threads']} threads, torch {machine['torch']}\n")
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD))
    for name, measured in results.items():
        print("| " + " | ".join(line_of(name, measured, networks[name], speeds.get(name, {}))) + " |")


if __name__ == "__main__":
    main()
