"""The files that browsers load: the page to try the model, its sample pictures, and the documentation of the interface.

All are read when the server starts. They name no other host, and their content security policies allow none.
"""

import hashlib
import mimetypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from swagger_ui_bundle import swagger_ui_path

from service.errors import NotFound, quoted
from service.http.answers import Answer
from service.http.requests import Request
from service.settings import shipped

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI sets styles from its script.
_DOCS_POLICY = _PAGE_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
_SWAGGER_FILES = ("swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")

_DOCS_PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>HTTP interface of cifar-classifier</title>
<link rel="icon" href="/docs/favicon-32x32.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_DOCS_START = b"""SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#swagger-ui", validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis], deepLinking: true,
});
"""


@dataclass(frozen=True)
class Page:
    """A file.

    Attributes:
        content: Its bytes.
        content_type: Its media type.
        policy: Its content security policy.
        tag: Its entity tag.
    """

    content: bytes
    content_type: str
    policy: str
    tag: str

    def answer(self, request: Request) -> Answer:
        """The answer to a request for this file; without content if the client has it already."""
        headers = {
            "cache-control": "no-cache",  # ask whether it has changed, before each use
            "content-security-policy": self.policy,
            "etag": self.tag,
            "referrer-policy": "no-referrer",
        }
        if self.tag in request.headers.get("if-none-match", ""):
            return Answer(HTTPStatus.NOT_MODIFIED, headers=headers)
        return Answer(body=self.content, content_type=self.content_type, headers=headers)


class Pages:
    """Answers requests for files."""

    def __init__(self) -> None:
        static = Path(__file__).parent / "static"
        self._static = _folder(sorted(static.iterdir()) if static.is_dir() else (), _PAGE_POLICY)
        samples = shipped("samples")
        self._samples = _folder(
            (path for path in sorted(samples.iterdir()) if path.suffix in _IMAGES) if samples.is_dir() else (),
            _PAGE_POLICY,
        )
        self._docs = _folder((Path(swagger_ui_path) / name for name in _SWAGGER_FILES), _DOCS_POLICY)
        self._docs[""] = _page("index.html", _DOCS_PAGE, _DOCS_POLICY)
        self._docs["start.js"] = _page("start.js", _DOCS_START, _DOCS_POLICY)

    @property
    def samples(self) -> list[str]:
        """Names of the sample pictures."""
        return list(self._samples)

    async def index(self, request: Request) -> Answer:
        """The page to try the model."""
        return _find(self._static, "index.html").answer(request)

    async def static(self, request: Request) -> Answer:
        """A file of the page."""
        return _find(self._static, request.path["file"]).answer(request)

    async def sample(self, request: Request) -> Answer:
        """A sample picture."""
        return _find(self._samples, request.path["file"]).answer(request)

    async def docs(self, request: Request) -> Answer:
        """The documentation of the interface, or a file of it."""
        return _find(self._docs, request.path.get("file", "")).answer(request)


def _folder(paths: Iterable[Path], policy: str) -> dict[str, Page]:
    return {path.name: _page(path.name, path.read_bytes(), policy) for path in paths}


def _page(name: str, content: bytes, policy: str) -> Page:
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    if kind.startswith("text/"):
        kind += "; charset=utf-8"
    return Page(content, kind, policy, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _find(pages: Mapping[str, Page], name: str) -> Page:
    page = pages.get(name)
    if page is None:
        raise NotFound(f"there is no file {quoted(name)} here")
    return page
