"""Calibration of probabilities: the temperature, the expected calibration error, and the data of reliability diagrams.

Works on arrays of logits and probabilities only.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]

BINS = 15
"""Number of bins of equal width, the usual choice for the calibration error (Guo et al. 2017)."""
_TEMPERATURE_RANGE = (0.05, 20.0)


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence, which is the greatest probability, lies in one interval.

    Attributes:
        count: number of predictions.
        confidence: their mean confidence.
        accuracy: share of correct predictions, 0 to 1.
    """

    count: int
    confidence: float
    accuracy: float


def reliability(probabilities: Floats, labels: Integers) -> list[Bin]:
    """Groups predictions by confidence into `BINS` intervals of equal width; empty intervals are left out.

    Args:
        probabilities: [N, classes].
        labels: [N].
    """
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    # An interval includes its upper end, as in the paper.
    bin_numbers = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        Bin(int(inside.sum()), float(confidence[inside].mean()), float(correct[inside].mean()))
        for inside in (bin_numbers == number for number in range(BINS))
        if inside.any()
    ]


def expected_calibration_error(probabilities: Floats, labels: Integers) -> float:
    """The mean difference between confidence and accuracy over the bins, weighted by their counts; 0 is perfect.

    Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), equation 3.

    Args:
        probabilities: [N, classes].
        labels: [N].
    """
    bins = reliability(probabilities, labels)
    return sum(group.count * abs(group.confidence - group.accuracy) for group in bins) / len(labels)


def negative_log_likelihood(logits: Floats, labels: Integers, temperature: float = 1.0) -> float:
    """The mean cross-entropy of softmax(logits / temperature), in nats.

    Args:
        logits: [N, classes].
        labels: [N].
        temperature: above 0.
    """
    log_probabilities = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: Floats, labels: Integers) -> float:
    """The temperature with the least cross-entropy. Above 1 it makes probabilities less confident, below 1 more.

    Dividing the logits by it changes no predicted class (Guo et al. 2017, section 4.2). It is limited to 0.05 to 20,
    because it would approach 0 if all predictions were correct.

    Args:
        logits: [N, classes], of images that were not trained on.
        labels: [N].
    """
    # The search is over the logarithm of the temperature, where the loss also has a single minimum.
    found = minimize_scalar(
        lambda x: negative_log_likelihood(logits, labels, float(np.exp(x))),
        bounds=(math.log(_TEMPERATURE_RANGE[0]), math.log(_TEMPERATURE_RANGE[1])),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))
