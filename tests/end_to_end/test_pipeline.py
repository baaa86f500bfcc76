"""A user's commands in order: train, evaluate, export, evaluate the exported file."""

import json

import pytest

from tests.conftest import write_folder

RECIPE = ("dropout-0.2", "--set", "epochs=2", "--set", "batch_size=4", "--set", "learning_rate=0.005")


@pytest.mark.parametrize("kind", [pytest.param("synthetic", marks=pytest.mark.slow), "folder"])
def test_a_trained_model_and_its_exported_file_have_the_same_accuracy(command, small, tmp_path, kind):
    data = ("--data", "synthetic:300" if kind == "synthetic" else write_folder(small, tmp_path / "pictures"))
    place = tmp_path / "synthetic" if kind == "synthetic" else tmp_path

    def succeed(module, *arguments):
        done = command(module, *arguments, *data)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def accuracy(*model):
        succeed("cifar_core.evaluate", *model, "--json", tmp_path / "result.json")
        return json.loads((tmp_path / "result.json").read_text())

    succeed("cifar_core.train", *RECIPE)
    run = next((place / "runs").glob("*/0"))
    succeed("cifar_core.export", "--run", run)
    assert {path.name for path in (place / "exported").iterdir()} == {
        "model.onnx",
        "model.int8.onnx",
        "manifest.json",
    }

    from_torch, from_onnx = accuracy("--model", run), accuracy()
    assert from_torch["confusion"] == from_onnx["confusion"]
    assert from_torch["accuracy"] == from_onnx["accuracy"] > 0.2  # guessing gives 0.1
    # The probabilities of the graph are calibrated; before the calibration they equal those of torch.
    assert from_onnx["calibration"]["loss_before"] == pytest.approx(from_torch["loss"], rel=1e-4)
    from_int8 = accuracy("--model", place / "exported/model.int8.onnx")
    assert abs(from_int8["correct"] - from_onnx["correct"]) <= 3
    manifest = json.loads((place / "exported/manifest.json").read_text())
    assert manifest["variants"]["int8"]["test_accuracy"] == from_int8["accuracy"]
    assert manifest["variants"]["fp32"]["test_accuracy"] == from_onnx["accuracy"]
    assert manifest["validation_accuracy"] == accuracy("--split", "validation")["accuracy"]
