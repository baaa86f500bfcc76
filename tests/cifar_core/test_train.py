import contextlib
import dataclasses
import json
import resource
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from cifar_core.data import Batches, epoch_generator, split, subset_sampler
from cifar_core.device import DeviceError, choose_device
from cifar_core.models import BaselineConvNet
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunError, RunFolder, load_checkpoint
from cifar_core.train import Interrupted, StopSignal, Trainer, TrainingError, run
from tests.conftest import command_line, environment

CPU = torch.device("cpu")
SHORT = ["--set", "epochs=4", "--set", "batch_size=8", "--data", "synthetic:200"]


def trainer(dataset, path, name="dropout-0.2", overrides=("epochs=2",), seed=0, precision="fp32"):
    return Trainer(get_recipe(name, list(overrides)), dataset, RunFolder(path), seed, CPU, precision)


def folder_of(path):
    return RunFolder(next(path.glob("*/*")))


def assert_same_run(one, other):
    """The same bits in every tensor of both checkpoints, and the same history but for the seconds."""
    for name in ("best", "last"):
        left, right = load_checkpoint(getattr(one, name)), load_checkpoint(getattr(other, name))
        assert left["epoch"] == right["epoch"]
        for key, tensor in left["model"].items():
            assert torch.equal(tensor, right["model"][key]), f"{name}.pt: {key} differs"
        if name == "last":
            assert torch.equal(left["rng"], right["rng"])
            for key, state in left["optimizer"]["state"].items():
                assert torch.equal(state["momentum_buffer"], right["optimizer"]["state"][key]["momentum_buffer"])
    histories = [[{**line, "seconds": 0} for line in folder.history()] for folder in (one, other)]
    assert histories[0] == histories[1]


# What training does


def test_a_run_leaves_the_folder_that_others_read(small, tmp_path, capsys):
    history = run(trainer(small, tmp_path), resume=False)
    folder = RunFolder(tmp_path)
    assert {"recipe.json", "history.jsonl", "best.pt", "last.pt"} <= {file.name for file in tmp_path.iterdir()}
    assert folder.is_finished()
    assert folder.history() == history
    assert [line["epoch"] for line in history] == [1, 2]
    description = folder.description()
    assert description["recipe"]["dropout"] == 0.2
    assert description["data"] == {"kind": "synthetic", "name": small.name, "fingerprint": small.fingerprint}
    assert description["classes"] == list(small.classes)
    best = load_checkpoint(folder.best)
    assert best["validation_accuracy"] == max(line["validation_accuracy"] for line in history)
    output = capsys.readouterr().out
    assert "validation loss" in output
    assert "best validation accuracy" in output


def test_loss_and_accuracy_are_printed_every_200_steps_and_kept_as_events(small, tmp_path, capsys):
    run(trainer(small, tmp_path, overrides=("epochs=2", "batch_size=1")), resume=False)
    printed = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert [line.split("training loss")[0].split() for line in printed] == [
        ["epoch", "1", "step", "200/270"],
        ["epoch", "2", "step", "200/270"],
    ]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("step/train_loss")] == [200, 470]
    accuracies = [line["validation_accuracy"] for line in RunFolder(tmp_path).history()]
    assert [event.value for event in events.Scalars("epoch/validation_accuracy")] == pytest.approx(accuracies)


def test_the_loop_does_what_a_textbook_loop_does(small, tmp_path):
    """Without dropout, step by step the same weights as the loop that anybody would write."""
    ours = trainer(small, tmp_path, "baseline", ("epochs=2", "learning_rate=0.05"), seed=7)
    run(ours, resume=False)

    torch.manual_seed(7)
    model = BaselineConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    training, validation = split(len(small.train))
    for epoch in range(2):
        total, correct = 0.0, 0
        for images, labels in Batches(small.train, subset_sampler(training, epoch_generator(7, epoch)), 32):
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
        line = ours.training.history[epoch]
        assert line["train_loss"] == pytest.approx(total / len(training), rel=1e-4)
        assert line["train_accuracy"] == pytest.approx(correct / len(training), abs=0.02)
        with torch.inference_mode():
            expected = nn.functional.cross_entropy(
                model(small.train.images[validation]), small.train.labels[validation]
            )
        assert line["validation_loss"] == pytest.approx(float(expected), rel=1e-3)
    for mine, theirs in zip(ours.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)


def test_held_out_images_are_never_trained_on(small, tmp_path):
    ours = trainer(small, tmp_path, overrides=("epochs=1", "batch_size=270"))
    _, held_out = split(len(small.train))
    seen = {image.numpy().tobytes() for images, _ in ours.batches() for image in images}
    assert not seen & {small.train.images[row].numpy().tobytes() for row in held_out}
    assert len(seen) == 270


@pytest.mark.parametrize("overrides", [("epochs=1", "sampler=weighted"), ("epochs=1", "model=deep")])
def test_every_kind_of_recipe_trains(small, tmp_path, overrides):
    (line,) = run(trainer(small, tmp_path, overrides=overrides), resume=False)
    assert 0 < line["train_loss"] < 3


