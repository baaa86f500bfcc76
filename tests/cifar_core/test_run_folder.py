import json
import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch

from cifar_core.run_folder import RunError, RunFolder, atomic_write, best_epoch, finished_runs, load_checkpoint

ABOUT = {"recipe": {"name": "r", "epochs": 2}, "seed": 0, "precision": "fp32", "classes": ["a", "b"], "data": {}}


def line(epoch, accuracy):
    return {"epoch": epoch, "validation_accuracy": accuracy}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "r" / "0")
    folder.path.mkdir(parents=True)
    folder.write_description(ABOUT)
    return folder


def test_a_write_that_fails_for_want_of_space_leaves_the_file_before(tmp_path):
    file = tmp_path / "last.pt"
    file.write_bytes(b"before")
    script = (
        "import resource, pathlib, sys; from cifar_core.run_folder import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "atomic_write(pathlib.Path(sys.argv[1]), bytes(100_000))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=False)
    assert "what was there before is intact" in done.stderr
    assert "100,000 bytes" in done.stderr
    assert file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_write_replaces_the_file_as_a_whole(tmp_path):
    file = tmp_path / "file"
    atomic_write(file, b"one")
    opened = file.open("rb")
    atomic_write(file, b"another")
    assert file.read_bytes() == b"another"
    assert opened.read() == b"one"  # whoever had it open reads the old one, whole


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's word on the plain pickle, before it refuses
def test_a_pickle_from_outside_is_refused_unopened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "opened"),))

    torch.save({"model": Bomb()}, tmp_path / "torch.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("torch.pt", "plain.pt"):
        with pytest.raises(RunError, match="not a checkpoint of this library"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 but no archive"])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(RunError, match=r"x\.pt: not a checkpoint"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "x.pt")
    with pytest.raises(RunError, match="lacks model, recipe, classes or data"):
        load_checkpoint(tmp_path / "x.pt")
    torch.save(torch.zeros(3), tmp_path / "x.pt")
    with pytest.raises(RunError, match="lacks"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_missing_checkpoint_says_how_to_get_one(tmp_path):
    with pytest.raises(RunError, match="no such checkpoint; train with"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_folder_is_held_against_a_second_process(folder):
    script = (
        "import sys, pathlib; from cifar_core.run_folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).lock(): pass"
    )
    with folder.lock():
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder.path)], capture_output=True, text=True, check=False
        )
    assert "another process is training here" in done.stderr
    done = subprocess.run([sys.executable, "-c", script, str(folder.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_is_finished_when_every_epoch_is_in_its_history(folder):
    assert not folder.is_finished()
    folder.write_history([line(1, 0.5)])
    assert not folder.is_finished()
    assert finished_runs(folder.path.parents[1]) == []
    folder.write_history([line(1, 0.5), line(2, 0.4)])
    assert folder.is_finished()
    assert [run.path for run in finished_runs(folder.path.parents[1])] == [folder.path]


def test_the_first_of_several_best_epochs_counts():
    assert best_epoch([line(1, 0.4), line(2, 0.6), line(3, 0.6)])["epoch"] == 2


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"recipe": {}})])
def test_a_damaged_description_is_refused(folder, content):
    (folder.path / "recipe.json").write_text(content)
    with pytest.raises(RunError, match=r"recipe\.json: (damaged|lacks)"):
        folder.description()
