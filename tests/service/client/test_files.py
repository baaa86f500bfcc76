"""Which files a name on the command line stands for."""

import os
import stat
import threading
from types import SimpleNamespace

import pytest
from PIL import Image

from cifar_core.images import FORMATS
from cifar_core.pixels import EXTENSIONS
from service.client import files
from service.client.files import Selection, read_image


def test_the_extensions_are_those_of_the_formats_that_the_server_reads():
    assert {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS} == set(EXTENSIONS)


def test_a_name_that_exists_is_no_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("[a].png", "a.png"):
        (tmp_path / name).touch()
    assert [str(found.path) for found in Selection(["[a].png"])] == ["[a].png"]
    assert [str(found.path) for found in Selection(["[a-b].png"])] == ["a.png"]


def test_links_to_folders_inside_a_folder_are_not_followed(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/cat.jpg").touch()
    (tmp_path / "pictures/loop").symlink_to(tmp_path / "pictures")
    assert [found.label for found in Selection([str(tmp_path / "pictures")])] == ["cat.jpg"]
    assert [found.label for found in Selection([str(tmp_path / "pictures/loop")])] == ["cat.jpg"]


def paths_of(pattern: str) -> list[str]:
    return [str(found.path) for found in Selection([pattern])]


@pytest.fixture
def looped(tmp_path, monkeypatch):
    """The current folder, with links that lead back to it from below."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g/sub/deep").mkdir(parents=True)
    (tmp_path / "g/.hidden").mkdir()
    for name in ("g/cat.jpg", "g/.cat.jpg", "g/sub/b[1].jpg", "g/sub/deep/a.jpg", "g/.hidden/x.jpg"):
        (tmp_path / name).touch()
    for name in ("up", "again"):
        (tmp_path / "g/sub" / name).symlink_to("..")
    (tmp_path / "g/linked.jpg").symlink_to("cat.jpg")


@pytest.mark.timeout(20)
@pytest.mark.usefixtures("looped")
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("g/**/*.jpg", ["g/cat.jpg", "g/linked.jpg", "g/sub/b[1].jpg", "g/sub/deep/a.jpg"]),
        ("**/a.jpg", ["g/sub/deep/a.jpg"]),
        ("g/**", ["g/cat.jpg", "g/linked.jpg", "g/sub/b[1].jpg", "g/sub/deep/a.jpg"]),
        ("**/sub/**/*.jpg", ["g/sub/b[1].jpg", "g/sub/deep/a.jpg"]),
        ("g/**/**/cat.jpg", ["g/cat.jpg"]),
        ("g/**/.*.jpg", ["g/.cat.jpg"]),
        ("g/.hidden/**/*.jpg", ["g/.hidden/x.jpg"]),
        ("*/**/deep/*", ["g/sub/deep/a.jpg"]),
        ("./**//a.jpg", ["g/sub/deep/a.jpg"]),
        ("g/c**.jpg", ["g/cat.jpg"]),
        ("g/sub/up/*.jpg", ["g/sub/up/cat.jpg", "g/sub/up/linked.jpg"]),
        ("g/sub/up/**/a.jpg", ["g/sub/up/sub/deep/a.jpg"]),
    ],
)
def test_any_folders_in_a_pattern_are_found_without_following_links(pattern, expected):
    assert paths_of(pattern) == expected


@pytest.mark.usefixtures("looped")
def test_a_pattern_may_begin_at_the_root_and_may_match_nothing(tmp_path):
    assert paths_of(f"{tmp_path}/**/a.jpg") == [f"{tmp_path}/g/sub/deep/a.jpg"]
    for pattern in ("g/**/", "g/**/*.png", "absent/**/*.jpg"):
        assert [found.problem for found in Selection([pattern])] == ["no file matches this pattern"]


def test_a_second_iteration_counts_the_ignored_files_anew(tmp_path):
    (tmp_path / "notes.txt").touch()
    selection = Selection([str(tmp_path)])
    for _ in range(2):
        assert [found.problem for found in selection] == ["the folder holds no file with the suffix of an image"]
        assert selection.ignored == 1


def test_a_file_of_exactly_the_limit_is_read(tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(bytes(1000))
    assert read_image(file, 1000) == bytes(1000)
    with pytest.raises(OSError, match="at most 999 bytes"):
        read_image(file, 999)


def test_a_file_that_calls_itself_regular_and_empty_is_not_waited_for(tmp_path, monkeypatch):
    """Such as /proc/kmsg. Here it is a pipe whose other end stays open."""
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)
    os.write(writer, b"log")
    closing = threading.Timer(5.0, os.close, [writer])  # ends the wait if there is one
    closing.start()
    monkeypatch.setattr(files, "stat", SimpleNamespace(S_ISREG=stat.S_ISFIFO))
    assert read_image(pipe, 1000) == b""
    closing.cancel()
    os.close(writer)
