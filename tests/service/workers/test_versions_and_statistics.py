"""What clients of the Open Inference Protocol see of a server with several workers."""

import signal

import grpc
import psutil
import pytest

from service.generated.cifar.v1 import image_classifier_pb2 as cifar
from service.generated.cifar.v1 import image_classifier_pb2_grpc as cifar_rpc
from service.generated.inference import open_inference_pb2 as messages
from service.generated.inference import open_inference_pb2_grpc as rpc
from tests.service.conftest import Server, until
from tests.service.exports import graph, pictures, write_export

WORKERS = 2


def connect(server: Server) -> list[grpc.Channel]:
    """Connections that, together, reach all workers: the kernel gives each connection to one of them."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    return [grpc.insecure_channel(server.target, options) for _ in range(12)]


def infer(channel: grpc.Channel, images: int) -> messages.ModelInferResponse:
    pixels = pictures(images)
    tensor = messages.ModelInferRequest.InferInputTensor(name="images", datatype="UINT8", shape=pixels.shape)
    request = messages.ModelInferRequest(model_name="cifar10", inputs=[tensor], raw_input_contents=[pixels.tobytes()])
    return rpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60)


def statistics(channel: grpc.Channel) -> messages.ModelStatistics:
    answer = rpc.GRPCInferenceServiceStub(channel).ModelStatistics(messages.ModelStatisticsRequest(), timeout=60)
    return answer.model_stats[0]


def versions(channels: list[grpc.Channel]) -> set[tuple[str, str]]:
    answers = [infer(channel, 1) for channel in channels]
    return {(answer.model_version, answer.parameters["export"].string_param) for answer in answers}


def worker_pids(server: Server) -> list[int]:
    return [child.pid for child in psutil.Process(server.process.pid).children()]


@pytest.fixture
def server(start_server, tmp_path):
    write_export(tmp_path, graph(0), version="first")
    return start_server(
        "--model", tmp_path, "--workers", str(WORKERS), "--threads", "1", "--decode-processes", "1",
        "--metrics-port", "0",
    ).ready()  # fmt: skip


def test_all_workers_have_the_same_version_and_statistics_also_after_a_reload_and_a_restart(server, tmp_path):
    channels = connect(server)
    assert versions(channels) == {("1", "first")}
    request = cifar.ClassifyRequest(packed_rgb=pictures(3).tobytes())
    cifar_rpc.ImageClassifierStub(channels[0]).Classify(request, timeout=60)
    requests, images = len(channels) + 1, len(channels) + 3
    for channel in channels:
        seen = statistics(channel)
        assert (seen.version, seen.inference_count) == ("1", images)
        assert seen.inference_stats.success.count == seen.inference_stats.queue.count == requests
        assert sum(batch.batch_size * batch.compute_infer.count for batch in seen.batch_stats) == images
        assert seen.inference_stats.success.ns > seen.inference_stats.compute_infer.ns > 0
    last = seen.last_inference

    # Another export, then a worker that ends: the one that replaces it has never served the first export.
    write_export(tmp_path, graph(1), version="second")
    server.wait_for("model second .* replaces", count=WORKERS)
    assert versions(channels) == {("2", "second")}
    victim = worker_pids(server)[0]
    psutil.Process(victim).send_signal(signal.SIGKILL)
    until(lambda: server.metrics()["cifar_service_worker_restarts_total"] == 1)
    until(lambda: sum("serving second" in line for line in server.lines) >= 1)
    again = connect(server)
    assert versions(again) == {("2", "second")}
    for channel in again:
        seen = statistics(channel)
        assert (seen.version, seen.inference_count) == ("2", len(channels) + len(again))
        assert seen.last_inference >= last

    # The first export again: its number and its statistics are those that it had.
    write_export(tmp_path, graph(0), version="first")
    server.wait_for("model first .* replaces", count=WORKERS)
    assert versions(again) == {("1", "first")}
    assert statistics(again[0]).inference_count == images + len(again)
    for channel in (*channels, *again):
        channel.close()
