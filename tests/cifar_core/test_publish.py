import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cifar_core import publish as publish_module
from cifar_core.manifest import Manifest, read_manifest
from cifar_core.publish import PublishError, is_intact, publish
from tests.cifar_core.runs import contents
from tests.conftest import environment, prepared


def manifest_of(files):
    """The manifest of these graphs."""
    variants = {
        file: {"file": file, "sha256": hashlib.sha256(content).hexdigest(), "test_accuracy": 0.5}
        for file, content in files.items()
    }
    return Manifest(schema_version=1, model_version="m", classes=("cat", "dog"), variants=variants)


@pytest.fixture
def existing(tmp_path):
    """An export, with a file of the user next to it."""
    target = tmp_path / "exported"
    graphs = {"model.onnx": b"1" * 1000, "model.int8.onnx": b"2" * 1000}
    publish(target, graphs | {"manifest.json": manifest_of(graphs).to_json()})
    (target / "notes.txt").write_text("mine")
    return target


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
        monkeypatch.setattr(publish_module.ctypes, "CDLL", lambda *_, **__: object())
    target = tmp_path / "exported"
    graphs = {"model.onnx": b"1", "another.onnx": b"1"}
    publish(target, graphs | {"manifest.json": manifest_of(graphs).to_json()})
    publish(target, {"model.onnx": b"2", "manifest.json": b"{}"})
    assert contents(target) == {"model.onnx": b"2", "manifest.json": b"{}"}
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_a_reader_finds_one_complete_export_while_exports_change(tmp_path):
    """A folder that is open never holds the model of one export and the manifest of another."""
    target = tmp_path / "exported"

    def write(number):
        model = str(number).encode() * 1000
        publish(target, {"model.onnx": model, "manifest.json": hashlib.sha256(model).hexdigest().encode()})

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
            consistent.append(hashlib.sha256(model).hexdigest().encode() == manifest)

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
    publish(existing, {"model.onnx": b"3", "manifest.json": b"{}"})
    assert (existing / "notes.txt").read_text() == "mine"
    assert (existing / "folder" / "file").read_text() == "mine"
    assert not (existing / "model.int8.onnx").exists()


def test_a_damaged_manifest_does_not_keep_the_files_of_an_export(existing):
    (existing / "manifest.json").write_text("{")
    publish(existing, {"model.onnx": b"3", "manifest.json": b"{}"})
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
    publish(link, {"model.onnx": b"3", "manifest.json": b"{}"})
    assert link.is_symlink()
    assert (existing / "model.onnx").read_bytes() == b"3"
    assert {path.name for path in existing.parent.iterdir()} == {"exported", "link"}


def test_links_of_the_user_stay_links(existing):
    (existing / "folder").symlink_to("..")
    (existing / "nothing").symlink_to("missing")
    publish(existing, {"model.onnx": b"3", "manifest.json": b"{}"})
    assert (existing / "folder").readlink() == Path("..")
    assert (existing / "nothing").readlink() == Path("missing")


def test_a_file_that_cannot_be_kept_is_named(existing):
    os.mkfifo(existing / "pipe")
    kept = (existing / "manifest.json").read_bytes()
    with pytest.raises(PublishError, match=r"pipe.*its content is unchanged"):
        publish(existing, {"model.onnx": b"3", "manifest.json": b"{}"})
    assert (existing / "manifest.json").read_bytes() == kept


def test_the_working_folder_can_be_the_folder_of_the_export(existing, monkeypatch):
    monkeypatch.chdir(existing)
    publish(Path(), {"model.onnx": b"3", "manifest.json": b"{}"})
    assert (existing / "model.onnx").read_bytes() == b"3"
