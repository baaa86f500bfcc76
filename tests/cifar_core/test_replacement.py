import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_core import replacement
from cifar_core.manifest import read_manifest
from cifar_core.publish import PublishError, check_target, is_intact, publish
from cifar_core.replacement import LeftBehind
from tests.cifar_core.published import NEW, export_of
from tests.cifar_core.runs import contents
from tests.conftest import environment


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folder_and_its_files_keep_their_modes(existing):
    existing.chmod(0o750)
    (existing / "model.onnx").chmod(0o640)
    previous = os.umask(0o077)
    try:
        publish(existing, export_of(fp32=b"3", int8=b"4"))
        publish(existing.with_name("new"), NEW)
    finally:
        os.umask(previous)
    assert (mode(existing), mode(existing / "model.onnx")) == (0o750, 0o640)
    new = existing.with_name("new")
    assert (mode(new), {mode(file) for file in new.iterdir()}) == (0o700, {0o600})


def test_a_new_folder_and_its_files_have_the_mode_of_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        publish(tmp_path / "exported", NEW)
    finally:
        os.umask(previous)
    assert mode(tmp_path / "exported") == 0o750
    assert {mode(file) for file in (tmp_path / "exported").iterdir()} == {0o640}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
def test_the_folder_and_its_files_keep_their_owners(existing):
    os.chown(existing, 1000, 1001)
    os.chown(existing / "model.onnx", 1002, 1003)
    os.chown(existing / "notes.txt", 1004, 1005)
    (existing / "manifest.json").chmod(0o600)
    publish(existing, export_of(fp32=b"3", int8=b"4"))
    owners = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in (existing, *existing.iterdir())}
    assert owners["exported"] == (1000, 1001)
    assert owners["model.onnx"] == (1002, 1003)
    assert owners["notes.txt"] == (1004, 1005)
    assert mode(existing / "manifest.json") == 0o600
    (existing / "model.int8.onnx").unlink()
    publish(existing, export_of(fp32=b"5", int8=b"6"))
    new = (existing / "model.int8.onnx").stat()
    assert (new.st_uid, new.st_gid) == (1000, 1001)  # a file without a predecessor belongs to the owner of the folder


def test_other_files_stay_the_same_files(existing):
    """Not copies: names in other places stay names of them, and a program can go on writing."""
    other_name = existing.parent / "other name"
    other_name.hardlink_to(existing / "notes.txt")
    os.mkfifo(existing / "pipe")
    (existing / "folder").mkdir(mode=0o710)
    (existing / "folder" / "file").write_text("mine")
    numbers = {path.name: path.stat().st_ino for path in existing.iterdir()}
    with (existing / "notes.txt").open("a") as log, (existing / "folder" / "file").open("a") as inner:
        publish(existing, NEW)
        for stream in (log, inner):
            stream.write(", and more")
    assert other_name.read_text() == "mine, and more"
    assert (existing / "folder" / "file").read_text() == "mine, and more"
    assert mode(existing / "folder") == 0o710
    for name in ("notes.txt", "pipe", "folder"):
        assert (existing / name).stat().st_ino == numbers[name]


def test_where_no_file_can_have_two_names_other_files_are_moved(existing, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    number = (existing / "notes.txt").stat().st_ino
    monkeypatch.setattr(os, "link", refuse)
    publish(existing, NEW)
    assert contents(existing) == NEW | {"notes.txt": b"mine"}
    assert (existing / "notes.txt").stat().st_ino == number
    assert [path.name for path in existing.parent.iterdir()] == ["exported"]


def test_files_that_appear_or_change_while_an_export_is_written_are_kept(existing, monkeypatch):
    exchange = replacement._exchange

    def exchange_late(staging, folder):
        (folder / "appeared").write_text("new")
        (folder / "notes.txt").unlink()
        (folder / "notes.txt").write_text("replaced meanwhile")
        exchange(staging, folder)

    monkeypatch.setattr(replacement, "_exchange", exchange_late)
    publish(existing, NEW)
    assert contents(existing) == NEW | {"appeared": b"new", "notes.txt": b"replaced meanwhile"}


def test_a_file_that_exists_twice_after_the_swap_is_left_and_named(existing, monkeypatch):
    exchange = replacement._exchange

    def exchange_between(staging, folder):
        (folder / "state").write_text("before")
        exchange(staging, folder)
        (folder / "state").write_text("after")

    monkeypatch.setattr(replacement, "_exchange", exchange_between)
    with pytest.raises(
        LeftBehind, match=r"holds the new files, but state could not be moved there, and is in (\S+) now"
    ):
        publish(existing, NEW)
    assert contents(existing) == NEW | {"notes.txt": b"mine", "state": b"after"}
    (left,) = replacement.leftovers(existing)
    assert contents(left) == {"state": b"before"}


@pytest.fixture
def no_exchange(monkeypatch):
    """A system without renameat2."""
    monkeypatch.setattr(replacement.ctypes, "CDLL", lambda *_, **__: object())


def interrupt(monkeypatch, number, when, interruption):
    """Lets this call of `Path.rename` be interrupted before or after it renames."""
    rename, calls = Path.rename, []

    def interrupted(path, target):
        calls.append(path)
        if len(calls) == number and when == "before":
            raise interruption
        result = rename(path, target)
        if len(calls) == number:
            raise interruption
        return result

    monkeypatch.setattr(Path, "rename", interrupted)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])  # three exchange the folders, the fourth moves a folder of the user
