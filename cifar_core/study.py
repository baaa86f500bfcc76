"""What the study published, what our runs measured, and whether they bear out its claims.

Reads run folders, or what is committed of them; knows nothing of tables and figures.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_core.errors import CifarError
from cifar_core.run_folder import RunError, RunFolder, best_epoch, finished_runs


class ReportError(CifarError):
    """Runs that cannot be reported together, or none."""


@dataclass(frozen=True)
class Published:
    """What the study says of one of its rows, on the official archive; shares, not per cent.

    Attributes:
        recipe: ours for this row.
        validation: best validation accuracy.
        epoch: of it.
        test: accuracy on the test set.
        figures: the study's numbers of the plots of loss and of accuracy; None where it shows none.
    """

    recipe: str
    validation: float | None = None
    epoch: int | None = None
    test: float | None = None
    figures: tuple[int, int] | None = None


OTHER_MOMENTUM = "deep+momentum=0.9"
STUDY = (
    Published("baseline", 0.736, 12, None, (2, 3)),  # section 1.3.3
    Published("dropout-0.2", 0.778, 18, 0.7495, (4, 5)),  # 1.3.5 and 1.3.6
    Published("dropout-0.5", 0.762, 19, None, (6, 7)),
    Published("dropout-0.8", 0.627, 17, None, (8, 9)),
    Published("dropout-0.8-60", 0.677, None, None, None),  # "about 5 points more than at 20 epochs"
    Published("deep", None, None, 0.8196, (11, 12)),  # 1.3.7
    Published(OTHER_MOMENTUM, None, None, None, None),  # its other reading
)


@dataclass(frozen=True)
class Run:
    """What a finished run left, but for its weights.

    Attributes:
        recipe: all values of it.
        data: kind, name and fingerprint of the images.
        history: a dictionary per epoch, as `RunFolder.history` gives it.
        test: the evaluation on the test images, taken once; None where it was not taken.
        folder: where it lies.
    """

    recipe: dict[str, Any]
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
        """The epoch of the best validation accuracy."""
        return best_epoch(self.history)

    @property
    def minutes(self) -> float:
        """Wall-clock time of training and validation."""
        return float(sum(line["seconds"] for line in self.history)) / 60


def read_runs(place: Path) -> list[Run]:
    """Every finished run below a folder, at whatever depth.

    Raises:
        ReportError: there is none, or they are of different data.
        RunError: one is damaged.
    """
    parents = sorted({path.parent.parent.parent for path in place.glob("**/recipe.json")})
    runs = []
    for folder in (folder for parent in parents for folder in finished_runs(parent)):
        about = folder.description()
        keys = ("recipe", "seed", "precision", "data")
        runs.append(
            Run(
                **{key: about[key] for key in keys},
                environment=about.get("environment", {}),
                date=about.get("date"),
                history=folder.history(),
                test=_test_result(folder),
                folder=folder,
            )
        )
    if not runs:
        raise ReportError(f"{place}: holds no finished run; train one with: python -m cifar_core.train RECIPE")
    if len({run.data["fingerprint"] for run in runs}) > 1:
        names = ", ".join(sorted({f"{run.data['name']} ({run.data['fingerprint'][:12]})" for run in runs}))
        raise ReportError(f"{place}: holds runs of different data, {names}; report each in a folder of its own")
    return runs


def evaluation_file(folder: RunFolder) -> Path:
    """Where the evaluation on the test images is kept, beside a run's history."""
    return folder.path / "test.json"


