"""The command `cifar-classify`, in its form `python -m service.client`."""

import csv
import fcntl
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import DEFAULT_SIGINT, REPOSITORY, prepared
from tests.service.client.scripted import Scripted, serve
from tests.service.conftest import until
from tests.service.exports import CLASSES, expected, pictures

SAMPLES = REPOSITORY / "samples"


def command(*arguments: object, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service.client", *map(str, arguments)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip


def in_shell(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command with a redirection of its streams, such as `2>&-`."""
    words = [sys.executable, "-m", "service.client", *map(str, arguments)]
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *words], cwd=REPOSITORY, capture_output=True, text=True
    )


def rows_of(done: subprocess.CompletedProcess[str]) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with sub-folders, one damaged image, and one file that is no image."""
    for number, image in enumerate(pictures(6)):
        place = tmp_path / "pictures" / ("a", "a/deep", "b")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    (tmp_path / "pictures/b/damaged.JPG").write_bytes(b"no image")
    (tmp_path / "pictures/notes.txt").write_text("not an image")
    return tmp_path / "pictures"


def test_the_command_prints_a_table_with_bars(server, folder):
    done = command("--server", server.target, SAMPLES / "cat.jpg", folder / "a/0.png")
    assert done.returncode == 0
    assert "cat.jpg" in done.stdout
    assert "0.png" in done.stdout
    assert "━" in done.stdout
    assert "model linear-0" in done.stdout
    assert done.stderr == ""


def test_the_command_prints_json_and_its_exit_code_says_that_an_image_was_unreadable(server):
    done = command("--server", server.target, "--json", "--top-k", "1", SAMPLES / "cat.jpg", REPOSITORY / "LICENSE")
    assert done.returncode == 1
    good, bad = rows_of(done)
    assert len(good["classes"]) == 1
    assert set(good["classes"][0]) == {"name", "index", "probability"}
    assert good["error"] is None
    assert "its header is damaged" in bad["error"]
    assert done.stderr == "images that could not be read: 1 of 2\n"


def test_a_folder_is_searched_recursively_for_files_with_the_suffix_of_an_image(server, folder):
    done = command("--server", server.target, "--json", folder)
    rows = rows_of(done)
    assert [Path(row["image"]).relative_to(folder).as_posix() for row in rows] == [
        "a/0.png", "a/3.png", "a/deep/1.png", "a/deep/4.png", "b/2.png", "b/5.png", "b/damaged.JPG",
    ]  # fmt: skip
    table = expected(0, pictures(6))
    for row, number in zip(rows[:-1], [0, 3, 1, 4, 2, 5], strict=True):
        assert row["classes"][0]["name"] == CLASSES[table[number].argmax()]
    assert "its header is damaged" in rows[-1]["error"]
    assert done.returncode == 1
    assert done.stderr == (
        "images that could not be read: 1 of 7; files that were left out because they have no suffix of an image: 1\n"
    )


def test_a_pattern_in_quotes_is_expanded_also_over_subfolders(server, folder):
    done = command("--server", server.target, "--json", "pictures/**/[0-3].png", "pictures/b*", folder=folder.parent)
    assert [row["image"] for row in rows_of(done)] == [
        "pictures/a/0.png", "pictures/a/3.png", "pictures/a/deep/1.png", "pictures/b/2.png", "pictures/b*",
    ]  # fmt: skip
    assert rows_of(done)[-1]["error"] == "no file matches this pattern"  # pictures/b is a folder
    assert done.returncode == 1


def test_csv_has_one_line_per_image_with_the_columns_of_the_first_line(server, folder):
    done = command("--server", server.target, "--csv", "--top-k", "2", folder)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert list(rows[0]) == [
        "image", "class_1", "probability_1", "class_2", "probability_2", "error", "model_version",
    ]  # fmt: skip
    assert len(rows) == 7
    best = expected(0, pictures(1))[0]
    assert (rows[0]["class_1"], rows[0]["model_version"]) == (CLASSES[best.argmax()], "linear-0")
    assert float(rows[0]["probability_1"]) == pytest.approx(best.max(), abs=1e-5)
    assert (rows[-1]["class_1"], rows[-1]["model_version"]) == ("", "linear-0")
    assert "its header is damaged" in rows[-1]["error"]


def test_csv_ends_with_an_error_if_an_answer_has_more_classes_than_the_first_line(folder):
    # The model that this server names has no classes, and its answers have ten: as if it was replaced in between.
    servicer = Scripted()
    servicer.limits.max_image_bytes = 10_000
    with serve(servicer) as target:
        done = command("--server", target, "--csv", "--top-k", "0", folder / "a/0.png")
    assert done.stdout == "image,error,model_version\n"
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the answer for {folder}/a/0.png has 10 classes")
    assert "replaced by one with more classes; run the command again" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_standard_output_there_is_one_line_of_error(server):
    done = in_shell(">&-", "--server", server.target, SAMPLES / "cat.jpg")
    assert done.returncode == 2
    assert done.stderr == "error: standard output is closed, but the rows must be written to it; redirect it\n"


@pytest.mark.parametrize("image", [SAMPLES / "cat.jpg", REPOSITORY / "LICENSE"])
def test_without_a_standard_error_the_rows_are_written_and_nothing_else(server, image):
    done = in_shell("2>&-", "--server", server.target, "--json", image)
    assert [row["image"] for row in rows_of(done)] == [str(image)]
    assert done.returncode == (0 if image.suffix else 1)


def test_each_file_that_cannot_be_read_costs_only_its_own_row(server, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "large.png").write_bytes(bytes(8_000_001))
    (tmp_path / "link.png").symlink_to("nowhere")
    names = ["absent.png", "pipe.png", "empty", "large.png", "link.png"]
    done = command("--server", server.target, "--json", *names, SAMPLES / "cat.jpg", folder=tmp_path)
    assert [(row["image"], row["error"]) for row in rows_of(done)] == [
        ("absent.png", "No such file or directory"),
        ("pipe.png", "it is not a regular file"),
        ("empty", "the folder holds no file with the suffix of an image"),
        ("large.png", "the file has 8,000,001 bytes; the server accepts images of at most 8,000,000 bytes"),
        ("link.png", "No such file or directory"),
        (str(SAMPLES / "cat.jpg"), None),
    ]
    assert done.returncode == 1
    assert done.stderr == "images that could not be read: 5 of 6\n"


def test_a_request_that_the_server_cannot_answer_costs_only_the_image_at_fault(folder):
    servicer = Scripted()
    servicer.limits.max_image_bytes = 10_000
    servicer.poison = (folder / "a/3.png").read_bytes()
    with serve(servicer) as target:
        done = command("--server", target, "--json", "--top-k", "1", *[folder] * 5)
    assert {Path(row["image"]).name for row in rows_of(done) if row["error"]} == {"3.png"}
    assert len(rows_of(done)) == 35
    assert max(servicer.calls) > 1  # images did share requests
    assert done.returncode == 1


def test_several_tables_are_printed_for_many_images_and_every_image_is_in_one(server, tmp_path):
    for number in range(230):
        Image.fromarray(pictures(1)[0]).save(tmp_path / f"{number:03}.png")
    done = command("--server", server.target, "--top-k", "1", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model linear-0") == 2
    assert all(f"{number:03}.png" in done.stdout for number in range(230))


def test_progress_is_shown_on_the_terminal_and_not_in_the_output(server, folder):
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "service.client", "--server", server.target, "--json", str(folder)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=other_end, text=True, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(other_end)
    out, _ = process.communicate(timeout=60)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    os.close(terminal)
    assert len([json.loads(line) for line in out.splitlines()]) == 7
    assert b"classifying" in shown
    assert b"7/7" in shown


def test_the_command_ends_without_a_traceback_if_nobody_reads_its_output(server):
    process = subprocess.Popen(
        [sys.executable, "-m", "service.client", "--server", server.target, "--csv", str(SAMPLES)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, b"")


def test_names_and_errors_that_look_like_markup_are_printed_as_they_are(server, tmp_path):
    file = tmp_path / "[red]x[b].png"
    file.write_bytes(b"[/b] no image")
    done = command("--server", server.target, file)
    assert done.returncode == 1, done.stderr
    assert "[red]x[b].png" in done.stdout
    assert "[/b]" in done.stdout


@pytest.mark.parametrize("form", [[], ["--csv"], ["--json"]])
def test_a_file_name_need_not_be_valid_text(server, tmp_path, form):
    shutil.copy(SAMPLES / "cat.jpg", os.fsencode(tmp_path) + b"/\xff.jpg")
    done = command("--server", server.target, *form, tmp_path)
    assert done.returncode == 0, done.stderr
    assert r"\udcff.jpg" in done.stdout


def test_a_file_name_cannot_control_the_terminal(server, tmp_path):
    shutil.copy(SAMPLES / "cat.jpg", tmp_path / "\x1b[31mred.jpg")
    done = command("--server", server.target, tmp_path)
    assert r"\x1b[31mred.jpg" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeout", "1"], "UNAVAILABLE"),
        (["--top-k", "-1"], "top_k is -1; it must be the number of classes"),
        (["--key", "key.pem"], "key is given without certificate"),
        (["--token-file", "absent"], "No such file or directory: 'absent'"),
        (["--ca", "LICENSE"], "LICENSE is not a PEM file"),
        (["--timeout", "nan"], "--timeout is nan, but must be above 0"),
        (["--timeout", "inf"], "--timeout is inf, but must be above 0 and at most 2,147,483 seconds"),
        (["--timeout", "0"], "--timeout is 0, but must be above 0"),
        (["--timeout", "-1"], "--timeout is -1, but must be above 0"),
        (["--server", "127.0.0.1:99999"], "the port in '127.0.0.1:99999' is '99999', but must be a number"),
        (["--server", "127.0.0.1:-1"], "the port in '127.0.0.1:-1' is '-1', but must be a number from 1 to 65535"),
        (["--server", "127.0.0.1:1, 127.0.0.2:65536"], "the port in '127.0.0.2:65536' is '65536'"),
        (["--server", "dns:///localhost:65536"], "the port in 'dns:///localhost:65536' is '65536'"),
        (["--server="], "the address of the server is empty: write HOST:PORT"),
    ],
)
def test_what_went_wrong_is_one_line(arguments, message):
    done = command("--server", "127.0.0.1:1", *arguments, SAMPLES / "cat.jpg")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("geheimnisträger".encode(), "the first token has characters that cannot be sent"),
        (b"geheim\x07nis", "the first token has characters that cannot be sent"),
        (b"geheim\xff", "is not UTF-8 text"),
    ],
)
def test_a_token_that_cannot_be_sent_is_one_line_with_the_name_of_its_file(server, tmp_path, content, message):
    (tmp_path / "tokens").write_bytes(content)
    done = command("--server", server.target, "--token-file", tmp_path / "tokens", SAMPLES / "cat.jpg")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/tokens")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "geheim" not in done.stderr


