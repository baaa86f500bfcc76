"""Serving and measuring with OpenVINO. `make test-openvino` runs all tests; with another build only refusals run."""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from cifar_core import measure_openvino, openvino, processor
from cifar_core.data import load_dataset
from cifar_core.manifest import ManifestError, read_manifest
from cifar_core.openvino import PROVIDER, OpenVinoError, open_session
from cifar_core.parity import ParityError
from cifar_core.publish import PublishError, read_export
from service.core.engine import Engine
from service.core.model_store import load
from service.errors import StartError
from service.launch import ServerProcess
from tests.conftest import REPOSITORY
from tests.service.exports import expected, graph, pictures, write_export

HAS_OPENVINO = PROVIDER in onnxruntime.get_available_providers()
has_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="this onnxruntime has no OpenVINO: make test-openvino")
without_openvino = pytest.mark.skipif(HAS_OPENVINO, reason="this onnxruntime has OpenVINO")
has_bf16 = pytest.mark.skipif(not processor.has_bf16(), reason="this processor does not compute in bf16")


def measured(folder: Path, **precisions: str) -> Path:
    """An export of a small graph whose manifest says that OpenVINO computed it in these precisions."""
    write_export(folder, graph(3))
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, precision in precisions.items():
        manifest["variants"][f"openvino-{name}"] = manifest["variants"]["fp32"] | {
            "openvino_precision": precision,
            "test_accuracy": 0.25,
        }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def loaded(folder: Path, variant: str = "fp32", device: str = "openvino"):
    return load(folder, variant, device=device, threads=2, max_batch_size=4)


# Refusals


