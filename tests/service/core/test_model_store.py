import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from cifar_core.int8 import EXACT_INT8
from service.core.engine import CUDA, Engine
from service.core.model_store import Model, ModelStore, load
from service.errors import StartError
from service.watch import NotReady
from tests.conftest import REPOSITORY
from tests.service.exports import CLASSES, expected, graph, pictures, write_export


def loaded(folder: Path, variant: str = "fp32") -> Model:
    return load(folder, variant, device="cpu", threads=1, max_batch_size=4)


# The engine


def test_the_engine_computes_the_graph_for_any_number_of_images():
    engine = Engine(graph(3), "cpu", 1)
    for count in (1, 2, 7):
        logits, probabilities = engine.compute(pictures(count), alone=True)
        assert logits.shape == probabilities.shape == (count, len(CLASSES))
        assert np.abs(probabilities - expected(3, pictures(count))).max() < 1e-5


@pytest.mark.parametrize(("bits", "exact"), [(None, "1"), (8, "1"), (7, "0")])
def test_int8_weights_of_more_than_seven_bits_are_computed_without_overflow(tmp_path, bits, exact):
    content = graph()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.int8.onnx").write_bytes(content)
    entry = {"file": "model.int8.onnx", "sha256": hashlib.sha256(content).hexdigest(), "test_accuracy": 0.5}
    entry |= {} if bits is None else {"weight_bits": bits}
    write_export(tmp_path / "export", content, variants={"int8": entry})
    engine = load(tmp_path / "export", "int8", device="cpu", threads=2, max_batch_size=4).engine
    for session in (engine._session, engine._single):
        assert session.get_session_options().get_session_config_entry(EXACT_INT8) == exact


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA")
def test_without_cuda_the_device_cuda_is_refused_and_the_error_says_what_to_install():
    with pytest.raises(StartError, match="onnxruntime-gpu"):
        Engine(graph(), "cuda", 1)


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA")
def test_auto_uses_the_cpu_without_cuda_and_logs_it(caplog):
    caplog.set_level("INFO")
    assert Engine(graph(), "auto", 1).device == "cpu"
    assert "computing on the CPU" in caplog.text


