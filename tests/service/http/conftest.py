"""A server with HTTP for all tests that leave it unchanged."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.conftest import Server, serving
from tests.service.http.web import Web


def errors(server: Server) -> list[str]:
    """Lines of the log with errors of the server, other than those of the engine, which tests cause on purpose."""
    lines = [line for line in server.lines if '"level": "ERROR"' in line or '"level": "CRITICAL"' in line]
    return [line for line in lines if '"service.core.' not in line]


@pytest.fixture(scope="session")
def http_server(linear: Path) -> Iterator[Server]:
    """One server for all tests that leave it unchanged."""
    options = ("--http-port", "0", "--metrics-port", "0", "--max-images", "400", "--log-level", "debug")
    with serving("--model", linear, *options) as shared:
        yield shared
    assert errors(shared) == []


@pytest.fixture
def web(http_server: Server) -> Iterator[Web]:
    """A connection to the shared server."""
    with Web(http_server.http_url) as connection:
        yield connection
