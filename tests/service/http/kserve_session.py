"""What the KServe SDK's REST client does with a server; prints JSON. Argument: the URL.

A program of its own, run by the interpreter of another environment: the SDK cannot be installed beside this package.
"""

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


async def main(url: str) -> dict[str, object]:
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=60))
    seen: dict[str, object] = {
        "live": await client.is_server_live(url),
        "ready": await client.is_server_ready(url),
        "model_ready": await client.is_model_ready(url, "cifar10"),
    }
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    for name, binary in (("json", False), ("binary", True)):
        tensor = InferInput("images", list(images.shape), "UINT8")
        tensor.set_data_from_numpy(images, binary_data=binary)
        outputs = [RequestedOutput("probabilities", {"binary_data": binary})]
        request = InferRequest("cifar10", [tensor], request_id=name, request_outputs=outputs)
        response = await client.infer(url, request, model_name="cifar10")
        seen[name] = {
            "id": response.id,
            "name": response.model_name,
            "probabilities": response.outputs[0].as_numpy().tolist(),
        }
    return seen


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1]))))
