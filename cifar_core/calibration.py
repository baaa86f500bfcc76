"""Calibration of probabilities: scales for the logits of each image, and measures of calibration.

One temperature multiplies the logits of all images by the same number, which cannot correct a network whose confident
answers are underconfident and whose doubtful answers are overconfident, as label smoothing leaves them. Here the scale
of an image is softplus(polynomial of x), where x measures how sure the network is: the gap between the two largest
logits, or the logarithm of the entropy.

One scale for all classes decides both how far the largest logit is above the second and how much the other classes
get, and networks that learned from a teacher need different answers. So there are forms with two scales, measured from
the second largest logit: one for the largest, one for the rest. Scales are positive, so the class of no image changes.
Works on arrays of logits and probabilities only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, minimize_scalar
from scipy.special import entr, log_softmax, logsumexp, softmax

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer]

BINS = 15
"""Number of bins, the usual choice for the calibration error (Guo et al. 2017)."""
SCALE_RANGE = (0.05, 20.0)
"""Limits of the scale. Without them it would grow without limit if all predictions were correct."""
ENTROPY_FLOOR = 1e-6
"""Added to the entropy, in nats, before the logarithm."""


@dataclass(frozen=True)
class Form:
    """A form of calibration.

    Attributes:
        measure: x, `gap` or `log-entropy`.
        degree: degree of the polynomial of the scale; with two scales, of that of the largest logit.
        rest_degree: degree of the polynomial of the scale of the rest; None if there is one scale for all.
    """

    measure: str
    degree: int
    rest_degree: int | None = None

    @property
    def coefficients(self) -> int:
        """Number of coefficients."""
        return self.degree + 1 + (0 if self.rest_degree is None else self.rest_degree + 1)


FORMS = {
    "temperature": Form("gap", 0),
    "gap": Form("gap", 1),
    "log-entropy": Form("log-entropy", 1),
    "gap-quadratic": Form("gap", 2),
    "log-entropy-quadratic": Form("log-entropy", 2),
    "two-scales": Form("gap", 1, 0),
    "two-scales-quadratic": Form("gap", 2, 0),
    "two-scales-linear-rest": Form("gap", 1, 1),
    "two-scales-quadratic-linear-rest": Form("gap", 2, 1),
}
"""The forms by name, those with fewer coefficients first."""
FOLDS = 5
"""Number of parts in the cross-validation that chooses the form."""
SMALLEST_SAMPLE = 200
"""Number of images below which only a cautious temperature is fitted."""
SMALLEST_FIT = 20
"""Number of images below which nothing is fitted: the scale is 1."""
PRIOR_DEVIATION = 0.5
"""Standard deviation of the logarithm of the scale that a cautious temperature assumes: in two of three cases, scales
lie between 0.6 and 1.65. Without it, 30 images often give a scale at one of its limits; with 200, it changes little."""
RESAMPLES = 1000
"""Number of samples of a bootstrap."""


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


@dataclass(frozen=True)
class Calibration:
    """Scales for the logits of each image.

    Attributes:
        form: a key of `FORMS`; `temperature` has one coefficient, and its scale is 1 / temperature.
        coefficients: the coefficients of the polynomial, the constant first; with two scales, those of the largest
            logit's and then those of the rest's.
    """

    form: str
    coefficients: tuple[float, ...]

    def polynomials(self) -> list[Doubles]:
        """The coefficients of each scale."""
        return _polynomials(self.form, np.asarray(self.coefficients))

    def scaled(self, logits: Floats) -> Doubles:
        """The scaled logits, float64 [N, classes], for logits [N, classes]."""
        measure = _measure(FORMS[self.form].measure, logits)
        return _scaled([_scale(polynomial, measure) for polynomial in self.polynomials()], _parts(self.form, logits))

    def probabilities(self, logits: Floats) -> Doubles:
        """The softmax of the scaled logits, float64 [N, classes]."""
        return np.asarray(softmax(self.scaled(logits), axis=1))


UNCALIBRATED = Calibration("temperature", (float(np.log(np.expm1(1.0))),))
"""The scale 1: the probabilities are the softmax of the logits."""


def _measure(name: str, logits: Floats) -> Doubles:
    """How sure the network is of each image: float64 [N]."""
    logits = logits.astype(np.float64)
    if name == "log-entropy":
        return np.asarray(np.log(entr(softmax(logits, axis=1)).sum(1) + ENTROPY_FLOOR))
    largest = np.partition(logits, -2, axis=1)
    return np.asarray(largest[:, -1] - largest[:, -2])


def _parts(form: str, logits: Floats) -> list[Doubles]:
    """What each scale multiplies, float64 [N, classes]; the sum is logits that have the same softmax."""
    values: Doubles = logits.astype(np.float64)
    if FORMS[form].rest_degree is None:
        return [values]
    above_second = values - np.partition(values, -2, axis=1)[:, -2:-1]
    return [above_second.clip(min=0), above_second.clip(max=0)]


def _polynomials(form: str, coefficients: Doubles) -> list[Doubles]:
    """The coefficients of each scale, of those of all scales."""
    first = FORMS[form].degree + 1
    return [part for part in (coefficients[:first], coefficients[first:]) if len(part)]


def _scale(polynomial: Doubles, measure: Doubles) -> Doubles:
    value = np.polynomial.polynomial.polyval(measure, polynomial)
    return np.asarray(np.logaddexp(0, value).clip(*SCALE_RANGE))[:, None]


def _scaled(scales: Sequence[Doubles], parts: Sequence[Doubles]) -> Doubles:
    return np.asarray(sum(scale * part for scale, part in zip(scales, parts, strict=True)))


# Fitting


def fit(form: str, logits: Floats, labels: Integers) -> Calibration:
    """The calibration of one form with the least cross-entropy.

    Args:
        form: a key of `FORMS`.
        logits: [N, classes], of images that were not trained on.
        labels: [N].
    """
    measure, parts, rows = _measure(FORMS[form].measure, logits), _parts(form, logits), np.arange(len(labels))
    # The search is over polynomials of the standardised measure, so that all coefficients have a similar size.
    mean, deviation = float(measure.mean()), max(float(measure.std()), 1e-9)
    standardised = (measure - mean) / deviation

    def loss(coefficients: Doubles) -> float:
        scales = [_scale(polynomial, standardised) for polynomial in _polynomials(form, coefficients)]
        scaled = _scaled(scales, parts)
        return float((logsumexp(scaled, axis=1) - scaled[rows, labels]).mean())

    start = np.zeros(FORMS[form].coefficients)
    for view in _polynomials(form, start):
        view[0] = 0.5  # every scale starts as a constant
    best = minimize(loss, start, method="BFGS", options={"gtol": 1e-6})
    line = np.polynomial.Polynomial([-mean / deviation, 1 / deviation])
    coefficients: list[float] = []
    for standard in _polynomials(form, best.x):
        found = np.atleast_1d(np.polynomial.Polynomial(standard)(line).coef)
        coefficients += [float(value) for value in found] + [0.0] * (len(standard) - len(found))
    return Calibration(form, tuple(coefficients))


def choose_calibration(logits: Floats, labels: Integers) -> Calibration:
    """Chooses the form by cross-validation, and fits it to all images.

    Each image is scored by a calibration that was fitted without it. The form with the least cross-entropy is chosen. A
    form with more coefficients than another must be better by one standard error of the difference. For fewer than
    `SMALLEST_SAMPLE` images, it is `cautious_calibration`.

    Args:
        logits: [N, classes], of images that neither were trained on nor chose the weights.
        labels: [N].
    """
    if len(labels) < SMALLEST_SAMPLE:
        return cautious_calibration(logits, labels)
    folds = np.random.RandomState(0).permutation(len(labels)) % FOLDS
    losses = {form: np.empty(len(labels)) for form in FORMS}
    for fold in range(FOLDS):
        inside = folds == fold
        for form, scores in losses.items():
            fitted = fit(form, logits[~inside], labels[~inside])
            scores[inside] = _losses(fitted, logits[inside], labels[inside])
    chosen = "temperature"
    for form, scores in losses.items():
        gain = losses[chosen] - scores
        more = FORMS[form].coefficients > FORMS[chosen].coefficients
        error = float(gain.std(ddof=1)) / len(gain) ** 0.5 if more else 0.0
        if gain.mean() > error:
            chosen = form
    return fit(chosen, logits, labels)


def caution(images: int) -> str | None:
    """Why a calibration on this number of held-out images is cautious, as a note for the user; None if it is not."""
    if images >= SMALLEST_SAMPLE:
        return None
    way = (
        f"with {SMALLEST_SAMPLE} or more, the form of the calibration is chosen among several: train with a larger "
        "validation_images, of which a tenth of the training images is the limit, or add images"
    )
    if images < SMALLEST_FIT:
        return f"only {images} images are held out, too few to calibrate probabilities, which stay as they are; {way}"
    return f"only {images} images are held out, so the probabilities get one temperature, which is kept near 1; {way}"


def cautious_calibration(logits: Floats, labels: Integers) -> Calibration:
    """A temperature that is kept near 1, and is 1 for fewer than `SMALLEST_FIT` images.

    The logarithm of the scale has the prior N(0, `PRIOR_DEVIATION`): the scale maximises the posterior.

    Args:
        logits: [N, classes], of images that were not trained on.
        labels: [N].
    """
    if len(labels) < SMALLEST_FIT:
        return UNCALIBRATED
    values, rows = logits.astype(np.float64), np.arange(len(labels))

    def loss(logarithm: float) -> float:
        scaled = np.exp(logarithm) * values
        cross_entropy = (logsumexp(scaled, axis=1) - scaled[rows, labels]).sum()
        return float(cross_entropy + logarithm**2 / (2 * PRIOR_DEVIATION**2))

    least, greatest = (float(np.log(scale)) for scale in SCALE_RANGE)
    best = minimize_scalar(loss, bounds=(least, greatest), method="bounded")
    # The coefficient whose softplus is the scale.
    return Calibration("temperature", (float(np.log(np.expm1(np.exp(best.x)))),))


def _losses(calibration: Calibration, logits: Floats, labels: Integers) -> Doubles:
    return np.asarray(-log_softmax(calibration.scaled(logits), axis=1)[np.arange(len(labels)), labels])


# Measuring


def reliability(probabilities: Floats, labels: Integers, equal_mass: bool = False) -> list[Bin]:
    """Groups predictions by confidence into `BINS` bins; empty ones are left out.

    Args:
        probabilities: [N, classes].
        labels: [N].
        equal_mass: whether the bins hold equal numbers of predictions, instead of intervals of equal width.
    """
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    numbers = _bin_numbers(confidence, equal_mass)
    return [
        Bin(int(inside.sum()), float(confidence[inside].mean()), float(correct[inside].mean()))
        for inside in (numbers == number for number in range(BINS))
        if inside.any()
    ]


def _bin_numbers(confidence: Floats, equal_mass: bool) -> npt.NDArray[np.int64]:
    if equal_mass:
        numbers = np.empty(len(confidence), np.int64)
        numbers[np.argsort(confidence, kind="stable")] = np.arange(len(confidence)) * BINS // len(confidence)
        return numbers
    # An interval includes its upper end, as in the paper.
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def expected_calibration_error(probabilities: Floats, labels: Integers, equal_mass: bool = False) -> float:
    """The mean difference between confidence and accuracy over the bins, weighted by their counts; 0 is perfect.

    Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), equation 3. With bins of equal mass:
    Nguyen and O'Connor 2015 (arXiv 1508.05154).

    Args:
        probabilities: [N, classes].
        labels: [N].
        equal_mass: whether the bins hold equal numbers of predictions, instead of intervals of equal width.
    """
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    difference = confidence.astype(np.float64) - correct
    sums = np.bincount(_bin_numbers(confidence, equal_mass), weights=difference, minlength=BINS)
    return float(np.abs(sums).sum() / len(correct))


def calibration_interval(probabilities: Floats, labels: Integers, equal_mass: bool = False) -> tuple[float, float]:
    """A 95 % bootstrap interval of the expected calibration error: percentiles over samples with replacement.

    Args:
        probabilities: [N, classes].
        labels: [N].
        equal_mass: as in `expected_calibration_error`.
    """
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    # A sample in the order of confidence has the same bins of equal mass as all images in this order.
    order = np.argsort(confidence, kind="stable") if equal_mass else np.arange(len(correct))
    difference = (confidence.astype(np.float64) - correct)[order]
    numbers = _bin_numbers(confidence[order], equal_mass)
    random, count = np.random.RandomState(0), len(correct)
    errors = []
    for _ in range(RESAMPLES):
        times_drawn = np.bincount(random.randint(0, count, count), minlength=count)[order]
        drawn = np.repeat(difference, times_drawn) if equal_mass else difference * times_drawn
        errors.append(np.abs(np.bincount(numbers, weights=drawn, minlength=BINS)).sum() / count)
    low, high = np.percentile(errors, (2.5, 97.5))
    return float(low), float(high)


def negative_log_likelihood(logits: Floats, labels: Integers) -> float:
    """The mean cross-entropy of softmax(logits), in nats, for logits [N, classes] and labels [N]."""
    return float(-log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels].mean())
