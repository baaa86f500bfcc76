"""The calibration as operators of an ONNX graph, between the logits and the softmax."""

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cifar_core.calibration import ENTROPY_FLOOR, FORMS, SCALE_RANGE, Calibration, Doubles


def add_calibration(graph: bytes, calibration: Calibration) -> bytes:
    """Adds the output `probabilities` to a graph: the softmax of the scaled logits.

    Args:
        graph: the content of an ONNX file with the output `logits`, float32 [batch, classes].
        calibration: gives the scales of each image.

    Returns:
        The content of a file with the outputs `logits` and `probabilities`.
    """
    model = onnx.load_from_string(graph)
    nodes: list[onnx.NodeProto] = []
    constants: Constants = {}
    if len(calibration.coefficients) > 1:
        gap = FORMS[calibration.form].measure == "gap"
        nodes, constants = _gap_nodes() if gap else _log_entropy_nodes()
    first, *rest = calibration.polynomials()
    scales, scale_constants = _scale_nodes("calibration.", first)
    nodes, constants = nodes + scales, constants | scale_constants
    if rest:
        scales, scale_constants = _scale_nodes("calibration.rest.", rest[0])
        combined, combined_constants = _two_scales_nodes()
        nodes, constants = nodes + scales + combined, constants | scale_constants | combined_constants
    else:
        nodes.append(_node("Mul", ["logits", "calibration.scale"], "calibration.scaled"))
    nodes.append(_node("Softmax", ["calibration.scaled"], "probabilities", axis=1))
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


Constants = dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32 | np.int64]]]
Nodes = tuple[list[onnx.NodeProto], Constants]


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


def _scale_nodes(prefix: str, polynomial: Doubles) -> Nodes:
    """`<prefix>scale`: the polynomial of the measure by Horner's method, softplus and the limits."""
    nodes, value = [], f"{prefix}{len(polynomial) - 1}"
    for power in range(len(polynomial) - 2, -1, -1):
        product, total = f"{prefix}product{power}", f"{prefix}total{power}"
        nodes.append(_node("Mul", [value, "calibration.measure"], product))
        nodes.append(_node("Add", [product, f"{prefix}{power}"], total))
        value = total
    nodes += [
        _node("Softplus", [value], f"{prefix}softplus"),
        _node("Clip", [f"{prefix}softplus", "calibration.least", "calibration.greatest"], f"{prefix}scale"),
    ]
    constants = {f"{prefix}{power}": np.asarray(value, np.float32) for power, value in enumerate(polynomial)}
    return nodes, constants  # type: ignore[return-value]


def _two_scales_nodes() -> Nodes:
    """`calibration.scaled`: the logits minus the second largest, the largest and the rest each times a scale."""
    nodes = [
        _node("MatMul", ["calibration.largest", "calibration.take_second"], "calibration.second"),
        _node("Sub", ["logits", "calibration.second"], "calibration.above_second"),
        _node("Relu", ["calibration.above_second"], "calibration.top"),
        _node("Sub", ["calibration.above_second", "calibration.top"], "calibration.others"),
        _node("Mul", ["calibration.top", "calibration.scale"], "calibration.scaled_top"),
        _node("Mul", ["calibration.others", "calibration.rest.scale"], "calibration.scaled_others"),
        _node("Add", ["calibration.scaled_top", "calibration.scaled_others"], "calibration.scaled"),
    ]
    return nodes, {"calibration.take_second": np.asarray([[0], [1]], np.float32)}
