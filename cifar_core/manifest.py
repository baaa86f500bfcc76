"""The manifest of an export, `manifest.json`, as one typed model. The export writes it and the server reads it.

Must not import torch: the server starts without it. `python -m cifar_core.manifest` prints the JSON Schema that
docs/manifest.schema.json holds.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cifar_core.errors import CifarError

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^(?!\.{1,2}$)[^/\\\0]+$")]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, StringConstraints(min_length=1)]


class ManifestError(CifarError):
    """A manifest that is missing, is not JSON, or does not follow the schema."""


class _Part(BaseModel):
    # Fields of later versions are kept, not refused: an older server can serve a newer export.
    model_config = ConfigDict(extra="allow", frozen=True)


class Data(_Part):
    """The data set that the model was trained on."""

    kind: str = Field("", description="cifar10 (the official archive), folder or synthetic")
    name: str = Field("", description="name for tables; never a path")
    fingerprint: str = Field("", description="SHA-256 over class names, images and labels, in hexadecimal")


class Variant(_Part):
    """One form of the model, such as fp32 or int8, with what was measured for it on the test images."""

    file: FileName = Field(description="name of the ONNX file, in the same folder as the manifest")
    sha256: Sha256 = Field(description="SHA-256 of the file, in hexadecimal")
    test_accuracy: Share = Field(description="share of the test images classified correctly, 0 to 1")
    test_images: int | None = Field(None, ge=1, description="number of test images")
    test_loss: float | None = Field(None, description="mean cross-entropy on the test images, in nats")
    test_loss_before: float | None = Field(None, description="the same without the temperature")
    test_ece: float | None = Field(None, description="expected calibration error on the test images, 15 bins, 0 to 1")
    test_ece_before: float | None = Field(None, description="the same without the temperature")
    calibration_images: int | None = Field(None, ge=1, description="int8 only: training images used to set the ranges")


class Parity(_Part):
    """How closely the exported graph agrees with the network in torch."""

    images: int = Field(ge=1, description="number of images compared")
    batch_sizes: tuple[int, ...] = Field(description="each image was computed in batches of each of these sizes")
    max_abs_difference_of_probabilities: float = Field(ge=0, description="largest difference of a probability")
    max_abs_difference_of_logits: float = Field(ge=0, description="largest difference of a logit")
    differing_classes: int = Field(ge=0, description="number of images whose predicted class differs")


class Manifest(_Part):
    """What an export consists of, where it comes from, and how good it is."""

    schema_version: Literal[1] = Field(description="version of this schema")
    model_version: Name = Field(description="recipe, seed and the beginning of a digest of the weights")
    classes: tuple[Name, ...] = Field(min_length=1, description="class names, in the order of the outputs")
    variants: dict[Name, Variant] = Field(min_length=1, description="the forms of the model, by name")
    data: Data = Field(default_factory=Data, description="the data set that the model was trained on")
    libraries: dict[str, str] = Field(default_factory=dict, description="versions of the libraries that exported it")
    recipe: dict[str, Any] = Field(default_factory=dict, description="all values of the recipe")
    seed: int | None = Field(None, description="seed of the run")
    epoch: int | None = Field(None, description="epoch whose weights were exported")
    precision: str | None = Field(None, description="precision of the training: fp32 or bf16")
    validation_accuracy: Share | None = Field(None, description="accuracy on the held-out training images, 0 to 1")
    temperature: float | None = Field(None, gt=0, description="the graph divides the logits by this before the softmax")
    parity: Parity | None = Field(None, description="agreement of the graph with torch")

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: a name occurs twice")
        return self

    def variant(self, name: str) -> Variant:
        """The entry of one variant.

        Raises:
            ManifestError: There is no such variant; the message lists those that there are.
        """
        try:
            return self.variants[name]
        except KeyError:
            raise ManifestError(
                f"there is no variant '{name}'; there are: {', '.join(sorted(self.variants))}"
            ) from None

    def to_json(self) -> bytes:
        """The content of manifest.json. Optional fields that are not set are left out."""
        value = self.model_dump(mode="json", exclude_unset=True)
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the export in a folder.

    Raises:
        ManifestError: It is missing, cannot be read, is not JSON, or does not follow the schema. The message names the
            file and the first field that is wrong.
    """
    path = folder / FILE_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ManifestError(f"{path} does not exist; write an export with: make export") from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from error
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ManifestError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ManifestError(f"{path} is not a manifest: it holds no JSON object")
    if value.get("schema_version") != SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema_version {value.get('schema_version')!r}; this version reads {SCHEMA_VERSION}: "
            "export the model again"
        )
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        raise ManifestError(f"{path}: {_describe(error)}; export the model again") from error


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of manifest.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}


if __name__ == "__main__":
    json.dump(json_schema(), sys.stdout, indent=2)
    print()
