"""Training on the hardest images of each batch, which a small network chooses.

Late in a long training most images are classified with confidence, and their gradients teach little. A small network,
trained alongside at about a tenth of the cost, finds the others. After the data filtering of airbench96_faster
(Jordan 2024); there the small network is trained beforehand.
"""

from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from cifar_core.models import WhitenedConvNet
from cifar_core.optimizers import make_optimizer, muon_dtype, set_learning_rate
from cifar_core.recipe import Recipe

WIDTHS = (32, 64, 64)
"""Channels of the groups of the small network."""
TRAINED_EVERY = 4
"""The small network is trained in every fourth step; in the others it only chooses."""
_FEWEST = 2
"""Batch normalisation needs two images."""


def trained_images(recipe: Recipe, batch: int) -> int:
    """How many images of a batch are trained on."""
    # 0.55 * 100 is a little more than 55 in floating point, and is 55 here.
    return min(batch, max(_FEWEST, ceil(round(recipe.hard_share * batch, 6))))


class HardImages:
    """Chooses the images of each batch for which a small network has the largest losses.

    Args:
        recipe: `hard_share`, and how the small network is trained: like the network of the run.
        classes: number of classes.
        images: uint8 [N, H, W, 3], a random sample of the training images, for the whitening filters.
        bf16: whether to compute under bfloat16 autocast.
    """

    def __init__(self, recipe: Recipe, classes: int, images: Tensor, bf16: bool) -> None:
        self._recipe, self._bf16 = recipe, bf16
        self._model = WhitenedConvNet(WIDTHS, classes)
        self._model.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._model.init_whiten(images)
        self._optimizer = make_optimizer(recipe, self._model, muon_dtype(images.device))

    def choose(self, images: Tensor, labels: Tensor, step: int, steps: int) -> Tensor:
        """The indices of the hardest images of a batch in ascending order, int64 [`trained_images` of B].

        Args:
            images: uint8 [B, H, W, 3].
            labels: int64 [B].
            step: number of this step, from 0.
            steps: number of all steps of the run.
        """
        recipe, trains = self._recipe, step % TRAINED_EVERY == 0
        with (
            torch.set_grad_enabled(trains),
            torch.autocast(images.device.type, torch.bfloat16, enabled=self._bf16),
        ):
            logits = self._model(images)
            losses = nn.functional.cross_entropy(
                logits, labels, label_smoothing=recipe.label_smoothing, reduction="none"
            )
        hardest = losses.detach().topk(trained_images(recipe, len(labels))).indices
        if trains:
            set_learning_rate(self._optimizer, recipe, (step + 0.5) / steps)
            self._optimizer.zero_grad()
            losses[hardest].mean().backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        return hardest.sort().values

    def is_finite(self) -> bool:
        """Whether all weights of the small network are finite."""
        return all(bool(parameter.isfinite().all()) for parameter in self._model.parameters())

    def to_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values, for a checkpoint."""
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Restores a state returned by `to_dict`."""
        self._model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
