import numpy as np
import onnx
import pytest
import torch

from cifar_core.device import CPU
from cifar_core.models import DeepConvNet
from cifar_core.predictors import PredictorError, load_predictor, predict_all, torch_predictor
from cifar_core.run_folder import RunError
from tests.cifar_core.runs import number_layers


def test_a_checkpoint_returns_the_logits_of_the_network_and_their_softmax(small, checkpoint):
    model = DeepConvNet()
    model.load_state_dict(checkpoint["model"])
    with torch.inference_mode():
        expected = model.eval()(small.test.images)
    logits, probabilities = predict_all(torch_predictor(checkpoint, CPU), small.test.images.numpy())
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(probabilities, torch.softmax(expected, 1), atol=1e-6)


def test_weights_of_another_network_than_the_recipes_are_refused(checkpoint):
    checkpoint["recipe"]["model"] = "baseline"
    with pytest.raises(PredictorError, match="do not fit its recipe"):
        torch_predictor(checkpoint, CPU)


def foreign_graph(path):
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), path)


def test_files_that_are_missing_or_no_models_are_refused(tmp_path):
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    foreign_graph(tmp_path / "foreign.onnx")
    (tmp_path / "empty").mkdir()
    for name, error, message in (
        ("missing.onnx", PredictorError, "does not exist; write it with: make train export"),
        ("garbage.onnx", PredictorError, "cannot be read as an ONNX graph"),
        ("foreign.onnx", PredictorError, "not a graph of this project"),
        ("empty", RunError, "this checkpoint does not exist"),
        ("missing.pt", RunError, "this checkpoint does not exist"),
    ):
        with pytest.raises(error, match=message):
            load_predictor(tmp_path / name, CPU)


def test_a_checkpoint_of_an_earlier_version_gives_the_same_logits(small, checkpoint):
    earlier_recipe = {key: value for key, value in checkpoint["recipe"].items() if key != "width"} | {"sizes": ""}
    earlier = checkpoint | {"model": number_layers(checkpoint["model"]), "recipe": earlier_recipe}
    images = small.test.images[:20].numpy()
    expected, _ = torch_predictor(checkpoint, CPU).predict(images)
    logits, _ = torch_predictor(earlier, CPU).predict(images)
    np.testing.assert_array_equal(logits, expected)


def test_a_checkpoint_without_a_readable_recipe_is_refused(checkpoint):
    with pytest.raises(PredictorError, match=r"do not fit its recipe .*epochs is many"):
        torch_predictor(checkpoint | {"recipe": checkpoint["recipe"] | {"epochs": "many"}}, CPU)


def test_predictions_do_not_depend_on_the_batch_size(small, checkpoint):
    predictor = torch_predictor(checkpoint, CPU)
    images = small.test.images[:20].numpy()
    for size in (1, 7, 20):
        np.testing.assert_allclose(predict_all(predictor, images, size)[0], predictor.predict(images)[0], atol=1e-5)
