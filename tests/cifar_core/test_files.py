import argparse
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cifar_core.files import FileWriteError, atomic_write, check_output, path_option, to_json, write_output


def test_a_write_that_fails_because_the_disk_is_full_leaves_the_previous_file(tmp_path):
    file = tmp_path / "last.pt"
    file.write_bytes(b"before")
    script = (
        "import resource, pathlib, sys; from cifar_core.files import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "atomic_write(pathlib.Path(sys.argv[1]), bytes(100_000))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=False)
    assert "the existing file is unchanged" in done.stderr
    assert "100,000 bytes cannot be written" in done.stderr
    assert file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_write_replaces_the_file_as_a_whole(tmp_path):
    file = tmp_path / "file"
    atomic_write(file, b"one")
    opened = file.open("rb")
    atomic_write(file, b"another")
    assert file.read_bytes() == b"another"
    assert opened.read() == b"one"  # a reader that has opened the old file reads all of it


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_the_error_for_an_impossible_write_names_the_file_and_no_option_of_any_command(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileWriteError) as caught:
        atomic_write(tmp_path / folder / "x.json", b"{}")
    message = str(caught.value)
    assert str(tmp_path / folder / "x.json") in message
    assert "the file did not exist before" in message
    assert "--" not in message


def test_json_is_indented_keeps_the_order_of_keys_and_is_not_escaped():
    assert to_json({"b": "ä", "a": [1]}).decode() == '{\n  "b": "ä",\n  "a": [\n    1\n  ]\n}\n'


def test_an_option_for_a_path_must_not_be_empty():
    assert path_option("a/b") == Path("a/b")
    with pytest.raises(argparse.ArgumentTypeError, match="it is empty"):
        path_option("")


def test_a_result_is_written_to_the_file_that_a_link_leads_to(tmp_path):
    for target in ("real.json", "missing.json"):
        (tmp_path / "real.json").write_text("before")
        link = tmp_path / f"link to {target}"
        link.symlink_to(target)
        check_output(link)
        write_output(link, b"{}")
        assert link.is_symlink()
        assert (tmp_path / target).read_bytes() == b"{}"


def test_a_result_is_written_into_a_pipe(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    check_output(pipe)  # does not open it, which would end the reader
    write_output(pipe, b"{}")
    reader.join()
    assert read == [b"{}"]
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", ["/dev/fd/1", "link"])
def test_a_result_on_standard_output_follows_what_was_printed(tmp_path, name):
    """Also if standard output is a file. The link is what /dev/stdout is, which a failing test would remove."""
    (tmp_path / "link").symlink_to("/proc/self/fd/1")
    script = (
        "import pathlib, sys; from cifar_core.files import check_output, write_output\n"
        "check_output(pathlib.Path(sys.argv[1])); print('printed', flush=True)\n"
        "write_output(pathlib.Path(sys.argv[1]), b'result'); print('more')"
    )
    command = [sys.executable, "-c", script, str(tmp_path / name)]
    with (tmp_path / "output").open("wb") as output:
        subprocess.run(command, stdout=output, check=True)
    assert (tmp_path / "output").read_bytes() == b"printed\nresultmore\n"
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"printed\nresultmore\n"
    assert (tmp_path / "link").is_symlink()


def test_a_place_for_a_result_that_cannot_be_written_is_refused_beforehand(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "lost").symlink_to("missing/file")
    reader, writer = os.pipe()
    try:
        places = {
            tmp_path / "folder": "it is a folder",
            tmp_path / "link": "it is a folder",
            tmp_path / "lost": "No such file or directory",
            tmp_path / ("x" * 250): "File name too long",
            Path(f"/dev/fd/{reader}"): "Bad file descriptor",
            Path("/dev/fd/999"): "Bad file descriptor",
        }
        for place, reason in places.items():
            with pytest.raises(FileWriteError) as caught:
                check_output(place)
            assert str(caught.value) == f"{place} cannot be written ({reason}); name another file"
    finally:
        os.close(reader)
        os.close(writer)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "link", "lost"}


def test_a_check_leaves_the_file_as_it_is(tmp_path):
    (tmp_path / "file").write_text("before")
    for name in ("file", "new", "folder/new"):
        check_output(tmp_path / name)
    assert (tmp_path / "file").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_a_check_keeps_files_of_similar_names(tmp_path):
    (tmp_path / ".file.checked").write_text("mine")
    check_output(tmp_path / "file")
    assert (tmp_path / ".file.checked").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [".file.checked"]


def test_a_name_is_refused_if_a_name_under_which_it_is_written_would_be_too_long(tmp_path):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") - len("..partial")
    check_output(tmp_path / ("x" * longest))
    write_output(tmp_path / ("x" * longest), b"{}")
    with pytest.raises(FileWriteError, match="File name too long"):
        check_output(tmp_path / ("x" * (longest + 1)))