@without_openvino
def test_without_openvino_the_device_is_refused_and_the_error_says_what_to_install(tmp_path):
    folder = measured(tmp_path / "export", fp32="fp32")
    done = subprocess.run(
        [sys.executable, "-m", "service", "--model", str(folder), "--port", "0", "--device", "openvino"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "this onnxruntime has no OpenVINO" in done.stderr
    assert "pip install onnxruntime-openvino" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@without_openvino
def test_without_openvino_nothing_is_measured(exported_copy):
    before = (exported_copy / "manifest.json").read_bytes()
    done = run_measurement(exported_copy)
    assert done.returncode == 2
    assert "this onnxruntime has no OpenVINO" in done.stderr
    assert (exported_copy / "manifest.json").read_bytes() == before


def test_a_variant_that_was_not_measured_with_openvino_is_refused(tmp_path):
    folder = measured(tmp_path / "export", int8="fp32")
    with pytest.raises(StartError, match=r"'fp32' was not measured with OpenVINO; the variants that were: int8; .*me"):
        loaded(folder, "fp32")


@pytest.mark.parametrize("name", ["bf16", "openvino-bf16"])
def test_a_variant_of_openvino_is_not_served_on_another_device(tmp_path, name):
    folder = measured(tmp_path / "export", bf16="bf16")
    with pytest.raises(StartError, match=f"there is no variant '{name}'; the variants are: fp32"):
        loaded(folder, name, "cpu")


def test_the_variants_of_a_device_are_found_by_their_plain_names(tmp_path):
    manifest = read_manifest(measured(tmp_path / "export", fp32="fp32", bf16="bf16"))
    assert manifest.variant("fp32").openvino_precision is None
    assert manifest.variant("bf16", openvino=True).openvino_precision == "bf16"
    assert manifest.variant("fp32", openvino=True).test_accuracy == 0.25
    with pytest.raises(ManifestError, match="the variants that were: bf16, fp32"):
        manifest.variant("int8", openvino=True)


@has_openvino
def test_a_processor_without_bf16_is_refused(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f\n")
    monkeypatch.setattr(processor, "_CPU_INFO", info)
    with pytest.raises(OpenVinoError, match="does not compute in bf16"):
        open_session(graph(), 1, 1, "bf16")
    open_session(graph(), 1, 1, "fp32")


@pytest.mark.parametrize(
    ("bits", "instructions", "refused"), [(None, "", 1), (8, "", 1), (7, "", 0), (8, "avx_vnni", 0)]
)
def test_int8_weights_that_would_overflow_on_this_processor_are_refused(
    tmp_path, monkeypatch, bits, instructions, refused
):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: fpu sse2 avx2 {instructions}\n")
    monkeypatch.setattr(processor, "_CPU_INFO", info)
    folder = measured(tmp_path / "export", int8="fp32")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["variants"]["openvino-int8"] |= {} if bits is None else {"weight_bits": bits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if refused:
        with pytest.raises(StartError, match=r"the int8 weights have 8 bits, .*cifar_core\.requantise"):
            loaded(folder, "int8")
    elif HAS_OPENVINO:
        assert loaded(folder, "int8").engine.device == "openvino"
    else:
        with pytest.raises(StartError, match="has no OpenVINO"):
            loaded(folder, "int8")


@has_openvino
def test_a_graph_that_openvino_cannot_compute_whole_is_refused():
    model = onnx.load_model_from_string(graph())
    # An operator that onnxruntime has and OpenVINO does not.
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    last = next(node for node in model.graph.node if node.output[0] == "logits")
    last.CopyFrom(helper.make_node("Normalizer", list(last.input), ["logits"], domain="ai.onnx.ml", norm="MAX"))
    content = model.SerializeToString()
    Engine(content, "cpu", 1)
    with pytest.raises(OpenVinoError, match="fallback to CPU EP has been explicitly disabled"):
        open_session(content, 1, 1, "fp32")


@has_openvino
def test_answers_that_differ_from_onnxruntime_too_much_are_refused(tmp_path, monkeypatch):
    compute = Engine.compute

    def wrong(self, images, *, alone):
        logits, probabilities = compute(self, images, alone=alone)
        return logits, probabilities[:, ::-1] if self.device == "openvino" else probabilities

    monkeypatch.setattr(Engine, "compute", wrong)
    with pytest.raises(StartError, match="computed by OpenVINO differ by"):
        loaded(measured(tmp_path / "export", fp32="fp32"))


# Computing


@has_openvino
@pytest.mark.parametrize("alone", [True, False])
def test_fp32_gives_the_answers_of_onnxruntime_for_any_number_of_images(alone):
    engine = Engine(graph(3), "openvino", 2)
    assert engine.device == "openvino"
    for count in (1, 2, 7, 32, 5):
        images = pictures(count, count)
        _, probabilities = engine.compute(images, alone=alone)
        assert np.abs(probabilities - expected(3, images)).max() < 1e-4


@has_openvino
def test_batches_of_several_threads_are_not_mixed_up():
    engine = Engine(graph(3), "openvino", 2)

    def check(number: int) -> float:
        images = pictures(1 + number % 9, number)
        return float(np.abs(engine.compute(images, alone=number % 2 == 0)[1] - expected(3, images)).max())

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(check, range(200))) < 1e-4


@has_openvino
@has_bf16
def test_bf16_is_computed_in_bf16():
    images = pictures(64)
    _, probabilities = Engine(graph(3), "openvino", 2, "bf16").compute(images, alone=True)
    difference = np.abs(probabilities - expected(3, images)).max()
    assert 1e-4 < difference < 0.1


@has_openvino
@has_bf16
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_with_openvino_names_its_device_variant_and_accuracy(tmp_path, workers):
    from service.client import Client

    folder = measured(tmp_path / "export", fp32="fp32", bf16="bf16")
    images = pictures(40)
    options = ("--model", folder, "--device", "openvino", "--variant", "bf16", "--workers", workers)
    with ServerProcess(*options, folder=REPOSITORY) as server, Client(server.ready().target) as client:
        model = client.model()
        assert (model.device, model.variant, model.test_accuracy) == ("openvino", "bf16", 0.25)
        difference = np.abs(client.probabilities(images) - expected(3, images)).max()
        assert 1e-6 < difference < 0.1


@has_openvino
def test_a_new_export_that_was_not_measured_is_refused_and_the_old_one_stays(tmp_path):
    from service.client import Client

    folder = measured(tmp_path / "export", fp32="fp32")
    options = ("--model", folder, "--device", "openvino")
    with ServerProcess(*options, folder=REPOSITORY) as server, Client(server.ready().target) as client:
        write_export(folder, graph(4), "linear-4")
        server.wait_for("was not measured with OpenVINO")
        images = pictures(3)
        assert np.abs(client.probabilities(images) - expected(3, images)).max() < 1e-4


# Measuring


@pytest.fixture
def exported_copy(tmp_path) -> Path:
    """An export that this project made, of synthetic data."""
    for command in (
        ["train", "sprint", "--set", "epochs=1", "--set", "sizes=", "--runs", str(tmp_path / "runs")],
        ["export", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "exported")],
    ):
        subprocess.run(
            [sys.executable, "-m", f"cifar_core.{command[0]}", *command[1:], "--data", "synthetic:600"],
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
        )
    return tmp_path / "exported"


@has_openvino
def test_without_bf16_the_other_variants_are_measured(exported_copy, monkeypatch, capsys):
    monkeypatch.setattr(measure_openvino, "has_bf16", lambda: False)
    measure_openvino.measure(exported_copy, load_dataset("synthetic:600"), 1)
    manifest = read_manifest(exported_copy)
    assert manifest.variants.keys() == {"fp32", "int8", "openvino-fp32", "openvino-int8"}
    # int8 weights of 8 bits would overflow here.
    content = json.loads(manifest.to_json())
    del content["variants"]["openvino-int8"], content["variants"]["int8"]["weight_bits"]
    (exported_copy / "manifest.json").write_text(json.dumps(content))
    monkeypatch.setattr(openvino, "has_int8_products", lambda: False)
    names = measure_openvino.measure(exported_copy, load_dataset("synthetic:600"), 1).variants.keys()
    assert names == {"fp32", "int8", "openvino-fp32"}
    # A measurement of bf16 on another machine is kept as long as it is of the same graph.
    content = json.loads(manifest.to_json())
    for sha256, kept in ((manifest.variants["fp32"].sha256, True), ("0" * 64, False)):
        bf16 = content["variants"]["fp32"] | {
            "openvino_precision": "bf16",
            "file": "model.onnx",
            "test_accuracy": 0.125,
        }
        content["variants"]["openvino-bf16"] = bf16
        (exported_copy / "manifest.json").write_text(json.dumps(content))
        if not kept:
            monkeypatch.setattr(
                measure_openvino,
                "read_export",
                lambda *arguments, sha256=sha256: _with_bf16_of(read_export(*arguments), sha256),
            )
        entry = measure_openvino.measure(exported_copy, load_dataset("synthetic:600"), 1).variants.get("openvino-bf16")
        assert (entry is not None and entry.test_accuracy == 0.125) == kept


def _with_bf16_of(export, sha256):
    """The export with an entry of bf16 for a graph with this digest."""
    manifest, files = export
    other = manifest.variants["openvino-bf16"].model_copy(update={"sha256": sha256})
    return manifest.model_copy(update={"variants": manifest.variants | {"openvino-bf16": other}}), files


@has_openvino
@pytest.mark.parametrize("case", ["other data", "damaged", "too many wrong", "replaced meanwhile"])
def test_an_export_that_cannot_be_measured_stays_as_it_is(exported_copy, monkeypatch, case):
    dataset, error = load_dataset("synthetic:600"), PublishError
    if case == "other data":
        dataset = dataclasses.replace(dataset, fingerprint="0" * 64)
    elif case == "damaged":
        (exported_copy / "model.onnx").write_bytes(b"damaged")
    elif case == "too many wrong":
        error = ParityError
        monkeypatch.setattr(measure_openvino, "INT8_IMAGES", -1)
        monkeypatch.setattr(measure_openvino, "INT8_LIMIT", -1.0)
    else:
        evaluate = measure_openvino.evaluate

        def slow(*arguments):
            manifest = json.loads((exported_copy / "manifest.json").read_text())
            (exported_copy / "manifest.json").write_text(json.dumps(manifest | {"model_version": "another"}))
            return evaluate(*arguments)

        monkeypatch.setattr(measure_openvino, "evaluate", slow)
    kept = (exported_copy / "model.int8.onnx").read_bytes()
    with pytest.raises(error):
        measure_openvino.measure(exported_copy, dataset, 1)
    assert not [name for name in read_manifest(exported_copy).variants if name.startswith("openvino")]
    assert (exported_copy / "model.int8.onnx").read_bytes() == kept


@pytest.mark.parametrize("change", [{"openvino-x": {}}, {"fp32": {"openvino_precision": "bf16"}}])
def test_a_manifest_whose_names_and_precisions_disagree_is_refused(tmp_path, change):
    folder = write_export(tmp_path / "export", graph())
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, values in change.items():
        manifest["variants"][name] = manifest["variants"]["fp32"] | values
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="if and only if there is openvino_precision"):
        read_manifest(folder)


def run_measurement(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cifar_core.measure_openvino", "--export", str(folder), "--data", "synthetic:600"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


@has_openvino
@has_bf16
def test_measuring_adds_three_variants_and_changes_nothing_else(exported_copy):
    before = read_manifest(exported_copy)
    done = run_measurement(exported_copy)
    assert done.returncode == 0, done.stderr
    after = read_manifest(exported_copy)
    added = after.variants.keys() - before.variants.keys()
    assert added == {"openvino-fp32", "openvino-bf16", "openvino-int8"}
    assert after.model_copy(update={"variants": before.variants}) == before
    for name in ("fp32", "int8", "bf16"):
        variant = after.variant(name, openvino=True)
        assert variant.test_images == before.variant("fp32").test_images
        assert variant.sha256 == before.variant("int8" if name == "int8" else "fp32").sha256
        assert f"openvino-{name}: test accuracy {variant.test_accuracy:.2%}" in done.stdout
    assert run_measurement(exported_copy).returncode == 0
    assert read_manifest(exported_copy) == after
