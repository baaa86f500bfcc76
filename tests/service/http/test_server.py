"""Start, metrics, deadlines, overload, draining and several processes of a server with HTTP."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from service.client import Client
from tests.conftest import REPOSITORY
from tests.service import exports
from tests.service.conftest import until
from tests.service.exports import expected, pictures, stalling
from tests.service.http.test_classify import classify, png, probabilities
from tests.service.http.test_open_inference import INFER, binary_body, described, infer_binary, outputs
from tests.service.http.web import Raw, Reply, Web

PNG = png(pictures(1)[0])
WITH_HTTP = ("--http-port", "0", "--metrics-port", "0")
PACKAGES = ("starlette", "uvicorn", "h11", "multipart", "anyio", "service.http")


def slow_images(count: int) -> tuple[bytes, dict[str, str]]:
    """A request with images of which the slow model computes one in about a second."""
    images = stalling(count)
    tensor = described(images, parameters={"binary_data_size": images.nbytes})
    return binary_body({"inputs": [tensor], "parameters": {"binary_data_output": True}}, images.tobytes())


# Start


def test_without_http_port_nothing_of_http_is_imported():
    script = (
        "import sys, service.__main__, service.server, service.rpc.server, service.workers.supervisor, service.client\n"
        f"print([name for name in {PACKAGES} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_http_without_its_extra_ends_the_start_with_one_line(tmp_path, linear, workers):
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError('absent', name='uvicorn')")
    done = run_to_end(linear, "--http-port", "0", "--workers", workers, environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    message = "error: --http-port needs the extra http (uvicorn is missing): pip install 'cifar-classifier[http]'\n"
    assert done.stderr == message


def run_to_end(linear, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", "--model", linear, "--port", "0", "--log-level", "error", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, env={**os.environ, **(environment or {})},
    )  # fmt: skip


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_that_is_taken_ends_the_start_with_one_line(linear, workers):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_to_end(linear, "--http-port", str(port), "--workers", workers)
    assert done.returncode == 2
    assert done.stderr == f"error: port {port} of 127.0.0.1 is already in use\n"


def test_another_address_than_loopback_needs_tls(linear):
    done = run_to_end(linear, "--http-port", "0", "--http-host", "0.0.0.0")  # noqa: S104 -- refused
    assert done.returncode == 2
    assert "--http-host 0.0.0.0 is not a loopback address and TLS is off" in done.stderr


def ranked(answer) -> dict[str, float]:
    return {each.name: each.probability for each in answer.classes}


def test_grpc_and_http_give_the_same_answers(http_server, web):
    images = pictures(4)
    with Client(http_server.target) as client:
        over_grpc = [[ranked(answer)[name] for name in exports.CLASSES] for answer in client.classify(images)]
    over_http = [probabilities(result) for result in classify(web, [(None, png(i)) for i in images]).json["results"]]
    assert np.abs(np.array(over_grpc) - np.array(over_http)).max() == 0


# Metrics


def test_requests_are_counted_by_method_and_code(start_server, linear):
    server = start_server("--model", linear, *WITH_HTTP).ready()
    with Web(server.http_url) as web:
        assert web.post("/v1/classify", PNG).status == 200
        assert web.post("/v1/classify", b"x").status == 422
        assert infer_binary(web, pictures(3)).status == 200
        assert web.get("/v2/models/resnet").status == 404
        for path in ("/none", "/none2"):
            assert web.get(path).status == 404
        seen = server.metrics()
        assert web.get("/readyz").json == {"status": "ok"}

    def count(method: str, code: str) -> float:
        return seen[f'cifar_service_requests_total{{code="{code}",method="{method}"}}']

    assert count("POST /v1/classify", "OK") == 1
    assert count("POST /v1/classify", "INVALID_ARGUMENT") == 1
    assert count("POST /v2/models/{name}/infer", "OK") == 1
    assert count("GET /v2/models/{name}", "NOT_FOUND") == 1
    assert count("other", "NOT_FOUND") == 2
    assert seen['cifar_service_images_total{outcome="classified"}'] == 4
    assert seen['cifar_service_images_total{outcome="rejected"}'] == 1
    assert seen['cifar_service_request_seconds_count{method="POST /v1/classify"}'] == 2


# Deadlines, overload, disconnected clients, a failing engine


def test_deadlines_overload_and_disconnected_clients(start_server, slow):
    server = start_server(
        "--model", slow, *WITH_HTTP, "--threads", "1", "--max-batch-size", "1",
        "--max-queued-images", "4", "--max-images", "4",
    ).ready()  # fmt: skip

    def admitted() -> float:
        return server.metrics()["cifar_service_admitted_images"]

    with Web(server.http_url) as busy, Web(server.http_url) as web, ThreadPoolExecutor() as pool:
        occupying = pool.submit(busy.request, "POST", INFER, *slow_images(2))
        until(lambda: admitted() == 2)
        reply = web.post("/v1/classify", PNG, X_Request_Timeout="0.05")
        assert (reply.status, reply.kind) == (504, "application/problem+json")
        assert infer_binary(web, pictures(1), parameters={"timeout": 50_000}).status == 504
        assert not occupying.done()  # so the answers came while the engine was busy

        reply = infer_binary(web, pictures(3))
        assert reply.status == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert 0 < reply.json["retry_after"] <= 5
        assert occupying.result().status == 200

        gone = Raw(server.http_url)
        body, headers = slow_images(4)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        gone.send(f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: admitted() == 4)
        gone.__exit__()
        until(lambda: admitted() == 0)
        until(lambda: server.metrics()["cifar_service_requests_in_flight"] == 0)
    seen = server.metrics()
    assert seen["cifar_service_cancelled_total"] == 1
    assert seen["cifar_service_expired_total"] == 2
    assert seen["cifar_service_rejected_total"] == 1
    assert seen['cifar_service_requests_total{code="CANCELLED",method="POST /v2/models/{name}/infer"}'] == 1
    assert "Traceback" not in server.log


def test_a_batch_that_fails_is_an_internal_error_of_its_own_requests_only(web):
    images = stalling(1)  # on which this model fails
    assert infer_binary(web, images).status == 500
    assert infer_binary(web, pictures(1)).status == 200


# Models


def test_the_model_can_be_replaced_while_requests_arrive(start_server, tmp_path):
    folder = exports.write_export(tmp_path / "export", exports.graph(0))
    server = start_server("--model", folder, *WITH_HTTP).ready()
    images = pictures(2)
    answers: list[Reply] = []
    stop = threading.Event()

    def ask() -> None:
        with Web(server.http_url) as web:
            while not stop.is_set():
                answers.append(infer_binary(web, images))

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        exports.write_export(folder, exports.graph(1), version="linear-1")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("replaces")
        until(lambda: is_answer_of(answers[-1], 1, images))
        stop.set()
        for each in asking:
            each.result()
    assert all(is_answer_of(answer, 0, images) or is_answer_of(answer, 1, images) for answer in answers)


def is_answer_of(reply: Reply, seed: int, images: np.ndarray) -> bool:
    return bool(np.abs(outputs(reply)["probabilities"] - expected(seed, images)).max() < 1e-5)


# Stop


def test_sigterm_lets_requests_in_flight_finish_refuses_new_ones_and_ends_with_0(start_server, slow):
    server = start_server("--model", slow, *WITH_HTTP, "--threads", "1", "--max-batch-size", "1").ready()
    with Web(server.http_url) as busy, Web(server.http_url) as web, ThreadPoolExecutor() as pool:
        assert web.get("/readyz").status == 200
        occupying = pool.submit(busy.request, "POST", INFER, *slow_images(3))
        until(lambda: server.metrics()["cifar_service_admitted_images"] == 3)
        with Raw(server.http_url) as half:
            half.send(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf")
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("stopping")
            reply = web.post("/v1/classify", PNG)
            assert (reply.status, reply.headers["retry-after"], reply.headers["connection"]) == (503, "1", "close")
            with Web(server.http_url) as probe:
                assert probe.get("/readyz").status == 503
            with Web(server.http_url) as probe:
                assert probe.get("/v2/health/ready").json == {"ready": False}
            with Web(server.http_url) as probe:
                assert probe.get("/healthz").status == 200
            assert half.send(bytes(996)).reply().status == 503
        assert not occupying.done()
        reply = occupying.result()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert server.wait() == 0
    assert json.loads(server.lines[-1])["unanswered"] == 0


def test_draining_under_load_loses_no_request(start_server, linear):
    """Each request is answered, or refused with 503, or its connection is refused: none ends without an answer."""
    server = start_server("--model", linear, *WITH_HTTP, "--workers", "2").ready()
    images = pictures(2)
    url = server.http_url
    lost: list[str] = []
    answered = [0] * 16

    def ask(number: int) -> None:
        web = Web(url)
        while True:
            try:
                reply = infer_binary(web, images)
            except ConnectionRefusedError:
                return
            except Exception as error:  # noqa: BLE001 -- each is reported below
                lost.append(repr(error))
                return
            assert reply.status in (200, 503)
            answered[number] += reply.status == 200

    with ThreadPoolExecutor(len(answered)) as pool:
        asking = [pool.submit(ask, number) for number in range(len(answered))]
        until(lambda: min(answered) > 20)
        assert server.stop() == 0
        for each in asking:
            each.result()
    assert lost == []


# Several processes


def test_workers_share_the_port_and_their_metrics_are_those_of_all(start_server, linear):
    server = start_server("--model", linear, *WITH_HTTP, "--workers", "2").ready()
    for _ in range(40):
        with Web(server.http_url) as web:
            assert web.post("/v1/classify", PNG).status == 200
    name = 'cifar_service_requests_total{code="OK",method="POST /v1/classify"}'
    until(lambda: server.metrics().get(name) == 40)
    # Both workers were asked: the kernel spreads the connections.
    assert server.stop() == 0
    answered = [json.loads(line).get("answered", 0) for line in server.lines if '"stopped"' in line]
    assert sum(answered) == 40
    assert min(answered) > 0


def test_grpc_is_answered_beside_http(http_server):
    with grpc.insecure_channel(http_server.target) as channel:
        grpc.channel_ready_future(channel).result(timeout=20)
    began = time.monotonic()
    with Client(http_server.target) as client:
        assert len(client.classify(pictures(3))) == 3
    assert time.monotonic() - began < 20


def test_as_many_connections_as_allowed_are_served_also_if_they_open_at_the_same_moment(start_server, linear):
    server = start_server("--model", linear, "--http-port", "0", "--max-connections", "3").ready()
    for _ in range(5):
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(Raw(server.http_url)) for _ in range(3)]
            get = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
            assert [each.send(get).reply().status for each in held] == [200, 200, 200]
        time.sleep(0.2)


def test_a_new_connection_takes_the_place_of_the_one_that_was_idle_for_longest(start_server, linear):
    get = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    server = start_server("--model", linear, "--http-port", "0", "--max-connections", "3").ready()
    with contextlib.ExitStack() as stack:
        held: list[Raw] = []
        for _ in range(3):
            held.append(stack.enter_context(Raw(server.http_url)))
            assert held[-1].send(get).reply().status == 200
            time.sleep(0.05)
        assert held[0].send(get).reply().status == 200  # so the second one has been idle for longest
        assert stack.enter_context(Raw(server.http_url)).send(get).reply().status == 200
        assert held[1].readable(5)  # its end
        assert [held[place].send(get).reply().status for place in (0, 2)] == [200, 200]
