"""What NVIDIA's own HTTP client does with a server; prints JSON. Arguments: the URL, and "sync" or "aio"."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.service.exports import expected, pictures

IMAGES = pictures(5)


class Blocking:
    """The blocking client with the interface of the asynchronous one."""

    def __init__(self, target: str) -> None:
        self._client = triton.InferenceServerClient(target, concurrency=8)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._client, name)

        async def call(*arguments: object, **options: object) -> Any:
            return method(*arguments, **options)

        return call

    async def together(self, given: triton.InferInput) -> list[Any]:
        running = [self._client.async_infer("cifar10", [given]) for _ in range(20)]
        return [request.get_result() for request in running]


class Asynchronous:
    """The asynchronous client."""

    def __init__(self, target: str) -> None:
        self._client = triton_aio.InferenceServerClient(target)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return getattr(self._client, name)

    async def together(self, given: triton.InferInput) -> list[Any]:
        return await asyncio.gather(*(self._client.infer("cifar10", [given]) for _ in range(20)))


def tensor(images: np.ndarray, name: str = "images", kind: str = "UINT8", binary: bool = True) -> triton.InferInput:
    given = triton.InferInput(name, list(images.shape), kind)
    given.set_data_from_numpy(images, binary_data=binary)
    return given


def difference(result: Any) -> float:
    return float(np.abs(result.as_numpy("probabilities") - expected(0, IMAGES)).max())


async def session(client: Any) -> dict[str, object]:
    seen: dict[str, object] = {
        "live": await client.is_server_live(),
        "ready": await client.is_server_ready(),
        "model_ready": await client.is_model_ready("cifar10"),
        "other_model_ready": await client.is_model_ready("resnet"),
        "server": await client.get_server_metadata(),
        "model": await client.get_model_metadata("cifar10"),
        "config": await client.get_model_config("cifar10"),
    }
    given = tensor(IMAGES)
    result = await client.infer("cifar10", [given], request_id="mine")
    seen["binary"], seen["id"] = difference(result), result.get_response()["id"]
    as_json = [triton.InferRequestedOutput("probabilities", binary_data=False)]
    seen["json"] = difference(await client.infer("cifar10", [tensor(IMAGES, binary=False)], outputs=as_json))
    seen["together"] = max(map(difference, await client.together(given)))
    ranked = await client.infer(
        "cifar10", [given], outputs=[triton.InferRequestedOutput("probabilities", class_count=2)]
    )
    seen["classification"] = [[text.decode() for text in row] for row in ranked.as_numpy("probabilities")]
    seen["errors"] = await errors(client, given)
    seen["statistics"] = await client.get_inference_statistics("cifar10")
    await client.close()
    return seen


async def errors(client: Any, given: triton.InferInput) -> dict[str, tuple[str, str]]:
    """Status and message of each thing that a client can get wrong."""
    one = np.zeros((1, 32, 32, 3), np.uint8)
    attempts = {
        "model": lambda: client.infer("resnet", [given]),
        "version": lambda: client.infer("cifar10", [given], model_version="77"),
        "type": lambda: client.infer("cifar10", [tensor(one.astype(np.float32), kind="FP32")]),
        "shape": lambda: client.infer("cifar10", [tensor(one.reshape(1, 3, 32, 32))]),
        "name": lambda: client.infer("cifar10", [tensor(one, name="image")]),
        "output": lambda: client.infer("cifar10", [given], outputs=[triton.InferRequestedOutput("labels")]),
        "sequence": lambda: client.infer("cifar10", [given], sequence_id=7, sequence_start=True),
        "metadata": lambda: client.get_model_metadata("resnet"),
    }
    if isinstance(client, Blocking):
        attempts["compressed"] = lambda: client.infer("cifar10", [given], request_compression_algorithm="gzip")
    found = {}
    for name, attempt in attempts.items():
        try:
            await attempt()
        except InferenceServerException as error:
            found[name] = (str(error.status()), str(error.message()))
        else:
            found[name] = ("none", "")
    return found


async def main() -> dict[str, object]:
    target = sys.argv[1].removeprefix("http://")
    return await session(Blocking(target) if sys.argv[2] == "sync" else Asynchronous(target))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())))
