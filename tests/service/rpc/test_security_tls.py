import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from service.certificates import Certificates
from service.client import ClassificationError, Client, Options
from service.errors import StartError
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from tests.service.exports import pictures

RENEWED = "certificates were read again"
REFUSED = "the new certificates cannot be used"


class Authorities:
    """Certificates of a server and of clients, each signed by an authority of its own, as PEM files in a folder."""

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

    def server_options(self) -> tuple[str | Path, ...]:
        return "--tls-cert", self["server"], "--tls-key", self["server-key"]


@pytest.fixture
def files(tmp_path):
    return Authorities(tmp_path)


def outcome(target: str, **options: Path) -> str:
    """OK, or the status of a call over a new connection."""
    try:
        with Client(target, Options(timeout=20, attempts=2, **options)) as client:  # type: ignore[arg-type]
            answers = client.classify(pictures(2))
    except ClassificationError as error:
        return error.code.name
    assert len(answers) == 2
    return "OK"


def test_over_tls_the_server_proves_its_identity_and_refuses_plaintext(start_server, linear, files):
    server = start_server("--model", linear, *files.server_options()).ready()
    target = f"localhost:{server.port}"
    assert outcome(target, ca=files["server-ca"]) == "OK"
    assert outcome(target) == "UNAVAILABLE"  # plaintext
    assert outcome(target, ca=files["client-ca"]) == "UNAVAILABLE"  # an authority that did not sign it
    assert outcome(target, ca=files["server-ca"]) == "OK"


# Files that cannot be used


def refused(*paths: Path | None) -> str:
    with pytest.raises(StartError) as caught:
        Certificates(*paths, *[None] * (3 - len(paths)))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_missing_or_not_pem_are_named(files):
    files["text"].write_text("text")
    assert f"{files['absent']} cannot be read: No such file" in refused(files["absent"], files["text"])
    assert f"{files['text']} is not a PEM file" in refused(files["text"], files["server-key"])
    assert f"{files['text']} is not a PEM file" in refused(files["server"], files["server-key"], files["text"])


