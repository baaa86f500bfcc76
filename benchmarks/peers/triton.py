"""Starts NVIDIA's Triton Inference Server with its Python backend, from the package nvidia-pytriton.

Dynamic batching has no delay, as the documentation recommends for low latency. One instance has all threads of
onnxruntime. HTTP is off. It needs nvidia-pytriton 0.5.14, NumPy below 2 and Debian's build of Python.
"""

import os

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from session import open_session

session = open_session()


@batch
def infer(images: np.ndarray) -> list[np.ndarray]:
    """Probabilities of a batch, float32 [n, 10]."""
    return session.run(["probabilities"], {"images": images})


config = TritonConfig(
    grpc_address="127.0.0.1", grpc_port=int(os.environ["PORT"]), allow_http=False, allow_metrics=False, log_verbose=0
)
with Triton(config=config) as triton:
    triton.bind(
        model_name="cifar10",
        infer_func=infer,
        inputs=[Tensor(name="images", dtype=np.uint8, shape=(32, 32, 3))],
        outputs=[Tensor(name="probabilities", dtype=np.float32, shape=(10,))],
        config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        strict=False,
    )
    triton.serve()
