"""A data loader for images that are in memory already."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from cifar_core.data.datasets import Images


class Batches:
    """Iterates over the batches of one epoch; each batch is one indexing operation, on the device of the images.

    Yields images, uint8 [B, H, W, 3], and labels, int64 [B], in the order of the sampler. The last batch can be smaller
    than the others.

    Args:
        data: images and labels, on any device.
        order: indices into `data`: a sampler of torch or an int64 tensor.
        batch_size: images per batch, at least 1.
        start: number of batches to skip, for a run that resumes within an epoch.
        augment: returns the augmented images for given indices (int64 [B]); None yields the images unchanged.
    """

    def __init__(
        self,
        data: Images,
        order: Sampler[int] | Tensor,
        batch_size: int,
        start: int = 0,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
        self.data = data
        self.order = order
        self.batch_size = batch_size
        self.start = start
        self.augment = augment or data.images.__getitem__

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size) - self.start  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order if isinstance(self.order, Tensor) else torch.tensor(list(self.order))
        order = order.to(self.data.labels.device)
        for first in range(self.start * self.batch_size, len(order), self.batch_size):
            indices = order[first : first + self.batch_size]
            yield self.augment(indices), self.data.labels[indices]
