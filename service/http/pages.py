"""The files that browsers load: the page to try the model, its sample pictures, and the documentation of the interface.

All are read when the server starts. They name no other host, and their content security policies allow none.
"""

import hashlib
import mimetypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from service.errors import NotFound, quoted
from service.http import docs
from service.http.answers import Answer
from service.http.requests import Request
from service.settings import shipped

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


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
    """Answers requests for files.

    Args:
        description: The OpenAPI description, which the documentation shows.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        static = Path(__file__).parent / "static"
        self._static = _folder(sorted(static.iterdir()) if static.is_dir() else (), _PAGE_POLICY)
        samples = shipped("samples")
        self._samples = _folder(
            (path for path in sorted(samples.iterdir()) if path.suffix in _IMAGES) if samples.is_dir() else (),
            _PAGE_POLICY,
        )
        self._docs = {
            "": _page("index.html", docs.page(description), _PAGE_POLICY),
            "style.css": _page("style.css", docs.STYLE, _PAGE_POLICY),
        }

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
