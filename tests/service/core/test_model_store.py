import asyncio
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from service.core.engine import CUDA, Engine
from service.core.model_store import Model, ModelStore, load
from service.errors import StartError
from tests.conftest import REPOSITORY
from tests.service.exports import CLASSES, expected, graph, pictures, write_export


def loaded(folder: Path, variant: str = "fp32") -> Model:
    return load(folder, variant, device="cpu", threads=1, max_batch_size=4)


# The engine


def test_the_engine_computes_the_graph_for_any_number_of_images():
    engine = Engine(graph(3), "cpu", 1)
    for count in (1, 2, 7):
        logits, probabilities = engine.compute(pictures(count))
        assert logits.shape == probabilities.shape == (count, len(CLASSES))
        assert np.abs(probabilities - expected(3, pictures(count))).max() < 1e-5


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA")
def test_asked_for_cuda_without_cuda_the_engine_says_what_is_missing():
    with pytest.raises(StartError, match="onnxruntime-gpu"):
        Engine(graph(), "cuda", 1)


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA")
def test_auto_takes_the_cpu_and_says_so(caplog):
    caplog.set_level("INFO")
    assert Engine(graph(), "auto", 1).device == "cpu"
    assert "computing on the CPU" in caplog.text


@pytest.mark.cuda
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="this onnxruntime has no CUDA")
def test_on_cuda_the_engine_gives_the_same_answers():
    engine = Engine(graph(3), "cuda", 1)
    assert engine.device == "cuda"
    _, probabilities = engine.compute(pictures(9))
    assert np.abs(probabilities - expected(3, pictures(9))).max() < 1e-3


def test_a_graph_with_a_fixed_batch_is_refused():
    with pytest.raises(StartError, match=r"input is tensor\(uint8\) \[4, 32, 32, 3\]; it must be"):
        Engine(graph(batch=4), "cpu", 1)


def test_what_is_no_graph_is_refused_in_one_line():
    with pytest.raises(StartError, match="onnxruntime cannot load the graph") as caught:
        Engine(b"not ONNX", "cpu", 1)
    assert "\n" not in str(caught.value)


# Loading


def test_a_model_is_what_its_manifest_says(tmp_path):
    model = loaded(write_export(tmp_path, graph(), "linear-7"))
    assert (model.name, model.version, model.variant) == ("cifar10", "linear-7", "fp32")
    assert model.classes == CLASSES
    assert model.test_accuracy == 0.5


def test_the_shipped_model_passes_its_checks():
    model = loaded(REPOSITORY / "exported")
    manifest = json.loads((REPOSITORY / "exported" / "manifest.json").read_text())
    assert model.version == manifest["model_version"]


def changed(folder: Path, **changes: object) -> Path:
    return write_export(folder, graph(), **changes)  # type: ignore[arg-type]


def variant(**changes: object) -> dict[str, object]:
    return {"variants": {"fp32": {"file": "model.onnx", "sha256": "0" * 64, "test_accuracy": 0.5, **changes}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (variant(), "is not the file that was exported: its SHA-256 is"),
        (variant(file="../model.onnx"), "must lie in the manifest's own folder"),
        (variant(file="absent.onnx"), "absent.onnx, which the manifest names, cannot be read"),
        (variant(test_accuracy="high"), "no valid 'test_accuracy'"),
        ({"schema_version": 2}, "schema_version 2; this server reads 1"),
        ({"classes": ["cat", "dog"]}, "the graph has 10 classes, the manifest names 2"),
        ({"classes": "cat"}, "classes is not a list of names"),
        ({"variants": {}}, "variants is not an object"),
        ({"variants": {"int8": {"file": "a", "sha256": "b", "test_accuracy": 1}}}, "no variant 'fp32'; it has int8"),
        ({"model_version": None}, "model_version is not a string"),
    ],
)
def test_an_export_that_is_not_what_it_should_be_is_refused(tmp_path, changes, message):
    with pytest.raises(StartError, match=message):
        loaded(changed(tmp_path, **changes))


def test_a_folder_without_a_manifest_is_no_model(tmp_path):
    with pytest.raises(StartError, match=r"there is no model: .*manifest.json does not exist"):
        loaded(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_damaged_manifest_is_told(tmp_path, content):
    write_export(tmp_path, graph())
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StartError, match=r"manifest.json (is not JSON|is not a manifest)"):
        loaded(tmp_path)


def test_a_model_file_with_a_flipped_bit_is_refused(tmp_path):
    write_export(tmp_path, graph())
    content = bytearray((tmp_path / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(bytes(content))
    with pytest.raises(StartError, match="is not the file that was exported"):
        loaded(tmp_path)


def test_a_graph_that_says_another_version_than_the_manifest_is_refused(tmp_path):
    import onnx

    model = onnx.load_from_string(graph())
    model.metadata_props.add(key="model_version", value="linear-1")
    write_export(tmp_path, model.SerializeToString(), "linear-2")
    with pytest.raises(StartError, match="says that it is model version 'linear-1', the manifest 'linear-2'"):
        loaded(tmp_path)


def test_a_graph_that_computes_nonsense_is_refused(tmp_path):
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(graph())
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "weights")
    weights.CopyFrom(numpy_helper.from_array(np.full((3072, 10), np.nan, np.float32), "weights"))
    with pytest.raises(StartError, match="self-test: the outputs are not finite"):
        loaded(write_export(tmp_path, model.SerializeToString()))


# Reloading


def test_a_new_export_takes_the_place_of_the_old_one_and_a_bad_one_does_not(tmp_path):
    async def test():
        outcomes: list[Model | None] = []
        models = ModelStore(write_export(tmp_path, graph(0), "first"), loaded, outcomes.append)
        write_export(tmp_path, graph(1), "second")
        assert await models.reload()
        assert models.current.version == "second"
        (tmp_path / "model.onnx").write_bytes(b"damaged")
        assert not await models.reload()
        assert models.current.version == "second"
        _, probabilities = models.current.engine.compute(pictures(2))
        assert np.abs(probabilities - expected(1, pictures(2))).max() < 1e-5
        assert [outcome and outcome.version for outcome in outcomes] == ["second", None]

    asyncio.run(test())


def test_a_fault_while_loading_leaves_the_old_model(tmp_path):
    async def test():
        write_export(tmp_path, graph(0), "first")
        fail = False

        def loader(folder: Path) -> Model:
            if fail:
                raise MemoryError
            return loaded(folder)

        models = ModelStore(tmp_path, loader, lambda outcome: None)
        fail = True
        assert not await models.reload()
        assert models.current.version == "first"

    asyncio.run(test())
