"""The command `python -m cifar_core.sweep`."""

import argparse
import dataclasses
import itertools
import logging
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from cifar_core.data import Dataset, load_dataset
from cifar_core.device import CPU, available_cores
from cifar_core.distributed import number_of_ranks
from cifar_core.errors import needs_extra
from cifar_core.history import best_epoch
from cifar_core.initial_weights import InitialWeights, check_initial_weights, read_initial_weights
from cifar_core.recipes import Recipe, asked_precision, get_recipe
from cifar_core.resuming import check_same_run
from cifar_core.run_folder import RunFolder, default_folder, folder_name
from cifar_core.sweep.options import SweepError, check_number, combinations, make_parser
from cifar_core.sweep.processes import LOG, Command, last_line, train_here
from cifar_core.teacher import Teacher, check_teacher, read_teacher


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        recipe: The recipe with its changed values.
        folder: The run folder.
        command: How to train it.
        description: What recipe.json must hold, without what the sweep leaves open, such as the machine.
    """

    recipe: Recipe
    folder: RunFolder
    command: Command
    description: dict[str, Any]

    @property
    def group(self) -> str:
        """The name that this run shares with those of other seeds: that of their folder."""
        return self.folder.path.parent.name

    @property
    def name(self) -> str:
        """Recipe and seed."""
        return f"{self.group}/{self.folder.path.name}"


@dataclass(frozen=True)
class Sources:
    """What runs of a sweep learn from.

    Attributes:
        dataset: The data.
        initial: The weights to start from; None for fresh weights.
        teacher: The teacher; None without one.
    """

    dataset: Dataset
    initial: InitialWeights | None
    teacher: Teacher | None

    def check(self, recipe: Recipe) -> None:
        """Checks that runs of a recipe may learn from these weights and this teacher.

        Raises:
            InitialWeightsError, TeacherError: They may not, see `check_initial_weights` and `check_teacher`.
        """
        if self.initial is not None:
            check_initial_weights(self.initial, recipe, self.dataset)
        check_teacher(self.teacher, recipe, self.dataset)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Exit codes: 0 all runs are finished, 1 some are not, 2 the sweep cannot start.

    Raises:
        SweepError: A value is not allowed, or torchrun started several sweeps.
        RunError: A run folder is damaged, or holds a finished run of other values, data, weights or precision.
        InitialWeightsError, TeacherError: A recipe needs a teacher, or cannot have this one or these weights.
    """
    chosen = make_parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if number_of_ranks() > 1:
        raise SweepError(
            f"torchrun started this sweep {number_of_ranks()} times, but a sweep starts its runs itself, one device "
            "each; start it with: python -m cifar_core.sweep"
        )
    if chosen.ray:
        with needs_extra("ray"):
            import ray  # noqa: F401 -- a missing package is reported before anything is read
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # Loaded here once, so that a wrong path is reported once, and an archive is downloaded once.
    sources = Sources(
        load_dataset(chosen.data),
        read_initial_weights(chosen.init) if chosen.init else None,
        read_teacher(chosen.teacher, CPU) if chosen.teacher else None,
    )
    runs = list(_runs(chosen, sources))
    remaining = [run for run in runs if not _is_finished(run)]
    print(f"{len(runs)} runs, {len(runs) - len(remaining)} of them finished already", flush=True)
    if remaining:
        _train(chosen, remaining)
    unfinished = [run for run in runs if not run.folder.is_finished()]
    print(table(runs))
    for run in unfinished:
        print(f"{run.name} is not finished, see {run.folder.path / LOG}: {last_line(run.folder.path)}")
    if unfinished:
        print("run the same command again to continue the runs that are not finished")
    return 1 if unfinished else 0


