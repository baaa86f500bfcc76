"""A graph in onnxruntime: providers, threads, warm-up. A batch of images goes in, logits and probabilities come out.

Must never know requests, nor where the graph came from.
"""

import logging
import threading
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cifar_core.images import IMAGE_SIZE
from service.errors import StartError

logger = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

OUTPUTS = ("logits", "probabilities")


class Engine:
    """Computes one graph on one device.

    Args:
        graph: Bytes of an ONNX file with the contract of the export: input `images`, uint8 [batch, 32, 32, 3]; outputs
            `logits` and `probabilities`, float32 [batch, classes].
        device: "cuda" takes CUDA or fails; "auto" takes CUDA where onnxruntime has it and it works, and says in the log
            what it took.
        threads: Of the CPU that compute, the callers' own among them. A batch that is alone has all of them; of those
            that are computed at the same time each but the first has one, so that none waits for another's.

    Raises:
        StartError: The graph cannot be loaded, breaks the contract, or the device asked for is not there.
    """

    def __init__(self, graph: bytes, device: Device = "auto", threads: int = 1) -> None:
        self._session, self.device = _open(graph, device, threads)
        self.classes = _check_contract(self._session)
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.parallel = threads if self.device == "cpu" else 1
        """Batches that it pays to compute at once."""
        self._single = _session(graph, [CPU], 1) if self.parallel > 1 else self._session
        self._computing = 0
        self._lock = threading.Lock()

    def compute(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits and probabilities, each float32 [n, classes], of uint8 images [n, 32, 32, 3]. Safe for threads."""
        with self._lock:
            session = self._single if self._computing else self._session
            self._computing += 1
        try:
            logits, probabilities = session.run(OUTPUTS, {"images": images})
        finally:
            with self._lock:
                self._computing -= 1
        return logits, probabilities

    def warm_up(self, max_batch_size: int) -> None:
        """Computes batches of the sizes between 1 and the largest, so that no request pays for first allocations."""
        sizes = [2**power for power in range(max_batch_size.bit_length()) if 2**power < max_batch_size]
        for session in dict.fromkeys((self._session, self._single)):
            for size in (*sizes, max_batch_size):
                session.run(OUTPUTS, {"images": np.zeros((size, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)})


def _open(graph: bytes, device: Device, threads: int) -> tuple[Any, Literal["cpu", "cuda"]]:
    if device != "cpu":
        if CUDA in onnxruntime.get_available_providers():
            session = _session(graph, [CUDA, CPU], threads)
            # Where CUDA cannot be initialised onnxruntime prints why and goes on with what is left.
            if session.get_providers()[0] == CUDA:
                return session, "cuda"
            problem = (
                "onnxruntime has CUDA but could not initialise it: is there a device, and are CUDA and cuDNN installed?"
            )
        else:
            problem = "this onnxruntime has no CUDA: pip uninstall onnxruntime, pip install onnxruntime-gpu"
        if device == "cuda":
            raise StartError(f"--device cuda: {problem}")
        logger.info("computing on the CPU: %s", problem)
    return _session(graph, [CPU], threads), "cpu"


def _session(graph: bytes, providers: list[str], threads: int) -> Any:  # noqa: ANN401 -- onnxruntime has no types
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # the graph is a chain
    options.log_severity_level = 3
    # Between two layers, to be woken would cost the threads more than to spin for a moment; after a batch, threads that
    # spin take the cores from those that read requests and write answers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # onnxruntime's errors have no common class but this
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
                f"its output '{name}' is {output.type} {output.shape}; it must be tensor(float) ['batch', classes]"
            )
    if outputs["logits"].shape[1] != outputs["probabilities"].shape[1]:
        raise StartError("the graph's outputs 'logits' and 'probabilities' have different numbers of classes")
    return int(outputs["probabilities"].shape[1])
