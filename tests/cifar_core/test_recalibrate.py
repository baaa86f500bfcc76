import dataclasses
import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from cifar_core import publish
from cifar_core.calibration_graph import without_calibration
from cifar_core.device import CPU
from cifar_core.export import export_run
from cifar_core.manifest import read_manifest
from cifar_core.predictors import onnx_predictor
from cifar_core.publish import PublishError
from cifar_core.recalibrate import recalibrate
from tests.cifar_core.runs import contents, make_run

MEASURED = {"openvino_precision": "fp32", "measured_with": "OpenVINO", "test_accuracy": 0.25}


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    return make_run(small, tmp_path_factory.mktemp("runs"), "deep", 0.5)


@pytest.fixture(scope="module")
def exported(run, small, tmp_path_factory):
    target = tmp_path_factory.mktemp("recalibrate") / "exported"
    export_run(run, small, target)
    return target


@pytest.fixture
def with_temperature(exported, tmp_path):
    """The same export as an earlier version of this project wrote it: the logits are divided by a number."""
    target = tmp_path / "exported"
    target.mkdir()
    manifest = json.loads((exported / "manifest.json").read_text())
    manifest["temperature"] = 3.0
    for variant in manifest["variants"].values():
        model = onnx.load_from_string(without_calibration((exported / variant["file"]).read_bytes()))
        model.graph.initializer.append(numpy_helper.from_array(np.float32(3), "temperature"))
        model.graph.node.append(helper.make_node("Div", ["logits", "temperature"], ["divided"]))
        model.graph.node.append(helper.make_node("Softmax", ["divided"], ["probabilities"], axis=1))
        output = onnx.ValueInfoProto()
        output.CopyFrom(model.graph.output[0])
        output.name = "probabilities"
        model.graph.output.append(output)
        (target / variant["file"]).write_bytes(model.SerializeToString())
        variant["sha256"] = hashlib.sha256(model.SerializeToString()).hexdigest()
        del variant["calibration"]
        variant["test_loss"] = 9.0
    manifest["variants"]["openvino-fp32"] = manifest["variants"]["fp32"] | MEASURED
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_an_export_with_a_temperature_gets_the_calibration_that_exporting_its_run_gives(
    exported, with_temperature, small
):
    before, wanted = read_manifest(with_temperature), read_manifest(exported)
    images = small.test.images.numpy()
    logits = onnx_predictor(with_temperature / "model.onnx", CPU).predict(images)[0]
    manifest = recalibrate(with_temperature, small)
    assert manifest == read_manifest(with_temperature)
    assert manifest.temperature is None
    assert manifest.model_version == before.model_version
    for name in ("fp32", "int8"):
        variant = manifest.variants[name]
        assert before.variants[name].test_loss == 9.0
        scale, expected = variant.calibration, wanted.variants[name].calibration
        assert (scale.form, scale.images) == (expected.form, expected.images)
        assert scale.coefficients == pytest.approx(expected.coefficients, abs=1e-4)
        assert variant.test_loss == pytest.approx(wanted.variants[name].test_loss, abs=1e-4)
    new_logits, probabilities = onnx_predictor(with_temperature / "model.onnx", CPU).predict(images)
    np.testing.assert_array_equal(new_logits, logits)
    from_run = onnx_predictor(exported / "model.onnx", CPU).predict(images)[1]
    np.testing.assert_allclose(probabilities, from_run, atol=1e-5)


def test_what_was_measured_of_the_logits_is_kept_and_a_warning_says_what_was_not(with_temperature, small, caplog):
    before = read_manifest(with_temperature)
    after = recalibrate(with_temperature, small)
    previous, variant = before.variants["openvino-fp32"], after.variants["openvino-fp32"]
    for field in ("test_accuracy", "test_images", "test_loss_before", "test_ece_before", "measured_with"):
        assert getattr(variant, field) == getattr(previous, field) is not None
    assert (variant.sha256, variant.calibration) == (after.variants["fp32"].sha256, after.variants["fp32"].calibration)
    assert variant.test_loss is variant.test_ece is variant.test_ece_equal_mass is None
    assert variant.openvino_precision == "fp32"
    assert f"python -m cifar_core.measure_openvino --export {with_temperature}" in caplog.text
    assert after.parity is None
    assert f"python -m cifar_core.export --run DIR --output {with_temperature}" in caplog.text


def test_a_calibration_that_does_not_change_keeps_all_measurements(exported, tmp_path, small, caplog):
    target = tmp_path / "exported"
    shutil.copytree(exported, target)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["variants"]["openvino-fp32"] = manifest["variants"]["fp32"] | MEASURED
    (target / "manifest.json").write_text(json.dumps(manifest))
    before = read_manifest(target)
    after = recalibrate(target, small)
    assert after.parity == before.parity is not None
    assert after.variants["openvino-fp32"] == before.variants["openvino-fp32"]
    assert "removed" not in caplog.text


def test_exporting_the_run_after_that_compares_with_torch_again(run, with_temperature, small):
    recalibrate(with_temperature, small)
    assert export_run(run, small, with_temperature).parity is not None


def test_recalibrating_twice_changes_nothing(with_temperature, small):
    first = recalibrate(with_temperature, small)
    kept = contents(with_temperature)
    assert recalibrate(with_temperature, small) == first
    assert contents(with_temperature) == kept


def test_the_current_folder_is_refused_before_anything_is_computed(with_temperature, small, monkeypatch):
    monkeypatch.chdir(with_temperature)
    monkeypatch.setattr("cifar_core.recalibrate.choose_calibration", None)
    with pytest.raises(PublishError, match="is the current folder"):
        recalibrate(Path(), small)


def test_other_data_and_a_damaged_export_are_refused_and_nothing_changes(with_temperature, small, caplog):
    caplog.set_level(logging.WARNING)
    kept = contents(with_temperature)
    with pytest.raises(PublishError, match="use the data that it was trained on"):
        recalibrate(with_temperature, dataclasses.replace(small, fingerprint="other"))
    assert contents(with_temperature) == kept
    (with_temperature / "model.onnx").write_bytes(b"damaged")
    kept = contents(with_temperature)
    with pytest.raises(PublishError, match="is damaged, or was just being replaced"):
        recalibrate(with_temperature, small)
    assert contents(with_temperature) == kept
    (with_temperature / "model.onnx").unlink()
    with pytest.raises(PublishError, match=r"model\.onnx cannot be read \(No such file or directory\)"):
        recalibrate(with_temperature, small)


def test_an_export_that_is_replaced_while_it_is_read_is_not_mixed_with_the_other(with_temperature, small, monkeypatch):
    other = b"a graph of another export"
    parse = publish.parse_manifest

    def parse_and_swap(content, path):
        (with_temperature / "model.onnx").write_bytes(other)
        return parse(content, path)

    monkeypatch.setattr(publish, "parse_manifest", parse_and_swap)
    with pytest.raises(PublishError, match="was just being replaced"):
        recalibrate(with_temperature, small)
    assert (with_temperature / "model.onnx").read_bytes() == other
