"""Finished runs -> the table study-versus-ours, the study's claims checked, and its figures.

    python -m cifar_core.report [--runs runs --output reports]

Reads run folders, or what is committed of them, and trains nothing. Curves and tables show no image; figures 1 and 10
do, and go to `reports/`, which git ignores.
"""

import argparse
import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_core.data import Dataset, add_data_argument, load_dataset, plot_examples
from cifar_core.device import CPU
from cifar_core.errors import CifarError, run_command
from cifar_core.evaluate import check_classes, choose_split, evaluate, load_predictor, predict_all
from cifar_core.figures import COLOURS, Curve, Series, plot_comparison, plot_curves, plot_probabilities
from cifar_core.run_folder import (
    RunError,
    RunFolder,
    atomic_write,
    best_epoch,
    default_place,
    finished_runs,
    to_json,
)

HISTORIES = Path("docs/results/histories")
PRIVATE = Path("reports")  # for what shows images; ignored by git


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


def _test_file(folder: RunFolder) -> Path:
    return folder.path / "test.json"


def _test_result(folder: RunFolder) -> dict[str, Any] | None:
    try:
        value = json.loads(_test_file(folder).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{_test_file(folder)}: damaged ({error}); remove it, and report again") from error
    if not isinstance(value, dict) or not {"accuracy", "per_class"} <= value.keys():
        raise RunError(f"{_test_file(folder)}: lacks the accuracy; remove it, and report again")
    return value


def take_test_accuracies(runs: Iterable[Run], dataset: Dataset) -> None:
    """Evaluates each run's best weights on the test images and keeps the result beside them, so that it is done once.

    Runs without weights, such as the committed histories, or of other data are left as they are.
    """
    keys = ("model", "data", "split", "images", "correct", "accuracy", "interval", "loss", "per_class")
    for run in runs:
        if run.test is None and run.folder.best.exists() and run.data["fingerprint"] == dataset.fingerprint:
            result = evaluate(load_predictor(run.folder.path, CPU), dataset, "test")
            atomic_write(_test_file(run.folder), to_json({key: result[key] for key in keys}))


def keep_histories(runs: Iterable[Run], target: Path) -> None:
    """Copies what a report needs of each run, a few kilobytes, to PRECISION/RECIPE/SEED below a folder."""
    for run in runs:
        place = target / run.precision / run.recipe["name"] / str(run.seed)
        place.mkdir(parents=True, exist_ok=True)
        for name in ("recipe.json", "history.jsonl", "test.json"):
            if (run.folder.path / name).exists():
                atomic_write(place / name, (run.folder.path / name).read_bytes())


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


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _command(row: Row) -> str:
    name, *changes = row.name.split("+")
    options = "".join(f" --set {change}" for change in changes)
    precision = "" if row.precision == "fp32" else f" --precision {row.precision}"
    seeds = ", ".join(str(run.seed) for run in row.runs)
    return f"`train {name}{options}{precision} --seed N`, N = {seeds}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        + ["| " + " | ".join(line) + " |" for line in lines]
    )


def study_table(rows: dict[str, Row]) -> str:
    """The study's rows beside ours, as Markdown."""
    lines = []
    for row in rows.values():
        if row.published is None:
            continue
        said = row.published
        epochs = ", ".join(str(run.best["epoch"]) for run in row.runs)
        published = "–" if said.validation is None else f"{said.validation:.1%}".replace("%", " %")
        if said.epoch:
            published += f" ({said.epoch})"
        elif said.validation is not None:
            published = "about " + published
        minutes = [run.minutes for run in row.runs]
        lines.append(
            (
                row.name,
                published,
                f"{percent(row.best)} ({epochs})",
                "–" if said.validation is None else _points(statistics.fmean(row.best) - said.validation),
                percent([run.history[-1]["validation_accuracy"] for run in row.runs]),
                "–" if said.test is None else f"{100 * said.test:.2f} %",
                percent(row.test, 2),
                "–" if said.test is None or not row.test else _points(statistics.fmean(row.test) - said.test),
                str(len(row.runs)),
                row.precision,
                f"{statistics.median(minutes):.0f}",
                _command(row),
            )
        )
    head = (
        "recipe",
        "best validation, published (epoch)",
        "ours, % (epochs)",
        "points",
        "final validation, %",
        "test, published",
        "ours, %",
        "points",
        "seeds",
        "precision",
        "minutes a run",
        "command: `python -m cifar_core.` and",
    )
    return _table(head, lines) + "\n\n" + _circumstances([run for row in rows.values() for run in row.runs])


def _circumstances(runs: Sequence[Run]) -> str:
    machines = sorted(
        {
            f"{run.environment.get('device', 'unknown')}, {run.environment.get('threads', '?')} thread(s) a run"
            for run in runs
        }
    )
    torches = sorted({f"torch {run.environment.get('torch', '?')}" for run in runs})
    dates = sorted({run.date for run in runs if run.date})
    data = runs[0].data
    return (
        f"Data: {data['name']} (fingerprint {data['fingerprint'][:12]}). Machine: {'; '.join(machines)}; "
        f"{', '.join(torches)}. Date: {dates[0] if dates else 'unknown'}"
        + (f" to {dates[-1]}" if len(dates) > 1 else "")
        + ". Mean ± standard deviation over seeds; the test accuracy is that of the weights of the best validation "
        "epoch, looked at once a run."
    )


