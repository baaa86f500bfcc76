"""The classifier behind Ray Serve, on a cluster of two nodes: answers, statuses, replicas that come and are killed."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import yaml

from service.client import Client, Options
from service.client.retrying import RequestFailed
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from tests.conftest import REPOSITORY
from tests.end_to_end.replicas import THREADS, Load, free_port
from tests.ray_cluster import ray, two_nodes
from tests.service.conftest import until
from tests.service.exports import expected, pictures

serve = pytest.importorskip("ray.serve", reason="needs the extra ray-serve")
from ray.serve.schema import ServeDeploySchema  # noqa: E402 -- the module is skipped if Ray is not installed

from deploy import ray_serve  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

MAX_QUEUED_BYTES = 2**20


@pytest.fixture(scope="module")
def target(linear: Path) -> Iterator[str]:
    """HOST:PORT of the gRPC proxy of a cluster with one node for the proxy and one for replicas."""
    with two_nodes(cpus_of_second=2) as cluster:
        environment = {"env_vars": {"PYTHONPATH": str(REPOSITORY)}}
        ray.init(address=cluster.address, runtime_env=environment, log_to_driver=False)
        try:
            port = free_port(["127.0.0.1"])
            ray_serve.start(port, free_port(["127.0.0.1"]))
            options = {"max_replicas": 2, "max_queued_bytes": MAX_QUEUED_BYTES, "max_message_bytes": MAX_QUEUED_BYTES}
            application = ray_serve.build({"model": str(linear), **options})
            serve.run(application, name=ray_serve.APPLICATION, route_prefix=ray_serve.ROUTE)
            yield f"127.0.0.1:{port}"
            serve.shutdown()
        finally:
            ray.shutdown()


def replicas() -> set[int]:
    """Process ids of the replicas."""
    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "ServeReplica:cifar10:Classifier" in " ".join(process.info["cmdline"] or ())
    }


def test_the_answers_are_those_of_the_model(target):
    images = pictures(40)
    with Client(target) as client:
        assert client.model().version == "linear-0"
        np.testing.assert_allclose(client.probabilities(images), expected(0, images), atol=1e-5)
        answers = client.classify([b"this is no image", images[0]])
    assert "not" in str(answers[0].error)
    assert answers[1].best.probability == pytest.approx(expected(0, images[:1]).max(), abs=1e-5)


def refusal(target: str, packed: bytes) -> grpc.RpcError:
    """The error that a request with these packed images gets."""
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc.ImageClassifierStub(channel).Classify(messages.ClassifyRequest(packed_rgb=packed), timeout=30)
    return caught.value


def test_a_request_that_breaks_a_limit_gets_the_status_that_the_server_sends(target):
    error = refusal(target, b"short")
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "packed_rgb holds 5 bytes; it must hold a multiple of 3072, the bytes of one image"


def test_a_request_for_which_there_is_no_space_gets_the_hint_when_to_retry(target):
    error = refusal(target, bytes(3072 * (MAX_QUEUED_BYTES // 3072 + 1)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "20"


def test_a_second_replica_is_added_under_load_and_a_killed_one_is_replaced(target):
    assert len(replicas()) == 1
    # A request for each call, because Ray counts the requests in progress.
    with Client(target, Options(coalesce=False)) as client:
        load = Load(client)
        with load.running():
            until(lambda: len(replicas()) == 2, seconds=120)
            load.wait_for_more(500)
            before = replicas()
            answered = load.answered
            psutil.Process(min(before)).kill()
            killed = time.monotonic()
            load.wait_for_more(500)
            until(lambda: len(replicas() - before) == 1, seconds=120)
            print(f"replaced after {time.monotonic() - killed:.1f} s; calls since then: {load.answered - answered}")
    failed, calls = len(load.problems), len(load.problems) + load.answered
    print(f"failed calls: {failed} of {calls}: {sorted(set(load.problems))[:2]}")
    # Ray answers those requests with INTERNAL that were in the killed replica; all others are answered.
    assert len(load.problems) <= THREADS


def test_the_script_serves_until_it_is_told_to_stop(tmp_path, linear):
    port, http_port = free_port(["127.0.0.1"]), free_port(["127.0.0.1"])
    script = [sys.executable, REPOSITORY / "deploy/ray_serve.py", "--port", port, "--ray-http-port", http_port]
    images = pictures(8)
    log = tmp_path / "log"
    with log.open("w") as file:
        run = subprocess.Popen([*map(str, script), "--model", str(linear)], stdout=file, stderr=file)
    try:
        with Client(f"127.0.0.1:{port}", Options(timeout=120)) as client:
            until(lambda: run.poll() is not None or answers(client, images), seconds=120)
        run.send_signal(signal.SIGTERM)
        assert run.wait(120) == 0, log.read_text()
    finally:
        run.kill()


def answers(client: Client, images: np.ndarray) -> bool:
    """Whether the answers to these images are right; False while the server starts."""
    try:
        found = client.probabilities(images)
    except RequestFailed:
        return False
    np.testing.assert_allclose(found, expected(0, images), atol=1e-5)
    return True


def test_the_configuration_for_a_cluster_is_one_of_ray_serve():
    text = (REPOSITORY / "deploy/ray_serve.yaml").read_text()
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert schema.grpc_options.grpc_servicer_functions == ray_serve.SERVICER_FUNCTIONS
    (application,) = schema.applications
    assert application.route_prefix == ray_serve.ROUTE
    assert ray_serve.build(application.args)
