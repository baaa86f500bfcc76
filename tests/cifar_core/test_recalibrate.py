import dataclasses
import hashlib
import json
import logging

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


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    target = tmp_path_factory.mktemp("recalibrate") / "exported"
    export_run(make_run(small, tmp_path_factory.mktemp("runs"), "deep", 0.5), small, target)
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
    manifest["variants"]["openvino-fp32"] = manifest["variants"]["fp32"] | {"openvino_precision": "fp32"}
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
    assert manifest.variants.keys() == {"fp32", "int8"}
    assert manifest.temperature is None
    assert manifest.model_version == before.model_version
    for name, variant in manifest.variants.items():
        assert before.variants[name].test_loss == 9.0
        scale, expected = variant.calibration, wanted.variants[name].calibration
        assert (scale.form, scale.images) == (expected.form, expected.images)
        assert scale.coefficients == pytest.approx(expected.coefficients, abs=1e-4)
        assert variant.test_loss == pytest.approx(wanted.variants[name].test_loss, abs=1e-4)
    new_logits, probabilities = onnx_predictor(with_temperature / "model.onnx", CPU).predict(images)
    np.testing.assert_array_equal(new_logits, logits)
    from_run = onnx_predictor(exported / "model.onnx", CPU).predict(images)[1]
    np.testing.assert_allclose(probabilities, from_run, atol=1e-5)


def test_recalibrating_twice_changes_nothing(with_temperature, small):
    first = recalibrate(with_temperature, small)
    kept = contents(with_temperature)
    assert recalibrate(with_temperature, small) == first
    assert contents(with_temperature) == kept


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
