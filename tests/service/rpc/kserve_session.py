"""What the KServe SDK's gRPC client does with a server; prints JSON. Argument: HOST:PORT.

A program of its own, run by the interpreter of another environment: the SDK's generated messages bear the names of
ours, so one process cannot import both.
"""

import asyncio
import json
import sys

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest
from kserve.protocol.infer_type import RequestedOutput


async def main(target: str) -> dict[str, object]:
    client = InferenceGRPCClient(target)
    seen: dict[str, object] = {
        "live": await client.is_server_live(),
        "ready": await client.is_server_ready(),
        "model_ready": await client.is_model_ready("cifar10"),
        "other_model_ready": await client.is_model_ready("resnet"),
    }
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    for name, binary in (("typed", False), ("raw", True)):
        tensor = InferInput("images", list(images.shape), "UINT8")
        tensor.set_data_from_numpy(images, binary_data=binary)
        outputs = [RequestedOutput("probabilities")]
        response = await client.infer(InferRequest("cifar10", [tensor], request_id=name, request_outputs=outputs))
        seen[name] = {
            "id": response.id,
            "version": response.model_version,
            "probabilities": response.outputs[0].as_numpy().tolist(),
        }
    try:
        await client.infer(InferRequest("resnet", [tensor]))
    except grpc.RpcError as error:
        seen["error"] = str(error.code())
    await client.close()
    return seen


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1]))))
