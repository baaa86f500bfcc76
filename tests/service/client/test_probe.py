"""The probe, as the health check of a container calls it: with the server's own environment variables."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.conftest import REPOSITORY


def probe(*arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service.probe", *map(str, arguments)],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
    )


def write(folder: Path, name: str, certificate: trustme.LeafCert) -> None:
    certificate.private_key_pem.write_to_path(folder / f"{name}-key.pem")
    (folder / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))


@pytest.fixture(scope="module")
def pem(tmp_path_factory) -> Path:
    """A folder of PEM files. The server's certificate names no address of this machine, as in real use."""
    folder = tmp_path_factory.mktemp("pem")
    server_ca, client_ca = trustme.CA(), trustme.CA()
    server_ca.cert_pem.write_to_path(folder / "server-ca.pem")
    client_ca.cert_pem.write_to_path(folder / "client-ca.pem")
    write(folder, "server", server_ca.create_child_ca().issue_cert("*.classifier.example"))
    write(folder, "local", server_ca.issue_cert("localhost"))
    write(folder, "client", client_ca.issue_cert("probe.example"))
    write(folder, "stranger", trustme.CA().issue_cert("*.classifier.example"))
    (folder / "tokens").write_text("# the probe sends the first\nfirst-secret\nsecond-secret\n")
    return folder


def variables_of(pem: Path, *, name: str = "server", mutual: bool = False, token: bool = False) -> dict[str, str]:
    """The environment variables of a server with TLS."""
    variables = {
        "CIFAR_SERVICE_TLS_CERT": str(pem / f"{name}.pem"),
        "CIFAR_SERVICE_TLS_KEY": str(pem / f"{name}-key.pem"),
    }
    if mutual:
        variables["CIFAR_SERVICE_TLS_CLIENT_CA"] = str(pem / "client-ca.pem")
    if token:
        variables["CIFAR_SERVICE_TOKEN_FILE"] = str(pem / "tokens")
    return variables


def test_the_probe_reads_the_servers_port_and_host(start_server, linear):
    server = start_server("--model", linear).ready()
    done = probe(CIFAR_SERVICE_PORT=server.port, CIFAR_SERVICE_HOST="0.0.0.0")  # noqa: S104
    assert (done.returncode, done.stdout) == (0, f"127.0.0.1:{server.port}: SERVING\n")
    for spelling in ({"cifar_service_port": server.port}, {"CIFAR_SERVICE_PORT": f" {server.port}.0"}):
        assert probe(**spelling).stdout == f"127.0.0.1:{server.port}: SERVING\n"
    assert server.stop() == 0
    done = probe(CIFAR_SERVICE_PORT=server.port)
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stderr


def test_over_tls_the_probe_trusts_the_servers_own_certificate(start_server, linear, pem):
    variables = variables_of(pem, token=True)
    server = start_server("--model", linear, environment=variables).ready()
    done = probe(CIFAR_SERVICE_PORT=server.port, **variables)
    assert done.returncode == 0, done.stderr
    assert "handshake" not in server.log.lower()  # a health check every few seconds must not fill the log
    other = {**variables, "CIFAR_SERVICE_TLS_CERT": str(pem / "stranger.pem")}
    assert probe(CIFAR_SERVICE_PORT=server.port, **other).returncode == 1
    del variables["CIFAR_SERVICE_TOKEN_FILE"]
    done = probe(CIFAR_SERVICE_PORT=server.port, **variables)
    assert done.returncode == 1
    assert "UNAUTHENTICATED" in done.stderr
    assert server.stop() == 0
    assert "secret" not in server.log


def test_with_mutual_tls_the_probe_shows_a_certificate_of_its_own(start_server, linear, pem):
    variables = variables_of(pem, mutual=True)
    server = start_server("--model", linear, environment=variables).ready()
    own = {"CIFAR_PROBE_CERTIFICATE": pem / "client.pem", "CIFAR_PROBE_KEY": pem / "client-key.pem"}
    done = probe(CIFAR_SERVICE_PORT=server.port, **variables, **own)
    assert done.returncode == 0, done.stderr
    # The server's own certificate is not signed by the authority of its clients.
    assert probe(CIFAR_SERVICE_PORT=server.port, **variables).returncode == 1


def test_with_mutual_tls_of_one_authority_the_servers_own_certificate_is_enough(start_server, linear, pem):
    variables = {**variables_of(pem), "CIFAR_SERVICE_TLS_CLIENT_CA": str(pem / "server-ca.pem")}
    server = start_server("--model", linear, environment=variables).ready()
    done = probe(CIFAR_SERVICE_PORT=server.port, **variables)
    assert done.returncode == 0, done.stderr


def test_a_named_server_is_asked_as_the_arguments_say(start_server, linear, pem):
    variables = variables_of(pem, name="local", mutual=True, token=True)
    server = start_server("--model", linear, environment=variables).ready()
    arguments = [f"localhost:{server.port}", "--ca", pem / "server-ca.pem", "--token-file", pem / "tokens"]
    arguments += ["--certificate", pem / "client.pem", "--key", pem / "client-key.pem"]
    done = probe(*arguments)
    assert done.returncode == 0, done.stderr
    assert probe(f"localhost:{server.port}", *arguments[1:3]).returncode == 1
    assert probe(f"localhost:{server.port}", "--tls").returncode == 1  # the system does not know the authority


@contextlib.contextmanager
def serving(status: int) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    servicer.set("", status)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def test_a_server_that_does_not_serve_is_unhealthy():
    with serving(health_pb2.HealthCheckResponse.NOT_SERVING) as target:
        done = probe(target)
    assert (done.returncode, done.stdout) == (1, f"{target}: NOT_SERVING\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "the address must be HOST:PORT"),
        (["127.0.0.1:65536"], "the port in '127.0.0.1:65536' is '65536', but must be a number from 1 to 65535"),
        (["127.0.0.1:1", "--timeout", "inf"], "--timeout is inf, but must be above 0"),
        (["127.0.0.1:1", "--timeout", "nan"], "--timeout is nan, but must be above 0"),
        (["127.0.0.1:1", "--ca", "absent.pem"], "No such file or directory: 'absent.pem'"),
        (["127.0.0.1:1", "--key", "key.pem"], "key is given without certificate"),
        (["classifier.example:1", "--token-file", "TOKENS"], "the token would be sent to classifier.example:1 without"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, message, pem):
    done = probe(*[pem / "tokens" if argument == "TOKENS" else argument for argument in arguments])
    assert done.returncode == (1 if "absent.pem" in arguments else 2)  # a missing file may appear in a moment
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("port", ["65536", "5.5", "http"])
def test_a_port_that_the_server_would_not_take_is_one_line(port):
    done = probe(CIFAR_SERVICE_PORT=port)
    assert done.returncode == 2
    assert done.stderr == (f"this machine's server: CIFAR_SERVICE_PORT is '{port}', but must be a port, 0 to 65535\n")
