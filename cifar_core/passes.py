"""Passes over images that do not train: validation, and statistics of batch normalisation computed anew."""

import torch
from torch import Tensor, nn

from cifar_core.data import Images

VALIDATION_BATCH = 500
STATISTICS_BATCH = 500


@torch.inference_mode()
def validate(model: nn.Module, data: Images) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0 to 1), in fp32 for every precision of training, because fp32 is exported."""
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64)
    correct = 0
    for first in range(0, len(data), VALIDATION_BATCH):
        labels = data.labels[first : first + VALIDATION_BATCH]
        logits = model(data.images[first : first + VALIDATION_BATCH])
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").cpu()
        correct += int((logits.argmax(1) == labels).sum())
    model.train(was_training)
    return float(loss) / len(data), correct / len(data)


@torch.no_grad()
def recompute_statistics(model: nn.Module, images: Tensor) -> None:
    """Replaces the statistics of batch normalisation by those of these images, in fp32 and with the present weights.

    During training the statistics are averages over the last few batches, whose weights still changed. Dropout stays
    off, as in evaluation.

    Args:
        model: its mode does not change.
        images: uint8 [N, 32, 32, 3], N at least 2.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in norms]
    was_training = model.training
    model.eval()
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # an average in which all batches have equal weight
        layer.train()
    for batch in images.tensor_split(-(-len(images) // STATISTICS_BATCH)):
        model(batch)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    model.train(was_training)
