"""A model that computes no finite probabilities for one image, through every way in which an image reaches it."""

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.client import ClassificationError, Client
from service.core.inference import Answer
from service.errors import EngineFailed
from service.generated.cifar.v1 import image_classifier_pb2 as cifar
from service.generated.cifar.v1 import image_classifier_pb2_grpc as cifar_rpc
from service.generated.inference import open_inference_pb2 as inference
from service.generated.inference import open_inference_pb2_grpc as inference_rpc
from service.http import infer_body
from tests.service import exports
from tests.service.conftest import Server, serving
from tests.service.exports import expected, pictures
from tests.service.http.test_classify import BROKEN, classify, png, probabilities
from tests.service.http.test_open_inference import infer, infer_binary
from tests.service.http.web import Web
from tests.service.score.pictures import assert_classified, packed, score, write_images

MESSAGE = "the model computes no finite probabilities for this image"
TENSOR_MESSAGE = "the model computes no finite probabilities for 2 of 5 images, first for the one with index 1"


@pytest.fixture(scope="module")
def dividing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose outputs are those of `graph(0)`, but NaN for a black image."""
    return exports.write_export(tmp_path_factory.mktemp("dividing"), exports.graph(0, divides=True))


@pytest.fixture(scope="module")
def server(dividing: Path) -> Iterator[Server]:
    with serving("--model", dividing, "--http-port", "0", "--metrics-port", "0") as running:
        yield running


@pytest.fixture
def web(server: Server) -> Iterator[Web]:
    with Web(server.http_url) as connection:
        yield connection


def with_black(*black: int) -> np.ndarray:
    """Five images; those at these places are black."""
    images = pictures(5)
    images[list(black)] = 0
    return images


def test_over_grpc_only_the_image_has_an_error(server):
    images = with_black(1, 4)
    request = cifar.ClassifyRequest(
        images=[cifar.Image(encoded=png(images[0])), cifar.Image(encoded=BROKEN), cifar.Image(encoded=png(images[1]))],
        packed_rgb=images[2:].tobytes(),
    )
    with grpc.insecure_channel(server.target) as channel:
        results = cifar_rpc.ImageClassifierStub(channel).Classify(request).results
        request.as_table = True
        table = cifar_rpc.ImageClassifierStub(channel).Classify(request).table
    errors = [result.error.code for result in results]
    assert errors == [0, grpc.StatusCode.INVALID_ARGUMENT.value[0], grpc.StatusCode.INTERNAL.value[0], 0, 0, 13]
    assert results[2].error.message == results[5].error.message == MESSAGE
    rows = np.frombuffer(table.probabilities, "<f4").reshape(6, -1)
    assert np.abs(rows[[0, 3, 4]] - expected(0, images)[[0, 2, 3]]).max() < 1e-5
    assert sorted(table.errors) == [1, 2, 5]
    assert [ranked.index for ranked in results[3].classes] == np.argsort(-expected(0, images)[2]).tolist()


def test_the_client_gives_the_error_to_the_image_and_names_it_for_arrays(server):
    with Client(server.target) as client:
        answers = client.classify(with_black(1, 4))
        with pytest.raises(ClassificationError, match=f"INTERNAL: the image with index 1: {MESSAGE}"):
            client.probabilities(with_black(1, 4))
    assert [answer.error for answer in answers] == [None, MESSAGE, None, None, MESSAGE]


def test_over_http_only_the_image_has_an_error_and_the_metrics_count_it(server, web):
    before = server.metrics()
    images = with_black(1)
    files = [(None, png(images[0])), (None, BROKEN), (None, png(images[1])), (None, png(images[2]))]
    reply = classify(web, files, "?pixels=true")
    assert reply.status == 200
    first, broken, black, last = reply.json["results"]
    assert broken["error"]["code"] == "INVALID_ARGUMENT"
    assert black["error"] == {"code": "INTERNAL", "message": MESSAGE}
    found = np.array([probabilities(first), probabilities(last)])
    assert np.abs(found - expected(0, images)[[0, 2]]).max() < 1e-5
    after = server.metrics()
    names = [f'cifar_service_images_total{{outcome="{outcome}"}}' for outcome in ("classified", "rejected")]
    assert [after[name] - before[name] for name in names] == [2, 2]


def test_a_request_with_tensors_fails_and_names_the_first_image(server):
    images = with_black(1, 4)
    request = inference.ModelInferRequest(model_name="cifar10", raw_input_contents=[images.tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=images.shape)
    with grpc.insecure_channel(server.target) as channel:
        stub = inference_rpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match=TENSOR_MESSAGE) as caught:
            stub.ModelInfer(request)
        (streamed,) = stub.ModelStreamInfer(iter([request]))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert TENSOR_MESSAGE in streamed.error_message


@pytest.mark.parametrize("binary", [False, True])
def test_a_request_with_tensors_over_http_fails_and_names_the_first_image(web, binary):
    wanted = [{"name": "probabilities", "parameters": {"binary_data": binary, "classification": 2}}, {"name": "logits"}]
    reply = (infer_binary if binary else infer)(web, with_black(1, 4), outputs=wanted)
    assert reply.status == 500
    assert TENSOR_MESSAGE in reply.json["detail"]


def test_json_holds_no_infinite_logit():
    """A model may give a class the logit -infinity: its probability is 0."""
    logits = np.array([[0, 1], [0, -np.inf]], np.float32)
    image = {"name": "images", "datatype": "UINT8", "shape": [2, 32, 32, 3], "data": [0]}
    request = infer_body.parse(json.dumps({"inputs": [image]}).encode(), {})
    answer = Answer(None, logits, np.array([[0.3, 0.7], [1, 0]], np.float32), [])  # type: ignore[arg-type]
    with pytest.raises(EngineFailed, match=r"'logits' of the image with index 1 is not finite, .* ask for bytes"):
        infer_body.answer(request, answer)


@pytest.mark.parametrize("kind", ["files", "pixels"])
def test_offline_only_the_row_of_the_image_has_an_error(dividing, tmp_path, kind):
    images = with_black(1, 4)
    if kind == "files":
        write_images(tmp_path / "in", images)
    else:
        (tmp_path / "in").mkdir()
        pq.write_table(pa.table({"image": packed(images).cast(pa.binary(3072))}), tmp_path / "in/a.parquet")
    assert score(tmp_path / "in", tmp_path / "out", "--batch-size", 3, model=dividing) == 1
    table = pq.read_table(tmp_path / "out")
    assert table["error"].to_pylist() == [None, MESSAGE, None, None, MESSAGE]
    assert [table[name].to_pylist()[1] for name in ("class", "probabilities")] == [None, None]
    assert_classified(table.take([0, 2, 3]), images[[0, 2, 3]])
