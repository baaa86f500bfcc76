"""Clients that are slow, endless, silent or too many: bounded in time and memory, and honest clients are answered."""

import contextlib
import functools
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.service.conftest import Server, until
from tests.service.exports import pictures
from tests.service.http.conftest import errors
from tests.service.http.test_classify import png
from tests.service.http.web import Raw, Web, multipart, resident_mib

PNG = png(pictures(1)[0])
HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def attacked(linear) -> Iterator[Server]:
    """A server whose time limits are short, so that tests need not wait long."""
    options = ("--http-port", "0", "--metrics-port", "0", "--receive-timeout", "1", "--max-connections", "300")
    server = Server("--model", linear, *options).ready()
    try:
        yield server
        assert server.stop() == 0, server.log
        assert errors(server) == []
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def _honest_clients_are_answered(attacked: Server) -> Iterator[None]:
    with Web(attacked.http_url) as web:
        assert web.post("/v1/classify", PNG).status == 200
    yield
    with Web(attacked.http_url) as web:
        assert web.post("/v1/classify", PNG).status == 200


# Time


INCOMPLETE = {
    "nothing": b"",
    "a word": b"POST",
    "a line": HEAD,
    "half of the headers": HEAD + b"Content-Length: 10\r\n",
    "an empty line": b"\r\n",
    "half of a second request": GET + b"GET /",
    "a greeting of TLS": b"\x16\x03\x01",
}


def incomplete(server: Server, sent: bytes) -> float:
    with Raw(server.http_url) as raw:
        return raw.send(sent).seconds_until_closed(40)


def headers_byte_by_byte(server: Server) -> float:
    began = time.monotonic()
    with Raw(server.http_url) as raw, contextlib.suppress(OSError):
        for byte in HEAD + b"X: " + b"x" * 10_000:
            raw.send(bytes([byte]))
            time.sleep(0.2)
    return time.monotonic() - began


def endless_body(server: Server) -> float:
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    began = time.monotonic()
    with Raw(server.http_url) as raw, contextlib.suppress(OSError):
        raw.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        while time.monotonic() - began < 40:
            raw.send(chunk)
    return time.monotonic() - began


def answer_that_is_not_read(server: Server) -> float:
    body, kind = multipart([(None, PNG)] * 1000)
    head = HEAD.replace(b"classify", b"classify?pixels=true")
    request = head + f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    began = time.monotonic()
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.settimeout(30)
        stalled.connect(("127.0.0.1", int(server.http_url.rsplit(":", 1)[1])))
        stalled.sendall(request)
        until(lambda: not established(stalled), 40)
    return time.monotonic() - began


def established(client: socket.socket) -> bool:
    """Whether the server's end of a connection is open."""
    port = f":{client.getsockname()[1]:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[2].endswith(port) and line.split()[3] == "01" for line in lines)


def test_clients_that_are_slow_with_headers_bodies_or_answers_are_disconnected(attacked):
    """All of them at the same time, because each of them takes about ten seconds."""
    attacks = {name: functools.partial(incomplete, attacked, sent) for name, sent in INCOMPLETE.items()} | {
        "headers byte by byte": functools.partial(headers_byte_by_byte, attacked),
        "an endless body": functools.partial(endless_body, attacked),
        "an answer that is not read": functools.partial(answer_that_is_not_read, attacked),
    }
    with ThreadPoolExecutor(len(attacks)) as pool:
        seconds = {name: running.result() for name, running in [(n, pool.submit(a)) for n, a in attacks.items()]}
    assert {name: round(each, 1) for name, each in seconds.items() if each > 20} == {}


def test_a_body_that_does_not_arrive_is_a_timeout(attacked):
    with Raw(attacked.http_url) as raw:
        reply = raw.send(HEAD + b"Content-Length: 1000\r\n\r\nhalf").reply()
        assert (reply.status, reply.headers["content-type"]) == (408, "application/problem+json")
        assert "--receive-timeout" in reply.json["detail"]
        assert raw.seconds_until_closed(30) < 15
    assert attacked.metrics()["cifar_service_receive_timeouts_total"] >= 1


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_arrives_byte_by_byte_is_a_timeout(attacked, chunked):
    head = HEAD + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: 100000\r\n\r\n")
    with Raw(attacked.http_url) as raw:
        raw.send(head)
        for _ in range(500):
            raw.send(b"1\r\nx\r\n" if chunked else b"x")
            if raw.readable(0.02):
                break
        assert raw.reply().status == 408


def test_a_body_whose_chunks_are_malformed_is_counted_as_a_mistake_of_the_client(attacked):
    def counted() -> dict[str, float]:
        prefix, suffix = "cifar_service_requests_total", 'method="POST /v1/classify"}'
        seen = attacked.metrics()
        return {code: seen.get(f'{prefix}{{code="{code}",{suffix}', 0) for code in ("INVALID_ARGUMENT", "CANCELLED")}

    before = counted()
    with Raw(attacked.http_url) as raw:
        raw.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n")
        assert raw.reply().status == 400
    until(lambda: counted()["INVALID_ARGUMENT"] == before["INVALID_ARGUMENT"] + 1)
    assert counted()["CANCELLED"] == before["CANCELLED"]


