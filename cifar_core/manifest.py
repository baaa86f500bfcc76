"""The manifest of an export, `manifest.json`, as one typed model. The export writes it and the server reads it.

Must not import torch: the server starts without it. `python -m cifar_core.manifest` prints the JSON Schema that
docs/manifest.schema.json holds.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cifar_core.errors import CifarError
from cifar_core.files import read_regular, to_json

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
OPENVINO_PREFIX = "openvino-"
"""Begins the names of the variants that were measured with OpenVINO."""

Name = Annotated[str, StringConstraints(min_length=1)]
# The answer to a request can name every class for every image.
ClassName = Annotated[str, StringConstraints(min_length=1, max_length=255)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A name and not a path, so that no manifest can make the server read a file outside its folder.
PlainFileName = Annotated[str, StringConstraints(pattern=r"^[^./\\\x00][^/\\\x00]*$")]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class ManifestError(CifarError):
    """A manifest that is missing, is not JSON, or does not follow the schema."""


class _Part(BaseModel):
    # Unknown fields are kept and not refused, so that an older server can serve a newer export of the same schema.
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Data(_Part):
    """The data set that the model was trained on."""

    kind: str = Field(default="", description="cifar10 (the official archive), folder or synthetic")
    name: str = Field(default="", description="name for tables; never a path")
    fingerprint: str = Field(default="", description="SHA-256 over class names, images and labels, in hexadecimal")


class CalibrationScale(_Part):
    """The scale of the logits before the softmax: softplus of a polynomial of a measure of each image."""

    form: str = Field(
        description="temperature (a constant), or gap, gap-quadratic (the measure is the difference of the two largest "
        "logits), log-entropy, log-entropy-quadratic (the logarithm of the entropy of the softmax of the logits), or "
        "two-scales and names that begin so (one scale for the largest logit, one for the rest; the measure is the gap)"
    )
    coefficients: tuple[float, ...] = Field(
        min_length=1,
        description="of the polynomial, the constant first; with two scales, the rest's follow the largest logit's",
    )
    images: Count = Field(description="number of held-out images that the scale was fitted on")
    prior_deviation: float | None = Field(
        default=None,
        description="standard deviation of the logarithm of the scale that was assumed, because the images were few",
    )
    chose_epoch: bool = Field(description="whether these images also chose the epoch whose weights were exported")


class Variant(_Part):
    """One form of the model, such as fp32 or int8, with its measurements on the test images."""

    file: PlainFileName = Field(description="name of the ONNX file, in the folder of the manifest")
    sha256: Sha256 = Field(description="SHA-256 of the file, in hexadecimal")
    test_accuracy: Share = Field(description="share of the test images that are classified correctly, 0 to 1")
    test_images: Count | None = Field(default=None, description="number of test images")
    test_loss: float | None = Field(default=None, description="mean cross-entropy on the test images, in nats")
    test_loss_before: float | None = Field(default=None, description="test_loss without the calibration")
    test_ece: Share | None = Field(
        default=None, description="expected calibration error on the test images, with 15 bins of equal width, 0 to 1"
    )
    test_ece_before: Share | None = Field(default=None, description="test_ece without the calibration")
    test_ece_equal_mass: Share | None = Field(default=None, description="test_ece with 15 bins of equal counts")
    calibration: CalibrationScale | None = Field(
        default=None, description="the calibration of this variant; exports of earlier versions have `temperature`"
    )
    calibration_images: Count | None = Field(
        default=None,
        description="int8 only: number of training images that determined the ranges of activations",
    )
    weight_bits: Count | None = Field(
        default=None,
        description="int8 only: bits of a weight; with at most 7, no processor overflows; with 8, as in exports of "
        "earlier versions, processors without VNNI need slower instructions",
    )
    openvino_precision: Literal["fp32", "bf16"] | None = Field(
        default=None,
        description="given if OpenVINO computed these measurements, and only OpenVINO may serve this variant: the "
        "precision of the operations that are not in int8",
    )
    measured_with: str | None = Field(
        default=None, description="library and processor of these measurements, if OpenVINO computed them"
    )


class Parity(_Part):
    """How closely the exported graph agrees with the network in torch."""

    images: Count = Field(description="number of images that were compared")
    batch_sizes: tuple[Count, ...] = Field(description="the images were compared in batches of each of these sizes")
    max_abs_difference_of_probabilities: float = Field(ge=0, description="largest difference of a probability")
    max_abs_difference_of_logits: float = Field(ge=0, description="largest difference of a logit")
    differing_classes: int = Field(ge=0, description="number of images whose predicted class differs")


class Manifest(_Part):
    """The files of an export, the origin of the model, and its accuracy."""

    schema_version: Literal[1] = Field(description="version of this schema")
    model_version: Name = Field(description="recipe, seed and the first digits of the SHA-256 of the weights")
    classes: tuple[ClassName, ...] = Field(min_length=1, description="class names, in the order of the outputs")
    data: Data = Field(default=Data(), description="the data set that the model was trained on")
    libraries: dict[str, str] = Field(default_factory=dict, description="versions of the libraries that exported it")
    variants: dict[Name, Variant] = Field(min_length=1, description="the forms of the model, by name")
    recipe: dict[str, Any] = Field(default_factory=dict, description="all values of the recipe")
    seed: int | None = Field(default=None, description="seed of the run")
    epoch: Count | None = Field(default=None, description="epoch whose weights were exported, counted from 1")
    precision: str | None = Field(default=None, description="precision of the training: fp32 or bf16")
    validation_accuracy: Share | None = Field(
        default=None, description="accuracy on the held-out training images, 0 to 1"
    )
    temperature: float | None = Field(
        default=None, gt=0, description="exports of earlier versions: the graph divides the logits by this number"
    )
    parity: Parity | None = Field(default=None, description="agreement of the fp32 graph with the network in torch")

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: a name occurs twice")
        return self

    @model_validator(mode="after")
    def _check_openvino(self) -> Self:
        for name, variant in self.variants.items():
            if name.startswith(OPENVINO_PREFIX) != (variant.openvino_precision is not None):
                raise ValueError(
                    f"variants: {name}: a name begins with {OPENVINO_PREFIX} if and only if there is openvino_precision"
                )
        return self

    @property
    def chose_epoch(self) -> bool:
        """Whether the validation images chose the epoch whose weights were exported."""
        return bool(self.recipe.get("weights", "best") == "best")

    def variant(self, name: str, *, openvino: bool = False) -> Variant:
        """The entry of one variant.

        Args:
            name: its name, such as fp32, bf16 or int8.
            openvino: whether OpenVINO computes it. Its entries are named openvino-fp32 and so on.

        Raises:
            ManifestError: There is no such variant; the message lists the existing ones.
        """
        prefix = OPENVINO_PREFIX if openvino else ""
        found = {
            key.removeprefix(prefix): variant
            for key, variant in self.variants.items()
            if (variant.openvino_precision is not None) == openvino
        }
        if name in found:
            return found[name]
        names = ", ".join(sorted(found)) or "none"
        if openvino:
            raise ManifestError(
                f"variant '{name}' was not measured with OpenVINO; the variants that were: {names}; measure it, where "
                "the training library is installed, with: python -m cifar_core.measure_openvino --export DIR"
            )
        raise ManifestError(f"there is no variant '{name}'; the variants are: {names}")

    def to_json(self) -> bytes:
        """The content of manifest.json. Optional fields that were not set are left out."""
        return to_json(self.model_dump(mode="json", exclude_unset=True))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the export in a folder.

    Raises:
        ManifestError: The file is missing, cannot be read, is not JSON, or does not follow the schema. The message
            names the file and the first field that is wrong.
    """
    path = folder / FILE_NAME
    try:
        content = read_regular(path)
    except FileNotFoundError as error:
        raise ManifestError(f"{path} does not exist; write an export with: make export") from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from error
    return parse_manifest(content, path)