def precision_table(rows: Sequence[Row]) -> str:
    """Recipes that were trained in fp32 and in bf16, side by side, as Markdown; a sentence where there is none."""
    by_key = {(row.name, row.precision): row for row in rows}
    lines = []
    for name in dict.fromkeys(row.name for row in rows):
        fp32, bf16 = by_key.get((name, "fp32")), by_key.get((name, "bf16"))
        if fp32 and bf16:
            lines.append((name, percent(fp32.best), percent(bf16.best), percent(fp32.test, 2), percent(bf16.test, 2)))
    if not lines:
        return "No recipe was trained in both precisions."
    head = ("recipe", "best validation, fp32, %", "bf16, %", "test, fp32, %", "bf16, %")
    return _table(head, lines)


def class_table(rows: dict[str, Row]) -> str:
    """Test accuracy of each class, mean over seeds, in the order of the last row's, as Markdown."""
    with_test = [row for row in rows.values() if row.test and row.published and row.published.test]
    if not with_test:
        return "No test accuracy was taken."

    def accuracy(row: Row, name: str) -> float:
        return statistics.fmean(run.test["per_class"][name] or 0.0 for run in row.runs if run.test)

    first = next(run.test for run in with_test[-1].runs if run.test)
    names = sorted(first["per_class"], key=lambda name: -accuracy(with_test[-1], name))
    lines = [(name, *(f"{100 * accuracy(row, name):.1f}" for row in with_test)) for name in names]
    return _table(("class", *(f"{row.name}, %" for row in with_test)), lines)


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
        f"from epoch {half} to the last, validation {_points(gained[0])} points to "
        f"{100 * row.mean('validation_accuracy', -1):.1f} %, training {_points(gained[1])} to "
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
    return f"{100 * short:.1f} % at 20, {100 * long:.1f} % at 60: {_points(long - short)}", 0.03 <= long - short <= 0.07


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


def claim_table(rows: Rows) -> str:
    """Each claim, the numbers that it rests on, and whether they bear it out, as Markdown."""
    lines = []
    for claim, needed, check in CLAIMS:
        missing = [name for name in needed if name not in rows]
        told, holds = (f"not run: {', '.join(missing)}", None) if missing else check(rows)
        lines.append((claim, told, {None: "–", True: "holds", False: "does not hold"}[holds]))
    return _table(("claim", "measured", ""), lines)


# The figures


def _series(row: Row, key: str, scale: float = 1.0) -> list[Series]:
    return [[scale * line[key] for line in run.history] for run in row.runs]


def figure_names(row: Row) -> tuple[str, str]:
    """File names of a recipe's plots of loss and of accuracy: by the study's number, or by the recipe's name."""
    if row.published and row.published.figures:
        loss, accuracy = row.published.figures
        return f"figure-{loss:02d}.png", f"figure-{accuracy:02d}.png"
    name = re.sub(r"[^a-z0-9.]+", "-", row.name)
    return f"{name}-loss.png", f"{name}-accuracy.png"


def draw_curves(rows: Rows, folder: Path) -> dict[str, tuple[str, str]]:
    """Two plots a recipe and the overview of the dropout rates. Returns the file names of each recipe's plots."""
    files = {}
    for row in rows.values():
        files[row.name] = figure_names(row)
        best = [run.best["epoch"] for run in row.runs]
        seeds = f"mean and range of {len(row.runs)} seeds" if len(row.runs) > 1 else "one seed"
        for file, key, label, scale in (
            (files[row.name][0], "loss", "cross-entropy", 1.0),
            (files[row.name][1], "accuracy", "accuracy, %", 100.0),
        ):
            curves = (
                Curve("training", COLOURS["orange"], _series(row, f"train_{key}", scale)),
                Curve("validation", COLOURS["blue"], _series(row, f"validation_{key}", scale), marked=best),
            )
            plot_curves(folder / file, f"{row.name}: {key}, {seeds}", label, curves)
    dropout = [
        (name, label, colour)
        for name, label, colour in (
            ("baseline", "no dropout", "black"),
            ("dropout-0.2", "p = 0.2", "blue"),
            ("dropout-0.5", "p = 0.5", "green"),
            ("dropout-0.8", "p = 0.8", "orange"),
        )
        if name in rows
    ]
    if len(dropout) > 1:
        panels = [
            (
                title,
                [Curve(label, COLOURS[colour], _series(rows[name], key, scale)) for name, label, colour in dropout],
            )
            for title, key, scale in (
                ("validation accuracy, %, mean and range over seeds", "validation_accuracy", 100.0),
                ("validation loss", "validation_loss", 1.0),
            )
        ]
        plot_comparison(folder / "dropout-rates.png", panels)
        files["dropout-rates"] = ("dropout-rates.png", "")
    return files


