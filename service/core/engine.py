"""Runs an ONNX graph with onnxruntime: providers, threads, warm-up. A batch goes in, logits and probabilities come out.

Knows neither requests nor where the graph came from.
"""

import logging
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cifar_core import openvino
from cifar_core.int8 import EXACT_INT8, WEIGHT_BITS
from cifar_core.pixels import IMAGE_SIZE
from service.errors import StartError

logger = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda", "openvino"]
UsedDevice = Literal["cpu", "cuda", "openvino"]
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

OUTPUTS = ("logits", "probabilities")
# The error of an image whose row of probabilities is one of `rows_not_finite`.
NOT_FINITE = "the model computes no finite probabilities for this image"


class Engine:
    """Computes one graph on one device.

    Args:
        graph: Content of an ONNX file with the contract of the export: input `images`, uint8 [batch, 32, 32, 3];
            outputs `logits` and `probabilities`, float32 [batch, classes].
        device: "cuda" uses CUDA or fails; "auto" uses CUDA if it works, otherwise the CPU, and logs the choice.
            "openvino" computes on the CPU with OpenVINO or fails.
        threads: Number of intra-op threads. A batch running alone uses all of them; while several batches run at once,
            each extra batch uses one thread so that batches do not contend.
        precision: OpenVINO only: precision of the operations that are not in int8.
        weight_bits: Bits of the weights of an int8 graph; with more than 7, onnxruntime must not use the instructions
            that overflow on processors without VNNI.

    Raises:
        StartError: The graph cannot be loaded, breaks the contract, or the requested device is not available.
    """

    def __init__(
        self,
        graph: bytes,
        device: Device = "auto",
        threads: int = 1,
        precision: openvino.Precision = "fp32",
        weight_bits: int = 8,
    ) -> None:
        self.device: UsedDevice
        if device == "openvino":
            self.device = device
            try:
                self._session = openvino.open_session(graph, threads, 1, precision)
                parallel = threads > 1
                self._single = openvino.open_session(graph, threads, threads, precision) if parallel else self._session
            except openvino.OpenVinoError as error:
                raise StartError(f"--device openvino: {error}") from error
        else:
            exact = weight_bits > WEIGHT_BITS
            self._session, self.device = _open(graph, device, threads, exact)
            parallel = threads > 1 and self.device == "cpu"
            self._single = _session(graph, [CPU], 1, exact) if parallel else self._session
        self.classes = _check_contract(self._session)
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.parallel = 1 if self.device == "cuda" else threads
        """Number of batches worth computing at once."""

    def compute(self, images: NDArray[np.uint8], *, alone: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits and probabilities, each float32 [n, classes], of uint8 images [n, 32, 32, 3]. Thread-safe.

        Args:
            images: The batch.
            alone: Whether this batch uses all threads; otherwise it uses one.
        """
        session = self._session if alone else self._single
        logits, probabilities = session.run(OUTPUTS, {"images": images})
        return logits, probabilities

    def warm_up(self, max_batch_size: int) -> None:
        """Computes batches of the sizes that are slower at first, and one of the largest, which shows that it fits.

        CUDA chooses its algorithms for each size, so all powers of two are computed. On the CPU the first batch of a
        size takes no longer than the next ones, so the session for batches beside others computes one image.
        """
        smaller = [2**power for power in range(max_batch_size.bit_length()) if 2**power < max_batch_size]
        sizes = {self._single: [1], self._session: [*(smaller if self.device == "cuda" else []), max_batch_size]}
        for session, batch_sizes in sizes.items():
            for size in batch_sizes:
                session.run(OUTPUTS, {"images": np.zeros((size, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)})


def rows_not_finite(outputs: NDArray[np.float32]) -> list[int]:
    """Rows of outputs, float32 [n, classes], that hold NaN or infinity, for example after a division by zero."""
    finite = np.isfinite(outputs)
    if finite.all():  # much faster than looking at each row
        return []
    rows: list[int] = np.flatnonzero(~finite.all(axis=1)).tolist()
    return rows


def _open(
    graph: bytes, device: Literal["auto", "cpu", "cuda"], threads: int, exact: bool
) -> tuple[Any, Literal["cpu", "cuda"]]:
    if device != "cpu":
        if CUDA in onnxruntime.get_available_providers():
            session = _session(graph, [CUDA, CPU], threads, exact)
            # If CUDA cannot be initialised, onnxruntime prints the reason and uses the other providers.
            if session.get_providers()[0] == CUDA:
                return session, "cuda"
            problem = (
                "onnxruntime has CUDA but could not initialise it: is there a device, and are CUDA and cuDNN installed?"
            )
        else:
            problem = (
                "this onnxruntime has no CUDA: pip uninstall onnxruntime onnxruntime-openvino, "
                "pip install onnxruntime-gpu"
            )
        if device == "cuda":
            raise StartError(f"--device cuda: {problem}")
        logger.info("computing on the CPU: %s", problem)
    return _session(graph, [CPU], threads, exact), "cpu"


def _session(graph: bytes, providers: list[str], threads: int, exact: bool) -> Any:  # noqa: ANN401 -- onnxruntime has no types
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # the graph is a chain
    options.log_severity_level = 3
    # Between two layers it is cheaper for a thread to spin briefly than to sleep and be woken. After a batch, spinning
    # threads would take CPU time from the threads that read requests and write answers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(EXACT_INT8, str(int(exact)))
    options.add_session_config_entry(*openvino.NO_OTHER_FILES)
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # onnxruntime's errors share no other base class
        raise StartError(f"onnxruntime cannot load the graph: {' '.join(str(error).split())}") from error
    session.disable_fallback()
    return session


def _check_contract(session: Any) -> int:  # noqa: ANN401
    inputs = {argument.name: argument for argument in session.get_inputs()}
    outputs = {argument.name: argument for argument in session.get_outputs()}
    images = inputs.get("images")
    if len(inputs) != 1 or images is None:
        raise StartError(f"the graph's inputs are {sorted(inputs)}; there must be one, 'images'")
    if (
        images.type != "tensor(uint8)"
        or images.shape[1:] != [IMAGE_SIZE, IMAGE_SIZE, 3]
        or isinstance(images.shape[0], int)
    ):
        raise StartError(
            f"the graph's input is {images.type} {images.shape}; "
            f"it must be tensor(uint8) ['batch', {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
        )
    for name in OUTPUTS:
        output = outputs.get(name)
        if output is None:
            raise StartError(f"the graph's outputs are {sorted(outputs)}; '{name}' is missing")
        if output.type != "tensor(float)" or len(output.shape) != 2 or not isinstance(output.shape[1], int):
            raise StartError(
                f"the graph's output '{name}' is {output.type} {output.shape}; "
                "it must be tensor(float) ['batch', classes]"
            )
    if outputs["logits"].shape[1] != outputs["probabilities"].shape[1]:
        raise StartError("the graph's outputs 'logits' and 'probabilities' have different numbers of classes")
    return int(outputs["probabilities"].shape[1])
