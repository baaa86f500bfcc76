"""The bad input of the gRPC tests, sent over HTTP: each has its status and message, and later answers do not change."""

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict

from service.generated.inference import open_inference_pb2 as inference
from tests.service.exports import expected, pictures
from tests.service.http.test_classify import classify, png, probabilities
from tests.service.http.test_open_inference import binary_body, infer_json
from tests.service.http.web import Web, multipart
from tests.service.rpc.test_bad_input import BAD_IMAGES, BAD_INFERENCES

STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNIMPLEMENTED: 400,
}
# Cases whose message names a field that only gRPC has, or that HTTP refuses in other words.
OTHER_WORDS = {
    "no model": "there is no",
    "an unknown version": "has no version '2'",
    "a batch too large": "at most 400",
    "too few bytes": "3071 bytes",
    "two raw contents": "6144 bytes",
    "no contents": "neither 'data' nor the parameter 'binary_data_size'",
    "typed elements above 255": "not a whole number from 0 to 255",
    "a timeout that is a text": "'timeout' of parameters is a string; it must be a whole number",
}


@pytest.fixture(autouse=True)
def _answers_as_before(web: Web) -> Iterator[None]:
    yield
    images = pictures(3)
    results = classify(web, [(None, png(image)) for image in images]).json["results"]
    assert np.abs(np.array([probabilities(result) for result in results]) - expected(0, images)).max() < 1e-5


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_has_its_own_error(web, kind):
    file, message = BAD_IMAGES[kind]
    parts = message.split("|")
    reply = classify(web, [("bad", file), ("good", png(pictures(1)[0]))])
    if len(file) > 8_000_000 - 4096:  # together with the other it is larger than a request may be
        assert reply.status in (200, 413)
    if reply.status == 200:
        bad, good = reply.json["results"]
        assert bad["error"]["code"] == "INVALID_ARGUMENT"
        assert any(part in bad["error"]["message"] for part in parts), bad
        assert good["classes"]
    alone = web.post("/v1/classify", file)
    assert (alone.status, alone.kind) == (422, "application/problem+json")
    assert any(part in alone.json["results"][0]["error"]["message"] for part in parts)


