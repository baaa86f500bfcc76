import dataclasses
import json

import onnx
import pytest

from cifar_core import export
from cifar_core.export import export_run
from cifar_core.int8 import WEIGHT_BITS
from cifar_core.manifest import read_manifest
from cifar_core.parity import ParityError
from cifar_core.publish import PublishError, is_intact
from cifar_core.requantise import main, requantise
from tests.cifar_core.runs import contents, make_run


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    return make_run(small, tmp_path_factory.mktemp("runs"), "deep-fast", 0.5)


@pytest.fixture(scope="module")
def exported(run, small, tmp_path_factory):
    target = tmp_path_factory.mktemp("requantise") / "exported"
    export_run(run, small, target)
    return target


@pytest.fixture
def earlier(run, exported, small, tmp_path, monkeypatch):
    """The same export as an earlier version of this project wrote it: with another int8 graph, of unknown bits."""
    quantise = export.to_int8

    def otherwise(graph, images):
        model = onnx.load_from_string(quantise(graph, images))
        model.producer_version = "earlier"
        return model.SerializeToString()

    with monkeypatch.context() as patch:
        patch.setattr(export, "to_int8", otherwise)
        target = tmp_path / "exported"
        export_run(run, small, target)
    manifest = json.loads((target / "manifest.json").read_text())
    del manifest["variants"]["int8"]["weight_bits"]
    for name, precision in (("fp32", "fp32"), ("bf16", "bf16"), ("int8", "fp32")):
        variant = manifest["variants"]["int8" if name == "int8" else "fp32"]
        manifest["variants"][f"openvino-{name}"] = variant | {"openvino_precision": precision}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_the_new_graph_is_the_one_that_exporting_the_run_gives_and_fp32_stays(exported, earlier, small, caplog):
    before, wanted = contents(earlier), read_manifest(exported)
    assert before["model.int8.onnx"] != (exported / "model.int8.onnx").read_bytes()
    manifest = requantise(earlier, small)
    assert manifest == read_manifest(earlier)
    assert manifest.variants["int8"] == wanted.variants["int8"]
    assert manifest.variants["int8"].weight_bits == WEIGHT_BITS
    assert (earlier / "model.int8.onnx").read_bytes() == (exported / "model.int8.onnx").read_bytes()
    assert (earlier / "model.onnx").read_bytes() == before["model.onnx"]
    assert manifest.variants.keys() == {"fp32", "int8", "openvino-fp32", "openvino-bf16"}
    assert manifest.parity == wanted.parity
    assert "not measured with OpenVINO" in caplog.text


def test_an_int8_graph_of_another_name_is_replaced_and_the_command_says_what_it_did(
    exported, earlier, small, monkeypatch, capsys
):
    manifest = json.loads((earlier / "manifest.json").read_text())
    for name in ("int8", "openvino-int8"):
        manifest["variants"][name]["file"] = "other.onnx"
    (earlier / "model.int8.onnx").rename(earlier / "other.onnx")
    (earlier / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("sys.argv", ["requantise", "--export", str(earlier), "--data", "synthetic:300"])
    monkeypatch.setattr("cifar_core.requantise.load_dataset", lambda _: small)
    assert main() == 0
    accuracy = read_manifest(exported).variants["int8"].test_accuracy
    assert f"int8: test accuracy {accuracy:.2%} on {small.name}, {accuracy:.2%} before" in capsys.readouterr().out
    assert contents(earlier).keys() == contents(exported).keys()
    assert is_intact(earlier, read_manifest(earlier))


def test_an_export_with_an_earlier_int8_graph_is_not_taken_for_a_current_one(run, exported, earlier, small):
    export_run(run, small, earlier)
    assert (earlier / "model.int8.onnx").read_bytes() == (exported / "model.int8.onnx").read_bytes()


def test_other_data_and_too_large_a_loss_are_refused_and_nothing_changes(earlier, small, monkeypatch):
    kept = contents(earlier)
    with pytest.raises(PublishError, match="use the data that it was trained on"):
        requantise(earlier, dataclasses.replace(small, fingerprint="other"))
    monkeypatch.setattr("cifar_core.parity.INT8_IMAGES", -100)
    monkeypatch.setattr("cifar_core.parity.INT8_LIMIT", -1.0)
    with pytest.raises(ParityError, match="nothing was exported"):
        requantise(earlier, small)
    assert contents(earlier) == kept
