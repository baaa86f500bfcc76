"""Every kind of bad input gets its code and message, and does not change how the server answers afterwards."""

import socket
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from service.generated.cifar.v1 import image_classifier_pb2 as cifar
from service.generated.cifar.v1 import image_classifier_pb2_grpc as cifar_rpc
from service.generated.inference import open_inference_pb2 as inference
from service.generated.inference import open_inference_pb2_grpc as inference_rpc
from tests.cifar_core.image_corpus import gradient, saved
from tests.cifar_core.test_images import png_of_few_bytes
from tests.service.conftest import Server, table
from tests.service.exports import expected, pictures

INVALID, NOT_FOUND, EXHAUSTED, UNIMPLEMENTED = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
)


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    # Without a limit in the client, so that the server has to refuse large messages.
    with grpc.insecure_channel(server.target, [("grpc.max_send_message_length", -1)]) as channel:
        yield channel


@pytest.fixture(autouse=True)
def _answers_as_before(channel: grpc.Channel) -> Iterator[None]:
    yield
    images = pictures(3)
    response = cifar_rpc.ImageClassifierStub(channel).Classify(cifar.ClassifyRequest(packed_rgb=images.tobytes()))
    assert np.abs(np.array(table(response)) - expected(0, images)).max() < 1e-5


PNG = saved(gradient(64, 48))
JPEG = saved(gradient(64, 48), "JPEG")

