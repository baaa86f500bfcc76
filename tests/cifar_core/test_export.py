import dataclasses
import hashlib
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from scipy.special import softmax

from cifar_core import export
from cifar_core.calibration import UNCALIBRATED, Calibration, choose_calibration
from cifar_core.data import load_dataset, split
from cifar_core.device import CPU
from cifar_core.evaluate import evaluate
from cifar_core.export import export_run
from cifar_core.export_source import ExportError
from cifar_core.manifest import read_manifest
from cifar_core.parity import ParityError
from cifar_core.predictors import load_predictor, predict_all, torch_predictor
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder, load_checkpoint
from cifar_core.train import run as train
from cifar_core.trainer import Trainer
from tests.cifar_core.runs import contents, make_run
from tests.cifar_core.training import trained
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    return make_run(small, tmp_path_factory.mktemp("runs"), "deep", 0.5)


@pytest.fixture(scope="module")
def exported(run, small, tmp_path_factory):
    target = tmp_path_factory.mktemp("export") / "exported"
    export_run(run, small, target)
    return target


def test_the_graph_has_the_inputs_and_outputs_that_servers_rely_on(exported):
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [32, 32, 3])
    assert isinstance(images.shape[0], str)  # any batch size
    outputs = {output.name: (output.type, output.shape[1:]) for output in session.get_outputs()}
    assert outputs == {"logits": ("tensor(float)", [10]), "probabilities": ("tensor(float)", [10])}
    onnx.checker.check_model(onnx.load(exported / "model.onnx"), full_check=True)


def calibration_of(manifest, variant):
    scale = manifest.variants[variant].calibration
    return Calibration(scale.form, scale.coefficients)


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_the_graph_computes_what_torch_computes_at_every_batch_size(exported, run, small, batch):
    images = small.train.images[:batch].numpy()
    expected, _ = torch_predictor(load_checkpoint(run.best), CPU).predict(images)
    logits, probabilities = load_predictor(exported / "model.onnx", CPU).predict(images)
    assert probabilities.shape == (batch, 10)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    calibration = calibration_of(read_manifest(exported), "fp32")
    np.testing.assert_allclose(probabilities, calibration.probabilities(expected), atol=1e-5)
    assert (logits.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("name", ["deep-fast", "sprint"])
def test_the_graph_has_no_batch_normalisation_and_computes_the_same_function(small, tmp_path, name):
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
    if name == "deep-fast":  # the graph is that of the study's deep network
        weights = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if len(tensor.dims) in (1, 2))
        filters = [tensor.dims for tensor in model.graph.initializer if len(tensor.dims) == 4 and tensor.dims[2] == 3]
        assert len(filters) == operators.count("Conv") == 8
        assert weights + sum(int(np.prod(dims)) for dims in filters) == pytest.approx(1_702_186, abs=40)
    assert manifest.recipe == recipe.values()


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_each_variant_is_calibrated_on_its_own_logits_of_the_held_out_images(exported, small, variant):
    manifest = read_manifest(exported)
    _, held_out = split(len(small.train))
    predictor = load_predictor(exported / manifest.variants[variant].file, CPU)
    images = small.train.images[held_out].numpy()
    logits, probabilities = predictor.predict(images)
    expected = choose_calibration(logits, small.train.labels[held_out].numpy())
    found = calibration_of(manifest, variant)
    assert found.form == expected.form
    np.testing.assert_allclose(found.probabilities(logits), expected.probabilities(logits), atol=1e-3)
    np.testing.assert_allclose(probabilities, found.probabilities(logits), atol=1e-5)
    assert not np.allclose(probabilities, softmax(logits, axis=1), atol=0.001)
    assert manifest.variants[variant].calibration.images == 30


def test_the_manifest_says_whether_the_calibration_images_chose_the_epoch_and_a_warning_too(small, tmp_path, caplog):
    chose = export_run(make_run(small, tmp_path, "dropout-0.2", 0.5), small, tmp_path / "chose")
    assert "train with --set weights=last" in caplog.text
    caplog.clear()
    free = export_run(trained(small, tmp_path, "epochs=2", validation_accuracy=0.5), small, tmp_path / "free")
    assert "weights=last" not in caplog.text
    for manifest, expected in ((chose, True), (free, False)):
        assert {variant.calibration.chose_epoch for variant in manifest.variants.values()} == {expected}


