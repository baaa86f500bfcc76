"""Layers of the networks, and the activation functions. This module must not depend on data sets or on training."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from cifar_core.convolution import Conv3x3

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.247, 0.243, 0.261)
"""Per-channel statistics of CIFAR-10's training images, scaled to [0, 1], as the study uses them (section 1.1)."""

Activation = Literal["relu", "gelu"]


class Normalise(nn.Module):
    """uint8 [N, H, W, 3], values 0 to 255 -> float32 [N, 3, H, W]: scaled to [0, 1], then (x - mean) / std.

    The transposition costs nothing: a channels-last image, permuted, is a tensor in torch's channels-last memory
    format, which is also the layout in which convolutions run fastest on a CPU.

    Args:
        mean: mean per channel of images scaled to [0, 1].
        std: standard deviation per channel, each above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = CIFAR10_MEAN, std: Sequence[float] = CIFAR10_STD) -> None:
        super().__init__()
        # Buffers, so that the statistics are saved with the weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


class Dropout(nn.Module):
    """Inverted dropout like `nn.Dropout`, but faster on a CPU.

    During training it zeroes each activation with probability p and scales the others by 1 / (1 - p); otherwise it is
    the identity. `nn.Dropout` draws one double at a time in a single thread, which takes a tenth of a training step of
    the deep network in bf16. Here four activations share one 64-bit random number, 16 bits each, so p is rounded to a
    multiple of 2**-16. The scale uses the rounded p, so expectations are preserved exactly.

    Args:
        p: probability in [0, 1).
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


class GlobalMaxPool(nn.Module):
    """The maximum of each channel over all pixels: [N, C, H, W] -> [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3))


def batch_norm_layer(channels: int, kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Module:
    """Batch normalisation with its scale fixed at 1, whose statistics follow the last few batches.

    The weights of the next layer can take over any scale. A positive scale commutes with the maximum, so batch
    normalisation after max-pooling, where there is a quarter as much to normalise, can still be fused into the
    convolution before the pooling. Both after Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU"
    (arXiv 2404.00498).
    """
    layer = kind(channels, momentum=0.4)
    layer.weight.requires_grad_(False)
    return layer


def small_head(features: int, classes: int, bias: bool = True) -> nn.Linear:
    """An output layer with small initial logits, which allows large learning rates for the biases before it."""
    layer = nn.Linear(features, classes, bias)
    nn.init.normal_(layer.weight, std=1 / features)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Applies the activation; ReLU in place."""
    return relu(x, inplace=True) if activation == "relu" else gelu(x)


def init_identity(*convolutions: nn.Conv2d) -> None:
    """Makes convolutions pass their input on in the first output channels (Dirac initialisation)."""
    for convolution in convolutions:
        nn.init.dirac_(convolution.weight.data[: convolution.in_channels])


class ConvBlock(nn.Module):
    """Two 3x3 convolutions of stride 1, each followed by ReLU; then 2x2 max-pooling of stride 2, and dropout.

    The second ReLU is computed after the pooling: the result is the same, for a quarter of the work.

    Args:
        channels_in: channels of the input.
        channels: channels of both convolutions.
        padding: padding of both convolutions, in pixels.
        dropout: probability in [0, 1).
        batch_norm: whether to normalise before each ReLU; the convolutions then have no bias.
        identity_init: whether the convolutions pass their input on at the start of training.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        padding: int,
        dropout: float,
        batch_norm: bool,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = _block_convolution(channels_in, channels, padding, batch_norm)
        self.norm1 = batch_norm_layer(channels) if batch_norm else nn.Identity()
        self.conv2 = _block_convolution(channels, channels, padding, batch_norm)
        self.pool = nn.MaxPool2d(2)
        self.norm2 = batch_norm_layer(channels) if batch_norm else nn.Identity()
        self.dropout = Dropout(dropout)
        if identity_init:
            init_identity(self.conv1, self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm1(self.conv1(x)), inplace=True)
        x = relu(self.norm2(self.pool(self.conv2(x))), inplace=True)
        return self.dropout(x)  # type: ignore[no-any-return]


def _block_convolution(channels_in: int, channels: int, padding: int, batch_norm: bool) -> nn.Conv2d:
    if batch_norm and padding == 1:
        return Conv3x3(channels_in, channels)
    return nn.Conv2d(channels_in, channels, 3, padding=padding, bias=not batch_norm)


class ConvGroup(nn.Module):
    """Convolution, 2x2 max-pooling, convolution; each convolution is normalised and followed by the activation.

    After airbench94 (Jordan 2024, arXiv 2404.00498). The convolutions are 3x3 with padding 1; at the start of training
    they pass their input on unchanged (Dirac initialisation). With a third convolution, the input of the second one is
    added to the output of the third before the last activation, as in airbench96.

    Args:
        channels_in: channels of the input.
        channels: channels of all convolutions.
        depth: number of convolutions, 2 or 3.
        activation: the activation function.
    """

    def __init__(self, channels_in: int, channels: int, depth: int = 2, activation: Activation = "relu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.conv1 = Conv3x3(channels_in, channels)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = batch_norm_layer(channels)
        self.conv2 = Conv3x3(channels, channels)
        self.norm2 = batch_norm_layer(channels)
        init_identity(self.conv1, self.conv2)
        if depth == 3:
            self.conv3 = Conv3x3(channels, channels)
            self.norm3 = batch_norm_layer(channels)
            init_identity(self.conv3)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        first = activate(self.norm1(self.pool(self.conv1(x))), self.activation)
        x = activate(self.norm2(self.conv2(first)), self.activation)
        if self.depth == 2:
            return x
        return activate(self.norm3(self.conv3(x)) + first, self.activation)
