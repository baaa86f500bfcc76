"""Flips, translations, cutout, and changes of brightness and contrast for whole batches, and resizing.

The random choices depend only on seed and epoch, so a resumed run sees the same images as an uninterrupted one.
"""

import torch
from torch import Tensor, nn

from cifar_core.data.sampling import epoch_generator

_EPOCH_OFFSET = 1_000_003
"""Added to the epoch, so that augmentation and the order of the images draw from different random streams."""
_GREY = 128


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [N, H, W, C] -> uint8 [N, size, size, C], antialiased. Returns `images` itself if they have that size.

    Computed on the CPU, because torch cannot do this for uint8 on CUDA; the pixels are thus the same on every device.
    """
    if images.shape[1] == size:
        return images
    planes = images.permute(0, 3, 1, 2).cpu()
    small = nn.functional.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    return small.permute(0, 2, 3, 1).contiguous().to(images.device)


class Augmentation:
    """Augments the images of a training set, batch by batch.

    Alternating flip, after Jordan 2024 (arXiv 2404.00498): each image is mirrored in every other epoch, starting at
    random with the first or the second. Two epochs therefore show all images both ways, whereas random flips show half
    of them twice the same way. Cutout after DeVries and Taylor 2017 (arXiv 1708.04552).

    Args:
        images: uint8 [N, H, W, 3]. A copy padded by reflection is kept on the same device.
        seed: seed of all random choices.
        flip: `none`, `random` or `alternating`.
        translate: largest shift of an image in each direction, in pixels.
        cutout: side of the square that is set to grey, in pixels; 0 for none.
        brightness: largest change of all pixels of an image, as a share of 255.
        contrast: largest change of the distances of the pixels of an image from grey, as a share.
    """

    def __init__(
        self,
        images: Tensor,
        seed: int,
        flip: str,
        translate: int,
        cutout: int,
        brightness: float = 0.0,
        contrast: float = 0.0,
    ) -> None:
        self.seed, self.flip, self.translate, self.cutout = seed, flip, translate, cutout
        self.brightness, self.contrast = brightness, contrast
        count, height, width, channels = images.shape
        self.size = (height, width)
        if translate:
            # torch cannot pad uint8 by reflection, so rows and columns are repeated by index.
            rows, columns = (_reflected_indices(side, translate).to(images.device) for side in (height, width))
            images = images[:, rows][:, :, columns].contiguous()
        self.padded = images
        shifts = 2 * translate + 1
        image, row, column, channel = images.stride()
        # A view of every image at every shift: [N, shifts, shifts, H, W, C]. A batch is one indexing operation on it.
        self._windows = images.as_strided(
            (count, shifts, shifts, height, width, channels), (image, row, column, row, column, channel)
        )
        self._mirrored_first = torch.rand(count, generator=epoch_generator(seed, _EPOCH_OFFSET - 1)) < 0.5

    def start_epoch(self, epoch: int) -> None:
        """Makes the random choices for an epoch. Epochs count from 0."""
        count, generator = len(self._windows), epoch_generator(self.seed, _EPOCH_OFFSET + epoch)
        device = self.padded.device
        shifts = torch.randint(0, 2 * self.translate + 1, (2, count), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        if self.flip == "alternating":
            mirrored = self._mirrored_first ^ bool(epoch % 2)
        elif self.flip == "none":
            mirrored = torch.zeros(count, dtype=torch.bool)
        centres = torch.rand((2, count), generator=generator)
        self._shifts, self._mirrored, self._centres = shifts.to(device), mirrored.to(device), centres.to(device)
        self._jitter = (2 * torch.rand((2, count), generator=generator) - 1).to(device)

    def batch(self, indices: Tensor) -> Tensor:
        """The augmented images at these indices, uint8 [B, H, W, 3]."""
        images = self._windows[indices, self._shifts[0, indices], self._shifts[1, indices]]
        mirrored = self._mirrored[indices].view(-1, 1, 1, 1)
        if self.flip != "none":
            images = torch.where(mirrored, images.flip(2), images)
        if self.brightness or self.contrast:
            shift, scale = self._jitter[:, indices].view(2, -1, 1, 1, 1)
            changed = (images - float(_GREY)) * (1 + self.contrast * scale) + _GREY + 255 * self.brightness * shift
            images = changed.round().clamp(0, 255).to(torch.uint8)
        if self.cutout:
            images = images.masked_fill(self._cutout_mask(indices), _GREY)
        return images

    def is_mirrored(self, indices: Tensor) -> Tensor:
        """Whether the images at these indices are mirrored in the present epoch, bool [B]."""
        return self._mirrored[indices]

    def _cutout_mask(self, indices: Tensor) -> Tensor:
        """True within the square of each image: bool [B, H, W, 1]."""
        inside = []
        for axis, side in enumerate(self.size):
            centre = (self._centres[axis, indices] * side).floor().view(-1, 1)
            offset = torch.arange(side, device=centre.device) - centre
            inside.append((offset >= -(self.cutout // 2)) & (offset < self.cutout - self.cutout // 2))
        return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(3)


def _reflected_indices(side: int, padding: int) -> Tensor:
    """The indices 0 to `side` - 1 with `padding` reflected indices before and after them."""
    return (torch.arange(-padding, side + padding).abs() - (side - 1)).abs().neg() + (side - 1)