@pytest.mark.parametrize("name", ["sprint", "deep-fast", "best"])
def test_our_own_recipes_learn(small, tmp_path, name):
    overrides = ["epochs=4", "batch_size=27", "sizes=24:2", "cutout=8"] + (["width=8"] if name == "best" else [])
    history = run(trainer(small, tmp_path, name, overrides, precision=get_recipe(name).precision), resume=False)
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.3
    assert history[-1]["train_accuracy"] > 0.5
    rates = [line["learning_rate"] for line in history]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.02 * get_recipe(name).learning_rate


def test_the_first_epochs_see_smaller_images_all_of_them_augmented(small, tmp_path):
    ours = trainer(small, tmp_path, "sprint", ("sizes=20:1,24:2", "epochs=4", "batch_size=270", "translate=0"))
    seen = []
    for epoch in range(4):
        ours.training.epoch = epoch
        ((images, labels),) = ours.batches()
        assert len(labels) == 270
        seen.append(images)
    assert [tuple(images.shape[1:3]) for images in seen] == [(20, 20), (24, 24), (24, 24), (32, 32)]
    originals = {image.numpy().tobytes() for image in small.train.images}
    straight = [image.numpy().tobytes() in originals for image in seen[3]]
    mirrored = [image.flip(1).numpy().tobytes() in originals for image in seen[3]]
    assert all(one or other for one, other in zip(straight, mirrored, strict=True))
    assert 0 < sum(straight) < 270


@pytest.mark.parametrize("stop_after", [1, 13, 24])
def test_our_own_recipes_resume_with_the_same_bits(small, tmp_path, stop_after):
    """Stopped in an epoch of small images, and in one of full size."""
    overrides = ("epochs=3", "batch_size=27", "sizes=20:1", "cutout=8")
    through = trainer(small, tmp_path / "through", "sprint", overrides)
    run(through, resume=False)
    stopped = trainer(small, tmp_path / "stopped", "sprint", overrides)
    steps, take = 0, stopped.train_step

    def step_and_stop(images, labels):
        nonlocal steps
        take(images, labels)
        steps += 1
        if steps == stop_after:
            signal.raise_signal(signal.SIGTERM)

    stopped.train_step = step_and_stop
    with pytest.raises(Interrupted):
        run(stopped, resume=False)
    run(trainer(small, tmp_path / "stopped", "sprint", overrides), resume=True)
    assert_same_run(through.folder, stopped.folder)


def test_a_run_from_before_a_recipe_had_some_key_goes_on(small, tmp_path):
    run(trainer(small, tmp_path), resume=False)
    description = RunFolder(tmp_path).description()
    for key in ("sizes", "optimizer", "width"):
        del description["recipe"][key]
    RunFolder(tmp_path).write_description(description)
    run(trainer(small, tmp_path), resume=True)
    description["recipe"]["momentum"] = 0.5
    RunFolder(tmp_path).write_description(description)
    with pytest.raises(RunError, match="was begun with recipe"):
        run(trainer(small, tmp_path), resume=True)


def test_bf16_trains_and_keeps_the_weights_in_fp32(small, tmp_path):
    history = run(
        trainer(small, tmp_path, overrides=("epochs=5", "batch_size=8", "learning_rate=0.01"), precision="bf16"),
        resume=False,
    )
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.3
    tensors = load_checkpoint(RunFolder(tmp_path).best)["model"].values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_another_seed_gives_another_model(small, tmp_path):
    first, second = (run(trainer(small, tmp_path / str(seed), seed=seed), resume=False) for seed in (0, 1))
    assert first[-1]["train_loss"] != second[-1]["train_loss"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asked_for_cuda_and_none_there_is_an_error():
    with pytest.raises(DeviceError, match="finds no CUDA device"):
        choose_device("cuda")
    assert choose_device("auto") == CPU


# What must not be lost


def start(path, *options):
    """A training process in a folder of runs, with its output as a pipe."""
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
    """Until that epoch is saved."""
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


def test_a_run_killed_again_and_again_ends_with_the_same_bits(uninterrupted, tmp_path):
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
def test_a_run_killed_at_twenty_arbitrary_moments_ends_with_the_same_bits(uninterrupted, tmp_path):
    moments = np.random.RandomState(0).uniform(0, 1, 20)
    for delay in moments:
        process = start(tmp_path, "--resume")
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("seed 0"):  # what follows is training
                break
        time.sleep(delay)
        process.kill()
        process.communicate()
    finish(tmp_path)
    assert_same_run(folder_of(tmp_path), uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(uninterrupted, tmp_path, number, code):
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


def test_a_run_stopped_within_an_epoch_goes_on_at_the_next_step(small, tmp_path):
    whole = trainer(small, tmp_path / "whole")
    run(whole, resume=False)
    parts = trainer(small, tmp_path / "parts")
    with parts.folder.lock():
        parts.start(resume=False)
        batches = parts.batches

        def signalled_in_the_fifth_step():
            for step, batch in enumerate(batches(), start=1):
                if step == 5:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        parts.batches = signalled_in_the_fifth_step
        with StopSignal() as stop, pytest.raises(Interrupted, match="step 5 of 9"):
            next(parts.epochs(stop))
    again = trainer(small, tmp_path / "parts")
    run(again, resume=True)
    assert_same_run(again.folder, whole.folder)


def test_a_finished_run_is_left_as_it_is(uninterrupted):
    before = {file.name: file.stat().st_mtime_ns for file in uninterrupted.path.iterdir() if file.name != ".lock"}
    assert "finished before" in finish(uninterrupted.path.parents[1])
    assert {
        file.name: file.stat().st_mtime_ns for file in uninterrupted.path.iterdir() if file.name != ".lock"
    } == before


def test_a_run_begun_before_is_not_trained_over(small, tmp_path):
    run(trainer(small, tmp_path), resume=False)
    with pytest.raises(RunError, match="was begun before; go on with --resume"):
        run(trainer(small, tmp_path), resume=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"precision": "bf16"}, "precision fp32"), ({"overrides": ("epochs=3",)}, "recipe"), ({"seed": 1}, "seed 0")],
)
def test_another_run_does_not_go_on_in_its_place(small, tmp_path, change, named):
    run(trainer(small, tmp_path), resume=False)
    with pytest.raises(RunError, match=f"was begun with {named}"):
        run(trainer(small, tmp_path, **change), resume=True)