def _train(chosen: argparse.Namespace, runs: Sequence[SweepRun]) -> None:
    """Trains runs and prints a line when one has ended."""
    commands = [run.command for run in runs]
    if chosen.ray:
        from cifar_core.sweep.cluster import train_on_cluster

        ended = train_on_cluster(commands, chosen.ray, gpus=int(chosen.device == "cuda"))
    else:
        ended = train_here(commands, chosen.jobs or max(1, available_cores() // chosen.threads))
    of_command = {run.command: run for run in runs}
    for number, (command, code) in enumerate(ended, 1):
        run = of_command[command]
        says = _result(run) if code == 0 else f"ended with exit code {code}: {last_line(run.folder.path)}"
        print(f"[{number}/{len(runs)}] {run.name} {says}", flush=True)


def _runs(chosen: argparse.Namespace, sources: Sources) -> Iterator[SweepRun]:
    """The runs of the sweep, each once: recipes, then values, then seeds."""
    overrides = combinations(chosen.set)
    check_number(len(chosen.recipes) * len(overrides) * len(chosen.seeds))
    recipes = [(name, changes, get_recipe(name, changes)) for name in chosen.recipes for changes in overrides]
    some_learn_from_teacher = any(recipe.distillation for _, _, recipe in recipes)
    seen, checked = set(), set()
    for name, changes, recipe in recipes:
        if recipe.name in seen:  # a value may be the recipe's own
            continue
        seen.add(recipe.name)
        # In a sweep over distillation=0,0.5 the former runs are trained without the teacher.
        without = not recipe.distillation and some_learn_from_teacher
        own = dataclasses.replace(sources, teacher=None) if without else sources
        held_out = (recipe.validation_images, recipe.split_seed, recipe.distillation > 0)
        runs = [_run(chosen, own, recipe, seed, (name, *_passed_on(chosen, own, changes))) for seed in chosen.seeds]
        # Warnings should not be repeated for each value. Earlier versions started runs that are refused now.
        if held_out not in checked and not all(run.folder.is_started() for run in runs):
            own.check(recipe)
            checked.add(held_out)
        yield from runs


def _run(
    chosen: argparse.Namespace, sources: Sources, recipe: Recipe, seed: int, arguments: tuple[str, ...]
) -> SweepRun:
    root = (chosen.runs or default_folder(sources.dataset.kind, "runs")).absolute()
    initial, teacher, dataset = sources.initial, sources.teacher, sources.dataset
    folder = root / folder_name(recipe.name, initial.digest if initial else None) / str(seed)
    arguments += ("--seed", str(seed), "--resume", "--runs", str(root))
    precision = asked_precision(chosen.precision, chosen.set, recipe)
    description = {
        "recipe": recipe.values(),
        "seed": seed,
        "data": {"kind": dataset.kind, "name": dataset.name, "fingerprint": dataset.fingerprint},
        "classes": list(dataset.classes),
        **({"precision": precision} if precision else {}),
        **({"initial": initial.description()} if initial else {}),
        **({"teacher": teacher.description()} if teacher else {}),
    }
    return SweepRun(recipe, RunFolder(folder), Command(arguments, folder, Path.cwd(), chosen.threads), description)


def _passed_on(chosen: argparse.Namespace, sources: Sources, changes: Sequence[str]) -> tuple[str, ...]:
    """The options of `cifar_core.train` that are those of the sweep."""
    options = {
        # Ray shows its tasks only the GPUs that they ask for.
        "--device": "cpu" if chosen.ray and chosen.device == "auto" else chosen.device,
        "--data": chosen.data,
        "--precision": chosen.precision,
        "--init": chosen.init,
        "--teacher": chosen.teacher if sources.teacher else None,
    }
    pairs = [("--set", change) for change in changes]
    pairs += [(option, str(value)) for option, value in options.items() if value]
    return tuple(itertools.chain(*pairs))


def _is_finished(run: SweepRun) -> bool:
    """Whether the run is finished.

    Raises:
        RunError: Its folder is damaged, or holds a finished run of other values, data, weights or precision.
    """
    if not run.folder.is_finished():
        return False
    found = run.folder.description()
    open_values = {key: found[key] for key in ("precision", "environment") if key in found}
    check_same_run(run.folder.path, found, open_values | run.description)
    return True


def _result(run: SweepRun) -> str:
    history = run.folder.history()
    best = best_epoch(history, run.recipe.weights)
    minutes = sum(line["seconds"] for line in history) / 60
    precision = run.folder.description()["precision"]
    return (
        f"finished in {precision}: best validation accuracy {best['validation_accuracy']:.2%} at epoch "
        f"{best['epoch']}, {minutes:.1f} min"
    )


def table(runs: Sequence[SweepRun]) -> str:
    """A Markdown table with a row per recipe: finished runs, and their best validation accuracies."""
    rows = []
    for name in dict.fromkeys(run.group for run in runs):
        group = [run for run in runs if run.group == name]
        histories = [run.folder.history() for run in group if run.folder.is_finished()]
        weights = group[0].recipe.weights
        best = [100 * best_epoch(history, weights)["validation_accuracy"] for history in histories]
        seconds = [sum(line["seconds"] for line in history) for history in histories]
        rows.append(
            (
                name,
                f"{len(best)} of {len(group)}",
                statistics.fmean(best) if best else None,
                statistics.stdev(best) if len(best) > 1 else None,
                min(best, default=None),
                max(best, default=None),
                statistics.fmean(seconds) / 60 if best else None,
            )
        )
    headers = ("recipe", "finished", "best validation accuracy, %: mean", "sd", "lowest", "highest", "minutes per run")
    return tabulate(rows, headers, "github", floatfmt=".2f", missingval="–")
