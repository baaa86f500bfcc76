"""The limit on the classes that one answer names, through gRPC and HTTP."""

from collections.abc import Iterator

import grpc
import pytest

from service.client import Client
from service.core.inference import MAX_RANKED_CLASSES
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from tests.service.conftest import Server, serving
from tests.service.exports import pictures, pixels_as_probabilities, write_export
from tests.service.http.test_classify import classify, png
from tests.service.http.web import Web

CLASSES = 3073
IMAGES = MAX_RANKED_CLASSES // CLASSES + 1
MESSAGE = f"the answer would name 3,073 classes for each of {IMAGES} images; an answer names at most 1,048,576 in all"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    classes = [str(number) for number in range(CLASSES)]
    export = write_export(tmp_path_factory.mktemp("export"), pixels_as_probabilities(), classes=classes)
    with serving("--model", export, "--http-port", "0") as running:
        yield running


def test_over_grpc_fewer_classes_fewer_images_or_a_table_are_the_way_out(server):
    request = messages.ClassifyRequest(packed_rgb=pictures(IMAGES).tobytes())
    with grpc.insecure_channel(server.target) as channel:
        stub = rpc.ImageClassifierStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Classify(request)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert MESSAGE in caught.value.details()
        request.top_k = 5
        assert {len(result.classes) for result in stub.Classify(request).results} == {5}
    with Client(server.target) as client:  # asks for a table
        assert client.probabilities(pictures(IMAGES)).shape == (IMAGES, CLASSES)


def test_over_http_fewer_classes_are_the_way_out(server):
    files = [(None, png(image)) for image in pictures(IMAGES)]
    with Web(server.http_url) as web:
        reply = classify(web, files)
        assert reply.status == 400
        assert MESSAGE in reply.json["error"]
        assert len(classify(web, files, "?top_k=2").json["results"]) == IMAGES
