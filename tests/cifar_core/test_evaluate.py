import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch

from cifar_core.calibration import expected_calibration_error
from cifar_core.data import split
from cifar_core.evaluate import (
    EvaluationError,
    Predictor,
    evaluate,
    load_predictor,
    predict_all,
    report,
    torch_predictor,
    wilson_interval,
)
from cifar_core.models import DeepConvNet
from cifar_core.recipes import RECIPES
from cifar_core.run_folder import RunError

CPU = torch.device("cpu")


def answers(dataset, probabilities):
    """A model that gives these probabilities, row by row, to the test images."""
    rows = iter(np.asarray(probabilities, np.float32))

    def predict(images):
        batch = np.stack([next(rows) for _ in images])
        return np.log(batch), batch

    return Predictor("fixed", dataset.classes, predict, (1000, 0), dataset.fingerprint)


def evaluate_fixed(dataset, probabilities):
    # The warm-up batch is asked for first.
    first = min(256, len(probabilities))
    return evaluate(answers(dataset, [*probabilities[:first], *probabilities]), dataset)


@pytest.fixture
def probabilities(small):
    """Nine of ten test images rightly classified, each a little more confidently than the one before."""
    count, classes = len(small.test), len(small.classes)
    confidence = np.linspace(0.5, 0.9, count)
    values = np.repeat((1 - confidence)[:, None] / (classes - 1), classes, 1)
    predicted = small.test.labels.numpy().copy()
    predicted[::10] = (predicted[::10] + 1) % classes
    values[np.arange(count), predicted] = confidence
    return values


def test_every_figure_is_that_of_the_predictions(small, probabilities):
    result = evaluate_fixed(small, probabilities)
    labels, predicted = small.test.labels.numpy(), probabilities.argmax(1)
    assert (result["images"], result["correct"], result["accuracy"]) == (100, 90, 0.9)
    assert result["loss"] == pytest.approx(-np.log(probabilities[np.arange(100), labels]).mean(), rel=1e-5)
    confusion = np.asarray(result["confusion"])
    assert confusion.sum() == 100
    for row, name in enumerate(small.classes):
        assert result["per_class"][name] == np.mean(predicted[labels == row] == row)
        assert confusion[row].tolist() == [int(((labels == row) & (predicted == column)).sum()) for column in range(10)]
    assert result["images_per_second"] > 0


def test_the_calibration_is_told_with_and_without_the_temperature_of_the_graph(small, probabilities):
    cold = np.log(probabilities) * 2  # logits of a network that is too certain, in a graph of temperature 2

    def predict(images):
        chosen = rows[: len(images)]
        return cold[chosen].astype(np.float32), probabilities[chosen].astype(np.float32)

    rows = np.arange(len(probabilities))
    predictor = Predictor("fixed", small.classes, predict, (1000, 0), small.fingerprint)
    told = evaluate(predictor, small)["calibration"]
    sharp = probabilities**2 / (probabilities**2).sum(1, keepdims=True)
    labels = small.test.labels.numpy()
    assert told["ece"] == pytest.approx(expected_calibration_error(probabilities, labels), abs=1e-6)
    assert told["ece_before"] == pytest.approx(expected_calibration_error(sharp, labels), abs=1e-6)
    assert told["loss_before"] == pytest.approx(-np.log(sharp[np.arange(100), labels]).mean(), rel=1e-5)
    assert sum(each["count"] for each in told["bins"]) == sum(each["count"] for each in told["bins_before"]) == 100
    assert "without the temperature" in report(evaluate(predictor, small))


def test_a_server_which_tells_no_logits_is_not_said_to_have_any(small, probabilities):
    predictor = dataclasses.replace(answers(small, [*probabilities, *probabilities]), tells_logits=False)
    result = evaluate(predictor, small)
    assert result["calibration"]["ece_before"] is result["calibration"]["loss_before"] is None
    assert "without the temperature" not in report(result)


def test_the_most_confident_mistakes_come_first_by_index(small, probabilities):
    mistakes = evaluate_fixed(small, probabilities)["confident_mistakes"]
    assert [each["index"] for each in mistakes] == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    first, label = mistakes[0], int(small.test.labels[90])
    assert (first["label"], first["predicted"]) == (small.classes[label], small.classes[(label + 1) % 10])
    assert first["probability"] == pytest.approx(probabilities[90].max())


