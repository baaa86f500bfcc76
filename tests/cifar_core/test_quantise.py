import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cifar_core import export
from cifar_core.calibration import Calibration
from cifar_core.calibration_graph import add_calibration
from cifar_core.device import CPU
from cifar_core.export import export_run, to_onnx
from cifar_core.int8 import EXACT_INT8, WEIGHT_BITS
from cifar_core.manifest import read_manifest
from cifar_core.models import DeepConvNet
from cifar_core.parity import ParityError
from cifar_core.predictors import onnx_predictor, predict_all
from cifar_core.quantise import move_relu_before_pooling, to_int8
from cifar_core.train import run as train
from tests.cifar_core.runs import contents
from tests.cifar_core.training import make_trainer
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


def calibrated(graph):
    """With the output `probabilities`, as in an export."""
    return add_calibration(graph, Calibration("gap", (0.5, 0.2)))


def compute(model, images):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})


def test_moving_relu_before_pooling_preserves_the_function(graph, small):
    model = onnx.load_from_string(graph)
    moved = move_relu_before_pooling(model)
    images = small.test.images[:20].numpy()
    for before, after in zip(compute(graph, images), compute(moved.SerializeToString(), images), strict=True):
        np.testing.assert_array_equal(before, after)
    kinds = [node.op_type for node in moved.graph.node]
    assert [kinds[position + 1] for position, kind in enumerate(kinds) if kind == "Conv"] == ["Relu"] * 8
    assert sorted(kinds) == sorted(node.op_type for node in model.graph.node)


def test_the_int8_graph_has_the_same_interface_and_metadata_in_a_third_of_the_size(graph, small):
    content = to_int8(graph, small.train.images[:64].numpy())
    assert len(content) < len(graph) / 3
    images = small.test.images.numpy()
    fp32, int8 = (onnx_predictor(calibrated(each), CPU) for each in (graph, content))  # which checks inputs and outputs
    assert (fp32.name, fp32.classes, fp32.split) == (int8.name, int8.classes, int8.split)
    (logits, probabilities), (logits_int8, probabilities_int8) = predict_all(fp32, images), predict_all(int8, images)
    assert not np.array_equal(logits, logits_int8)
    spread = logits.max() - logits.min()
    assert np.abs(logits - logits_int8).max() < 0.1 * spread
    np.testing.assert_allclose(probabilities_int8.sum(1), 1, atol=1e-5)
    assert probabilities.shape == probabilities_int8.shape
    weights = [tensor for tensor in onnx.load_from_string(content).graph.initializer if list(tensor.dims[2:]) == [3, 3]]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.INT8}


def int8_weights(content):
    return [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(content).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]


def test_weights_have_seven_bits_so_that_no_processor_overflows(graph, small):
    content = to_int8(graph, small.train.images[:64].numpy())
    weights = int8_weights(content)
    assert len(weights) == 9  # of eight convolutions and the hidden layer
    largest = max(np.abs(tensor.astype(int)).max() for tensor in weights)
    assert largest == 2 ** (WEIGHT_BITS - 1)
    assert 2 * 255 * largest < 2**15
    outputs = []
    for exact in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(EXACT_INT8, exact)
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        outputs.append(session.run(["logits"], {"images": small.test.images.numpy()})[0])
    np.testing.assert_allclose(*outputs, atol=1e-4 * np.abs(outputs[0]).max())


def test_the_shipped_int8_graph_has_weights_of_seven_bits():
    manifest = read_manifest(REPOSITORY / "exported")
    assert manifest.variants["int8"].weight_bits == WEIGHT_BITS
    weights = int8_weights((REPOSITORY / "exported" / manifest.variants["int8"].file).read_bytes())
    assert max(np.abs(tensor.astype(int)).max() for tensor in weights) <= 2 ** (WEIGHT_BITS - 1)


def test_quantising_with_the_same_images_gives_the_same_bytes(graph, small):
    images = small.train.images[:64].numpy()
    assert to_int8(graph, images) == to_int8(graph, images)


def test_an_int8_graph_that_loses_too_much_accuracy_is_not_exported(small, tmp_path, monkeypatch):
    overrides = ("epochs=4", "batch_size=27", "sizes=24:2")
    trainer = make_trainer(small, tmp_path / "run", "sprint", overrides)
    history = train(trainer, resume=False)
    assert history[-1]["validation_accuracy"] > 0.5
    export_run(trainer.folder, small, tmp_path / "exported")
    before = contents(tmp_path / "exported")
    (tmp_path / "exported" / "model.onnx").write_bytes(b"damaged")  # so that the run is exported again

    def to_one_class(graph, images):
        model = onnx.load_from_string(graph)
        (product,) = [node for node in model.graph.node if "logits" in node.output]
        for tensor in model.graph.initializer:
            if tensor.name in product.input and list(tensor.dims) in ([10, 128], [128, 10]):
                weights = np.zeros_like(onnx.numpy_helper.to_array(tensor))
                tensor.CopyFrom(onnx.numpy_helper.from_array(weights, tensor.name))
        return model.SerializeToString()

    monkeypatch.setattr(export, "to_int8", to_one_class)
    with pytest.raises(ParityError, match=r"int8 classifies \d of 30 validation images correctly, fp32 .* nothing was"):
        export_run(trainer.folder, small, tmp_path / "exported")
    assert contents(tmp_path / "exported") == before | {"model.onnx": b"damaged"}
