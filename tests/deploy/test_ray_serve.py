"""The classifier behind Ray Serve, on a cluster of two nodes: answers, statuses, replicas that come and are killed."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import yaml

from service.client import Client, Options
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from tests.conftest import REPOSITORY
from tests.end_to_end.replicas import THREADS, Load, free_port
from tests.service.conftest import until
from tests.service.exports import expected, pictures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def target(linear: Path) -> Iterator[str]:
    """HOST:PORT of the gRPC proxy of a cluster with one node for the proxy and one for replicas."""
    ray = pytest.importorskip("ray", reason="needs the extra ray-serve")
    serve = pytest.importorskip("ray.serve", reason="needs the extra ray-serve")
    from ray.cluster_utils import Cluster

    from deploy import ray_serve

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    address = {"node_ip_address": "127.0.0.1", "object_store_memory": 2**27}
    cluster = Cluster(initialize_head=True, head_node_args={**address, "num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2, **address)
        cluster.wait_for_nodes()
        environment = {"env_vars": {"PYTHONPATH": str(REPOSITORY)}}
        ray.init(address=cluster.address, runtime_env=environment, log_to_driver=False)
        port = free_port(["127.0.0.1"])
        ray_serve.start(port, http_port=free_port(["127.0.0.1"]))
        application = ray_serve.build({"model": str(linear), "max_replicas": 2})
        serve.run(application, name=ray_serve.APPLICATION, route_prefix=None)
        yield f"127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()


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


def test_a_request_that_breaks_a_limit_gets_the_status_that_the_server_sends(target):
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc.ImageClassifierStub(channel).Classify(messages.ClassifyRequest(packed_rgb=b"short"), timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "3072" in caught.value.details()


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
    print(f"failed calls: {len(load.problems)}: {sorted(set(load.problems))[:2]}")
    # Ray gives up the requests that were in the killed replica; all others are answered.
    assert len(load.problems) <= THREADS


def test_the_configuration_for_a_cluster_is_one_of_ray_serve():
    pytest.importorskip("ray.serve", reason="needs the extra ray-serve")
    from ray.serve.schema import ServeDeploySchema

    from deploy import ray_serve

    text = (REPOSITORY / "deploy/ray_serve.yaml").read_text()
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert schema.grpc_options.grpc_servicer_functions == ray_serve.SERVICER_FUNCTIONS
    (application,) = schema.applications
    assert ray_serve.build(application.args)
