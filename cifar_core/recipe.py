"""What a recipe is: an experiment as plain values that never change.

A recipe is printed, saved in the run folder and compared when a run is resumed. Two runs can differ only in their
recipe, seed, data, precision, initial weights and teacher.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from cifar_core.errors import CifarError
from cifar_core.layers import Activation
from cifar_core.models import NETWORKS, Network, NetworkOptions, make_model
from cifar_core.pixels import IMAGE_SIZE

SMALLEST_SIZE = 16
"""Height and width, in pixels, below which the networks have no pixels left after their poolings."""
SMALLEST_BATCH = 4
"""Batch size below which a batch could hold a single image, which batch normalisation cannot normalise."""
GROUPS = 3
"""Number of groups of convolutions of the network `whitened`."""

Precision = Literal["fp32", "bf16"]


class RecipeError(CifarError, ValueError):
    """There is no such recipe, or a recipe cannot have such a value."""


def _check_model(name: str) -> str:
    if name not in NETWORKS:
        raise ValueError(f"but must be one of: {', '.join(NETWORKS)}")
    return name


def _parse_sizes(value: object) -> object:
    """Reads `20:4,24:10`, the form of the command line and of recipes saved by earlier versions."""
    if not isinstance(value, str):
        return value
    try:
        pairs = [pair.split(":") for pair in value.split(",")] if value else []
        return [(int(size), int(epochs)) for size, epochs in pairs]
    except ValueError:
        raise ValueError("but must be SIZE:EPOCHS pairs separated by commas, such as 20:4,24:10") from None


def _parse_widths(value: object) -> object:
    """Reads `64,256,256`, the form of the command line."""
    if not isinstance(value, str):
        return value
    try:
        return [int(width) for width in value.split(",")] if value else []
    except ValueError:
        raise ValueError("but must be channels separated by commas, such as 64,256,256") from None


MOST = 10**9
"""The largest number of epochs or images. No run reaches it, and computing with more would overflow."""
WIDEST = 4096
"""The largest number of channels of a convolution: such a layer takes 0.6 GB."""

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0, le=MOST)]
CountFromOne = Annotated[int, Field(gt=0, le=MOST)]
Size = Annotated[int, Field(ge=SMALLEST_SIZE, le=IMAGE_SIZE)]
Sizes = Annotated[tuple[tuple[Size, CountFromOne], ...], BeforeValidator(_parse_sizes)]
Widths = Annotated[tuple[Annotated[int, Field(gt=0, le=WIDEST)], ...], BeforeValidator(_parse_widths)]


class Recipe(BaseModel):
    """One experiment. The defaults are those of the study (section 1.3.2).

    Attributes:
        name: name of the recipe, and of the folder of its runs.
        model: the network, a key of `models.NETWORKS`.
        dropout: probability of zeroing an activation after each max-pooling, in [0, 1).
        epochs: number of passes over the training images.
        batch_size: images per step. The last step of an epoch takes the remaining ones; with batch normalisation the
            steps of an epoch have equal numbers of images, up to one, and at most this many.
        learning_rate: learning rate of SGD or Muon; it does not follow `batch_size`.
        momentum: momentum of SGD or Muon, in [0, 1); it does not follow `batch_size`.
        sampler: how the training images are drawn, each once per epoch: `subset` is torch's SubsetRandomSampler over
            the images to train on, `weighted` is WeightedRandomSampler with equal weights and no replacement.
        validation_images: number of training images that are held out (fewer in small data sets, see `data.split`).
        split_seed: selects the images that are held out; equal in all runs, so that validation accuracies compare.
        width: channels of the first group of the network `whitened`, whose other groups have four and eight times as
            many; 0 for other networks and if `widths` is given.
        widths: channels of the three groups of `whitened`, in place of `width`.
        depth: convolutions in each group of `whitened`, 2 or 3.
        activation: activation function of `whitened`, `relu` or `gelu`.
        whiten_size: height and width of the whitening filters of `whitened`, 2 or 3.
        whiten_bias_epochs: number of epochs in which a bias of the whitening layer is trained, with a learning rate
            that falls to 0 in these epochs; 0 for a layer without bias.
        identity_init: whether the convolutions of `deep-batch-norm` pass their input on at the start of training, as
            those of `whitened` always do.
        precision: `fp32`, or `bf16` for autocast; weights, optimizer and validation are in fp32 in both.
        optimizer: `sgd`, or `muon`, which trains hidden weights with Muon and everything else with SGD (Nesterov
            momentum 0.85).
        output_learning_rate: learning rate of that SGD for the weights of the output layer.
        bias_learning_rate: learning rate of that SGD for biases.
        weight_decay: share of the output layer's weights and of the biases that a step removes at the highest learning
            rate; SGD of the optimizer `muon` only.
        schedule: `constant` learning rates; or `one-cycle`, which raises them linearly during the first `warmup` of
            all steps and then lowers them linearly to 0.
        warmup: share of all steps, in [0, 1).
        label_smoothing: label smoothing of the training loss, in [0, 1).
        flip: whether training images are mirrored: `none`, `random`, or `alternating` (in every other epoch).
        translate: largest shift of a training image in pixels, at most 31; pixels beyond the border are reflected.
        cutout: side of the square that is set to grey in each training image, in pixels, at most 32; 0 for none.
        brightness: largest change of the brightness of a training image, as a share of the range of pixels, in [0, 1).
        contrast: largest change of the contrast of a training image, as a share, in [0, 1).
        sizes: pairs (size, epochs): the first epochs train on images of this size in pixels, further pairs follow, and
            the remaining epochs train on images of 32 pixels. Requires a network with batch normalisation.
        statistics_images: number of training images, without augmentation, from which the statistics of batch
            normalisation are computed anew after the last epoch; 0 keeps those of training.
        weights: which weights the run ends with: `best`, those of the epoch with the best validation accuracy; or
            `last`, so that the held-out images have chosen nothing and can be used for calibration.
        validated_epochs: number of epochs, counted from the end, after which validation is measured; 0 for all.
        distillation: share of the loss that compares the probabilities with those of a teacher, in [0, 1); the rest
            compares them with the labels. Above 0, the run needs a teacher.
        hard_share: share of each batch that is trained on, in (0, 1]: the images with the largest losses in a small
            network that is trained alongside (`hard_images`). Below 1 it requires the optimizer `muon`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    model: Annotated[str, AfterValidator(_check_model)] = "baseline"
    dropout: Share = 0.0
    epochs: CountFromOne = 20
    batch_size: CountFromOne = 32
    learning_rate: PositiveFloat = 0.001
    momentum: Share = 0.9
    sampler: Literal["subset", "weighted"] = "subset"
    validation_images: CountFromOne = 1000
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    width: Annotated[int, Field(ge=0, le=WIDEST // 8)] = 0
    precision: Precision = "fp32"
    optimizer: Literal["sgd", "muon"] = "sgd"
    output_learning_rate: NonNegativeFloat = 0.0
    bias_learning_rate: NonNegativeFloat = 0.0
    schedule: Literal["constant", "one-cycle"] = "constant"
    warmup: Share = 0.0
    label_smoothing: Share = 0.0
    flip: Literal["none", "random", "alternating"] = "none"
    translate: Annotated[int, Field(ge=0, lt=IMAGE_SIZE)] = 0
    cutout: Annotated[int, Field(ge=0, le=IMAGE_SIZE)] = 0
    sizes: Sizes = ()
    widths: Widths = ()
    depth: Annotated[int, Field(ge=2, le=3)] = 2
    activation: Activation = "relu"
    whiten_size: Annotated[int, Field(ge=2, le=3)] = 2
    whiten_bias_epochs: Count = 0
    identity_init: bool = False
    weight_decay: Share = 0.0
    brightness: Share = 0.0
    contrast: Share = 0.0
    statistics_images: Count = 0
    weights: Literal["best", "last"] = "best"
    validated_epochs: Count = 0
    distillation: Share = 0.0
    hard_share: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        network = NETWORKS[self.model]
        self._check_options()
        if network.batch_norm and self.batch_size < SMALLEST_BATCH:
            raise ValueError(
                f"batch_size is {self.batch_size}, but must be at least {SMALLEST_BATCH} for the network {self.model}, "
                "which normalises over the batch"
            )
        if self.statistics_images and not network.batch_norm:
            raise ValueError(
                f"statistics_images requires a network with batch normalisation, which {self.model} does not have"
            )
        if self.statistics_images == 1:
            raise ValueError("statistics_images is 1, but must be 0 or at least 2")
        if self.weights == "best" and self.validated_epochs:
            raise ValueError("validated_epochs requires weights=last, because the best of all epochs is chosen")
        if self.weight_decay and self.optimizer != "muon":
            raise ValueError("weight_decay requires optimizer muon")
        if self.hard_share < 1 and self.optimizer != "muon":
            raise ValueError("hard_share below 1 requires optimizer muon, which trains the small network that chooses")
        if self.sizes and not network.batch_norm:
            raise ValueError(f"sizes requires a network with batch normalisation, which {self.model} does not have")
        if self.optimizer == "muon" and not network.batch_norm:
            raise ValueError(
                f"optimizer muon fixes the norm of the weights, so {self.model}, which has no batch normalisation, "
                "must be trained with sgd"
            )
        if self.optimizer == "muon" and not (self.output_learning_rate > 0 and self.bias_learning_rate > 0):
            raise ValueError("optimizer muon needs output_learning_rate and bias_learning_rate above 0")
        return self

    def _check_options(self) -> None:
        """Checks the values that only some networks use."""
        network = NETWORKS[self.model]
        if "widths" not in network.options and self.width:
            raise ValueError(f"width is {self.width}, but must be 0 for the network {self.model}")
        if "widths" in network.options and len(self.widths) != (0 if self.width else GROUPS):
            raise ValueError(
                f"width is {self.width}, but must be above 0 for the network {self.model}, or 0 together with "
                f"{GROUPS} numbers in widths, such as widths=64,256,256"
            )
        for name in ("widths", "depth", "activation", "whiten_size", "whiten_bias_epochs", "identity_init"):
            option = name.removesuffix("_epochs")
            value = getattr(self, name)
            if option not in network.options and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {as_text(value)}, but the network {self.model} does not have this option")
        if self.whiten_bias_epochs and self.optimizer != "muon":
            raise ValueError("whiten_bias_epochs requires optimizer muon")
        if self.whiten_bias_epochs > self.epochs:
            raise ValueError(
                f"whiten_bias_epochs is {self.whiten_bias_epochs}, but must be at most epochs, {self.epochs}"
            )

    def make_model(self, classes: int) -> Network:
        """The network of this recipe with fresh weights."""
        options = NetworkOptions(
            dropout=self.dropout,
            widths=self.widths or (self.width, 4 * self.width, 8 * self.width),
            depth=self.depth,
            activation=self.activation,
            whiten_size=self.whiten_size,
            whiten_bias=self.whiten_bias_epochs > 0,
            identity_init=self.identity_init,
        )
        return make_model(self.model, classes, options)

    @property
    def batch_norm(self) -> bool:
        """Whether the network normalises over the batch."""
        return NETWORKS[self.model].batch_norm

    def is_validated(self, epoch: int) -> bool:
        """Whether validation is measured after an epoch. Epochs count from 0."""
        return not self.validated_epochs or epoch >= self.epochs - self.validated_epochs

    def image_size(self, epoch: int) -> int:
        """Height and width of the training images in an epoch, in pixels. Epochs count from 0."""
        for size, epochs in self.sizes:
            if epoch < epochs:
                return size
            epoch -= epochs
        return IMAGE_SIZE

    def values(self) -> dict[str, Any]:
        """All values in the form of recipe.json: numbers, strings and lists."""
        return self.model_dump(mode="json")


def read_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe of saved values, also those of earlier versions.

    Keys that did not exist when the recipe was saved get their defaults, and `sizes` may have its earlier form, the
    string `20:4,24:10`.

    Raises:
        RecipeError: A key is unknown, or a value has the wrong type or is out of range.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError(_describe(error)) from error


def as_text(value: object) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return str(value)


def _describe(error: ValidationError) -> str:
    """The first fault that pydantic found, in our own form: `epochs is 0, but should be greater than 0`."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # several values do not go together; the message names them
        return message
    key, *position = first["loc"]
    if first["type"] == "extra_forbidden":
        return f"this version has no recipe value {key!r}; train again, or use the version that saved the recipe"
    verb = "contains" if position else "is"
    return f"{key} {verb} {first['input']}, {message.replace('Input should', 'but should', 1)}"
