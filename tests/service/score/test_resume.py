import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.score.errors import ScoreError
from service.score.output import OutputFolder
from tests.conftest import DEFAULT_SIGINT, prepared
from tests.service import exports
from tests.service.score.pictures import command, environment, packed, rows, score, write_images

SMALL_PARTS = ("--rows-per-part", 20, "--batch-size", 8)


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "in", exports.pictures(60))
    return tmp_path / "in"


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_rows_of_an_uninterrupted_one(tmp_path, linear, kind):
    images = exports.pictures(3000)
    if kind == "folder":
        write_images(tmp_path / "in", images)
    else:
        (tmp_path / "in").mkdir()
        pq.write_table(pa.table({"image": packed(images).cast(pa.binary(3072))}), tmp_path / "in/a.parquet")
    arguments = ("--rows-per-part", 50, "--batch-size", 8, "--threads", 1)
    assert score(tmp_path / "in", tmp_path / "whole", *arguments, model=linear) == 0
    output = tmp_path / "out"
    for parts in (1, 10, 25):
        process = subprocess.Popen(
            command(tmp_path / "in", output, *arguments, "--resume", model=linear), env=environment(),
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while len(list(output.glob("part-*"))) < parts and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert len(list(output.glob("part-*"))) < 60
    (output / ".part-000059.parquet.elsewhere-1.partial").write_bytes(b"left by a killed run")
    before = {file: file.stat().st_mtime_ns for file in output.glob("part-*")}
    assert score(tmp_path / "in", output, *arguments, "--resume", model=linear) == 0
    assert rows(output).equals(rows(tmp_path / "whole"))
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert not list(output.glob(".*partial"))


def test_a_finished_run_is_left_as_it_is_and_reports_its_errors_again(tmp_path, folder, linear, capsys):
    (folder / "bad.png").write_bytes(b"")
    output = tmp_path / "out"
    assert score(folder, output, model=linear) == 1
    before = state(output)
    assert {file.name for file in before} >= {"out", ".lock", "_inputs.parquet", "_score.json", "part-000000.parquet"}
    assert score(folder, output, "--resume", model=linear) == 1
    assert "1 images could not be classified" in capsys.readouterr().out
    assert state(output) == before
    assert OutputFolder(output).description().failed_rows == 1


def test_an_existing_output_is_continued_only_with_resume(tmp_path, folder, linear):
    assert score(folder, tmp_path / "out", "--resume", model=linear) == 0
    with pytest.raises(ScoreError, match="continue it with --resume"):
        score(folder, tmp_path / "out", model=linear)


def test_a_run_is_not_continued_with_another_model_option_or_kind_of_input(tmp_path, folder, linear):
    assert score(folder, tmp_path / "out", model=linear) == 0
    other = exports.write_export(tmp_path / "other", exports.graph(1), version="linear-1")
    with pytest.raises(ScoreError, match="started with model version 'linear-0', not 'linear-1'"):
        score(folder, tmp_path / "out", "--resume", model=other)
    with pytest.raises(ScoreError, match="started with options batch_size 64, not 32"):
        score(folder, tmp_path / "out", "--resume", "--batch-size", 32, model=linear)
    (tmp_path / "list").write_text("")
    with pytest.raises(ScoreError, match="started with input kind 'folder', not 'list'"):
        score(tmp_path / "list", tmp_path / "out", "--resume", model=linear)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "00007.png").unlink(),
            "59 files now, 60 then; where 00007.png was, there is 00008.png",
        ),
        (lambda folder: shutil.copy(folder / "00007.png", folder / "00007a.png"), "61 files now, 60 then"),
        (lambda folder: (folder / "00007.png").write_bytes(b"another"), "00007.png was changed"),
        (lambda folder: (folder / "00059.png").unlink(), "where 00059.png was, there is the end now"),
    ],
)
def test_a_run_is_not_continued_with_another_input_and_the_difference_is_named(
    tmp_path, folder, linear, change, message
):
    assert score(folder, tmp_path / "out", *SMALL_PARTS, model=linear) == 0
    change(folder)
    with pytest.raises(ScoreError, match=message):
        score(folder, tmp_path / "out", *SMALL_PARTS, "--resume", model=linear)


def test_a_run_is_not_continued_with_another_parquet_file(tmp_path, linear):
    source = tmp_path / "in"
    source.mkdir()
    for name in "ab":
        pq.write_table(pa.table({"image": packed(exports.pictures(5))}), source / f"{name}.parquet")
    options = ("--content", "pixels")
    assert score(source, tmp_path / "out", *options, model=linear) == 0
    pq.write_table(pa.table({"image": packed(exports.pictures(6))}), source / "b.parquet")
    with pytest.raises(ScoreError, match=r"b\.parquet was changed"):
        score(source, tmp_path / "out", *options, "--resume", model=linear)
    (source / "b.parquet").rename(source / "c.parquet")
    with pytest.raises(ScoreError, match=r"b\.parquet is missing"):
        score(source, tmp_path / "out", *options, "--resume", model=linear)


def test_two_runs_do_not_write_to_one_folder(tmp_path, folder, linear):
    with OutputFolder(tmp_path / "out").lock(), pytest.raises(ScoreError, match="another run writes to this folder"):
        score(folder, tmp_path / "out", model=linear)


def test_a_full_disk_ends_the_run_with_a_message_and_it_can_be_continued(tmp_path, linear):
    write_images(tmp_path / "in", exports.pictures(300))
    arguments = (tmp_path / "in", tmp_path / "out", "--rows-per-part", 150)
    done = subprocess.run(
        prepared("resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))", command(*arguments, model=linear)),
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "part-00000" in done.stderr
    assert "continue with --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*part-*"))
    assert score(*arguments, "--resume", model=linear) == 0


def test_interrupting_a_run_ends_all_of_its_processes(tmp_path, linear):
    write_images(tmp_path / "in", exports.pictures(3000))
    process = subprocess.Popen(
        prepared(DEFAULT_SIGINT, command(tmp_path / "in", tmp_path / "out", "--rows-per-part", 10, model=linear)),
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not list((tmp_path / "out").glob("part-*")):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    end = time.monotonic() + 30
    while any(session_of(pid) == process.pid for pid in psutil.pids()):
        assert time.monotonic() < end, "a process of the run is still there"
        time.sleep(0.05)


def state(folder):
    """The folder and its files: inode, time of the last change of the content and of the file."""
    return {
        file: (found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
        for file in (folder, *folder.iterdir())
        for found in [file.stat()]
    }


def session_of(pid):
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[3])


def test_a_run_with_a_parquet_file_without_rows_can_be_continued(tmp_path, linear):
    source = tmp_path / "in"
    source.mkdir()
    for name, count in (("a", 0), ("b", 5)):
        images = packed(exports.pictures(count)) if count else packed(exports.pictures(1)[:0])
        pq.write_table(pa.table({"image": images}), source / f"{name}.parquet")
    for options in ((), ("--resume",)):
        assert score(source, tmp_path / "out", "--content", "pixels", *options, model=linear) == 0
