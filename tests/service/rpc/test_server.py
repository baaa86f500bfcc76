"""Start, drain and stop of a real server process."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image as PillowImage

from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from service.rpc.classify import SERVICE
from tests.conftest import REPOSITORY
from tests.service import exports
from tests.service.conftest import DIRECTLY, table, until
from tests.service.exports import expected, pictures, stalling

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "cifar.v1.ImageClassifier", "inference.GRPCInferenceService")


def packed(count: int = 1, seed: int = 0) -> messages.ClassifyRequest:
    return messages.ClassifyRequest(packed_rgb=pictures(count, seed).tobytes())


def stalled(count: int) -> messages.ClassifyRequest:
    """Images of which the slow model computes one in about a second."""
    return messages.ClassifyRequest(packed_rgb=stalling(count).tobytes())


# Start


def test_the_server_imports_neither_torch_nor_the_training_library():
    script = (
        "import sys, service.server, service.workers.supervisor, service.workers, service.client\n"
        "print([name for name in ('torch', 'cifar_core.data', 'onnx', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_process_that_talks_to_clients_does_not_load_pillow(server):
    picture = io.BytesIO()
    PillowImage.fromarray(pictures(1)[0]).save(picture, "PNG")
    request = messages.ClassifyRequest(images=[messages.Image(encoded=picture.getvalue())])
    with grpc.insecure_channel(server.target) as channel:
        assert not rpc.ImageClassifierStub(channel).Classify(request).results[0].HasField("error")
    libraries = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" in libraries
    assert "PIL/_imaging" not in libraries


def run_to_end(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_that_cannot_start_prints_one_line_and_exits_with_2(tmp_path, linear, workers):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            (["--port", port, "--model", linear], f"port {port} of 127.0.0.1 is already in use"),
            (["--port", "0", "--model", tmp_path], "manifest.json does not exist"),
            (["--port", "0", "--model", linear, "--variant", "int4"], "no variant 'int4'; the variants are: fp32"),
            (["--port", "0", "--model", linear, "--metrics-port", port], f"--metrics-port {port} of 127.0.0.1"),
            (["--port", "0", "--model", linear, "--token-file", tmp_path / "absent"], "token file"),
            (["--port", "0", "--bogus"], "--bogus"),
        ]
        for arguments, message in cases:
            done = run_to_end("--workers", workers, "--log-level", "error", *arguments)
            assert done.returncode == 2, arguments
            assert done.stderr.startswith("error: ")
            assert message in done.stderr
            assert done.stderr.count("\n") == 1, done.stderr


def test_a_port_of_another_server_of_ours_is_reported_as_taken(server, linear):
    done = run_to_end("--port", str(server.port), "--model", linear)
    assert done.returncode == 2
    assert "is already in use" in done.stderr


# Health and reflection


def test_health_is_reported_for_the_server_and_for_each_service(server):
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in SERVICES:
            assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="unknown"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(server):
    with grpc.insecure_channel(server.target) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request])))
        names = {service.name for service in answer.list_services_response.service}
        assert {*SERVICES[1:], "grpc.health.v1.Health"} <= names
        symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="cifar.v1.ImageClassifier")
        described = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([symbol])))
        assert b"ClassifyStream" in described.file_descriptor_response.file_descriptor_proto[0]


# Stop


def test_sigterm_lets_requests_in_flight_finish_refuses_new_ones_and_ends_with_0(start_server, slow):
    server = start_server("--model", slow, "--threads", "1", "--max-batch-size", "1").ready()
    with grpc.insecure_channel(server.target) as channel, grpc.insecure_channel(server.target) as second:
        stub, health = rpc.ImageClassifierStub(channel), health_pb2_grpc.HealthStub(second)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        in_flight = stub.Classify.future(stalled(2))
        while not server_is_busy(second):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Classify(packed())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in caught.value.details()
        assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "100"
        assert health.Check(health_pb2.HealthCheckRequest()).status == NOT_SERVING
        assert np.abs(np.array(table(in_flight.result())) - expected(0, stalling(2))).max() < 1e-5
        assert list(watch) == []  # it ended and did not delay the server
    assert server.wait() == 0
    assert server.wait_for('"stopped"')["unanswered"] == 0


def server_is_busy(channel: grpc.Channel) -> bool:
    """Whether the slow server is computing: then a request with a short deadline gets no answer."""
    call = rpc.ImageClassifierStub(channel).Classify.future(packed(), timeout=0.05)
    return call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_after_the_grace_period_it_stops_and_logs_how_many_requests_it_left(start_server, slow):
    server = start_server("--model", slow, "--threads", "1", "--max-batch-size", "1", "--grace", "0.2").ready()
    with grpc.insecure_channel(server.target) as channel:
        in_flight = rpc.ImageClassifierStub(channel).Classify.future(stalled(100))
        with grpc.insecure_channel(server.target) as other:
            until(lambda: server_is_busy(other))
        assert server.stop() == 0
        assert in_flight.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
    assert server.wait_for('"stopped"')["unanswered"] == 1
    assert "1 requests unanswered after 0.2 s" in server.log


def test_a_second_sigterm_ends_it_at_once(start_server, slow):
    server = start_server("--model", slow, "--threads", "1", "--max-batch-size", "1").ready()
    with grpc.insecure_channel(server.target) as channel:
        call = rpc.ImageClassifierStub(channel).Classify.future(stalled(100))
        with grpc.insecure_channel(server.target) as other:
            until(lambda: server_is_busy(other))
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        assert server.stop() == 128 + signal.SIGTERM
        assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_an_open_stream_ends_with_unavailable(start_server, linear):
    server = start_server("--model", linear).ready()
    end = threading.Event()

    def requests():
        yield packed()
        end.wait(30)

    with grpc.insecure_channel(server.target) as channel:
        answers = rpc.ImageClassifierStub(channel).ClassifyStream(requests())
        assert next(answers).results
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        end.set()
    assert server.wait() == 0


# Deadlines, cancellation, overload


def test_a_call_that_is_given_up_before_its_message_has_arrived_is_counted_as_such(start_server, linear):
    server = start_server("--model", linear, "--metrics-port", "0").ready()
    over = threading.Event()

    def never() -> Iterator[messages.ClassifyRequest]:
        over.wait(30)
        yield from ()

    def counted(what: str) -> float:
        return server.metrics()[f"cifar_service_{what}_total"]

    with grpc.insecure_channel(server.target) as channel:
        classify = channel.stream_unary(f"/{SERVICE}/Classify")
        with pytest.raises(grpc.RpcError):
            classify(never(), timeout=0.3)
        until(lambda: counted("expired") == 1)
        call = classify.future(never())
        until(lambda: not call.done())
        time.sleep(0.3)  # until the server has seen the call
        call.cancel()
        until(lambda: counted("cancelled") == 1)
        over.set()
        with pytest.raises(grpc.RpcError) as caught:
            classify(never())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    requests = {
        name: value for name, value in server.metrics().items() if name.startswith("cifar_service_requests_total")
    }
    assert requests == {
        f'cifar_service_requests_total{{code="{code}",method="{SERVICE}/Classify"}}': 1.0
        for code in ("DEADLINE_EXCEEDED", "CANCELLED", "INVALID_ARGUMENT")
    }


def test_an_expired_or_cancelled_request_never_reaches_the_engine(start_server, slow):
    server = start_server("--model", slow, "--threads", "1", "--max-batch-size", "1", "--metrics-port", "0").ready()
    with grpc.insecure_channel(server.target) as channel:
        stub = rpc.ImageClassifierStub(channel)
        occupying = stub.Classify.future(stalled(6))
        until(lambda: server.metrics()["cifar_service_admitted_images"] == 6)
        cancelled = stub.Classify.future(packed(7))
        until(lambda: server.metrics()["cifar_service_admitted_images"] == 13)
        cancelled.cancel()
        until(lambda: server.metrics()["cifar_service_cancelled_total"] == 1)
        spared = server.metrics()["cifar_service_spared_images_total"]
        assert spared >= 6  # one may have been computed already
        with pytest.raises(grpc.RpcError) as caught:
            stub.Classify(packed(5), timeout=1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

        def given_up():
            # On a busy machine the cancellation at the deadline may come so early that it counts as an ordinary one.
            counted = server.metrics()
            return counted["cifar_service_expired_total"] + counted["cifar_service_cancelled_total"] - 1

        until(lambda: given_up() == 1)
        assert occupying.result().results
        metrics = server.metrics()
        assert metrics["cifar_service_spared_images_total"] >= spared + 4
        # Every image was either computed or spared, and none was both.
        computed = metrics["cifar_service_engine_images_total"]
        assert computed + metrics["cifar_service_spared_images_total"] == 6 + 7 + 5
        assert stub.Classify(packed()).results


def test_a_full_queue_refuses_at_once_with_a_hint_and_keeps_serving(start_server, slow):
    server = start_server(
        "--model",
        slow,
        "--threads",
        "1",
        "--max-batch-size",
        "1",
        "--max-queued-images",
        "2",
        "--max-images",
        "2",
        "--metrics-port",
        "0",
    ).ready()
    with grpc.insecure_channel(server.target) as channel:
        stub = rpc.ImageClassifierStub(channel)
        accepted = [stub.Classify.future(stalled(1)) for _ in range(2)]
        until(lambda: server.metrics()["cifar_service_admitted_images"] == 2)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Classify(packed())
        assert not all(future.done() for future in accepted)
        refused = caught.value
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "may hold 2 (" in refused.details()
        trailing = dict(refused.trailing_metadata())
        assert int(trailing["grpc-retry-pushback-ms"]) >= 20
        assert b"RetryInfo" in trailing["grpc-status-details-bin"]
        assert all(len(future.result().results) == 1 for future in accepted)
        assert stub.Classify(packed(2)).results
        assert server.metrics()["cifar_service_rejected_total"] == 1


# Models


def test_a_new_export_is_served_without_losing_a_request_and_a_bad_one_is_refused(start_server, tmp_path):
    folder = exports.write_export(tmp_path / "exported", exports.graph(0), "first")
    server = start_server("--model", folder, "--metrics-port", "0").ready()
    images = pictures(40)
    stop = threading.Event()

    def ask() -> set[str]:
        versions = set()
        with grpc.insecure_channel(server.target) as channel:
            stub = rpc.ImageClassifierStub(channel)
            while not stop.is_set():
                response = stub.Classify(messages.ClassifyRequest(packed_rgb=images.tobytes()))
                seed = {"first": 0, "second": 1, "third": 2}[response.model_version]
                # One model computed all images of an answer, the one that it names.
                assert np.abs(np.array(table(response)) - expected(seed, images)).max() < 1e-5
                versions.add(response.model_version)
        return versions

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            exports.write_export(folder, exports.graph(1), "second")  # without a signal
            server.wait_for("model second .* replaces first")
            (folder / "model.onnx").write_bytes(b"damaged")
            server.wait_for("the new export is refused, second stays in use: .*is not the file that was exported")
            exports.write_export(folder, exports.graph(2), "third")
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("model third .* replaces second")
        finally:
            time.sleep(0.3)
            stop.set()
        assert set.union(*(future.result() for future in asking)) == {"first", "second", "third"}
    metrics = server.metrics()
    assert metrics['cifar_service_model_reloads_total{outcome="refused"}'] >= 1
    served = [name for name, value in metrics.items() if name.startswith("cifar_service_model_info") and value == 1]
    assert len(served) == 1
    assert 'version="third"' in served[0]
    assert server.stop() == 0


# Observability


def test_metrics_count_requests_images_and_batches(start_server, linear):
    server = start_server("--model", linear, "--metrics-port", "0").ready()
    with grpc.insecure_channel(server.target) as channel:
        stub = rpc.ImageClassifierStub(channel)
        stub.Classify(messages.ClassifyRequest(packed_rgb=pictures(40).tobytes(), images=[messages.Image()]))
        with pytest.raises(grpc.RpcError):
            stub.Classify(messages.ClassifyRequest())
    until(lambda: server.metrics()["cifar_service_requests_in_flight"] == 0)
    metrics = server.metrics()
    method = 'method="cifar.v1.ImageClassifier/Classify"'
    assert metrics[f'cifar_service_requests_total{{code="OK",{method}}}'] == 1
    assert metrics[f'cifar_service_requests_total{{code="INVALID_ARGUMENT",{method}}}'] == 1
    assert metrics[f"cifar_service_request_seconds_count{{{method}}}"] == 2
    assert metrics['cifar_service_images_total{outcome="classified"}'] == 40
    assert metrics['cifar_service_images_total{outcome="rejected"}'] == 1
    assert metrics["cifar_service_engine_images_total"] == 40
    assert metrics["cifar_service_batch_images_count"] == 2
    assert metrics["cifar_service_queue_seconds_count"] == 1
    assert metrics["cifar_service_waiting_images"] == 0
    assert metrics['process_resident_memory_bytes{process="server"}'] > 10**7


def test_at_debug_there_is_one_line_per_request(server, stub):
    stub.Classify(messages.ClassifyRequest(request_id="find-me", packed_rgb=bytes(3072)))
    line = server.wait_for("find-me")
    assert (line["method"], line["code"]) == ("cifar.v1.ImageClassifier/Classify", "OK")
    assert float(str(line["milliseconds"])) > 0
    assert str(line["peer"]).startswith("ipv4:127.0.0.1:")


def test_the_human_log_is_readable(linear):
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "--port", "0", "--model", str(linear)],
        cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr
    line = next(line for line in process.stderr if "serving" in line)
    process.terminate()
    assert process.wait(30) == 0
    assert "INFO    serving linear-0 (fp32) on cpu" in line
    with pytest.raises(ValueError, match=r"Expecting|Extra"):
        json.loads(line)


def test_metrics_are_served_as_prometheus_expects(server):
    address = str(server.wait_for("metrics at")["message"]).removeprefix("metrics at ")
    with DIRECTLY.open(address, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        assert b"# HELP cifar_service_requests_total" in answer.read()


def test_memory_stays_flat_over_many_requests(server):
    def resident() -> int:
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with grpc.insecure_channel(server.target) as channel:
        stub = rpc.ImageClassifierStub(channel)
        request = messages.ClassifyRequest(packed_rgb=bytes(400 * 3072))
        for _ in range(30):
            stub.Classify(request)
        before = resident()
        for _ in range(150):
            stub.Classify(request)
        assert resident() - before < 20 * 2**20


def test_a_watch_of_a_service_that_does_not_exist_says_so(server):
    with grpc.insecure_channel(server.target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="none"), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
