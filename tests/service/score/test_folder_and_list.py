import os
import shutil
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from cifar_core.pixels import EXTENSIONS, ImageRejected
from service.score import image_files, scorer
from service.score.errors import ScoreError
from tests.cifar_core.image_corpus import gradient, saved
from tests.service import exports
from tests.service.core import hostile_images
from tests.service.score.pictures import assert_classified, command, environment, rows, score, write_images


def test_every_image_of_a_folder_gets_a_row_in_the_order_of_the_names(tmp_path, linear):
    images = exports.pictures(70)
    names = write_images(tmp_path / "in", images, [f"{'ab'[row % 2]}/{row // 2:03d}.PNG" for row in range(70)])
    (tmp_path / "in/notes.txt").write_text("not an image")
    assert score(tmp_path / "in", tmp_path / "out", "--batch-size", 16, "--rows-per-part", 40, model=linear) == 0
    table = rows(tmp_path / "out")
    assert table["path"].to_pylist() == sorted(names)
    assert_classified(table, images[np.argsort(names)])
    assert set(table["model_version"].to_pylist()) == {"linear-0"}
    assert table.schema.field("probabilities").type == pa.list_(pa.float32())
    assert sorted(file.name for file in (tmp_path / "out").glob("part-*")) == [
        "part-000000.parquet",
        "part-000001.parquet",
    ]


def test_a_folder_is_searched_for_the_same_files_as_by_the_client_and_the_others_are_counted(tmp_path, linear, capsys):
    images = exports.pictures(len(EXTENSIONS))
    write_images(tmp_path / "png", images)
    (tmp_path / "in/deep").mkdir(parents=True)
    for file, suffix in zip(sorted((tmp_path / "png").iterdir()), EXTENSIONS, strict=True):
        shutil.copy(file, tmp_path / f"in/deep/image{suffix.upper()}")
    for name in ("a.tiff", "deep/notes.txt", "deep/z", "deep/zz.parquet"):
        (tmp_path / "in" / name).write_bytes(b"")
    for options in ((), ("--resume",)):
        assert score(tmp_path / "in", tmp_path / "out", *options, model=linear) == 0
        said = "4 files are left out because of their extensions: a.tiff, deep/notes.txt, deep/z, …"
        assert said in capsys.readouterr().out.splitlines()
    table = rows(tmp_path / "out")
    assert table["path"].to_pylist() == sorted(f"deep/image{suffix.upper()}" for suffix in EXTENSIONS)
    assert_classified(table, images)


def test_without_other_files_nothing_is_said_about_them(tmp_path, linear, capsys):
    write_images(tmp_path / "in", exports.pictures(1))
    assert score(tmp_path / "in", tmp_path / "out", model=linear) == 0
    assert "left out" not in capsys.readouterr().out