class Session:
    """A session that computes nothing, and remembers the sizes of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def run(self, outputs: object, inputs: dict[str, np.ndarray]) -> None:
        assert inputs["images"].shape[1:] == (32, 32, 3)
        self.sizes.append(len(inputs["images"]))


@pytest.mark.parametrize(
    ("device", "parallel", "largest", "main", "beside_others"),
    [
        ("cpu", True, 24, [24], [1]),
        ("cpu", True, 1, [1], [1]),
        ("cpu", False, 24, [24], None),
        ("cuda", False, 24, [1, 2, 4, 8, 16, 24], None),
        ("cuda", False, 32, [1, 2, 4, 8, 16, 32], None),
    ],
)
def test_the_warm_up_computes_the_largest_batch_and_on_cuda_every_power_of_two(
    device, parallel, largest, main, beside_others
):
    engine = Engine(graph(), "cpu", 1)
    engine.device, engine._session = device, Session()
    engine._single = Session() if parallel else engine._session
    engine.warm_up(largest)
    assert engine._session.sizes == main
    assert not parallel or engine._single.sizes == beside_others


@pytest.mark.cuda
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="this onnxruntime has no CUDA")
def test_on_cuda_the_engine_gives_the_same_answers():
    engine = Engine(graph(3), "cuda", 1)
    assert engine.device == "cuda"
    _, probabilities = engine.compute(pictures(9), alone=True)
    assert np.abs(probabilities - expected(3, pictures(9))).max() < 1e-3


def test_a_graph_with_a_fixed_batch_is_refused():
    with pytest.raises(StartError, match=r"input is tensor\(uint8\) \[4, 32, 32, 3\]; it must be"):
        Engine(graph(batch=4), "cpu", 1)


def test_a_file_that_is_not_onnx_is_refused_in_one_line():
    with pytest.raises(StartError, match="onnxruntime cannot load the graph") as caught:
        Engine(b"not ONNX", "cpu", 1)
    assert "\n" not in str(caught.value)


def test_a_graph_does_not_read_weights_from_files_that_no_digest_covers(tmp_path, monkeypatch):
    import onnx
    from onnx.external_data_helper import set_external_data

    model = onnx.load_from_string(graph())
    (weights,) = (tensor for tensor in model.graph.initializer if tensor.name == "weights")
    (tmp_path / "weights.bin").write_bytes(onnx.numpy_helper.to_array(weights).tobytes())
    set_external_data(weights, "weights.bin")
    weights.ClearField("raw_data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartError, match=r"cannot load the graph: .*weights.bin"):
        Engine(model.SerializeToString(), "cpu", 1)


# Loading


def test_a_model_has_the_values_of_its_manifest(tmp_path):
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


def entry(**changes: object) -> dict[str, object]:
    return {"file": "model.onnx", "sha256": "0" * 64, "test_accuracy": 0.5, **changes}


def variant(**changes: object) -> dict[str, object]:
    return {"variants": {"fp32": entry(**changes)}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (variant(), "is not the file that was exported: its SHA-256 differs from the manifest's, 0000"),
        (variant(file="../model.onnx"), r"manifest.json: variants.fp32.file: .*should match pattern"),
        (variant(file=".."), r"manifest.json: variants.fp32.file: .*should match pattern"),
        (variant(file="absent.onnx"), "absent.onnx, named by the manifest, cannot be read: No such file"),
        (variant(test_accuracy="high"), r"manifest.json: variants.fp32.test_accuracy: .*number"),
        ({"schema_version": 2}, "has schema_version 2; only 1 is supported"),
        ({"classes": ["cat", "dog"]}, "the graph has 10 classes, the manifest names 2"),
        ({"classes": "cat"}, r"manifest.json: classes: "),
        ({"classes": ["cat", "d" * 256]}, r"manifest.json: classes.1: String should have at most 255 characters"),
        ({"variants": {}}, r"manifest.json: variants: "),
        ({"variants": {"int8": entry()}}, "manifest.json: there is no variant 'fp32'; .*int8"),
        ({"model_version": None}, r"manifest.json: model_version: "),
    ],
)
def test_an_export_that_does_not_match_its_manifest_is_refused(tmp_path, changes, message):
    with pytest.raises(StartError, match=message) as caught:
        loaded(changed(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_manifest_is_refused_and_the_error_names_the_command_that_writes_one(tmp_path):
    with pytest.raises(StartError, match=r"manifest.json does not exist; .*make export"):
        loaded(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    write_export(tmp_path, graph())
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StartError, match=r"manifest.json (is not JSON|is not a manifest)"):
        loaded(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx"])
def test_a_named_pipe_in_place_of_a_file_is_refused_at_once(tmp_path, name):
    write_export(tmp_path, graph())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(NotReady, match=rf"{name}.* cannot be read: it is not a regular file"):
        loaded(tmp_path)


def test_a_model_file_with_a_flipped_bit_is_refused(tmp_path):
    write_export(tmp_path, graph())
    content = bytearray((tmp_path / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(bytes(content))
    with pytest.raises(StartError, match="is not the file that was exported"):
        loaded(tmp_path)


def test_a_graph_of_another_version_than_the_manifest_is_refused(tmp_path):
    import onnx

    model = onnx.load_from_string(graph())
    model.metadata_props.add(key="model_version", value="linear-1")
    write_export(tmp_path, model.SerializeToString(), "linear-2")
    with pytest.raises(StartError, match="the graph is of model version 'linear-1', the manifest of 'linear-2'"):
        loaded(tmp_path)


def test_a_graph_whose_probabilities_are_invalid_is_refused(tmp_path):
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(graph())
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "weights")
    weights.CopyFrom(numpy_helper.from_array(np.full((3072, 10), np.nan, np.float32), "weights"))
    with pytest.raises(StartError, match="self-test: the outputs are not finite"):
        loaded(write_export(tmp_path, model.SerializeToString()))


# Reloading


class Reloads:
    """A store for the export in a folder, and the version after each reload; None for a refused export."""

    def __init__(self, folder: Path) -> None:
        self.outcomes: list[str | None] = []
        self.store = ModelStore(
            folder, "fp32", device="cpu", threads=1, max_batch_size=4,
            on_reload=lambda model: self.outcomes.append(model and model.version),
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.store.watch())
        try:
            yield
        finally:
            task.cancel()

    async def until(self, *outcomes: str | None) -> None:
        async with asyncio.timeout(20):
            while self.outcomes != list(outcomes):
                await asyncio.sleep(0.01)


@pytest.fixture
def fast_polls(monkeypatch):
    monkeypatch.setattr("service.watch.POLL_SECONDS", 0.02)
    monkeypatch.setattr("service.watch.MAX_RETRY_SECONDS", 0.02)


def test_a_new_export_replaces_the_old_one_and_a_bad_one_does_not(tmp_path):
    async def test():
        reloads = Reloads(write_export(tmp_path, graph(0), "first"))
        write_export(tmp_path, graph(1), "second")
        assert await reloads.store.reload()
        (tmp_path / "model.onnx").write_bytes(b"damaged")
        assert not await reloads.store.reload()
        assert reloads.outcomes == ["second", None]
        _, probabilities = reloads.store.current.engine.compute(pictures(2), alone=True)
        assert np.abs(probabilities - expected(1, pictures(2))).max() < 1e-5

    asyncio.run(test())


def test_an_export_that_arrives_while_the_first_one_is_warmed_up_is_noticed(tmp_path, fast_polls, monkeypatch):
    warm_up = Engine.warm_up

    def slow(self: Engine, max_batch_size: int) -> None:
        warm_up(self, max_batch_size)
        if not arrived:
            arrived.append(write_export(tmp_path, graph(1), "second"))

    arrived: list[Path] = []
    monkeypatch.setattr(Engine, "warm_up", slow)

    async def test():
        reloads = Reloads(write_export(tmp_path, graph(0), "first"))
        assert reloads.store.current.version == "first"
        async with reloads.watching():
            await reloads.until("second")

    asyncio.run(test())


def test_an_unexpected_error_keeps_the_old_model_and_is_logged_with_its_traceback(tmp_path, monkeypatch, caplog):
    def fail(*_args: object, **_options: object) -> Model:
        raise MemoryError

    async def test():
        reloads = Reloads(write_export(tmp_path, graph(0), "first"))
        monkeypatch.setattr("service.core.model_store.load", fail)
        assert not await reloads.store.reload()
        assert reloads.store.current.version == "first"

    asyncio.run(test())
    assert "Traceback" in caplog.text


def test_a_model_file_that_arrives_after_its_manifest_is_loaded(tmp_path, fast_polls, caplog):
    async def test():
        reloads = Reloads(write_export(tmp_path / "served", graph(0), "first"))
        new = write_export(tmp_path / "new", graph(1), "second")
        async with reloads.watching():
            (new / "manifest.json").replace(tmp_path / "served" / "manifest.json")
            await reloads.until(None)
            await asyncio.sleep(0.2)  # several attempts
            assert caplog.text.count("is not the file that was exported") == 1
            (new / "model.onnx").replace(tmp_path / "served" / "model.onnx")
            await reloads.until(None, "second")

    asyncio.run(test())


def test_a_model_file_with_a_new_name_is_loaded_when_it_arrives(tmp_path, fast_polls):
    async def test():
        folder = write_export(tmp_path / "served", graph(0), "first")
        reloads = Reloads(folder)
        content = graph(1)
        entry = {"file": "second.onnx", "sha256": hashlib.sha256(content).hexdigest(), "test_accuracy": 0.5}
        async with reloads.watching():
            write_export(folder, graph(0), "second", variants={"fp32": entry})
            await reloads.until(None)
            (folder / "second.onnx").write_bytes(content[:1000])
            await reloads.until(None, None)  # absent, then half written
            (folder / "second.onnx").write_bytes(content)
            await reloads.until(None, None, "second")

    asyncio.run(test())


def test_other_files_in_the_folder_cause_no_reload(tmp_path, fast_polls):
    async def test():
        folder = write_export(tmp_path, graph(0), "first")
        reloads = Reloads(folder)
        async with reloads.watching():
            (folder / "dangling").symlink_to("nowhere")
            for turn in range(10):
                (folder / "training.log").write_text(str(turn))
                await asyncio.sleep(0.03)
            assert reloads.outcomes == []
            write_export(folder, graph(1), "second")  # the watcher still works
            await reloads.until("second")

    asyncio.run(test())


def test_a_folder_that_is_replaced_while_the_server_runs_is_loaded(tmp_path, fast_polls):
    async def test():
        folder = write_export(tmp_path / "served", graph(0), "first")
        reloads = Reloads(folder)
        async with reloads.watching():
            folder.rename(tmp_path / "old")
            await reloads.until(None)
            write_export(tmp_path / "new", graph(1), "second").rename(folder)
            await reloads.until(None, "second")

    asyncio.run(test())


def test_an_export_that_cannot_run_is_tried_only_once(tmp_path, fast_polls, caplog):
    async def test():
        folder = write_export(tmp_path, graph(0), "first")
        reloads = Reloads(folder)
        async with reloads.watching():
            write_export(folder, b"not ONNX", "second")
            await asyncio.sleep(0.3)
            assert set(reloads.outcomes) == {None}
            assert caplog.text.count("onnxruntime cannot load the graph") == 1
            assert reloads.store.current.version == "first"

    asyncio.run(test())


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA")
def test_a_reload_does_not_move_the_model_from_cuda_to_the_cpu(tmp_path, caplog):
    async def test():
        store = ModelStore(
            write_export(tmp_path, graph(0), "first"), "fp32",
            device="auto", threads=1, max_batch_size=4, on_reload=lambda model: None,
        )  # fmt: skip
        store.current.engine.device = "cuda"  # as if CUDA had been chosen at the start and were no longer available
        write_export(tmp_path, graph(1), "second")
        assert not await store.reload()
        assert store.current.version == "first"

    asyncio.run(test())
    assert "--device cuda" in caplog.text


def test_a_model_file_that_is_damaged_while_it_is_served_is_reported(tmp_path, fast_polls):
    async def test():
        reloads = Reloads(write_export(tmp_path, graph(), "first"))
        async with reloads.watching():
            (tmp_path / "model.onnx").write_bytes(b"damaged")
            await reloads.until(None)
        assert reloads.store.current.version == "first"

    asyncio.run(test())


def with_nodes(change):
    """The graph of a linear model after `change` of its nodes and initializers."""
    model = onnx.load_from_string(graph())
    change(model.graph)
    return model.SerializeToString()


def test_a_graph_whose_answers_depend_on_the_other_images_of_a_batch_is_refused(tmp_path):
    def subtract_mean_of_batch(graph):
        product = next(node for node in graph.node if node.output[0] == "product")
        product.output[0] = "before"
        place = list(graph.node).index(product) + 1
        graph.node.insert(place, helper.make_node("Sub", ["before", "mean"], ["product"]))
        graph.node.insert(place, helper.make_node("ReduceMean", ["before", "axis"], ["mean"], keepdims=1))
        graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis"))

    with pytest.raises(StartError, match="an image's probabilities depend on the others in its batch"):
        loaded(write_export(tmp_path, with_nodes(subtract_mean_of_batch)))


def test_a_graph_whose_outputs_have_different_numbers_of_classes_is_refused(tmp_path):
    model = onnx.load_from_string(graph())
    probabilities = next(node for node in model.graph.node if node.output[0] == "probabilities")
    probabilities.output[0] = "all"
    model.graph.initializer.append(numpy_helper.from_array(np.arange(9), "nine"))
    model.graph.node.append(helper.make_node("Gather", ["all", "nine"], ["probabilities"], axis=1))
    output = next(output for output in model.graph.output if output.name == "probabilities")
    output.type.tensor_type.shape.dim[1].dim_value = 9
    with pytest.raises(StartError, match="'logits' and 'probabilities' have different numbers of classes"):
        loaded(write_export(tmp_path, model.SerializeToString()))