# Bad images, which fail alone.
BAD_IMAGES = {
    "an empty file": (b"", "the image is empty"),
    "a PNG cut short": (PNG[:-40], "damaged"),
    "a PNG cut in its head": (PNG[:20], "damaged"),
    "a JPEG cut short": (JPEG[:300], "damaged"),
    "a GIF cut short": (saved(gradient(64, 48), "GIF")[:900], "damaged"),
    "a WebP cut short": (saved(gradient(64, 48), "WEBP", lossless=True)[:80], "damaged|not an image"),
    "a BMP cut short": (saved(gradient(64, 48), "BMP")[:200], "damaged"),
    "a text named .png": (b"This is not a picture, whatever its name says.", "begins with b'This is '"),
    "a TIFF": (saved(gradient(8, 8), "TIFF"), "not an image in PNG, JPEG, WEBP, GIF, BMP"),
    "an ICO": (saved(gradient(32, 32), "ICO"), "not an image"),
    "a PPM": (saved(gradient(8, 8), "PPM"), "not an image"),
    "a PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "not an image"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "a ZIP": (b"PK\x03\x04" + bytes(100), "not an image"),
    "EPS, which Pillow would pass to another program": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "not an image"),
    "a bomb of 30,000 x 30,000": (png_of_few_bytes(30_000, 30_000), "900000000 pixels; at most 32000000 are allowed"),
    "a bomb of the largest size": (png_of_few_bytes(2**31 - 1, 2**31 - 1), "pixels; at most|damaged|not an image"),
    "a PNG of no size": (png_of_few_bytes(0, 0), "damaged|not an image"),
    "a PNG with less data than its size": (png_of_few_bytes(500, 500), "damaged"),
    "a PNG whose checksum is wrong": (PNG[:20] + bytes([PNG[20] ^ 255]) + PNG[21:], "damaged"),
    "a file of more bytes than allowed": (bytes(8_000_001), "8000001 bytes; at most 8000000 are allowed"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_has_its_own_error(channel, kind):
    file, message = BAD_IMAGES[kind]
    good = pictures(1)[0]
    request = cifar.ClassifyRequest(images=[cifar.Image(encoded=file), cifar.Image(rgb=good.tobytes())])
    bad, other = cifar_rpc.ImageClassifierStub(channel).Classify(request).results
    assert bad.error.code == INVALID.value[0]
    assert not bad.classes
    assert any(part in bad.error.message for part in message.split("|")), bad.error.message
    assert other.classes
    assert not other.HasField("error")


@pytest.mark.parametrize("length", [0, 1, 3071, 3073, 4096])
def test_raw_pixels_of_another_length_have_their_own_error(channel, length):
    request = cifar.ClassifyRequest(images=[cifar.Image(rgb=bytes(length)), cifar.Image(rgb=bytes(3072))])
    bad, good = cifar_rpc.ImageClassifierStub(channel).Classify(request).results
    assert bad.error.code == INVALID.value[0]
    assert f"rgb holds {length} bytes; it must hold 3072" in bad.error.message
    assert good.classes


# Bad requests, which fail as a whole.
BAD_REQUESTS: dict[str, tuple[cifar.ClassifyRequest, grpc.StatusCode, str]] = {
    "no images": (cifar.ClassifyRequest(), INVALID, "the request holds no images"),
    "too many files": (cifar.ClassifyRequest(images=[cifar.Image()] * 401), INVALID, "401 images; at most 400"),
    "too many packed": (cifar.ClassifyRequest(packed_rgb=bytes(401 * 3072)), INVALID, "401 images; at most 400"),
    "too many together": (
        cifar.ClassifyRequest(images=[cifar.Image()], packed_rgb=bytes(400 * 3072)), INVALID, "401 images",
    ),
    "packed pixels that end within an image": (
        cifar.ClassifyRequest(packed_rgb=bytes(3073)), INVALID, "packed_rgb holds 3073 bytes; it must hold a multiple",
    ),
    "a message that is too large": (
        cifar.ClassifyRequest(packed_rgb=bytes(17 * 2**20)), EXHAUSTED, "larger than max",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_a_bad_request_has_its_status(channel, kind):
    request, code, message = BAD_REQUESTS[kind]
    with pytest.raises(grpc.RpcError) as caught:
        cifar_rpc.ImageClassifierStub(channel).Classify(request)
    assert caught.value.code() is code
    assert message in caught.value.details()


def infer(**changes: object) -> inference.ModelInferRequest:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], **changes.pop("tensor", {})}  # type: ignore[dict-item]
    values = {"model_name": "cifar10", "raw_input_contents": [bytes(3072)], **changes}
    values.setdefault("inputs", [inference.ModelInferRequest.InferInputTensor(**tensor)])
    return inference.ModelInferRequest(**values)


def with_parameter(name: str, **value: object) -> inference.ModelInferRequest:
    return infer(parameters={name: inference.InferParameter(**value)})


def output(name: str, **parameters: int | str) -> inference.ModelInferRequest.InferRequestedOutputTensor:
    asked = inference.ModelInferRequest.InferRequestedOutputTensor(name=name)
    for key, value in parameters.items():
        if isinstance(value, str):
            asked.parameters[key].string_param = value
        else:
            asked.parameters[key].int64_param = value
    return asked


TENSOR = inference.ModelInferRequest.InferInputTensor
BAD_INFERENCES: dict[str, tuple[inference.ModelInferRequest, grpc.StatusCode, str]] = {
    "no model": (infer(model_name=""), NOT_FOUND, "there is no model ''; the model is 'cifar10'"),
    "an unknown model": (infer(model_name="resnet"), NOT_FOUND, "no model 'resnet'"),
    "an unknown version": (infer(model_version="2"), NOT_FOUND, "no version '2'; version '1' is served"),
    "no input": (infer(inputs=[]), INVALID, "there are 0 inputs (); there must be one, 'images'"),
    "two inputs": (infer(inputs=[TENSOR(name="images")] * 2), INVALID, "there must be one"),
    "an input of another name": (infer(tensor={"name": "image"}), INVALID, "there are 1 inputs ('image')"),
    "another type": (infer(tensor={"datatype": "FP32"}), INVALID, "of type 'FP32'; it must be UINT8"),
    "channels first": (infer(tensor={"shape": [1, 3, 32, 32]}), INVALID, "[1, 3, 32, 32]; it must be [n, 32, 32, 3]"),
    "no batch dimension": (infer(tensor={"shape": [32, 32, 3]}), INVALID, "has shape [32, 32, 3]"),
    "a negative batch": (infer(tensor={"shape": [-1, 32, 32, 3]}), INVALID, "has shape [-1, 32, 32, 3]"),
    "a batch of none": (infer(tensor={"shape": [0, 32, 32, 3]}, raw_input_contents=[b""]), INVALID, "holds no images"),
    "a batch too large": (infer(tensor={"shape": [401, 32, 32, 3]}), INVALID, "401 images; at most 400"),
    "a batch of 2^62": (infer(tensor={"shape": [2**62, 32, 32, 3]}), INVALID, "at most 400"),
    "too few bytes": (infer(raw_input_contents=[bytes(3071)]), INVALID, "3071 bytes; shape [1, 32, 32, 3] needs 3072"),
    "too many bytes": (infer(raw_input_contents=[bytes(3073)]), INVALID, "holds 3073 bytes"),
    "two raw contents": (infer(raw_input_contents=[bytes(3072)] * 2), INVALID, "2 raw_input_contents for one input"),
    "no contents": (infer(raw_input_contents=[]), INVALID, "holds 0 elements in uint_contents"),
    "typed elements above 255": (
        infer(
            tensor={"contents": inference.InferTensorContents(uint_contents=[256] * 3072)}, raw_input_contents=[],
        ), INVALID, "holds 256; the largest UINT8 is 255",
    ),
    "an unknown output": (infer(outputs=[output("labels")]), INVALID, "no output 'labels'; the outputs are logits"),
    "an output twice": (infer(outputs=[output("logits")] * 2), INVALID, "requested twice"),
    "a negative classification": (infer(outputs=[output("logits", classification=-1)]), INVALID, "is -1"),
    "a classification that is a text": (
        infer(outputs=[output("logits", classification="3")]), INVALID, "'classification'",
    ),
    "shared memory": (infer(outputs=[output("logits", shared_memory_region=1)]), UNIMPLEMENTED, "shared memory"),
    "a sequence": (with_parameter("sequence_id", int64_param=5), UNIMPLEMENTED, "no state between requests"),
    "a timeout that is a text": (with_parameter("timeout", string_param="1s"), INVALID, "not a whole number"),
    "a negative timeout": (with_parameter("timeout", int64_param=-1), INVALID, "must not be negative"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_INFERENCES)
def test_a_bad_inference_request_has_its_status(channel, kind):
    request, code, message = BAD_INFERENCES[kind]
    with pytest.raises(grpc.RpcError) as caught:
        inference_rpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert caught.value.code() is code
    assert message in caught.value.details()


@pytest.mark.parametrize(
    ("method", "message", "code"),
    [
        ("/cifar.v1.ImageClassifier/Classify", b"\xff\xff\xff\xff", INVALID),
        ("/cifar.v1.ImageClassifier/GetModel", b"\xff", INVALID),
        ("/inference.GRPCInferenceService/ModelReady", b"\xff", INVALID),
        ("/cifar.v1.ImageClassifier/Clasify", b"", UNIMPLEMENTED),
        ("/inference.GRPCInferenceService/ModelInfer", b"\x0a\xff", INVALID),
        ("/inference.GRPCInferenceService/RepositoryIndex", b"", UNIMPLEMENTED),
        ("/nothing", b"", UNIMPLEMENTED),
    ],
)
def test_invalid_messages_and_unknown_methods_have_their_status(channel, method, message, code):
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(method)(message, timeout=20)
    assert caught.value.code() is code


GARBAGE: dict[str, Callable[[], bytes]] = {
    "random bytes": lambda: np.random.default_rng(1).bytes(100_000),
    "HTTP/1.1": lambda: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a TLS greeting": lambda: bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "HTTP/2 with a broken frame": lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000,
    "HTTP/2 with settings, then nothing": lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04" + bytes(5),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_on_the_port_does_not_affect_other_clients(server, kind):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        try:
            connection.sendall(GARBAGE[kind]())
            connection.settimeout(1)
            connection.recv(1000)
        except OSError:  # it may close the connection while we still send
            return


def test_a_client_that_vanishes_in_the_middle_of_its_message_does_not_affect_others(server):
    for _ in range(20):
        channel = grpc.insecure_channel(server.target)
        call = cifar_rpc.ImageClassifierStub(channel).Classify.future(
            cifar.ClassifyRequest(packed_rgb=bytes(400 * 3072))
        )
        channel.close()
        assert call.done()


def test_a_decompression_bomb_is_refused_quickly(channel):
    request = cifar.ClassifyRequest(images=[cifar.Image(encoded=png_of_few_bytes(30_000, 30_000))])
    stub = cifar_rpc.ImageClassifierStub(channel)
    fastest = min(timed(lambda: stub.Classify(request)) for _ in range(10))
    assert fastest < 0.5  # decoding it would take many seconds and 2.7 GB


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
