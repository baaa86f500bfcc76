"""Servicer of the Open Inference Protocol: tensors to the rooms behind, and back.

The model's name is fixed and its version is the export's; the tensors are those of the ONNX graph. What the Triton
Inference Server adds is spoken where its clients and load generators rely on it: configuration, statistics, the
"classification" of an output and the "timeout" of a request.
"""

import struct
import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cifar_core.images import IMAGE_BYTES, IMAGE_SIZE
from service.core.inference import Answer, Inference
from service.core.metrics import Duration
from service.core.model_store import Model
from service.errors import InvalidRequest, NotFound, Unsupported
from service.generated.inference import open_inference_pb2 as messages
from service.generated.inference import open_inference_pb2_grpc as rpc
from service.rpc.calls import Calls, Context, deadline_of

SERVICE = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
SERVER_NAME = "cifar-classifier"
EXTENSIONS = ("classification", "model_configuration", "schedule_policy", "statistics")
PLATFORM = "onnxruntime_onnx"
INPUT = "images"
OUTPUTS = ("logits", "probabilities")

Parameters = Mapping[str, messages.InferParameter]


class OpenInference(rpc.GRPCInferenceServiceServicer):
    """See protos/inference/open_inference.proto."""

    def __init__(self, inference: Inference, calls: Calls, server_version: str, max_queue_delay_ms: float) -> None:
        self._inference, self._calls = inference, calls
        self._server_version, self._max_queue_delay_ms = server_version, max_queue_delay_ms

    async def ServerLive(  # noqa: N802 -- the protocol's names
        self, request: messages.ServerLiveRequest, context: Context
    ) -> messages.ServerLiveResponse:
        """Whether the server runs."""
        return await self._calls.unary(
            f"{SERVICE}/ServerLive", self._server_live, request, context, while_draining=True
        )

    async def ServerReady(  # noqa: N802
        self, request: messages.ServerReadyRequest, context: Context
    ) -> messages.ServerReadyResponse:
        """Whether it takes requests; it does not while it stops."""
        return await self._calls.unary(
            f"{SERVICE}/ServerReady", self._server_ready, request, context, while_draining=True
        )

    async def ModelReady(  # noqa: N802
        self, request: messages.ModelReadyRequest, context: Context
    ) -> messages.ModelReadyResponse:
        """Whether a model, by name and version, is served."""
        return await self._calls.unary(
            f"{SERVICE}/ModelReady", self._model_ready, request, context, while_draining=True
        )

    async def ServerMetadata(  # noqa: N802
        self, request: messages.ServerMetadataRequest, context: Context
    ) -> messages.ServerMetadataResponse:
        """What the server is."""
        return await self._calls.unary(f"{SERVICE}/ServerMetadata", self._server_metadata, request, context)

    async def ModelMetadata(  # noqa: N802
        self, request: messages.ModelMetadataRequest, context: Context
    ) -> messages.ModelMetadataResponse:
        """The model's tensors."""
        return await self._calls.unary(f"{SERVICE}/ModelMetadata", self._model_metadata, request, context)

    async def ModelConfig(  # noqa: N802
        self, request: messages.ModelConfigRequest, context: Context
    ) -> messages.ModelConfigResponse:
        """The model's configuration in Triton's terms."""
        return await self._calls.unary(f"{SERVICE}/ModelConfig", self._model_config, request, context)

    async def ModelStatistics(  # noqa: N802
        self, request: messages.ModelStatisticsRequest, context: Context
    ) -> messages.ModelStatisticsResponse:
        """Where requests' time went, since the model was loaded, in this process."""
        return await self._calls.unary(f"{SERVICE}/ModelStatistics", self._model_statistics, request, context)

    async def ModelInfer(  # noqa: N802
        self, request: messages.ModelInferRequest, context: Context
    ) -> messages.ModelInferResponse:
        """Logits and probabilities of images."""
        return await self._calls.unary(f"{SERVICE}/ModelInfer", self._model_infer, request, context)

    async def _model_infer(self, request: messages.ModelInferRequest, context: Context) -> messages.ModelInferResponse:
        statistics = self._inference.metrics.statistics
        started = time.perf_counter()
        try:
            self._model(request.model_name, request.model_version)
            deadline = _deadline(request.parameters, context)
            shape = _check_input(request)
            requested = _check_outputs(request.outputs)
            with self._inference.admit(shape[0], shape[0] * IMAGE_BYTES):
                images = _pixels(request, shape)
                read = time.perf_counter()
                answer = await self._inference.compute(images, deadline)
            computed = time.perf_counter()
            response = _response(request, requested, answer)
        except BaseException:
            statistics.failure.add(time.perf_counter() - started)
            raise
        self._inference.metrics.on_images(shape[0], 0)
        ended = time.perf_counter()
        statistics.input.add(read - started)
        statistics.output.add(ended - computed)
        statistics.success.add(ended - started)
        return response

    def _model(self, name: str, version: str) -> Model:
        model = self._inference.models.current
        if name != model.name:
            raise NotFound(f"there is no model '{name}'; the model is '{model.name}'")
        if version not in ("", model.version):
            raise NotFound(f"model '{name}' has no version '{version}'; version '{model.version}' is served")
        return model

    async def _server_live(self, request: messages.ServerLiveRequest, context: Context) -> messages.ServerLiveResponse:
        del request, context
        return messages.ServerLiveResponse(live=True)

    async def _server_ready(
        self, request: messages.ServerReadyRequest, context: Context
    ) -> messages.ServerReadyResponse:
        del request, context
        return messages.ServerReadyResponse(ready=not self._calls.draining.is_set())

    async def _model_ready(self, request: messages.ModelReadyRequest, context: Context) -> messages.ModelReadyResponse:
        del context
        try:
            self._model(request.name, request.version)
        except NotFound:
            return messages.ModelReadyResponse(ready=False)
        return messages.ModelReadyResponse(ready=not self._calls.draining.is_set())

    async def _server_metadata(
        self, request: messages.ServerMetadataRequest, context: Context
    ) -> messages.ServerMetadataResponse:
        del request, context
        return messages.ServerMetadataResponse(name=SERVER_NAME, version=self._server_version, extensions=EXTENSIONS)

    async def _model_metadata(
        self, request: messages.ModelMetadataRequest, context: Context
    ) -> messages.ModelMetadataResponse:
        del context
        model = self._model(request.name, request.version)
        tensor = messages.ModelMetadataResponse.TensorMetadata
        return messages.ModelMetadataResponse(
            name=model.name,
            versions=[model.version],
            platform=PLATFORM,
            inputs=[tensor(name=INPUT, datatype="UINT8", shape=[-1, IMAGE_SIZE, IMAGE_SIZE, 3])],
            outputs=[tensor(name=name, datatype="FP32", shape=[-1, len(model.classes)]) for name in OUTPUTS],
        )

    async def _model_config(
        self, request: messages.ModelConfigRequest, context: Context
    ) -> messages.ModelConfigResponse:
        del context
        model = self._model(request.name, request.version)
        group = messages.ModelInstanceGroup
        kind = group.KIND_GPU if model.engine.device == "cuda" else group.KIND_CPU
        config = messages.ModelConfig(
            name=model.name,
            platform=PLATFORM,
            backend="onnxruntime",
            max_batch_size=self._inference.limits.max_images,
            input=[messages.ModelInput(name=INPUT, data_type=messages.TYPE_UINT8, dims=[IMAGE_SIZE, IMAGE_SIZE, 3])],
            output=[
                messages.ModelOutput(name=name, data_type=messages.TYPE_FP32, dims=[len(model.classes)])
                for name in OUTPUTS
            ],
            instance_group=[group(name=f"{model.name}_0", count=1, kind=kind)],
            dynamic_batching=messages.ModelDynamicBatching(
                max_queue_delay_microseconds=int(self._max_queue_delay_ms * 1000)
            ),
            parameters={"variant": messages.ModelParameter(string_value=model.variant)},
        )
        return messages.ModelConfigResponse(config=config)

    async def _model_statistics(
        self, request: messages.ModelStatisticsRequest, context: Context
    ) -> messages.ModelStatisticsResponse:
        del context
        model = self._model(request.name or self._inference.models.current.name, request.version)
        statistics = self._inference.metrics.statistics
        return messages.ModelStatisticsResponse(
            model_stats=[
                messages.ModelStatistics(
                    name=model.name,
                    version=model.version,
                    last_inference=int(statistics.last_inference * 1000),
                    inference_count=statistics.images,
                    execution_count=sum(duration.count for duration in statistics.batches.values()),
                    inference_stats=messages.InferStatistics(
                        success=_duration(statistics.success),
                        fail=_duration(statistics.failure),
                        queue=_duration(statistics.queue),
                        compute_input=_duration(statistics.input),
                        compute_infer=_duration(statistics.inference),
                        compute_output=_duration(statistics.output),
                    ),
                    batch_stats=[
                        messages.InferBatchStatistics(batch_size=size, compute_infer=_duration(duration))
                        for size, duration in sorted(statistics.batches.items())
                    ],
                )
            ]
        )


