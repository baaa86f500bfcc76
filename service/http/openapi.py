"""The description of the HTTP interface (OpenAPI 3.1): every path, parameter, status and form of an answer.

A test asks the server for everything that is described here, and compares what it returns.
"""

from typing import Any, Final

from service.http.answers import BINARY, JSON, PROBLEM
from service.http.schemas import SCHEMAS

Described = dict[str, Any]

_TEXTS: Final = {
    400: "The request is wrong: `detail` says what is allowed.",
    401: "There is no valid token. Only if the server requires tokens.",
    404: "There is no such model, version or file.",
    408: "The body did not arrive in time.",
    413: "The body, its JSON, or the number of images exceeds a limit, which `detail` names.",
    415: "The body is compressed.",
    422: "No image of the request can be read: `results` says why, for each.",
    429: "The server is full. Retry after the time in `Retry-After`.",
    500: "The engine failed on this request.",
    503: "The server is stopping. Ask another, or retry after the time in `Retry-After`.",
    504: "The deadline passed before the answer was ready.",
}
_WITH_RETRY: Final = (429, 503)
_BODY_ERRORS: Final = (400, 401, 408, 413, 415, 429, 500, 503, 504)


def description(version: str, max_body_bytes: int) -> Described:
    """The description.

    Args:
        version: Version of this package.
        max_body_bytes: Largest size of a body.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cifar-classifier",
            "version": version,
            "description": "Classifies images. A body has at most "
            f"{max_body_bytes} bytes; `/v1/model` names all limits. Errors are problem details (RFC 9457).",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {**_classification(), **_health(), **_protocol(), **_files()},
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _classification() -> Described:
    classify = _operation(
        "classify",
        "Classifies one image, or several",
        {"200": _json("Classification", "The result of each image, in their order.")},
        errors=(*_BODY_ERRORS, 422),
        parameters=[
            _query("top_k", {"type": "integer", "minimum": 1, "maximum": 999_999_999}, "Number of classes to return."),
            _query("pixels", {"type": "boolean", "default": False}, "Whether to return what the model sees."),
            _timeout(),
        ],
    )
    image = {"type": "string", "format": "binary"}
    classify["requestBody"] = {
        "required": True,
        "description": "One image file, of any of PNG, JPEG, WebP, GIF and BMP, or several as multipart/form-data.",
        "content": {
            BINARY: {"schema": image},
            "image/*": {"schema": image},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "minItems": 1, "items": image}},
                    "required": ["image"],
                }
            },
        },
    }
    model = _operation(
        "model",
        "The model, the limits, and the sample pictures",
        {"200": _json("Model", "What is served.")},
        (401, 503),
    )
    return {"/v1/classify": {"post": classify}, "/v1/model": {"get": model}}


def _health() -> Described:
    return {
        "/healthz": {
            "get": _operation("healthz", "Whether the process lives", {"200": _json("Health", "It does.")}, (401,))
        },
        "/readyz": {
            "get": _operation(
                "readyz",
                "Whether requests are answered",
                {"200": _json("Health", "They are."), "503": _problem("They are not: the server stops or is stuck.")},
                (401,),
            )
        },
    }


def _protocol() -> Described:
    """The Open Inference Protocol."""
    model, version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
    ready = {"200": _json("Ready", "Requests are answered."), "503": _json("Ready", "They are not.")}
    model_ready = {"200": _json("ModelReady", "It is served."), "503": _json("ModelReady", "The server stops.")}
    paths: Described = {
        "/v2": {"get": _operation("server", "The server", {"200": _json("Server", "Its name.")}, (401, 503))},
        "/v2/health/live": {
            "get": _operation("live", "Whether the process lives", {"200": _json("Live", "It does.")}, (401,))
        },
        "/v2/health/ready": {"get": _operation("ready", "Whether requests are answered", ready, (401,))},
        "/v2/models/stats": {
            "get": _operation(
                "all_stats", "Statistics", {"200": _json("Statistics", "Of the model, in all workers.")}, (401, 503)
            )
        },
    }
    for base, suffix, names in ((model, "", ("name",)), (version, "_version", ("name", "version"))):
        path = [_path(name) for name in names]
        reads = (
            ("", "metadata", "The model's tensors", {"200": _json("Metadata", "Its tensors.")}, (401, 404, 503)),
            ("/config", "config", "The model's configuration", {"200": _json("Config", "Triton's.")}, (401, 404, 503)),
            ("/stats", "stats", "Statistics", {"200": _json("Statistics", "In all workers.")}, (401, 404, 503)),
            ("/ready", "model_ready", "Whether a model is served", model_ready, (401, 404)),
        )
        for end, name, summary, answers, errors in reads:
            paths[base + end] = {"get": _operation(name + suffix, summary, answers, errors, path)}
        paths[f"{base}/infer"] = {"post": _infer(f"infer{suffix}", path)}
    return paths


def _infer(name: str, path: list[Described]) -> Described:
    length = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "Size of the JSON at the beginning of the body, if the elements of a tensor follow as bytes.",
        "schema": {"type": "integer", "minimum": 0},
    }
    answer = _json("InferResponse", "The outputs.")
    answer["content"][BINARY] = {"schema": {"type": "string", "format": "binary"}}
    answer["headers"] = {length["name"]: {"description": length["description"], "schema": length["schema"]}}
    operation = _operation(
        name, "Logits and probabilities of images", {"200": answer}, (*_BODY_ERRORS, 404), [*path, length, _timeout()]
    )
    operation["requestBody"] = {
        "required": True,
        "content": {
            JSON: {"schema": _reference("InferRequest")},
            BINARY: {"schema": {"type": "string", "format": "binary"}},
        },
    }
    return operation


def _files() -> Described:
    def file(name: str, summary: str, content: str, named: bool = False) -> Described:
        page = {"description": "The file.", "content": {content: {"schema": {"type": "string", "format": "binary"}}}}
        answers: Described = {"200": page, "304": {"description": "The client has it already: see `If-None-Match`."}}
        operation = _operation(name, summary, answers, (404, 503), [_path("file")] if named else [])
        return {"get": {**operation, "security": []}}

    described = _operation(
        "openapi",
        "This description",
        {"200": {"description": "It.", "content": {JSON: {"schema": {"type": "object"}}}}},
        (503,),
    )
    return {
        "/openapi.json": {"get": {**described, "security": []}},
        "/": file("page", "A page to try the model", "text/html"),
        "/static/{file}": file("static", "A file of the page", "*/*", named=True),
        "/samples/{file}": file("sample", "A sample picture", "image/*", named=True),
        "/docs": file("docs", "This description as a page", "text/html"),
        "/docs/{file}": file("docs_file", "A file of that page", "*/*", named=True),
    }


def _operation(
    name: str,
    summary: str,
    answers: Described,
    errors: tuple[int, ...],
    parameters: list[Described] | None = None,
) -> Described:
    responses = dict(answers)
    for status in errors:
        responses[str(status)] = _problem(_TEXTS[status], "Unreadable" if status == 422 else "Problem", status)
    return {"operationId": name, "summary": summary, "parameters": parameters or [], "responses": responses}


def _json(schema: str, text: str) -> Described:
    return {"description": text, "content": {JSON: {"schema": _reference(schema)}}}


def _problem(text: str, schema: str = "Problem", status: int = 0) -> Described:
    answer: Described = {"description": text, "content": {PROBLEM: {"schema": _reference(schema)}}}
    if status in _WITH_RETRY:
        answer["headers"] = {
            "Retry-After": {"description": "Seconds.", "required": True, "schema": {"type": "integer", "minimum": 0}}
        }
    return answer


def _reference(schema: str) -> Described:
    return {"$ref": f"#/components/schemas/{schema}"}


def _query(name: str, schema: Described, text: str) -> Described:
    return {"name": name, "in": "query", "description": text, "schema": schema}


def _path(name: str) -> Described:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _timeout() -> Described:
    return {
        "name": "X-Request-Timeout",
        "in": "header",
        "description": "Seconds until the client gives up. Images that have not started by then are not computed.",
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 86_400},
    }
