import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cifar_core.calibration import Calibration
from cifar_core.calibration_graph import add_calibration, without_calibration
from cifar_core.export import export_run
from cifar_core.recipes import RECIPES
from cifar_core.run_folder import RunError
from cifar_core.study.markdown import markdown_table, percent
from cifar_core.study.report import CALIBRATION, HISTORIES, NEW_DOCUMENT, fill, measure_calibration, write_report
from cifar_core.study.runs import ReportError, main_rows, read_runs, rows_of
from cifar_core.study.tables import claim_table, study_table
from tests.cifar_core.runs import make_run
from tests.conftest import REPOSITORY

COMMITTED = REPOSITORY / HISTORIES
DATA = {"kind": "folder", "name": "pictures", "fingerprint": "a" * 64}


def history(best, epochs=20, at=18, last=None, loss_rises_after=13):
    """A made-up history whose validation accuracy is best at one epoch, and `last` in all others."""
    return [
        {
            "epoch": epoch,
            "train_loss": 2 - 1.8 * epoch / epochs,
            "train_accuracy": 0.2 + 0.75 * epoch / epochs,
            "validation_loss": 1 + 0.1 * abs(epoch - loss_rises_after),
            "validation_accuracy": best if epoch == at else (last if last is not None else best - 0.01),
            "learning_rate": 0.001,
            "seconds": 30.0,
        }
        for epoch in range(1, epochs + 1)
    ]


def write_run(runs, recipe, lines, seed=0, precision="fp32", data=DATA, test=None):
    folder = runs / recipe / str(seed)
    folder.mkdir(parents=True)
    values = RECIPES[recipe.partition("+")[0]].values() | {"name": recipe, "epochs": len(lines)}
    about = {"recipe": values, "seed": seed, "precision": precision, "data": data, "classes": ["a", "b"]}
    (folder / "recipe.json").write_text(json.dumps(about))
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if test is not None:
        (folder / "test.json").write_text(json.dumps({"accuracy": test, "per_class": {"a": test, "b": test}}))
    return folder


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
    table = study_table(main_rows(rows_of(read_runs(tmp_path))))
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


def test_unfinished_runs_are_left_out(tmp_path):
    write_run(tmp_path, "baseline", history(0.7))
    unfinished = write_run(tmp_path, "dropout-0.2", history(0.7))
    lines = (unfinished / "history.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "history.jsonl").write_text("".join(lines[:-1]))
    assert [run.recipe.name for run in read_runs(tmp_path)] == ["baseline"]


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


def test_a_folder_without_runs_or_with_runs_on_different_data_is_refused(tmp_path):
    with pytest.raises(ReportError, match="there is no finished run in this folder"):
        read_runs(tmp_path)
    write_run(tmp_path, "baseline", history(0.7))
    write_run(tmp_path, "deep", history(0.7), data=DATA | {"name": "others", "fingerprint": "b" * 64})
    with pytest.raises(ReportError, match=r"different data, others \(bbbbbbbbbbbb\), pictures \(aaaaaaaaaaaa\)"):
        read_runs(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"accuracy": 1}'])
def test_a_damaged_test_result_is_refused_by_name(tmp_path, content):
    (write_run(tmp_path, "baseline", history(0.7)) / "test.json").write_text(content)
    with pytest.raises(RunError, match=r"test\.json: .*remove it"):
        read_runs(tmp_path)


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


def test_a_run_whose_recipe_cannot_be_read_is_named(tmp_path):
    folder = write_run(tmp_path, "baseline", history(0.7))
    description = json.loads((folder / "recipe.json").read_text())
    description["recipe"]["layers"] = 3
    (folder / "recipe.json").write_text(json.dumps(description))
    with pytest.raises(RunError, match=r"recipe\.json: this version has no recipe value 'layers'; train again"):
        read_runs(tmp_path)


def test_the_calibration_is_measured_again_when_the_graph_has_a_new_one(small, tmp_path):
    export_run(make_run(small, tmp_path, "deep", 0.5), small, tmp_path / "exported")
    graph, file = tmp_path / "exported/model.onnx", tmp_path / CALIBRATION
    measure_calibration(graph, small, file)
    first, modified = json.loads(file.read_bytes()), file.stat().st_mtime_ns
    measure_calibration(graph, small, file)
    assert file.stat().st_mtime_ns == modified  # not measured again
    graph.write_bytes(add_calibration(without_calibration(graph.read_bytes()), Calibration("temperature", (0.5,))))
    measure_calibration(graph, small, file)
    second = json.loads(file.read_bytes())
    assert second["model"] == first["model"]
    assert second["loss"] != first["loss"]