@pytest.fixture
def many(tmp_path) -> Path:
    """A folder with 400 images, for which JSON takes more than a pipe holds."""
    folder = tmp_path / "many"
    folder.mkdir()
    Image.fromarray(pictures(1)[0]).save(folder / "000.png")
    for number in range(1, 400):
        (folder / f"{number:03}.png").hardlink_to(folder / "000.png")
    return folder


def started(target: str, folder: Path, *options: str, **streams: int) -> "subprocess.Popen[bytes]":
    words = [
        sys.executable,
        "-m",
        "service.client",
        "--server",
        target,
        "--json",
        "--top-k",
        "0",
        *options,
        str(folder),
    ]
    return subprocess.Popen(
        prepared(DEFAULT_SIGINT, words),
        cwd=REPOSITORY,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams,
    )


def test_no_row_is_lost_while_the_reader_pauses_for_longer_than_the_timeout_of_an_image(server, many):
    process = started(server.target, many, "--timeout", "2")
    until(lambda: _is_full(process.stdout))
    time.sleep(2.5)
    rows, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    assert len(rows.splitlines()) == 400


@pytest.mark.parametrize("answered", [False, True])
def test_a_command_that_waits_for_its_reader_can_be_interrupted(server, many, answered):
    for image in sorted(many.iterdir())[150 if answered else 400 :]:  # then all rows are in the queue
        image.unlink()
    process = started(server.target, many)
    until(lambda: _is_full(process.stdout))
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr.read() == b"interrupted\n"
    process.stdout.close()


