"""The server fixtures of the service's own tests."""

from tests.service.conftest import linear, server, start_server

__all__ = ["linear", "server", "start_server"]
