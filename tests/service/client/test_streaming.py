"""Classifying many files in bounded memory."""

import asyncio
import contextlib
import shutil
from collections.abc import Callable

import pytest

from service.client import AsyncClient, ClassificationError, Options
from service.client.files import Found, Selection
from service.client.streaming import classify_files
from tests.conftest import REPOSITORY
from tests.service.client.scripted import Scripted, serve

IMAGE = REPOSITORY / "samples/bird.png"


def test_files_are_found_and_read_only_a_little_ahead_of_their_answers():
    taken = 0

    def files():
        nonlocal taken
        for taken in range(1, 1001):
            yield Found(IMAGE, str(taken))

    async def ahead(target: str) -> list[int]:
        async with AsyncClient(target) as client:
            rows = [(row.file.label, taken) async for row in classify_files(client, files(), 1, 10**6)]
        assert [label for label, _ in rows] == [str(number) for number in range(1, 1001)]
        return [taken - int(label) for label, taken in rows]

    servicer = Scripted()
    servicer.limits.max_message_bytes = 10**6
    with serve(servicer) as target:
        assert 100 < max(asyncio.run(ahead(target))) <= 256


def test_few_large_files_are_held_at_once(tmp_path):
    for number in range(30):
        shutil.copy(IMAGE, tmp_path / f"{number:02}.png")
        with (tmp_path / f"{number:02}.png").open("ab") as file:
            file.truncate(7_000_000)
    taken = 0

    def files():
        nonlocal taken
        for file in Selection([str(tmp_path)]):
            taken += 1
            yield file

    async def ahead(target: str) -> list[int]:
        async with AsyncClient(target) as client:
            rows = classify_files(client, files(), 1, 8_000_000)
            return [taken - done async for done, _ in aenumerate(rows)]

    servicer = Scripted()
    servicer.limits.max_message_bytes = 8 * 2**20
    with serve(servicer) as target:
        assert max(asyncio.run(ahead(target))) <= 64 * 2**20 // 7_000_000


async def aenumerate(rows):
    count = 0
    async for row in rows:
        count += 1
        yield count, row


def test_a_server_that_goes_away_ends_the_run_and_not_file_by_file():
    done = 0

    async def use(target: str, stop: Callable[[], None]) -> None:
        nonlocal done
        files = (Found(IMAGE, "bird.png") for _ in range(100_000))
        async with AsyncClient(target, Options(attempts=2)) as client:
            async for _ in classify_files(client, files, 1, 10**6):
                done += 1
                if done == 300:
                    stop()

    servicer = Scripted()
    servicer.limits.max_message_bytes = 10**6
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(serve(servicer))
        with pytest.raises(ClassificationError, match="UNAVAILABLE"):
            asyncio.run(use(target, stack.close))
    assert 300 <= done < 2000