def test_the_interval_is_wilsons():
    # (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), with z = 1.959964
    p, n, z = 0.8196, 10_000, 1.959963984540054
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    expected = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    assert wilson_interval(8196, 10_000) == pytest.approx(expected, abs=1e-9)
    assert wilson_interval(10, 10)[1] == 1.0


def test_a_model_of_other_classes_is_refused(small):
    model = dataclasses.replace(answers(small, []), classes=("cat", "dog"))
    with pytest.raises(EvaluationError, match="knows the classes cat, dog, but synthetic, 300 images holds disc, ring"):
        evaluate(model, small)
    shuffled = dataclasses.replace(answers(small, []), classes=tuple(reversed(small.classes)))
    with pytest.raises(EvaluationError, match="knows the classes dots"):
        evaluate(shuffled, small)


@pytest.fixture
def checkpoint(small):
    torch.manual_seed(0)
    return {
        "model": DeepConvNet().state_dict(),
        "recipe": dataclasses.asdict(RECIPES["deep"]),
        "seed": 0,
        "epoch": 25,
        "classes": list(small.classes),
        "data": {"kind": "synthetic", "name": small.name, "fingerprint": small.fingerprint},
        "validation_accuracy": 0.1,
    }


def test_the_validation_split_is_what_was_held_out(small, checkpoint):
    predictor = torch_predictor(checkpoint, CPU)
    _, held_out = split(300)
    result = evaluate(predictor, small, "validation")
    logits, _ = predict_all(predictor, small.train.images[held_out].numpy())
    assert result["images"] == len(held_out) == 30
    assert result["correct"] == int((torch.from_numpy(logits).argmax(1) == small.train.labels[held_out]).sum())
    assert {each["index"] for each in result["confident_mistakes"]} <= set(held_out.tolist())


def test_a_checkpoint_gives_the_softmax_of_the_networks_logits(small, checkpoint):
    model = DeepConvNet()
    model.load_state_dict(checkpoint["model"])
    with torch.inference_mode():
        expected = model.eval()(small.test.images)
    logits, probabilities = predict_all(torch_predictor(checkpoint, CPU), small.test.images.numpy())
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(probabilities, torch.softmax(expected, 1), atol=1e-6)


def test_weights_that_do_not_go_with_the_recipe_are_refused(checkpoint):
    checkpoint["recipe"]["model"] = "baseline"
    with pytest.raises(EvaluationError, match="do not go with its recipe"):
        torch_predictor(checkpoint, CPU)


def test_data_that_it_was_not_trained_on_is_said(small, checkpoint):
    checkpoint["data"]["fingerprint"] = "other"
    result = evaluate(torch_predictor(checkpoint, CPU), small)
    assert result["data"]["trained_on_it"] is False
    assert "not the data that it was trained on" in report(result)


def foreign_graph(path):
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), path)


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    foreign_graph(tmp_path / "foreign.onnx")
    (tmp_path / "empty").mkdir()
    for name, error, message in (
        ("missing.onnx", EvaluationError, "no such file; export one with"),
        ("garbage.onnx", EvaluationError, "cannot be read as an ONNX file"),
        ("foreign.onnx", EvaluationError, "not a graph of this project"),
        ("empty", RunError, "no such checkpoint"),
        ("missing.pt", RunError, "no such checkpoint"),
    ):
        with pytest.raises(error, match=message):
            load_predictor(tmp_path / name, CPU)


def test_the_command_prints_the_report_and_writes_all_of_it_as_json(command, small, checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "model.pt")
    done = command(
        "cifar_core.evaluate",
        "--model",
        "model.pt",
        "--data",
        "synthetic:300",
        "--json",
        tmp_path / "out" / "result.json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert f"{result['accuracy']:.2%} (95 % interval" in done.stdout
    assert result["correct"] == evaluate(torch_predictor(checkpoint, CPU), small)["correct"]
    for name in small.classes:
        assert f"\n{name} " in done.stdout
