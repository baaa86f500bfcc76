"""Which images are trained on, and in which order: the split and the study's two samplers."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import SubsetRandomSampler, WeightedRandomSampler

from cifar_core.data.errors import OTHER_DATA, DataError

SMALLEST_TRAINING_SET = 20
"""Number of images below which no validation images can be held out."""


def split(count: int, validation_images: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Splits the training images into images to train on and images held out for validation.

    CIFAR-10's 50,000 training images become 49,000 and 1,000.

    Args:
        count: number of training images, at least 20.
        validation_images: number of images to hold out. At most a tenth of `count` is held out, so that small data
            sets can be trained on too.
        seed: selects the images; the same seed gives the same split on every machine and with every library version.

    Returns:
        Indices of the images to train on and indices of the validation images, int64, each in ascending order.

    Raises:
        DataError: There are fewer than 20 images.
    """
    if count < SMALLEST_TRAINING_SET:
        raise DataError(
            f"there are {count} training images; at least {SMALLEST_TRAINING_SET} are needed, so that some can be held "
            f"out for validation; add images{OTHER_DATA}"
        )
    # numpy promises that this random stream never changes (NEP 19); torch and numpy's Generator do not.
    order = np.random.RandomState(seed).permutation(count).astype(np.int64)
    held_out = min(validation_images, count // 10)
    return torch.from_numpy(np.sort(order[held_out:])), torch.from_numpy(np.sort(order[:held_out]))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The random generator of one epoch.

    It depends only on seed and epoch, so a resumed run draws the same batches as an uninterrupted one.
    """
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def weighted_sampler(indices: Tensor, count: int, generator: torch.Generator) -> WeightedRandomSampler:
    """The study's first sampler: draws each of `indices` once, in random order, with equal weights.

    Args:
        indices: int64, the images to draw; all other images have weight 0.
        count: number of images in the set that `indices` refers to.
        generator: determines the order.
    """
    weights = torch.zeros(count, dtype=torch.float64)
    weights[indices] = 1.0
    # torch annotates the weights as a list, but accepts everything that as_tensor accepts.
    return WeightedRandomSampler(weights, len(indices), replacement=False, generator=generator)  # type: ignore[arg-type]


def subset_sampler(indices: Tensor, generator: torch.Generator) -> SubsetRandomSampler:
    """The study's second sampler: draws each of `indices` once, in random order."""
    return SubsetRandomSampler(indices.tolist(), generator=generator)
