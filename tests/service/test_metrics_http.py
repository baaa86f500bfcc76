"""The metrics page while other clients are silent, slow, talkative or do not speak HTTP."""

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import Metric

from service import metrics_http
from service.errors import StartError
from service.metrics_http import CONNECTION_SECONDS, MAX_CONNECTIONS, show
from tests.service.conftest import until

SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n"


def registry(series: int = 1, text: str = "") -> CollectorRegistry:
    filled = CollectorRegistry()
    counter = Counter("things", "Things that were counted.", ["kind"], registry=filled)
    for kind in range(series):
        counter.labels(f"{kind}{text}").inc()
    return filled


async def ask(port: int, request: bytes = SCRAPE) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """Sends a request and reads to the end: status line, headers, body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    return status, dict(line.split(b": ", 1) for line in lines), body


def test_a_scrape_gets_the_metrics_compressed_if_it_accepts_that():
    async def check() -> None:
        async with show(registry(), "127.0.0.1", 0) as port:
            status, headers, body = await ask(port)
            assert status == b"HTTP/1.1 200 OK"
            assert headers[b"Content-Type"].startswith(b"text/plain")
            assert headers[b"Content-Length"] == str(len(body)).encode()
            assert b'things_total{kind="0"} 1.0' in body
            _, headers, packed = await ask(port, SCRAPE[:-2] + b"Accept-Encoding: gzip\r\n\r\n")
            assert headers[b"Content-Encoding"] == b"gzip"
            assert gzip.decompress(packed) == body

    asyncio.run(check())


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed"),
        (b"\x16\x03\x01\x02\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"GET /metrics\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", b""),
    ],
)
def test_bad_requests_are_refused_and_harm_nothing(request_bytes, status):
    async def check() -> None:
        async with show(registry(), "127.0.0.1", 0) as port:
            with contextlib.suppress(ConnectionResetError):
                assert (await ask(port, request_bytes))[0] == status
            assert (await ask(port))[0] == b"HTTP/1.1 200 OK"

    asyncio.run(check())


@pytest.mark.parametrize("beginning", [b"", b"GET /metr"])
def test_a_scrape_is_answered_while_200_silent_or_slow_connections_are_held_open(beginning):
    async def check() -> None:
        async with show(registry(), "127.0.0.1", 0) as port:
            threads = threading.active_count()
            held = []
            for _ in range(200):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(beginning)
                held.append((reader, writer))
            began = time.monotonic()
            for _ in range(3):
                assert (await ask(port))[0] == b"HTTP/1.1 200 OK"
            assert time.monotonic() - began < 8  # the silent connections end after 10 s
            assert threading.active_count() == threads
            ended = [reader for reader, _ in held if reader.at_eof() or reader.exception()]
            assert len(ended) >= 200 - MAX_CONNECTIONS
            for _, writer in held:
                writer.transport.abort()

    asyncio.run(check())


def test_clients_that_never_read_their_answer_make_way_for_others(monkeypatch):
    monkeypatch.setattr(metrics_http, "MAX_CONNECTIONS", 8)

    async def check() -> None:
        async with show(registry(200, "x" * 20_000), "127.0.0.1", 0) as port:  # 4 MB
            with contextlib.ExitStack() as held:
                for _ in range(10):
                    client = held.enter_context(socket.socket())
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    client.connect(("127.0.0.1", port))
                    client.sendall(SCRAPE)
                    await asyncio.sleep(0.2)
                began = time.monotonic()
                assert (await ask(port))[0] == b"HTTP/1.1 200 OK"
                assert time.monotonic() - began < CONNECTION_SECONDS / 2

    asyncio.run(check())


def test_a_silent_connection_is_ended_after_its_time(monkeypatch):
    assert CONNECTION_SECONDS <= 10
    monkeypatch.setattr(metrics_http, "CONNECTION_SECONDS", 0.3)

    async def check() -> None:
        async with show(registry(), "127.0.0.1", 0) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            began = time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            assert 0.2 < time.monotonic() - began < 5
            writer.close()

    asyncio.run(check())


def test_scrapes_in_a_loop_take_only_a_small_part_of_the_event_loop():
    class Expensive:
        """Occupies the event loop for a while, and records when."""

        def __init__(self) -> None:
            self.began: list[float] = []
            self.ended: list[float] = []

        def collect(self) -> list[Metric]:
            self.began.append(time.monotonic())
            time.sleep(0.02)
            self.ended.append(time.monotonic())
            return []

    async def check() -> None:
        metric = Expensive()
        metrics = CollectorRegistry()
        metrics.register(metric)
        metric.began.clear()  # registering collects once
        metric.ended.clear()
        async with show(metrics, "127.0.0.1", 0) as port:
            await asyncio.gather(*(ask(port) for _ in range(8)))
        assert len(metric.began) == 8
        for row in range(7):
            occupied = metric.ended[row] - metric.began[row]
            assert metric.began[row + 1] - metric.ended[row] > 3 * occupied

    asyncio.run(check())


def test_a_failing_metric_is_an_error_of_the_scrape_and_nothing_else(caplog):
    class Broken:
        def collect(self) -> None:
            raise ValueError("no such figure")

        def describe(self) -> list[None]:
            return []

    async def check() -> None:
        broken = registry()
        broken.register(Broken())
        async with show(broken, "127.0.0.1", 0) as port:
            assert (await ask(port))[0] == b"HTTP/1.1 500 Internal Server Error"
            assert (await ask(port))[0] == b"HTTP/1.1 500 Internal Server Error"

    asyncio.run(check())
    assert "no such figure" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "0.0.0.0"])  # noqa: S104
def test_it_listens_where_it_is_asked_to(host):
    async def check() -> None:
        async with show(registry(), host, 0) as port:
            assert port

    if ":" in host and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    asyncio.run(check())


def test_an_address_that_cannot_be_used_is_named_in_one_line():
    async def check(host: str, port: int) -> None:
        async with show(registry(), host, port):
            pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=rf"^--metrics-port {port} of 127\.0\.0\.1: Address already in use$"):
            asyncio.run(check("127.0.0.1", port))
    with pytest.raises(StartError, match=r"^--metrics-port 0 of 192\.0\.2\.1: Cannot assign requested address$"):
        asyncio.run(check("192.0.2.1", 0))


def test_nothing_is_shown_without_a_port():
    async def check() -> None:
        async with show(registry(), "127.0.0.1", None) as port:
            assert port is None

    asyncio.run(check())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_answers_scrapes_beside_200_silent_connections_without_more_threads(start_server, linear, workers):
    server = start_server("--model", linear, "--workers", workers, "--metrics-port", "0").ready()
    port = int(str(server.wait_for("metrics at")["message"]).rpartition(":")[2].removesuffix("/metrics"))
    server.metrics()

    def threads() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in status if line.startswith("Threads:")))

    before = threads()
    with contextlib.ExitStack() as held:
        for _ in range(200):
            held.enter_context(socket.create_connection(("127.0.0.1", port)))
        began = time.monotonic()
        assert server.metrics()
        assert time.monotonic() - began < 8  # the silent connections end after 10 s
        assert threads() <= before + 1
    until(lambda: bool(server.metrics()))
    assert server.stop() == 0
    assert all(json.loads(line) for line in server.lines)
