"""Comparing the forms of a model: torch with the exported graph, and fp32 with int8."""

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from cifar_core.calibration import Calibration
from cifar_core.data import Dataset
from cifar_core.errors import CifarError
from cifar_core.evaluate import choose_split
from cifar_core.manifest import Parity
from cifar_core.predictors import Floats, Predictor, UInt8, predict_all

logger = logging.getLogger(__name__)

PARITY_IMAGES = 1000
"""Number of images on which the graph is compared with torch; all training images if there are fewer."""
PARITY_BATCHES = (1, 7, 256)
PARITY_LIMIT = 1e-5
"""Largest allowed difference of a probability between onnxruntime and torch."""
INT8_LIMIT = 0.01
"""Largest allowed loss of validation accuracy by int8."""
INT8_IMAGES = 2
"""A loss of this many images is always allowed, because small validation sets are too coarse for `INT8_LIMIT`."""


class ParityError(CifarError):
    """An exported graph differs too much from the model that it was made from."""


@dataclass(frozen=True)
class Comparison:
    """Images on which torch and the graphs are compared, with torch's logits.

    Attributes:
        images: uint8 [N, 32, 32, 3], each once: all validation images, then images that were trained on if there are
            fewer than `PARITY_IMAGES`.
        labels: int64 [V], of the validation images, which are the first V images.
        logits: float32 [N, classes], as torch computes them.
    """

    images: UInt8
    labels: npt.NDArray[np.int64]
    logits: Floats

    @property
    def validation_logits(self) -> Floats:
        """Torch's logits of the validation images, float32 [V, classes]."""
        return self.logits[: len(self.labels)]

    def correct(self, logits: Floats) -> int:
        """Number of validation images that these logits classify correctly."""
        return int((logits[: len(self.labels)].argmax(1) == self.labels).sum())


def compare_on(reference: Predictor, dataset: Dataset) -> Comparison:
    """Chooses the images, and computes the logits of torch once for everything that needs them."""
    held_out, indices = choose_split(reference, dataset, "validation")
    missing = max(0, PARITY_IMAGES - len(held_out))
    others = np.setdiff1d(np.arange(len(dataset.train)), indices)[:missing]
    images = np.concatenate([held_out.images.numpy(), dataset.train.images[others].numpy()])
    logits, _ = predict_all(reference, images)
    return Comparison(images, held_out.labels.numpy(), logits)


def measure_parity(comparison: Comparison, exported: Predictor, calibration: Calibration) -> tuple[Parity, Floats]:
    """Compares an exported graph with torch on `PARITY_IMAGES` images, in batches of 1, 7 and 256.

    Args:
        comparison: images and torch's logits.
        exported: the graph.
        calibration: the calibration of the graph.

    Returns:
        The measured differences, and the graph's logits of all images of the comparison, computed in batches of 256.

    Raises:
        ParityError: A probability differs by more than `PARITY_LIMIT`, or the class of any image differs.
    """
    all_logits, all_probabilities = predict_all(exported, comparison.images, PARITY_BATCHES[-1])
    images, expected_logits = comparison.images[:PARITY_IMAGES], comparison.logits[:PARITY_IMAGES]
    outputs = [predict_all(exported, images, size) for size in PARITY_BATCHES[:-1]]
    outputs.append((all_logits[:PARITY_IMAGES], all_probabilities[:PARITY_IMAGES]))
    # Also without the calibration: a small scale makes all classes nearly equal and would hide a difference.
    expected, expected_before = calibration.probabilities(expected_logits), softmax(expected_logits, axis=1)
    difference, logit_difference = 0.0, 0.0
    other_class = np.zeros(len(images), bool)
    for logits, probabilities in outputs:
        # NumPy's maximum of values with NaN is NaN, which is refused below; Python's may be another value.
        differences = (
            difference,
            np.abs(probabilities - expected).max(),
            np.abs(softmax(logits, axis=1) - expected_before).max(),
        )
        difference = float(np.max(differences))
        logit_difference = max(logit_difference, float(np.abs(logits - expected_logits).max()))
        other_class |= probabilities.argmax(1) != expected_logits.argmax(1)
    differing = int(other_class.sum())
    if not difference < PARITY_LIMIT or differing:
        raise ParityError(
            f"the exported graph differs from torch: probabilities by up to {difference:.1e} (limit "
            f"{PARITY_LIMIT:.0e}), the class of {differing} images (limit 0); nothing was exported; "
            "try the versions of torch, onnx and onnxruntime in constraints.txt, which were tested"
        )
    parity = Parity(
        images=len(images),
        batch_sizes=PARITY_BATCHES,
        max_abs_difference_of_probabilities=difference,
        max_abs_difference_of_logits=logit_difference,
        differing_classes=differing,
    )
    return parity, all_logits


def check_int8(comparison: Comparison, fp32_logits: Floats, int8: Predictor) -> Floats:
    """Compares int8 with fp32 on the validation images. Returns int8's logits of them, float32 [V, classes].

    Raises:
        ParityError: int8 classifies too few images correctly.
    """
    count = len(comparison.labels)
    int8_logits, _ = predict_all(int8, comparison.images[:count])
    before, after = comparison.correct(fp32_logits), comparison.correct(int8_logits)
    if before - after > max(INT8_IMAGES, INT8_LIMIT * count):
        raise ParityError(
            f"int8 classifies {after} of {count} validation images correctly, fp32 {before} (allowed loss: "
            f"{INT8_LIMIT:.0%}, or {INT8_IMAGES} images); nothing was exported; train the run longer, or export "
            "another run"
        )
    if before - after > INT8_LIMIT * count:
        logger.warning(
            "int8 classifies %d of %d validation images correctly, fp32 %d: it loses more than %.0f %%, which is "
            "allowed because so few images cannot tell a loss from chance; compare both on more images",
            after,
            count,
            before,
            100 * INT8_LIMIT,
        )
    return int8_logits
