"""The command `python -m service.client`."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

SAMPLES = REPOSITORY / "samples"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service.client", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_the_command_prints_a_table_with_bars(server):
    done = command("--server", server.target, SAMPLES / "cat.jpg", SAMPLES / "ship.png")
    assert done.returncode == 0
    assert "cat.jpg" in done.stdout
    assert "ship.png" in done.stdout
    assert "━" in done.stdout
    assert "model linear-0" in done.stdout


def test_the_command_prints_json_and_its_exit_code_says_that_an_image_was_unreadable(server):
    done = command("--server", server.target, "--json", "--top-k", "1", SAMPLES / "cat.jpg", REPOSITORY / "LICENSE")
    assert done.returncode == 1
    good, bad = (json.loads(line) for line in done.stdout.splitlines())
    assert len(good["classes"]) == 1
    assert set(good["classes"][0]) == {"name", "index", "probability"}
    assert good["error"] is None
    assert "its header is damaged" in bad["error"]


def test_names_and_errors_that_look_like_markup_are_printed_as_they_are(server, tmp_path):
    file = tmp_path / "[red]x[b].png"
    file.write_bytes(b"[/b] no image")
    done = command("--server", server.target, file)
    assert done.returncode == 1, done.stderr
    assert "[red]x[b].png" in done.stdout
    assert "[/b]" in done.stdout


def test_files_that_cannot_be_read_are_named_before_the_server_is_asked(tmp_path):
    done = command("absent.png", SAMPLES / "cat.jpg", tmp_path, "missing.jpg", "--server", "127.0.0.1:1")
    assert done.returncode == 2
    assert done.stderr == (
        "error: these images cannot be read: absent.png: No such file or directory; "
        f"{tmp_path}: Is a directory; missing.jpg: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeout", "1"], "UNAVAILABLE"),
        (["--top-k", "-1"], "top_k is -1; it must be the number of classes"),
        (["--key", "key.pem"], "key is given without certificate"),
        (["--token-file", "absent"], "No such file or directory: 'absent'"),
        (["--ca", "LICENSE"], "LICENSE is not a PEM file"),
    ],
)
def test_what_went_wrong_is_one_line(arguments, message):
    done = command("--server", "127.0.0.1:1", *arguments, SAMPLES / "cat.jpg")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