def figure_block(rows: Rows, files: dict[str, tuple[str, str]], prefix: str) -> str:
    """The figures as Markdown, a recipe a line."""
    lines = []
    if "dropout-rates" in files:
        lines += [f"![validation accuracy and loss of all dropout rates]({prefix}/{files['dropout-rates'][0]})", ""]
    for row in rows.values():
        loss, accuracy = files[row.name]
        numbers = row.published.figures if row.published else None
        title = f"Figures {numbers[0]} and {numbers[1]}: {row.name}" if numbers else f"Besides: {row.name}"
        lines += [f"{title}", "", f"![loss of {row.name}]({prefix}/{loss}) ![accuracy]({prefix}/{accuracy})", ""]
    return "\n".join(lines).rstrip()


def _model_of_figure_10(runs: Iterable[Run], exported: Path) -> Path | None:
    """The best p = 0.2 run, as in the study, whose weights are there; or else the best run, or the exported model."""
    candidates = [run for run in runs if run.folder.best.exists()]
    candidates = [run for run in candidates if run.recipe["name"] == "dropout-0.2"] or candidates
    best = max(candidates, key=lambda run: float(run.best["validation_accuracy"]), default=None)
    if best is None:
        return exported if exported.exists() else None
    return best.folder.path


def draw_private(runs: Iterable[Run], dataset: Dataset, folder: Path) -> list[Path]:
    """Figures 1 and 10, which show images, into a folder that git ignores. Returns what was drawn.

    Figure 10 is left out where no weights are at hand, neither a run's nor those of an export.
    """
    drawn = [folder / "figure-01.png"]
    plot_examples(dataset, drawn[0])
    model = _model_of_figure_10(runs, default_place(dataset.kind, "exported") / "model.onnx")
    if model is not None:
        predictor = load_predictor(model, CPU)
        check_classes(predictor, dataset)
        images, _ = choose_split(predictor, dataset, "validation")
        chosen = np.random.RandomState(10).choice(len(images), 4, replace=False)
        pixels = images.images[chosen].numpy()
        _, probabilities = predict_all(predictor, pixels)
        labels = images.labels[chosen].tolist()
        drawn.append(folder / "figure-10.png")
        plot_probabilities(drawn[1], pixels, labels, probabilities, dataset.classes, predictor.name)
    return drawn


# The document

SKELETON = """# Results

What was published beside what was measured; every block between markers is written by `make report`.

## The study, row by row

<!-- begin table -->
<!-- end table -->

## bf16 against fp32

<!-- begin precision -->
<!-- end precision -->

## The study's claims

<!-- begin claims -->
<!-- end claims -->

## Which classes are easy

<!-- begin classes -->
<!-- end classes -->

## Figures

<!-- begin figures -->
<!-- end figures -->
"""


def fill(document: str, blocks: dict[str, str]) -> str:
    """A document with what stands between its markers replaced; what was written by hand around them stays.

    Raises:
        ReportError: a marker is missing.
    """
    for name, content in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, found, rest = document.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found or not found_end:
            raise ReportError(f"the document lacks the lines {begin} and {end}; put them back, or remove the document")
        document = f"{before}{begin}\n{content}\n{end}{after}"
    return document


def write_report(runs: Sequence[Run], output: Path) -> Path:
    """Writes OUTPUT/results.md and its figures in OUTPUT/results/. Returns the document's path."""
    rows = rows_of(runs)
    chosen = main_rows(rows)
    pictures = output / "results"
    pictures.mkdir(parents=True, exist_ok=True)
    files = draw_curves(chosen, pictures)
    blocks = {
        "table": study_table(chosen),
        "precision": precision_table(rows),
        "claims": claim_table(chosen),
        "classes": class_table(chosen),
        "figures": figure_block(chosen, files, pictures.name),
    }
    document = output / "results.md"
    text = document.read_text() if document.exists() else SKELETON
    atomic_write(document, fill(text, blocks).encode())
    return document


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_core.report", description="The study's table, claims and figures from finished runs."
    )
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        help=f"where finished runs lie; default: {HISTORIES}, those of the committed report",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: docs for the committed runs, reports for others"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help=f"copy the runs' histories there too, such as to {HISTORIES}"
    )
    add_data_argument(parser)
    arguments = parser.parse_args()
    place = arguments.runs or HISTORIES
    output = arguments.output or (PRIVATE if arguments.runs else Path("docs"))
    runs = read_runs(place)
    # Curves and tables need no data; a download for two figures would surprise.
    dataset = load_dataset(arguments.data) if arguments.data or os.environ.get("CIFAR10_DATA") else None
    if dataset is not None:
        take_test_accuracies(runs, dataset)
        runs = read_runs(place)
    if arguments.keep:
        keep_histories(runs, arguments.keep)
    document = write_report(runs, output)
    print(f"{document}: {len(runs)} runs of {runs[0].data['name']}; figures in {output / 'results'}")
    if dataset is None:
        print("figures 1 and 10 show images and were left out: set CIFAR10_DATA, or give --data")
    else:
        print("with images: " + ", ".join(map(str, draw_private(runs, dataset, PRIVATE))))
    return 0


if __name__ == "__main__":
    run_command(main)
