"""Sessions of onnxruntime that compute on the CPU with OpenVINO, in fp32 or bf16; to measure a model and to serve it.

OpenVINO uses the matrix units of newer processors (AMX, AVX-512 BF16), for bf16 and for int8. A session computes the
whole graph with OpenVINO, or cannot be opened: no part of it is left to another provider silently. Must not import
torch.
"""

import json
import os
from typing import Any, Literal

from cifar_core.errors import CifarError
from cifar_core.int8 import WEIGHT_BITS
from cifar_core.processor import has_bf16, has_int8_products

PROVIDER = "OpenVINOExecutionProvider"
Precision = Literal["fp32", "bf16"]

NO_OTHER_FILES = ("session.model_external_initializers_file_folder_path", os.devnull)
"""Option of onnxruntime's sessions: a graph cannot load weights from further files, which no digest covers."""

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoError(CifarError):
    """OpenVINO is not installed, or cannot compute a graph on this machine as asked."""


def check_weight_bits(weight_bits: int) -> None:
    """Raises OpenVinoError if OpenVINO loses accuracy with int8 weights of so many bits on this processor."""
    if weight_bits > WEIGHT_BITS and not has_int8_products():
        raise OpenVinoError(
            f"the int8 weights have {weight_bits} bits, and on this processor, which has neither VNNI nor AMX as far "
            "as the system says, sums of their products overflow: use --device cpu, or, where the training library is "
            f"installed, quantise the model anew, to {WEIGHT_BITS} bits, with: python -m cifar_core.requantise "
            "--export DIR, and measure it: python -m cifar_core.measure_openvino --export DIR"
        )


def open_session(graph: bytes, threads: int, streams: int, precision: Precision) -> Any:  # noqa: ANN401 (onnxruntime has no types)
    """Opens a session.

    Args:
        graph: Content of an ONNX file.
        threads: Number of threads in all.
        streams: Number of batches that are computed at a time, each with its share of the threads.
        precision: Precision of the operations that are not in int8.

    Raises:
        OpenVinoError: This onnxruntime has no OpenVINO, the processor does not compute in this precision, or the graph
            cannot be loaded.
    """
    try:
        import onnxruntime  # here, because training imports this module and does not need it
    except ModuleNotFoundError as error:
        raise OpenVinoError("onnxruntime is not installed: pip install onnxruntime-openvino") from error

    if PROVIDER not in onnxruntime.get_available_providers():
        raise OpenVinoError(
            "this onnxruntime has no OpenVINO: pip uninstall onnxruntime onnxruntime-gpu, "
            "pip install onnxruntime-openvino"
        )
    if precision == "bf16" and not has_bf16():
        raise OpenVinoError(
            "this processor does not compute in bf16 (it has neither avx512_bf16 nor amx_bf16): use --variant fp32 or "
            "int8"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry(*NO_OTHER_FILES)
    properties = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": str(streams),
        "ENABLE_CPU_PINNING": "NO",  # several workers would be bound to the same cores
        # Number of compiled operations that each stream keeps, of each kind. With batches of up to 256 images, a stream
        # would otherwise grow by 400 MiB.
        "CPU_RUNTIME_CACHE_CAPACITY": "512",
    }
    provider = (PROVIDER, {"device_type": "CPU", "load_config": json.dumps({"CPU": properties})})
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=[provider])
    except Exception as error:  # onnxruntime's errors share no other base class
        raise OpenVinoError(f"OpenVINO cannot load the graph: {' '.join(str(error).split())}") from error
    if session.get_providers()[0] != PROVIDER:
        raise OpenVinoError("onnxruntime could not initialise OpenVINO, and printed the reason")
    session.disable_fallback()
    return session
