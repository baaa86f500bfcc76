"""The two ConvNets of the study, and ours. A model eats images as a decoder gives them: uint8, channels last.

Conversion, transposition and normalisation are each network's first layer, so that training, evaluation and the
exported graph cannot disagree on them. Batch normalisation is for training alone: `folded` gives the same function
without it. This room knows neither data sets nor training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

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


def _normalisation(channels: int, kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Module:
    """Batch normalisation with the scale fixed at 1; its statistics follow the last few batches.

    What scale a channel has is left to the next layer's weights. Positive, the scale commutes with the maximum, so that
    batch normalisation behind a max-pooling, where there is a quarter as much to normalise, still folds into the
    convolution before it. Both after Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498).
    """
    layer = kind(channels, momentum=0.4)
    layer.weight.requires_grad_(False)
    return layer


def _conv_block(channels_in: int, channels: int, padding: int, dropout: float, batch_norm: bool) -> list[nn.Module]:
    """Two 3x3 convolutions of stride 1, each with ReLU, a 2x2 max-pooling of stride 2, and dropout.

    The second ReLU stands behind the pooling: the maximum of the rectified is the rectified maximum, and after the
    pooling there is a quarter as much to rectify.
    """
    return [
        nn.Conv2d(channels_in, channels, 3, padding=padding, bias=not batch_norm),
        *([_normalisation(channels)] if batch_norm else []),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=padding, bias=not batch_norm),
        nn.MaxPool2d(2),
        *([_normalisation(channels)] if batch_norm else []),
        nn.ReLU(inplace=True),
        Dropout(dropout),
    ]


def _output(features: int, classes: int, bias: bool = True) -> nn.Linear:
    """An output layer whose logits are small at first; with it, biases of hidden layers take large learning rates."""
    layer = nn.Linear(features, classes, bias)
    nn.init.normal_(layer.weight, std=1 / features)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class ConvNet(nn.Sequential):
    """Blocks of two convolutions, a max-pooling and dropout; then a hidden linear layer of 512 and the output layer.

    Maps uint8 [N, 32, 32, 3] to float32 logits [N, classes]; no softmax, which is left to the loss.

    Args:
        widths: output channels of each block.
        padding: of every convolution, in pixels.
        dropout: probability, in [0, 1), of zeroing an activation after each max-pooling while training.
        classes: number of logits, at least 2.
        batch_norm: normalise over the batch before each ReLU, in place of a bias; see `folded`.

    Raises:
        ValueError: dropout or classes out of range.
    """

    def __init__(
        self, widths: Sequence[int], padding: int, dropout: float, classes: int, batch_norm: bool = False
    ) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, but must be at least 0 and below 1")
        if classes < 2:
            raise ValueError(f"classes is {classes}, but a classifier needs at least 2")
        layers: list[nn.Module] = [Normalise()]
        channels, size = 3, IMAGE_SIZE
        for width in widths:
            layers += _conv_block(channels, width, padding, dropout, batch_norm)
            channels, size = width, (size + 2 * (2 * padding - 2)) // 2
        layers += [
            # Does nothing at 32 pixels. Smaller images, on which training may begin, leave fewer here, to be repeated.
            *([nn.AdaptiveMaxPool2d(size)] if batch_norm else []),
            nn.Flatten(),
            nn.Linear(channels * size * size, 512, bias=not batch_norm),
            *([_normalisation(512, nn.BatchNorm1d)] if batch_norm else []),
            nn.ReLU(inplace=True),
            _output(512, classes) if batch_norm else nn.Linear(512, classes),
        ]
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
    1,702,186 parameters at ten classes; as many with `batch_norm`, once folded.
    """

    def __init__(self, dropout: float = 0.2, classes: int = 10, batch_norm: bool = False) -> None:
        super().__init__((32, 64, 128, 256), padding=1, dropout=dropout, classes=classes, batch_norm=batch_norm)


