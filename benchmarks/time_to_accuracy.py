"""Test accuracy and training time of recipes, beside airbench's script on the same machine and data.

    python benchmarks/time_to_accuracy.py --recipes "sprint;sprint flip=none" --seeds 5 [--script airbench94_muon.py]

Each run is a process of its own, timed from start to end: importing, loading the data, training, validating, saving. A
second process evaluates it on the test images and is timed too. Recipes with changed values (`NAME KEY=VALUE ...`) make
an ablation. With `teacher=NAME` (`deep-fast distillation=0.95 teacher=fast`), that recipe is trained first, with the
same images held out, and its time is part of the training time. The script is run unchanged by peers/airbench_start.py;
it is not part of this repository. Its time is what it measures itself, so starting, loading the data and evaluating are
not counted.

The script and all recipes with the same seed take turns of `--turn` seconds: one process runs, the others are stopped,
and only the time in which a process runs is counted. So a change of the machine's speed affects all alike. All of them
must fit into memory together. Then the next seed follows. Finished runs leave a file of results and are skipped when
the command is started again; a run that was interrupted starts anew, because its time would be wrong. The seconds in
the history of a run include the time in which it was stopped; those in its file of results do not. Prints a Markdown
table of the finished runs and writes all measurements to `--output`. Nothing else should run on the machine.
"""

import argparse
import functools
import json
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch.utils.flop_counter import FlopCounterMode
from turns import Contender, Timed, take_turns

from cifar_core.data import add_data_argument, load_dataset
from cifar_core.device import CPU, DEVICES, describe_environment
from cifar_core.export import export_run
from cifar_core.hard_images import TRAINED_EVERY, WIDTHS
from cifar_core.history import best_epoch
from cifar_core.models import WhitenedConvNet, fuse_batch_norm
from cifar_core.pixels import IMAGE_SIZE
from cifar_core.predictors import build_model
from cifar_core.recipe import Recipe
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder, load_checkpoint
from cifar_core.study.markdown import markdown_table

STARTER = Path(__file__).parent / "peers/airbench_start.py"
STUDY = 0.8196
"""Test accuracy of the study's deep model on the official images (section 1.3.7)."""
SCRIPT = "airbench's script"
KEPT = "time_to_accuracy.json"
TESTED = "test.json"
EPOCH_LINE = re.compile(r"epoch +\d+/\d+ ")
"""The line that training prints after an epoch."""
ROUNDS = 7
"""Number of rounds in which the speed of inference is measured."""

MEMORY = 3.0
"""GiB that `best`, `long` and `medium` take each; airbench's script takes more, `deep-fast` and `sprint` less."""

Measurements = dict[str, Any]
Commands = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Choice:
    """A recipe to measure.

    Attributes:
        recipe: the recipe with its changes.
        overrides: the changes, each as KEY=VALUE.
        teacher: the teacher, which holds out the same images; None if there is none.
    """

    recipe: Recipe
    overrides: Sequence[str]
    teacher: "Choice | None" = None

    @property
    def name(self) -> str:
        """The row of the table."""
        return self.recipe.name if self.teacher is None else f"{self.recipe.name}, teacher {self.teacher.name}"

    def folder(self, runs: Path, seed: int) -> RunFolder:
        """The run folder of a seed."""
        return RunFolder(self._runs(runs) / self.recipe.name / str(seed))

    def teacher_folder(self, runs: Path, seed: int) -> RunFolder | None:
        """The run folder of the teacher; None if there is none."""
        return None if self.teacher is None else self.teacher.folder(self._runs(runs), seed)

    def _runs(self, runs: Path) -> Path:
        return runs if self.teacher is None else runs / f"teacher {self.teacher.name}"


def choose(text: str) -> Choice:
    """The recipe that `NAME [teacher=NAME] [KEY=VALUE ...]` describes.

    Raises:
        RecipeError: A recipe or a key is unknown, or a value has the wrong type or is out of range.
    """
    name, *words = text.split()
    overrides = [word for word in words if not word.startswith("teacher=")]
    recipe = get_recipe(name, overrides)
    teachers = [word.partition("=")[2] for word in words if word.startswith("teacher=")]
    if not teachers:
        return Choice(recipe, overrides)
    held_out = f"validation_images={recipe.validation_images}", f"split_seed={recipe.split_seed}"
    return Choice(recipe, overrides, Choice(get_recipe(teachers[-1], held_out), held_out))


