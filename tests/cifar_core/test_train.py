import contextlib
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from cifar_core.data import split
from cifar_core.run_folder import RunFolder, finished_runs, load_checkpoint
from cifar_core.train import main
from tests.cifar_core.training import assert_same_run
from tests.conftest import command_line, environment, prepared

SHORT = ["--set", "epochs=4", "--set", "batch_size=8", "--data", "synthetic:200"]


def folder_of(path):
    return RunFolder(next(path.glob("*/*")))


def start(path, *options):
    """Starts a training process that writes to this folder of runs; its output is a pipe."""
    arguments = ["dropout-0.2", *SHORT, "--runs", path, *options]
    return subprocess.Popen(
        command_line("cifar_core.train", arguments), env=environment(), stdout=subprocess.PIPE, text=True, bufsize=1
    )


def finish(path, *options):
    done = subprocess.run(
        command_line("cifar_core.train", ["dropout-0.2", *SHORT, "--runs", path, "--resume", *options]),
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for_epoch(path, epoch):
    """Waits until this epoch is saved."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(StopIteration):
            if len(folder_of(path).history()) >= epoch:
                return
        time.sleep(0.002)
    pytest.fail(f"epoch {epoch} was not saved in time")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted")
    finish(path)
    return folder_of(path)


def test_a_run_that_is_killed_several_times_ends_with_the_same_bits(uninterrupted, tmp_path):
    for epoch, delay in ((1, 0.0), (2, 0.03), (3, 0.06)):
        process = start(tmp_path, "--resume")
        wait_for_epoch(tmp_path, epoch)
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert "resuming after epoch 3" in finish(tmp_path)
    assert_same_run(folder_of(tmp_path), uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_at_twenty_random_moments_ends_with_the_same_bits(uninterrupted, tmp_path):
    moments = np.random.RandomState(0).uniform(0, 1, 20)
    for delay in moments:
        process = start(tmp_path, "--resume")
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("seed 0"):  # training starts after this line
                break
        time.sleep(delay)
        process.kill()
        process.communicate()
    finish(tmp_path)
    assert_same_run(folder_of(tmp_path), uninterrupted)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_stops_the_run_after_the_current_step_and_saves_its_state(uninterrupted, tmp_path, number, code):
    process = start(tmp_path)
    wait_for_epoch(tmp_path, 1)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == code
    assert f"stopped by {number.name}" in output
    assert "--resume" in output
    assert 1 <= load_checkpoint(folder_of(tmp_path).last)["epoch"] < 4
    finish(tmp_path)
    assert_same_run(folder_of(tmp_path), uninterrupted)


def test_resuming_a_finished_run_changes_nothing(uninterrupted):
    before = {file.name: file.stat().st_mtime_ns for file in uninterrupted.path.iterdir() if file.name != ".lock"}
    assert "already finished" in finish(uninterrupted.path.parents[1])
    assert {
        file.name: file.stat().st_mtime_ns for file in uninterrupted.path.iterdir() if file.name != ".lock"
    } == before


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint_and_the_run_can_be_resumed(uninterrupted, tmp_path):
    process = start(tmp_path)
    wait_for_epoch(tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    folder = folder_of(tmp_path)
    before = {file.name: file.read_bytes() for file in (folder.last, folder.best)}
    limit = len(before["last.pt"]) // 2
    # The kernel refuses to write more than this, so that the write fails as on a full disk.
    done = subprocess.run(
        prepared(
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))",
            command_line("cifar_core.train", ["dropout-0.2", *SHORT, "--runs", tmp_path, "--resume"]),
        ),
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "the existing file is unchanged" in done.stderr
    assert "with --resume the run continues from its last checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert {file.name: file.read_bytes() for file in (folder.last, folder.best)} == before
    assert not list(folder.path.glob(".*.partial"))
    finish(tmp_path)
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow  # the message itself is tested in test_trainer.py
def test_the_command_reports_a_loss_that_is_not_finite(command, tmp_path):
    done = command("cifar_core.train", "deep", "--data", "synthetic:200", "--set", "learning_rate=1e30")
    assert done.returncode == 2
    assert "epoch 1, step 2 of 6, learning rate 1e+30" in done.stderr
    assert "no checkpoint has been written yet" in done.stderr
    assert not list((tmp_path / "synthetic").rglob("last.pt"))


def test_runs_on_synthetic_data_are_written_below_synthetic(command, tmp_path):
    done = command("cifar_core.train", "baseline", "--data", "synthetic:100", "--set", "epochs=1")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs").exists()
    recipe = json.loads((tmp_path / "synthetic/runs/baseline+epochs=1/0/recipe.json").read_text())
    assert recipe["data"]["kind"] == "synthetic"


@pytest.mark.parametrize(
    ("instructions", "options", "precision"),
    [
        ("avx2", [], "fp32"),
        ("avx2", ["--precision", "bf16"], "bf16"),
        ("avx2", ["--set", "precision=bf16"], "bf16"),
        ("avx512_bf16", [], "bf16"),
        ("avx512_bf16", ["--precision", "fp32"], "fp32"),
    ],
)
def test_without_bf16_units_fp32_is_the_default_and_the_command_says_so(
    tmp_path, monkeypatch, capsys, processor_with, instructions, options, precision
):
    def train(*options):
        arguments = ["sprint", "--set", "epochs=1", "--set", "width=4", "--data", "synthetic:50", *options]
        monkeypatch.setattr("sys.argv", ["train", *arguments, "--runs", str(tmp_path / "runs"), "--device", "cpu"])
        assert main() == 0
        return capsys.readouterr().out

    processor_with(instructions)
    said = train(*options)
    assert folder_of(tmp_path / "runs").description()["precision"] == precision
    assert ("does not compute in bf16" in said) == (instructions == "avx2" and not options)
    # Another machine continues in the precision that the run has.
    for other in ("avx2", "avx512_bf16"):
        processor_with(other)
        said = train("--resume")
        assert "already finished" in said
        assert "note:" not in said


TINY = ["sprint", "--set", "epochs=1", "--set", "width=4", "--data", "synthetic:50", "--device", "cpu"]


def train(monkeypatch, capsys, runs, *options):
    """Trains a tiny run in this process. Returns what the command prints."""
    monkeypatch.setattr("sys.argv", ["train", *TINY, "--runs", str(runs), *map(str, options)])
    assert main() == 0
    return capsys.readouterr().out


def test_a_finished_bf16_run_with_a_damaged_history_is_mended_on_a_processor_without_bf16(
    tmp_path, monkeypatch, capsys, processor_with
):
    processor_with("avx2")
    train(monkeypatch, capsys, tmp_path, "--precision", "bf16")
    history = folder_of(tmp_path).path / "history.jsonl"
    before = history.read_bytes()
    history.write_text("damaged")
    said = train(monkeypatch, capsys, tmp_path, "--resume")
    assert "already finished" in said
    assert "note:" not in said
    assert history.read_bytes() == before


def test_resuming_names_the_run_that_started_from_other_weights(tmp_path, monkeypatch, capsys):
    for seed in (1, 2):
        train(monkeypatch, capsys, tmp_path / "weights", "--seed", seed)
    first, second = (tmp_path / "weights/sprint+epochs=1+width=4" / str(seed) for seed in (1, 2))
    runs = tmp_path / "runs"
    assert "is a new run" not in train(monkeypatch, capsys, runs, "--init", first, "--resume")
    (there,) = runs.glob("*/0")
    for options in (["--init", second], []):
        said = train(monkeypatch, capsys, runs, *options, "--resume")
        verb, one = ("have", "one of them") if not options else ("has", "it")
        assert re.search(
            rf"is a new run; .*{re.escape(str(there))}.* {verb} the same recipe and seed, but started from other "
            rf"weights: to continue {one}, give the same weights with --init\n",
            said,
        )
        assert "is a new run" not in train(monkeypatch, capsys, runs, *options, "--resume")
    assert len(list(runs.glob("*/0"))) == 3
    for options in (["--seed", 1], ["--set", "dropout=0.1"]):
        said = train(monkeypatch, capsys, runs, "--init", second, "--resume", *options)
        assert "is a new run" not in said, options


def test_resuming_with_weights_names_the_run_that_started_from_fresh_ones(tmp_path, monkeypatch, capsys):
    for seed in (1, 2):
        train(monkeypatch, capsys, tmp_path / "weights", "--seed", seed)
    first, second = (tmp_path / "weights/sprint+epochs=1+width=4" / str(seed) for seed in (1, 2))
    runs = tmp_path / "runs"
    train(monkeypatch, capsys, runs)
    fresh = runs / "sprint+epochs=1+width=4/0"
    advice = f"{fresh} has the same recipe and seed, but started from fresh weights: to continue it, leave --init out\n"
    said = train(monkeypatch, capsys, runs, "--init", first, "--resume")
    assert f"is a new run; {advice}" in said
    assert "give the same weights" not in said
    said = train(monkeypatch, capsys, runs, "--init", second, "--resume")  # now there is one of each kind
    assert "to continue it, give the same weights with --init; " + advice in said


@pytest.mark.slow
def test_a_run_with_many_changed_values_is_trained_resumed_and_found_by_other_commands(command, tmp_path):
    values = {
        "epochs": 1, "batch_size": 20, "learning_rate": 0.0123456, "momentum": 0.654321, "validation_images": 7,
        "output_learning_rate": 0.0123, "bias_learning_rate": 3.21, "warmup": 0.123, "label_smoothing": 0.123,
        "translate": 2, "cutout": 3, "brightness": 0.12, "contrast": 0.12, "weight_decay": 0.00123, "dropout": 0.0123,
        "statistics_images": 20, "validated_epochs": 0,
    }  # fmt: skip
    changes = [text for key, value in values.items() for text in ("--set", f"{key}={value}")]
    trained = command("cifar_core.train", "small", "--data", "synthetic:100", *changes)
    assert trained.returncode == 0, trained.stderr
    (folder,) = (tmp_path / "synthetic/runs").glob("*/0")
    recipe = RunFolder(folder).description()["recipe"]["name"]
    assert len(recipe.encode()) > 255
    again = command("cifar_core.train", "small", "--data", "synthetic:100", *changes, "--resume")
    assert "already finished" in again.stdout
    swept = command("cifar_core.sweep", "small", "--data", "synthetic:100", *changes)
    assert "1 runs, 1 of them finished already" in swept.stdout
    reported = command("cifar_core.report", "--runs", "synthetic/runs", "--keep", "kept")
    assert reported.returncode == 0, reported.stderr
    assert f"| {folder.parent.name} | " in (tmp_path / "reports/results.md").read_text()
    assert "--set brightness=0.12 --set contrast=0.12" in (tmp_path / "reports/results.md").read_text()
    assert (tmp_path / "kept/fp32" / folder.parent.name / "0/history.jsonl").exists()
    assert finished_runs(tmp_path / "synthetic/runs")[0].path == folder


def test_neither_training_nor_evaluating_loads_what_takes_seconds_and_is_not_needed(tmp_path):
    small = ["sprint", "--set", "epochs=1", "--set", "width=4", "--data", "synthetic:50", "--runs", str(tmp_path)]
    code = (
        "import sys\n"
        "from cifar_core import evaluate, train\n"
        f"sys.argv = ['', *{small}]\n"
        "assert train.main() == 0\n"
        f"sys.argv = ['', '--model', {str(tmp_path / 'sprint+epochs=1+width=4/0')!r}, '--data', 'synthetic:50']\n"
        "assert evaluate.main() == 0\n"
        "print({'torch._dynamo', 'torch._inductor', 'scipy.stats', 'sklearn'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_command_refuses_an_unknown_recipe_and_an_impossible_seed(command):
    unknown = command("cifar_core.train", "shallow", "--data", "synthetic:100")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: there is no recipe 'shallow'; the recipes are: baseline")
    seed = command("cifar_core.train", "deep", "--seed", "-1")
    assert seed.returncode == 2
    assert "the seed must be 0 to 4294967295" in seed.stderr


def test_classes_without_an_image_to_train_on_are_named(command, tmp_path):
    for name, count in (("few", 2), ("many", 200)):
        for part in ("train", "test"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(count):
                picture = Image.fromarray(np.full((32, 32, 3), number, np.uint8))
                picture.save(tmp_path / "data" / part / name / f"{number}.png")
    # Of the 202 images, 20 are held out: with this seed both images of the small class.
    seed = next(seed for seed in range(2000) if not {0, 1} & set(split(202, 20, seed)[0].tolist()))
    done = command(
        "cifar_core.train", "baseline", "--data", tmp_path / "data", "--runs", tmp_path / "runs",
        "--set", "epochs=1", "--set", "validation_images=20", "--set", f"split_seed={seed}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "note: no image is left to train on for 1 of the 2 classes" in done.stdout
    assert "validation: few; add images" in done.stdout
