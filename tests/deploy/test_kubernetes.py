"""The manifests for Kubernetes: what published schemas say about them, and that they fit the server and each other."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable

import grpc
import kubernetes_validate
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cifar_core import __version__
from service.settings import Settings
from service.workers.supervisor import KILL_SECONDS
from tests.deploy.manifests import (
    KUBERNETES,
    Manifest,
    containers_of,
    environment_of,
    kustomize,
    load,
    render,
    resources,
    validate,
)

CUSTOM_KINDS = {"ServiceMonitor"}
NAME = {"app.kubernetes.io/name": "cifar-classifier"}
needs_kustomize = pytest.mark.skipif(kustomize() is None, reason="neither kustomize nor kubectl is installed")


@pytest.fixture(scope="module")
def objects() -> dict[str, Manifest]:
    """The objects of the files, by kind."""
    return {manifest["kind"]: manifest for manifest in resources(KUBERNETES).values()}


# Kubernetes publishes no schema for kinds of other projects.
@pytest.mark.parametrize(
    "name", [name for name, manifest in sorted(resources(KUBERNETES).items()) if manifest["kind"] not in CUSTOM_KINDS]
)
def test_each_file_follows_the_schema_of_its_kind(name):
    validate(resources(KUBERNETES)[name])  # raises an error if it does not


def _set(path: str, value: object) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        *parents, last = path.split("/")
        for key in parents:
            manifest = manifest[int(key) if key.isdecimal() else key]
        manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deployment.yaml", _set("spec/template/spec/containers/0/readinesProbe", {})),
        ("deployment.yaml", _set("spec/template/spec/containers/0/readinessProbe/grpc/port", "grpc")),
        ("deployment.yaml", _set("spec/template/spec/terminationGracePeriodSeconds", "50s")),
        ("deployment.yaml", _set("spec/selector", [])),
        ("service.yaml", _set("spec/ports/0/port", "fifty")),
        ("network-policy.yaml", _set("spec/ingres", [])),
        ("horizontal-pod-autoscaler.yaml", _set("spec/metrics/0/pods/target", {})),
        ("pod-disruption-budget.yaml", _set("apiVersion", "policy/v9")),
    ],
)
def test_a_broken_manifest_is_found(name, change):
    manifest = copy.deepcopy(resources(KUBERNETES)[name])
    change(manifest)
    with pytest.raises((kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)):
        validate(manifest)


def test_each_file_is_part_of_a_kustomization():
    named = {"kustomization.yaml", "prometheus-adapter.yaml", "dashboard.json"}
    for folder in (KUBERNETES, *(KUBERNETES / each for each in ("base", "monitoring", "secured"))):
        kustomization = load(folder / "kustomization.yaml")
        named |= {*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", []))}
    assert {path.name for path in KUBERNETES.rglob("*") if path.is_file()} <= named


@needs_kustomize
@pytest.mark.parametrize("folder", [KUBERNETES, KUBERNETES / "secured"])
def test_what_kustomize_renders_follows_the_schemas(folder):
    rendered = render(folder)
    assert {kind for kind, _ in rendered} == {
        "ServiceAccount", "Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy",
        "ServiceMonitor", "ConfigMap",
    }  # fmt: skip
    for (kind, _), manifest in rendered.items():
        assert manifest["metadata"]["labels"].items() >= NAME.items()
        if kind not in CUSTOM_KINDS:
            validate(manifest)
    container = containers_of(rendered["Deployment", "cifar-classifier"])
    assert container["image"].endswith(f":{__version__}")
    clients = rendered["NetworkPolicy", "cifar-classifier"]["spec"]["ingress"][0]["from"][0]["podSelector"]
    assert clients == {"matchLabels": {"cifar-classifier/client": "true"}}


@needs_kustomize
def test_with_tls_the_probes_are_commands():
    container = containers_of(render(KUBERNETES / "secured")["Deployment", "cifar-classifier"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert "grpc" not in container[probe]
        assert container[probe]["exec"]["command"][:3] == ["/server/bin/python", "-m", "service.probe"]
        own = float(container[probe]["exec"]["command"][4])
        assert own < container[probe]["timeoutSeconds"], "the probe gives up before Kubernetes does, and says why"
    assert environment_of(container)["CIFAR_SERVICE_HEALTH_WITHOUT_TOKEN"] == "false"  # noqa: S105
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/tmp", "/tls", "/tokens"}  # noqa: S108


def test_the_pod_has_no_rights_that_it_does_not_need(objects):
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    container = containers_of(objects["Deployment"])
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert pod["automountServiceAccountToken"] is False
    assert objects["NetworkPolicy"]["spec"]["egress"] == []


def test_the_server_has_its_grace_period_before_kubernetes_kills_it(objects):
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    container = containers_of(objects["Deployment"])
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = float(environment_of(container)["CIFAR_SERVICE_GRACE"])
    assert pod["terminationGracePeriodSeconds"] > pause + grace + KILL_SECONDS


def test_the_objects_refer_to_each_other(objects):
    container = containers_of(objects["Deployment"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    variables = environment_of(container)
    assert ports == {
        "grpc": int(variables["CIFAR_SERVICE_PORT"]), "metrics": int(variables["CIFAR_SERVICE_METRICS_PORT"])
    }  # fmt: skip
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == ports["grpc"]
    service = objects["Service"]["spec"]
    assert service["clusterIP"] == "None"
    assert {port["targetPort"] for port in service["ports"]} == set(ports)
    allowed = {port["port"] for rule in objects["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]}
    assert allowed == set(ports)
    (endpoint,) = objects["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["ports"]}
    assert objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"] == NAME
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        service["selector"],
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert labels == selector == NAME
    reference = objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (reference["kind"], reference["name"]) == ("Deployment", objects["Deployment"]["metadata"]["name"])
    assert "replicas" not in objects["Deployment"]["spec"], "kubectl apply would undo what the autoscaler did"


def _on_loopback(container: Manifest) -> dict[str, str]:
    """The environment of a container, so that it can run here: on the loopback interface and with free ports."""
    variables = environment_of(container)
    for name in ("CIFAR_SERVICE_HOST", "CIFAR_SERVICE_METRICS_HOST"):
        assert variables[name] == "0.0.0.0"  # noqa: S104 -- the text in the manifest
        variables[name] = "127.0.0.1"
    return {**variables, "CIFAR_SERVICE_METRICS_PORT": "0"}


def test_a_server_with_these_variables_answers_the_probe_of_kubernetes(objects, start_server, linear):
    variables = _on_loopback(containers_of(objects["Deployment"]))
    for name in variables:
        assert name.removeprefix("CIFAR_SERVICE_").lower() in Settings.model_fields, name
    server = start_server("--model", linear, environment=variables).ready()
    with grpc.insecure_channel(server.target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@needs_kustomize
def test_the_probe_command_works_with_tls_and_tokens(start_server, linear, tmp_path):
    container = containers_of(render(KUBERNETES / "secured")["Deployment", "cifar-classifier"])
    # As the Secrets hold them. The certificate names the Service, as clients need it, and not this machine.
    certificate = trustme.CA().issue_cert("cifar-classifier")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    certificate.private_key_pem.write_to_path(tmp_path / "tls.key")
    (tmp_path / "tokens").write_text("secret\n")
    variables = {
        name: str(tmp_path / value.rpartition("/")[2]) if value.startswith("/") else value
        for name, value in _on_loopback(container).items()
    }
    server = start_server("--model", linear, environment=variables).ready()
    _, *arguments = container["readinessProbe"]["exec"]["command"]

    def probe() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **variables, "CIFAR_SERVICE_PORT": str(server.port)}
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)

    assert probe().returncode == 0, probe().stderr
    variables["CIFAR_SERVICE_TOKEN_FILE"] = str(tmp_path / "wrong")
    (tmp_path / "wrong").write_text("wrong\n")
    refused = probe()
    assert refused.returncode == 1
    assert "UNAUTHENTICATED" in refused.stderr
