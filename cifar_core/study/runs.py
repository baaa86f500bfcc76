"""What the study published for each of its rows, and our finished runs, grouped into the same rows."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_core.errors import CifarError
from cifar_core.history import best_epoch
from cifar_core.recipe import Recipe
from cifar_core.resuming import saved_recipe
from cifar_core.run_folder import RunError, RunFolder, folder_name


class ReportError(CifarError):
    """There are no finished runs, or runs that cannot be reported together."""


@dataclass(frozen=True)
class Published:
    """The figures that the study gives for one of its rows, measured on the official archive. Accuracies are 0 to 1.

    Attributes:
        recipe: name of our recipe for this row.
        validation: best validation accuracy.
        epoch: epoch of the best validation accuracy.
        test: accuracy on the test set.
        figures: numbers of the study's plots of loss and accuracy; None if it shows none.
    """

    recipe: str
    validation: float | None = None
    epoch: int | None = None
    test: float | None = None
    figures: tuple[int, int] | None = None


DEEP_WITH_MOMENTUM = "deep+momentum=0.9"
STUDY = (
    Published("baseline", 0.736, 12, None, (2, 3)),  # section 1.3.3
    Published("dropout-0.2", 0.778, 18, 0.7495, (4, 5)),  # sections 1.3.5 and 1.3.6
    Published("dropout-0.5", 0.762, 19, None, (6, 7)),
    Published("dropout-0.8", 0.627, 17, None, (8, 9)),
    Published("dropout-0.8-60", 0.677, None, None, None),  # "about 5 points more than at 20 epochs"
    Published("deep", None, None, 0.8196, (11, 12)),  # section 1.3.7
    Published(DEEP_WITH_MOMENTUM, None, None, None, None),  # the other reading of section 1.3.7
)


@dataclass(frozen=True)
class Run:
    """A finished run without its weights.

    Attributes:
        recipe: the recipe.
        seed: its seed.
        precision: precision of training, fp32 or bf16.
        data: kind, name and fingerprint of the data.
        initial: name and digest (`weights`) of the weights that it started from; None for fresh weights.
        teacher: name and digest of the teacher; None without one.
        environment: machine and library versions.
        date: when the run started (UTC); None for runs that do not say.
        history: one dictionary per epoch, see `RunFolder.history`.
        test: the evaluation on the test images; None if there was none yet.
        folder: the run folder.
    """

    recipe: Recipe
    seed: int
    precision: str
    data: dict[str, str]
    initial: dict[str, str] | None
    teacher: dict[str, str] | None
    environment: dict[str, Any]
    date: str | None
    history: list[dict[str, Any]]
    test: dict[str, Any] | None
    folder: RunFolder

    @property
    def name(self) -> str:
        """What runs of other seeds have in common with this one: recipe, initial weights and teacher."""
        initial, teacher = (source["weights"] if source else None for source in (self.initial, self.teacher))
        return folder_name(self.recipe.name, initial, teacher)

    @property
    def best(self) -> dict[str, Any]:
        """The line of the epoch whose weights the run ended with."""
        return best_epoch(self.history, self.recipe.weights)

    @property
    def minutes(self) -> float:
        """Duration of training and validation."""
        return float(sum(line["seconds"] for line in self.history)) / 60


def read_runs(folder: Path) -> list[Run]:
    """Reads every finished run below a folder, at any depth; the folder may be a run folder itself.

    Raises:
        ReportError: There is no finished run, the runs were trained on different data, or two are of the same recipe,
            precision and seed.
        RunError: A run is damaged.
    """
    folders = [RunFolder(path) for path in _run_folders(folder)]
    runs = [_read_run(run) for run in folders if run.is_finished()]
    if not runs:
        raise ReportError(
            f"{folder}: there is no finished run in this folder; train one with: python -m cifar_core.train RECIPE"
        )
    if len({run.data["fingerprint"] for run in runs}) > 1:
        names = ", ".join(sorted({f"{run.data['name']} ({run.data['fingerprint'][:12]})" for run in runs}))
        raise ReportError(
            f"{folder}: the runs were trained on different data, {names}; report the runs of each data set separately"
        )
    seen: dict[tuple[str, str, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.name, run.precision, run.seed), run)
        if other is not run:
            raise ReportError(
                f"{other.folder.path} and {run.folder.path} are both seed {run.seed} of {run.name} in {run.precision}, "
                "which would count as two seeds; report a folder that holds only one of them"
            )
    return runs


def _run_folders(folder: Path) -> list[Path]:
    """Every run folder, each once, ordered by path."""
    # `**` does not follow links to folders, but the other patterns do: runs may lie on another disk.
    patterns = ("**/recipe.json", "*/recipe.json", "*/*/recipe.json")
    found: dict[Path, Path] = {}
    for path in sorted({path.parent for pattern in patterns for path in folder.glob(pattern)}):
        found.setdefault(path.resolve(), path)
    return list(found.values())


def evaluation_file(folder: RunFolder) -> Path:
    """The file next to a run's history that holds the evaluation on the test images."""
    return folder.path / "test.json"


def _read_run(folder: RunFolder) -> Run:
    description = folder.description()
    return Run(
        recipe=saved_recipe(folder, description),
        seed=description["seed"],
        precision=description["precision"],
        data=description["data"],
        initial=description.get("initial"),
        teacher=description.get("teacher"),
        environment=description.get("environment", {}),
        date=description.get("date"),
        history=folder.history(),
        test=_test_result(folder),
        folder=folder,
    )


def _test_result(folder: RunFolder) -> dict[str, Any] | None:
    file = evaluation_file(folder)
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{file}: this file is damaged ({error}); remove it and write the report again") from error
    if not isinstance(value, dict) or not {"accuracy", "per_class"} <= value.keys():
        raise RunError(f"{file}: this file must hold accuracy and per_class; remove it and write the report again")
    return value


@dataclass(frozen=True)
class Row:
    """The runs of one recipe in one precision, ordered by seed, and what the study published for it.

    Runs that started from other weights, or had another teacher, are in a row of their own: `Run.name` is its name.
    """

    name: str
    precision: str
    runs: tuple[Run, ...]
    published: Published | None

    @property
    def best(self) -> list[float]:
        """Best validation accuracy of each run."""
        return [run.best["validation_accuracy"] for run in self.runs]

    @property
    def test(self) -> list[float]:
        """Test accuracy of each run that has one."""
        return [run.test["accuracy"] for run in self.runs if run.test]

    def mean(self, key: str, epoch: int) -> float:
        """Mean over the runs of a value of the history. Epochs count from 1; negative ones count from the end."""
        return statistics.fmean(run.history[epoch - 1 if epoch > 0 else epoch][key] for run in self.runs)


Rows = dict[str, Row]
"""Rows by their name."""


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """Groups runs by name and precision: the study's recipes first, in its order, then the others by name."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.name, run.precision), []).append(run)
    published = {row.recipe: row for row in STUDY}
    order = list(published)
    rows = [
        Row(name, precision, tuple(sorted(group, key=lambda run: run.seed)), published.get(name))
        for (name, precision), group in groups.items()
    ]
    return sorted(rows, key=lambda row: (order.index(row.name) if row.name in order else len(order), row.name))


def main_rows(rows: Iterable[Row]) -> Rows:
    """For each recipe, the row of the precision with the most seeds; fp32 if both have the same number."""
    chosen: Rows = {}
    for row in rows:
        current = chosen.get(row.name)
        if current is None or (len(row.runs), row.precision == "fp32") > (
            len(current.runs),
            current.precision == "fp32",
        ):
            chosen[row.name] = row
    return chosen
