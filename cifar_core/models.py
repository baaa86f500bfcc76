"""The networks: the two ConvNets of the study, and our own. All take images as a decoder returns them.

Conversion to float, transposition and normalisation are the first layer of every network, so that training, evaluation
and the exported graph cannot disagree on them. Batch normalisation is needed only in training: `fuse_batch_norm`
returns the same function without it. This module must not depend on data sets or on training.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, relu
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from cifar_core.images import IMAGE_SIZE

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.247, 0.243, 0.261)
"""Per-channel statistics of CIFAR-10's training images, scaled to [0, 1], as the study uses them (section 1.1)."""
HIDDEN_UNITS = 512
"""Units of the hidden fully connected layer of the study's networks."""


# Layers


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


def _batch_norm(channels: int, kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Module:
    """Batch normalisation with its scale fixed at 1, whose statistics follow the last few batches.

    The weights of the next layer can take over any scale. A positive scale commutes with the maximum, so batch
    normalisation after max-pooling, where there is a quarter as much to normalise, can still be fused into the
    convolution before the pooling. Both after Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU"
    (arXiv 2404.00498).
    """
    layer = kind(channels, momentum=0.4)
    layer.weight.requires_grad_(False)
    return layer


def _small_head(features: int, classes: int, bias: bool = True) -> nn.Linear:
    """An output layer with small initial logits, which allows large learning rates for the biases before it."""
    layer = nn.Linear(features, classes, bias)
    nn.init.normal_(layer.weight, std=1 / features)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class ConvBlock(nn.Module):
    """Two 3x3 convolutions of stride 1, each followed by ReLU; then 2x2 max-pooling of stride 2, and dropout.

    The second ReLU is computed after the pooling: the result is the same, for a quarter of the work.

    Args:
        channels_in: channels of the input.
        channels: channels of both convolutions.
        padding: padding of both convolutions, in pixels.
        dropout: probability in [0, 1).
        batch_norm: whether to normalise before each ReLU; the convolutions then have no bias.
    """

    def __init__(self, channels_in: int, channels: int, padding: int, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=padding, bias=not batch_norm)
        self.norm1 = _batch_norm(channels) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=padding, bias=not batch_norm)
        self.pool = nn.MaxPool2d(2)
        self.norm2 = _batch_norm(channels) if batch_norm else nn.Identity()
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm1(self.conv1(x)), inplace=True)
        x = relu(self.norm2(self.pool(self.conv2(x))), inplace=True)
        return self.dropout(x)  # type: ignore[no-any-return]


