"""Reads inference requests of the Open Inference Protocol over HTTP, and writes their answers.

A body is JSON. With the binary tensor extension, whose header Inference-Header-Content-Length says where the JSON ends,
the elements of tensors follow as bytes.

Source: the Open Inference Protocol's REST form (KServe v2) and Triton's extension for binary tensor data.
"""

import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json, to_json

from service.core import tensors
from service.core.engine import rows_not_finite
from service.core.inference import Answer as Outputs
from service.core.tensors import EXPORT_PARAMETER, IMAGE_SHAPE, INPUT, RequestedOutput
from service.errors import EngineFailed, InvalidRequest, quoted
from service.http.answers import BINARY, Answer, TooLarge

LENGTH_HEADER = "inference-header-content-length"
# Parsing JSON blocks the event loop: for about 20 ms at this size, and 150 ms if the numbers are nested in lists.
MAX_JSON_BYTES = 2 * 2**20
_MAX_INTEGER = 2**63 - 1
# Depths of lists that the message about a wrong shape shows.
_MAX_DEPTH = 8


@dataclass(frozen=True)
class InferRequest:
    """An inference request.

    Attributes:
        identity: Its id; None if it has none.
        images: Number of images.
        timeout: Time limit in microseconds; 0 for none.
        outputs: The outputs to return.
        binary: Whether each of them is returned as bytes.
    """

    identity: str | None
    images: int
    timeout: int
    outputs: list[RequestedOutput]
    binary: list[bool]
    _elements: "bytes | memoryview | list[Any]"

    def pixels(self) -> NDArray[np.uint8]:
        """The images, uint8 [n, 32, 32, 3].

        Raises:
            InvalidRequest: There are more or fewer elements, or they are nested in another shape, or one is not a whole
                number from 0 to 255.
        """
        if not isinstance(self._elements, list):
            return tensors.pixels(self._elements, self.images, "the binary data")
        return tensors.pixels(_bytes_of(self._elements, self.images), self.images, "data")


def parse(body: bytes, headers: Mapping[str, str]) -> InferRequest:
    """Reads an inference request.

    Raises:
        InvalidRequest: It is malformed, or does not fit the model.
        TooLarge: Its JSON is larger than allowed.
        Unsupported: It uses a part of the protocol that this server does not implement.
    """
    head, binary = _split(body, headers.get(LENGTH_HEADER))
    if len(head) > MAX_JSON_BYTES:
        raise TooLarge(
            f"the JSON has {len(head)} bytes; at most {MAX_JSON_BYTES} are allowed: send fewer images, or use the "
            "binary tensor extension"
        )
    try:
        content = from_json(head)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    request = _Fields(content, "the body")
    parameters = _Fields(request.of("parameters", dict, {}), "parameters")
    identity = request.of("id", str, None)
    tensors.check_id(identity or "")
    tensors.check_no_sequence(parameters.values.get("sequence_id"))
    images, elements = _input(request.of("inputs", list, []), binary)
    outputs = [_Fields(output, "an output") for output in request.of("outputs", list, [])[:_CHECKED]]
    all_binary = parameters.of("binary_data_output", bool, False)
    asked, is_binary = _outputs(outputs, all_binary)
    return InferRequest(identity, images, parameters.of("timeout", int, 0), asked, is_binary, elements)


def _split(body: bytes, length: str | None) -> tuple[bytes, memoryview]:
    if length is None:
        return body, memoryview(b"")
    if not (length.isascii() and length.isdecimal() and len(length) <= 10 and int(length) <= len(body)):
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {quoted(length)}; it must be the number of bytes of the JSON at the "
            f"beginning of the body, which has {len(body)} bytes"
        )
    return body[: int(length)], memoryview(body)[int(length) :]


# So many inputs and outputs are looked at. One input is allowed; among more outputs than there are, one stands twice.
_CHECKED = len(tensors.OUTPUTS) + 1


class _Fields:
    """A JSON object, whose members are checked when they are used. `name` is for error messages."""

    def __init__(self, values: object, name: str) -> None:
        if not isinstance(values, dict):
            raise InvalidRequest(f"{name} is {_kind(values)}; it must be a JSON object")
        self.values, self._name = values, name

    def of(self, member: str, kind: type[Any], default: Any) -> Any:  # noqa: ANN401
        """The value of a member, which must be of this type; `default` if it is absent or null."""
        value = self.values.get(member)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidRequest(f"'{member}' of {self._name} is {_kind(value)}; it must be {_KINDS[kind]}")
        if kind is int and abs(value) > _MAX_INTEGER:
            raise InvalidRequest(f"'{member}' of {self._name} does not fit into 64 bits")
        return value


