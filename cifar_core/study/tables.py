"""The tables of the report, as Markdown."""

import statistics
from collections.abc import Iterable, Sequence

from cifar_core.run_folder import CHANGE
from cifar_core.study.claims import CLAIMS
from cifar_core.study.markdown import markdown_table, percent, points
from cifar_core.study.runs import Published, Row, Rows

_STUDY_HEADER = (
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
    "minutes per run",
    "command: `python -m cifar_core.` and",
)
_OTHER_HEADER = (
    "recipe",
    "validation of the weights kept, % (epochs)",
    "final validation, %",
    "test, %",
    "seeds",
    "precision",
    "minutes per run",
    "command: `python -m cifar_core.` and",
)


def accuracy_tables(rows: Rows) -> str:
    """The study's recipes next to its figures; then all other recipes, for which nothing was published."""
    of_study = [row for row in rows.values() if row.published]
    others = [row for row in rows.values() if not row.published]
    parts = [study_table(of_study) if of_study else "None of the study's recipes was trained."]
    if others:
        parts += ["Other recipes, for which the study has no figures:", other_table(others)]
    return "\n\n".join(parts)


def study_table(rows: Iterable[Row]) -> str:
    """The study's rows next to ours, and the data, machine, versions and dates of our runs."""
    rows = list(rows)
    lines = [_study_line(row, row.published) for row in rows if row.published is not None]
    text = "the test accuracy is that of the weights of the best validation epoch, measured once per run."
    return markdown_table(_STUDY_HEADER, lines) + "\n\n" + _circumstances(rows, text)


def other_table(rows: Iterable[Row]) -> str:
    """Rows of which the study has none, and the data, machine, versions and dates of the runs."""
    rows = list(rows)
    lines = [
        (
            row.name,
            _validation(row),
            _final_validation(row),
            percent(row.test, 2),
            str(len(row.runs)),
            row.precision,
            _minutes(row, digits=1),
            _command(row),
        )
        for row in rows
    ]
    text = (
        "a run keeps the weights of its last epoch, or of the best validation epoch, as its recipe says; the test "
        "accuracy is that of these weights, measured once per run."
    )
    return markdown_table(_OTHER_HEADER, lines) + "\n\n" + _circumstances(rows, text)


def _study_line(row: Row, published: Published) -> tuple[str, ...]:
    no_validation, no_test = published.validation is None, published.test is None or not row.test
    return (
        row.name,
        _published_validation(published),
        _validation(row),
        "–" if no_validation else points(statistics.fmean(row.best) - (published.validation or 0)),
        _final_validation(row),
        "–" if published.test is None else f"{100 * published.test:.2f} %",
        percent(row.test, 2),
        "–" if no_test else points(statistics.fmean(row.test) - (published.test or 0)),
        str(len(row.runs)),
        row.precision,
        _minutes(row, digits=0),
        _command(row),
    )


def _published_validation(published: Published) -> str:
    if published.validation is None:
        return "–"
    text = f"{100 * published.validation:.1f} %"
    return f"{text} ({published.epoch})" if published.epoch else f"about {text}"


def _validation(row: Row) -> str:
    """Validation accuracy of the weights that the runs keep, and the epochs of these weights."""
    return f"{percent(row.best)} ({', '.join(str(run.best['epoch']) for run in row.runs)})"


def _final_validation(row: Row) -> str:
    return percent([run.history[-1]["validation_accuracy"] for run in row.runs])


def _minutes(row: Row, digits: int) -> str:
    return f"{statistics.median(run.minutes for run in row.runs):.{digits}f}"


def _command(row: Row) -> str:
    run = row.runs[0]
    name, *changes = CHANGE.split(run.recipe.name)
    options = "".join(f" --set {change}" for change in changes)
    options += " --init INIT" * (run.initial is not None) + " --teacher TEACHER" * (run.teacher is not None)
    options += "" if row.precision == "fp32" else f" --precision {row.precision}"
    seeds = ", ".join(str(run.seed) for run in row.runs)
    weights = (("INIT", run.initial), ("TEACHER", run.teacher))
    names = "".join(f"; {key} = {source.get('name', 'unnamed weights')}" for key, source in weights if source)
    return f"`train {name}{options} --seed N`, N = {seeds}{names}"


def _circumstances(rows: Iterable[Row], accuracies: str) -> str:
    """Data, machines, versions and dates of the runs in a table, as a paragraph.

    Args:
        rows: the rows of the table.
        accuracies: says which weights the accuracies are of.
    """
    runs = [run for row in rows for run in row.runs]
    machines = sorted(
        {
            f"{run.environment.get('device', 'unknown')}, {run.environment.get('threads', '?')} thread(s) per run"
            for run in runs
        }
    )
    torch_versions = sorted({f"torch {run.environment.get('torch', '?')}" for run in runs})
    dates = sorted({run.date for run in runs if run.date})
    data = runs[0].data
    return (
        f"Data: {data['name']} (fingerprint {data['fingerprint'][:12]}). Machine: {'; '.join(machines)}; "
        f"{', '.join(torch_versions)}. Date: {dates[0] if dates else 'unknown'}"
        + (f" to {dates[-1]}" if len(dates) > 1 else "")
        + f". Mean ± standard deviation over seeds; {accuracies}"
    )


def precision_table(rows: Sequence[Row]) -> str:
    """Recipes that were trained both in fp32 and in bf16, side by side; a sentence if there are none."""
    by_key = {(row.name, row.precision): row for row in rows}
    lines = []
    for name in dict.fromkeys(row.name for row in rows):
        fp32, bf16 = by_key.get((name, "fp32")), by_key.get((name, "bf16"))
        if fp32 and bf16:
            lines.append((name, percent(fp32.best), percent(bf16.best), percent(fp32.test, 2), percent(bf16.test, 2)))
    if not lines:
        return "No recipe was trained in both precisions."
    return markdown_table(("recipe", "best validation, fp32, %", "bf16, %", "test, fp32, %", "bf16, %"), lines)


def class_table(rows: Rows) -> str:
    """Test accuracy per class, mean over seeds, in descending order for the last row; a sentence if there is none."""
    with_test = [row for row in rows.values() if row.test and row.published and row.published.test]
    if not with_test:
        return "No test accuracy was taken of a recipe for which the study publishes one."

    def accuracy(row: Row, name: str) -> float:
        return statistics.fmean(run.test["per_class"][name] or 0.0 for run in row.runs if run.test)

    last = with_test[-1]
    first_result = next(run.test for run in last.runs if run.test)
    names = sorted(first_result["per_class"], key=lambda name: -accuracy(last, name))
    lines = [(name, *(f"{100 * accuracy(row, name):.1f}" for row in with_test)) for name in names]
    return markdown_table(("class", *(f"{row.name}, %" for row in with_test)), lines)


def claim_table(rows: Rows) -> str:
    """Each claim, the measured values, and whether they confirm it."""
    lines = []
    for claim in CLAIMS:
        missing = [name for name in claim.recipes if name not in rows]
        if missing:
            lines.append((claim.text, f"not run: {', '.join(missing)}", "–"))
        else:
            measured, holds = claim.check(rows)
            lines.append((claim.text, measured, "holds" if holds else "does not hold"))
    return markdown_table(("claim", "measured", ""), lines)
