"""Servicer of the Open Inference Protocol: translates its tensors to and from `Inference`.

The version of the model is a number; see service.core.export_numbers. The tensors are those of the ONNX graph. The
Triton Inference Server extends the protocol. The extensions that its clients and load generators use are implemented:
streaming, configuration, statistics, the "classification" of an output and the "timeout" of a request.
"""

import asyncio
import struct
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cifar_core.pixels import IMAGE_BYTES
from service import tracing
from service.core import tensors
from service.core.inference import Answer, Inference
from service.core.model_store import Model
from service.core.statistics import PHASES, Duration
from service.core.tensors import (
    EXPORT_PARAMETER,
    EXTENSIONS,
    IMAGE_SHAPE,
    INPUT,
    MAX_ID_CHARACTERS,
    OUTPUTS,
    PLATFORM,
    SERVER_NAME,
    RequestedOutput,
)
from service.errors import InvalidRequest, NotFound
from service.generated.inference import open_inference_pb2 as messages
from service.rpc.calls import Call
from service.rpc.statuses import Failure
from service.rpc.wire import FieldCounter

SERVICE = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
MODEL_STREAM_INFER = f"{SERVICE}/ModelStreamInfer"
# The parser holds Python's global lock, for about 10 ms while it parses this many bytes of numbers.
MAX_NUMBER_BYTES = 2**20
# Largest size of the parts of a message that are not pixels.
MAX_OTHER_BYTES = 2**16
_VALUES_AT_ONCE = 16 * IMAGE_BYTES

# With this parameter, a client of Triton asks that the last answer to a request is marked. Here it is the only one.
_ASK_FOR_FINAL = "triton_enable_empty_final_response"
_FINAL = "triton_final_response"

Parameters = Mapping[str, messages.InferParameter]


ANSWERED_WHILE_DRAINING = frozenset({"ServerLive", "ServerReady", "ModelReady"})


def field_counter(max_images: int) -> FieldCounter:
    """The limit on the number of fields of a ModelInferRequest, and on pixels that are sent as single numbers."""
    pixels = messages.InferTensorContents.DESCRIPTOR.fields_by_name["uint_contents"].full_name
    return FieldCounter(messages.ModelInferRequest, 4 * max_images + 64, {pixels: MAX_NUMBER_BYTES})