def test_the_same_data_under_another_name_goes_on_and_other_data_does_not(small, tmp_path):
    run(trainer(small, tmp_path), resume=False)
    run(trainer(dataclasses.replace(small, name="moved"), tmp_path), resume=True)
    with pytest.raises(RunError, match="was begun with data"):
        run(trainer(dataclasses.replace(small, fingerprint="other"), tmp_path), resume=True)


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_can_go_on(uninterrupted, tmp_path):
    process = start(tmp_path)
    wait_for_epoch(tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    folder = folder_of(tmp_path)
    before = {file.name: file.read_bytes() for file in (folder.last, folder.best)}
    limit = len(before["last.pt"]) // 2
    # The kernel refuses to write beyond this size: a write that really fails, as on a full disk.
    done = subprocess.run(
        command_line("cifar_core.train", ["dropout-0.2", *SHORT, "--runs", tmp_path, "--resume"]),
        env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "what was there before is intact" in done.stderr
    assert "Traceback" not in done.stderr
    assert {file.name: file.read_bytes() for file in (folder.last, folder.best)} == before
    assert not list(folder.path.glob(".*.partial"))
    finish(tmp_path)
    assert_same_run(folder, uninterrupted)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(small, tmp_path):
    ours = trainer(small, tmp_path, overrides=("epochs=3",))
    with ours.folder.lock(), StopSignal() as stop:
        ours.start(resume=False)
        epochs = ours.epochs(stop)
        next(epochs)
        before = ours.folder.last.read_bytes()
        ours.training.optimizer.param_groups[0]["lr"] = 1e30
        with pytest.raises(TrainingError) as caught:
            next(epochs)
    message = str(caught.value)
    # The first step's loss is still that of good weights; its update ruins them.
    assert "the loss is nan at epoch 2, step 2 of 9, learning rate 0.001" in message or "loss is inf" in message
    assert "is from before" in message
    assert "--set learning_rate=0.0001" in message
    assert ours.folder.last.read_bytes() == before
    assert len(ours.folder.history()) == 1


def test_the_command_says_so_when_the_loss_is_not_finite(command, tmp_path):
    done = command("cifar_core.train", "deep", "--data", "synthetic:200", "--set", "learning_rate=1e30")
    assert done.returncode == 2
    assert "epoch 1, step 2 of 6, learning rate 1e+30" in done.stderr
    assert "no checkpoint was written yet" in done.stderr
    assert not list((tmp_path / "synthetic").rglob("last.pt"))


def test_generated_data_goes_to_a_place_of_its_own(command, tmp_path):
    done = command("cifar_core.train", "baseline", "--data", "synthetic:100", "--set", "epochs=1")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs").exists()
    recipe = json.loads((tmp_path / "synthetic/runs/baseline+epochs=1/0/recipe.json").read_text())
    assert recipe["data"]["kind"] == "synthetic"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_cuda_learns_and_resumes(small, tmp_path):
    recipe = get_recipe("dropout-0.2", ["epochs=3", "learning_rate=0.02"])
    ours = Trainer(recipe, small, RunFolder(tmp_path), 0, torch.device("cuda"), "fp32")
    with ours.folder.lock(), StopSignal() as stop:
        ours.start(resume=False)
        next(ours.epochs(stop))
    again = Trainer(recipe, small, RunFolder(tmp_path), 0, torch.device("cuda"), "fp32")
    history = run(again, resume=True)
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
