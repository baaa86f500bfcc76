"""What the study published for each of its rows, and our finished runs, grouped into the same rows."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_core.errors import CifarError
from cifar_core.recipe import Recipe, RecipeError, read_recipe
from cifar_core.run_folder import RunError, RunFolder, best_epoch, finished_runs


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
    environment: dict[str, Any]
    date: str | None
    history: list[dict[str, Any]]
    test: dict[str, Any] | None
    folder: RunFolder

    @property
    def best(self) -> dict[str, Any]:
        """The line of the epoch with the best validation accuracy."""
        return best_epoch(self.history, self.recipe.weights)

    @property
    def minutes(self) -> float:
        """Duration of training and validation."""
        return float(sum(line["seconds"] for line in self.history)) / 60


def read_runs(folder: Path) -> list[Run]:
    """Reads every finished run below a folder, at any depth.

    Raises:
        ReportError: There is no finished run, or the runs were trained on different data.
        RunError: A run is damaged.
    """
    parents = sorted({path.parent.parent.parent for path in folder.glob("**/recipe.json")})
    runs = [_read_run(run) for parent in parents for run in finished_runs(parent)]
    if not runs:
        raise ReportError(
            f"{folder}: there is no finished run in this folder; train one with: python -m cifar_core.train RECIPE"
        )
    if len({run.data["fingerprint"] for run in runs}) > 1:
        names = ", ".join(sorted({f"{run.data['name']} ({run.data['fingerprint'][:12]})" for run in runs}))
        raise ReportError(
            f"{folder}: the runs were trained on different data, {names}; report the runs of each data set separately"
        )
    return runs


def evaluation_file(folder: RunFolder) -> Path:
    """The file next to a run's history that holds the evaluation on the test images."""
    return folder.path / "test.json"


def _read_run(folder: RunFolder) -> Run:
    description = folder.description()
    try:
        recipe = read_recipe(description["recipe"])
    except RecipeError as error:
        raise RunError(f"{folder.path / 'recipe.json'}: {error}") from error
    return Run(
        recipe=recipe,
        seed=description["seed"],
        precision=description["precision"],
        data=description["data"],
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
    """The runs of one recipe in one precision, ordered by seed, and what the study published for it."""

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
"""Rows by the name of their recipe."""


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """Groups runs by recipe and precision: the study's recipes first, in its order, then the others by name."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.recipe.name, run.precision), []).append(run)
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