def training(choice: Choice, runs: Path, seed: int, options: Sequence[str]) -> Commands:
    """The programs that train and evaluate one seed of a recipe. Removes what an interrupted start has left."""
    folder, teacher_folder = choice.folder(runs, seed), choice.teacher_folder(runs, seed)
    started = folder.path.with_name(f"{seed}.started")
    for each in (folder, teacher_folder):
        if each is not None and each.path.exists():
            if not started.exists():
                raise SystemExit(f"{each.path}: this run was not started by this command: use another --runs")
            shutil.rmtree(each.path)
    started.parent.mkdir(parents=True, exist_ok=True)
    started.touch()

    def train(chosen: Choice, *others: str) -> Sequence[str]:
        name = chosen.recipe.name.partition("+")[0]
        changed = [argument for override in chosen.overrides for argument in ("--set", override)]
        where = ("--seed", str(seed), "--runs", str(folder.path.parents[1]))
        return (*python, "cifar_core.train", name, *where, *changed, *others, *options)

    python = (sys.executable, "-m")
    data = options[options.index("--data") :] if "--data" in options else ()
    evaluate = (*python, "cifar_core.evaluate", "--model", str(folder.path), "--json", str(folder.path / TESTED), *data)
    if choice.teacher is None or teacher_folder is None:
        return train(choice), evaluate
    return train(choice.teacher), train(choice, "--teacher", str(teacher_folder.path)), evaluate


def training_values(recipe: Recipe, folder: RunFolder, ended: Sequence[Timed]) -> Measurements:
    """The measurements of a run that was trained and evaluated, after its teacher if there is one."""
    *teachers, train, evaluate = ended
    teacher_seconds = sum(teacher.seconds for teacher in teachers)
    history = folder.history()
    epochs_ended = [teacher_seconds + seconds for seconds, line in train.lines if EPOCH_LINE.match(line)]
    reached = [
        seconds
        for seconds, line in zip(epochs_ended, history, strict=True)
        if line["validation_accuracy"] is not None and line["validation_accuracy"] >= STUDY
    ]
    return {
        "accuracy": json.loads((folder.path / TESTED).read_bytes())["accuracy"],
        "validation_accuracy": best_epoch(history, recipe.weights)["validation_accuracy"],
        "train_seconds": teacher_seconds + train.seconds,
        **({"teacher_seconds": teacher_seconds} if teachers else {}),
        "evaluate_seconds": evaluate.seconds,
        "seconds_to_study": reached[0] if reached else None,
    }


def script_values(ended: Sequence[Timed]) -> Measurements:
    """The measurements of airbench's script, from what peers/airbench_start.py prints."""
    (timed,) = ended
    marks = [(seconds, json.loads(line)) for seconds, line in timed.lines if line.startswith('{"mark"')]
    epochs: list[tuple[float, float]] = []
    six_views, began, stopped, evaluating = None, 0.0, 0.0, 0.0
    for seconds, mark in marks:
        if mark["mark"] == "training":
            epochs, began, evaluating = [], seconds, 0.0
        elif mark["mark"] == "evaluating":
            stopped = seconds
        elif mark["mark"] == "evaluated" and mark["level"] == 0:
            epochs.append((stopped - began - evaluating, mark["accuracy"]))
            evaluating += seconds - stopped
        elif mark["mark"] == "evaluated":
            six_views = mark["accuracy"]
    reached = [seconds for seconds, accuracy in epochs if accuracy >= STUDY]
    return {
        "parameters": marks[-1][1]["parameters"],
        "epochs": epochs,
        "accuracy": epochs[-1][1],
        "accuracy_six_views": six_views,
        "train_seconds": epochs[-1][0],
        "seconds_to_study": reached[0] if reached else None,
    }


@dataclass(frozen=True)
class Run:
    """One seed of a recipe, or of the script.

    Attributes:
        name: row of the table.
        file: where its measurements are kept.
        commands: returns the programs that make them.
        values: returns the measurements of processes that have ended.
    """

    name: str
    file: Path
    commands: Callable[[], Commands]
    values: Callable[[Sequence[Timed]], Measurements]

    def contender(self) -> Contender:
        """The programs, which keep the measurements as soon as they have ended."""

        def keep(ended: Sequence[Timed]) -> None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.values(ended)))

        return Contender(self.name, self.commands(), keep)


