"""The standard health service. Its Watch streams end when the server stops, and do not delay it."""

import asyncio

from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.errors import NotFound, quoted
from service.rpc.calls import Call
from service.rpc.statuses import Context

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Health(health_pb2_grpc.HealthServicer):
    """One status for the server as a whole (the empty name) and for each service by name.

    The servicer of grpc_health writes to a watching client while it holds a lock: a client that does not read would
    block every later change of status.

    Args:
        services: Full names of the services.
    """

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = frozenset(("", *services))
        self._serving = False
        self._watching: set[asyncio.Event] = set()
        self._ended = False

    def set_serving(self, serving: bool) -> None:
        """Changes the status and notifies the watching clients."""
        self._serving = serving
        self._wake()

    def end_watches(self) -> None:
        """Ends all Watch streams after they have sent the current status."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        for changed in self._watching:
            changed.set()

    async def Check(  # noqa: N802 -- the protocol's name; `Calls` passes a Call
        self, request: health_pb2.HealthCheckRequest, call: Call
    ) -> health_pb2.HealthCheckResponse:
        """The status of a service.

        Raises:
            NotFound: There is no such service.
        """
        del call
        if request.service not in self._services:
            raise NotFound(f"there is no service {quoted(request.service)}")
        return self._serving_status(request.service)

    def _serving_status(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in self._services:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        if self._serving:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)

    async def watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Sends the status of a service, and again whenever it changes, until the client or the server ends it."""
        changed = asyncio.Event()
        self._watching.add(changed)
        sent: health_pb2.HealthCheckResponse | None = None
        try:
            while True:
                changed.clear()
                status = self._serving_status(request.service)
                if status != sent:
                    await context.write(status)
                    sent = status
                elif self._ended:
                    return
                else:
                    await changed.wait()
        finally:
            self._watching.discard(changed)
