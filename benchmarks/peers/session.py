"""The one onnxruntime session that every Python peer uses: the same graph, the same threads as ours."""

import os

import numpy as np
import onnxruntime


def open_session() -> onnxruntime.InferenceSession:
    """The graph named by MODEL on THREADS threads, which spin as ours do: for a moment between two layers only."""
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