def read_variant(folder: Path, name: str = "fp32") -> tuple[Path, bytes]:
    """The file of a variant of an export, and its content.

    Args:
        folder: the export.
        name: name of the variant.

    Raises:
        ManifestError: There is no export in the folder, it has no such variant, or the file is missing or damaged.
    """
    manifest = read_manifest(folder)
    try:
        variant = manifest.variant(name)
    except ManifestError as error:
        raise ManifestError(f"{folder / FILE_NAME}: {error}") from error
    path = folder / variant.file
    try:
        content = read_regular(path)
    except OSError as error:
        raise ManifestError(
            f"{path}, which {FILE_NAME} names, cannot be read ({error.strerror}); export the model again"
        ) from error
    if hashlib.sha256(content).hexdigest() != variant.sha256:
        raise ManifestError(
            f"{path} does not have the SHA-256 of {FILE_NAME}, so it is damaged or belongs to another export; export "
            "the model again"
        )
    return path, content


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """The manifest in the content of the file at `path`, which only errors name.

    Raises:
        ManifestError: As for `read_manifest`.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not JSON: {error}; export the model again") from error
    if not isinstance(value, dict):
        raise ManifestError(f"{path} is not a manifest: it must hold a JSON object; export the model again")
    if value.get("schema_version") != SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema_version {value.get('schema_version')!r}; only {SCHEMA_VERSION} is supported: "
            "export the model again"
        )
    try:
        # Strict: a number in quotes is an error and not a number.
        return Manifest.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise ManifestError(f"{path}: {_describe(error)}; export the model again") from error


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of manifest.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}


if __name__ == "__main__":
    sys.stdout.buffer.write(to_json(json_schema()))
