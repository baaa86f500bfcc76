import numpy as np
import pytest
from sklearn.metrics import log_loss

from cifar_core.calibration import expected_calibration_error, fit_temperature, negative_log_likelihood, reliability


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 2, (20_000, 5))


@pytest.fixture
def labels(logits):
    """Labels drawn from the probabilities of the logits."""
    totals = softmax(logits).cumsum(1)
    return (np.random.default_rng(1).random((len(logits), 1)) > totals).sum(1).clip(0, 4)


def test_the_calibration_error_is_the_weighted_difference_of_confidence_and_accuracy():
    # Two predictions at 0.9, one of them correct; two at 0.6, both correct: |0.5 - 0.9| / 2 + |1 - 0.6| / 2.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.6, 0.4]])
    labels = np.array([0, 1, 1, 0])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.4)
    bins = reliability(probabilities, labels)
    assert [(group.count, group.confidence, group.accuracy) for group in bins] == [
        (2, pytest.approx(0.6), 1.0),
        (2, pytest.approx(0.9), 0.5),
    ]


def test_a_bin_includes_its_upper_end():
    probabilities = np.array([[10 / 15, 5 / 15], [10.01 / 15, 4.99 / 15]])
    assert [group.count for group in reliability(probabilities, np.array([0, 0]))] == [1, 1]
    assert reliability(np.array([[1.0, 0.0]]), np.array([0]))[0].confidence == 1.0


def test_the_probabilities_that_labels_were_drawn_from_are_calibrated(logits, labels):
    assert expected_calibration_error(softmax(logits), labels) < 0.015
    assert expected_calibration_error(softmax(3 * logits), labels) > 0.1


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_the_temperature_is_the_factor_by_which_logits_were_scaled(logits, labels, factor):
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.03)


def test_the_temperature_has_the_least_loss_and_changes_no_class(logits, labels):
    sharp = 3 * logits
    temperature = fit_temperature(sharp, labels)
    least = negative_log_likelihood(sharp, labels, temperature)
    assert all(least <= negative_log_likelihood(sharp, labels, temperature * factor) for factor in (0.9, 1.1, 1 / 3))
    assert (softmax(sharp / temperature).argmax(1) == sharp.argmax(1)).all()


def test_the_loss_is_that_of_scikit_learn(logits, labels):
    assert negative_log_likelihood(logits, labels) == pytest.approx(log_loss(labels, softmax(logits)))


def test_the_temperature_stays_above_zero_if_all_predictions_are_correct():
    logits = np.eye(4) * 9
    assert fit_temperature(logits, np.arange(4)) >= 0.049