class ConvGroup(nn.Module):
    """Convolution, 2x2 max-pooling, convolution; each convolution is normalised and followed by ReLU.

    After airbench94 (Jordan 2024, arXiv 2404.00498). The convolutions are 3x3 with padding 1; at the start of training
    they pass their input on unchanged (Dirac initialisation).

    Args:
        channels_in: channels of the input.
        channels: channels of both convolutions.
    """

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = _batch_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = _batch_norm(channels)
        for convolution in (self.conv1, self.conv2):
            nn.init.dirac_(convolution.weight.data[: convolution.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm1(self.pool(self.conv1(x))), inplace=True)
        return relu(self.norm2(self.conv2(x)), inplace=True)


# Networks


class Network(nn.Module):
    """A classifier: uint8 [N, H, W, 3] -> float32 logits [N, classes]. The loss applies the softmax.

    Attributes:
        normalise: the first layer.
        head: the output layer.
    """

    normalise: Normalise
    head: nn.Linear

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Loads a state dict.

        Also accepts state dicts saved before layers had names (`1.weight` in place of `blocks.0.conv1.weight`): the
        order of the tensors has not changed, so they are matched by position.

        Raises:
            RuntimeError: The names or shapes of the tensors are not those of this network.
        """
        if all(name.partition(".")[0].isdecimal() for name in state) and len(state) == len(self.state_dict()):
            state = dict(zip(self.state_dict(), state.values(), strict=True))
        self.load_state_dict(state)


class ConvNet(Network):
    """Blocks of convolutions, a hidden fully connected layer, and the output layer.

    Args:
        widths: channels of each block.
        padding: padding of every convolution, in pixels.
        dropout: probability, in [0, 1), of zeroing an activation at the end of each block during training.
        classes: number of logits, at least 2.
        batch_norm: whether to normalise over the batch before each ReLU; see `fuse_batch_norm`.

    Raises:
        ValueError: dropout or classes is out of range.
    """

    def __init__(
        self, widths: Sequence[int], padding: int, dropout: float, classes: int, batch_norm: bool = False
    ) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, but must be at least 0 and below 1")
        if classes < 2:
            raise ValueError(f"classes is {classes}, but a classifier needs at least 2")
        super().__init__()
        self.normalise = Normalise()
        blocks = []
        channels, self.size = 3, IMAGE_SIZE
        for width in widths:
            blocks.append(ConvBlock(channels, width, padding, dropout, batch_norm))
            channels, self.size = width, (self.size + 2 * (2 * padding - 2)) // 2
        self.blocks = nn.Sequential(*blocks)
        self.hidden = nn.Linear(channels * self.size**2, HIDDEN_UNITS, bias=not batch_norm)
        self.hidden_norm = _batch_norm(HIDDEN_UNITS, nn.BatchNorm1d) if batch_norm else nn.Identity()
        self.head = _small_head(HIDDEN_UNITS, classes) if batch_norm else nn.Linear(HIDDEN_UNITS, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.normalise(images))
        if x.shape[-1] != self.size:  # smaller images, used early in training: repeat pixels until the size fits
            x = adaptive_max_pool2d(x, self.size)
        x = relu(self.hidden_norm(self.hidden(x.flatten(1))), inplace=True)
        return self.head(x)  # type: ignore[no-any-return]


class BaselineConvNet(ConvNet):
    """The study's base network (section 1.2) and its dropout variants (section 1.3.5).

    Two blocks of 32 and 64 channels, 3x3 convolutions without padding, hidden layer of 512. 890,410 parameters for ten
    classes.
    """

    def __init__(self, dropout: float = 0.0, classes: int = 10) -> None:
        super().__init__((32, 64), padding=0, dropout=dropout, classes=classes)


class DeepConvNet(ConvNet):
    """The study's deep network (section 1.3.7).

    Four blocks of 32, 64, 128 and 256 channels, 3x3 convolutions with padding 1, hidden layer of 512. 1,702,186
    parameters for ten classes, and just as many with `batch_norm` after fusing.
    """

    def __init__(self, dropout: float = 0.2, classes: int = 10, batch_norm: bool = False) -> None:
        super().__init__((32, 64, 128, 256), padding=1, dropout=dropout, classes=classes, batch_norm=batch_norm)


class WhitenedConvNet(Network):
    """A small network that trains fast, after airbench94 (Jordan 2024, arXiv 2404.00498).

    A 2x2 convolution with fixed filters whitens the patches of the images; three groups of convolutions follow; then
    the maximum over the remaining pixels and a linear layer. It uses ReLU, which costs nothing after a convolution in
    fp32 and int8, where airbench uses GELU. Accepts images of any size from 16 pixels.

    Args:
        widths: channels of each group.
        classes: number of logits.
    """

    def __init__(self, widths: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        self.normalise = Normalise()
        # The filters are fixed, and there is no bias: no gradient has to be computed for the largest activation.
        self.whiten = nn.Conv2d(3, 2 * 3 * 2 * 2, 2, bias=False)
        self.whiten.weight.requires_grad_(False)
        inputs = (self.whiten.out_channels, *widths)
        self.blocks = nn.Sequential(*(ConvGroup(before, width) for before, width in zip(inputs, widths, strict=False)))
        self.pool = GlobalMaxPool()
        self.head = _small_head(widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = relu(self.whiten(self.normalise(images)), inplace=True)
        x = self.pool(self.blocks(x))
        return self.head(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def init_whiten(self, images: Tensor) -> None:
        """Sets the whitening filters to the eigenvectors of the covariance of 2x2 patches, scaled to variance 1.

        Each filter occurs with both signs, because ReLU follows.

        Args:
            images: uint8 [N, H, W, 3], from the training set; a few thousand are enough.
        """
        patches = nn.functional.unfold(self.normalise(images), 2).transpose(1, 2).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


@dataclass(frozen=True)
class NetworkKind:
    """A network that a recipe can name.

    Attributes:
        build: returns a network with fresh weights, given the number of classes, the dropout probability, and the
            channels of the first group.
        batch_norm: whether the network has batch normalisation. Only such networks can be trained with Muon, which
            fixes the norm of weights, or on smaller images.
        has_width: whether the channels of the first group can be chosen.
    """

    build: Callable[[int, float, int], Network]
    batch_norm: bool = False
    has_width: bool = False


NETWORKS: dict[str, NetworkKind] = {
    "baseline": NetworkKind(lambda classes, dropout, _: BaselineConvNet(dropout, classes)),
    "deep": NetworkKind(lambda classes, dropout, _: DeepConvNet(dropout, classes)),
    "deep-batch-norm": NetworkKind(
        lambda classes, dropout, _: DeepConvNet(dropout, classes, batch_norm=True), batch_norm=True
    ),
    "whitened": NetworkKind(
        lambda classes, _, width: WhitenedConvNet((width, 4 * width, 8 * width), classes),
        batch_norm=True,
        has_width=True,
    ),
}
"""Every network, by the name that recipes use."""


def make_model(name: str, classes: int, dropout: float = 0.0, width: int = 0) -> Network:
    """A network with fresh weights.

    Args:
        name: a key of `NETWORKS`.
        classes: number of logits.
        dropout: dropout probability; ignored by `whitened`.
        width: channels of the first group of `whitened`, whose other groups have four and eight times as many; ignored
            by other networks.

    Raises:
        ValueError: There is no such network, or a value is out of range.
    """
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}; the networks are: {', '.join(NETWORKS)}")
    return NETWORKS[name].build(classes, dropout, width)


# Fusing

_NORMALISED = (("conv1", "norm1"), ("conv2", "norm2"), ("hidden", "hidden_norm"))
"""Names of layers and of the batch normalisation that follows them."""


def fuse_batch_norm(model: Network) -> Network:
    """The same function in evaluation mode, with each batch normalisation fused into the layer before it.

    Args:
        model: the network; it is put into evaluation mode, and otherwise not changed.

    Returns:
        A copy without batch normalisation; `model` itself if it has none.
    """
    model.eval()
    if not _has_batch_norm(model):
        return model
    fused = copy.deepcopy(model)
    for module in list(fused.modules()):
        for layer_name, norm_name in _NORMALISED:
            layer, norm = getattr(module, layer_name, None), getattr(module, norm_name, None)
            if isinstance(norm, nn.BatchNorm2d) and isinstance(layer, nn.Conv2d):
                setattr(module, layer_name, fuse_conv_bn_eval(layer, norm))
                setattr(module, norm_name, nn.Identity())
            elif isinstance(norm, nn.BatchNorm1d) and isinstance(layer, nn.Linear):
                setattr(module, layer_name, fuse_linear_bn_eval(layer, norm))
                setattr(module, norm_name, nn.Identity())
    if _has_batch_norm(fused):
        raise TypeError(f"a batch normalisation of {type(model).__name__} has no entry in the table of fusible layers")
    return fused


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules())
