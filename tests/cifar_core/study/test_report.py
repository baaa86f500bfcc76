import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cifar_core.study.markdown import markdown_table, percent
from cifar_core.study.report import HISTORIES, NEW_DOCUMENT, fill, write_report
from cifar_core.study.runs import ReportError, main_rows, read_runs, rows_of
from cifar_core.study.tables import accuracy_tables, claim_table
from tests.cifar_core.study.made_up_runs import history, weights, write_run
from tests.conftest import REPOSITORY

COMMITTED = REPOSITORY / HISTORIES


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_committed_report_is_generated_from_the_committed_histories(tmp_path):
    shutil.copy(REPOSITORY / "docs/results.md", tmp_path / "results.md")
    (tmp_path / "results").mkdir()
    shutil.copy(REPOSITORY / "docs/results/calibration.json", tmp_path / "results")
    write_report(read_runs(COMMITTED), tmp_path)
    assert (tmp_path / "results.md").read_text() == (REPOSITORY / "docs/results.md").read_text()
    figures = {path.name for path in (tmp_path / "results").glob("*.png")}
    assert figures == {path.name for path in (REPOSITORY / "docs/results").glob("*.png")}
    for name in figures:
        # Another build of the font renderer may draw the edges of letters in slightly different shades.
        difference = np.abs(pixels(tmp_path / "results" / name) - pixels(REPOSITORY / "docs/results" / name))
        assert (difference > 32).mean() < 1e-3, name


def test_the_report_needs_neither_data_nor_weights_and_names_data_and_commands(tmp_path):
    for seed, best in enumerate((0.75, 0.76, 0.77)):
        write_run(tmp_path, "dropout-0.2", history(best, at=16 + seed), seed, "bf16", test=best - 0.0213)
    table = accuracy_tables(main_rows(rows_of(read_runs(tmp_path))))
    assert "| dropout-0.2 | 77.8 % (18) | 76.0 ± 1.0 (16, 17, 18) | -1.8 |" in table
    assert "| 74.95 % | 73.87 ± 1.00 | -1.1 | 3 | bf16 | 10 |" in table
    assert "`train dropout-0.2 --precision bf16 --seed N`, N = 0, 1, 2" in table
    assert "Data: pictures (fingerprint aaaaaaaaaaaa)" in table


def test_the_table_has_the_precision_with_more_seeds(tmp_path):
    write_run(tmp_path / "fp32", "baseline", history(0.7))
    for seed in (0, 1):
        write_run(tmp_path / "bf16", "baseline", history(0.6), seed, "bf16")
    rows = main_rows(rows_of(read_runs(tmp_path)))
    assert (rows["baseline"].precision, len(rows["baseline"].runs)) == ("bf16", 2)


def test_other_recipes_have_a_table_of_their_own(tmp_path):
    write_run(tmp_path, "small+epochs=3", history(0.5, epochs=3, at=3), test=0.45)
    write_run(tmp_path, "fine-tune", history(0.6), seed=3, initial=weights("deep-fast-0-1234abcd", "c"))
    tables = accuracy_tables(main_rows(rows_of(read_runs(tmp_path))))
    assert tables.startswith("None of the study's recipes was trained.\n\nOther recipes")
    assert (
        "| small+epochs=3 | 50.0 (3) | 50.0 | 45.00 | 1 | fp32 | 1.5 | `train small --set epochs=3 --seed N`, N = 0 |"
        in tables
    )
    name = "fine-tune+init=cccccccc"
    command = "`train fine-tune --init INIT --seed N`, N = 3; INIT = deep-fast-0-1234abcd"
    assert f"| {name} | 59.0 (20) | 59.0 | – | 1 | fp32 | 10.0 | {command} |" in tables

    write_run(tmp_path, "baseline", history(0.7))
    tables = accuracy_tables(main_rows(rows_of(read_runs(tmp_path))))
    assert tables.index("| baseline | 73.6 % (12) |") < tables.index("Other recipes") < tables.index(f"| {name} |")
    document = write_report(read_runs(tmp_path), tmp_path / "report").read_text()
    assert tables in document


def test_a_value_with_a_plus_stays_whole_in_the_command(tmp_path):
    write_run(tmp_path, "deep+learning_rate=1e+30+momentum=0.5", history(0.1))
    tables = accuracy_tables(main_rows(rows_of(read_runs(tmp_path))))
    assert "`train deep --set learning_rate=1e+30 --set momentum=0.5 --seed N`" in tables


def claims_of_study(runs, **changes):
    """The verdicts on runs that confirm every claim of the study, except for the given changes."""
    best = {"baseline": 0.73, "dropout-0.2": 0.78, "dropout-0.5": 0.76, "dropout-0.8": 0.62, "dropout-0.8-60": 0.67}
    for recipe, accuracy in best.items():
        lines = history(accuracy, epochs=60 if recipe == "dropout-0.8-60" else 20)
        if recipe == "dropout-0.2":
            lines = [
                line | {"train_loss": line["train_loss"] + 0.3, "validation_loss": line["validation_loss"] - 0.3}
                for line in lines
            ]
        write_run(runs, recipe, changes.get(recipe, lines))
    write_run(runs, "deep", history(0.82), test=changes.get("test", 0.81))
    write_run(runs, "deep+momentum=0.9", changes.get("momentum", history(0.2)))
    return claim_table(main_rows(rows_of(read_runs(runs)))).splitlines()[2:]


