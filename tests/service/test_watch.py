import asyncio
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from service.errors import StartError
from service.watch import NotReady, Watcher, read_watched


class Recorder:
    """A reload function that records its attempts, and fails with the error in `fails_with` if there is one."""

    def __init__(self) -> None:
        self.attempts = 0
        self.fails_with: Exception | None = None
        self.failures: list[str] = []

    async def reload(self) -> None:
        self.attempts += 1
        if self.fails_with:
            raise self.fails_with

    def on_failure(self, error: Exception) -> None:
        self.failures.append(str(error))


def watching(recorder: Recorder, paths: Callable[[], Iterable[Path]]) -> Watcher:
    return Watcher(paths, recorder.reload, recorder.on_failure)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("first")
    return path


@pytest.fixture
def no_pauses(monkeypatch):
    """Failed reloads are repeated by the next check."""
    monkeypatch.setattr("service.watch.MAX_RETRY_SECONDS", 0.0)
    monkeypatch.setattr("service.watch.POLL_SECONDS", 0.0)


async def checks(watcher: Watcher, count: int = 3) -> None:
    for _ in range(count):
        await watcher.check()


def test_a_named_pipe_or_a_device_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(NotReady, match=f"the token file {path} cannot be read: it is not a regular file"):
            read_watched(path, "the token file")


def test_a_change_is_loaded_once(file, recorder):
    watcher = watching(recorder, lambda: [file])
    asyncio.run(checks(watcher))
    assert recorder.attempts == 0
    file.write_text("second")
    asyncio.run(checks(watcher))
    assert recorder.attempts == 1


def test_a_change_that_keeps_size_and_modification_time_is_loaded(file, recorder):
    watcher = watching(recorder, lambda: [file])
    before = file.stat()
    time.sleep(0.02)  # the clock of file systems ticks every few milliseconds
    file.write_text("FIRST")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    asyncio.run(checks(watcher))
    assert recorder.attempts == 1


def test_files_that_are_not_watched_cause_no_reload(file, recorder):
    watcher = watching(recorder, lambda: [file])
    (file.parent / "unrelated").write_text("new")
    (file.parent / "dangling").symlink_to("nowhere")
    asyncio.run(checks(watcher))
    assert recorder.attempts == 0


def test_a_failed_attempt_is_repeated_until_it_succeeds_and_reported_once_for_each_reason(file, recorder, no_pauses):
    watcher = watching(recorder, lambda: [file])
    file.write_text("second")
    recorder.fails_with = NotReady("permission denied")
    asyncio.run(checks(watcher))
    recorder.fails_with = NotReady("input/output error")
    asyncio.run(checks(watcher))
    assert recorder.attempts == 6
    assert recorder.failures == ["permission denied", "input/output error"]
    recorder.fails_with = None
    asyncio.run(checks(watcher))
    assert recorder.attempts == 7


def test_unexpected_errors_are_repeated_too(file, recorder, no_pauses):
    watcher = watching(recorder, lambda: [file])
    file.write_text("second")
    recorder.fails_with = MemoryError("no memory")
    asyncio.run(checks(watcher))
    assert recorder.attempts == 3
    assert recorder.failures == ["no memory"]


def test_refused_content_is_not_loaded_again_until_it_changes(file, recorder, no_pauses):
    watcher = watching(recorder, lambda: [file])
    file.write_text("second")
    recorder.fails_with = StartError("not a model")
    asyncio.run(checks(watcher))
    assert recorder.attempts == 1
    file.write_text("third")
    asyncio.run(checks(watcher))
    assert recorder.attempts == 2
    assert recorder.failures == ["not a model", "not a model"]  # one report for each content


def test_repetitions_wait_but_a_further_change_is_loaded_at_once(file, recorder, monkeypatch):
    monkeypatch.setattr("service.watch.POLL_SECONDS", 60.0)
    watcher = watching(recorder, lambda: [file])
    recorder.fails_with = NotReady("half written")
    file.write_text("sec")
    asyncio.run(checks(watcher))
    assert recorder.attempts == 1
    file.write_text("second")
    asyncio.run(checks(watcher))
    assert recorder.attempts == 2


def test_a_change_during_a_reload_is_loaded_by_the_next_check(file, recorder):
    async def write_during_reload() -> None:
        await recorder.reload()
        if recorder.attempts == 1:
            file.write_text("third one")

    watcher = Watcher(lambda: [file], write_during_reload, recorder.on_failure)
    file.write_text("second")
    asyncio.run(checks(watcher))
    assert recorder.attempts == 2


def test_a_link_that_dangles_for_a_while_is_followed_again(file, recorder):
    link = file.parent / "link"
    link.symlink_to(file)
    watcher = watching(recorder, lambda: [link])
    link.unlink()
    link.symlink_to("absent")
    recorder.fails_with = NotReady("no such file")
    asyncio.run(checks(watcher))
    recorder.fails_with = None
    (file.parent / "absent").write_text("second")
    asyncio.run(checks(watcher))
    assert recorder.failures == ["no such file"]
    assert recorder.attempts == 2


def test_a_folder_that_is_removed_and_created_again_is_loaded(tmp_path, recorder):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("first")
    watcher = watching(recorder, lambda: [folder / "file"])
    folder.rename(tmp_path / "old")
    recorder.fails_with = NotReady("no such folder")
    asyncio.run(checks(watcher))
    recorder.fails_with = None
    folder.mkdir()
    (folder / "file").write_text("second")
    asyncio.run(checks(watcher))
    assert recorder.attempts == 2


def test_a_file_that_starts_to_matter_later_is_watched(file, recorder):
    later = file.parent / "later"
    paths = [file]
    watcher = watching(recorder, lambda: paths)
    paths.append(later)
    asyncio.run(checks(watcher))
    assert recorder.attempts == 1
    later.write_text("now")
    asyncio.run(checks(watcher))
    assert recorder.attempts == 2


def test_a_forced_reload_needs_no_change_and_always_reports_its_failure(file, recorder):
    async def test() -> None:
        watcher = watching(recorder, lambda: [file])
        assert await watcher.force()
        recorder.fails_with = StartError("not a model")
        assert not await watcher.force()
        assert not await watcher.force()
        assert recorder.failures == ["not a model", "not a model"]

    asyncio.run(test())


def test_polling_continues_after_a_defect(file, recorder, monkeypatch, caplog):
    monkeypatch.setattr("service.watch.POLL_SECONDS", 0.01)
    calls = 0

    def paths() -> list[Path]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("a defect")
        return [file]

    async def test() -> None:
        watcher = watching(recorder, paths)
        polling = asyncio.create_task(watcher.run())
        file.write_text("second")
        async with asyncio.timeout(10):
            while not recorder.attempts:
                await asyncio.sleep(0.01)
        polling.cancel()

    asyncio.run(test())
    assert "a defect" in caplog.text
