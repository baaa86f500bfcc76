"""Exports whose graphs are a few bytes, to publish without a model."""

import hashlib

from cifar_core.manifest import Manifest


def manifest_of(files):
    """The manifest of these graphs."""
    variants = {
        file: {"file": file, "sha256": hashlib.sha256(content).hexdigest(), "test_accuracy": 0.5}
        for file, content in files.items()
    }
    return Manifest(schema_version=1, model_version="m", classes=("cat", "dog"), variants=variants)


def export_of(**graphs):
    """The files of an export with these graphs: fp32 is model.onnx, int8 is model.int8.onnx."""
    files = {{"fp32": "model.onnx", "int8": "model.int8.onnx"}[name]: content for name, content in graphs.items()}
    return files | {"manifest.json": manifest_of(files).to_json()}


NEW = export_of(fp32=b"3")
