"""Writes exports for the server to load: small ONNX graphs that follow the contract of the export, with manifests."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

# Some graphs are slow, or fail, on a batch whose first byte is this one.
STALLING = 255
BYTES = 32 * 32 * 3
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def graph(
    seed: int = 0,
    *,
    loops: int = 0,
    fails_on: int | None = None,
    divides: bool = False,
    batch: str | int = "batch",
) -> bytes:
    """A linear classifier with random weights.

    Args:
        seed: Seed of the weights; different seeds give different models.
        loops: Number of extra matrix multiplications, 5 to 15 ms each, for a batch whose first byte is 255.
        fails_on: The computation fails for a batch whose first byte is this value. None: it never fails.
        divides: The outputs of an image are multiplied by its largest value divided by itself: NaN for a black image.
        batch: First dimension of the input; a number fixes the batch size.
    """
    generator = np.random.default_rng(seed)
    weights = (generator.standard_normal((3072, len(CLASSES))) / 20).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["product"]),
    ]
    initializers = [
        numpy_helper.from_array(np.float32(255), "scale"),
        numpy_helper.from_array(np.array([-1, 3072]), "flat"),
        numpy_helper.from_array(weights, "weights"),
    ]
    last = "product"
    if loops or fails_on is not None:
        # `number` is 1 if the batch begins with the byte, else 0.
        initializers += [
            numpy_helper.from_array(np.array([-1]), "all"),
            numpy_helper.from_array(np.int64(0), "at"),
            numpy_helper.from_array(np.uint8(STALLING if fails_on is None else fails_on), "trap"),
        ]
        nodes += [
            helper.make_node("Reshape", ["images", "all"], ["bytes"]),
            helper.make_node("Gather", ["bytes", "at"], ["first"]),
            helper.make_node("Equal", ["first", "trap"], ["trapped"]),
            helper.make_node("Cast", ["trapped"], ["number"], to=TensorProto.INT64),
        ]
    if loops:
        # A loop that onnxruntime cannot remove: it starts from the sum of the images, and its result, times zero, is
        # added to the output.
        initializers += [
            numpy_helper.from_array(np.int64(loops), "loops"),
            numpy_helper.from_array(np.bool_(True), "yes"),
            numpy_helper.from_array((generator.standard_normal((768, 768)) / 25).astype(np.float32), "work"),
            numpy_helper.from_array(np.float32(0), "zero"),
        ]
        matrix = helper.make_tensor_value_info
        body = helper.make_graph(
            [
                helper.make_node("MatMul", ["before", "work"], ["product_inside"]),
                helper.make_node("Tanh", ["product_inside"], ["after"]),
                helper.make_node("Identity", ["go_on"], ["still"]),
            ],
            "body",
            [
                matrix("turn", TensorProto.INT64, []),
                matrix("go_on", TensorProto.BOOL, []),
                matrix("before", TensorProto.FLOAT, [768, 768]),
            ],
            [matrix("still", TensorProto.BOOL, []), matrix("after", TensorProto.FLOAT, [768, 768])],
        )
        nodes += [
            helper.make_node("ReduceSum", ["scaled"], ["total"], keepdims=0),
            helper.make_node("Add", ["work", "total"], ["begin"]),
            helper.make_node("Mul", ["number", "loops"], ["turns"]),
            helper.make_node("Loop", ["turns", "yes", "begin"], ["end"], body=body),
            helper.make_node("Tanh", ["end"], ["bounded"]),
            helper.make_node("ReduceSum", ["bounded"], ["sum"], keepdims=0),
            helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
            helper.make_node("Add", [last, "nothing"], ["slow"]),
        ]
        last = "slow"
    if fails_on is not None:
        # An index that is out of bounds if the batch begins with the byte.
        initializers += [
            numpy_helper.from_array(np.array([1.0], np.float32), "one"),
            numpy_helper.from_array(np.int64(99), "outside"),
        ]
        nodes += [
            helper.make_node("Mul", ["number", "outside"], ["index"]),
            helper.make_node("Gather", ["one", "index"], ["factor"]),
            helper.make_node("Mul", [last, "factor"], ["checked"]),
        ]
        last = "checked"
    if divides:
        initializers += [numpy_helper.from_array(np.array([1]), "second")]
        nodes += [
            helper.make_node("ReduceMax", ["rows", "second"], ["largest"], keepdims=1),
            helper.make_node("Div", ["largest", "largest"], ["quotient"]),
            helper.make_node("Mul", [last, "quotient"], ["divided"]),
        ]
        last = "divided"
    nodes += [
        helper.make_node("Identity", [last], ["logits"]),
        helper.make_node("Softmax", [last], ["probabilities"], axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, len(CLASSES)])
        for name in ("logits", "probabilities")
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 32, 32, 3])
    whole = helper.make_graph(nodes, "linear", [images], outputs, initializers)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def pixels_as_probabilities() -> bytes:
    """An ONNX graph whose probabilities tell every byte of the image.

    It has 3,073 classes. Class i of the first 3,072 has weight 1 + byte i, and the last has weight 1, so that the ratio
    of a probability to the last one is 1 + byte i.
    """
    nodes = [
        helper.make_node("Reshape", ["images", "shape"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["bytes"], to=TensorProto.FLOAT),
        helper.make_node("Pad", ["bytes", "one_column"], ["padded"]),
        helper.make_node("Add", ["padded", "one"], ["weights"]),
        helper.make_node("ReduceSum", ["weights", "classes"], ["total"]),
        helper.make_node("Div", ["weights", "total"], ["probabilities"]),
        helper.make_node("Log", ["weights"], ["logits"]),
    ]
    initializers = {
        "shape": np.array([-1, BYTES]),
        "one_column": np.array([0, 0, 0, 1]),
        "one": np.float32(1),
        "classes": np.array([1]),
    }
    outputs = ("logits", "probabilities")
    graph = helper.make_graph(
        nodes,
        "pixels",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 32, 32, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", BYTES + 1]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def write_export(folder: Path, content: bytes, version: str = "linear-0", **changes: object) -> Path:
    """Writes the folder of an export with this graph, and returns it. `changes` replace keys of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(content)
    manifest = {
        "schema_version": 1,
        "model_version": version,
        "classes": list(CLASSES),
        "variants": {
            "fp32": {
                "file": "model.onnx",
                "sha256": hashlib.sha256(content).hexdigest(),
                "test_accuracy": 0.5,
                "test_images": 100,
            }
        },
        **changes,
    }
    # Last, and by rename: a running server may read the folder at any time.
    temporary = folder / "manifest.json.new"
    temporary.write_text(json.dumps(manifest))
    temporary.replace(folder / "manifest.json")
    return folder


def expected(seed: int, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Probabilities that `graph(seed)` gives for the images, computed with NumPy; float64 [n, 10]."""
    weights = (np.random.default_rng(seed).standard_normal((3072, len(CLASSES))) / 20).astype(np.float32)
    logits = (images.reshape(len(images), -1) / 255.0) @ weights.astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def pictures(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random images, uint8 [count, 32, 32, 3]. None of them begins with the byte 255."""
    return np.random.default_rng(seed).integers(0, 255, (count, 32, 32, 3), np.uint8)


def stalling(count: int) -> NDArray[np.uint8]:
    """Images that each begin with the byte on which some graphs are slow or fail, uint8 [count, 32, 32, 3]."""
    images = pictures(count)
    images[:, 0, 0, 0] = STALLING
    return images
