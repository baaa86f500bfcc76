"""A small HTTP client for tests, and raw connections for what no HTTP client sends."""

import http.client
import json
import os
import select
import socket
import ssl
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reply:
    """An answer; names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def kind(self) -> str:
        return self.headers.get("content-type", "")


class Web:
    """One connection to a server, which is opened again if the server has closed it."""

    def __init__(self, url: str, context: ssl.SSLContext | None = None, timeout: float = 60.0) -> None:
        at = urllib.parse.urlsplit(url)
        assert at.hostname is not None
        if at.scheme == "https":
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                at.hostname, at.port, timeout=timeout, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(at.hostname, at.port, timeout=timeout)

    def __enter__(self) -> "Web":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        chunked = body is not None and not isinstance(body, bytes)
        self._connection.request(method, path, body, dict(headers or {}), encode_chunked=chunked)
        answer = self._connection.getresponse()
        return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def post(self, path: str, body: bytes, content_type: str = "application/octet-stream", **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("POST", path, body, {"Content-Type": content_type, **named})


def multipart(files: Sequence[tuple[str | None, bytes]], boundary: str = "a-boundary-of-the-test") -> tuple[bytes, str]:
    """A multipart body with these names and contents of files, and its content type."""
    parts = []
    for name, content in files:
        named = "" if name is None else f'; filename="{name}"'
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"{named}\r\n\r\n'
        parts += [head.encode(), content, b"\r\n"]
    parts.append(f"--{boundary}--\r\n".encode())
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"


class Raw:
    """A connection on which a test sends bytes."""

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        at = urllib.parse.urlsplit(url)
        self.socket = socket.create_connection((at.hostname, at.port), timeout=timeout)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> "Raw":
        self.socket.sendall(data)
        return self

    def readable(self, seconds: float) -> bool:
        """Whether something arrives within this time."""
        return bool(select.select([self.socket], [], [], seconds)[0])

    def reply(self) -> Reply:
        """The next answer; the next one may follow it on the connection."""
        line = self._file.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        fields = http.client.parse_headers(self._file)
        headers = {name.lower(): value for name, value in fields.items()}
        return Reply(int(line.split()[1]), headers, self._file.read(int(headers["content-length"])))

    def seconds_until_closed(self, limit: float = 60.0) -> float:
        """Seconds until the server closes the connection; reads and drops what it sends until then."""
        began = time.monotonic()
        self.socket.settimeout(limit)
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            pass
        return time.monotonic() - began


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
