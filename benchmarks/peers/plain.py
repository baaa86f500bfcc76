"""A plain gRPC servicer with a naive batcher: what one writes in an afternoon, without limits, deadlines or metrics.

It answers ModelInfer of the Open Inference Protocol. One task takes all requests that wait, up to 64 images, computes
them in a thread, and answers them.
"""

import asyncio
import os

import grpc
import numpy as np
from session import open_session

from service.generated.inference import open_inference_pb2 as messages
from service.generated.inference import open_inference_pb2_grpc as rpc

MAX_BATCH = 64


class Classifier(rpc.GRPCInferenceServiceServicer):
    """Queue, batcher and servicer in one."""

    def __init__(self) -> None:
        self.session = open_session()
        self.queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue()

    async def batch(self) -> None:
        """Computes what waits, for ever."""
        while True:
            waiting = [await self.queue.get()]
            while not self.queue.empty() and sum(len(images) for images, _ in waiting) < MAX_BATCH:
                waiting.append(self.queue.get_nowait())
            images = np.concatenate([images for images, _ in waiting])
            (probabilities,) = await asyncio.to_thread(self.session.run, ["probabilities"], {"images": images})
            ends = np.cumsum([len(images) for images, _ in waiting])[:-1]
            for (_, answer), rows in zip(waiting, np.split(probabilities, ends), strict=True):
                if not answer.done():
                    answer.set_result(rows)

    async def ModelInfer(  # noqa: N802 -- the protocol's name
        self, request: messages.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> messages.ModelInferResponse:
        """Answers one request."""
        images = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(tuple(request.inputs[0].shape))
        answer = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((images, answer))
        probabilities = await answer
        response = messages.ModelInferResponse(model_name="cifar10", raw_output_contents=[probabilities.tobytes()])
        response.outputs.add(name="probabilities", datatype="FP32", shape=probabilities.shape)
        return response


async def main() -> None:
    """Serves until it is stopped."""
    server = grpc.aio.server()
    classifier = Classifier()
    rpc.add_GRPCInferenceServiceServicer_to_server(classifier, server)
    server.add_insecure_port(f"127.0.0.1:{os.environ['PORT']}")
    await server.start()
    await classifier.batch()


if __name__ == "__main__":
    asyncio.run(main())
