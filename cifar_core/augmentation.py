"""Flips, translations and cutout on whole batches, and the images in other sizes.

What is drawn depends on seed and epoch alone, so that a resumed run sees the same images as one never interrupted.
Knows neither models nor training.
"""

import torch
from torch import Tensor, nn

from cifar_core.data import epoch_generator

_DRAWS = 1_000_003
"""Added to the epoch, so that what is drawn here has nothing to do with the order of the images."""


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 [N, H, W, C] → uint8 [N, size, size, C], with antialiasing."""
    if images.shape[1] == size:
        return images
    small = nn.functional.interpolate(images.permute(0, 3, 1, 2), size=(size, size), mode="bilinear", antialias=True)
    return small.permute(0, 2, 3, 1).contiguous()


class Augmentation:
    """Augments the images of one training set, batch by batch.

    Alternating flip after Jordan 2024 (arXiv 2404.00498): an image is mirrored in every other epoch, from a random
    one on, so that two epochs see all images both ways, where random flips show a quarter of them twice the same way.
    Cutout after DeVries and Taylor 2017 (arXiv 1708.04552).

    Args:
        images: uint8 [N, H, W, 3]; kept padded by reflection, on their device.
        seed: of all that is drawn.
        flip: `none`, `random` or `alternating`.
        translate: the most that an image is moved, in pixels, in each direction.
        cutout: side of the square that is set to grey, in pixels; 0 for none.
    """

    def __init__(self, images: Tensor, seed: int, flip: str, translate: int, cutout: int) -> None:
        self.seed, self.flip, self.translate, self.cutout = seed, flip, translate, cutout
        count, height, width, channels = images.shape
        self.size = (height, width)
        if translate:
            # Reflection does not know uint8; rows and columns are repeated by index instead.
            rows, columns = (_reflected(side, translate).to(images.device) for side in (height, width))
            images = images[:, rows][:, :, columns].contiguous()
        self.padded = images
        moves = 2 * translate + 1
        image, row, column, channel = images.stride()
        # Every image at every place, as a view; a batch is one gather.
        self._windows = images.as_strided(
            (count, moves, moves, height, width, channels), (image, row, column, row, column, channel)
        )
        self._first = torch.rand(count, generator=epoch_generator(seed, _DRAWS - 1)) < 0.5

    def start_epoch(self, epoch: int) -> None:
        """Draws for an epoch, counted from 0."""
        count, generator = len(self._windows), epoch_generator(self.seed, _DRAWS + epoch)
        device = self.padded.device
        moves = torch.randint(0, 2 * self.translate + 1, (2, count), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        if self.flip == "alternating":
            mirrored = self._first ^ bool(epoch % 2)
        elif self.flip == "none":
            mirrored = torch.zeros(count, dtype=torch.bool)
        centres = torch.rand((2, count), generator=generator)
        self._moves, self._mirrored, self._centres = moves.to(device), mirrored.to(device), centres.to(device)

    def batch(self, indices: Tensor) -> Tensor:
        """The augmented images of these indices, uint8 [B, H, W, 3]."""
        images = self._windows[indices, self._moves[0, indices], self._moves[1, indices]]
        mirrored = self._mirrored[indices].view(-1, 1, 1, 1)
        if self.flip != "none":
            images = torch.where(mirrored, images.flip(2), images)
        if self.cutout:
            images = images.masked_fill(self._squares(indices), 128)
        return images

    def _squares(self, indices: Tensor) -> Tensor:
        """Where each image is cut out: bool [B, H, W, 1]."""
        inside = []
        for axis, side in enumerate(self.size):
            centre = (self._centres[axis, indices] * side).floor().view(-1, 1)
            place = torch.arange(side, device=centre.device) - centre
            inside.append((place >= -(self.cutout // 2)) & (place < self.cutout - self.cutout // 2))
        return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(3)


def _reflected(side: int, padding: int) -> Tensor:
    """Indices of a side of that length with `padding` reflected ones before and behind."""
    return (torch.arange(-padding, side + padding).abs() - (side - 1)).abs().neg() + (side - 1)
