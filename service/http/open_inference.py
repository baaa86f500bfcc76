"""The Open Inference Protocol (KServe v2) over HTTP, with Triton's extensions for configuration and statistics."""

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from service import tracing
from service.core import tensors
from service.core.inference import Inference
from service.core.model_store import Model
from service.core.statistics import PHASES, Duration
from service.core.tensors import EXPORT_PARAMETER, IMAGE_SHAPE, INPUT, INPUT_TYPE, OUTPUTS
from service.http import infer_body
from service.http.answers import Answer, json_answer
from service.http.bodies import check_count
from service.http.requests import Request


class OpenInference:
    """Answers requests under /v2.

    Args:
        inference: Answers inference requests.
        ready: Returns whether the server answers requests.
        server_version: Version of this package.
    """

    def __init__(self, inference: Inference, ready: Callable[[], bool], server_version: str) -> None:
        self._inference, self._ready, self._server_version = inference, ready, server_version

    async def server(self, request: Request) -> Answer:
        """Name, version and extensions of the server."""
        del request
        extensions = [*tensors.EXTENSIONS, "binary_tensor_data"]
        return json_answer({"name": tensors.SERVER_NAME, "version": self._server_version, "extensions": extensions})

    async def live(self, request: Request) -> Answer:
        """Whether the process lives."""
        del request
        return json_answer({"live": True})

    async def ready(self, request: Request) -> Answer:
        """Whether the server answers requests."""
        del request
        return self._readiness({})

    async def model_ready(self, request: Request) -> Answer:
        """Whether a model, by name and version, is served."""
        return self._readiness({"name": self._model(request).name})

    def _readiness(self, content: dict[str, Any]) -> Answer:
        ready = self._ready()
        return json_answer({**content, "ready": ready}, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)

    async def metadata(self, request: Request) -> Answer:
        """The model's tensors."""
        model = self._model(request)
        return json_answer(
            {
                "name": model.name,
                "versions": [str(model.number)],
                "platform": tensors.PLATFORM,
                "inputs": [{"name": INPUT, "datatype": INPUT_TYPE, "shape": [-1, *IMAGE_SHAPE]}],
                "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, len(model.classes)]} for name in OUTPUTS],
                "parameters": {EXPORT_PARAMETER: model.version},
            }
        )

    async def config(self, request: Request) -> Answer:
        """The model's configuration in Triton's terms."""
        model = self._model(request)
        kind = "KIND_GPU" if model.device == "cuda" else "KIND_CPU"
        return json_answer(
            {
                "name": model.name,
                "platform": tensors.PLATFORM,
                "backend": tensors.BACKEND,
                "max_batch_size": self._inference.limits.max_images,
                "input": [{"name": INPUT, "data_type": f"TYPE_{INPUT_TYPE}", "dims": IMAGE_SHAPE}],
                "output": [{"name": name, "data_type": "TYPE_FP32", "dims": [len(model.classes)]} for name in OUTPUTS],
                "instance_group": [{"name": f"{model.name}_0", "count": 1, "kind": kind}],
                "dynamic_batching": {"max_queue_delay_microseconds": int(self._inference.max_queue_delay * 1e6)},
                "parameters": {
                    "variant": {"string_value": model.variant},
                    EXPORT_PARAMETER: {"string_value": model.version},
                },
            }
        )

    async def statistics(self, request: Request) -> Answer:
        """How requests to the model spent their time since the server started, in all workers."""
        model = self._model(request)
        statistics = await self._inference.statistics()
        stats = {
            "name": model.name,
            "version": str(model.number),
            "last_inference": int(statistics.last_inference * 1000),
            "inference_count": statistics.images,
            "execution_count": statistics.executions,
            "inference_stats": {phase: _duration(statistics.phases[phase]) for phase in PHASES},
            "batch_stats": [
                {"batch_size": size, "compute_infer": _duration(duration)}
                for size, duration in sorted(statistics.batches.items())
            ],
        }
        return json_answer({"model_stats": [stats]})

    async def infer(self, request: Request) -> Answer:
        """Logits and probabilities of images."""
        self._model(request)
        size = len(request.body)
        wanted = infer_body.parse(request.body, request.headers)
        check_count(wanted.images, self._inference.limits.max_images)
        deadline = tensors.earlier_deadline(wanted.timeout, request.deadline)
        with self._inference.admit(wanted.images, size):
            started = time.monotonic()
            images = wanted.pixels()
            tracing.add_phase("decode", started)
            outputs = await self._inference.compute(images, deadline)
            outputs.check_all()
            answer = infer_body.answer(wanted, outputs)
        self._inference.count_images(wanted.images, 0)
        return answer

    def _model(self, request: Request) -> Model:
        """The model that the path names; the one that is served if it names none."""
        model = self._inference.model
        return tensors.check_model(model, request.path.get("name", model.name), request.path.get("version", ""))


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.nanoseconds}