def measure(runs: Sequence[Run], turn: float) -> dict[str, Measurements]:
    """Makes the runs that are missing, in turns, and returns the measurements of all."""
    missing = [run for run in runs if not run.file.exists()]
    memory = Path("/proc/meminfo")
    if turn and memory.exists():
        available = int(re.findall(r"MemAvailable: +(\d+) kB", memory.read_text())[0]) / 2**20
        if len(missing) * MEMORY > available:
            raise SystemExit(
                f"{len(missing)} runs take turns and need about {MEMORY:.0f} GiB each; {available:.0f} GiB are "
                "available: name fewer --recipes, or let one run follow the other with --turn 0"
            )
    take_turns([run.contender() for run in missing], turn)
    return {run.name: json.loads(run.file.read_bytes()) for run in runs}


def training_flops(recipe: Recipe, classes: int, images: int) -> float:
    """Floating-point operations of the forward and backward passes of a whole training, without the optimizer."""
    model = recipe.make_model(classes)
    small = WhitenedConvNet(WIDTHS, classes)
    sizes = [recipe.image_size(epoch) for epoch in range(recipe.epochs)]
    total = 0.0
    for size in set(sizes):
        pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter:
            model(pixels).sum().backward()
        operations = recipe.hard_share * counter.get_total_flops()
        if recipe.hard_share < 1:
            with FlopCounterMode(display=False) as forward:
                loss = small(pixels).sum()
            with FlopCounterMode(display=False) as backward:
                loss.backward()
            operations += forward.get_total_flops() + backward.get_total_flops() / TRAINED_EVERY
        total += sizes.count(size) * images * operations / 2
    return total


def choice_flops(choice: Choice, classes: int, images: int) -> float:
    """Floating-point operations of `training_flops`, with those of the training and the outputs of a teacher.

    Args:
        choice: the recipe.
        classes: number of classes.
        images: number of training images, including those that are held out.
    """
    trained_on = images - min(choice.recipe.validation_images, images // 10)
    total = training_flops(choice.recipe, classes, trained_on)
    if choice.teacher is None:
        return total
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        choice.teacher.recipe.make_model(classes)(torch.zeros(1, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8))
    outputs: float = 2 * images * counter.get_total_flops()  # of each image and its mirror image
    return total + choice_flops(choice.teacher, classes, images) + outputs


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
        help="recipes, each as NAME [teacher=NAME] [KEY=VALUE ...], separated by semicolons; default: %(default)s",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="number of seeds of each recipe and of the script, beginning with 0; default: %(default)s",
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="device to train on; default: %(default)s")
    parser.add_argument("--script", type=Path, metavar="FILE", help="path of airbench94_muon.py, to measure it as well")
    parser.add_argument(
        "--turn",
        type=float,
        metavar="SECONDS",
        help="length of a turn; 0 runs one process after another; default: 30, and 0 with CUDA, which goes on "
        "computing while a process is stopped",
    )
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
    data = ["--data", str(folder.resolve()) if folder.exists() else arguments.data] if folder else []
    dataset, runs_folder = load_dataset(arguments.data), arguments.runs.resolve()
    results: dict[str, list[Measurements]] = {}
    networks: dict[str, Measurements] = {SCRIPT: {}}
    exports: dict[str, Path] = {}
    chosen = [choose(text) for text in arguments.recipes.split(";")]
    if len({choice.name for choice in chosen}) < len(chosen):
        raise SystemExit(f"--recipes {arguments.recipes}: a recipe is named twice")
    options = ("--device", arguments.device, *data)
    turn = arguments.turn if arguments.turn is not None else 0 if torch.cuda.is_available() else 30
    for seed in range(arguments.seeds):
        runs: list[Run] = []
        if arguments.script:
            command = (sys.executable, str(STARTER), str(arguments.script.resolve()), "--seed", str(seed), *data)
            file = runs_folder / arguments.script.stem / str(seed) / KEPT
            runs.append(Run(SCRIPT, file, functools.partial(tuple, [command]), script_values))
        for choice in chosen:
            run_folder = choice.folder(runs_folder, seed)
            commands = functools.partial(training, choice, runs_folder, seed, options)
            values = functools.partial(training_values, choice.recipe, run_folder)
            runs.append(Run(choice.name, run_folder.path / KEPT, commands, values))
        for name, measured in measure(runs, turn).items():
            results.setdefault(name, []).append(measured)
            print(f"{name}, seed {seed}: {measured}", file=sys.stderr, flush=True)
    for choice in chosen:
        run_folder = choice.folder(runs_folder, 0)
        network = networks[choice.name] = describe_network(run_folder)
        network["training_flops"] = choice_flops(choice, len(dataset.classes), len(dataset.train))
        if not arguments.no_export:
            exports[choice.name] = arguments.output.resolve() / "exports" / choice.name
            manifest = export_run(run_folder, dataset, exports[choice.name])
            network["manifest"] = manifest.model_dump(mode="json")
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
