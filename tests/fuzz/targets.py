"""What is fuzzed: for each target a function of one input, and valid inputs to begin with."""

import asyncio
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cifar_core.images import FORMATS
from cifar_core.pixels import IMAGE_BYTES, ImageLimits
from service.core.decode_messages import Kind, ProcessLimits
from service.core.decode_worker import answer
from service.errors import RequestError
from service.generated.cifar.v1 import image_classifier_pb2 as classify_messages
from service.generated.inference import open_inference_pb2 as inference_messages
from service.rpc import classify, open_inference
from service.rpc.calls import Call
from service.rpc.wire import parse_message
from tests.cifar_core.image_corpus import CorpusFile, corpus, gradient, saved
from tests.service import exports
from tests.service.core import hostile_images as hostile

MAX_IMAGES = 64
IMAGE_LIMITS = ImageLimits(max_bytes=2**20, max_pixels=2**20)
PROCESS_LIMITS = ProcessLimits(cpu_seconds=1.0, max_pixels=2**20, max_memory=224 * 2**20, niceness=0)
MAX_SEED_BYTES = 20_000

Check = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """A function that raises an exception for an input that breaks a promise.

    Attributes:
        make: Gives the function, after what it needs was started.
        seeds: Gives valid inputs.
    """

    make: Callable[[], Check]
    seeds: Callable[[], list[bytes]]


def check_image(data: bytes) -> None:
    """Every file gives 32 x 32 pixels or one line that says what is wrong."""
    kind, content = answer(data, PROCESS_LIMITS.max_memory, PROCESS_LIMITS, IMAGE_LIMITS)
    if kind is Kind.PIXELS:
        assert len(content) == IMAGE_BYTES
    elif kind is Kind.REJECTED:
        message = content.decode()
        assert message
        assert "\n" not in message
    else:
        raise AssertionError(content.decode(errors="replace"))


def image_seeds(format_: str) -> list[bytes]:
    """Files of one format from the corpus of the tests, and some that are hostile."""
    names = {"PNG": ("png",), "JPEG": ("jpg", "jpeg"), "WEBP": ("webp",), "GIF": ("gif",), "BMP": ("bmp",)}[format_]
    by_kind: dict[str, CorpusFile] = {}
    for file in corpus():
        if file.extension in names and len(file.content) <= MAX_SEED_BYTES:
            by_kind.setdefault(file.kind, file)
    extra = {
        "PNG": [hostile.apng_of_many_frames(3), hostile.png_with_inflating_text(1), hostile.png_16_bit(40)],
        "JPEG": [hostile.progressive_jpeg(64, 20), hostile.jpeg_with_overlapping_exif(50)],
        "WEBP": [hostile.webp_of_large_canvas(64), hostile.webp_of_many_chunks(5)],
        "GIF": [hostile.gif_of_many_comments(5)],
        "BMP": [hostile.run_length_bmp(100), hostile.bmp(8, -8, 24, rows=bytes(192))],
    }
    return [file.content for file in by_kind.values()] + extra[format_]


@functools.cache
def _servicers() -> tuple[asyncio.AbstractEventLoop, classify.ImageClassifier, open_inference.OpenInference]:
    """Both servicers on a real model, batcher and decoder."""
    from service.core.batcher import Batcher
    from service.core.decoding import Decoder
    from service.core.inference import Inference, Limits
    from service.core.metrics import Metrics
    from service.core.model_store import ModelStore

    async def start() -> Inference:
        metrics = Metrics()
        folder = exports.write_export(Path(tempfile.mkdtemp()) / "export", exports.graph())
        models = ModelStore(
            folder, "fp32", device="cpu", threads=1, max_batch_size=MAX_IMAGES, on_reload=lambda model: None
        )
        batcher = Batcher(max_batch_size=32, max_images=4096, max_bytes=2**28, observer=metrics)
        limits = Limits(IMAGE_LIMITS, MAX_IMAGES, 2**22, 4096)
        return Inference(models, batcher, Decoder(1, IMAGE_LIMITS), limits, metrics)

    loop = asyncio.new_event_loop()
    inference = loop.run_until_complete(start())
    servicers = classify.ImageClassifier(inference), open_inference.OpenInference(inference, lambda: False, "0")
    return loop, *servicers


def make_classify() -> Check:
    """Every request gets a result per image, or an error that becomes a status."""
    loop, servicer, _ = _servicers()
    counter = classify.field_counter(MAX_IMAGES)

    def check(data: bytes) -> None:
        try:
            request = parse_message(classify_messages.ClassifyRequest.FromString, counter, data)
            call = Call(classify.SERVICE + "/Classify", "fuzzer", None, len(data), None)  # type: ignore[arg-type]
            response = loop.run_until_complete(servicer.Classify(request, call))
        except RequestError as error:
            _check_message(error)
            return
        assert len(response.results) == len(request.images) + len(request.packed_rgb) // IMAGE_BYTES

    return check


def make_infer() -> Check:
    """Every request gets two tensors, or an error that becomes a status."""
    loop, _, servicer = _servicers()
    counter = open_inference.field_counter(MAX_IMAGES)

    def check(data: bytes) -> None:
        try:
            request = parse_message(inference_messages.ModelInferRequest.FromString, counter, data)
            call = Call(open_inference.SERVICE + "/ModelInfer", "fuzzer", None, len(data), None)  # type: ignore[arg-type]
            response = loop.run_until_complete(servicer.ModelInfer(request, call))
        except RequestError as error:
            _check_message(error)
            return
        assert response.outputs

    return check


def _check_message(error: RequestError) -> None:
    assert error.message
    assert len(error.message) < 2000, "a message echoes what the client sent without a limit"


def classify_seeds() -> list[bytes]:
    """Requests of every kind of image."""
    image = classify_messages.Image
    request = classify_messages.ClassifyRequest
    pixels = exports.pictures(2)
    requests = [
        request(images=[image(encoded=saved(gradient(40, 30)))], request_id="a", top_k=3),
        request(images=[image(rgb=pixels[0].tobytes())], packed_rgb=pixels.tobytes()),
        request(images=[image(encoded=b"nothing"), image()], top_k=1),
    ]
    return [message.SerializeToString() for message in requests]


def infer_seeds() -> list[bytes]:
    """Requests with raw and with typed contents, outputs and parameters."""
    pixels = exports.pictures(1)
    request = inference_messages.ModelInferRequest
    tensor = {"name": open_inference.INPUT, "datatype": "UINT8", "shape": [1, 32, 32, 3]}
    name = _servicers()[2]._inference.model.name
    typed = inference_messages.InferTensorContents(uint_contents=pixels.ravel().tolist())
    output = request.InferRequestedOutputTensor(
        name="probabilities", parameters={"classification": inference_messages.InferParameter(int64_param=2)}
    )
    timeout = {"timeout": inference_messages.InferParameter(int64_param=1_000_000)}
    requests = [
        request(model_name=name, inputs=[request.InferInputTensor(**tensor)], raw_input_contents=[pixels.tobytes()]),
        request(model_name=name, id="a", inputs=[request.InferInputTensor(**tensor, contents=typed)], outputs=[output]),
        request(
            model_name=name,
            inputs=[request.InferInputTensor(**tensor)],
            raw_input_contents=[pixels.tobytes()],
            parameters=timeout,
        ),
    ]
    return [message.SerializeToString() for message in requests]


TARGETS = {
    **{format_.lower(): Target(lambda: check_image, functools.partial(image_seeds, format_)) for format_ in FORMATS},
    "classify_request": Target(make_classify, classify_seeds),
    "infer_request": Target(make_infer, infer_seeds),
}
