"""Passes over images that do not train: validation, and statistics of batch normalisation computed anew."""

import torch
from torch import Tensor, nn

from cifar_core.data import Images
from cifar_core.distributed import ALONE, Ranks

VALIDATION_BATCH = 500
STATISTICS_BATCH = 500


@torch.inference_mode()
def validate(model: nn.Module, data: Images, ranks: Ranks = ALONE) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0 to 1), in fp32 for every precision of training, because fp32 is exported.

    Each rank computes its part of the images, and all return the same values.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64)
    correct = 0
    all_images, all_labels = ranks.part(data.images), ranks.part(data.labels)
    for first in range(0, len(all_labels), VALIDATION_BATCH):
        labels = all_labels[first : first + VALIDATION_BATCH]
        logits = model(all_images[first : first + VALIDATION_BATCH])
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").cpu()
        correct += int((logits.argmax(1) == labels).sum())
    model.train(was_training)
    total_loss, total_correct = ranks.total(torch.stack((loss, torch.tensor(correct, dtype=torch.float64)))).tolist()
    return total_loss / len(data), total_correct / len(data)


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