def test_an_interruption_leaves_the_previous_files_or_the_new_ones(existing, no_exchange, monkeypatch, number, when):
    (existing / "folder").mkdir()
    (existing / "folder" / "file").write_text("mine")
    before = contents_and_folders(existing)
    after = NEW | {"notes.txt": b"mine", "folder/file": b"mine"}
    interrupt(monkeypatch, number, when, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        publish(existing, NEW)
    swapped = number > 2 or (number, when) == (2, "after")
    assert contents_and_folders(existing) == (after if swapped else before)
    assert [path.name for path in existing.parent.iterdir()] == ["exported"]


def test_renames_that_fail_are_undone(existing, no_exchange, monkeypatch):
    before = contents(existing)
    interrupt(monkeypatch, 2, "before", OSError(5, "Input/output error"))
    with pytest.raises(PublishError, match="its content is unchanged"):
        publish(existing, NEW)
    assert contents(existing) == before
    assert [path.name for path in existing.parent.iterdir()] == ["exported"]


def test_a_folder_that_appears_between_the_renames_is_kept_and_the_error_names_the_previous_one(
    existing, no_exchange, monkeypatch
):
    before, rename = contents(existing), Path.rename

    def rename_and_create(path, target):
        rename(path, target)
        if path == existing:
            existing.mkdir()
            (existing / "appeared").write_text("another")
        return target

    monkeypatch.setattr(Path, "rename", rename_and_create)
    with pytest.raises(LeftBehind, match=r"its previous files are in \S+\.aside;"):
        publish(existing, NEW)
    assert contents(existing) == {"appeared": b"another"}
    assert contents(replacement.leftovers(existing)[1]) == before


def test_only_folders_of_exports_that_were_killed_are_named_as_such(existing, caplog):
    for name in (".exported-20240101", ".exported-20240101.aside", ".exported-previous"):
        (existing.with_name(name)).mkdir()
        (existing.with_name(name) / "manifest.json").write_bytes(NEW["manifest.json"])
    publish(existing, NEW)
    assert not replacement.leftovers(existing)
    assert "is left" not in caplog.text


KILLED = """
import os, pathlib, sys
from cifar_core import replacement
from cifar_core.publish import publish
from tests.cifar_core.published import NEW
function = getattr(replacement, sys.argv[2])
def killed(*arguments):
    if sys.argv[3] == "after":
        function(*arguments)
    os.kill(os.getpid(), 9)
setattr(replacement, sys.argv[2], killed)
publish(pathlib.Path(sys.argv[1]), NEW)
"""


@pytest.mark.parametrize(
    ("function", "when"),
    [
        ("_link_others", "after"),
        ("_write", "after"),
        ("_exchange", "before"),
        ("_exchange", "after"),
        ("_move_others", "before"),
    ],
)
def test_a_process_that_is_killed_loses_nothing(existing, function, when, caplog):
    (existing / "folder").mkdir()
    (existing / "folder" / "file").write_text("mine")
    before = contents_and_folders(existing)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(existing), function, when],
        cwd=Path(__file__).parents[2], env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == -9
    (left,) = replacement.leftovers(existing)
    swapped = (function, when) in {("_exchange", "after"), ("_move_others", "before")}
    assert contents_and_folders(left if swapped else existing) == before
    assert is_intact(existing, read_manifest(existing))
    assert (existing / "notes.txt").read_text() == "mine"
    publish(existing, NEW)
    assert f"{left} is left from an export to {existing} that was killed" in caplog.text
    assert (existing / "notes.txt").read_text() == "mine"
    assert (left if swapped else existing).joinpath("folder", "file").read_text() == "mine"


