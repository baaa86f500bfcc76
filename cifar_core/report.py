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
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cifar_core.calibration import Bin
from cifar_core.data import Dataset, add_data_argument, load_dataset, plot_examples
from cifar_core.device import CPU
from cifar_core.errors import run_command
from cifar_core.evaluate import check_classes, choose_split, evaluate, load_predictor, predict_all
from cifar_core.figures import (
    COLOURS,
    Curve,
    Series,
    plot_comparison,
    plot_curves,
    plot_probabilities,
    plot_reliability,
)
from cifar_core.run_folder import atomic_write, default_place, to_json
from cifar_core.study import (
    CLAIMS,
    ReportError,
    Row,
    Rows,
    Run,
    evaluation_file,
    main_rows,
    percent,
    points,
    read_runs,
    rows_of,
)

HISTORIES = Path("docs/results/histories")
CALIBRATION = "calibration.json"
PRIVATE = Path("reports")  # for what shows images; ignored by git


def take_test_accuracies(runs: Iterable[Run], dataset: Dataset) -> None:
    """Evaluates each run's best weights on the test images and keeps the result beside them, so that it is done once.

    Runs without weights, such as the committed histories, or of other data are left as they are.
    """
    keys = ("model", "data", "split", "images", "correct", "accuracy", "interval", "loss", "per_class")
    for run in runs:
        if run.test is None and run.folder.best.exists() and run.data["fingerprint"] == dataset.fingerprint:
            result = evaluate(load_predictor(run.folder.path, CPU), dataset, "test")
            atomic_write(evaluation_file(run.folder), to_json({key: result[key] for key in keys}))


def take_calibration(exported: Path, dataset: Dataset, file: Path) -> None:
    """Writes the exported model's calibration on the test images, once a model; nothing if it is of other data."""
    predictor = load_predictor(exported, CPU)
    known = json.loads(file.read_bytes())["model"] if file.exists() else None
    if predictor.trained_on == dataset.fingerprint and known != predictor.name:
        result = evaluate(predictor, dataset, "test")
        keys = ("model", "data", "images", "accuracy", "loss", "calibration")
        atomic_write(file, to_json({key: result[key] for key in keys}))


def keep_histories(runs: Iterable[Run], target: Path) -> None:
    """Copies what a report needs of each run, a few kilobytes, to PRECISION/RECIPE/SEED below a folder."""
    for run in runs:
        place = target / run.precision / run.recipe["name"] / str(run.seed)
        place.mkdir(parents=True, exist_ok=True)
        for name in ("recipe.json", "history.jsonl", "test.json"):
            if (run.folder.path / name).exists():
                atomic_write(place / name, (run.folder.path / name).read_bytes())


# The tables


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


def study_table(rows: Rows) -> str:
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
                "–" if said.validation is None else points(statistics.fmean(row.best) - said.validation),
                percent([run.history[-1]["validation_accuracy"] for run in row.runs]),
                "–" if said.test is None else f"{100 * said.test:.2f} %",
                percent(row.test, 2),
                "–" if said.test is None or not row.test else points(statistics.fmean(row.test) - said.test),
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
    told = [run for row in rows.values() if row.published for run in row.runs]
    told = told or [run for row in rows.values() for run in row.runs]
    return _table(head, lines) + "\n\n" + _circumstances(told)


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


def class_table(rows: Rows) -> str:
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


def draw_reliability(folder: Path) -> str | None:
    """The reliability diagram of the exported model, of what `take_calibration` wrote. Returns its file name."""
    if not (folder / CALIBRATION).exists():
        return None
    told = json.loads((folder / CALIBRATION).read_bytes())
    calibration = told["calibration"]
    kinds = [
        (f"{label}: error {100 * calibration[ece]:.2f} %", COLOURS[colour], [Bin(**each) for each in calibration[bins]])
        for label, colour, ece, bins in (
            ("without temperature", "orange", "ece_before", "bins_before"),
            ("as exported", "blue", "ece", "bins"),
        )
    ]
    plot_reliability(folder / "reliability.png", f"{told['model']}, {told['images']:,} test images", kinds)
    return "reliability.png"


def figure_block(rows: Rows, files: dict[str, tuple[str, str]], reliability: str | None, prefix: str) -> str:
    """The figures as Markdown, a recipe a line."""
    lines = []
    if "dropout-rates" in files:
        lines += [f"![validation accuracy and loss of all dropout rates]({prefix}/{files['dropout-rates'][0]})", ""]
    for row in rows.values():
        loss, accuracy = files[row.name]
        numbers = row.published.figures if row.published else None
        title = f"Figures {numbers[0]} and {numbers[1]}: {row.name}" if numbers else f"Besides: {row.name}"
        lines += [f"{title}", "", f"![loss of {row.name}]({prefix}/{loss}) ![accuracy]({prefix}/{accuracy})", ""]
    if reliability:
        lines += ["Calibration of the exported model", "", f"![reliability diagram]({prefix}/{reliability})"]
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
        "figures": figure_block(chosen, files, draw_reliability(pictures), pictures.name),
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
        exported = default_place(dataset.kind, "exported") / "model.onnx"
        if exported.exists():
            (output / "results").mkdir(parents=True, exist_ok=True)
            take_calibration(exported, dataset, output / "results" / CALIBRATION)
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
