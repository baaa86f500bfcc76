"""A data loader for images that are in memory already."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from cifar_core.data.datasets import Images


def batch_sizes(count: int, batch_size: int, even: bool) -> list[int]:
    """The number of images of each batch of an epoch, all of `batch_size` but the last one.

    Args:
        count: number of images of an epoch.
        batch_size: largest size of a batch.
        even: whether all batches have the same size, up to one image. Batch normalisation needs that: a small last
            batch would make a large part of the statistics that validation uses.
    """
    batches = -(-count // batch_size)
    if even:
        return [count // batches + (number < count % batches) for number in range(batches)]
    return [min(batch_size, count - number * batch_size) for number in range(batches)]


class Batches:
    """Iterates over the batches of one epoch; each batch is one indexing operation, on the device of the images.

    Yields images, uint8 [B, H, W, 3], and labels, int64 [B], in the order of the sampler.

    Args:
        data: images and labels, on any device.
        order: indices into `data`: a sampler of torch or an int64 tensor.
        batch_size: images per batch, at least 1.
        start: number of batches to skip, for a run that resumes within an epoch.
        augment: returns the augmented images for given indices (int64 [B]); None yields the images unchanged.
        even: whether all batches have the same size, see `batch_sizes`.
        part: yields a part of each batch, given its indices; None yields whole batches.
    """

    def __init__(
        self,
        data: Images,
        order: Sampler[int] | Tensor,
        batch_size: int,
        start: int = 0,
        augment: Callable[[Tensor], Tensor] | None = None,
        even: bool = False,
        part: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
        self.data = data
        self.order = order
        self.sizes = batch_sizes(len(order), batch_size, even)  # type: ignore[arg-type]
        self.start = start
        self.augment = augment or data.images.__getitem__
        self.part = part

    def __len__(self) -> int:
        return len(self.sizes) - self.start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order if isinstance(self.order, Tensor) else torch.tensor(list(self.order))
        order = order.to(self.data.labels.device)
        for batch in torch.split(order, self.sizes)[self.start :]:
            indices = self.part(batch) if self.part else batch
            yield self.augment(indices), self.data.labels[indices]
