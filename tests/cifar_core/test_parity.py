import dataclasses
import logging

import numpy as np
import pytest

from cifar_core.calibration import Calibration
from cifar_core.data import load_dataset, split
from cifar_core.parity import PARITY_IMAGES, Comparison, ParityError, check_int8, compare_on, measure_parity
from cifar_core.predictors import Predictor


def constant(dataset, held_out):
    """A model that holds out this number of images and answers the same to all."""

    def predict(images):
        zeros = np.zeros((len(images), len(dataset.classes)), np.float32)
        return zeros, zeros

    return Predictor("constant", dataset.classes, predict, (held_out, 0), dataset.fingerprint)


def rows_of(dataset, images):
    """The number of each image in the training set. All images of the set are different."""
    numbers = {image.tobytes(): number for number, image in enumerate(dataset.train.images.numpy())}
    assert len(numbers) == len(dataset.train)
    return [numbers[image.tobytes()] for image in images]


@pytest.mark.parametrize(("data", "held_out"), [("synthetic:72", 7), ("synthetic:1200", 100)])
def test_each_image_is_compared_once_the_held_out_ones_first(data, held_out):
    dataset = load_dataset(data)
    comparison = compare_on(constant(dataset, held_out), dataset)
    rows = rows_of(dataset, comparison.images)
    assert rows[:held_out] == split(len(dataset.train), held_out)[1].tolist()
    assert len(rows) == len(set(rows)) == min(len(dataset.train), PARITY_IMAGES)
    assert len(comparison.labels) == held_out


def test_more_held_out_images_than_are_compared_are_all_kept_for_int8():
    dataset = load_dataset("synthetic:1200")
    enlarged = dataclasses.replace(
        dataset,
        train=dataclasses.replace(
            dataset.train,
            images=dataset.train.images.repeat(10, 1, 1, 1),
            labels=dataset.train.labels.repeat(10),
        ),
    )
    comparison = compare_on(constant(enlarged, 1100), enlarged)
    assert len(comparison.images) == len(comparison.labels) == 1100


def losing(images, count):
    """fp32 logits that classify all images correctly, and an int8 model that misclassifies this number."""
    labels = np.zeros(images, np.int64)
    fp32 = np.tile(np.float32([1, 0]), (images, 1))
    int8 = fp32.copy()
    int8[:count] = [0, 1]
    comparison = Comparison(np.zeros((images, 32, 32, 3), np.uint8), labels, fp32)
    rows = iter(int8)

    def predict(batch):
        logits = np.stack([next(rows) for _ in batch])
        return logits, logits

    return comparison, fp32, Predictor("int8", ("a", "b"), predict, None, "")


@pytest.mark.parametrize(
    ("images", "lost", "result"),
    [
        (30, 0, "silent"), (30, 1, "noted"), (30, 2, "noted"), (30, 3, "refused"), (200, 2, "silent"),
        (1000, 10, "silent"), (1000, 11, "refused"),
    ],
)  # fmt: skip
def test_int8_may_lose_one_percent_or_two_images_and_a_note_says_if_that_is_more(caplog, images, lost, result):
    caplog.set_level(logging.WARNING)
    comparison, fp32, int8 = losing(images, lost)
    if result == "refused":
        with pytest.raises(ParityError, match=r"allowed loss: 1%, or 2 images"):
            check_int8(comparison, fp32, int8)
    else:
        assert len(check_int8(comparison, fp32, int8)) == images
    assert ("it loses more than 1 %" in caplog.text) == (result == "noted")


def graph(logits, calibration):
    """Images that hold their own numbers, and a graph that answers with these logits."""
    images = np.zeros((len(logits), 32, 32, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(logits))

    def predict(batch):
        chosen = logits[batch[:, 0, 0, 0]]
        return chosen, calibration.probabilities(chosen).astype(np.float32)

    return images, Predictor("graph", ("a", "b"), predict, None, "")


@pytest.mark.parametrize(
    ("theirs", "scale", "message"),
    [
        ((1.0, 0.001), 1.0, r"probabilities by up to 2\.0e-04"),
        ((1.0, 0.001), 0.05, r"probabilities by up to 2\.0e-04"),  # the calibration would hide it
        ((1.0, 1.000002), 1.0, r"the class of 1 images \(limit 0\)"),
        ((np.nan, np.nan), 1.0, "probabilities by up to nan"),
    ],
)
def test_a_graph_with_other_probabilities_or_classes_is_refused(theirs, scale, message):
    calibration = Calibration("temperature", (float(np.log(np.expm1(scale))),))
    torch_logits = np.tile(np.float32([1.0, 0.0]), (20, 1))
    if theirs[1] > 0.5:
        torch_logits[4] = [1.000002, 1.0]
    labels = np.zeros(20, np.int64)
    images, same = graph(torch_logits, calibration)
    comparison = Comparison(images, labels, torch_logits)
    assert measure_parity(comparison, same, calibration)[0].images == 20
    changed = torch_logits.copy()
    changed[4] = theirs
    with pytest.raises(ParityError, match=message):
        measure_parity(comparison, graph(changed, calibration)[1], calibration)


@pytest.mark.parametrize("size", [1, 7, 256])
def test_a_graph_that_differs_in_batches_of_one_size_only_is_refused(size):
    calibration = Calibration("temperature", (float(np.log(np.expm1(1.0))),))
    torch_logits = np.tile(np.float32([1.0, 0.0]), (256, 1))
    images, same = graph(torch_logits, calibration)

    def predict(batch):
        logits, probabilities = same.predict(batch)
        return logits, probabilities[:, ::-1] if len(batch) == size else probabilities

    comparison = Comparison(images, np.zeros(256, np.int64), torch_logits)
    assert measure_parity(comparison, same, calibration)[0].batch_sizes == (1, 7, 256)
    with pytest.raises(ParityError, match=r"the class of \d+ images"):
        measure_parity(comparison, dataclasses.replace(same, predict=predict), calibration)
