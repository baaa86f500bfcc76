"""The onnxruntime session that all Python peers use: the same graph and number of threads as our server."""

import os

import numpy as np
import onnxruntime


def open_session() -> onnxruntime.InferenceSession:
    """Opens the graph $MODEL with $THREADS threads, which spin between two layers only, as those of our server do."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["THREADS"])
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
    for size in (1, 2, 4, 8, 16, 32, 64):
        session.run(["probabilities"], {"images": np.zeros((size, 32, 32, 3), np.uint8)})
    return session