def test_the_manifest_holds_the_calibration_error_with_and_without_the_calibration(exported, small):
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


def test_the_file_holds_no_path_of_the_machine_that_exported_it(exported):
    content = (exported / "model.onnx").read_bytes()
    for part_of_a_path in (b"/cifar_core/", b"site-packages", b".py", str(REPOSITORY).encode()):
        assert part_of_a_path not in content


def test_the_manifest_describes_the_file_and_the_run(exported, run, small):
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


def test_the_same_weights_are_not_exported_twice(exported, run, small):
    before = (exported / "model.onnx").stat().st_ino
    export_run(run, small, exported)
    assert (exported / "model.onnx").stat().st_ino == before


def change_manifest(target, change):
    manifest = json.loads((target / "manifest.json").read_text())
    change(manifest)
    (target / "manifest.json").write_text(json.dumps(manifest))


def test_an_export_without_parity_is_not_taken_for_a_complete_one(before, run, small):
    change_manifest(before, lambda manifest: manifest.pop("parity"))
    export_run(run, small, before)
    assert read_manifest(before).parity is not None


def test_a_scale_that_an_earlier_version_fitted_to_few_images_is_replaced(before, run, small):
    def as_earlier(manifest):
        scale = manifest["variants"]["fp32"]["calibration"]
        assert scale.pop("prior_deviation") == 0.5
        scale |= {"form": "temperature", "coefficients": [20.73]}

    change_manifest(before, as_earlier)
    export_run(run, small, before)
    scale = read_manifest(before).variants["fp32"].calibration
    assert (scale.images, scale.prior_deviation) == (30, 0.5)
    assert scale.coefficients != (20.73,)


def test_a_handful_of_held_out_images_leaves_the_probabilities_as_they_are_and_a_note_says_so(tmp_path, caplog):
    dataset = load_dataset("synthetic:72")
    manifest = export_run(make_run(dataset, tmp_path, "deep", 0.5), dataset, tmp_path / "exported")
    logits, probabilities = predict_all(load_predictor(tmp_path / "exported", CPU), dataset.test.images.numpy())
    np.testing.assert_allclose(probabilities, softmax(logits, axis=1), atol=1e-6)
    scale = manifest.variants["fp32"].calibration
    assert (scale.form, scale.images) == ("temperature", 7)
    assert calibration_of(manifest, "fp32") == calibration_of(manifest, "int8") == UNCALIBRATED
    assert manifest.parity.images == 72
    assert caplog.text.count("only 7 images are held out, too few to calibrate probabilities") == 1
    before = (tmp_path / "exported/model.onnx").stat().st_ino
    export_run(RunFolder(tmp_path / "deep" / "0"), dataset, tmp_path / "exported")
    assert (tmp_path / "exported/model.onnx").stat().st_ino == before


def test_a_damaged_export_is_written_again(run, small, tmp_path):
    target = tmp_path / "exported"
    export_run(run, small, target)
    whole = contents(target)
    (target / "model.onnx").write_bytes(whole["model.onnx"][:-1])
    export_run(run, small, target)
    assert contents(target)["model.onnx"][:1000] == whole["model.onnx"][:1000]
    assert len(contents(target)["model.onnx"]) == len(whole["model.onnx"])


@pytest.fixture
def before(exported, tmp_path):
    """An existing export, with a file of the user next to it."""
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
    assert {path.name for path in target.parent.iterdir()} <= {"exported", "other"}  # no incomplete folder is left


def test_a_graph_that_differs_from_torch_is_not_exported(before, other_run, small, monkeypatch):
    kept = contents(before)
    build_model = export.build_model

    def build_changed_model(checkpoint):
        model = build_model(checkpoint)
        with torch.no_grad():
            model.head.bias[0] += 1e-3
        return model

    monkeypatch.setattr(export, "build_model", build_changed_model)
    with pytest.raises(ParityError, match="differs from torch: probabilities by up to"):
        export_run(other_run, small, before)
    assert_untouched(before, kept)


