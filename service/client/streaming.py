"""Classifies any number of files over one connection, in bounded memory and in order."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass

from service.client.aio import AsyncClient
from service.client.answers import Classification
from service.client.files import Found, read_image
from service.client.retrying import RequestFailed

# Files whose answers are awaited at the same time: enough to fill the server's batches, and little memory.
_MAX_FILES, _MAX_BYTES = 256, 64 * 2**20


@dataclass(frozen=True)
class Row:
    """A file and the answer for it; `answer.error` says why it could not be read here or by the server."""

    file: Found
    answer: Classification


@dataclass(frozen=True)
class _Sent:
    file: Found
    size: int
    answer: "asyncio.Task[Classification]"


async def classify_files(
    client: AsyncClient, files: Iterable[Found], top_k: int, max_image_bytes: int
) -> AsyncGenerator[Row, None]:
    """Classifies files and yields one row for each, in their order.

    Each file is a call of its own, and `AsyncClient` packs these calls into shared requests. So each file has its own
    deadline, retries and error.

    Args:
        client: Client in the event loop of the caller.
        files: The files; they are found and read as they are sent.
        top_k: Number of classes per image; 0 for all.
        max_image_bytes: Largest file to send.

    Raises:
        ClassificationError: The server does not answer, or refuses calls for a reason that is not in the file.
        TypeError, ValueError: `top_k` is no number of classes.
    """
    under_way: deque[_Sent] = deque()
    size = 0
    try:
        remaining = iter(files)
        # In a thread, because a folder of many files takes long to list.
        while found := await asyncio.to_thread(_next, remaining, max_image_bytes):
            file, content = found
            length = len(content) if isinstance(content, bytes) else 0
            while under_way and (len(under_way) >= _MAX_FILES or size + length > _MAX_BYTES):
                size -= under_way[0].size
                yield await _first(under_way)
            under_way.append(_Sent(file, length, asyncio.create_task(_classify(client, content, top_k))))
            size += length
        while under_way:
            yield await _first(under_way)
    finally:
        for sent in under_way:
            sent.answer.cancel()
        await asyncio.gather(*(sent.answer for sent in under_way), return_exceptions=True)


async def _first(under_way: deque[_Sent]) -> Row:
    row = Row(under_way[0].file, await under_way[0].answer)
    under_way.popleft()  # not before, so that it is cancelled with the others if waiting for it is interrupted
    return row


def _next(files: Iterator[Found], limit: int) -> tuple[Found, bytes | str] | None:
    """The next file with its content, or with the reason why there is none; None after the last file."""
    file = next(files, None)
    if file is None:
        return None
    if file.problem:
        return file, file.problem
    try:
        return file, read_image(file.path, limit)
    except OSError as error:
        return file, error.strerror or str(error)


async def _classify(client: AsyncClient, content: bytes | str, top_k: int) -> Classification:
    if isinstance(content, str):
        return _unclassified(content)
    try:
        return (await client.classify([content], top_k))[0]
    except RequestFailed as failure:
        if not failure.caused_by_content:
            raise
        return _unclassified(str(failure))


def _unclassified(reason: str) -> Classification:
    return Classification(classes=(), error=reason, model_version="")
