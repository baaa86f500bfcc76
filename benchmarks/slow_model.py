"""An export whose graph takes about a second for each batch, to measure the server while its engine is busy."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = 10
SIZE = 768
# Multiplications of two matrices of 768 x 768, each 5 to 15 ms on one thread.
LOOPS = 150


def write_slow_export(folder: Path, template: Path) -> None:
    """Writes a slow graph and its manifest.

    Args:
        folder: Where to write.
        template: An export whose manifest is taken over but for the hash, so that it has the form of its checkout.
    """
    content = slow_graph().SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    manifest = json.loads((template / "manifest.json").read_text())
    variant = manifest["variants"]["fp32"]
    manifest["variants"] = {"fp32": {**variant, "file": "model.onnx", "sha256": hashlib.sha256(content).hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def slow_graph() -> onnx.ModelProto:
    """Linear, plus zero times the result of a loop that begins with the images' sum, so that it cannot be left out."""
    generator = np.random.default_rng(0)
    node, matrix = helper.make_node, helper.make_tensor_value_info
    body = helper.make_graph(
        [
            node("MatMul", ["state", "square"], ["product"]),
            node("Tanh", ["product"], ["next_state"]),
            node("Identity", ["condition"], ["next_condition"]),
        ],
        "body",
        [
            matrix("iteration", TensorProto.INT64, []),
            matrix("condition", TensorProto.BOOL, []),
            matrix("state", TensorProto.FLOAT, [SIZE, SIZE]),
        ],
        [matrix("next_condition", TensorProto.BOOL, []), matrix("next_state", TensorProto.FLOAT, [SIZE, SIZE])],
    )
    nodes = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("Flatten", ["pixels"], ["rows"], axis=1),
        node("MatMul", ["rows", "weights"], ["linear"]),
        node("ReduceSum", ["pixels"], ["total"], keepdims=0),
        node("Add", ["square", "total"], ["first_state"]),
        node("Loop", ["loops", "true", "first_state"], ["last_state"], body=body),
        node("ReduceSum", ["last_state"], ["sum"], keepdims=0),
        node("Mul", ["sum", "zero"], ["nothing"]),
        node("Add", ["linear", "nothing"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    initializers = [
        numpy_helper.from_array((generator.standard_normal((3072, CLASSES)) / 5000).astype(np.float32), "weights"),
        numpy_helper.from_array((generator.standard_normal((SIZE, SIZE)) / 25).astype(np.float32), "square"),
        numpy_helper.from_array(np.array(LOOPS, np.int64), "loops"),
        numpy_helper.from_array(np.array(True), "true"),
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
    ]
    outputs = [matrix(name, TensorProto.FLOAT, ["batch", CLASSES]) for name in ("logits", "probabilities")]
    images = matrix("images", TensorProto.UINT8, ["batch", 32, 32, 3])
    graph = helper.make_graph(nodes, "slow", [images], outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model
