"""The routes: which handler answers which path."""

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as StarletteRequest
from starlette.responses import Response
from starlette.routing import Route

from service.core.inference import Inference
from service.http import openapi
from service.http.answers import Answer, json_answer, problem
from service.http.classify import Classifier
from service.http.open_inference import OpenInference
from service.http.pages import Pages
from service.http.requests import Endpoint, Handler, Request, Requests, Rules


@dataclass(frozen=True)
class _Probes:
    """Answers /healthz and /readyz. `ready` returns whether the server answers requests."""

    ready: Callable[[], bool]

    async def healthz(self, request: Request) -> Answer:
        """Whether the process lives."""
        del request
        return json_answer({"status": "ok"})

    async def readyz(self, request: Request) -> Answer:
        """Whether the server answers requests."""
        del request
        if self.ready():
            return json_answer({"status": "ok"})
        return problem(
            HTTPStatus.SERVICE_UNAVAILABLE, "the server does not answer requests: it stops, or its engine is stuck"
        )


def application(
    requests: Requests, inference: Inference, healthy: Callable[[], bool], *, health_without_token: bool
) -> Starlette:
    """The application.

    Args:
        requests: Wraps all handlers.
        inference: Answers the requests.
        healthy: Returns whether the engine works.
        health_without_token: Whether health checks need no token.
    """

    def ready() -> bool:
        return healthy() and not requests.draining

    version = importlib.metadata.version("cifar-classifier")
    description = openapi.description(version, inference.limits.max_message_bytes)
    pages, probes = Pages(description), _Probes(ready)
    rest = Classifier(inference, pages.samples)
    protocol = OpenInference(inference, ready, version)
    described = to_json(description)

    async def openapi_json(request: Request) -> Answer:
        del request
        return Answer(body=described)

    routes: list[Route] = []

    def add(method: str, handler: Handler, *paths: str, token: bool = True, draining: bool = False) -> None:
        rules = Rules(f"{method} {paths[0]}", reads_body=method == "POST", needs_token=token, while_draining=draining)
        routes.extend(Route(path, Endpoint(requests, rules, handler), methods=[method]) for path in paths)

    def health(handler: Handler, *paths: str) -> None:
        add("GET", handler, *paths, token=not health_without_token, draining=True)

    def public(handler: Handler, *paths: str) -> None:
        """Files that contain no secret: a browser can load them before the user has entered a token."""
        add("GET", handler, *paths, token=False)

    add("POST", rest.classify, "/v1/classify")
    add("GET", rest.model, "/v1/model")
    health(probes.healthz, "/healthz")
    health(probes.readyz, "/readyz")

    model, model_version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
    add("POST", protocol.infer, f"{model}/infer", f"{model_version}/infer")
    add("GET", protocol.server, "/v2", "/v2/")
    health(protocol.live, "/v2/health/live")
    health(protocol.ready, "/v2/health/ready")
    add("GET", protocol.statistics, f"{model}/stats", f"{model_version}/stats", "/v2/models/stats")
    add("GET", protocol.config, f"{model}/config", f"{model_version}/config")
    health(protocol.model_ready, f"{model}/ready", f"{model_version}/ready")
    add("GET", protocol.metadata, model, model_version)

    public(openapi_json, "/openapi.json")
    public(pages.docs, "/docs", "/docs/{file}")
    public(pages.index, "/")
    public(pages.static, "/static/{file}")
    public(pages.sample, "/samples/{file}")

    async def unknown(request: StarletteRequest, error: Exception) -> Response:
        """Paths and methods that do not exist."""
        assert isinstance(error, HTTPException)  # noqa: S101 -- for the type checker: it is registered for these
        connection = request.scope["state"]["connection"]
        connection.last_request = time.monotonic()
        status = HTTPStatus(error.status_code)
        code = "NOT_FOUND" if status == HTTPStatus.NOT_FOUND else "UNIMPLEMENTED"
        requests.record("other", code, 0.0, connection.peer)
        detail = f"there is no {request.method} {request.url.path[:200]}: /docs lists what there is"
        answer = problem(status, detail)
        headers = {name.decode(): value.decode() for name, value in answer.all_headers()} | dict(error.headers or {})
        if requests.closes(connection):
            headers["connection"] = "close"
        return Response(answer.body, error.status_code, headers)

    app = Starlette(routes=routes, exception_handlers={HTTPException: unknown})
    app.router.redirect_slashes = False
    return app
