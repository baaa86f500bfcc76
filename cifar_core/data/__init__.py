"""Data sets as uint8 tensors in memory: CIFAR-10, folders of image files, generated images; split, samplers, batches.

`python -m cifar_core.data` prints a summary of a data set, compares its statistics with the published ones and writes
figure 1. This package must not depend on models or on training.
"""

from cifar_core.data.augmentation import Augmentation, resize
from cifar_core.data.batches import Batches, batch_sizes
from cifar_core.data.datasets import Dataset, Images, add_data_argument, load_dataset
from cifar_core.data.errors import DataError
from cifar_core.data.sampling import epoch_generator, split, subset_sampler, weighted_sampler
from cifar_core.data.statistics import channel_statistics, class_lines, summary

__all__ = [
    "Augmentation",
    "Batches",
    "DataError",
    "Dataset",
    "Images",
    "add_data_argument",
    "batch_sizes",
    "channel_statistics",
    "class_lines",
    "epoch_generator",
    "load_dataset",
    "resize",
    "split",
    "subset_sampler",
    "summary",
    "weighted_sampler",
]
