import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from cifar_core.files import FileWriteError
from cifar_core.history import best_epoch
from cifar_core.recipes import KEYS, get_recipe
from cifar_core.run_folder import (
    RunError,
    RunFolder,
    default_folder,
    finished_runs,
    folder_name,
    load_checkpoint,
)

ABOUT = {"recipe": {"name": "r", "epochs": 2}, "seed": 0, "precision": "fp32", "classes": ["a", "b"]}
ABOUT["data"] = {"name": "pictures", "fingerprint": "f"}


def line(epoch, accuracy):
    measured = dict.fromkeys(("train_loss", "train_accuracy", "validation_loss", "learning_rate", "seconds"), 0.5)
    return measured | {"epoch": epoch, "validation_accuracy": accuracy}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "r" / "0")
    folder.path.mkdir(parents=True)
    folder.write_description(ABOUT)
    return folder


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch warns about the plain pickle before refusing it
def test_a_foreign_pickle_is_refused_without_running_it(tmp_path):
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


def test_a_file_with_other_tensors_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "x.pt")
    with pytest.raises(RunError, match="must hold model, epoch, recipe, seed, classes and data"):
        load_checkpoint(tmp_path / "x.pt")
    torch.save(torch.zeros(3), tmp_path / "x.pt")
    with pytest.raises(RunError, match="must hold"):
        load_checkpoint(tmp_path / "x.pt")


def test_the_error_for_a_missing_checkpoint_says_how_to_train_one(tmp_path):
    with pytest.raises(RunError, match="does not exist; train with"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_second_process_cannot_train_in_the_same_folder(folder):
    script = (
        "import sys, pathlib; from cifar_core.run_folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).lock(): pass"
    )
    with folder.lock():
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder.path)], capture_output=True, text=True, check=False
        )
    assert "another process is training in this folder" in done.stderr
    done = subprocess.run([sys.executable, "-c", script, str(folder.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_is_finished_when_its_history_has_every_epoch(folder):
    assert not folder.is_finished()
    folder.write_history([line(1, 0.5)])
    assert not folder.is_finished()
    assert finished_runs(folder.path.parents[1]) == []
    folder.write_history([line(1, 0.5), line(2, 0.4)])
    assert folder.is_finished()
    assert [run.path for run in finished_runs(folder.path.parents[1])] == [folder.path]


def test_the_first_of_several_equally_good_epochs_is_the_best():
    assert best_epoch([line(1, 0.4), line(2, 0.6), line(3, 0.6)], "best")["epoch"] == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        json.dumps({"recipe": {}}),
        json.dumps(ABOUT | {"recipe": 1}),
        json.dumps(ABOUT | {"recipe": {}}),
        json.dumps(ABOUT | {"recipe": {"name": "r", "epochs": "2"}}),
        json.dumps(ABOUT | {"data": {}}),
        json.dumps(ABOUT | {"data": {"fingerprint": "f"}}),
        json.dumps(ABOUT | {"initial": "weights"}),
        json.dumps(ABOUT | {"teacher": {"name": "t"}}),
        json.dumps(ABOUT | {"environment": []}),
    ],
)
def test_a_damaged_description_is_refused(folder, content):
    (folder.path / "recipe.json").write_text(content)
    for read in (folder.description, folder.is_finished):
        with pytest.raises(RunError, match=r"recipe\.json: this file is (damaged|incomplete)"):
            read()


def test_a_missing_description_and_a_damaged_history_are_named(folder, tmp_path):
    with pytest.raises(RunError, match="not a run folder, because it has no recipe"):
        RunFolder(tmp_path).description()
    for content in damaged_histories():
        (folder.path / "history.jsonl").write_bytes(content)
        with pytest.raises(RunError, match=r"history\.jsonl: this file is damaged .* put it back, or remove"):
            folder.history()


def damaged_histories():
    """Contents of history.jsonl that are not those of epochs 1, 2, …"""
    first, second = (json.dumps(line(epoch, 0.5)).encode() for epoch in (1, 2))
    lacking = json.dumps({"epoch": 1, "validation_accuracy": 0.5}).encode()
    words = json.dumps(line(1, "high")).encode()
    cut, twice = first + b"\n" + second[:9], first + b"\n" + first
    return cut, twice, second, lacking, words, b"1\n2\n", b"\xff\xfe\n", b"[" * 100_000


def test_a_damaged_history_is_read_from_the_last_state_with_a_warning(folder, caplog):
    lines = [line(1, None), line(2, 0.5)]
    folder.save(ABOUT | {"model": {}, "epoch": 2, "history": lines}, None)
    for content in damaged_histories():
        (folder.path / "history.jsonl").write_bytes(content)
        caplog.clear()
        again = RunFolder(folder.path)
        assert again.history() == lines
        assert again.is_finished()
        assert len(caplog.messages) == 1  # one warning, however often it is read
        assert "the history in last.pt is used, and training with --resume writes the file anew" in caplog.text


def short_histories(lines):
    """Contents of history.jsonl without the last of these lines; None for no file."""
    whole = [json.dumps(each).encode() + b"\n" for each in lines]
    return [None, *(b"".join(whole[:count]) for count in range(len(lines))), whole[0].rstrip()]


def save(folder, lines, epochs):
    folder.write_description(ABOUT | {"recipe": {"name": "r", "epochs": epochs}})
    folder.save(ABOUT | {"model": {}, "epoch": len(lines), "history": lines}, None)


@pytest.mark.parametrize("epochs", [3, 9])
def test_a_history_that_ends_too_early_is_read_from_the_last_state(folder, caplog, epochs):
    lines = [line(1, None), line(2, None), line(3, 0.5)]
    save(folder, lines, epochs)
    file = folder.path / "history.jsonl"
    for content in short_histories(lines):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
            os.utime(file, ns=(0, folder.last.stat().st_mtime_ns + 1))
        caplog.clear()
        again = RunFolder(folder.path)
        assert again.history() == lines
        assert again.is_finished() == (epochs == 3)
        count = 0 if content is None else len(content.splitlines())
        warned = (
            f"history.jsonl: this file is damaged (it ends after epoch {count} of 3); the history in last.pt is used"
        )
        assert [warned in message for message in caplog.messages] == [True] * (content is not None)


def test_a_run_that_is_being_saved_is_read_without_a_warning(folder, caplog, monkeypatch):
    lines = [line(1, None), line(2, 0.5)]
    save(folder, lines[:1], 2)
    os.utime(folder.path / "history.jsonl", ns=(0, folder.last.stat().st_mtime_ns))
    monkeypatch.setattr(RunFolder, "write_history", lambda *_: None)
    save(folder, lines, 2)
    assert folder.history() == lines
    assert folder.is_finished()
    assert not caplog.text


def test_the_last_state_is_read_only_if_the_history_may_lack_epochs(folder, monkeypatch):
    lines = [line(1, None), line(2, 0.5)]
    save(folder, lines, 2)
    folder.last.write_text("damaged")
    read = []
    monkeypatch.setattr("cifar_core.run_folder.load_checkpoint", read.append)
    assert folder.history() == lines
    assert folder.is_finished()
    folder.last.unlink()
    folder.write_history(lines[:1])
    assert not folder.is_finished()
    assert read == []


@pytest.mark.parametrize("history", [None, "two", []])
def test_an_unfinished_run_is_read_although_its_last_state_holds_no_more(folder, history, caplog):
    folder.write_history([line(1, 0.5)])
    torch.save(ABOUT | {"model": {}, "epoch": 2, "history": history}, folder.last)
    assert folder.history() == [line(1, 0.5)]
    folder.last.write_text("damaged")
    assert folder.history() == [line(1, 0.5)]
    assert not caplog.text


@pytest.mark.parametrize("history", [None, "two", [line(2, 0.5)]])
def test_a_damaged_history_without_a_usable_last_state_is_refused(folder, history):
    (folder.path / "history.jsonl").write_text("damaged")
    torch.save(ABOUT | {"model": {}, "epoch": 2, "history": history}, folder.last)
    with pytest.raises(RunError, match=r"this file is damaged .*last\.pt holds no history; put one of them back"):
        folder.history()
    folder.last.write_text("damaged")
    with pytest.raises(RunError, match=r"this file is damaged .*, and so is last\.pt; put one of them back, or remove"):
        folder.is_finished()


def test_a_name_that_is_too_long_for_a_file_system_is_cut_and_stays_unique():
    long = "small" + "".join(f"+{key}=0.1234567" for key in KEYS[1:])
    names = {folder_name(recipe, initial) for recipe in (long, long + "8") for initial in (None, "a" * 64, "b" * 64)}
    assert len(names) == 6
    assert all(len(name.encode()) <= 255 for name in names)
    assert all(name.startswith("small+dropout=0.1234567+") for name in names)
    assert folder_name(long, "a" * 64).endswith("+init=aaaaaaaa")
    assert folder_name(long) == folder_name(long)
    # The cut is between two changes, although a value may contain a plus.
    sizes = ",".join(["32:1"] * 60)
    recipe = get_recipe("deep-fast", [f"sizes={sizes}", "learning_rate=1e+30"])
    assert folder_name(recipe.name).startswith("deep-fast+learning_rate=1e+30+rest=")
    assert folder_name("x" * 255) == "x" * 255


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / "file" / "0")
    with pytest.raises(RunError, match=r"cannot be written to .* choose another with --runs DIR"), folder.lock():
        pass


