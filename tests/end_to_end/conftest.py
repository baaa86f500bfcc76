"""The same server as the service's own tests use."""

from tests.service.conftest import linear, server

__all__ = ["linear", "server"]