class OpenInference:
    """See protos/inference/open_inference.proto.

    Args:
        inference: Answers the requests.
        draining: Returns whether the server is stopping.
        server_version: Version of this package.
    """

    def __init__(self, inference: Inference, draining: Callable[[], bool], server_version: str) -> None:
        self._inference, self._draining, self._server_version = inference, draining, server_version

    async def ServerLive(  # noqa: N802 -- the protocol's names, as below
        self, request: messages.ServerLiveRequest, call: Call
    ) -> messages.ServerLiveResponse:
        """Whether the server runs."""
        del request, call
        return messages.ServerLiveResponse(live=True)

    async def ModelInfer(  # noqa: N802
        self, request: messages.ModelInferRequest, call: Call
    ) -> messages.ModelInferResponse:
        """Logits and probabilities of images."""
        self._model(request.model_name, request.model_version)
        raw = list(request.raw_input_contents)  # every access to the field copies it
        _check_size(request, raw, call.message_bytes)
        deadline = _deadline(request.parameters, call.deadline)
        count = _check_input(request)
        requested = _check_outputs(request)
        with self._inference.admit(count, call.message_bytes):
            started = time.monotonic()
            images = await _pixels(request, raw, count)
            tracing.add_phase("decode", started)
            answer = await self._inference.compute(images, deadline)
            answer.check_all()
            response = _response(request, requested, answer)
        self._inference.count_images(count, 0)
        return response

    async def ModelStreamInfer(  # noqa: N802
        self, request: messages.ModelInferRequest, call: Call
    ) -> messages.ModelStreamInferResponse:
        """Answers one request of a stream; service.rpc.streams reads and writes the stream."""
        response = messages.ModelStreamInferResponse(infer_response=await self.ModelInfer(request, call))
        if request.parameters[_ASK_FOR_FINAL].bool_param:
            response.infer_response.parameters[_FINAL].bool_param = True
        return response

    def _model(self, name: str, version: str) -> Model:
        return tensors.check_model(self._inference.model, name, version)

    async def ServerReady(  # noqa: N802
        self, request: messages.ServerReadyRequest, call: Call
    ) -> messages.ServerReadyResponse:
        """Whether the server accepts requests; a server that is stopping does not."""
        del request, call
        return messages.ServerReadyResponse(ready=not self._draining())

    async def ModelReady(  # noqa: N802
        self, request: messages.ModelReadyRequest, call: Call
    ) -> messages.ModelReadyResponse:
        """Whether a model, by name and version, is served."""
        del call
        try:
            self._model(request.name, request.version)
        except NotFound:
            return messages.ModelReadyResponse(ready=False)
        return messages.ModelReadyResponse(ready=not self._draining())

    async def ServerMetadata(  # noqa: N802
        self, request: messages.ServerMetadataRequest, call: Call
    ) -> messages.ServerMetadataResponse:
        """Name, version and extensions of the server."""
        del request, call
        return messages.ServerMetadataResponse(name=SERVER_NAME, version=self._server_version, extensions=EXTENSIONS)

    async def ModelMetadata(  # noqa: N802
        self, request: messages.ModelMetadataRequest, call: Call
    ) -> messages.ModelMetadataResponse:
        """The model's tensors."""
        del call
        model = self._model(request.name, request.version)
        tensor = messages.ModelMetadataResponse.TensorMetadata
        return messages.ModelMetadataResponse(
            name=model.name,
            versions=[str(model.number)],
            platform=PLATFORM,
            inputs=[tensor(name=INPUT, datatype="UINT8", shape=[-1, *IMAGE_SHAPE])],
            outputs=[tensor(name=name, datatype="FP32", shape=[-1, len(model.classes)]) for name in OUTPUTS],
            parameters={EXPORT_PARAMETER: messages.InferParameter(string_param=model.version)},
        )

    async def ModelConfig(  # noqa: N802
        self, request: messages.ModelConfigRequest, call: Call
    ) -> messages.ModelConfigResponse:
        """The model's configuration in Triton's terms."""
        del call
        model = self._model(request.name, request.version)
        group = messages.ModelInstanceGroup
        kind = group.KIND_GPU if model.device == "cuda" else group.KIND_CPU
        config = messages.ModelConfig(
            name=model.name,
            platform=PLATFORM,
            backend="onnxruntime",
            max_batch_size=self._inference.limits.max_images,
            input=[messages.ModelInput(name=INPUT, data_type=messages.TYPE_UINT8, dims=IMAGE_SHAPE)],
            output=[
                messages.ModelOutput(name=name, data_type=messages.TYPE_FP32, dims=[len(model.classes)])
                for name in OUTPUTS
            ],
            instance_group=[group(name=f"{model.name}_0", count=1, kind=kind)],
            dynamic_batching=messages.ModelDynamicBatching(
                max_queue_delay_microseconds=int(self._inference.max_queue_delay * 1e6)
            ),
            parameters={
                "variant": messages.ModelParameter(string_value=model.variant),
                EXPORT_PARAMETER: messages.ModelParameter(string_value=model.version),
            },
        )
        return messages.ModelConfigResponse(config=config)

    async def ModelStatistics(  # noqa: N802
        self, request: messages.ModelStatisticsRequest, call: Call
    ) -> messages.ModelStatisticsResponse:
        """How requests to the model spent their time since the server started, in all workers."""
        del call
        model = self._model(request.name or self._inference.model.name, request.version)
        statistics = await self._inference.statistics()
        phases = {phase: _duration(statistics.phases[phase]) for phase in PHASES}
        return messages.ModelStatisticsResponse(
            model_stats=[
                messages.ModelStatistics(
                    name=model.name,
                    version=str(model.number),
                    last_inference=int(statistics.last_inference * 1000),
                    inference_count=statistics.images,
                    execution_count=statistics.executions,
                    inference_stats=messages.InferStatistics(**phases),
                    batch_stats=[
                        messages.InferBatchStatistics(batch_size=size, compute_infer=_duration(duration))
                        for size, duration in sorted(statistics.batches.items())
                    ],
                )
            ]
        )


def stream_failure(request: messages.ModelInferRequest | None, failure: Failure) -> messages.ModelStreamInferResponse:
    """The response in a stream to a request that failed; `request` is None if it could not be parsed."""
    identity = request.id[:MAX_ID_CHARACTERS] if request is not None else ""
    return messages.ModelStreamInferResponse(
        error_message=failure.message, infer_response=messages.ModelInferResponse(id=identity)
    )


