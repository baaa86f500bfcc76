"""The command line of `python -m cifar_core.sweep`."""

import argparse
import itertools
import re
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.device import DEVICES, available_cores
from cifar_core.distributed import number_of_ranks
from cifar_core.errors import CifarError
from cifar_core.recipes import KEYS, RECIPES, Recipe, asked_precision, get_recipe, read_recipe
from cifar_core.run_folder import RunFolder, best_epoch, default_folder
from cifar_core.sweep.processes import LOG, Command, last_line, train_here

# The values of these keys contain commas themselves.
_WHOLE_VALUES = ("sizes", "widths")
_LOCAL = "local"


class SweepError(CifarError):
    """The sweep cannot start."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        recipe: The recipe with its changed values.
        seed: The seed.
        folder: The run folder.
        command: How to train it.
        precision: The precision that was asked for; None leaves it to the recipe and the processor.
    """

    recipe: Recipe
    seed: int
    folder: RunFolder
    command: Command
    precision: str | None

    @property
    def name(self) -> str:
        """Recipe and seed."""
        return f"{self.recipe.name}/{self.seed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Exit codes: 0 all runs are finished, 1 some are not, 2 the sweep cannot start.

    Raises:
        SweepError: A value is not allowed, a finished run is not the run that the sweep asks for, or torchrun started
            several sweeps.
    """
    chosen = _parser().parse_args(arguments)
    if number_of_ranks() > 1:
        raise SweepError(
            f"torchrun started this sweep {number_of_ranks()} times, but a sweep starts its runs itself, one device "
            "each; start it with: python -m cifar_core.sweep"
        )
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # Loaded here once, so that a wrong path is reported once, and an archive is downloaded once.
    dataset = load_dataset(chosen.data)
    runs = list(_runs(chosen, dataset))
    remaining = [run for run in runs if not _is_finished(run, dataset)]
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


def _runs(chosen: argparse.Namespace, dataset: Dataset) -> Iterator[SweepRun]:
    """The runs of the sweep, each once: recipes, then values, then seeds."""
    root = (chosen.runs or default_folder(dataset.kind, "runs")).absolute()
    # Ray shows its tasks only the GPUs that they ask for.
    device = "cpu" if chosen.ray and chosen.device == "auto" else chosen.device
    seen = set()
    for name, overrides, seed in itertools.product(chosen.recipes, combinations(chosen.set), chosen.seeds):
        recipe = get_recipe(name, overrides)
        folder = root / recipe.name / str(seed)
        if folder in seen:  # a value may be the recipe's own
            continue
        seen.add(folder)
        arguments = [name, "--seed", str(seed), "--resume", "--runs", str(root), "--device", device]
        arguments += [argument for override in overrides for argument in ("--set", override)]
        arguments += ["--data", chosen.data] if chosen.data else []
        arguments += ["--precision", chosen.precision] if chosen.precision else []
        precision = asked_precision(chosen.precision, overrides, recipe)
        command = Command(tuple(arguments), folder, Path.cwd(), chosen.threads)
        yield SweepRun(recipe, seed, RunFolder(folder), command, precision)


def combinations(values: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the values of `--set`, as overrides for `get_recipe`.

    Args:
        values: Such as `dropout=0.2,0.5`. A key that occurs again gets further values. The values of `sizes` and
            `widths` contain commas, so each is given by itself.

    Raises:
        SweepError: A value has no `=`.
    """
    by_key: dict[str, list[str]] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals:
            raise SweepError(f"--set {value}: expected KEY=VALUE or KEY=VALUE,VALUE…")
        texts = [text] if key in _WHOLE_VALUES else text.split(",")
        by_key.setdefault(key, []).extend(f"{key}={each}" for each in texts)
    return list(itertools.product(*by_key.values()))


def seeds(text: str) -> list[int]:
    """The seeds of `0-4` or `0,3,7-9`.

    Raises:
        argparse.ArgumentTypeError: The text has another form.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= 2**32:
            raise argparse.ArgumentTypeError(
                f"'{text}': expected numbers and ranges from 0 to {2**32 - 1}, such as 0-4"
            )
        found += range(first, last + 1)
    return sorted(set(found))


def _is_finished(run: SweepRun, dataset: Dataset) -> bool:
    """Whether the run is finished.

    Raises:
        SweepError: Its folder holds a finished run of other values, data or precision.
    """
    if not run.folder.is_finished():
        return False
    description = run.folder.description()
    wanted = {
        "recipe": (read_recipe(description["recipe"]), run.recipe),
        "data": (description["data"]["fingerprint"], dataset.fingerprint),
    }
    if run.precision is not None:
        wanted["precision"] = (description["precision"], run.precision)
    for what, (found, asked) in wanted.items():
        if found != asked:
            raise SweepError(
                f"{run.folder.path}: this folder holds a finished run with {what} {found}, not {asked}; choose another "
                "folder with --runs DIR"
            )
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
    for name in dict.fromkeys(run.recipe.name for run in runs):
        group = [run for run in runs if run.recipe.name == name]
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cifar_core.sweep",
        description="Trains recipes with several seeds and values, several runs at a time. Finished runs are skipped, "
        "and others continue from their checkpoint.",
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help=f"names of recipes: {', '.join(RECIPES)}")
    parser.add_argument("--seeds", type=seeds, default=[0], metavar="0-4", help="seeds, such as 0-4 or 0,3; default: 0")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=A,B,C",
        help="values of the recipe to try; may be repeated, and every combination is trained. Values of sizes and "
        f"widths contain commas, so give --set sizes=… once for each. Keys: {', '.join(KEYS)}",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const=_LOCAL,
        metavar="ADDRESS",
        help="train on a Ray cluster, 'auto' or HOST:PORT; without ADDRESS, on a Ray that is started here. All "
        "machines must see the current folder, the runs and the data under the same paths",
    )
    parser.add_argument(
        "--threads",
        type=_count,
        default=1,
        metavar="N",
        help="threads of each run; several runs with one thread each take less time than one after another with all "
        "cores; default: %(default)s",
    )
    parser.add_argument(
        "--jobs",
        type=_count,
        metavar="N",
        help="runs at a time on this machine; default: the cores divided by --threads",
    )
    add_data_argument(parser)
    parser.add_argument("--device", choices=DEVICES, default="auto", help="device to train on; default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="precision; default: as of cifar_core.train")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="folder for all runs; default: as in cifar_core.train")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number
