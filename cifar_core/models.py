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

from cifar_core.layers import (
    Activation,
    ConvBlock,
    ConvGroup,
    GlobalMaxPool,
    Normalise,
    activate,
    batch_norm_layer,
    small_head,
)
from cifar_core.pixels import IMAGE_SIZE

HIDDEN_UNITS = 512
"""Units of the hidden fully connected layer of the study's networks."""
WHITENING_DIRECTIONS = 12
"""Principal directions of image patches that the whitening layer keeps; each has two filters, of opposite sign."""


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
        identity_init: whether the convolutions pass their input on at the start of training.

    Raises:
        ValueError: dropout or classes is out of range.
    """

    def __init__(
        self,
        widths: Sequence[int],
        padding: int,
        dropout: float,
        classes: int,
        batch_norm: bool = False,
        identity_init: bool = False,
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
            blocks.append(ConvBlock(channels, width, padding, dropout, batch_norm, identity_init))
            channels, self.size = width, (self.size + 2 * (2 * padding - 2)) // 2
        self.blocks = nn.Sequential(*blocks)
        self.hidden = nn.Linear(channels * self.size**2, HIDDEN_UNITS, bias=not batch_norm)
        self.hidden_norm = batch_norm_layer(HIDDEN_UNITS, nn.BatchNorm1d) if batch_norm else nn.Identity()
        self.head = small_head(HIDDEN_UNITS, classes) if batch_norm else nn.Linear(HIDDEN_UNITS, classes)

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

    def __init__(
        self, dropout: float = 0.2, classes: int = 10, batch_norm: bool = False, identity_init: bool = False
    ) -> None:
        super().__init__((32, 64, 128, 256), 1, dropout, classes, batch_norm, identity_init)


@dataclass(frozen=True)
class NetworkOptions:
    """The values that a recipe can choose for a network; each network uses some of them.

    Attributes:
        dropout: probability in [0, 1) of zeroing an activation at the end of each block (all but `whitened`).
        widths: channels of the three groups of `whitened`.
        depth: convolutions in each group of `whitened`, 2 or 3.
        activation: the activation function of `whitened`.
        whiten_size: height and width of the filters of the first layer of `whitened`, 2 or 3.
        whiten_bias: whether the first layer of `whitened` has a bias.
        identity_init: whether convolutions pass their input on at the start of training (`deep-batch-norm`).
    """

    dropout: float = 0.0
    widths: tuple[int, ...] = ()
    depth: int = 2
    activation: Activation = "relu"
    whiten_size: int = 2
    whiten_bias: bool = False
    identity_init: bool = False


class WhitenedConvNet(Network):
    """A small network that trains fast, after airbench94 (Jordan 2024, arXiv 2404.00498).

    A convolution with fixed filters whitens the patches of the images; three groups of convolutions follow; then the
    maximum over the remaining pixels and a linear layer. ReLU costs nothing after a convolution in fp32 and int8;
    airbench uses GELU. Accepts images of any size from 16 pixels.

    Args:
        widths: channels of each group.
        classes: number of logits.
        options: depth, activation and first layer; `options.widths` is not used.
    """

    def __init__(
        self,
        widths: Sequence[int],
        classes: int = 10,
        options: NetworkOptions = NetworkOptions(),
    ) -> None:
        super().__init__()
        self.activation: Activation = options.activation
        self.normalise = Normalise()
        # The filters are fixed. Without a bias no gradient has to be computed for the largest activation.
        self.whiten = nn.Conv2d(3, 2 * WHITENING_DIRECTIONS, options.whiten_size, bias=options.whiten_bias)
        self.whiten.weight.requires_grad_(False)
        inputs = (self.whiten.out_channels, *widths)
        self.blocks = nn.Sequential(
            *(
                ConvGroup(before, width, options.depth, options.activation)
                for before, width in zip(inputs, widths, strict=False)
            )
        )
        self.pool = GlobalMaxPool()
        self.head = small_head(widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = activate(self.whiten(self.normalise(images)), self.activation)
        x = self.pool(self.blocks(x))
        return self.head(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def init_whiten(self, images: Tensor) -> None:
        """Sets the whitening filters to the eigenvectors of the covariance of patches, scaled to variance 1.

        Each filter occurs with both signs. Of larger patches, the directions of greatest variance are used.

        Args:
            images: uint8 [N, H, W, 3], a random sample of the training set; a few thousand are enough.
        """
        size = self.whiten.kernel_size[0]
        values_per_patch = 3 * size * size
        patches = nn.functional.unfold(self.normalise(images), size).transpose(1, 2).reshape(-1, values_per_patch)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T[-WHITENING_DIRECTIONS:].reshape(-1, 3, size, size)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


@dataclass(frozen=True)
class NetworkKind:
    """A network that a recipe can name.

    Attributes:
        build: returns a network with fresh weights, given the number of classes and the options.
        batch_norm: whether the network has batch normalisation. Only such networks can be trained with Muon, which
            fixes the norm of weights, or on smaller images.
        options: names of the `NetworkOptions` that the network uses, apart from `dropout`.
    """

    build: Callable[[int, NetworkOptions], Network]
    batch_norm: bool = False
    options: frozenset[str] = frozenset()


NETWORKS: dict[str, NetworkKind] = {
    "baseline": NetworkKind(lambda classes, options: BaselineConvNet(options.dropout, classes)),
    "deep": NetworkKind(lambda classes, options: DeepConvNet(options.dropout, classes)),
    "deep-batch-norm": NetworkKind(
        lambda classes, options: DeepConvNet(options.dropout, classes, True, options.identity_init),
        batch_norm=True,
        options=frozenset({"identity_init"}),
    ),
    "whitened": NetworkKind(
        lambda classes, options: WhitenedConvNet(options.widths, classes, options),
        batch_norm=True,
        options=frozenset({"widths", "depth", "activation", "whiten_size", "whiten_bias"}),
    ),
}
"""Every network, by the name that recipes use."""


def make_model(name: str, classes: int, options: NetworkOptions) -> Network:
    """A network with fresh weights.

    Args:
        name: a key of `NETWORKS`.
        classes: number of logits.
        options: the choices of the recipe; options that the network does not use are ignored.

    Raises:
        ValueError: There is no such network, or a value is out of range.
    """
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}; the networks are: {', '.join(NETWORKS)}")
    return NETWORKS[name].build(classes, options)


# Fusing

NORMALISED_LAYERS = (("conv1", "norm1"), ("conv2", "norm2"), ("conv3", "norm3"), ("hidden", "hidden_norm"))
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
        for layer_name, norm_name in NORMALISED_LAYERS:
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
