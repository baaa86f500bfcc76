"""What a run is: `_score.json` of the output as a typed model."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cifar_core.manifest import Name, Sha256
from service.score.rows import Content, Kind

_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]

FORMAT: Literal[2] = 2


class _Section(BaseModel):
    # An unknown field may be an option that affects the result, and that this version cannot keep.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Input(_Section):
    """The input of a run, as the user named it."""

    kind: Kind
    column: str | None
    content: Content
    key: str | None


class ModelUsed(_Section):
    """The model of a run."""

    version: Name
    variant: Name
    sha256: Sha256
    classes: tuple[str, ...] = Field(min_length=1)
    device: Name


class Options(_Section):
    """The options of a run that affect the result."""

    rows_per_part: _Positive
    batch_size: _Positive
    max_image_bytes: _Positive
    max_image_pixels: _Positive
    max_decode_seconds: Annotated[float, Field(gt=0)]


class Run(_Section):
    """What must be the same when a run is continued.

    Attributes:
        format: Version of the layout of the output folder. Parts of format 1 have no checksum.
    """

    format: Literal[2]
    input: Input
    model: ModelUsed
    options: Options

    def difference(self, now: "Run") -> str | None:
        """The first difference between this run and another one, for a person; None if there is none."""
        for part in ("input", "model", "options"):
            before = dict(getattr(self, part))
            for name, value in dict(getattr(now, part)).items():
                if before[name] != value:
                    return f"{part} {name} {before[name]!r}, not {value!r}"
        return None


class Description(Run):
    """The content of `_score.json`.

    Attributes:
        inventory_sha256: SHA-256 of `_inputs.parquet`.
        rows: Number of rows; None while the run is not finished.
        failed_rows: Number of rows that have an error; None while the run is not finished.
    """

    inventory_sha256: Sha256
    rows: _Count | None = None
    failed_rows: _Count | None = None


def read_description(content: bytes) -> Description:
    """The description that `_score.json` holds.

    Raises:
        ValueError: The content is not valid. The message, without the name of the file, says why.
    """
    try:
        return Description.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error