def _check_size(request: messages.ModelInferRequest, raw: Sequence[bytes], message_bytes: int) -> None:
    """Refuses long texts, which would be held until the request is answered."""
    tensors.check_id(request.id)
    pixels = sum(map(len, raw)) or sum(each.contents.ByteSize() for each in request.inputs)
    if message_bytes - pixels > MAX_OTHER_BYTES:
        raise InvalidRequest(
            f"the message has {message_bytes - pixels} bytes besides its pixels, in names and parameters; "
            f"at most {MAX_OTHER_BYTES} are allowed"
        )


def _duration(duration: Duration) -> messages.StatisticDuration:
    return messages.StatisticDuration(count=duration.count, ns=duration.nanoseconds)


def _deadline(parameters: Parameters, deadline: float | None) -> float | None:
    """The earlier of the call's deadline and the parameter `timeout`. Sequences are refused, the rest is ignored."""
    sequence = parameters.get("sequence_id")
    if sequence is not None:
        tensors.check_no_sequence(sequence.int64_param or sequence.uint64_param or sequence.string_param)
    timeout = parameters.get("timeout")
    if timeout is None:
        return deadline
    if timeout.WhichOneof("parameter_choice") not in ("int64_param", "uint64_param"):
        raise InvalidRequest("parameter 'timeout' is not a whole number; it must be one, of microseconds")
    return tensors.earlier_deadline(timeout.int64_param or timeout.uint64_param, deadline)


def _check_input(request: messages.ModelInferRequest) -> int:
    """The number of images in the one input that the model takes."""
    first = request.inputs[0] if request.inputs else messages.ModelInferRequest.InferInputTensor()
    return tensors.check_input(
        [tensor.name for tensor in request.inputs], first.datatype, first.shape, first.parameters
    )


async def _pixels(request: messages.ModelInferRequest, raw: Sequence[bytes], count: int) -> NDArray[np.uint8]:
    if len(raw) > 1:
        raise InvalidRequest(f"there are {len(raw)} raw_input_contents for one input")
    if raw:
        if request.inputs[0].HasField("contents"):
            raise InvalidRequest(f"input '{INPUT}' has both contents and raw_input_contents: send one of them")
        return tensors.pixels(raw[0], count, "raw_input_contents")
    shape, size = (count, *IMAGE_SHAPE), count * IMAGE_BYTES
    contents = request.inputs[0].contents
    others = [field.name for field, _ in contents.ListFields() if field.name != "uint_contents"]
    if others:
        raise InvalidRequest(f"input '{INPUT}' has {', '.join(others)}; UINT8 elements are sent in uint_contents")
    values = contents.uint_contents
    if len(values) != size:
        raise InvalidRequest(
            f"input '{INPUT}' holds {len(values)} elements in uint_contents; shape {list(shape)} needs {size}, "
            "there or as bytes in raw_input_contents"
        )
    # Millions of Python numbers are converted in parts and in a thread, so that other requests proceed.
    parts = [
        await asyncio.to_thread(np.array, values[start : start + _VALUES_AT_ONCE], np.uint32)
        for start in range(0, size, _VALUES_AT_ONCE)
    ]
    array = np.concatenate(parts) if parts else np.empty(0, np.uint32)
    if array.max(initial=0) > 255:
        raise InvalidRequest(f"uint_contents of input '{INPUT}' holds {array.max()}; the largest UINT8 is 255")
    return array.astype(np.uint8).reshape(shape)


def _check_outputs(request: messages.ModelInferRequest) -> list[RequestedOutput]:
    return tensors.check_outputs(
        [(output.name, _classification(output.parameters), output.parameters) for output in request.outputs]
    )


def _classification(parameters: Parameters) -> int:
    value = parameters.get("classification")
    if value is None:
        return 0
    if value.WhichOneof("parameter_choice") not in ("int64_param", "uint64_param"):
        raise InvalidRequest("parameter 'classification' of an output is not a whole number; it must be one")
    return value.int64_param or value.uint64_param


def _response(
    request: messages.ModelInferRequest, requested: list[RequestedOutput], answer: Answer
) -> messages.ModelInferResponse:
    """The answer, in the form of the request: bytes if it had raw_input_contents, typed contents otherwise."""
    raw = bool(request.raw_input_contents)
    response = messages.ModelInferResponse(
        model_name=answer.model.name, model_version=str(answer.model.number), id=request.id
    )
    response.parameters[EXPORT_PARAMETER].string_param = answer.model.version
    for name, count in ((each.name, each.classification) for each in requested):
        values: NDArray[np.float32] = getattr(answer, name)
        output = response.outputs.add(name=name, datatype="BYTES" if count else "FP32")
        if count:
            texts = [text.encode() for text in tensors.classification(values, answer.model.classes, count)]
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
