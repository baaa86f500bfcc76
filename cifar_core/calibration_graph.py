"""The calibration as operators of an ONNX graph, between the logits and the softmax."""

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cifar_core.calibration import ENTROPY_FLOOR, FORMS, SCALE_RANGE, Calibration


def add_calibration(graph: bytes, calibration: Calibration) -> bytes:
    """Adds the output `probabilities` to a graph: softmax(scale * logits).

    Args:
        graph: the content of an ONNX file with the output `logits`, float32 [batch, classes].
        calibration: gives the scale of each image.

    Returns:
        The content of a file with the outputs `logits` and `probabilities`.
    """
    model = onnx.load_from_string(graph)
    constants: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32 | np.int64]]] = {
        f"calibration.{power}": np.asarray(value, np.float32) for power, value in enumerate(calibration.coefficients)
    }
    measure = FORMS[calibration.form][0]
    nodes: list[onnx.NodeProto] = []
    if len(calibration.coefficients) > 1:
        nodes, measured_constants = _gap_nodes() if measure == "gap" else _log_entropy_nodes()
        constants |= measured_constants
    nodes += _scale_nodes(len(calibration.coefficients))
    constants["calibration.least"], constants["calibration.greatest"] = (np.asarray(v, np.float32) for v in SCALE_RANGE)
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    (logits,) = (value for value in model.graph.output if value.name == "logits")
    probabilities = onnx.ValueInfoProto()
    probabilities.CopyFrom(logits)
    probabilities.name = "probabilities"
    model.graph.output.append(probabilities)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def without_calibration(graph: bytes) -> bytes:
    """The graph of an export up to its logits, its only output.

    Args:
        graph: the content of an ONNX file with the outputs `logits` and `probabilities`.
    """
    model = onnx.load_from_string(graph)
    made_by = {output: node for node in model.graph.node for output in node.output}
    needed, missing = set(), ["logits"]
    while missing:
        name = missing.pop()
        if name not in needed:
            needed.add(name)
            missing += made_by[name].input if name in made_by else ()
    parts: list[Any] = [model.graph.node, model.graph.initializer, model.graph.output, model.graph.value_info]
    for values in parts:
        kept = [value for value in values if needed.intersection(getattr(value, "output", [value.name]))]
        del values[:]
        values.extend(kept)
    return bytes(model.SerializeToString(deterministic=True))


Nodes = tuple[list[onnx.NodeProto], dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32 | np.int64]]]]


def _node(operator: str, inputs: list[str], output: str, **attributes: int) -> onnx.NodeProto:
    names = [output] if operator != "TopK" else [output, f"{output}.classes"]
    node = helper.make_node(operator, inputs, names, name=output)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    return node


def _gap_nodes() -> Nodes:
    """`calibration.measure`: the largest logit minus the second largest, float32 [batch, 1]."""
    nodes = [
        _node("TopK", ["logits", "calibration.two"], "calibration.largest", axis=1),
        _node("MatMul", ["calibration.largest", "calibration.difference"], "calibration.measure"),
    ]
    constants = {
        "calibration.two": np.asarray([2], np.int64),
        "calibration.difference": np.asarray([[1], [-1]], np.float32),
    }
    return nodes, constants  # type: ignore[return-value]


def _log_entropy_nodes() -> Nodes:
    """`calibration.measure`: the logarithm of the entropy of softmax(logits), float32 [batch, 1]."""
    nodes = [
        _node("Softmax", ["logits"], "calibration.softmax", axis=1),
        _node("LogSoftmax", ["logits"], "calibration.log_softmax", axis=1),
        _node("Mul", ["calibration.softmax", "calibration.log_softmax"], "calibration.products"),
        _node("ReduceSum", ["calibration.products", "calibration.class_axis"], "calibration.sum", keepdims=1),
        _node("Sub", ["calibration.floor", "calibration.sum"], "calibration.entropy"),
        _node("Log", ["calibration.entropy"], "calibration.measure"),
    ]
    constants = {
        "calibration.class_axis": np.asarray([1], np.int64),
        "calibration.floor": np.asarray(ENTROPY_FLOOR, np.float32),
    }
    return nodes, constants  # type: ignore[return-value]


def _scale_nodes(coefficients: int) -> list[onnx.NodeProto]:
    """The polynomial of the measure by Horner's method, softplus, the limits, and the softmax."""
    nodes, value = [], f"calibration.{coefficients - 1}"
    for power in range(coefficients - 2, -1, -1):
        product, total = f"calibration.product{power}", f"calibration.total{power}"
        nodes.append(_node("Mul", [value, "calibration.measure"], product))
        nodes.append(_node("Add", [product, f"calibration.{power}"], total))
        value = total
    return [
        *nodes,
        _node("Softplus", [value], "calibration.softplus"),
        _node("Clip", ["calibration.softplus", "calibration.least", "calibration.greatest"], "calibration.scale"),
        _node("Mul", ["logits", "calibration.scale"], "calibration.scaled"),
        _node("Softmax", ["calibration.scaled"], "probabilities", axis=1),
    ]
