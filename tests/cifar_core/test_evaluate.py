import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, log_loss

from cifar_core.calibration import Calibration, expected_calibration_error
from cifar_core.data import split
from cifar_core.device import CPU
from cifar_core.evaluate import (
    EvaluationError,
    choose_split,
    evaluate,
    main,
    manifest_scale,
    report,
    wilson_interval,
)
from cifar_core.predictors import Predictor, predict_all, torch_predictor


def answers(dataset, probabilities):
    """A model that returns these probabilities, row by row."""
    rows = iter(np.asarray(probabilities, np.float32))

    def predict(images):
        batch = np.stack([next(rows) for _ in images])
        return np.log(batch), batch

    return Predictor("fixed", dataset.classes, predict, (1000, 0), dataset.fingerprint)


def evaluate_fixed(dataset, probabilities):
    # The warm-up batch comes first.
    first = min(256, len(probabilities))
    return evaluate(answers(dataset, [*probabilities[:first], *probabilities]), dataset)


@pytest.fixture
def probabilities(small):
    """Nine of ten test images are classified correctly, each with a slightly higher confidence than the one before."""
    count, classes = len(small.test), len(small.classes)
    confidence = np.linspace(0.5, 0.9, count)
    values = np.repeat((1 - confidence)[:, None] / (classes - 1), classes, 1)
    predicted = small.test.labels.numpy().copy()
    predicted[::10] = (predicted[::10] + 1) % classes
    values[np.arange(count), predicted] = confidence
    return values


def test_every_measurement_is_that_of_the_predictions(small, probabilities):
    result = evaluate_fixed(small, probabilities)
    labels, predicted = small.test.labels.numpy(), probabilities.argmax(1)
    assert (result["images"], result["correct"], result["accuracy"]) == (100, 90, 0.9)
    assert result["loss"] == pytest.approx(-np.log(probabilities[np.arange(100), labels]).mean(), rel=1e-5)
    assert result["loss"] == pytest.approx(log_loss(labels, probabilities.astype(np.float64)), rel=1e-5)
    confusion = np.asarray(result["confusion"])
    assert confusion.tolist() == confusion_matrix(labels, predicted).tolist()
    for row, name in enumerate(small.classes):
        assert result["per_class"][name] == np.mean(predicted[labels == row] == row)
        assert confusion[row].tolist() == [int(((labels == row) & (predicted == column)).sum()) for column in range(10)]
    assert result["images_per_second"] > 0


def test_the_calibration_is_measured_with_and_without_the_calibration_of_the_graph(small, probabilities):
    overconfident = np.log(probabilities) * 2  # logits of an overconfident network, in a graph with temperature 2

    def predict(images):
        chosen = rows[: len(images)]
        return overconfident[chosen].astype(np.float32), probabilities[chosen].astype(np.float32)

    rows = np.arange(len(probabilities))
    predictor = Predictor("fixed", small.classes, predict, (1000, 0), small.fingerprint)
    measured = evaluate(predictor, small)["calibration"]
    sharp = probabilities**2 / (probabilities**2).sum(1, keepdims=True)
    labels = small.test.labels.numpy()
    assert measured["ece"] == pytest.approx(expected_calibration_error(probabilities, labels), abs=1e-6)
    assert measured["ece_before"] == pytest.approx(expected_calibration_error(sharp, labels), abs=1e-6)
    assert measured["loss_before"] == pytest.approx(-np.log(sharp[np.arange(100), labels]).mean(), rel=1e-5)
    assert sum(group["count"] for group in measured["bins"]) == 100
    assert sum(group["count"] for group in measured["bins_before"]) == 100
    assert "without the calibration" in report(evaluate(predictor, small))


def test_the_evaluation_of_a_server_has_no_measurements_that_need_logits(small, probabilities):
    predictor = dataclasses.replace(answers(small, [*probabilities, *probabilities]), has_logits=False)
    result = evaluate(predictor, small)
    assert result["calibration"]["ece_before"] is result["calibration"]["loss_before"] is None
    assert "without the calibration" not in report(result)


def test_the_ten_most_confident_mistakes_are_listed_the_most_confident_first(small, probabilities):
    mistakes = evaluate_fixed(small, probabilities)["confident_mistakes"]
    assert [mistake["index"] for mistake in mistakes] == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    first, label = mistakes[0], int(small.test.labels[90])
    assert (first["label"], first["predicted"]) == (small.classes[label], small.classes[(label + 1) % 10])
    assert first["probability"] == pytest.approx(probabilities[90].max())


def test_the_interval_is_that_of_wilson():
    # (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), with z = 1.959964
    p, n, z = 0.8196, 10_000, 1.959963984540054
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    expected = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    assert wilson_interval(8196, 10_000) == pytest.approx(expected, abs=1e-9)
    for correct, count in ((10, 10), (0, 7), (3, 200)):
        low, high = binomtest(correct, count).proportion_ci(0.95, method="wilson")
        assert wilson_interval(correct, count) == pytest.approx((low, high), abs=1e-12)


