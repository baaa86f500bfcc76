"""The images that a run holds out must be new to the weights that it starts from, and to its teacher.

Otherwise its validation accuracy and its calibration would be those of images that have been trained on.
"""

import logging
from typing import NamedTuple

from cifar_core.data import Dataset, split
from cifar_core.recipe import Recipe

logger = logging.getLogger(__name__)


class TrainedOn(NamedTuple):
    """The images that a model was trained on.

    Attributes:
        fingerprint: of the data set.
        validation_images: how many of its training images were held out.
        split_seed: which of them; see `data.split`.
    """

    fingerprint: str
    validation_images: int
    split_seed: int


def reason_against(name: str, trained_on: TrainedOn | None, recipe: Recipe, dataset: Dataset) -> str | None:
    """Why a run must not start from a model, or learn from it: it was trained on images that the run holds out.

    If the model was trained on other data, which may contain the same images, a warning is logged.

    Args:
        name: name of the model.
        trained_on: what it was trained on; None if that is not known.
        recipe: recipe of the run.
        dataset: data of the run.

    Returns:
        The reason, with the way out; None if there is none.
    """
    if trained_on is None or trained_on.fingerprint != dataset.fingerprint:
        logger.warning(
            "whether %s was trained on images that this run holds out is not known, because %s; if it was, validation "
            "accuracy and calibration are too good",
            name,
            "it does not say what it was trained on" if trained_on is None else "its data was not the same",
        )
        return None
    count = len(dataset.train)
    ours = set(split(count, recipe.validation_images, recipe.split_seed)[1].tolist())
    theirs = set(split(count, trained_on.validation_images, trained_on.split_seed)[1].tolist())
    if ours <= theirs:
        return None
    return (
        f"{name} was trained on {len(ours - theirs):,} of the {len(ours):,} images that this run holds out, so "
        "validation accuracy and calibration would be wrong: hold out the same images, with "
        f"--set validation_images={trained_on.validation_images} --set split_seed={trained_on.split_seed}"
    )
