"""Starts Ray Serve with its gRPC proxy and @serve.batch; one replica has all threads of onnxruntime."""

import os
import signal

import numpy as np
import ray
from ray import serve
from ray.serve.config import gRPCOptions
from session import open_session

from service.generated.inference import open_inference_pb2 as messages


@serve.deployment(max_ongoing_requests=1024, num_replicas=1)
class Classifier:
    """ModelInfer of the Open Inference Protocol, with raw contents."""

    def __init__(self) -> None:
        self.session = open_session()

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0)
    async def compute(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Probabilities of each request's images, float32 [n, 10]."""
        sizes = [len(each) for each in images]
        (probabilities,) = self.session.run(["probabilities"], {"images": np.concatenate(images)})
        return np.split(probabilities, np.cumsum(sizes)[:-1])

    async def ModelInfer(self, request: messages.ModelInferRequest) -> messages.ModelInferResponse:  # noqa: N802
        """Answers one request."""
        shape = tuple(request.inputs[0].shape)
        probabilities = await self.compute(np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(shape))
        response = messages.ModelInferResponse(model_name="cifar10", raw_output_contents=[probabilities.tobytes()])
        response.outputs.add(name="probabilities", datatype="FP32", shape=probabilities.shape)
        return response


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
functions = ["service.generated.inference.open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"]
serve.start(
    proxy_location="HeadOnly",
    http_options={"host": "127.0.0.1", "port": int(os.environ["PORT"]) + 1},
    grpc_options=gRPCOptions(port=int(os.environ["PORT"]), grpc_servicer_functions=functions),
)
serve.run(Classifier.bind(), name="cifar10")
signal.sigwait({signal.SIGTERM, signal.SIGINT})
serve.shutdown()
ray.shutdown()
