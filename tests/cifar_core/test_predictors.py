import json

import numpy as np
import onnx
import pytest
import torch

from cifar_core.device import CPU
from cifar_core.export import export_run
from cifar_core.manifest import ManifestError
from cifar_core.models import DeepConvNet
from cifar_core.predictors import PredictorError, load_predictor, model_file, predict_all, torch_predictor
from cifar_core.run_folder import RunError
from tests.cifar_core.runs import make_run, number_layers


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
        (
            "empty",
            PredictorError,
            "this folder holds no model, neither manifest.json of an export nor best.pt of a run",
        ),
        ("missing.pt", RunError, "this checkpoint does not exist"),
    ):
        with pytest.raises(error, match=message):
            load_predictor(tmp_path / name, CPU)


@pytest.fixture
def exported(small, tmp_path):
    export_run(make_run(small, tmp_path, "deep", 0.5), small, tmp_path / "my-model")
    return tmp_path / "my-model"


def test_the_folder_of_an_export_is_its_fp32_variant(exported, small):
    images = small.test.images[:20].numpy()
    found, expected = (load_predictor(place, CPU) for place in (exported, exported / "model.onnx"))
    assert found.name == expected.name
    np.testing.assert_array_equal(found.predict(images)[0], expected.predict(images)[0])
    assert model_file(exported) == exported / "model.onnx"


def test_the_folder_of_a_damaged_export_is_refused(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    for content, message in ((b"damaged", "does not have the SHA-256"), (None, "cannot be read")):
        (exported / "model.onnx").write_bytes(content) if content else (exported / "model.onnx").unlink()
        with pytest.raises(ManifestError, match=rf"model\.onnx.* {message}"):
            load_predictor(exported, CPU)
    del manifest["variants"]["fp32"]
    (exported / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=r"manifest\.json: there is no variant 'fp32'; the variants are: int8"):
        load_predictor(exported, CPU)


@pytest.mark.parametrize("address", ["", "localhost:99999", "localhost:x", "127.0.0.1:1,[::1]:2"])
def test_what_is_no_address_of_a_server_is_one_line(address):
    with pytest.raises(PredictorError, match=r"^grpc://.* is not the address of a server: "):
        load_predictor(f"grpc://{address}", CPU)


def test_a_checkpoint_of_another_network_is_named(checkpoint, tmp_path):
    checkpoint["recipe"]["model"] = "baseline"
    torch.save(checkpoint, tmp_path / "other.pt")
    with pytest.raises(PredictorError, match=rf"^{tmp_path / 'other.pt'}: the weights .* do not fit its recipe"):
        load_predictor(tmp_path / "other.pt", CPU)


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