def test_a_client_that_closes_its_half_of_the_connection_is_not_kept(attacked):
    with Raw(attacked.http_url) as raw:
        raw.send(HEAD + b"Content-Length: 1000\r\n\r\nhalf")
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.seconds_until_closed(30) < 5
    with Raw(attacked.http_url) as raw:
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.seconds_until_closed(30) < 5


# Size


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", 505),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: y\r\n folded\0\r\n\r\n", 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx", 400),
        (HEAD + b"Content-Length: 1e3\r\n\r\n", 400),
        (HEAD + b"Content-Length: 9999999999\r\n\r\n", 413),
        (HEAD + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 2000, 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"hello\r\n\r\n", 400),
        (bytes(range(256)) * 100, 400),
    ],
)
def test_a_request_that_is_not_http_or_too_large_has_its_status(attacked, request_, status):
    with Raw(attacked.http_url) as raw:
        reply = raw.send(request_).reply()
        assert (reply.status, reply.headers["content-type"]) == (status, "application/problem+json")
        assert reply.json["status"] == status


@pytest.mark.parametrize("target", ["/healthz", "http://x/healthz", "HTTPS://x:1/healthz?a=/b"])
def test_a_target_may_be_a_whole_url(attacked, target):
    with Raw(attacked.http_url) as raw:
        assert raw.send(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()).reply().status == 200


def test_content_length_and_chunks_together_are_refused(attacked):
    """A proxy in front could find the end of the body at another place, and see one request where there are two."""
    head = HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"
    with Raw(attacked.http_url) as raw:
        assert raw.send(head + b"GET /v1/model HTTP/1.1\r\nHost: x\r\n\r\n").reply().status == 400
        assert raw.seconds_until_closed(30) < 5


def test_a_hostile_content_type_costs_no_time(attacked):
    with Web(attacked.http_url) as web:
        for kind in ('multipart/form-data; boundary="' + "\\" * 15_000, "multipart/form-data" + "; a=b" * 3000):
            began = time.monotonic()
            assert web.post("/v1/classify", PNG, kind).status in (400, 422)
            assert time.monotonic() - began < 5
        disposition = b'--y\r\nContent-Disposition: form-data; name="' + b"\\" * 4000 + b"\r\n\r\nx\r\n--y--\r\n"
        began = time.monotonic()
        assert web.post("/v1/classify", disposition, "multipart/form-data; boundary=y").status in (400, 422)
        assert time.monotonic() - began < 5


def test_a_multipart_body_of_near_boundaries_costs_no_time(attacked):
    boundary = "a" * 60
    near = (b"\r\n--" + b"a" * 59 + b"b") * (8 * 2**20 // 70)
    first = f"--{boundary}\r\nContent-Disposition: form-data; name=a\r\n\r\n"
    body = first.encode() + near + f"\r\n--{boundary}--\r\n".encode()
    with Web(attacked.http_url) as web:
        began = time.monotonic()
        assert web.post("/v1/classify", body, f"multipart/form-data; boundary={boundary}").status in (200, 422)
        assert time.monotonic() - began < 5


# Number


def test_idle_connections_lock_nobody_out_and_hold_little_memory(attacked):
    before = resident_mib(attacked.process.pid)
    with contextlib.ExitStack() as stack:
        for _ in range(1000):  # the server keeps 300
            stack.enter_context(Raw(attacked.http_url)).send(b"GET / HT")
        with Web(attacked.http_url) as web:
            for _ in range(5):
                assert web.post("/v1/classify", PNG).status == 200
        assert resident_mib(attacked.process.pid) - before < 50


def test_stalled_bodies_hold_little_memory_and_delay_honest_clients_for_seconds_only(attacked):
    before = resident_mib(attacked.process.pid)
    with contextlib.ExitStack() as stack:
        for _ in range(250):
            raw = stack.enter_context(Raw(attacked.http_url))
            raw.socket.settimeout(0.05)
            with contextlib.suppress(OSError):
                raw.send(HEAD + b"Content-Length: 8000000\r\n\r\n" + bytes(4_000_000))
        with Web(attacked.http_url) as web:
            assert web.post("/v1/classify", PNG).status == 200
        assert resident_mib(attacked.process.pid) - before < 400


def test_a_flood_of_pipelined_requests_is_answered_one_by_one_and_holds_little_memory(attacked):
    before = resident_mib(attacked.process.pid)
    with Raw(attacked.http_url) as raw:
        raw.socket.settimeout(2)
        with contextlib.suppress(OSError):
            for _ in range(300):
                raw.send(GET * 1000)  # and reads nothing
        with Web(attacked.http_url) as web:
            assert web.post("/v1/classify", PNG).status == 200
        assert resident_mib(attacked.process.pid) - before < 50
    with Raw(attacked.http_url) as raw:
        raw.send(GET * 200)
        assert [raw.reply().status for _ in range(200)] == [200] * 200