def over_http(request: inference.ModelInferRequest) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of the request that says the same over HTTP."""
    described = MessageToDict(request, preserving_proto_field_name=True)
    for tensor in (inputs := described.get("inputs", [])):
        tensor["shape"] = [int(size) for size in tensor.get("shape", [])]
        tensor.setdefault("datatype", "")
        if "contents" in tensor:
            tensor["data"] = tensor.pop("contents")["uint_contents"]
    outputs = described.get("outputs", [])
    for holder in (described, *outputs):
        for name, value in holder.get("parameters", {}).items():
            holder["parameters"][name] = from_parameter(value)
    raw = b"".join(request.raw_input_contents)
    if request.raw_input_contents and inputs:
        inputs[0].setdefault("parameters", {})["binary_data_size"] = len(raw)
    body: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "parameters": described.get("parameters", {})}
    version = f"/versions/{request.model_version}" if request.model_version else ""
    path = f"/v2/models/{request.model_name}{version}/infer"
    content, headers = binary_body(body, raw) if request.raw_input_contents else (infer_json(body), {})
    return path, content, headers


def from_parameter(value: dict[str, Any]) -> object:
    ((kind, content),) = value.items()
    return int(content) if kind in ("int64_param", "uint64_param") else content


@pytest.mark.parametrize("kind", BAD_INFERENCES)
def test_a_bad_inference_request_has_its_status(web, kind):
    request, code, message = BAD_INFERENCES[kind]
    path, body, headers = over_http(request)
    reply = web.request("POST", path, body, headers)
    assert reply.status == (413 if kind in ("a batch too large", "a batch of 2^62") else STATUSES[code]), reply.body
    assert reply.kind == "application/problem+json"
    assert OTHER_WORDS.get(kind, message) in reply.json["detail"]


IMAGE = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
PIXELS = [0] * 3072


def nested(*shape: int) -> list[Any]:
    """Black pixels in lists of lists."""
    lists: list[Any] = np.zeros(shape, int).tolist()
    return lists


BAD_JSON: dict[str, tuple[bytes | dict[str, Any], int, str]] = {
    "nothing": (b"", 400, "not JSON"),
    "a text": (b"hello", 400, "not JSON"),
    "JSON cut short": (b'{"inputs": [', 400, "not JSON"),
    "a list": (b"[]", 400, "the body is a list; it must be a JSON object"),
    "a number": (b"1", 400, "the body is a whole number"),
    "inputs that are a text": ({"inputs": "images"}, 400, "'inputs' of the body is a string; it must be a list"),
    "an input that is a number": ({"inputs": [1]}, 400, "an input is a whole number"),
    "an id that is a number": ({"id": 7, "inputs": [{**IMAGE, "data": PIXELS}]}, 400, "'id' of the body"),
    "a long id": ({"id": "x" * 1025, "inputs": [{**IMAGE, "data": PIXELS}]}, 400, "at most 1024"),
    "a shape of texts": ({"inputs": [{**IMAGE, "shape": ["1", 32, 32, 3], "data": PIXELS}]}, 400, "'shape'"),
    "a shape of booleans": ({"inputs": [{**IMAGE, "shape": [True, 32, 32, 3], "data": PIXELS}]}, 400, "'shape'"),
    "a shape of 10^30": ({"inputs": [{**IMAGE, "shape": [10**30, 32, 32, 3], "data": PIXELS}]}, 400, "64 bits"),
    "elements that are fractions": ({"inputs": [{**IMAGE, "data": [0.5] * 3072}]}, 400, "not a whole number"),
    "elements that are texts": ({"inputs": [{**IMAGE, "data": ["1"] * 3072}]}, 400, "not a whole number"),
    "elements that are null": ({"inputs": [{**IMAGE, "data": [None] * 3072}]}, 400, "not a whole number"),
    "negative elements": ({"inputs": [{**IMAGE, "data": [-1] * 3072}]}, 400, "not a whole number"),
    "too few elements": ({"inputs": [{**IMAGE, "data": PIXELS[1:]}]}, 400, "3071 bytes"),
    "ragged lists": ({"inputs": [{**IMAGE, "data": [[0], 1, [2]]}]}, 400, "nested as [3, 1]"),
    "lists of different lengths": (
        {"inputs": [{**IMAGE, "data": [[*nested(32, 32, 3)[:-1], [[0] * 3] * 31]]}]}, 400,
        "nested in lists of different lengths; 'shape' says [1, 32, 32, 3]",
    ),
    "a number beside lists": (
        {"inputs": [{**IMAGE, "data": [[*nested(32, 32, 3)[:-1], 0]]}]}, 400, "nested in lists of different lengths",
    ),
    "channels first": (
        {"inputs": [{**IMAGE, "data": nested(1, 3, 32, 32)}]}, 400,
        "'data' of input 'images' is nested as [1, 3, 32, 32]; 'shape' says [1, 32, 32, 3]",
    ),
    "rows of pixels": ({"inputs": [{**IMAGE, "data": nested(1, 3072)}]}, 400, "is nested as [1, 3072]; 'shape' says"),
    "lists too deep": ({"inputs": [{**IMAGE, "data": nested(1, 1, 32, 32, 3)}]}, 400, "nested as [1, 1, 32, 32, 3]"),
    "an empty list in a list": ({"inputs": [{**IMAGE, "data": [[]]}]}, 400, "nested as [1, 0]"),
    "true as a pixel": ({"inputs": [{**IMAGE, "data": [True, *PIXELS[1:]]}]}, 400, "not a whole number"),
    "deep lists": (b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "not JSON"),
    "a long number": (b'{"id":' + b"9" * 100_000 + b"}", 400, ""),
    "data and binary data": (
        {"inputs": [{**IMAGE, "data": PIXELS, "parameters": {"binary_data_size": 0}}]}, 400, "has both",
    ),
    "binary data that are missing": (
        {"inputs": [{**IMAGE, "parameters": {"binary_data_size": 3072}}]}, 400, "0 bytes follow the JSON",
    ),
    "a timeout of 10^400": (
        {"parameters": {"timeout": 10**400}, "inputs": [{**IMAGE, "data": PIXELS}]}, 400, "64 bits",
    ),
    "more JSON than allowed": (b" " * (2 * 2**20 + 1), 413, "use the binary tensor extension"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_has_its_status(web, kind):
    content, status, message = BAD_JSON[kind]
    body = content if isinstance(content, bytes) else infer_json(content)
    reply = web.request("POST", "/v2/models/cifar10/infer", body)
    assert (reply.status, reply.kind) == (status, "application/problem+json"), reply.body
    assert message in reply.json["detail"]


@pytest.mark.parametrize("length", ["-1", "x", "9999999999", "99999999999999999999", "1e3", ""])
def test_a_wrong_length_of_the_json_is_a_bad_request(web, length):
    body = infer_json({"inputs": [{**IMAGE, "data": PIXELS}]})
    reply = web.request("POST", "/v2/models/cifar10/infer", body, {"Inference-Header-Content-Length": length})
    assert reply.status == 400
    assert "Inference-Header-Content-Length" in reply.json["detail"]


BAD_MULTIPART = {
    "no boundary": (b"x", "multipart/form-data", "without a boundary"),
    "a boundary that does not occur": (b"x" * 1000, "multipart/form-data; boundary=y", "not multipart/form-data"),
    "cut short": (multipart([("a", b"x" * 100)])[0][:120], multipart([])[1], "not multipart/form-data"),
    "no parts": (*multipart([]), "holds no images"),
    "a header of 5,000 bytes": (
        b"--y\r\nContent-Disposition: form-data; name=" + b"a" * 5000 + b"\r\n\r\n\r\n--y--\r\n",
        "multipart/form-data; boundary=y", "bytes in a header",
    ),
    "100 headers": (
        b"--y\r\n" + b"a: b\r\n" * 100 + b"\r\n\r\n--y--\r\n", "multipart/form-data; boundary=y", "headers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_MULTIPART)
def test_a_bad_multipart_body_is_refused(web, kind):
    body, content_type, message = BAD_MULTIPART[kind]
    reply = web.post("/v1/classify", body, content_type)
    assert (reply.status, reply.kind) in ((400, "application/problem+json"), (413, "application/problem+json"))
    assert message in reply.json["detail"]


def test_more_images_than_allowed_are_too_large(web):
    reply = classify(web, [(None, b"x")] * 401)
    assert reply.status == 413
    assert "400 parts (--max-images)" in reply.json["detail"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_larger_than_allowed_is_refused_and_the_connection_stays_usable(web, chunked):
    body = bytes(8 * 2**20 + 1)
    content = (body[start : start + 2**16] for start in range(0, len(body), 2**16)) if chunked else body
    reply = web.request("POST", "/v1/classify", content, {"Transfer-Encoding": "chunked"} if chunked else {})
    assert reply.status == 413
    assert "more than 8388608 bytes, the limit (--max-message-bytes)" in reply.json["detail"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
def test_a_compressed_body_is_refused(web, encoding):
    reply = web.post("/v1/classify", png(pictures(1)[0]), Content_Encoding=encoding)
    assert reply.status == 415
    assert "send it as it is" in reply.json["detail"]