KILLED_BETWEEN = """
import os, pathlib, sys
from cifar_core import replacement
from cifar_core.publish import publish
from tests.cifar_core.published import NEW
replacement.ctypes.CDLL = lambda *_, **__: object()  # a system without renameat2
rename = pathlib.Path.rename
def killed(path, target):
    rename(path, target)
    os.kill(os.getpid(), 9)
pathlib.Path.rename = killed
publish(pathlib.Path(sys.argv[1]), NEW)
"""


def test_a_process_that_is_killed_between_two_renames_leaves_all_files_in_folders_that_the_next_one_names(
    existing, caplog
):
    (existing / "folder").mkdir()
    (existing / "folder" / "file").write_text("mine")
    before = contents_and_folders(existing)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BETWEEN, str(existing)],
        cwd=Path(__file__).parents[2], env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == -9
    new, aside = replacement.leftovers(existing)
    assert not existing.exists()
    assert contents_and_folders(aside) == before
    assert contents(new) == NEW | {"notes.txt": b"mine"}
    publish(existing, NEW)
    for left in (new, aside):
        assert f"{left} is left from an export to {existing} that was killed" in caplog.text


def contents_and_folders(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_exports_into_one_folder_at_the_same_time_keep_all_other_files(existing):
    others = {f"file {number}": str(number).encode() for number in range(20)}
    for name, content in others.items():
        (existing / name).write_bytes(content)
    (existing / "folder").mkdir()
    (existing / "folder" / "file").write_text("mine")
    script = (
        "import pathlib, sys\n"
        "from cifar_core.publish import publish; from tests.cifar_core.published import export_of\n"
        "for number in range(40): publish(pathlib.Path(sys.argv[1]), export_of(fp32=sys.argv[2].encode() * 1000))"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(existing), name], cwd=Path(__file__).parents[2], stderr=-1)
        for name in "abc"
    ]
    errors = [writer.communicate()[1].decode() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], errors
    kept = contents_and_folders(existing)
    assert {name: kept[name] for name in others} == others
    assert kept["folder/file"] == b"mine"
    assert is_intact(existing, read_manifest(existing))
    assert not replacement.leftovers(existing)


def test_of_two_first_exports_at_the_same_time_the_later_one_stays(tmp_path, monkeypatch):
    target, sync_folder = tmp_path / "exported", replacement.sync_folder

    def sync_late(folder):
        if folder != tmp_path and not target.exists():
            monkeypatch.undo()
            publish(target, export_of(fp32=b"1", int8=b"2"))
            (target / "notes.txt").write_text("mine")
        sync_folder(folder)

    monkeypatch.setattr(replacement, "sync_folder", sync_late)
    publish(target, export_of(fp32=b"3", int8=b"4"))
    assert contents(target) == export_of(fp32=b"3", int8=b"4") | {"notes.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_a_file_without_write_permission_is_replaced_as_by_mv_and_keeps_its_mode(existing):
    (existing / "model.onnx").chmod(0o444)
    publish(existing, NEW)
    assert (existing / "model.onnx").read_bytes() == b"3"
    assert mode(existing / "model.onnx") == 0o444


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(existing):
    existing.chmod(0o555)
    try:
        with pytest.raises(PublishError, match="is not writable"):
            check_target(existing)
    finally:
        existing.chmod(0o755)


def test_a_target_on_another_file_system_than_the_temporary_files_is_written(existing):
    place = Path("/dev/shm")  # noqa: S108
    if not os.access(place, os.W_OK) or place.stat().st_dev == existing.stat().st_dev:
        pytest.skip("needs a second file system")
    target = place / f"export-{os.getpid()}" / "exported"
    try:
        publish(target, NEW)
        (target / "notes.txt").write_text("mine")
        publish(target, NEW)
        assert contents(target) == NEW | {"notes.txt": b"mine"}
    finally:
        shutil.rmtree(target.parent)
