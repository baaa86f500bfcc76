"""The statistics of the Open Inference Protocol count all requests that reach the model, whatever their protocol."""

import io
from typing import NamedTuple

import grpc
import pytest
from PIL import Image

from service.generated.cifar.v1 import image_classifier_pb2 as cifar
from service.generated.cifar.v1 import image_classifier_pb2_grpc as cifar_rpc
from service.generated.inference import open_inference_pb2 as messages
from service.generated.inference import open_inference_pb2_grpc as rpc
from tests.service.exports import pictures, stalling


class Seen(NamedTuple):
    success: int
    fail: int
    images: int


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.target) as opened:
        yield opened


def read(channel: grpc.Channel) -> messages.ModelStatistics:
    request = messages.ModelStatisticsRequest(name="cifar10", version="1")
    return rpc.GRPCInferenceServiceStub(channel).ModelStatistics(request).model_stats[0]


def change(channel: grpc.Channel, action) -> Seen:
    """How many more requests and images are counted after `action`."""
    before = read(channel)
    action()
    after = read(channel)
    success, fail = (
        getattr(after.inference_stats, phase).count - getattr(before.inference_stats, phase).count
        for phase in ("success", "fail")
    )
    return Seen(success, fail, after.inference_count - before.inference_count)


def classify(channel: grpc.Channel, *images: cifar.Image, packed: bytes = b"") -> None:
    cifar_rpc.ImageClassifierStub(channel).Classify(cifar.ClassifyRequest(images=images, packed_rgb=packed))


def infer(channel: grpc.Channel, pixels) -> None:
    request = messages.ModelInferRequest(model_name="cifar10", raw_input_contents=[pixels.tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=pixels.shape)
    rpc.GRPCInferenceServiceStub(channel).ModelInfer(request)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(file, "PNG")
    return file.getvalue()


def test_calls_of_both_protocols_are_counted(channel):
    assert change(channel, lambda: infer(channel, pictures(4))) == Seen(1, 0, 4)
    assert change(channel, lambda: classify(channel, packed=pictures(5).tobytes())) == Seen(1, 0, 5)
    stream = cifar_rpc.ImageClassifierStub(channel).ClassifyStream
    requests = [cifar.ClassifyRequest(packed_rgb=pictures(2).tobytes())] * 3
    assert change(channel, lambda: list(stream(iter(requests)))) == Seen(3, 0, 6)


def test_images_that_cannot_be_read_are_not_counted_for_they_did_not_reach_the_model(channel):
    good, bad = cifar.Image(encoded=png()), cifar.Image(encoded=b"no image")
    assert change(channel, lambda: classify(channel, good, bad)) == Seen(1, 0, 1)
    assert change(channel, lambda: classify(channel, bad)) == Seen(0, 0, 0)


def test_a_batch_that_fails_is_a_failure_and_a_request_that_breaks_a_rule_is_not_counted(channel):
    def fail() -> None:
        with pytest.raises(grpc.RpcError):
            infer(channel, stalling(2))

    def break_a_rule() -> None:
        with pytest.raises(grpc.RpcError):
            infer(channel, pictures(401))

    def send_too_few_bytes() -> None:
        request = messages.ModelInferRequest(model_name="cifar10", raw_input_contents=[bytes(100)])
        request.inputs.add(name="images", datatype="UINT8", shape=[2, 32, 32, 3])
        with pytest.raises(grpc.RpcError):
            rpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60)

    assert change(channel, fail) == Seen(0, 1, 0)
    assert change(channel, break_a_rule) == Seen(0, 0, 0)
    assert change(channel, send_too_few_bytes) == Seen(0, 0, 0)


def test_phases_have_times_that_add_up(channel):
    before = read(channel).inference_stats
    infer(channel, pictures(64))
    after = read(channel).inference_stats
    names = ("compute_input", "queue", "compute_infer", "compute_output")
    parts = [getattr(after, name).ns - getattr(before, name).ns for name in names]
    assert min(parts) > 0
    assert sum(parts) <= after.success.ns - before.success.ns


def test_the_metrics_show_the_same(server, channel):
    seen = read(channel).inference_stats.success
    metrics = server.metrics()
    assert metrics['cifar_service_model_requests_total{number="1",phase="success"}'] == seen.count
    seconds = metrics['cifar_service_model_request_seconds_total{number="1",phase="success"}']
    assert seconds == pytest.approx(seen.ns / 1e9)