def test_a_model_with_other_classes_is_refused(small):
    model = dataclasses.replace(answers(small, []), classes=("cat", "dog"))
    with pytest.raises(EvaluationError, match="has the classes cat, dog, but synthetic, 300 images has disc, ring"):
        evaluate(model, small)
    shuffled = dataclasses.replace(answers(small, []), classes=tuple(reversed(small.classes)))
    with pytest.raises(EvaluationError, match="has the classes dots"):
        evaluate(shuffled, small)


def test_the_validation_split_consists_of_the_images_that_were_held_out(small, checkpoint):
    predictor = torch_predictor(checkpoint, CPU)
    _, held_out = split(300)
    result = evaluate(predictor, small, "validation")
    logits, _ = predict_all(predictor, small.train.images[held_out].numpy())
    assert result["images"] == len(held_out) == 30
    assert result["correct"] == int((torch.from_numpy(logits).argmax(1) == small.train.labels[held_out]).sum())
    assert {mistake["index"] for mistake in result["confident_mistakes"]} <= set(held_out.tolist())


def test_the_report_says_if_the_model_was_trained_on_other_data(small, checkpoint):
    checkpoint["data"]["fingerprint"] = "other"
    result = evaluate(torch_predictor(checkpoint, CPU), small)
    assert result["data"]["trained_on_it"] is False
    assert "not the data that the model was trained on" in report(result)


def test_the_command_prints_a_report_and_writes_all_measurements_as_json(command, small, checkpoint, tmp_path):
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


def test_a_model_that_does_not_know_its_split_cannot_be_evaluated_on_it(small):
    predictor = dataclasses.replace(answers(small, []), split=None)
    with pytest.raises(EvaluationError, match=r"does not say which images were held out .* use --split test"):
        choose_split(predictor, small, "validation")


def test_the_loss_of_a_confident_mistake_is_not_cut_off(small):
    logits = np.zeros((len(small.test), 10), np.float32)
    logits[:, 3] = 200  # float32 probabilities of the other classes are 0
    labels = small.test.labels.numpy()
    wrong = float((labels != 3).mean())
    probabilities = softmax(logits, axis=1)

    def predict(images):
        return logits[: len(images)], probabilities[: len(images)]

    checkpoint = Predictor("fixed", small.classes, predict, None, small.fingerprint, calibrated=False)
    result = evaluate(checkpoint, small)
    assert result["loss"] == pytest.approx(200 * wrong)
    assert "without the calibration" not in report(result)
    graph = dataclasses.replace(checkpoint, calibrated=True)
    assert evaluate(graph, small)["loss"] == pytest.approx(-np.log(np.finfo(np.float32).smallest_subnormal) * wrong)


def test_a_folder_that_cannot_be_made_is_an_error_before_the_evaluation(command, tmp_path):
    (tmp_path / "file").write_text("")
    done = command(
        "cifar_core.evaluate", "--model", tmp_path / "missing.onnx", "--data", "synthetic:60",
        "--json", tmp_path / "file/x/result.json",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'file/x'}: Not a directory; check the path and its permissions\n"


def test_a_file_that_cannot_be_written_is_an_error_before_the_evaluation(command, tmp_path):
    (tmp_path / "folder").mkdir()
    done = command(
        "cifar_core.evaluate", "--model", "missing.onnx", "--data", "synthetic:60", "--json", "folder"
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: folder cannot be written (it is a folder); name another file\n"


@pytest.mark.parametrize("option", ["--model", "--json"])
def test_an_empty_path_is_refused(monkeypatch, capsys, option):
    monkeypatch.setattr("sys.argv", ["evaluate", option, ""])
    with pytest.raises(SystemExit):
        main()
    assert f"argument {option}" in (said := capsys.readouterr().err)
    assert "it is empty" in said


def test_an_address_that_is_none_is_one_line(command):
    done = command("cifar_core.evaluate", "--model", "grpc://localhost:99999", "--data", "synthetic:60")
    assert done.returncode == 2
    assert done.stderr.startswith("error: grpc://localhost:99999 is not the address of a server: the port")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("images", "prior"), [(199, {"prior_deviation": 0.5}), (200, {}), (201, {})])
def test_the_manifest_says_which_prior_was_assumed_for_fewer_than_200_images(images, prior):
    scale = manifest_scale(Calibration("temperature", (0.25,)), images, True)
    expected = {"form": "temperature", "coefficients": (0.25,), "images": images, "chose_epoch": True}
    assert scale.model_dump(exclude_unset=True) == expected | prior
