"""The two ConvNets of the study. A model eats images as a decoder gives them: uint8, channels last.

Conversion, transposition and normalisation are each network's first layer, so that training, evaluation and the
exported graph cannot disagree on them. This room knows neither data sets nor training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGE_SIZE = 32
"""Height and width, in pixels, of every image a model takes."""

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.247, 0.243, 0.261)
"""Per-channel statistics of CIFAR-10's training images scaled to [0, 1], as the study uses them (its section 1.1)."""


class Normalise(nn.Module):
    """uint8 [N, 32, 32, 3] with values 0 to 255 → float32 [N, 3, 32, 32], scaled to [0, 1], then (x − mean) / std.

    The transposition costs nothing: a channels-last image, permuted, *is* a tensor in torch's channels-last memory
    format, which is also the layout in which the convolutions run fastest on a CPU.

    Args:
        mean: per channel, of images scaled to [0, 1].
        std: likewise; each above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = CIFAR10_MEAN, std: Sequence[float] = CIFAR10_STD) -> None:
        super().__init__()
        # Buffers, so that the statistics travel with the weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


class Dropout(nn.Module):
    """Inverted dropout, like `nn.Dropout`: while training, zeroes each activation with probability p and scales the
    others by 1 / (1 − p); otherwise the identity.

    On a CPU `nn.Dropout` draws one double at a time in one thread, which takes a tenth of a training step of the deep
    model in bf16. Here four activations share one 64-bit draw, 16 bits each, so p is rounded to a multiple of 2⁻¹⁶; the
    scale is that of the rounded p, so that expectations are kept exactly.

    Args:
        p: in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self._threshold = round(p * 2**16)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self._threshold == 0:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.p)
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: x.numel()].as_strided(x.shape, x.stride())
        keep = (bits >= self._threshold - 2**15).to(x.dtype)
        return x * keep.mul_(2**16 / (2**16 - self._threshold))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _conv_block(channels_in: int, channels: int, padding: int, dropout: float) -> list[nn.Module]:
    """Two 3x3 convolutions of stride 1, each with ReLU, a 2x2 max-pooling of stride 2, and dropout.

    The second ReLU stands behind the pooling: the maximum of the rectified is the rectified maximum, and after the
    pooling there is a quarter as much to rectify.
    """
    return [
        nn.Conv2d(channels_in, channels, 3, padding=padding),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=padding),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        Dropout(dropout),
    ]


class ConvNet(nn.Sequential):
    """Blocks of two convolutions, a max-pooling and dropout; then a hidden linear layer of 512 and the output layer.

    Maps uint8 [N, 32, 32, 3] to float32 logits [N, classes]; no softmax, which is left to the loss.

    Args:
        widths: output channels of each block.
        padding: of every convolution, in pixels.
        dropout: probability, in [0, 1), of zeroing an activation after each max-pooling while training.
        classes: number of logits, at least 2.

    Raises:
        ValueError: dropout or classes out of range.
    """

    def __init__(self, widths: Sequence[int], padding: int, dropout: float, classes: int) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, but must be at least 0 and below 1")
        if classes < 2:
            raise ValueError(f"classes is {classes}, but a classifier needs at least 2")
        layers: list[nn.Module] = [Normalise()]
        channels, size = 3, IMAGE_SIZE
        for width in widths:
            layers += _conv_block(channels, width, padding, dropout)
            channels, size = width, (size + 2 * (2 * padding - 2)) // 2
        layers += [nn.Flatten(), nn.Linear(channels * size * size, 512), nn.ReLU(inplace=True), nn.Linear(512, classes)]
        super().__init__(*layers)


class BaselineConvNet(ConvNet):
    """The study's base model (its section 1.2), with its dropout variants (1.3.5).

    [conv 32, conv 32, pool, dropout] · [conv 64, conv 64, pool, dropout] · linear 512 · linear `classes`;
    3x3 convolutions without padding. 890,410 parameters at ten classes.
    """

    def __init__(self, dropout: float = 0.0, classes: int = 10) -> None:
        super().__init__(widths=(32, 64), padding=0, dropout=dropout, classes=classes)


class DeepConvNet(ConvNet):
    """The study's deep model (its section 1.3.7).

    Four blocks of 32, 64, 128 and 256 channels, 3x3 convolutions with padding 1, linear 512, linear `classes`.
    1,702,186 parameters at ten classes.
    """

    def __init__(self, dropout: float = 0.2, classes: int = 10) -> None:
        super().__init__(widths=(32, 64, 128, 256), padding=1, dropout=dropout, classes=classes)


MODELS: dict[str, type[BaselineConvNet] | type[DeepConvNet]] = {"baseline": BaselineConvNet, "deep": DeepConvNet}
"""The networks by the name that a recipe uses."""
