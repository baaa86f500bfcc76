import dataclasses
import hashlib
import json
import os
import resource
import subprocess
import sys
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from scipy.special import softmax

from cifar_core import export as export_room
from cifar_core.calibration import fit_temperature
from cifar_core.data import load_dataset, split
from cifar_core.evaluate import evaluate, load_predictor, predict_all, torch_predictor
from cifar_core.export import ExportError, export_run, pick_run, publish
from cifar_core.models import make_model
from cifar_core.recipes import RECIPES, get_recipe
from cifar_core.run_folder import RunFolder, load_checkpoint
from cifar_core.train import Trainer
from cifar_core.train import run as train
from tests.conftest import REPOSITORY, environment

CPU = torch.device("cpu")


def make_run(dataset, path, name, validation_accuracy, seed=0):
    """A finished run with random weights, scaled so that its logits are as far apart as a trained network's."""
    recipe = dataclasses.replace(RECIPES[name], epochs=1)
    torch.manual_seed(seed)
    model = make_model(recipe.model, len(dataset.classes), recipe.dropout, recipe.width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.7
    folder = RunFolder(path / name / str(seed))
    folder.path.mkdir(parents=True)
    about = {
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "precision": "fp32",
        "classes": list(dataset.classes),
        "data": {"kind": dataset.kind, "name": dataset.name, "fingerprint": dataset.fingerprint},
    }
    folder.write_description(about | {"environment": {}})
    line = {"epoch": 1, "validation_accuracy": validation_accuracy}
    weights = about | {"model": model.state_dict(), "epoch": 1, "validation_accuracy": validation_accuracy}
    folder.save(weights | {"history": [line]}, weights)
    return folder


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    return make_run(small, tmp_path_factory.mktemp("runs"), "deep", 0.5)


@pytest.fixture(scope="module")
def exported(run, small, tmp_path_factory):
    target = tmp_path_factory.mktemp("export") / "exported"
    export_run(run, small, target)
    return target


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# The graph


def test_the_graph_has_the_form_that_servers_rely_on(exported):
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [32, 32, 3])
    assert isinstance(images.shape[0], str)  # any batch
    outputs = {output.name: (output.type, output.shape[1:]) for output in session.get_outputs()}
    assert outputs == {"logits": ("tensor(float)", [10]), "probabilities": ("tensor(float)", [10])}
    onnx.checker.check_model(onnx.load(exported / "model.onnx"), full_check=True)


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_the_graph_computes_what_torch_computes_at_every_batch_size(exported, run, small, batch):
    images = small.train.images[:batch].numpy()
    expected, _ = torch_predictor(load_checkpoint(run.best), CPU).predict(images)
    logits, probabilities = load_predictor(exported / "model.onnx", CPU).predict(images)
    assert probabilities.shape == (batch, 10)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    temperature = json.loads((exported / "manifest.json").read_text())["temperature"]
    np.testing.assert_allclose(probabilities, softmax(expected / temperature, axis=1), atol=1e-5)
    assert (logits.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("name", ["deep-fast", "sprint"])
def test_batch_normalisation_is_not_in_the_graph_but_what_it_does(small, tmp_path, name):
    recipe = get_recipe(name, ["epochs=2", "batch_size=30", "sizes="])
    run = RunFolder(tmp_path / "run")
    train(Trainer(recipe, small, run, 0, CPU, "fp32"), resume=False)
    manifest = export_run(run, small, tmp_path / "exported")
    model = onnx.load(tmp_path / "exported/model.onnx")
    operators = [node.op_type for node in model.graph.node]
    assert "BatchNormalization" not in operators
    reference = torch_predictor(load_checkpoint(run.best), CPU).predict(small.train.images.numpy())
    logits, _ = load_predictor(tmp_path / "exported/model.onnx", CPU).predict(small.train.images.numpy())
    np.testing.assert_allclose(logits, reference[0], atol=1e-4)
    if name == "deep-fast":  # at inference the study's deep graph
        weights = sum(int(np.prod(each.dims)) for each in model.graph.initializer if len(each.dims) in (1, 2))
        filters = [
            each.dims for each in model.graph.initializer if each.name.endswith("weight") and len(each.dims) == 4
        ]
        assert len(filters) == operators.count("Conv") == 8
        assert weights + sum(int(np.prod(each)) for each in filters) == pytest.approx(1_702_186, abs=40)
    assert manifest["recipe"]["model"] == recipe.model


# Calibration


def test_the_temperature_is_that_of_the_held_out_images(exported, run, small):
    manifest = json.loads((exported / "manifest.json").read_text())
    _, held_out = split(len(small.train))
    logits, _ = torch_predictor(load_checkpoint(run.best), CPU).predict(small.train.images[held_out].numpy())
    assert manifest["temperature"] == pytest.approx(fit_temperature(logits, small.train.labels[held_out].numpy()))
    assert manifest["temperature"] != pytest.approx(1, abs=0.01)


def test_the_manifest_tells_the_calibration_before_and_after(exported, small):
    for variant in json.loads((exported / "manifest.json").read_text())["variants"].values():
        result = evaluate(load_predictor(exported / variant["file"], CPU), small)
        assert variant["test_loss"] == result["loss"]
        assert {key: variant[key] for key in ("test_ece", "test_ece_before", "test_loss_before")} == {
            f"test_{key}": result["calibration"][key] for key in ("ece", "ece_before", "loss_before")
        }


def test_dropout_is_not_in_the_graph(exported):
    operators = {node.op_type for node in onnx.load(exported / "model.onnx").graph.node}
    assert not operators & {"Dropout", "RandomUniform", "RandomUniformLike", "Bernoulli"}
    predictor = load_predictor(exported / "model.onnx", CPU)
    images = np.zeros((3, 32, 32, 3), np.uint8)
    assert np.array_equal(predictor.predict(images)[0], predictor.predict(images)[0])


def test_the_file_tells_nothing_of_the_machine_that_exported(exported):
    content = (exported / "model.onnx").read_bytes()
    for tell_tale in (b"/cifar_core/", b"site-packages", b".py", str(REPOSITORY).encode()):
        assert tell_tale not in content


# The manifest


def test_the_manifest_says_what_the_file_is(exported, run, small):
    manifest = json.loads((exported / "manifest.json").read_text())
    variant = manifest["variants"]["fp32"]
    assert manifest["schema_version"] == 1
    assert manifest["classes"] == list(small.classes)
    assert variant["sha256"] == hashlib.sha256((exported / variant["file"]).read_bytes()).hexdigest()
    assert variant["test_accuracy"] == evaluate(torch_predictor(load_checkpoint(run.best), CPU), small)["accuracy"]
    assert manifest["recipe"] == run.description()["recipe"]
    assert manifest["data"]["fingerprint"] == small.fingerprint
    assert manifest["parity"]["max_abs_difference_of_probabilities"] < 1e-5
    assert manifest["parity"]["batch_sizes"] == [1, 7, 256]
    assert set(manifest["libraries"]) >= {"torch", "onnx", "onnxruntime"}
    assert load_predictor(exported / "model.onnx", CPU).name == manifest["model_version"]


def test_an_export_of_the_same_weights_is_not_done_twice(exported, run, small):
    before = (exported / "model.onnx").stat().st_ino
    export_run(run, small, exported)
    assert (exported / "model.onnx").stat().st_ino == before


def test_a_damaged_export_is_made_anew(run, small, tmp_path):
    target = tmp_path / "exported"
    export_run(run, small, target)
    whole = contents(target)
    (target / "model.onnx").write_bytes(whole["model.onnx"][:-1])
    export_run(run, small, target)
    assert contents(target)["model.onnx"][:1000] == whole["model.onnx"][:1000]
    assert len(contents(target)["model.onnx"]) == len(whole["model.onnx"])


# Which run


def test_the_run_of_best_validation_accuracy_is_exported(small, tmp_path):
    make_run(small, tmp_path, "dropout-0.2", 0.7)
    make_run(small, tmp_path, "deep", 0.6)
    make_run(small, tmp_path, "deep", 0.8, seed=1)
    make_run(small, tmp_path, "sprint", 0.9)
    unfinished = make_run(small, tmp_path, "deep", 0.95, seed=2)
    unfinished.write_history([])
    assert pick_run(tmp_path).path == tmp_path / "sprint" / "0"


def test_without_a_finished_run_it_says_how_to_get_one(tmp_path):
    with pytest.raises(ExportError, match="no finished run; train one with: make train"):
        pick_run(tmp_path)


# What must not be lost


@pytest.fixture
def before(exported, tmp_path):
    """An export in place, with what somebody else put beside it."""
    target = tmp_path / "exported"
    target.mkdir()
    for name, content in contents(exported).items():
        (target / name).write_bytes(content)
    (target / "notes.txt").write_text("mine")
    return target


@pytest.fixture
def other_run(small, tmp_path):
    return make_run(small, tmp_path / "other", "dropout-0.2", 0.9)


def assert_untouched(target, kept):
    assert contents(target) == kept
    assert {path.name for path in target.parent.iterdir()} <= {"exported", "other"}  # nothing half-done left beside it


def test_a_graph_that_differs_from_torch_is_not_exported(before, other_run, small, monkeypatch):
    kept = contents(before)
    faithful = export_room.build_model

    def drifted(checkpoint):
        model = faithful(checkpoint)
        with torch.no_grad():
            model[-1].bias[0] += 1e-3
        return model

    monkeypatch.setattr(export_room, "build_model", drifted)
    with pytest.raises(ExportError, match="differs from torch: probabilities by up to"):
        export_run(other_run, small, before)
    assert_untouched(before, kept)


def test_an_unfinished_run_is_not_exported(before, other_run, small):
    kept = contents(before)
    other_run.write_history([])
    with pytest.raises(ExportError, match="not trained to the end; go on with"):
        export_run(other_run, small, before)
    assert_untouched(before, kept)


def test_a_run_of_other_data_is_not_exported(before, other_run):
    kept = contents(before)
    with pytest.raises(ExportError, match="was trained on synthetic, 300 images"):
        export_run(other_run, load_dataset("synthetic:100"), before)
    assert_untouched(before, kept)


def test_a_full_disk_leaves_the_export_before(before):
    kept = contents(before)
    script = (
        "import pathlib, sys; from cifar_core.export import publish\n"
        "publish(pathlib.Path(sys.argv[1]), {'model.onnx': bytes(100_000), 'manifest.json': b'{}'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(before)], env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert "what it held is untouched" in done.stderr
    assert_untouched(before, kept)


def test_a_new_export_replaces_the_old_and_keeps_what_is_not_its_own(before, other_run, small):
    manifest = export_run(other_run, small, before)
    assert manifest["model_version"].startswith("dropout-0.2-0-")
    assert set(contents(before)) == {"model.onnx", "model.int8.onnx", "manifest.json", "notes.txt"}
    assert (before / "notes.txt").read_text() == "mine"
    assert json.loads((before / "manifest.json").read_text())["model_version"] == manifest["model_version"]


@pytest.mark.parametrize("exchange", ["by the kernel", "by two renames"])
def test_files_of_an_earlier_export_that_the_new_one_lacks_do_not_stay(tmp_path, exchange, monkeypatch):
    if exchange == "by two renames":  # a system without renameat2
        monkeypatch.setattr(export_room.ctypes, "CDLL", lambda *_, **__: object())
    target = tmp_path / "exported"
    manifest = {"variants": {"fp32": {"file": "model.onnx"}, "int8": {"file": "model.int8.onnx"}}}
    publish(target, {"model.onnx": b"1", "model.int8.onnx": b"1", "manifest.json": json.dumps(manifest).encode()})
    publish(target, {"model.onnx": b"2", "manifest.json": b"{}"})
    assert contents(target) == {"model.onnx": b"2", "manifest.json": b"{}"}
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_whoever_looks_while_exports_change_finds_one_whole_export(tmp_path):
    """A model and a manifest of two exports never meet in the folder that is being looked at."""
    target = tmp_path / "exported"

    def write(number):
        model = str(number).encode() * 1000
        publish(target, {"model.onnx": model, "manifest.json": hashlib.sha256(model).hexdigest().encode()})

    def look():
        while not done.is_set():
            folder = os.open(target, os.O_RDONLY)
            try:
                read = [os.open(name, os.O_RDONLY, dir_fd=folder) for name in ("model.onnx", "manifest.json")]
            except FileNotFoundError:
                continue  # this folder was the old one, and is being removed
            finally:
                os.close(folder)
            model, manifest = (os.fdopen(descriptor, "rb").read() for descriptor in read)
            looks.append(hashlib.sha256(model).hexdigest().encode() == manifest)

    looks, done = [], threading.Event()
    write(0)
    reader = threading.Thread(target=look)
    reader.start()
    for number in range(1, 201):
        write(number)
    done.set()
    reader.join()
    assert len(looks) > 20
    assert all(looks)


# What is shipped


def test_the_shipped_export_is_whole_and_its_own_manifests():
    manifest = json.loads((REPOSITORY / "exported/manifest.json").read_text())
    assert manifest["recipe"]["name"] == "deep-fast"
    assert manifest["classes"][3] == "cat"
    for variant in manifest["variants"].values():
        content = (REPOSITORY / "exported" / variant["file"]).read_bytes()
        assert variant["sha256"] == hashlib.sha256(content).hexdigest()
    predictor = load_predictor(REPOSITORY / "exported/model.onnx", CPU)
    assert predictor.name == manifest["model_version"]
    assert list(predictor.classes) == manifest["classes"]
    _, probabilities = predict_all(predictor, np.zeros((2, 32, 32, 3), np.uint8))
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


def test_the_shipped_model_has_the_test_accuracy_that_its_manifest_claims(real):
    manifest = json.loads((REPOSITORY / "exported/manifest.json").read_text())
    if real.fingerprint != manifest["data"]["fingerprint"]:
        pytest.skip(f"CIFAR10_DATA is not {manifest['data']['name']}, on which it was measured")
    result = evaluate(load_predictor(REPOSITORY / "exported/model.onnx", CPU), real)
    # Another processor may round another way and tip a few images that stand on the edge.
    assert result["accuracy"] == pytest.approx(manifest["variants"]["fp32"]["test_accuracy"], abs=0.001)
    assert result["accuracy"] >= 0.87