def _is_full(pipe: object) -> bool:
    """Whether nothing more fits into a pipe, for a while."""
    sizes = set()
    for _ in range(5):
        sizes.add(int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder))
        time.sleep(0.1)
    return len(sizes) == 1 and sizes.pop() > 50_000


def test_no_row_is_lost_if_standard_output_does_not_block(server, many):
    read, write = os.pipe()
    os.set_blocking(write, False)
    process = started(server.target, many, stdout=write)
    os.close(write)
    with os.fdopen(read, "rb") as rows:
        until(lambda: _is_full(rows))
        lines = rows.read().splitlines()
    assert process.wait(20) == 0
    assert len(lines) == 400


def test_a_name_with_any_end_of_line_is_one_value_of_the_csv(server, tmp_path):
    for name in ("cr\rname.jpg", "lf\nname.jpg", "crlf\r\nname.jpg"):
        shutil.copy(SAMPLES / "cat.jpg", tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-m", "service.client", "--server", server.target, "--csv", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, check=True,
    )  # fmt: skip
    rows = list(csv.reader(io.StringIO(done.stdout.decode(), newline="")))
    assert [Path(row[0]).name for row in rows] == ["image", "cr\rname.jpg", "crlf\r\nname.jpg", "lf\nname.jpg"]
    assert {len(row) for row in rows} == {len(rows[0])}


def test_messages_that_nobody_reads_change_no_exit_code(server, folder):
    assert in_shell("2>/dev/full", "--server", server.target, "--json", folder).returncode == 1  # one is damaged
    assert in_shell("2>/dev/full", "--server", server.target, "--json", folder / "a").returncode == 0
    assert in_shell("2>/dev/full", "--server", "nowhere", folder).returncode == 2