def test_claims_that_the_runs_confirm_hold(tmp_path):
    claims = claims_of_study(tmp_path)
    assert len(claims) == 7
    assert all(claim.endswith("| holds |") for claim in claims)
    assert "dropout-0.2 78.0 % > dropout-0.5 76.0 % > baseline 73.0 % > dropout-0.8 62.0 %" in claims[0]


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        (0, {"dropout-0.5": history(0.79)}),
        (1, {"baseline": history(0.73, last=0.60, at=10)}),
        (2, {"baseline": history(0.73, loss_rises_after=6)}),
        (3, {"baseline": history(0.73, loss_rises_after=20)}),
        (4, {"dropout-0.8-60": history(0.63, epochs=60)}),
        (5, {"test": 0.799}),
        (6, {"momentum": history(0.83)}),
    ],
)
def test_a_claim_that_the_runs_refute_does_not_hold(tmp_path, claim, changes):
    verdicts = [line.endswith("| does not hold |") for line in claims_of_study(tmp_path, **changes)]
    assert verdicts[claim]


def test_a_claim_whose_runs_are_missing_is_neither_confirmed_nor_refuted(tmp_path):
    write_run(tmp_path, "baseline", history(0.7))
    first = claim_table(main_rows(rows_of(read_runs(tmp_path)))).splitlines()[2]
    assert first.endswith("| not run: dropout-0.2, dropout-0.5, dropout-0.8 | – |")


def test_text_around_the_blocks_is_kept():
    document = NEW_DOCUMENT.replace("## Figures", "By hand.\n\n## Figures")
    once = fill(document, {"table": "one"})
    again = fill(once, {"table": "two"})
    assert "By hand." in again
    assert "one" not in again
    assert again == fill(document, {"table": "two"})


def test_a_document_without_its_markers_is_refused():
    with pytest.raises(ReportError, match="must contain the lines <!-- begin table --> and <!-- end table -->"):
        fill("# Results\n", {"table": "one"})


def test_accuracies_are_shown_as_mean_and_sample_standard_deviation():
    assert percent([0.70, 0.72, 0.74]) == "72.0 ± 2.0"
    assert percent([0.7495], 2) == "74.95"
    assert percent([]) == "–"


@pytest.mark.slow
def test_the_command_evaluates_each_run_once_and_keeps_figures_that_show_images_apart(command, tmp_path):
    def run(module, *arguments):
        done = command(module, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    data = ("--data", "synthetic:300")
    run("cifar_core.train", "dropout-0.2", "--set", "epochs=2", *data)
    report = ("--runs", "synthetic/runs", "--keep", "kept")
    assert "figures 1 and 10 show images and were left out" in run("cifar_core.report", *report)
    kept = tmp_path / "kept/fp32/dropout-0.2+epochs=2/0"
    assert {path.name for path in kept.iterdir()} == {"recipe.json", "history.jsonl"}

    run("cifar_core.report", *report, *data)
    assert {path.name for path in kept.iterdir()} == {"recipe.json", "history.jsonl", "test.json"}
    assert {"figure-01.png", "figure-10.png"} <= {path.name for path in (tmp_path / "reports").iterdir()}
    assert {path.name for path in (tmp_path / "reports/results").iterdir()} == {
        "dropout-0.2-epochs-2-accuracy.png",
        "dropout-0.2-epochs-2-loss.png",
    }
    weights = tmp_path / "synthetic/runs/dropout-0.2+epochs=2/0/test.json"
    measured = json.loads(weights.read_text())
    run("cifar_core.export", *data)
    run("cifar_core.report", *report, *data)
    calibration = tmp_path / "reports/results/calibration.json"
    measured_calibration = json.loads(calibration.read_text())
    assert measured_calibration["model"].startswith("dropout-0.2+epochs=2-0-")
    assert (tmp_path / "reports/results/reliability.png").exists()
    # These values survive only if neither the model nor the run is evaluated again.
    calibration.write_text(json.dumps(measured_calibration | {"images": 99}))
    weights.write_text(json.dumps(measured | {"accuracy": 0.125}))
    run("cifar_core.report", *report, *data)
    assert json.loads(calibration.read_text())["images"] == 99
    assert json.loads((kept / "test.json").read_text())["accuracy"] == 0.125
    assert json.loads((kept / "recipe.json").read_text())["date"] >= "2026"


def test_a_markdown_table_keeps_its_cells_as_they_are():
    table = markdown_table(("name", "value"), [("a", "007"), ("longer", "1.50")])
    assert table == "| name | value |\n| --- | --- |\n| a | 007 |\n| longer | 1.50 |"
