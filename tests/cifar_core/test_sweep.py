import argparse
import re
import signal
import subprocess
import time

import psutil
import pytest

from cifar_core.run_folder import RunFolder
from cifar_core.sweep.command import SweepError, combinations, main, seeds
from cifar_core.train import run
from tests.cifar_core.training import assert_same_run, make_trainer
from tests.conftest import command_line, environment

SHORT = ["--set", "epochs=2", "--set", "batch_size=20", "--data", "synthetic:200"]


def sweep(runs, *arguments):
    return main([*arguments, *SHORT, "--runs", str(runs)])


def folders(runs):
    return {str(path.parent.relative_to(runs)): RunFolder(path.parent) for path in runs.glob("*/*/recipe.json")}


@pytest.fixture(scope="module")
def single_runs(tmp_path_factory):
    """A run of baseline and one of dropout-0.2, each trained by `cifar_core.train`, with one thread."""
    runs = tmp_path_factory.mktemp("single")
    for recipe in ("baseline", "dropout-0.2"):
        subprocess.run(
            command_line("cifar_core.train", [recipe, *SHORT, "--runs", runs]),
            env=environment() | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
        )  # fmt: skip
    return folders(runs)


def test_a_sweep_writes_the_run_folders_that_single_runs_write(single_runs, tmp_path, capsys):
    assert sweep(tmp_path, "baseline", "dropout-0.2") == 0
    found = folders(tmp_path)
    assert found.keys() == single_runs.keys()
    for name, folder in found.items():
        assert_same_run(folder, single_runs[name])
    said = capsys.readouterr().out
    assert "[2/2]" in said
    assert re.search(r"\| dropout-0\.2\+batch_size=20\+epochs=2 +\| 1 of 1", said)

    before = {file: file.stat().st_mtime_ns for folder in found.values() for file in folder.path.glob("*.*")}
    assert sweep(tmp_path, "baseline", "dropout-0.2") == 0
    assert "2 runs, 2 of them finished already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.slow
def test_a_run_whose_process_is_killed_is_continued_with_the_same_bits(single_runs, tmp_path):
    arguments = ["baseline", "--seeds", "0-1", *SHORT, "--runs", tmp_path]
    process = subprocess.Popen(
        command_line("cifar_core.sweep", arguments), env=environment(), stdout=subprocess.PIPE, text=True
    )
    trained = "baseline+batch_size=20+epochs=2"
    kill_after_first_epoch(process, RunFolder(tmp_path / trained / "0"))
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert_same_run(RunFolder(tmp_path / trained / "0"), single_runs[f"{trained}/0"])
    assert "resuming after epoch 1" in (tmp_path / trained / "0/train.log").read_text()


def kill_after_first_epoch(process, folder):
    """Kills the training process of a run with SIGKILL as soon as its first epoch is saved."""
    end = time.monotonic() + 120
    while not folder.history():
        assert process.poll() is None
        assert time.monotonic() < end, "the first epoch was not saved in time"
        time.sleep(0.002)
    seed = folder.path.name
    for child in psutil.Process(process.pid).children(recursive=True):
        line = child.cmdline()
        if "cifar_core.sweep.child" in line and line[line.index("--seed") + 1] == seed:
            child.kill()
            return
    pytest.fail("the training process ended before it was killed; give it more epochs")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_when_a_sweep_ends_its_runs_save_their_state_and_end(tmp_path, number):
    arguments = ["baseline", "--seeds", "0-1", "--set", "epochs=200", "--data", "synthetic:200", "--runs", tmp_path]
    process = subprocess.Popen(
        command_line("cifar_core.sweep", arguments),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = RunFolder(tmp_path / "baseline+epochs=200/0")
    end = time.monotonic() + 120
    while not folder.history():
        assert time.monotonic() < end
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(60) == (143 if number == signal.SIGTERM else -number)
    _, alive = psutil.wait_procs(children, 30)
    assert not alive
    assert "stopped by SIGTERM" in (folder.path / "train.log").read_text()


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_the_others_are_finished(tmp_path, capsys):
    assert sweep(tmp_path, "deep", "--set", "learning_rate=1e30,0.01") == 1
    said = capsys.readouterr().out
    assert "learning_rate=1e+30/0 is not finished, see" in said
    assert "the loss is" in said
    assert re.search(r"\| deep\+batch_size=20\+epochs=2\+learning_rate=0\.01 +\| 1 of 1", said)


def test_a_finished_run_of_other_data_is_not_taken_for_a_run_of_the_sweep(single_runs, tmp_path):
    runs = next(iter(single_runs.values())).path.parents[1]
    with pytest.raises(SweepError, match="holds a finished run with data"):
        main(["baseline", *SHORT[:4], "--data", "synthetic:100", "--runs", str(runs)])


def test_a_finished_run_of_another_precision_is_one_of_the_sweep_unless_it_names_a_precision(single_runs):
    runs = next(iter(single_runs.values())).path.parents[1]
    arguments = ["baseline", *SHORT, "--runs", str(runs)]
    assert main([*arguments, "--precision", "fp32"]) == 0
    with pytest.raises(SweepError, match="holds a finished run with precision fp32, not bf16"):
        main([*arguments, "--precision", "bf16"])


def test_a_precision_among_the_values_is_asked_for(small, tmp_path, monkeypatch):
    trainer = make_trainer(small, tmp_path / "sprint+epochs=1/0", "sprint", ("epochs=1",))  # trained in fp32
    run(trainer, resume=False)
    monkeypatch.setattr("cifar_core.sweep.command.load_dataset", lambda _: small)
    arguments = ["sprint", "--set", "epochs=1", "--runs", str(tmp_path)]
    assert main(arguments) == 0
    with pytest.raises(SweepError, match="holds a finished run with precision fp32, not bf16"):
        main([*arguments, "--set", "precision=bf16"])


def test_values_are_combined_and_sizes_keep_their_commas():
    assert combinations([]) == [()]
    assert combinations(["widths=8,16,16"]) == [("widths=8,16,16",)]
    assert combinations(["dropout=0.1,0.2", "sizes=20:1,24:1", "epochs=3", "sizes=20:2"]) == [
        (dropout, sizes, "epochs=3")
        for dropout in ("dropout=0.1", "dropout=0.2")
        for sizes in ("sizes=20:1,24:1", "sizes=20:2")
    ]
    with pytest.raises(SweepError, match="expected KEY=VALUE"):
        combinations(["dropout"])


def test_seeds_are_numbers_and_ranges():
    assert seeds("0-4") == [0, 1, 2, 3, 4]
    assert seeds("7,0,2-3,3") == [0, 2, 3, 7]
    for text in ("", "4-0", "a", "-1", "4294967296"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected numbers and ranges"):
            seeds(text)


@pytest.mark.slow
def test_the_report_reads_the_runs_of_a_sweep(single_runs, tmp_path):
    runs = next(iter(single_runs.values())).path.parents[1]
    done = subprocess.run(
        command_line("cifar_core.report", ["--runs", runs, "--output", tmp_path / "report", "--data", "synthetic:200"]),
        env=environment(), capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = "".join(file.read_text() for file in (tmp_path / "report").glob("*.md"))
    assert "baseline+batch_size=20+epochs=2" in text