def test_an_image_that_cannot_be_read_costs_its_own_row_only(tmp_path, linear):
    images = exports.pictures(6)
    folder = tmp_path / "in"
    names = write_images(folder, images)
    bad = {
        "cut.png": (folder / names[0]).read_bytes()[:200],
        "empty.png": b"",
        "text.png": b"no image at all",
        "scans.jpg": hostile_images.progressive_jpeg(1000, 500),
        "huge.png": hostile_images.png(100_000, 100_000, 8, 2, b""),
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to("folder.png")
    assert score(folder, tmp_path / "out", model=linear) == 1
    table = rows(tmp_path / "out")
    good = pa.compute.is_in(table["path"], pa.array(names))
    assert_classified(table.filter(good), images)
    errors = dict(
        zip(*table.filter(pa.compute.invert(good)).select(["path", "error"]).to_pydict().values(), strict=True)
    )
    assert errors.keys() == bad.keys() | {"pipe.png", "loop.png", "link.png"}
    assert "0 bytes" in errors["empty.png"]
    assert "not an image" in errors["text.png"]
    assert "500 scans" in errors["scans.jpg"]
    assert "100000 x 100000" in errors["huge.png"]
    assert "not a regular file" in errors["pipe.png"]
    assert "Is a directory" in errors["link.png"]
    assert "levels of symbolic links" in errors["loop.png"]
    bad_rows = table.filter(pa.compute.invert(good))
    assert bad_rows["class"].null_count == bad_rows["probabilities"].null_count == len(errors)


def test_an_image_that_takes_too_long_to_decode_is_rejected_and_the_others_are_not(tmp_path, linear):
    images = exports.pictures(4)
    names = write_images(tmp_path / "in", images)
    (tmp_path / "in/slow.jpg").write_bytes(hostile_images.progressive_jpeg(3000, 60))
    limits = ("--max-decode-seconds", 0.2)
    assert score(tmp_path / "in", tmp_path / "out", *limits, model=linear) == 1
    table = rows(tmp_path / "out")
    assert_classified(table.slice(0, len(names)), images)
    assert "more than 0.2 s of CPU time" in table["error"].to_pylist()[-1]


def test_a_file_larger_than_the_limit_is_not_read(tmp_path, linear):
    write_images(tmp_path / "in", exports.pictures(1))
    with (tmp_path / "in/sparse.png").open("wb") as sparse:
        sparse.truncate(2**40)
    assert score(tmp_path / "in", tmp_path / "out", model=linear) == 1
    assert f"has {2**40} bytes; at most 8000000 are allowed" in rows(tmp_path / "out")["error"].to_pylist()[-1]


def test_a_list_names_files_in_any_order_and_more_than_once(tmp_path, linear, monkeypatch):
    images = exports.pictures(3)
    write_images(tmp_path / "in", images, ["a.png", "b.png", "späte.png"])
    order = ["in/späte.png", str(tmp_path / "in/a.png"), "in/missing.png", "in/späte.png", "in/b.png"]
    (tmp_path / "list.txt").write_text("\n".join(order[:2]) + "\n\n" + "\r\n".join(order[2:]))
    monkeypatch.chdir(tmp_path)
    assert score("list.txt", "out", model=linear) == 1
    table = rows("out")
    assert table["path"].to_pylist() == order
    assert "No such file" in table["error"].to_pylist()[2]
    found = pa.compute.is_null(table["error"])
    assert_classified(table.filter(found), images[[2, 0, 2, 1]])


def test_a_byte_order_mark_is_no_part_of_the_first_path_of_a_list(tmp_path, linear, monkeypatch):
    images = exports.pictures(2)
    names = write_images(tmp_path, images)
    (tmp_path / "list.txt").write_text("\r\n".join(names), encoding="utf-8-sig")
    monkeypatch.chdir(tmp_path)
    assert score("list.txt", "out", model=linear) == 0
    assert rows("out")["path"].to_pylist() == names


def test_a_file_that_calls_itself_regular_and_empty_is_not_read(tmp_path, monkeypatch):
    """Such as /proc/kmsg. Here it is a pipe whose other end stays open."""
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)
    os.write(writer, b"log")
    monkeypatch.setattr(image_files, "stat", SimpleNamespace(S_ISREG=stat.S_ISFIFO))
    assert image_files.read(str(pipe), 1000) == b""
    os.close(writer)


def test_a_folder_in_place_of_a_file_is_not_left_open(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert "Is a directory" in str(image_files.read(str(tmp_path), 1000))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rows-per-part", "99999999999999999999", "less than or equal to 2147483647"),
        ("--rows-per-part", "0", "greater than or equal to 1"),
        ("--batch-size", "99999999999", "less than or equal to 2147483647"),
        ("--max-image-bytes", "99999999999999999999", "less than or equal to 2147483647"),
        ("--max-image-pixels", "0", "greater than or equal to 1"),
        ("--threads", "99999999999", "less than or equal to 1024"),
        ("--decode-processes", "1025", "less than or equal to 1024"),
        ("--max-decode-seconds", "-1", "greater than 0"),
        ("--max-decode-seconds", "0", "greater than 0"),
        ("--max-decode-seconds", "nan", "less than or equal to 2147483.647"),
        ("--max-decode-seconds", "much", "should be a valid number"),
    ],
)
def test_a_limit_that_the_server_would_refuse_is_a_wrong_option(tmp_path, linear, capsys, option, value, message):
    with pytest.raises(SystemExit, match=r"^2$"):
        score(tmp_path, tmp_path / "out", option, value, model=linear)
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: {value}: " in error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_as_in_the_server_0_threads_are_all_cores(tmp_path, linear):
    write_images(tmp_path / "in", exports.pictures(3))
    assert score(tmp_path / "in", tmp_path / "out", "--threads", 0, "--decode-processes", 0, model=linear) == 0


