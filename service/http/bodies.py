"""Reads the body of a request under limits, and takes a multipart body apart."""

from collections.abc import Mapping
from dataclasses import dataclass

from multipart import MultipartError, ParserLimitReached, PushMultipartParser, parse_options_header
from starlette.types import Receive

from service.errors import DeadlineExpired, InvalidRequest, quoted
from service.http.answers import ReceiveTimeout, TooLarge, UnsupportedEncoding
from service.http.connection import Connection
from service.receiving import Receiver

MULTIPART = "multipart/form-data"
# Limits on the headers of a part.
_MAX_PART_HEADER_BYTES = 4096
_MAX_PART_HEADERS = 8


@dataclass(frozen=True)
class File:
    """A file in a body.

    Attributes:
        name: The name that the client gave it; None if it gave none.
        content: Its bytes.
    """

    name: str | None
    content: bytes


class _Body:
    """A source of one message for `Receiver`.

    Args:
        receive: ASGI's function.
        max_bytes: Largest size.
    """

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive, self._max_bytes = receive, max_bytes

    async def read(self) -> bytes:
        """The whole body.

        Raises:
            TooLarge: It has more than `max_bytes` bytes.
        """
        parts: list[bytes] = []
        size = 0
        while True:
            event = await self._receive()
            if event["type"] == "http.disconnect":  # the connection cancels this task
                raise InvalidRequest("the connection was closed before the body was complete")
            part = event.get("body", b"")
            size += len(part)
            if size > self._max_bytes:
                raise too_large(self._max_bytes)
            parts.append(part)
            if not event.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)


def too_large(max_bytes: int) -> TooLarge:
    """The error for a body of more than `max_bytes` bytes."""
    return TooLarge(f"the body has more than {max_bytes} bytes, the limit (--max-message-bytes): send fewer images")


def check_count(images: int, max_images: int) -> None:
    """Accepts a request with this number of images.

    Raises:
        TooLarge: There are more than `max_images`.
    """
    if images > max_images:
        raise TooLarge(
            f"the request holds {images} images; at most {max_images} are allowed (--max-images): split it into "
            "several requests"
        )


def check_headers(headers: Mapping[str, str], max_bytes: int) -> None:
    """Accepts the headers of a request with a body.

    Raises:
        TooLarge: It announces a body of more than `max_bytes` bytes.
        UnsupportedEncoding: The body is compressed.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedEncoding(
            f"the body is encoded as {quoted(encoding)}: send it as it is; image files are compressed already"
        )
    length = headers.get("content-length")  # the parser of HTTP has checked that it is a number
    if length is not None and int(length) > max_bytes:
        raise too_large(max_bytes)


async def read_body(receive: Receive, connection: Connection, receiver: Receiver, max_bytes: int) -> bytes:
    """The body of a request.

    A body that has not arrived yet is read under the limits of `receiver`.

    Raises:
        TooLarge: It has more than `max_bytes` bytes.
        ReceiveTimeout: It did not arrive in time.
        Overloaded: Too many requests wait to be received.
    """
    body = _Body(receive, max_bytes)
    if connection.body_is_complete:
        return await body.read()
    try:
        read: bytes = await receiver.read(body, connection.peer)
    except DeadlineExpired as error:
        raise ReceiveTimeout(error.message) from error
    return read


def files_of(body: bytes, content_type: str, max_files: int) -> list[File]:
    """The files in a body: its parts if it is multipart/form-data, otherwise the body itself.

    Args:
        body: The body.
        content_type: The header Content-Type; empty if there is none.
        max_files: Largest number of files.

    Raises:
        InvalidRequest: The body is not what its type says.
        TooLarge: There are more than `max_files` files.
    """
    kind, options = parse_options_header(content_type)
    if kind != MULTIPART:
        return [File(None, body)]
    boundary = options.get("boundary", "")
    if not 1 <= len(boundary) <= 70:  # RFC 2046
        raise InvalidRequest(f"Content-Type is {MULTIPART} without a boundary of 1 to 70 characters")
    try:
        return _parts(body, boundary, max_files)
    except ParserLimitReached as error:
        raise TooLarge(
            f"the body has more than {max_files} parts (--max-images), or a part with more than {_MAX_PART_HEADERS} "
            f"headers or {_MAX_PART_HEADER_BYTES} bytes in a header: send fewer images"
        ) from error
    except (MultipartError, UnicodeError) as error:
        raise InvalidRequest(f"the body is not {MULTIPART} with this boundary: {error}") from error


def _parts(body: bytes, boundary: str, max_files: int) -> list[File]:
    files: list[File] = []
    name: str | None = None
    content = bytearray()
    parser = PushMultipartParser(
        boundary.encode("latin-1"),
        content_length=len(body),
        max_header_size=_MAX_PART_HEADER_BYTES,
        max_header_count=_MAX_PART_HEADERS,
        max_segment_count=max_files,
        strict=True,
    )
    with parser:
        for event in parser.parse(body):
            if isinstance(event, bytes | bytearray | memoryview):
                content += event
            elif event is None:
                files.append(File(name, bytes(content)))
                content.clear()
            else:
                name = event.filename
    return files
