"""An engine that never returns from a batch: health reports it, and the process ends instead of hanging for ever."""

import signal
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.client import Client, Options
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from service.server import STUCK_EXIT_CODE
from tests.service import exports
from tests.service.conftest import until
from tests.service.exports import expected, pictures, stalling

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that needs days for a batch that begins with the byte 255."""
    return exports.write_export(tmp_path_factory.mktemp("endless"), exports.graph(0, loops=10**8))


def occupy(channel: grpc.Channel) -> grpc.Future:
    request = messages.ClassifyRequest(packed_rgb=stalling(1).tobytes())
    return rpc.ImageClassifierStub(channel).Classify.future(request)


def is_busy(channel: grpc.Channel) -> bool:
    """Whether a quick request gets no answer within a second."""
    quick = messages.ClassifyRequest(packed_rgb=pictures(1).tobytes())
    call = rpc.ImageClassifierStub(channel).Classify.future(quick, timeout=1)
    return call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_stuck_engine_is_not_serving_and_ends_the_process_within_the_grace_period(start_server, endless):
    server = start_server("--model", endless, "--max-batch-seconds", "1", "--grace", "2").ready()
    with grpc.insecure_channel(server.target) as channel, grpc.insecure_channel(server.target) as second:
        watch = health_pb2_grpc.HealthStub(second).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        call = occupy(channel)
        assert next(watch).status == NOT_SERVING
        assert server.wait() == STUCK_EXIT_CODE
        assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert "a batch has been computing for more than 1 s" in server.log


def test_sigterm_ends_a_server_whose_engine_is_stuck(start_server, endless):
    server = start_server("--model", endless, "--grace", "1").ready()
    with grpc.insecure_channel(server.target) as channel:
        calls = [occupy(channel)]

        def stuck() -> bool:
            # A batch that begins with the quick request does not stall, and answers both.
            if calls[-1].done():
                calls.append(occupy(channel))
            return is_busy(second)

        with grpc.insecure_channel(server.target) as second:
            until(stuck)
        started = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert time.monotonic() - started < 30
        assert calls[-1].code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def test_a_worker_with_a_stuck_engine_is_replaced_and_clients_that_retry_lose_nothing(start_server, endless):
    server = start_server(
        "--model", endless, "--workers", "2", "--max-batch-seconds", "1", "--grace", "2", "--metrics-port", "0"
    ).ready()
    images = pictures(3)
    with grpc.insecure_channel(server.target) as channel:
        call = occupy(channel)
        until(lambda: any("worker_restarts" in name and value >= 1 for name, value in server.metrics().items()))
        with Client(server.target, Options(timeout=60)) as client:
            assert abs(client.probabilities(images) - expected(0, images)).max() < 1e-5
        assert call.code() is grpc.StatusCode.UNAVAILABLE
    assert server.stop() == 0
