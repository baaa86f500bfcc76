import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cifar_core import export
from cifar_core.evaluate import evaluate, load_predictor, onnx_predictor, predict_all
from cifar_core.export import ExportError, export_run, to_onnx
from cifar_core.models import DeepConvNet
from cifar_core.quantise import rectify_before_pooling, to_int8
from tests.cifar_core.test_export import CPU, contents, make_run
from tests.conftest import REPOSITORY

METADATA = {
    "model_version": "a-model",
    "classes": '["a","b","c","d","e","f","g","h","i","j"]',
    "validation_images": "30",
    "split_seed": "0",
    "trained_on": "x",
}


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return to_onnx(DeepConvNet().eval(), METADATA)


def run(model, images):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["logits", "probabilities"], {"images": images})


def test_to_rectify_before_pooling_is_the_same_function(graph, small):
    model = onnx.load_from_string(graph)
    moved = rectify_before_pooling(model)
    images = small.test.images[:20].numpy()
    for before, after in zip(run(graph, images), run(moved.SerializeToString(), images), strict=True):
        np.testing.assert_array_equal(before, after)
    kinds = [node.op_type for node in moved.graph.node]
    assert [kinds[place + 1] for place, kind in enumerate(kinds) if kind == "Conv"] == ["Relu"] * 8
    assert sorted(kinds) == sorted(node.op_type for node in model.graph.node)


def test_the_int8_graph_has_the_form_metadata_and_classes_of_the_other_in_a_third_of_the_bytes(graph, small):
    content = to_int8(graph, small.train.images[:64].numpy())
    assert len(content) < len(graph) / 3
    images = small.test.images.numpy()
    one, other = onnx_predictor(graph, CPU), onnx_predictor(content, CPU)  # which checks inputs and outputs
    assert (one.name, one.classes, one.split) == (other.name, other.classes, other.split)
    (logits, probabilities), (logits_int8, probabilities_int8) = predict_all(one, images), predict_all(other, images)
    assert not np.array_equal(logits, logits_int8)
    spread = logits.max() - logits.min()
    assert np.abs(logits - logits_int8).max() < 0.1 * spread
    np.testing.assert_allclose(probabilities_int8.sum(1), 1, atol=1e-5)
    assert probabilities.shape == probabilities_int8.shape
    weights = [tensor for tensor in onnx.load_from_string(content).graph.initializer if list(tensor.dims[2:]) == [3, 3]]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.INT8}


def test_the_same_images_give_the_same_bytes(graph, small):
    images = small.train.images[:64].numpy()
    assert to_int8(graph, images) == to_int8(graph, images)


def test_an_int8_graph_that_loses_too_much_is_not_exported(small, tmp_path, monkeypatch):
    runs = make_run(small, tmp_path, "deep", 0.5)
    export_run(runs, small, tmp_path / "exported")
    before = contents(tmp_path / "exported")

    def worse(graph, images):
        del images
        model = onnx.load_from_string(graph)
        for tensor in model.graph.initializer:
            if list(tensor.dims) == [10]:  # the biases of the output: one class always wins
                bias = np.full(10, -1e3, np.float32)
                bias[int(small.train.labels.bincount().argmin())] = 1e3
                tensor.CopyFrom(onnx.numpy_helper.from_array(bias, tensor.name))
        return model.SerializeToString()

    monkeypatch.setattr(export, "to_int8", worse)
    monkeypatch.setattr(export, "evaluate", _flattering(export.evaluate))
    with pytest.raises(ExportError, match=r"int8 is right on .* nothing was exported"):
        export_run(make_run(small, tmp_path, "deep", 0.6, seed=1), small, tmp_path / "exported")
    assert contents(tmp_path / "exported") == before


def _flattering(honest):
    """fp32 of random weights is right by chance only; let it be right on all, so that int8 has something to lose."""

    def measure(predictor, dataset, which="test"):
        result = honest(predictor, dataset, which)
        graph_is_fp32 = result["per_class"] and max(np.sum(result["confusion"], 0)) < result["images"]
        return result | {"correct": result["images"]} if graph_is_fp32 else result

    return measure


def test_the_shipped_int8_model_loses_at_most_three_tenths_of_a_point(real):
    shipped = REPOSITORY / "exported"
    fp32, int8 = (
        evaluate(load_predictor(shipped / name, CPU), real)["accuracy"] for name in ("model.onnx", "model.int8.onnx")
    )
    assert fp32 - int8 <= 0.003