@pytest.mark.parametrize("name", ["server", "server-key", "client-ca"])
def test_a_file_that_is_cut_off_is_refused(files, name):
    content = files[name].read_bytes()
    files[name].write_bytes(content[: len(content) // 2])
    message = refused(files["server"], files["server-key"], files["client-ca"])
    assert str(files[name]) in message
    assert "cut off" in message


def test_a_key_of_another_type_does_not_belong_to_the_certificate(files):
    files.write("server", files.server_ca.issue_cert("localhost", key_type=trustme.KeyType.RSA))
    key = ec.generate_private_key(ec.SECP256R1())
    files["server-key"].write_bytes(pem(key, serialization.NoEncryption()))
    assert "do not belong together" in refused(files["server"], files["server-key"])


def test_an_encrypted_key_is_refused_without_asking_for_its_passphrase(files):
    key = serialization.load_pem_private_key(files["server-key"].read_bytes(), None)
    files["server-key"].write_bytes(pem(key, serialization.BestAvailableEncryption(b"secret")))
    message = refused(files["server"], files["server-key"])
    assert f"{files['server-key']} is encrypted" in message
    assert "openssl pkey" in message


def pem(key: object, encryption: object) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)  # type: ignore[attr-defined]


def test_a_key_of_another_certificate_ends_the_start_in_one_line_that_names_both_files(start_server, linear, files):
    options = ("--tls-cert", files["server"], "--tls-key", files["client-key"])
    server = start_server("--model", linear, "--device", "cpu", *options)
    assert server.wait() == 2
    assert server.lines == [
        f"error: the certificate {files['server']} and the private key {files['client-key']} do not belong together\n"
    ]


# Renewal


def test_a_renewed_certificate_is_used_without_a_restart_and_a_damaged_one_is_not(start_server, linear, files):
    server = start_server("--model", linear, *files.server_options()).ready()
    target = f"localhost:{server.port}"
    assert outcome(target, ca=files["server-ca"]) == "OK"
    renewed = trustme.CA()
    renewed.cert_pem.write_to_path(files["renewed-ca"])
    files.write("server", renewed.issue_cert("localhost"))
    server.wait_for(RENEWED)
    assert outcome(target, ca=files["renewed-ca"]) == "OK"
    assert outcome(target, ca=files["server-ca"]) == "UNAVAILABLE"
    files["server"].write_text("no certificate any more")
    files["server-key"].unlink()
    server.wait_for(REFUSED)
    assert outcome(target, ca=files["renewed-ca"]) == "OK"
    assert "PRIVATE KEY" not in server.log


def test_a_half_renewed_certificate_keeps_the_old_one_until_the_key_follows(start_server, linear, files):
    server = start_server("--model", linear, *files.server_options()).ready()
    target = f"localhost:{server.port}"
    renewed = trustme.CA()
    renewed.cert_pem.write_to_path(files["renewed-ca"])
    certificate = renewed.issue_cert("localhost")
    files["server"].write_bytes(certificate.cert_chain_pems[0].bytes())
    server.wait_for(f"{REFUSED}.*do not belong together")
    assert outcome(target, ca=files["server-ca"]) == "OK"
    assert outcome(target, ca=files["renewed-ca"]) == "UNAVAILABLE"
    certificate.private_key_pem.write_to_path(files["server-key"])
    server.wait_for(RENEWED)
    assert outcome(target, ca=files["renewed-ca"]) == "OK"
    assert server.log.count(REFUSED) == 1


# Mutual TLS


@contextlib.contextmanager
def connection(target: str, files: Authorities, name: str) -> Iterator[rpc.ImageClassifierStub]:
    credentials = grpc.ssl_channel_credentials(
        files["server-ca"].read_bytes(), files[f"{name}-key"].read_bytes(), files[name].read_bytes()
    )
    # A pool of subchannels of its own: gRPC would let another channel use an open connection of the same credentials.
    with grpc.secure_channel(target, credentials, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield rpc.ImageClassifierStub(channel)


def test_with_mutual_tls_only_clients_with_a_signed_certificate_are_served(start_server, linear, files):
    server = start_server("--model", linear, *files.server_options(), "--tls-client-ca", files["client-ca"]).ready()
    target, ca = f"localhost:{server.port}", files["server-ca"]
    assert outcome(target, ca=ca, certificate=files["client"], key=files["client-key"]) == "OK"
    assert outcome(target, ca=ca) == "UNAVAILABLE"
    assert outcome(target, ca=ca, certificate=files["stranger"], key=files["stranger-key"]) == "UNAVAILABLE"


def test_a_renewed_client_authority_admits_its_clients_and_no_longer_those_of_the_old_one(start_server, linear, files):
    server = start_server("--model", linear, *files.server_options(), "--tls-client-ca", files["client-ca"]).ready()
    target, ca = f"localhost:{server.port}", files["server-ca"]
    with connection(target, files, "client") as before:
        assert before.GetModel(messages.GetModelRequest(), timeout=20).version
        renewed = trustme.CA()
        files.write("new-client", renewed.issue_cert("a-new-client"))
        assert outcome(target, ca=ca, certificate=files["new-client"], key=files["new-client-key"]) == "UNAVAILABLE"
        renewed.cert_pem.write_to_path(files["client-ca"])
        server.wait_for(RENEWED)
        assert outcome(target, ca=ca, certificate=files["new-client"], key=files["new-client-key"]) == "OK"
        with connection(target, files, "client") as after, pytest.raises(grpc.RpcError) as caught:
            after.GetModel(messages.GetModelRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_connection_of_the_old_client_authority_ends_at_the_maximum_age(start_server, linear, files):
    server = start_server(
        "--model", linear, *files.server_options(), "--tls-client-ca", files["client-ca"],
        "--max-connection-age", "2", "--grace", "1",
    ).ready()  # fmt: skip
    with connection(f"localhost:{server.port}", files, "client") as stub:
        end = threading.Event()
        stream = stub.ClassifyStream(open_request(end), timeout=60)
        assert next(stream).results
        trustme.CA().cert_pem.write_to_path(files["client-ca"])
        server.wait_for(RENEWED)
        with pytest.raises(grpc.RpcError):
            next(stream)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetModel(messages.GetModelRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        end.set()


def open_request(end: threading.Event) -> Iterator[messages.ClassifyRequest]:
    """A stream of one request that the client keeps open."""
    yield messages.ClassifyRequest(packed_rgb=pictures(1).tobytes())
    end.wait(60)