def _duration(duration: Duration) -> messages.StatisticDuration:
    return messages.StatisticDuration(count=duration.count, ns=duration.nanoseconds)


def _deadline(parameters: Parameters, context: Context) -> float | None:
    """The earlier of the call's deadline and the parameter `timeout`. Sequences are refused, the rest is ignored."""
    sequence = parameters.get("sequence_id")
    if sequence is not None and (sequence.int64_param or sequence.uint64_param or sequence.string_param):
        raise Unsupported("the model keeps no state between requests: send no sequence_id")
    deadline = deadline_of(context)
    timeout = parameters.get("timeout")
    if timeout is None:
        return deadline
    if timeout.WhichOneof("parameter_choice") not in ("int64_param", "uint64_param"):
        raise InvalidRequest("parameter 'timeout' is not a whole number; it must be one, of microseconds")
    microseconds = timeout.int64_param or timeout.uint64_param
    if microseconds < 0:
        raise InvalidRequest(f"parameter 'timeout' is {microseconds} microseconds; it must not be negative")
    if microseconds == 0:  # Triton's clients send it for "none"
        return deadline
    own = time.monotonic() + microseconds / 1e6
    return own if deadline is None else min(own, deadline)


def _check_input(request: messages.ModelInferRequest) -> tuple[int, int, int, int]:
    """The shape of the one input that the model takes."""
    names = [tensor.name for tensor in request.inputs]
    if names != [INPUT]:
        raise InvalidRequest(f"the inputs are {names}; there must be one, '{INPUT}'")
    tensor = request.inputs[0]
    if tensor.datatype != "UINT8":
        raise InvalidRequest(f"input '{INPUT}' is of type '{tensor.datatype}'; it must be UINT8")
    shape = tuple(tensor.shape)
    if len(shape) != 4 or shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or shape[0] < 0:
        raise InvalidRequest(
            f"input '{INPUT}' has shape {list(shape)}; it must be [n, {IMAGE_SIZE}, {IMAGE_SIZE}, 3], channels last"
        )
    if any(name.startswith("shared_memory") for name in tensor.parameters):
        raise Unsupported("shared memory is not supported: send the elements in raw_input_contents")
    return shape[0], IMAGE_SIZE, IMAGE_SIZE, 3


