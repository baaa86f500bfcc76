"""Probabilities that mean what they say: the temperature, the calibration error and what a reliability diagram shows.

Knows arrays of logits and probabilities, neither models nor files.
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
"""Of equal width, as the calibration error is commonly told (Guo et al. 2017)."""
_RANGE = (0.05, 20.0)


@dataclass(frozen=True)
class Bin:
    """Those answers whose confidence (the greatest probability) lies in an interval.

    Attributes:
        count: how many.
        confidence: their mean confidence.
        accuracy: the share of them that is right.
    """

    count: int
    confidence: float
    accuracy: float


def reliability(probabilities: Floats, labels: Integers) -> list[Bin]:
    """The answers by confidence, in `BINS` intervals of equal width; empty intervals are left out.

    Args:
        probabilities: [N, classes].
        labels: [N].
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    # An interval holds its upper end, as in the paper.
    places = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        Bin(int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean()))
        for inside in (places == place for place in range(BINS))
        if inside.any()
    ]


def expected_calibration_error(probabilities: Floats, labels: Integers) -> float:
    """The mean distance between confidence and accuracy over the bins, weighted by their counts; 0 is perfect.

    Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), equation 3.

    Args:
        probabilities: [N, classes].
        labels: [N].
    """
    bins = reliability(probabilities, labels)
    return sum(each.count * abs(each.confidence - each.accuracy) for each in bins) / len(labels)


def negative_log_likelihood(logits: Floats, labels: Integers, temperature: float = 1.0) -> float:
    """The mean cross-entropy, in nats, of softmax(logits / temperature).

    Args:
        logits: [N, classes].
        labels: [N].
        temperature: above 0.
    """
    logarithms = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return float(-logarithms[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: Floats, labels: Integers) -> float:
    """The temperature of the least cross-entropy: what is above 1 makes probabilities less certain, below 1 more.

    It changes no class (Guo et al. 2017, section 4.2). Between 0.05 and 20, so that images that are all right do not
    make it vanish.

    Args:
        logits: [N, classes], of images that were not trained on.
        labels: [N].
    """
    # Over the logarithm, in which the loss has a single minimum as well.
    found = minimize_scalar(
        lambda x: negative_log_likelihood(logits, labels, float(np.exp(x))),
        bounds=(math.log(_RANGE[0]), math.log(_RANGE[1])),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))
