import dataclasses
import os
import shutil

import numpy as np
import onnx
import pytest
import torch

from cifar_core.device import CPU
from cifar_core.export import export_run
from cifar_core.initial_weights import InitialWeightsError, read_initial_weights, start_from
from cifar_core.manifest import ManifestError
from cifar_core.predictors import load_predictor
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunError, RunFolder
from cifar_core.train import run
from cifar_core.trainer import Trainer
from tests.cifar_core.training import make_trainer
from tests.conftest import REPOSITORY

SMALL = ("epochs=3", "batch_size=27", "sizes=")


@pytest.fixture(scope="module", params=["deep-fast", "sprint", "airbench94"])
def trained(request, small, tmp_path_factory):
    """A trained run with batch normalisation, and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    overrides = (*SMALL, "widths=4,16,32") if request.param == "airbench94" else SMALL
    trainer = make_trainer(small, folder / "run", request.param, overrides)
    run(trainer, resume=False)
    export_run(trainer.folder, small, folder / "exported")
    return request.param, overrides, folder


@pytest.mark.parametrize("source", ["run", "run/best.pt", "exported", "exported/model.onnx"])
def test_the_network_starts_as_the_function_that_the_weights_compute(trained, small, source):
    name, overrides, folder = trained
    model = get_recipe(name, list(overrides)).make_model(10)
    start_from(read_initial_weights(folder / source), model, small.classes, small.train.images)
    expected, _ = load_predictor(folder / "exported/model.onnx", CPU).predict(small.test.images.numpy())
    with torch.inference_mode():
        logits = model.eval()(small.test.images).numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.98
    with torch.inference_mode():  # normalising by the batch changes little
        batch = model.train()(small.train.images).argmax(1)
    assert float((batch == small.train.labels).double().mean()) > 0.5


def test_with_other_classes_only_the_output_layer_is_new(trained, small):
    name, overrides, folder = trained
    torch.manual_seed(0)
    model = get_recipe(name, list(overrides)).make_model(3)
    fresh = model.head.weight.detach().clone()
    initial = read_initial_weights(folder / "run")
    start_from(initial, model, ("cat", "cow", "owl"), small.train.images)
    assert torch.equal(model.head.weight, fresh)
    first = "whiten.weight" if name != "deep-fast" else "blocks.0.conv1.weight"
    assert torch.equal(model.state_dict()[first], initial.states[0][first])


def test_the_shipped_export_is_a_start_for_deep_fast_and_for_the_networks_of_the_study(small):
    initial = read_initial_weights(REPOSITORY / "exported")
    expected, _ = load_predictor(REPOSITORY / "exported/model.onnx", CPU).predict(small.test.images.numpy())
    for name in ("deep-fast", "deep"):
        model = get_recipe(name).make_model(10)
        start_from(initial, model, initial.classes, small.train.images)
        with torch.inference_mode():
            np.testing.assert_allclose(model.eval()(small.test.images), expected, atol=2e-3)
    with pytest.raises(InitialWeightsError, match="are not those of the network of this recipe"):
        start_from(initial, get_recipe("sprint").make_model(10), initial.classes, small.train.images)


@pytest.fixture
def trainer(trained, small, tmp_path):
    """Makes a trainer of one run, which starts from the given weights, with changed values."""
    name, overrides, _ = trained
    return lambda weights, *changes: Trainer(
        get_recipe(name, [*overrides, *changes]), small, RunFolder(tmp_path), 0, CPU, "fp32", weights
    )


def test_a_run_from_trained_weights_is_resumed_only_with_the_same_weights(trained, trainer, tmp_path):
    initial, slow = read_initial_weights(trained[-1] / "run"), "learning_rate=0.01"
    history = run(trainer(initial, slow), resume=False)
    assert history[0]["train_accuracy"] > 0.25  # in the first epoch, of ten classes
    assert RunFolder(tmp_path).description()["initial"] == initial.description()
    assert run(trainer(initial, slow), resume=True) == history
    with pytest.raises(RunError, match="was started with initial"):
        run(trainer(None, slow), resume=True)


@pytest.mark.parametrize("trained", ["sprint"], indirect=True)
def test_weights_that_know_images_that_the_run_holds_out_are_refused(trained, trainer, caplog):
    for source in ("run", "exported"):
        initial = read_initial_weights(trained[-1] / source)
        trainer(initial)
        with pytest.raises(InitialWeightsError, match=r"on \d+ of the 30 images .*--set split_seed=0"):
            trainer(initial, "split_seed=1")
    assert caplog.text == ""
    unknown = dataclasses.replace(initial, trained_on=initial.trained_on._replace(fingerprint="of another folder"))
    trainer(unknown, "split_seed=1")
    assert "is not known, because its data was not the same" in caplog.text
    caplog.clear()
    with pytest.raises(InitialWeightsError, match="are not those of the network"):  # other classes are other images
        trainer(dataclasses.replace(unknown, classes=("cat", "dog"), states=({},)))
    assert caplog.text == ""


@pytest.mark.parametrize("trained", ["sprint"], indirect=True)
def test_a_run_of_an_earlier_version_from_such_weights_is_continued(trained, trainer):
    initial, changes = read_initial_weights(trained[-1] / "run"), ("split_seed=1",)
    unknown = dataclasses.replace(initial, trained_on=None)
    history = run(trainer(unknown, *changes), resume=False)
    assert run(trainer(initial, *changes), resume=True) == history


def test_files_that_hold_no_usable_weights_are_refused(tmp_path):
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    shutil.copy(REPOSITORY / "exported/model.int8.onnx", tmp_path / "int8.onnx")
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "foreign.onnx")
    for name, message in (
        ("missing", "does not exist"),
        ("missing.onnx", "does not exist"),
        ("garbage.onnx", "cannot be read as an ONNX graph"),
        ("int8.onnx", "quantised; use model.onnx"),
        ("foreign.onnx", "not a graph of this project"),
    ):
        with pytest.raises(InitialWeightsError, match=message):
            read_initial_weights(tmp_path / name)
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    with pytest.raises(RunError, match="not a checkpoint"):
        read_initial_weights(tmp_path / "garbage.pt")


def test_the_command_says_what_is_new_and_writes_to_a_folder_of_its_own(command, tmp_path):
    done = command(
        "cifar_core.train", "deep-fast", "--data", "synthetic:100", "--set", "epochs=1", "--set", "batch_size=30",
        "--init", REPOSITORY / "exported",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "starting from deep-distilled-0-" in done.stdout
    assert "all layers but the output layer, which is new: the classes were airplane, automobile" in done.stdout
    assert "note: batch_size is 30 and not 500, but learning_rate" in done.stdout
    (folder,) = (tmp_path / "synthetic/runs").iterdir()
    assert folder.name.startswith("deep-fast+batch_size=30+epochs=1+init=")


def test_an_export_whose_graph_is_not_that_of_the_manifest_is_refused(tmp_path):
    shutil.copytree(REPOSITORY / "exported", tmp_path / "exported")
    graph = onnx.load(tmp_path / "exported/model.onnx")
    graph.doc_string = "changed"
    onnx.save(graph, tmp_path / "exported/model.onnx")
    with pytest.raises(ManifestError, match=r"model\.onnx does not have the SHA-256 of manifest\.json"):
        read_initial_weights(tmp_path / "exported")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    graph = onnx.load(REPOSITORY / "exported/model.onnx")
    weights = next(tensor for tensor in graph.graph.initializer if tensor.name == "network.blocks.0.conv1.weight")
    values = onnx.numpy_helper.to_array(weights).copy()
    values[0, 0, 0, 0] = np.nan
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(graph, tmp_path / "model.onnx")
    with pytest.raises(InitialWeightsError, match=r"blocks\.0\.conv1\.weight contains a value that is not finite"):
        read_initial_weights(tmp_path / "model.onnx")


def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(InitialWeightsError, match="not a regular file"):
        read_initial_weights(tmp_path / "model.onnx")