def _pixels(request: messages.ModelInferRequest, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    size = shape[0] * IMAGE_BYTES
    if len(request.raw_input_contents) > 1:
        raise InvalidRequest(f"there are {len(request.raw_input_contents)} raw_input_contents for one input")
    if request.raw_input_contents:
        raw = request.raw_input_contents[0]
        if len(raw) != size:
            raise InvalidRequest(f"raw_input_contents holds {len(raw)} bytes; shape {list(shape)} needs {size}")
        return np.frombuffer(raw, np.uint8).reshape(shape)
    values = request.inputs[0].contents.uint_contents
    if len(values) != size:
        raise InvalidRequest(
            f"input '{INPUT}' holds {len(values)} elements in uint_contents; shape {list(shape)} needs {size}, "
            "there or as bytes in raw_input_contents"
        )
    array = np.array(values, np.uint32)
    if array.max(initial=0) > 255:
        raise InvalidRequest(f"uint_contents of input '{INPUT}' holds {array.max()}; UINT8 ends at 255")
    return array.astype(np.uint8).reshape(shape)


def _check_outputs(
    requested: Sequence[messages.ModelInferRequest.InferRequestedOutputTensor],
) -> list[tuple[str, int]]:
    """The outputs to give, each with its number of classes, 0 for the plain tensor."""
    chosen: list[tuple[str, int]] = []
    for output in requested:
        if output.name not in OUTPUTS:
            raise InvalidRequest(f"there is no output '{output.name}'; the outputs are {', '.join(OUTPUTS)}")
        if output.name in (name for name, _ in chosen):
            raise InvalidRequest(f"output '{output.name}' is asked for twice")
        if any(name.startswith("shared_memory") for name in output.parameters):
            raise Unsupported("shared memory is not supported: leave it out, and outputs come in raw_output_contents")
        count = output.parameters["classification"].int64_param if "classification" in output.parameters else 0
        if count < 0:
            raise InvalidRequest(f"'classification' of output '{output.name}' is {count}; it must not be negative")
        chosen.append((output.name, count))
    return chosen or [(name, 0) for name in OUTPUTS]


def _response(
    request: messages.ModelInferRequest, requested: list[tuple[str, int]], answer: Answer
) -> messages.ModelInferResponse:
    """Elements go back as they came: as bytes where the request had raw_input_contents, else by type."""
    raw = bool(request.raw_input_contents)
    response = messages.ModelInferResponse(
        model_name=answer.model.name, model_version=answer.model.version, id=request.id
    )
    for name, count in requested:
        values: NDArray[np.float32] = getattr(answer, name)
        output = response.outputs.add(name=name, datatype="BYTES" if count else "FP32")
        if count:
            texts = _classification(values, answer.model.classes, count)
            output.shape.extend([len(values), min(count, values.shape[1])])
            if raw:
                response.raw_output_contents.append(b"".join(struct.pack("<I", len(text)) + text for text in texts))
            else:
                output.contents.bytes_contents.extend(texts)
        else:
            output.shape.extend(values.shape)
            if raw:
                response.raw_output_contents.append(values.astype("<f4", copy=False).tobytes())
            else:
                output.contents.fp32_contents.extend(values.ravel().tolist())
    return response


def _classification(values: NDArray[np.float32], classes: Sequence[str], count: int) -> list[bytes]:
    """Triton's form of the greatest values of each row: "value:index:label"."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return [
        f"{values[row, index]:f}:{index}:{classes[index]}".encode()
        for row, indices in enumerate(order.tolist())
        for index in indices
    ]
