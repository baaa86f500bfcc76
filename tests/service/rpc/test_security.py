from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.client import ClassificationError, Client, Options
from service.errors import StartError
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from service.generated.inference import open_inference_pb2 as inference
from service.generated.inference import open_inference_pb2_grpc as inference_rpc
from service.rpc.security import Tokens, server_credentials
from tests.service.exports import pictures

UNAUTHENTICATED, UNAVAILABLE = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE


class Certificates:
    """Of a server and a client, each signed by an authority of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server_ca, self.client_ca = trustme.CA(), trustme.CA()
        self.server_ca.cert_pem.write_to_path(folder / "server-ca.pem")
        self.client_ca.cert_pem.write_to_path(folder / "client-ca.pem")
        self.write("server", self.server_ca.issue_cert("localhost", "127.0.0.1"))
        self.write("client", self.client_ca.issue_cert("a-client"))
        self.write("stranger", trustme.CA().issue_cert("a-stranger"))

    def write(self, name: str, certificate: trustme.LeafCert) -> None:
        certificate.private_key_pem.write_to_path(self.folder / f"{name}-key.pem")
        (self.folder / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))

    def __getitem__(self, name: str) -> Path:
        return self.folder / f"{name}.pem"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


def asks(target: str, **options: object) -> str:
    """OK, or the status of a call."""
    try:
        with Client(target, Options(timeout=20, attempts=2, **options)) as client:  # type: ignore[arg-type]
            answers = client.classify(pictures(2))
    except ClassificationError as error:
        return error.code.name
    assert len(answers) == 2
    return "OK"


# TLS


def test_over_tls_the_server_is_who_it_says_and_plaintext_is_refused(start_server, linear, certificates):
    server = start_server(
        "--model", linear, "--tls-cert", certificates["server"], "--tls-key", certificates["server-key"]
    ).ready()
    target = f"localhost:{server.port}"
    assert asks(target, ca=certificates["server-ca"]) == "OK"
    assert asks(target) == "UNAVAILABLE"  # plaintext
    assert asks(target, ca=certificates["client-ca"]) == "UNAVAILABLE"  # an authority that did not sign it
    assert asks(target, ca=certificates["server-ca"]) == "OK"


def test_with_mutual_tls_only_clients_with_a_signed_certificate_are_served(start_server, linear, certificates):
    server = start_server(
        "--model", linear, "--tls-cert", certificates["server"], "--tls-key", certificates["server-key"],
        "--tls-client-ca", certificates["client-ca"],
    ).ready()  # fmt: skip
    target, ca = f"localhost:{server.port}", certificates["server-ca"]
    assert asks(target, ca=ca, certificate=certificates["client"], key=certificates["client-key"]) == "OK"
    assert asks(target, ca=ca) == "UNAVAILABLE"
    assert asks(target, ca=ca, certificate=certificates["stranger"], key=certificates["stranger-key"]) == "UNAVAILABLE"


def test_a_renewed_certificate_is_taken_without_a_restart(start_server, linear, tmp_path):
    certificates = Certificates(tmp_path)
    server = start_server(
        "--model", linear, "--tls-cert", certificates["server"], "--tls-key", certificates["server-key"]
    ).ready()
    target = f"localhost:{server.port}"
    assert asks(target, ca=certificates["server-ca"]) == "OK"
    renewed = trustme.CA()
    renewed.cert_pem.write_to_path(certificates["renewed-ca"])
    certificates.write("server", renewed.issue_cert("localhost"))
    assert asks(target, ca=certificates["renewed-ca"]) == "OK"
    certificates["server"].write_text("no certificate any more")
    certificates["server-key"].unlink()
    assert asks(target, ca=certificates["renewed-ca"]) == "OK"
    assert "the certificates are kept" in server.log


def test_files_that_are_no_certificates_are_named(tmp_path):
    (tmp_path / "text.pem").write_text("text")
    with pytest.raises(StartError, match=r"absent.pem cannot be read"):
        server_credentials(tmp_path / "absent.pem", tmp_path / "text.pem", None)
    with pytest.raises(StartError, match=r"text.pem is not a PEM file"):
        server_credentials(tmp_path / "text.pem", tmp_path / "text.pem", None)


# Tokens


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("# two are valid\nfirst-secret\n\nsecond-secret\n")
    return path


def test_only_calls_with_a_valid_token_are_answered(start_server, linear, token_file):
    server = start_server(
        "--model", linear, "--token-file", token_file, "--metrics-port", "0", "--log-level", "debug"
    ).ready()
    assert asks(server.target, token="first-secret") == "OK"  # noqa: S106
    assert asks(server.target, token="second-secret") == "OK"  # noqa: S106
    for wrong in (None, "wrong", "first-secre", "first-secret2", "# two are valid", " "):
        assert asks(server.target, token=wrong) == "UNAUTHENTICATED"
    with grpc.insecure_channel(server.target) as channel:
        # Every method, whatever its shape, and before the message is parsed.
        attempts = [
            lambda: next(rpc.ImageClassifierStub(channel).ClassifyStream(iter([messages.ClassifyRequest()]))),
            lambda: inference_rpc.GRPCInferenceServiceStub(channel).ServerLive(inference.ServerLiveRequest()),
            lambda: health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()),
            lambda: next(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())),
            lambda: channel.unary_unary("/cifar.v1.ImageClassifier/Classify")(b"\xff\xff"),
            lambda: channel.unary_unary("/made.up/Method")(b""),
        ]
        for attempt in attempts:
            with pytest.raises(grpc.RpcError) as caught:
                attempt()
            assert caught.value.code() is UNAUTHENTICATED
            assert "authorization: Bearer TOKEN" in caught.value.details()
    metrics = server.metrics()
    assert (
        metrics['cifar_service_requests_total{code="UNAUTHENTICATED",method="cifar.v1.ImageClassifier/GetModel"}'] >= 6
    )
    assert metrics['cifar_service_requests_total{code="UNAUTHENTICATED",method="other"}'] >= 3
    assert server.stop() == 0
    assert "secret" not in server.log


def test_health_can_be_told_to_everybody(start_server, linear, token_file):
    server = start_server("--model", linear, "--token-file", token_file, "--health-without-token").ready()
    with grpc.insecure_channel(server.target) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    assert asks(server.target) == "UNAUTHENTICATED"


def test_changed_tokens_are_read_again_and_a_lost_file_leaves_what_was(start_server, linear, token_file):
    server = start_server("--model", linear, "--token-file", token_file).ready()
    token_file.write_text("third-secret\n")
    server.wait_for("tokens were read again: 1 are valid")
    assert asks(server.target, token="third-secret") == "OK"  # noqa: S106
    assert asks(server.target, token="first-secret") == "UNAUTHENTICATED"  # noqa: S106
    token_file.unlink()
    server.wait_for("the tokens are kept")
    assert asks(server.target, token="third-secret") == "OK"  # noqa: S106
    assert "secret" not in server.log


@pytest.mark.parametrize(
    ("authorization", "allowed"),
    [
        ("Bearer first-secret", True),
        ("bearer second-secret", True),
        (b"Bearer first-secret", True),
        ("Basic first-secret", False),
        ("first-secret", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("", False),
        (None, False),
        ("Bearer first-secret,second-secret", False),
    ],
)
def test_what_is_a_valid_token(token_file, authorization, allowed):
    assert Tokens(token_file).allow(authorization) is allowed


def test_a_file_without_tokens_is_refused(tmp_path):
    (tmp_path / "empty").write_text("# nothing\n\n")
    with pytest.raises(StartError, match="holds no token"):
        Tokens(tmp_path / "empty")


def test_every_token_is_compared_in_constant_time(token_file, monkeypatch):
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(len(a) == len(b)) or real(a, b))
    Tokens(token_file).allow("Bearer first-secret")
    assert compared == [True, True]  # the second too, and always digests of one length
