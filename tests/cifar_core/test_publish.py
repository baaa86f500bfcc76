import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import onnx
import pytest

from cifar_core import publish as publish_module
from cifar_core import replacement
from cifar_core.manifest import read_manifest
from cifar_core.publish import PublishError, check_target, is_intact, publish
from tests.cifar_core.published import NEW, export_of, manifest_of
from tests.cifar_core.runs import contents
from tests.conftest import environment, prepared


def graph_of_export():
    """The content of a graph with the metadata that an export writes."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [value], [value]))
    onnx.helper.set_model_props(model, {"model_version": "m", "classes": "[]"})
    return model.SerializeToString()


def test_a_full_disk_leaves_the_previous_export(existing):
    kept = contents(existing)
    script = (
        "import pathlib, sys; from cifar_core.publish import publish\n"
        "publish(pathlib.Path(sys.argv[1]), {'model.onnx': bytes(100_000), 'manifest.json': b'{}'})"
    )
    done = subprocess.run(
        prepared(
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))",
            [sys.executable, "-c", script, str(existing)],
        ),
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "its content is unchanged" in done.stderr
    assert contents(existing) == kept
    assert [path.name for path in existing.parent.iterdir()] == ["exported"]  # no incomplete folder is left


@pytest.mark.parametrize("exchange", ["by the kernel", "by two renames"])
def test_files_of_the_previous_export_that_the_new_one_lacks_are_removed(tmp_path, exchange, monkeypatch):
    if exchange == "by two renames":  # a system without renameat2
        monkeypatch.setattr(replacement.ctypes, "CDLL", lambda *_, **__: object())
    target = tmp_path / "exported"
    graphs = {"model.onnx": b"1", "another.onnx": b"1"}
    publish(target, graphs | {"manifest.json": manifest_of(graphs).to_json()})
    (target / "folder").mkdir()
    (target / "notes.txt").write_text("mine")
    publish(target, NEW)
    assert (target / "folder").is_dir()
    (target / "folder").rmdir()
    assert contents(target) == NEW | {"notes.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_a_reader_finds_one_complete_export_while_exports_change(tmp_path):
    """A folder that is open never holds the model of one export and the manifest of another."""
    target = tmp_path / "exported"

    def write(number):
        publish(target, export_of(fp32=str(number).encode() * 1000))

    def read_repeatedly():
        while not done.is_set():
            folder = os.open(target, os.O_RDONLY)
            try:
                read = [os.open(name, os.O_RDONLY, dir_fd=folder) for name in ("model.onnx", "manifest.json")]
            except FileNotFoundError:
                continue  # this is the previous folder, which is being removed
            finally:
                os.close(folder)
            model, manifest = (os.fdopen(descriptor, "rb").read() for descriptor in read)
            digest = json.loads(manifest)["variants"]["model.onnx"]["sha256"]
            consistent.append(hashlib.sha256(model).hexdigest() == digest)

    consistent, done = [], threading.Event()
    write(0)
    reader = threading.Thread(target=read_repeatedly)
    reader.start()
    for number in range(1, 201):
        write(number)
    done.set()
    reader.join()
    assert len(consistent) > 20
    assert all(consistent)


def test_files_of_the_user_are_kept(existing):
    (existing / "folder").mkdir()
    (existing / "folder" / "file").write_text("mine")
    publish(existing, NEW)
    assert (existing / "notes.txt").read_text() == "mine"
    assert (existing / "folder" / "file").read_text() == "mine"
    assert not (existing / "model.int8.onnx").exists()


@pytest.mark.parametrize("content", ["{", '{"schema_version": 2, "model_version": "m", "variants": {}}'])
def test_a_manifest_that_is_damaged_or_of_another_version_does_not_keep_the_files_of_an_export(existing, content):
    for name in ("model.onnx", "model.int8.onnx"):
        (existing / name).write_bytes(graph_of_export())
    (existing / "manifest.json").write_text(content)
    publish(existing, NEW)
    assert set(contents(existing)) == {"model.onnx", "manifest.json", "notes.txt"}


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_an_export_with_a_changed_or_missing_file_is_not_intact(existing, damage):
    manifest = read_manifest(existing)
    assert is_intact(existing, manifest)
    if damage == "change":
        (existing / "model.onnx").write_bytes(b"1" * 999)
    else:
        (existing / "model.onnx").unlink()
    assert not is_intact(existing, manifest)


def test_a_link_to_the_folder_stays_a_link(existing):
    link = existing.with_name("link")
    link.symlink_to(existing.name)
    publish(link, NEW)
    assert link.is_symlink()
    assert (existing / "model.onnx").read_bytes() == b"3"
    assert {path.name for path in existing.parent.iterdir()} == {"exported", "link"}


def test_links_of_the_user_stay_links(existing):
    (existing / "folder").symlink_to("..")
    (existing / "nothing").symlink_to("missing")
    publish(existing, NEW)
    assert (existing / "folder").readlink() == Path("..")
    assert (existing / "nothing").readlink() == Path("missing")


# What may be replaced


def test_the_current_folder_and_its_parents_are_refused(existing, monkeypatch):
    (existing / "runs" / "x").mkdir(parents=True)
    kept = (existing / "model.onnx").read_bytes()
    for place, targets in ((existing, ["", ".", existing]), (existing / "runs" / "x", ["../..", existing, "/"])):
        monkeypatch.chdir(place)
        for target in targets:
            with pytest.raises(PublishError, match="is the current folder, or contains it"):
                publish(Path(target), NEW)
    link = existing.with_name("link")
    link.symlink_to(existing)
    with pytest.raises(PublishError, match="is the current folder, or contains it"):
        publish(link, NEW)
    assert (existing / "model.onnx").read_bytes() == kept


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", b'{"name": "web application", "icons": []}'),
        ("manifest.json", b"not JSON"),
        ("manifest.json", b"[]"),
        ("model.onnx", b"a model of something else"),
        ("model.int8.onnx", b""),
    ],
)
def test_a_file_that_belongs_to_no_export_of_ours_is_not_replaced(tmp_path, name, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(PublishError) as caught:
        publish(folder, NEW)
    message = str(caught.value)
    assert message.startswith(f"{folder / name}: this file is not part of an export of this project")
    assert "--output" in message
    assert contents(folder) == {name: content}


def test_a_foreign_graph_next_to_an_export_that_does_not_name_it_is_not_replaced(tmp_path):
    folder = tmp_path / "exported"
    publish(folder, NEW)
    (folder / "model.int8.onnx").write_bytes(b"of something else")
    with pytest.raises(PublishError, match=r"model\.int8\.onnx: this file is not part of an export"):
        publish(folder, NEW)


def test_a_folder_with_the_name_of_a_file_of_an_export_is_not_replaced(existing):
    (existing / "model.onnx").unlink()
    (existing / "model.onnx").mkdir()
    (existing / "model.onnx" / "precious").write_text("mine")
    with pytest.raises(PublishError, match=r"model\.onnx: this file is not part of an export"):
        publish(existing, NEW)
    assert (existing / "model.onnx" / "precious").read_text() == "mine"


def test_a_file_or_a_place_below_a_file_is_no_target(tmp_path):
    (tmp_path / "file").write_text("mine")
    for target, message in (
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "file/x/y", "no folder can be made in"),
    ):
        with pytest.raises(PublishError, match=message):
            check_target(target)


@pytest.fixture
def mounted(monkeypatch):
    """Lets the system report that something is mounted at these places."""
    places = set()
    monkeypatch.setattr(publish_module, "mount_points", lambda: places)
    monkeypatch.setattr(replacement, "mount_points", lambda: places)
    return places


def test_a_mount_point_is_refused_and_the_error_names_a_folder_in_it(existing, mounted):
    mounted.add(str(existing))
    with pytest.raises(PublishError, match=rf"mount point, .* a folder in it, such as {existing}/exported"):
        check_target(existing)


def test_something_mounted_in_the_folder_is_named_and_nothing_changes(existing, mounted):
    (existing / "volume").mkdir()
    mounted.add(str(existing / "volume"))
    kept = (existing / "model.onnx").read_bytes()
    with pytest.raises(PublishError, match="volume in it is a mount point"):
        publish(existing, NEW)
    assert (existing / "model.onnx").read_bytes() == kept
    assert [path.name for path in existing.parent.iterdir()] == ["exported"]


@pytest.fixture
def another_user(monkeypatch):
    """Lets the owner of all files be another user than the one that exports, who is not root."""
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)


def test_a_sticky_folder_with_a_file_of_another_user_is_refused(existing, another_user):
    check_target(existing)
    existing.chmod(0o1777)
    with pytest.raises(PublishError, match=r"\S+ in it belongs to another user, and the folder is sticky; choose"):
        check_target(existing)


def test_a_folder_of_another_user_in_a_sticky_folder_is_refused(existing, another_user):
    existing.parent.chmod(0o1777)
    with pytest.raises(PublishError, match=f"belongs to another user, and {existing.parent} is sticky"):
        check_target(existing)


@pytest.mark.parametrize("user", ["the owner", "root"])
def test_a_sticky_folder_is_no_obstacle_for_its_owner_and_root(existing, user, monkeypatch):
    if user == "root":
        monkeypatch.setattr(os, "geteuid", lambda: 0)
    existing.chmod(0o1777)
    existing.parent.chmod(0o1777)
    publish(existing, NEW)
    assert contents(existing) == NEW | {"notes.txt": b"mine"}


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs /proc/self/mountinfo")
def test_the_mount_points_are_those_of_this_process(tmp_path):
    mounted = replacement.mount_points()
    assert "/proc" in mounted
    assert str(tmp_path) not in mounted
