"""Tokens, TLS and client certificates over HTTP: the same files as for gRPC, reloaded in the same way."""

import ssl
from pathlib import Path

import pytest
import trustme

from tests.service.exports import pictures
from tests.service.http.test_classify import png
from tests.service.http.web import Raw, Web
from tests.service.rpc.test_security_tls import RENEWED, Authorities

PNG = png(pictures(1)[0])
WITH_HTTP = ("--http-port", "0")


@pytest.fixture
def files(tmp_path: Path) -> Authorities:
    return Authorities(tmp_path)


# Tokens

PROTECTED = ("/v1/model", "/v2", "/v2/models/cifar10", "/v2/models/cifar10/stats")
HEALTH = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/cifar10/ready")
PUBLIC = ("/docs", "/openapi.json", "/samples/cat.jpg")


def test_only_requests_with_a_valid_token_are_answered(start_server, linear, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("first-secret\n")
    server = start_server(
        "--model", linear, *WITH_HTTP, "--metrics-port", "0", "--token-file", tokens, "--log-level", "debug"
    ).ready()
    with Web(server.http_url) as web:
        for path in (*PROTECTED, *HEALTH):
            reply = web.get(path)
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer"), path
            assert web.get(path, Authorization="Bearer first-secret").status == 200
        for path in PUBLIC:
            assert web.get(path).status == 200
        for wrong in ("", "Bearer", "Bearer wrong", "Basic first-secret", "first-secret", "Bearer first-secret2"):
            assert web.post("/v1/classify", PNG, Authorization=wrong).status == 401
        assert web.post("/v1/classify", PNG, Authorization="bearer first-secret").status == 200
        tokens.write_text("second-secret\n")
        server.wait_for("tokens were read again")
        assert web.post("/v1/classify", PNG, Authorization="Bearer first-secret").status == 401
        assert web.post("/v1/classify", PNG, Authorization="Bearer second-secret").status == 200
    seen = server.metrics()
    assert seen['cifar_service_requests_total{code="UNAUTHENTICATED",method="POST /v1/classify"}'] == 7
    assert "secret" not in server.log


def test_a_body_is_not_read_without_a_token(start_server, linear, tmp_path):
    (tmp_path / "tokens").write_text("a-secret\n")
    server = start_server("--model", linear, *WITH_HTTP, "--token-file", tmp_path / "tokens").ready()
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
    with Raw(server.http_url) as raw:
        reply = raw.send(head).reply()
        assert (reply.status, reply.headers["connection"]) == (401, "close")


def test_health_checks_may_need_no_token(start_server, linear, tmp_path):
    (tmp_path / "tokens").write_text("a-secret\n")
    server = start_server(
        "--model", linear, *WITH_HTTP, "--token-file", tmp_path / "tokens", "--health-without-token"
    ).ready()
    with Web(server.http_url) as web:
        assert [web.get(path).status for path in HEALTH] == [200] * len(HEALTH)
        assert [web.get(path).status for path in PROTECTED] == [401] * len(PROTECTED)


# TLS


def outcome(url: str, authority: Path | None = None, certificate: Path | None = None, key: Path | None = None) -> int:
    """The status over a new connection; 0 if there is none."""
    context = ssl.create_default_context(cafile=authority)
    if certificate:
        context.load_cert_chain(certificate, key)
    try:
        with Web(url, context) as web:
            return web.post("/v1/classify", PNG).status
    except (OSError, ssl.SSLError):
        return 0


def test_over_tls_the_server_proves_its_identity_and_refuses_plaintext(start_server, linear, files):
    server = start_server("--model", linear, *WITH_HTTP, *files.server_options()).ready()
    url = server.http_url
    assert url.startswith("https://")
    assert outcome(url, files["server-ca"]) == 200
    assert outcome(url, files["client-ca"]) == 0  # an authority that did not sign it
    with Raw(url) as raw:
        assert raw.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").seconds_until_closed(30) < 20
    assert outcome(url, files["server-ca"]) == 200
    assert "Traceback" not in server.log


def test_a_renewed_certificate_is_used_for_new_connections(start_server, linear, files):
    server = start_server("--model", linear, *WITH_HTTP, *files.server_options()).ready()
    context = ssl.create_default_context(cafile=files["server-ca"])
    with Web(server.http_url, context) as old:
        assert old.post("/v1/classify", PNG).status == 200
        files.server_ca = trustme.CA()
        files.server_ca.cert_pem.write_to_path(files.folder / "new-ca.pem")
        files.write("server", files.server_ca.issue_cert("localhost", "127.0.0.1"))
        server.wait_for(RENEWED)
        assert outcome(server.http_url, files["new-ca"]) == 200
        assert outcome(server.http_url, files["server-ca"]) == 0
        assert old.post("/v1/classify", PNG).status == 200


def test_mutual_tls_accepts_only_certificates_of_the_current_authority(start_server, linear, files):
    server = start_server(
        "--model", linear, *WITH_HTTP, *files.server_options(), "--tls-client-ca", files["client-ca"]
    ).ready()
    url, authority = server.http_url, files["server-ca"]
    assert outcome(url, authority, files["client"], files["client-key"]) == 200
    assert outcome(url, authority, files["stranger"], files["stranger-key"]) == 0
    assert outcome(url, authority) == 0
    new = trustme.CA()
    new.cert_pem.write_to_path(files["client-ca"])
    server.wait_for(RENEWED)
    assert outcome(url, authority, files["client"], files["client-key"]) == 0
    files.write("client", new.issue_cert("a-client"))
    assert outcome(url, authority, files["client"], files["client-key"]) == 200


def test_a_client_that_does_not_finish_the_handshake_is_disconnected(start_server, linear, files):
    server = start_server("--model", linear, *WITH_HTTP, *files.server_options()).ready()
    with Raw(server.http_url) as silent, Raw(server.http_url) as slow:
        slow.send(bytes.fromhex("16030100c8010000c40303"))
        assert silent.seconds_until_closed(30) < 20
        assert slow.seconds_until_closed(30) < 20
    assert outcome(server.http_url, files["server-ca"]) == 200
