import resource
import subprocess
import sys

import pytest

from cifar_core.files import FileWriteError, atomic_write, to_json


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