@pytest.mark.parametrize("arguments", [("", "out"), ("in", "")])
def test_an_empty_path_is_not_the_current_folder(linear, capsys, arguments):
    with pytest.raises(SystemExit, match=r"^2$"):
        score(*arguments, model=linear)
    assert "the path is empty; write . for the current folder" in capsys.readouterr().err


def test_a_name_that_is_not_utf8_is_escaped_in_the_output(tmp_path, linear):
    folder = tmp_path / "in"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(saved(gradient(32, 32)))
    assert score(folder, tmp_path / "out", model=linear) == 0
    assert rows(tmp_path / "out")["path"].to_pylist() == ["\\xff.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "out"], "there is no such file or folder"),
        (["/dev/null", "out"], "this is neither a regular file nor a folder"),
        (["empty", "out"], "holds no file with an extension .apng, .bmp"),
        (["blank.txt", "out"], "holds no path"),
        (["in", "in/out"], "the output must not lie in the input"),
        (["in", "used"], "the folder is not empty"),
        (["in/00000.png", "out"], "this is one image; give its folder"),
        (["mixed/a.jfif", "out"], "this is one image; give its folder"),
        (["mixed", "out"], r"holds .parquet files and images \(a.jfif\)"),
        (["in", "out", "--key", "id"], "--key is for Parquet files; in is a folder"),
        (["in", "out", "--variant", "int4"], "there is no variant 'int4'"),
        (["in", "blank.txt"], "cannot be written to"),
        (["in", "out", "--ray", "--device", "cuda"], "leave out --device cuda"),
    ],
)
def test_a_run_that_cannot_start_says_why(tmp_path, linear, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "in", exports.pictures(1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("a.jfif", "b.parquet"):
        (tmp_path / "mixed" / name).write_bytes(b"")
    (tmp_path / "used/thesis.tex").write_text("")
    with pytest.raises(ScoreError, match=message):
        score(*arguments, model=linear)
    assert (tmp_path / "used/thesis.tex").exists()


def test_the_command_prints_an_error_in_one_line(tmp_path, linear):
    done = subprocess.run(
        command(tmp_path / "missing", tmp_path / "out", model=linear), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/missing: there is no such file or folder\n"


def test_an_image_whose_decode_process_failed_is_decoded_again(tmp_path, linear, monkeypatch):
    calls = []

    class Unlucky(scorer.Decoder):
        async def decode(self, files, deadline=None, client=None):
            calls.append(len(files))
            if len(calls) < 3:
                return [ImageRejected("the decode process ended", internal=True) for _ in files]
            return await super().decode(files, deadline, client)

    monkeypatch.setattr(scorer, "Decoder", Unlucky)
    images = exports.pictures(4)
    write_images(tmp_path / "in", images)
    assert score(tmp_path / "in", tmp_path / "out", model=linear) == 0
    assert_classified(rows(tmp_path / "out"), images)
    assert calls == [4, 4, 4]


def test_files_of_a_batch_are_read_in_groups_of_limited_size(tmp_path, linear, monkeypatch):
    read, sizes = scorer._read_all, []

    def recorded(files, max_bytes):
        sizes.append(sum(file.size for file in files))
        return read(files, max_bytes)

    images = exports.pictures(8)
    write_images(tmp_path / "in", images)
    most = max(file.stat().st_size for file in (tmp_path / "in").iterdir())
    monkeypatch.setattr(scorer, "_read_all", recorded)
    monkeypatch.setattr(scorer, "_GROUP_BYTES", 2 * most)
    assert score(tmp_path / "in", tmp_path / "out", "--batch-size", 8, model=linear) == 0
    assert len(sizes) > 2
    assert max(sizes) < 3 * most