def test_a_history_that_cannot_be_written_is_an_error_without_advice_for_other_commands(tmp_path):
    with pytest.raises(FileWriteError) as caught:
        RunFolder(tmp_path / "missing").write_history([line(1, 0.5)])
    assert "--resume" not in str(caught.value)


def test_runs_and_exports_of_synthetic_data_have_folders_of_their_own():
    assert str(default_folder("synthetic", "runs")) == "synthetic/runs"
    assert str(default_folder("folder", "runs")) == str(default_folder("cifar10", "runs")) == "runs"


@pytest.mark.parametrize(("key", "value"), [("seed", None), ("epoch", "2"), ("data", "cifar10"), ("data", {})])
def test_a_checkpoint_with_values_of_other_types_is_refused(tmp_path, key, value):
    torch.save(ABOUT | {"model": {}, "epoch": 2} | {key: value}, tmp_path / "x.pt")
    with pytest.raises(RunError, match="must hold model, epoch, recipe"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_checkpoint_that_is_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(RunError, match=r"cannot be read .*not a regular file"):
        load_checkpoint(tmp_path / "x.pt")


def test_the_error_for_a_foreign_file_does_not_advise_to_read_it_unsafely(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(RunError) as caught:
        load_checkpoint(tmp_path / "manifest.json")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["recipe.json", "history.jsonl", "best.pt", "last.pt"])
def test_a_folder_with_any_file_of_a_run_is_not_free_for_another(tmp_path, name):
    folder = RunFolder(tmp_path)
    assert not folder.is_started()
    (tmp_path / name).write_text("{}")
    assert folder.is_started()


def test_a_path_that_is_not_utf8_is_refused(tmp_path):
    folder = RunFolder(tmp_path / os.fsdecode(b"r\xff") / "0")
    with pytest.raises(RunError, match="is not UTF-8; choose another with --runs DIR"), folder.lock():
        pass
