"""Which files a name on the command line stands for."""

import pytest
from PIL import Image

from cifar_core.images import FORMATS
from service.client.files import SUFFIXES, Selection, read_image


def test_the_suffixes_are_those_of_the_formats_that_the_server_reads():
    assert {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS} == SUFFIXES


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
