"""The types of columns that can hold images, and the images of a column."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cifar_core.pixels import IMAGE_BYTES, IMAGE_SIZE, ImageRejected
from service.core.fair_queue import Decoded
from service.score.errors import ScoreError
from service.score.rows import Content

_NO_VALUE = "the value is null"
_LISTS = (
    pa.ListScalar,
    pa.LargeListScalar,
    pa.FixedSizeListScalar,
    pa.ListViewScalar,
    pa.LargeListViewScalar,
)


def image_column(schema: pa.Schema, path: Path) -> str:
    """Name of the only column that can hold images.

    A binary of a fixed size other than 3,072 is usually an identifier or a hash. It counts only if there is no other
    column.

    Raises:
        ScoreError: There is none, or more than one.
    """
    fields = [field for field in schema if _is_files(field.type) or _is_pixels(field.type)]
    likely = [field for field in fields if _is_pixels(field.type) or not pa.types.is_fixed_size_binary(field.type)]
    columns = [field.name for field in likely or fields]
    if len(set(columns)) == 1:
        return str(columns[0])
    if not columns:
        described = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ScoreError(
            f"{path}: no column can hold images, which are binary, uint8 lists of {IMAGE_BYTES}, or structs with a "
            f"field 'bytes'; the columns are: {described}"
        )
    raise ScoreError(f"{path}: choose the column with the images with --column: {', '.join(columns)}")


def holds_pixels(name: str, kind: pa.DataType, content: Content) -> bool:
    """Whether a column holds raw pixels, and not image files.

    Args:
        name: Name of the column.
        kind: Its type.
        content: What the user says. "auto": lists of uint8 and binaries of the fixed size 3,072 are pixels.

    Raises:
        ScoreError: The column cannot hold what the user says.
    """
    if content != "files" and (_is_pixels(kind) or (content == "pixels" and _is_bytes(kind))):
        return True
    if content != "pixels" and _is_files(kind):
        return False
    wanted = "images" if content == "auto" else content
    raise ScoreError(f"column '{name}' is of type {kind}, which cannot hold {wanted}")


def pixels_of(column: pa.Array) -> NDArray[np.uint8] | list[Decoded]:
    """The images of a column of raw pixels: uint8 [n, 32, 32, 3], or per row the image or why there is none."""
    buffer = _contiguous(column)
    if buffer is not None:
        return buffer.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)
    return [_image(value) for value in column]


def _contiguous(column: pa.Array) -> NDArray[np.uint8] | None:
    """All bytes of a column, without a copy; None unless each row holds an image."""
    if column.null_count:
        return None
    kind, count = column.type, len(column)
    # Views are not cast to lists, as pyarrow 26 makes invalid ones of views that do not begin at their first value.
    if pa.types.is_fixed_size_binary(kind) and kind.byte_width == IMAGE_BYTES:
        values = np.frombuffer(column.buffers()[1], np.uint8)
        return values[column.offset * IMAGE_BYTES : (column.offset + count) * IMAGE_BYTES]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        width = np.int32 if pa.types.is_binary(kind) else np.int64
        offsets = np.frombuffer(column.buffers()[1], width)[column.offset : column.offset + count + 1]
        values = np.frombuffer(column.buffers()[2] or b"", np.uint8)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = column.offsets.to_numpy()
        if column.values.null_count:
            return None
        values = column.values.to_numpy()
    elif pa.types.is_fixed_size_list(kind) and kind.list_size == IMAGE_BYTES:
        values = column.flatten()
        return None if values.null_count else values.to_numpy()
    else:
        return None
    return values[offsets[0] : offsets[-1]] if (np.diff(offsets) == IMAGE_BYTES).all() else None


def _image(value: pa.Scalar) -> Decoded:
    if not value.is_valid:
        return ImageRejected(_NO_VALUE)
    if isinstance(value, _LISTS):
        if value.values.null_count:
            return ImageRejected("a pixel is null")
        pixels = value.values.to_numpy()
    else:
        pixels = np.frombuffer(value.as_py(), np.uint8)
    if len(pixels) != IMAGE_BYTES:
        return ImageRejected(
            f"the value has {len(pixels)} bytes; it must have {IMAGE_BYTES}: {IMAGE_SIZE} rows of {IMAGE_SIZE} pixels "
            "of 3 bytes"
        )
    image: NDArray[np.uint8] = pixels.reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
    return image


def files_of(column: pa.Array) -> Sequence[bytes | ImageRejected]:
    """The image files of a column, or per row the reason why there is none."""
    values = column.to_pylist()
    if pa.types.is_struct(column.type):
        values = [value and value["bytes"] for value in values]
    return [ImageRejected(_NO_VALUE) if value is None else value for value in values]


def _is_pixels(kind: pa.DataType) -> bool:
    if pa.types.is_fixed_size_binary(kind):
        return bool(kind.byte_width == IMAGE_BYTES)
    types = pa.types
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(is_list(kind) for is_list in lists) and bool(types.is_uint8(kind.value_type))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_files(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return _is_bytes(kind) or bool(pa.types.is_fixed_size_binary(kind))