_KINDS: dict[type, str] = {
    dict: "a JSON object", list: "a list", str: "a string", bool: "true or false", int: "a whole number",
    float: "a number", type(None): "null",
}  # fmt: skip


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _input(inputs: Sequence[object], binary: memoryview) -> "tuple[int, bytes | memoryview | list[Any]]":
    """The number of images, and their elements."""
    fields = [_Fields(each, "an input") for each in inputs[:_CHECKED]]
    first = fields[0] if fields else _Fields({}, "an input")
    parameters = _Fields(first.of("parameters", dict, {}), f"parameters of '{INPUT}'")
    shape = first.of("shape", list, [])
    if any(not isinstance(size, int) or isinstance(size, bool) or abs(size) > _MAX_INTEGER for size in shape[:8]):
        raise InvalidRequest(f"'shape' of input '{INPUT}' must be a list of whole numbers that fit into 64 bits")
    names = [each.of("name", str, "") for each in fields] + [""] * (len(inputs) - len(fields))
    images = tensors.check_input(names, first.of("datatype", str, ""), shape, parameters.values)
    size = parameters.of("binary_data_size", int, None)
    data = first.of("data", list, None)
    if size is None:
        if data is None:
            raise InvalidRequest(f"input '{INPUT}' has neither 'data' nor the parameter 'binary_data_size'")
        if len(binary):
            raise InvalidRequest(
                f"{len(binary)} bytes follow the JSON, but input '{INPUT}' has no parameter 'binary_data_size'"
            )
        return images, data
    if data is not None:
        raise InvalidRequest(f"input '{INPUT}' has both 'data' and 'binary_data_size': send one of them")
    if size != len(binary):
        raise InvalidRequest(f"'binary_data_size' is {size}, but {len(binary)} bytes follow the JSON")
    return images, binary


def _outputs(outputs: Sequence[_Fields], all_binary: bool) -> tuple[list[RequestedOutput], list[bool]]:
    """The outputs to return, and for each whether as bytes."""
    asked = []
    is_binary = []
    for output in outputs:
        parameters = _Fields(output.of("parameters", dict, {}), "parameters of an output")
        asked.append((output.of("name", str, ""), parameters.of("classification", int, 0), parameters.values))
        is_binary.append(parameters.of("binary_data", bool, all_binary))
    chosen = tensors.check_outputs(asked)
    return chosen, is_binary or [all_binary] * len(chosen)


def _bytes_of(data: list[Any], images: int) -> bytes:
    """The elements of a list as bytes. It must be flat, or nested as the shape of the input says."""
    shape = [images, *IMAGE_SHAPE]
    flat: Any = data
    if data and isinstance(data[0], list):
        nesting = _nesting(data)
        if nesting != shape:
            raise _other_shape(f"nested as {nesting}", shape)
        for size in shape[1:]:
            if set(map(type, flat)) != {list} or set(map(len, flat)) != {size}:
                raise _other_shape("nested in lists of different lengths", shape)
            flat = list(itertools.chain.from_iterable(flat))
    try:
        elements = bytes(flat)
    except (TypeError, ValueError) as error:
        raise _no_pixels() from error
    # To Python, true is the number 1. Few pixels have one of these values, so looking at those alone is faster.
    if any(type(flat[at]) is bool for at in np.flatnonzero(np.frombuffer(elements, np.uint8) <= 1).tolist()):
        raise _no_pixels()
    return elements


def _no_pixels() -> InvalidRequest:
    return InvalidRequest(f"'data' of input '{INPUT}' holds a value that is not a whole number from 0 to 255")


def _nesting(data: Any) -> list[int]:  # noqa: ANN401 -- any value of JSON
    """The lengths of the first list in each depth."""
    lengths: list[int] = []
    while isinstance(data, list) and len(lengths) < _MAX_DEPTH:
        lengths.append(len(data))
        data = data[0] if data else None
    return lengths


def _other_shape(nested: str, shape: list[int]) -> InvalidRequest:
    return InvalidRequest(
        f"'data' of input '{INPUT}' is {nested}; 'shape' says {shape}: make them agree, or send a flat list"
    )


def answer(request: InferRequest, outputs: Outputs) -> Answer:
    """The answer to a request, each output in the form that the request asks for.

    Raises:
        EngineFailed: JSON cannot hold an output.
    """
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for wanted, binary in zip(request.outputs, request.binary, strict=True):
        values: NDArray[np.float32] = getattr(outputs, wanted.name)
        texts: list[str] = []
        shape = list(values.shape)
        if wanted.classification:
            texts = tensors.classification(values, outputs.model.classes, wanted.classification)
            shape[1] = min(wanted.classification, shape[1])
        output: dict[str, Any] = {
            "name": wanted.name, "datatype": "BYTES" if wanted.classification else "FP32", "shape": shape
        }  # fmt: skip
        if binary:
            raw = _length_prefixed(texts) if wanted.classification else values.astype("<f4", copy=False).tobytes()
            output["parameters"] = {"binary_data_size": len(raw)}
            parts.append(raw)
        else:
            if not wanted.classification:
                _check_finite(wanted.name, values)
            output["data"] = texts if wanted.classification else values.ravel().tolist()
        described.append(output)
    model = outputs.model
    head: dict[str, Any] = {
        "model_name": model.name,
        "model_version": str(model.number),
        "parameters": {EXPORT_PARAMETER: model.version},
        "outputs": described,
    }
    if request.identity is not None:
        head["id"] = request.identity
    body = to_json(head)
    if not parts:
        return Answer(body=body)
    headers = {"inference-header-content-length": str(len(body))}
    return Answer(body=b"".join([body, *parts]), content_type=BINARY, headers=headers)


def _check_finite(name: str, values: NDArray[np.float32]) -> None:
    if rows := rows_not_finite(values):
        raise EngineFailed(
            f"output '{name}' of the image with index {rows[0]} is not finite, which JSON cannot hold: ask for bytes, "
            "with 'binary_data'"
        )


def _length_prefixed(texts: Sequence[str]) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in (each.encode() for each in texts))
