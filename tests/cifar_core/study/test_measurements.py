import dataclasses
import json
import shutil

import pytest
import torch

from cifar_core.calibration import Calibration
from cifar_core.calibration_graph import add_calibration, without_calibration
from cifar_core.data import Images
from cifar_core.export import export_run
from cifar_core.recipes import KEYS
from cifar_core.study.drawings import draw_image_figures, draw_reliability
from cifar_core.study.keeping import copy_histories
from cifar_core.study.measurements import CALIBRATION, evaluate_runs, measure_calibration
from cifar_core.study.report import write_report
from cifar_core.study.runs import ReportError, read_runs
from tests.cifar_core.runs import make_run
from tests.cifar_core.study.made_up_runs import history, write_run
from tests.conftest import REPOSITORY


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


def test_the_calibration_of_another_data_set_is_not_shown(small, tmp_path):
    export_run(make_run(small, tmp_path, "deep", 0.5), small, tmp_path / "exported")
    measure_calibration(tmp_path / "exported/model.onnx", small, tmp_path / CALIBRATION)
    assert draw_reliability(tmp_path, small.fingerprint) == "reliability.png"
    assert draw_reliability(tmp_path, "other") is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"sha256": "a", "calibration": []}', "[" * 100_000])
def test_a_damaged_calibration_is_refused_by_name(tmp_path, content):
    write_run(tmp_path / "runs", "baseline", history(0.7))
    (tmp_path / "report/results").mkdir(parents=True)
    (tmp_path / "report/results" / CALIBRATION).write_text(content)
    with pytest.raises(ReportError, match=r"calibration\.json: this file is damaged .*; put it back, or remove it"):
        write_report(read_runs(tmp_path / "runs"), tmp_path / "report")


def test_figure_10_shows_only_a_model_of_this_data(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synthetic").mkdir()
    shutil.copytree(REPOSITORY / "exported", tmp_path / "synthetic/exported")  # trained on other images
    about = {"kind": small.kind, "name": small.name, "fingerprint": small.fingerprint}
    write_run(tmp_path / "runs", "baseline", history(0.7), data=about)
    figures = tmp_path / "figures"
    assert draw_image_figures(read_runs(tmp_path / "runs"), small, figures) == [figures / "figure-01.png"]
    make_run(dataclasses.replace(small, fingerprint="other"), tmp_path / "others", "deep", 0.5)
    assert len(draw_image_figures(read_runs(tmp_path / "others"), small, figures)) == 1
    make_run(small, tmp_path / "same", "deep", 0.5)
    assert len(draw_image_figures(read_runs(tmp_path / "same"), small, figures)) == 2


def test_few_images_are_all_shown(small, tmp_path):
    chosen = torch.arange(23)  # two of them are held out
    few = dataclasses.replace(small, train=Images(small.train.images[chosen], small.train.labels[chosen]))
    make_run(few, tmp_path / "runs", "baseline", 0.5)
    assert len(draw_image_figures(read_runs(tmp_path / "runs"), few, tmp_path)) == 2
    fewer = dataclasses.replace(few, train=Images(small.train.images[:3], small.train.labels[:3]))
    assert len(draw_image_figures([], fewer, tmp_path)) == 1


def test_a_run_folder_that_cannot_be_written_to_is_evaluated_all_the_same(small, tmp_path, caplog):
    folder = make_run(small, tmp_path, "baseline", 0.5)
    (folder.path / ".test.json.partial").mkdir()  # now test.json cannot be written, as on a read-only file system
    (run,) = evaluate_runs(read_runs(tmp_path), small)
    assert "test.json" in caplog.text
    assert "this report has the result, and the next one measures it again" in caplog.text
    assert 0 <= run.test["accuracy"] <= 1
    copy_histories([run], tmp_path / "kept")
    assert json.loads((tmp_path / "kept/fp32/baseline/0/test.json").read_bytes())["accuracy"] == run.test["accuracy"]
    (folder.path / ".test.json.partial").rmdir()
    evaluate_runs(read_runs(tmp_path / "baseline"), small)
    assert read_runs(tmp_path / "baseline")[0].test == json.loads(json.dumps(run.test))


def test_the_report_of_runs_on_other_data_than_the_given_one_says_what_it_leaves_out(command, tmp_path):
    write_run(tmp_path / "runs", "small", history(0.7))
    shutil.copytree(REPOSITORY / "exported", tmp_path / "synthetic/exported")
    done = command("cifar_core.report", "--runs", "runs", "--data", "synthetic:100")
    assert done.returncode == 0, done.stderr
    assert (
        "WARNING: the runs were trained on pictures (fingerprint aaaaaaaaaaaa), but the data is synthetic"
        in done.stderr
    )
    assert "figure 10 was left out: neither a run with weights nor an export was trained on synthetic" in done.stdout
    assert "| small | " in (tmp_path / "reports/results.md").read_text()
    assert not (tmp_path / "reports/results/reliability.png").exists()


def test_plots_of_a_recipe_with_a_long_name_have_names_that_file_systems_allow(tmp_path):
    name = "small+" + "+".join(f"{key}=1" for key in KEYS)
    write_run(tmp_path / "runs", "small", history(0.7))
    (folder,) = (tmp_path / "runs").glob("*/0")
    description = json.loads((folder / "recipe.json").read_text())
    description["recipe"]["name"] = name
    (folder / "recipe.json").write_text(json.dumps(description))
    write_report(read_runs(tmp_path / "runs"), tmp_path / "report")
    (plot,) = (tmp_path / "report/results").glob("*-loss.png")
    assert plot.name.startswith("small-model-1-dropout-1-")