class WhitenedConvNet(nn.Sequential):
    """A small residual-free network that trains fast, after airbench94 (Jordan 2024, arXiv 2404.00498).

    A 2x2 convolution whose fixed filters whiten the training images' patches; three groups of convolution, max-pooling,
    convolution, each normalised and rectified; the maximum over the remaining pixels; a linear layer. Where airbench
    has GELU here is ReLU, which costs nothing behind a convolution, in int8 neither. Takes images of any size from 16
    pixels on, so that it can be trained on small ones first.

    Args:
        widths: output channels of each group.
        classes: number of logits.
    """

    def __init__(self, widths: Sequence[int], classes: int = 10) -> None:
        # Fixed, and without a bias: nothing has to be propagated back to the largest of all activations.
        whitening = nn.Conv2d(3, 2 * 3 * 2 * 2, 2, bias=False)
        whitening.weight.requires_grad_(False)
        layers: list[nn.Module] = [Normalise(), whitening, nn.ReLU(inplace=True)]
        channels = whitening.out_channels
        for width in widths:
            first, second = (nn.Conv2d(each, width, 3, padding=1, bias=False) for each in (channels, width))
            for convolution in (first, second):
                nn.init.dirac_(convolution.weight.data[: convolution.in_channels])  # lets its input through at first
            pool = nn.MaxPool2d(2)
            layers += [first, pool, _normalisation(width), nn.ReLU(inplace=True)]
            layers += [second, _normalisation(width), nn.ReLU(inplace=True)]
            channels = width
        super().__init__(*layers, Maximum(), _output(channels, classes, bias=False))

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Sets the first convolution's filters to the eigenvectors of the patches' covariance, scaled to variance 1.

        Each of them with both signs, because what follows rectifies.

        Args:
            images: uint8 [N, 32, 32, 3], of the training set; some thousand are enough.
        """
        patches = nn.functional.unfold(Normalise().to(images.device)(images), 2).transpose(1, 2).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.get_parameter("1.weight").copy_(torch.cat([filters, -filters]))


class Maximum(nn.Module):
    """The maximum of each channel over all pixels: [N, C, H, W] → [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3))


def folded(model: nn.Sequential) -> nn.Sequential:
    """The same function, in evaluation mode on images of 32 pixels, with batch normalisation folded into other layers.

    Args:
        model: a network of this room; it is put into evaluation mode.

    Returns:
        The network without batch normalisation; `model` itself, where there is none to fold.
    """
    model.eval()
    layers: list[nn.Module] = []
    for layer in model:
        if isinstance(layer, nn.AdaptiveMaxPool2d):
            continue
        if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layers.append(layer)
            continue
        place = -2 if isinstance(layers[-1], nn.MaxPool2d) else -1
        before = layers[place]
        if isinstance(before, nn.Conv2d) and isinstance(layer, nn.BatchNorm2d):
            layers[place] = fuse_conv_bn_eval(before, layer)
        elif isinstance(before, nn.Linear) and isinstance(layer, nn.BatchNorm1d):
            layers[place] = fuse_linear_bn_eval(before, layer)
        else:
            raise TypeError(f"{layer} stands behind {before}, into which it cannot be folded")
    return model if len(layers) == len(model) else nn.Sequential(*layers).eval()


def make_model(name: str, classes: int, dropout: float = 0.0, width: int = 0) -> nn.Sequential:
    """A network with fresh weights.

    Args:
        name: a member of `MODELS`.
        classes: number of logits.
        dropout: of the study's networks and `deep-batch-norm`.
        width: channels of the first group of `whitened`; the others have four and eight times as many.
    """
    match name:
        case "baseline":
            return BaselineConvNet(dropout, classes)
        case "deep":
            return DeepConvNet(dropout, classes)
        case "deep-batch-norm":
            return DeepConvNet(dropout, classes, batch_norm=True)
        case "whitened":
            return WhitenedConvNet((width, 4 * width, 8 * width), classes)
    raise ValueError(f"no network is called {name!r}; there are: {', '.join(MODELS)}")


MODELS = ("baseline", "deep", "deep-batch-norm", "whitened")
"""The networks by the name that a recipe uses."""