def test_held_out_logits_are_computed_once_by_torch_and_once_by_each_graph(run, small, tmp_path, monkeypatch):
    """Not counted: parity in batches of 1 and 7, and the evaluation on the test images."""
    seen = {}

    def count(name, build):
        def counted(model, device):
            predictor = build(model, device)
            label = f"{name} {len([key for key in seen if key.startswith(name)])}"
            seen[label] = []

            def predict(images):
                seen[label].append(images)
                return predictor.predict(images)

            return dataclasses.replace(predictor, predict=predict)

        return counted

    monkeypatch.setattr(export, "torch_predictor", count("torch", export.torch_predictor))
    monkeypatch.setattr(export, "onnx_predictor", count("onnx", export.onnx_predictor))
    export_run(run, small, tmp_path / "exported")
    _, held_out = split(len(small.train))
    first = small.train.images[held_out[0]].numpy()
    counts = {
        label: sum(int((batch == first).all((1, 2, 3)).any()) for batch in batches if len(batch) not in (1, 7))
        for label, batches in seen.items()
    }
    assert counts == {"torch 0": 1, "onnx 0": 1, "onnx 1": 1, "onnx 2": 0}


def test_an_unfinished_run_is_not_exported(before, other_run, small):
    kept = contents(before)
    other_run.write_history([])
    other_run.last.unlink()
    with pytest.raises(ExportError, match="not finished; continue it with"):
        export_run(other_run, small, before)
    assert_untouched(before, kept)


def test_a_run_that_was_trained_on_other_data_is_not_exported(before, other_run):
    kept = contents(before)
    with pytest.raises(ExportError, match="was trained on synthetic, 300 images"):
        export_run(other_run, load_dataset("synthetic:100"), before)
    assert_untouched(before, kept)


def test_a_new_export_replaces_the_previous_one_and_keeps_other_files(before, other_run, small):
    manifest = export_run(other_run, small, before)
    assert manifest.model_version.startswith("dropout-0.2-0-")
    assert set(contents(before)) == {"model.onnx", "model.int8.onnx", "manifest.json", "notes.txt"}
    assert (before / "notes.txt").read_text() == "mine"
    assert read_manifest(before) == manifest


def test_the_shipped_files_are_those_that_the_shipped_manifest_describes():
    manifest = json.loads((REPOSITORY / "exported/manifest.json").read_text())
    assert manifest["recipe"]["name"] == "deep-distilled"
    assert manifest["classes"][3] == "cat"
    for variant in manifest["variants"].values():
        content = (REPOSITORY / "exported" / variant["file"]).read_bytes()
        assert variant["sha256"] == hashlib.sha256(content).hexdigest()
    predictor = load_predictor(REPOSITORY / "exported/model.onnx", CPU)
    assert predictor.name == manifest["model_version"]
    assert list(predictor.classes) == manifest["classes"]
    _, probabilities = predict_all(predictor, np.zeros((2, 32, 32, 3), np.uint8))
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


@pytest.fixture(scope="module")
def shipped_accuracies(real):
    """Test accuracy of each shipped variant on the data at hand."""
    files = {"fp32": "model.onnx", "int8": "model.int8.onnx"}
    return {
        name: evaluate(load_predictor(REPOSITORY / "exported" / file, CPU), real)["accuracy"]
        for name, file in files.items()
    }


def test_the_shipped_models_have_the_test_accuracies_of_their_manifest(real, shipped_accuracies):
    manifest = json.loads((REPOSITORY / "exported/manifest.json").read_text())
    if real.fingerprint != manifest["data"]["fingerprint"]:
        pytest.skip(f"needs {manifest['data']['name']} in CIFAR10_DATA, on which the accuracies were measured")
    for name, accuracy in shipped_accuracies.items():
        # Another processor may round differently, which can change the class of a few images.
        assert accuracy == pytest.approx(manifest["variants"][name]["test_accuracy"], abs=0.001)
    assert shipped_accuracies["fp32"] >= 0.89


def test_the_shipped_int8_model_loses_at_most_three_tenths_of_a_point(shipped_accuracies):
    assert shipped_accuracies["fp32"] - shipped_accuracies["int8"] <= 0.003


def test_a_run_whose_data_got_another_name_is_exported(small, tmp_path):
    run = make_run(small, tmp_path, "deep", 0.5)
    description = run.description()
    description["data"]["name"] = "as it was called when the run was started"
    run.write_description(description)
    export_run(run, small, tmp_path / "exported")
