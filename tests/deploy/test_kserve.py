"""The objects for KServe: checked with the classes of its SDK, and that they fit the server and each other."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from service.settings import Settings, parse
from tests.conftest import REPOSITORY
from tests.deploy.manifests import (
    KSERVE,
    Manifest,
    containers_of,
    environment_of,
    kustomize,
    render,
    resources,
    validate,
)

OWN_ENVIRONMENT = REPOSITORY / ".venv-kserve/bin/python"


@pytest.fixture(scope="module")
def objects() -> dict[str, Manifest]:
    """The objects, by name."""
    return {manifest["metadata"]["name"]: manifest for manifest in resources(KSERVE).values()}


@pytest.fixture(scope="module")
def sdk() -> Path:
    """An interpreter that has KServe's SDK."""
    if importlib.util.find_spec("kserve"):
        return Path(sys.executable)
    if OWN_ENVIRONMENT.exists():
        return OWN_ENVIRONMENT
    pytest.skip("KServe's SDK is not installed: make kserve-sdk")


def problems(sdk: Path, *manifests: Manifest) -> list[str]:
    """What KServe's SDK finds wrong with objects."""
    script = REPOSITORY / "tests/deploy/kserve_objects.py"
    done = subprocess.run([str(sdk), str(script)], input=json.dumps(manifests), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_sdk_of_kserve_accepts_all_objects_and_finds_broken_ones(sdk, objects):
    assert problems(sdk, *objects.values()) == []
    broken = []
    for name, change in {
        "cifar-classifier": lambda runtime: runtime["spec"].update(supportedModelFormat=[]),
        "cifar10-grpc": lambda service: service["spec"]["predictor"]["model"].update(modelFormat="cifar-export"),
        "cifar10-rest": lambda service: service["spec"]["predictor"].update(minReplicas="two"),
    }.items():
        broken.append(copy.deepcopy(objects[name]))
        change(broken[-1])
    found = problems(sdk, *broken)
    assert len(found) == 3, found
    assert "has no field supportedModelFormat" in found[0]


def test_the_container_follows_the_schema_of_kubernetes(objects):
    runtime = objects["cifar-classifier"]
    # A ServingRuntime holds the containers and volumes of a pod.
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod"},
        "spec": {key: runtime["spec"][key] for key in ("containers", "volumes")},
    }
    validate(pod)
    pod["spec"]["containers"][0] = {**pod["spec"]["containers"][0], "arguments": []}
    with pytest.raises(Exception, match="arguments"):
        validate(pod)


def test_each_service_uses_the_runtime_and_a_port_and_a_protocol_that_it_has(objects):
    runtime = objects["cifar-classifier"]
    variables = environment_of(containers_of(runtime))
    formats = {each["name"] for each in runtime["spec"]["supportedModelFormats"]}
    services = [manifest for manifest in objects.values() if manifest["kind"] == "InferenceService"]
    ports = {"grpc-v2": variables["CIFAR_SERVICE_PORT"], "v2": variables["CIFAR_SERVICE_HTTP_PORT"]}
    assert len(services) == 2
    for service in services:
        predictor = service["spec"]["predictor"]
        model = predictor["model"]
        assert model["runtime"] == runtime["metadata"]["name"]
        assert model["modelFormat"]["name"] in formats
        assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
        (port,) = model["ports"]
        assert str(port["containerPort"]) == ports[model["protocolVersion"]]
        assert predictor["terminationGracePeriodSeconds"] > float(variables["CIFAR_SERVICE_GRACE"]) + 5
        assert predictor["enableServiceLinks"] is False


def test_the_server_accepts_the_arguments_and_variables_of_the_runtime(objects, monkeypatch):
    container = containers_of(objects["cifar-classifier"])
    for name, value in environment_of(container).items():
        assert name.removeprefix("CIFAR_SERVICE_").lower() in Settings.model_fields, name
        monkeypatch.setenv(name, value)
    settings = parse([argument.replace("{{.Name}}", "cifar10-grpc") for argument in container["args"]])
    assert settings.model_name == "cifar10-grpc"
    assert settings.model == Path("/mnt/models")
    context = container["securityContext"]
    assert context["runAsNonRoot"]
    assert context["readOnlyRootFilesystem"]


@pytest.mark.skipif(kustomize() is None, reason="neither kustomize nor kubectl is installed")
def test_kustomize_renders_all_objects(objects):
    rendered = render(KSERVE)
    assert {name for _, name in rendered} == set(objects)