def _test_result(folder: RunFolder) -> dict[str, Any] | None:
    try:
        value = json.loads(evaluation_file(folder).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{evaluation_file(folder)}: damaged ({error}); remove it, and report again") from error
    if not isinstance(value, dict) or not {"accuracy", "per_class"} <= value.keys():
        raise RunError(f"{evaluation_file(folder)}: lacks the accuracy; remove it, and report again")
    return value


# The rows


@dataclass(frozen=True)
class Row:
    """The runs of one recipe in one precision, by seed, beside what was published."""

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
        """Test accuracy of each run of which it was taken."""
        return [run.test["accuracy"] for run in self.runs if run.test]

    def mean(self, key: str, epoch: int) -> float:
        """Mean over the runs of a value of the history; `epoch` counts from 1, or from the end where negative."""
        return statistics.fmean(run.history[epoch - 1 if epoch > 0 else epoch][key] for run in self.runs)


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """Runs by recipe and precision: the study's recipes first, in its order, others after, by name."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.recipe["name"], run.precision), []).append(run)
    published = {each.recipe: each for each in STUDY}
    order = list(published)
    rows = [
        Row(name, precision, tuple(sorted(group, key=lambda run: run.seed)), published.get(name))
        for (name, precision), group in groups.items()
    ]
    return sorted(rows, key=lambda row: (order.index(row.name) if row.name in order else len(order), row.name))


def main_rows(rows: Iterable[Row]) -> dict[str, Row]:
    """For each recipe the precision with the most seeds (fp32 where they tie), by name."""
    chosen: dict[str, Row] = {}
    for row in rows:
        before = chosen.get(row.name)
        if before is None or (len(row.runs), row.precision == "fp32") > (len(before.runs), before.precision == "fp32"):
            chosen[row.name] = row
    return chosen


def percent(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation (of a sample) of shares, in per cent: `75.4 ± 0.3`; no deviation for one value."""
    if not values:
        return "–"
    mean = f"{100 * statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.{digits}f}"


def points(difference: float) -> str:
    """A difference of shares in percentage points: `-2.4`."""
    return f"{100 * difference:+.1f}"


# The claims

Rows = dict[str, Row]


def _order(rows: Rows) -> tuple[str, bool]:
    names = ("dropout-0.2", "dropout-0.5", "baseline", "dropout-0.8")
    accuracies = [statistics.fmean(rows[name].best) for name in names]
    told = " > ".join(f"{name} {100 * each:.1f} %" for name, each in zip(names, accuracies, strict=True))
    holds = accuracies == sorted(accuracies, reverse=True) and len(set(accuracies)) == len(accuracies)
    return (told if holds else told.replace(" > ", ", ")), holds


def _stall(rows: Rows) -> tuple[str, bool]:
    row = rows["baseline"]
    half = len(row.runs[0].history) // 2
    gained = [row.mean(key, -1) - row.mean(key, half) for key in ("validation_accuracy", "train_accuracy")]
    told = (
        f"from epoch {half} to the last, validation {points(gained[0])} points to "
        f"{100 * row.mean('validation_accuracy', -1):.1f} %, training {points(gained[1])} to "
        f"{100 * row.mean('train_accuracy', -1):.1f} %"
    )
    return told, abs(gained[0]) < 0.02 and gained[1] > 0.1


def _loss_stops(rows: Rows) -> tuple[str, bool]:
    row = rows["baseline"]
    epochs = [min(run.history, key=lambda line: line["validation_loss"])["epoch"] for run in row.runs]
    least = statistics.fmean(min(line["validation_loss"] for line in run.history) for run in row.runs)
    told = (
        f"least validation loss at epochs {', '.join(map(str, epochs))} ({least:.2f}), "
        f"at the last {row.mean('validation_loss', -1):.2f}"
    )
    return told, all(abs(epoch - 13) <= 3 for epoch in epochs)


def _losses(rows: Rows) -> tuple[str, bool]:
    plain, dropped = rows["baseline"], rows["dropout-0.2"]
    values = [row.mean(key, -1) for key in ("train_loss", "validation_loss") for row in (plain, dropped)]
    told = (
        f"at the last epoch training loss {values[0]:.2f} without and {values[1]:.2f} with p = 0.2, "
        f"validation loss {values[2]:.2f} and {values[3]:.2f}"
    )
    return told, values[1] > values[0] and values[3] < values[2]


def _sixty(rows: Rows) -> tuple[str, bool]:
    short, long = (statistics.fmean(rows[name].best) for name in ("dropout-0.8", "dropout-0.8-60"))
    return f"{100 * short:.1f} % at 20, {100 * long:.1f} % at 60: {points(long - short)}", 0.03 <= long - short <= 0.07


def _eighty(rows: Rows) -> tuple[str, bool]:
    test = rows["deep"].test
    return f"{percent(test, 2)} % on the test images of this data", bool(test) and statistics.fmean(test) > 0.8


def _momentum(rows: Rows) -> tuple[str, bool]:
    without, with_it = rows["deep"], rows[OTHER_MOMENTUM]
    told = (
        f"best validation accuracy {percent(without.best)} % without, {percent(with_it.best)} % with it; "
        f"training loss at the last epoch {without.mean('train_loss', -1):.2f} and "
        f"{with_it.mean('train_loss', -1):.2f} (ln 10 = 2.30 is chance)"
    )
    return told, statistics.fmean(without.best) > statistics.fmean(with_it.best)


CLAIMS: tuple[tuple[str, tuple[str, ...], Callable[[Rows], tuple[str, bool]]], ...] = (
    (
        "Dropout 0.2 beats 0.5 beats none beats 0.8 (best validation accuracy)",
        ("baseline", "dropout-0.2", "dropout-0.5", "dropout-0.8"),
        _order,
    ),
    ("Without dropout validation accuracy stalls while training accuracy goes on", ("baseline",), _stall),
    ("Without dropout validation loss stops improving around epoch 13 (within 3)", ("baseline",), _loss_stops),
    ("With p = 0.2 training loss is higher and validation loss lower", ("baseline", "dropout-0.2"), _losses),
    ("60 epochs at p = 0.8 bring about 5 points (3 to 7)", ("dropout-0.8", "dropout-0.8-60"), _sixty),
    ("The deep model exceeds 80 % on the test set", ("deep",), _eighty),
    ("Ours: the deep recipe wants no momentum", ("deep", OTHER_MOMENTUM), _momentum),
)
