"""The standard health service, whose Watch streams end when the server does instead of holding it up."""

import asyncio
from typing import Any

from grpc_health.v1 import health, health_pb2

_LAST_WORD_SECONDS = 0.05


class Health(health.aio.HealthServicer):
    """Status of the server as a whole (the empty name) and of each service by name."""

    def __init__(self, services: tuple[str, ...]) -> None:
        super().__init__()
        self._services = services
        self._ending = asyncio.Event()
        self._watches = 0

    async def serving(self) -> None:
        """Everything is ready."""
        for service in ("", *self._services):
            await self.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802, ANN401
        """Sends the status, and again whenever it changes, until the client or the server ends it."""
        self._watches += 1
        watching = asyncio.ensure_future(super().Watch(request, context))
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait((watching, ending), return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                await watching
        finally:
            watching.cancel()
            ending.cancel()
            self._watches -= 1

    async def end_watches(self) -> None:
        """Ends all streams, after those who watch could be told of the last change."""
        if self._watches:
            await asyncio.sleep(_LAST_WORD_SECONDS)
        self._ending.set()
