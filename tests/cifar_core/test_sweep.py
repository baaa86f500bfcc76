import argparse
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cifar_core.initial_weights import InitialWeightsError, read_initial_weights
from cifar_core.run_folder import RunError, RunFolder
from cifar_core.sweep.command import main
from cifar_core.sweep.options import SweepError, combinations, seeds
from cifar_core.teacher import TeacherError
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
    with pytest.raises(RunError, match="was started with data"):
        main(["baseline", *SHORT[:4], "--data", "synthetic:100", "--runs", str(runs)])


def test_a_finished_run_of_another_precision_is_one_of_the_sweep_unless_it_names_a_precision(single_runs):
    runs = next(iter(single_runs.values())).path.parents[1]
    arguments = ["baseline", *SHORT, "--runs", str(runs)]
    assert main([*arguments, "--precision", "fp32"]) == 0
    with pytest.raises(RunError, match="was started with precision fp32, not bf16"):
        main([*arguments, "--precision", "bf16"])


def test_a_precision_among_the_values_is_asked_for(small, tmp_path, monkeypatch):
    trainer = make_trainer(small, tmp_path / "sprint+epochs=1/0", "sprint", ("epochs=1",))  # trained in fp32
    run(trainer, resume=False)
    monkeypatch.setattr("cifar_core.sweep.command.load_dataset", lambda _: small)
    arguments = ["sprint", "--set", "epochs=1", "--runs", str(tmp_path)]
    assert main(arguments) == 0
    with pytest.raises(RunError, match="was started with precision fp32, not bf16"):
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
    for text in ("", "4-0", "a", "-1", "4294967296", "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match="expected numbers and ranges"):
            seeds(text)


def test_a_sweep_of_too_many_runs_is_refused_before_it_lists_them(tmp_path):
    for text in ("0-4294967295", "0-9999,10000", ",".join(["0-4294967295"] * 100)):
        with pytest.raises(argparse.ArgumentTypeError, match="expected at most 10,000 seeds; give several sweeps"):
            seeds(text)
    many = [f"{key}={','.join(map(str, range(1000)))}" for key in ("epochs", "batch_size", "dropout", "momentum")]
    with pytest.raises(SweepError, match=r"would have 1,000,000,000,000 runs or more, but at most 10,000 are possible"):
        combinations(many)
    with pytest.raises(SweepError, match=r"would have 18,000 runs or more"):
        sweep(tmp_path, "baseline", "deep", "--seeds", "0-8999")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--jobs", "--threads"])
@pytest.mark.parametrize("value", ["x", "0", "-1", "1.5", "9" * 5000])
def test_a_number_of_jobs_or_threads_that_is_none_is_refused(capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        main(["baseline", option, value])
    assert f"argument {option}: '{value}': expected a whole number from 1" in capsys.readouterr().err


def test_without_ray_the_sweep_names_the_extra_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="2"):
        sweep(tmp_path, "baseline", "--ray")
    assert "the module ray is not installed: pip install 'cifar-classifier[ray]'" in capsys.readouterr().err


def test_a_damaged_history_stops_no_sweep(single_runs, tmp_path, capsys, caplog):
    runs = tmp_path / "runs"
    shutil.copytree(next(iter(single_runs.values())).path.parents[1], runs)
    (runs / "baseline+batch_size=20+epochs=2/0/history.jsonl").write_text("damaged")
    assert sweep(runs, "baseline") == 0
    said = capsys.readouterr().out
    assert "1 runs, 1 of them finished already" in said
    assert re.search(r"\| baseline\+batch_size=20\+epochs=2 +\| 1 of 1", said)
    assert "history.jsonl: this file is damaged" in caplog.text


WEIGHTS = ["--set", "width=4", "--set", "sizes=", "--set", "validated_epochs=0"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run that weights can be taken from, and that can teach."""
    runs = tmp_path_factory.mktemp("teacher")
    command = command_line("cifar_core.train", ["sprint", *WEIGHTS, *SHORT, "--runs", runs])
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    return next(runs.glob("*/0"))


def test_a_sweep_passes_initial_weights_and_teacher_on_to_its_runs(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(teacher)
    options = [*WEIGHTS, "--set", "distillation=0,0.5", "--init", "weights", "--teacher", "weights/best.pt"]
    assert sweep(tmp_path / "sweep", "sprint", *options) == 0
    said = capsys.readouterr().out
    found = folders(tmp_path / "sweep")
    initial = read_initial_weights(teacher)
    plain = f"sprint+batch_size=20+epochs=2+sizes=+width=4+init={initial.digest[:8]}/0"
    distilled = plain.replace("+epochs", "+distillation=0.5+epochs")
    assert found.keys() == {plain, distilled}
    assert all(folder.description()["initial"]["weights"] == initial.digest for folder in found.values())
    # A recipe without distillation learns from no teacher.
    assert "teacher" not in found[plain].description()
    assert "weights" in found[distilled].description()["teacher"]
    assert f"| {plain.removesuffix('/0')} " in said

    # `cifar_core.train` with the same options finds its runs there.
    one = [*WEIGHTS, "--set", "distillation=0.5", "--init", "weights", "--teacher", "weights/best.pt", "--resume"]
    done = subprocess.run(
        command_line("cifar_core.train", ["sprint", *one, *SHORT, "--runs", tmp_path / "sweep"]),
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "already finished" in done.stdout, done.stderr
    assert sweep(tmp_path / "sweep", "sprint", *options) == 0
    assert "2 runs, 2 of them finished already" in capsys.readouterr().out


def test_a_finished_run_of_another_teacher_is_not_taken_for_a_run_of_the_sweep(teacher, tmp_path):
    options = [*WEIGHTS, "--set", "distillation=0.5", "--teacher"]
    assert sweep(tmp_path / "sweep", "sprint", *options, str(teacher)) == 0
    assert sweep(tmp_path / "sweep", "sprint", *WEIGHTS, "--seeds", "1") == 0
    other = tmp_path / "sweep/sprint+batch_size=20+epochs=2+sizes=+width=4/1"
    with pytest.raises(RunError, match="was started with teacher"):
        sweep(tmp_path / "sweep", "sprint", *options, str(other))


def test_a_missing_or_unwanted_teacher_is_refused_before_any_run_starts(teacher, tmp_path):
    with pytest.raises(TeacherError, match="name a teacher with --teacher RUN"):
        sweep(tmp_path, "deep-distilled")
    with pytest.raises(TeacherError, match="has no distillation"):
        sweep(tmp_path, "sprint", "--teacher", str(teacher))
    with pytest.raises(InitialWeightsError, match="does not exist"):
        sweep(tmp_path, "sprint", "--init", str(tmp_path / "missing"))
    assert not list(tmp_path.iterdir())


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
