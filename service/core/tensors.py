"""The model's tensors in the Open Inference Protocol: what a request may ask for, in the words of no transport.

gRPC and HTTP read the same names, shapes and parameters from messages of different forms. What they mean, which of them
are allowed, and the messages of errors are here.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cifar_core.pixels import IMAGE_BYTES, IMAGE_SIZE
from service.core.model_store import Model
from service.errors import InvalidRequest, NotFound, Unsupported, quoted

SERVER_NAME = "cifar-classifier"
EXTENSIONS = ("classification", "model_configuration", "statistics")
PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
INPUT = "images"
INPUT_TYPE = "UINT8"
IMAGE_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
OUTPUTS = ("logits", "probabilities")
# Name of the parameter of metadata and answers whose value is the export's own name.
EXPORT_PARAMETER = "export"
# A request holds its id until it is answered.
MAX_ID_CHARACTERS = 1024


@dataclass(frozen=True)
class RequestedOutput:
    """An output that a request asks for.

    Attributes:
        name: "logits" or "probabilities".
        classification: Number of classes to name, the largest value first; 0 for the plain tensor.
    """

    name: str
    classification: int = 0


def check_model(model: Model, name: str, version: str) -> Model:
    """The model that is served, if a request means it.

    Args:
        model: The model that is served.
        name: The name in the request.
        version: The version in the request; empty for any.

    Raises:
        NotFound: Another model or version is meant.
    """
    if name != model.name:
        raise NotFound(f"there is no model {quoted(name)}; the model is '{model.name}'")
    if version and version != str(model.number):
        raise NotFound(f"model '{name}' has no version {quoted(version)}; version '{model.number}' is served")
    return model


def check_id(identity: str) -> None:
    """Accepts the id of a request.

    Raises:
        InvalidRequest: It is too long.
    """
    if len(identity) > MAX_ID_CHARACTERS:
        raise InvalidRequest(f"id has {len(identity)} characters; at most {MAX_ID_CHARACTERS} are allowed")


def check_input(names: Sequence[str], datatype: str, shape: Sequence[int], parameters: Iterable[str]) -> int:
    """The number of images in a request.

    Args:
        names: Names of all inputs of the request.
        datatype: Type of the first.
        shape: Shape of the first.
        parameters: Names of the parameters of the first.

    Raises:
        InvalidRequest: There is not exactly one input, or it is not uint8 [n, 32, 32, 3].
        Unsupported: Its elements are in shared memory.
    """
    if len(names) != 1 or names[0] != INPUT:
        listed = ", ".join(quoted(name) for name in names[:3])
        raise InvalidRequest(f"there are {len(names)} inputs ({listed}); there must be one, '{INPUT}'")
    if datatype != INPUT_TYPE:
        raise InvalidRequest(f"input '{INPUT}' is of type {quoted(datatype)}; it must be {INPUT_TYPE}")
    if len(shape) != 4 or tuple(shape[1:]) != IMAGE_SHAPE or shape[0] < 0:
        raise InvalidRequest(
            f"input '{INPUT}' has shape {list(shape[:8])}; it must be [n, {IMAGE_SIZE}, {IMAGE_SIZE}, 3], channels last"
        )
    if any(name.startswith("shared_memory") for name in parameters):
        raise Unsupported("shared memory is not supported: send the elements in the request")
    return shape[0]


def pixels(raw: bytes | memoryview, images: int, where: str) -> NDArray[np.uint8]:
    """The elements of the input, uint8 [images, 32, 32, 3], of their bytes; a view.

    Raises:
        InvalidRequest: There are more or fewer bytes. `where` says which field holds them.
    """
    size = images * IMAGE_BYTES
    if len(raw) != size:
        raise InvalidRequest(f"{where} holds {len(raw)} bytes; shape {[images, *IMAGE_SHAPE]} needs {size}")
    return np.frombuffer(raw, np.uint8).reshape(images, *IMAGE_SHAPE)


def check_outputs(requested: Sequence[tuple[str, int, Iterable[str]]]) -> list[RequestedOutput]:
    """The outputs to return; both if the request names none.

    Args:
        requested: For each output its name, its parameter "classification" (0 without it), and the names of all its
            parameters.

    Raises:
        InvalidRequest: An output does not exist or is requested twice, or its classification is negative.
        Unsupported: An output is to be written to shared memory.
    """
    chosen: list[RequestedOutput] = []
    for name, classification, parameters in requested:
        if name not in OUTPUTS:
            raise InvalidRequest(f"there is no output {quoted(name)}; the outputs are {', '.join(OUTPUTS)}")
        if name in (output.name for output in chosen):
            raise InvalidRequest(f"output '{name}' is requested twice")
        if any(parameter.startswith("shared_memory") for parameter in parameters):
            raise Unsupported("shared memory is not supported: outputs come in the answer")
        if classification < 0:
            raise InvalidRequest(f"'classification' of output '{name}' is {classification}; it must not be negative")
        chosen.append(RequestedOutput(name, classification))
    return chosen or [RequestedOutput(name) for name in OUTPUTS]


def check_no_sequence(sequence_id: object) -> None:
    """Accepts a request that belongs to no sequence.

    Raises:
        Unsupported: It belongs to one.
    """
    if sequence_id:
        raise Unsupported("the model keeps no state between requests: send no sequence_id")


def earlier_deadline(timeout: int, deadline: float | None) -> float | None:
    """The earlier of a deadline on time.monotonic() and the parameter "timeout" of a request.

    Args:
        timeout: Microseconds; 0 for no timeout, as Triton's clients send it.
        deadline: The deadline of the call; None for none.

    Raises:
        InvalidRequest: The timeout is negative.
    """
    if timeout < 0:
        raise InvalidRequest(f"parameter 'timeout' is {timeout} microseconds; it must not be negative")
    if timeout == 0:
        return deadline
    own = time.monotonic() + timeout / 1e6
    return own if deadline is None else min(own, deadline)


def classification(values: NDArray[np.float32], classes: Sequence[str], count: int) -> list[str]:
    """The `count` largest values of each row in Triton's form, "value:index:label".

    Args:
        values: float32 [n, classes].
        classes: Names of the classes.
        count: Number of values of each row; all, if there are fewer.
    """
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return [
        f"{values[row, index]:f}:{index}:{classes[index]}"
        for row, indices in enumerate(order.tolist())
        for index in indices
    ]
