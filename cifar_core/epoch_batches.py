"""The batches that a run trains on: their order, augmentation, and the teacher's answers to them."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from cifar_core.data import Augmentation, Batches, Images, epoch_generator, resize, subset_sampler, weighted_sampler
from cifar_core.pixels import IMAGE_SIZE
from cifar_core.recipe import Recipe


class EpochBatches:
    """Makes the batches of each epoch of a run. They depend on the recipe, the seed and the data alone.

    Args:
        recipe: what is trained.
        seed: seed of the order and of the augmentation.
        data: the images that training and validation images are taken from, on the device to train on.
        indices: indices of the images to train on, int64 [N], on the CPU.
        part: returns the part of a batch, given as indices, that this process trains on; None for whole batches.

    Attributes:
        teacher_logits: logits of the teacher for all images of `data` and for their mirror images, float32
            [2, len(data), classes]; None without a teacher.
        augmentation: changes the images of the current epoch; None if the recipe does not change them.
    """

    def __init__(
        self, recipe: Recipe, seed: int, data: Images, indices: Tensor, part: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._recipe, self._seed, self._data, self._indices, self._part = recipe, seed, data, indices, part
        self.teacher_logits: Tensor | None = None
        self.augmentation: Augmentation | None = None

    def remaining(self, epoch: int, step: int = 0) -> Iterable[tuple[Tensor, ...]]:
        """The batches of an epoch from one step on, in order.

        Each is the images, uint8 [B, H, W, 3], their labels, int64 [B], and the teacher's logits, float32 [B, classes],
        if there are any.

        Args:
            epoch: number of the epoch, counted from 0.
            step: number of the first batch, counted from 0.
        """
        generator = epoch_generator(self._seed, epoch)
        if self._recipe.sampler == "weighted":
            sampler = weighted_sampler(self._indices, len(self._data), generator)
        else:
            sampler = subset_sampler(self._indices, generator)  # type: ignore[assignment]
        data, even = self._data, self._recipe.batch_norm
        if self.teacher_logits is not None:
            data = Images(data.images, torch.arange(len(data), device=data.labels.device))
        batches = Batches(data, sampler, self._recipe.batch_size, step, self._augment(epoch), even, self._part)
        return batches if self.teacher_logits is None else self._with_teacher(batches, self.teacher_logits)

    def _with_teacher(self, batches: Batches, logits: Tensor) -> Iterator[tuple[Tensor, ...]]:
        for images, indices in batches:
            mirrored = self.augmentation.is_mirrored(indices) if self.augmentation else torch.zeros_like(indices)
            yield images, self._data.labels[indices], logits[mirrored.long(), indices]

    def _augment(self, epoch: int) -> Callable[[Tensor], Tensor] | None:
        """Returns the augmented images of an epoch by index; None if the recipe does not change them."""
        recipe = self._recipe
        size = recipe.image_size(epoch)
        unchanged = not (recipe.translate or recipe.cutout or recipe.brightness or recipe.contrast)
        if recipe.flip == "none" and unchanged and size == IMAGE_SIZE:
            self.augmentation = None
            return None
        if self.augmentation is None or self.augmentation.size != (size, size):
            scale = size / IMAGE_SIZE
            self.augmentation = Augmentation(
                resize(self._data.images, size),
                self._seed,
                recipe.flip,
                round(recipe.translate * scale),
                round(recipe.cutout * scale),
                recipe.brightness,
                recipe.contrast,
            )
        self.augmentation.start_epoch(epoch)
        return self.augmentation.batch
