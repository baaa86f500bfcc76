"""Runs of several ranks, which torchrun starts as real processes on the CPU."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from torch import nn

from cifar_core.data import Batches, Images, load_dataset
from cifar_core.device import CPU, DeviceError
from cifar_core.distributed import ALONE, RankError, Ranks, join_ranks, number_of_ranks, user_chose_threads
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder, load_checkpoint
from cifar_core.sweep.command import SweepError
from cifar_core.sweep.command import main as sweep
from cifar_core.train import run
from cifar_core.trainer import Trainer
from tests.cifar_core.training import assert_same_run, make_trainer
from tests.conftest import environment

DATA = "synthetic:301"
# 271 images to train on: the eleventh batch holds a single one, so that rank 1 has none.
PLAIN = ("epochs=4", "batch_size=27", "learning_rate=0.005", "flip=alternating", "translate=2", "label_smoothing=0.1")
END_SECONDS = 60


def torchrun(*arguments, ranks=2, **variables):
    """Starts ranks with one thread each and environment variables; the output of all of them is a pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*command, *map(str, arguments)], env={**environment(), "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def start(runs, recipe, overrides, *options, ranks=2):
    """Starts the command; the run folder is below `runs`."""
    changes = [argument for override in overrides for argument in ("--set", override)]
    return torchrun(
        "-m", "cifar_core.train", recipe, *changes, "--data", DATA, "--device", "cpu", "--runs", runs, *options,
        ranks=ranks,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def folder_of(runs):
    return RunFolder(next(runs.glob("*/*")))


def wait_for_epoch(runs, process, epoch=1):
    while process.poll() is None:
        with contextlib.suppress(StopIteration):
            if len(folder_of(runs).history()) >= epoch:
                return
        time.sleep(0.002)
    pytest.fail(f"the ranks ended before epoch {epoch}: {process.communicate()[0]}")


def process_of_rank(torchrun_process, rank):
    children = psutil.Process(torchrun_process.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def assert_close_runs(one, other):
    """All weights agree within 1e-4, losses within 1e-5, and the accuracies exactly.

    Rounding can decide which of two nearly equal pixels a max-pooling passes on, which changed weights by 4e-5 (AMD
    EPYC with AVX2).
    """
    left, right = (load_checkpoint(folder.last) for folder in (one, other))
    for name, tensor in left["model"].items():
        torch.testing.assert_close(tensor, right["model"][name], rtol=0, atol=1e-4, msg=f"{name} differs")
    assert len(left["history"]) == len(right["history"])
    for line, expected in zip(left["history"], right["history"], strict=True):
        for key in line.keys() - {"seconds"}:
            tolerance = 0 if "accuracy" in key else 1e-5
            assert line[key] == pytest.approx(expected[key], rel=0, abs=tolerance), key


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A finished run of two ranks, and what they printed."""
    runs = tmp_path_factory.mktemp("two-ranks")
    output = finish(start(runs, "baseline", PLAIN))
    return folder_of(runs), output


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The same run by a single process."""
    trainer = make_trainer(load_dataset(DATA), tmp_path_factory.mktemp("alone"), "baseline", PLAIN)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    run(trainer, resume=False)
    # Training must change weights by far more than the tolerance, or a comparison would show nothing.
    assert max((tensor - before[name]).abs().max() for name, tensor in trainer.model.state_dict().items()) > 0.003
    return trainer.folder


def test_two_ranks_compute_what_one_process_computes(two_ranks, one_process):
    assert_close_runs(two_ranks[0], one_process)


def test_rank_0_alone_writes_and_prints(two_ranks, one_process):
    folder, output = two_ranks
    lines = output.splitlines()
    for start_of_line in ("seed 0", "2 ranks on cpu, threads per rank: 1", *(f"epoch  {n}/4" for n in (1, 2, 3, 4))):
        assert sum(line.startswith(start_of_line) for line in lines) == 1, output
    assert sum("finished" in line for line in lines) == 1
    names = [sorted(file.name.partition(".tfevents")[0] for file in each.path.iterdir()) for each in two_ranks[:1]]
    assert names == [sorted(file.name.partition(".tfevents")[0] for file in one_process.path.iterdir())]
    assert folder.description()["environment"]["ranks"] == 2
    assert "ranks" not in one_process.description()["environment"]


@pytest.mark.slow
def test_all_ranks_end_when_one_is_killed_and_the_run_resumes_with_the_same_bits(two_ranks, tmp_path):
    process = start(tmp_path, "baseline", PLAIN)
    wait_for_epoch(tmp_path, process)
    ranks = [process_of_rank(process, rank) for rank in (0, 1)]
    ranks[1].kill()
    began = time.monotonic()
    output, _ = process.communicate(timeout=END_SECONDS)
    assert process.returncode != 0
    assert time.monotonic() - began < END_SECONDS
    assert not any(rank.is_running() for rank in ranks)
    assert "error: rank 0: another rank has ended" in output
    assert not folder_of(tmp_path).is_finished()
    assert "resuming after epoch" in finish(start(tmp_path, "baseline", PLAIN, "--resume"))
    assert_same_run(folder_of(tmp_path), two_ranks[0])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """What two ranks, of which one alone has bf16, saw and ended with: Muon, whitening, and a bias that is frozen."""
    folder = tmp_path_factory.mktemp("recorded")
    overrides = ("widths=8,16,16", "epochs=3", "batch_size=60", "whiten_bias_epochs=1", "statistics_images=0")
    unchanged_images = ("flip=none", "translate=0")
    finish(torchrun("-m", "tests.cifar_core.rank_record", folder, "airbench94", DATA, *overrides, *unchanged_images))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)], RunFolder(folder / "run")


@pytest.mark.slow
def test_all_ranks_end_with_the_same_bits_and_the_file_holds_them(recorded):
    records, folder = recorded
    saved = load_checkpoint(folder.best)["model"]
    for name, tensor in saved.items():
        for record in records:
            assert torch.equal(record["weights"][name], tensor), name


@pytest.mark.slow
def test_each_rank_sees_its_part_and_together_they_see_every_image_once_an_epoch(recorded):
    parts = [record["images"] for record in recorded[0]]
    assert all(len(epochs) == 3 for epochs in parts)
    orders = []
    for first, second in zip(*parts, strict=True):
        # 271 images in five batches of nearly equal size
        assert [len(step) for step in first] == [28, 27, 27, 27, 27]
        assert [len(step) for step in second] == [27, 27, 27, 27, 27]
        order = [image for steps in zip(first, second, strict=True) for step in steps for image in step]
        assert len(set(order)) == len(order) == 271
        orders.append(order)
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_parts_of_a_batch_are_disjoint_and_complete_also_if_a_rank_gets_none(size):
    data = Images(torch.zeros(32, 4, 4, 3, dtype=torch.uint8), torch.arange(32))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    parts = [list(Batches(data, order, 10, part=Ranks(rank, size).part)) for rank in range(size)]
    for step, expected in enumerate(torch.split(order, 10)):
        labels = [part[step][1] for part in parts]
        assert torch.cat(labels).tolist() == expected.tolist()
        assert max(map(len, labels)) - min(map(len, labels)) <= 1


def test_the_parts_of_the_mean_add_up_and_an_empty_part_has_gradients_of_zero():
    torch.manual_seed(0)
    layer, images, labels = nn.Linear(4, 3), torch.randn(4, 4), torch.tensor([0, 2, 1, 1])
    whole = nn.functional.cross_entropy(layer(images), labels)
    (expected,) = torch.autograd.grad(whole, layer.weight)
    loss, gradient = torch.zeros(()), torch.zeros_like(layer.weight)
    for rank in range(5):
        ranks = Ranks(rank, 5)
        own, own_labels = ranks.part(images), ranks.part(labels)
        part = ranks.part_of_mean(nn.functional.cross_entropy(layer(own), own_labels), len(own), 4)
        loss, gradient = loss + part, gradient + torch.autograd.grad(part, layer.weight)[0]
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(gradient, expected)


def test_dropout_draws_differ_between_ranks_and_steps_and_repeat_for_the_same_ones():
    def draws(rank, step, seed=0):
        Ranks(rank, 2).seed_step(seed, step)
        return torch.rand(4).tolist()

    assert draws(0, 3) == draws(0, 3)
    assert len({tuple(draws(*place)) for place in ((0, 3), (1, 3), (0, 4), (1, 4), (0, 3, 1))}) == 5
    torch.manual_seed(7)
    expected = torch.rand(4).tolist()
    torch.manual_seed(7)
    ALONE.seed_step(0, 3)
    assert torch.rand(4).tolist() == expected


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert number_of_ranks() == 1
    with join_ranks("cpu") as (ranks, device):
        assert (ranks, device) == (ALONE, CPU)
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("size", ["", "two"])
def test_a_number_of_ranks_that_is_no_number_is_refused(monkeypatch, size):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(RankError, match=r"but WORLD_SIZE is .*start the ranks with torchrun"):
        number_of_ranks()


@pytest.fixture
def second_of_two(monkeypatch):
    """The environment of the second of two ranks."""
    values = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("second_of_two")
def test_more_ranks_than_cuda_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="2 ranks need a CUDA device each, but this machine has 1; start 1"):
        join_ranks("cuda").__enter__()


@pytest.mark.usefixtures("second_of_two")
def test_a_sweep_under_torchrun_is_refused():
    with pytest.raises(SweepError, match=r"torchrun started this sweep 2 times.*python -m cifar_core\.sweep"):
        sweep(["baseline", "--seeds", "0", "--data", DATA])


def test_batches_too_small_for_batch_normalisation_on_so_many_ranks_are_refused(small, tmp_path):
    recipe = get_recipe("sprint", ["batch_size=4"])
    with pytest.raises(RankError, match=r"smallest batch has 3 images, 1 for some of the 2 ranks.*at most 1 ranks"):
        Trainer(recipe, small, RunFolder(tmp_path), 0, CPU, "fp32", ranks=Ranks(0, 2))


@pytest.mark.parametrize(("variables", "chosen"), [({}, False), ({"OMP_NUM_THREADS": "1"}, True)])
def test_the_number_of_threads_counts_as_chosen_only_if_torchrun_was_started_with_it(monkeypatch, variables, chosen):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun sets it for its children
    with subprocess.Popen(["/bin/cat"], env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(b"\n")
        parent.stdin.flush()
        parent.stdout.readline()  # from here on it has its own environment, and not that of this process
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        found = user_chose_threads()
    assert found == chosen


DROPOUT = ("epochs=4", "batch_size=2")
# Part of an epoch of such small batches, so that a signal arrives within an epoch and not at its end.
WITHIN_AN_EPOCH = 0.2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_the_state_and_the_run_resumes_with_the_same_bits(tmp_path, number):
    finish(start(tmp_path / "whole", "dropout-0.2", DROPOUT))
    process = start(tmp_path / "parts", "dropout-0.2", DROPOUT)
    wait_for_epoch(tmp_path / "parts", process)
    time.sleep(WITHIN_AN_EPOCH)
    process.send_signal(number)
    output, _ = process.communicate(timeout=END_SECONDS)
    assert process.returncode != 0
    assert output.count(f"stopped by {number.name} after epoch") == 1, output
    assert load_checkpoint(folder_of(tmp_path / "parts").last)["epoch"] < 4
    assert "resuming after epoch" in finish(start(tmp_path / "parts", "dropout-0.2", DROPOUT, "--resume"))
    assert_same_run(folder_of(tmp_path / "parts"), folder_of(tmp_path / "whole"))


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    process = start(tmp_path, "dropout-0.2", DROPOUT)
    wait_for_epoch(tmp_path, process)
    time.sleep(WITHIN_AN_EPOCH)
    process_of_rank(process, 1).terminate()
    output, _ = process.communicate(timeout=END_SECONDS)
    assert output.count("stopped by SIGTERM after epoch") == 1, output
    assert "another rank has ended" not in output


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all(tmp_path):
    finish(start(tmp_path, "baseline", PLAIN))
    with folder_of(tmp_path).lock():  # only rank 0 locks the folder
        output, _ = (process := start(tmp_path, "baseline", PLAIN, "--resume")).communicate(timeout=END_SECONDS)
    assert process.returncode != 0
    assert "another process is training in this folder" in output


@pytest.mark.slow
def test_ranks_with_different_values_are_refused(tmp_path):
    options = f"baseline --data {DATA} --device cpu --runs {tmp_path} --seed $RANK"
    process = torchrun("--no-python", "sh", "-c", f"{sys.executable} -m cifar_core.train {options}")
    output, _ = process.communicate(timeout=END_SECONDS)
    assert process.returncode != 0
    assert "the ranks have different values, data or weights" in output
    assert not list(tmp_path.rglob("recipe.json"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_ranks_with_the_same_message(tmp_path):
    output, _ = (process := start(tmp_path, "deep", ["learning_rate=1e30"])).communicate(timeout=END_SECONDS)
    assert process.returncode != 0
    assert "epoch 1, step 2 of 9, learning rate 1e+30" in output
    assert not list(tmp_path.rglob("last.pt"))


@pytest.mark.slow
def test_torchrun_restarts_ranks_that_continue_from_the_last_checkpoint(tmp_path):
    command = ("-m", "cifar_core.train", "baseline", "--data", DATA, "--runs", tmp_path, "--resume")
    # Without this variable, restarted ranks would look for the addresses of those before them.
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = torchrun("--max-restarts=1", *command, "--set", "epochs=20", "--device", "cpu", **variables)
    wait_for_epoch(tmp_path, process)
    process_of_rank(process, 1).kill()
    assert "resuming after epoch" in finish(process)
    assert folder_of(tmp_path).is_finished()


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, one_process):
    process = start(tmp_path, "baseline", PLAIN)
    wait_for_epoch(tmp_path, process)
    process.terminate()
    process.communicate(timeout=END_SECONDS)
    assert "another number of ranks" in finish(start(tmp_path, "baseline", PLAIN, "--resume", ranks=3))
    assert_close_runs(folder_of(tmp_path), one_process)


@pytest.mark.slow
def test_two_ranks_learn_from_trained_weights_and_a_teacher_as_one_process_does(tmp_path, one_process):
    options = ("--init", one_process.path, "--teacher", one_process.path)
    overrides = ("epochs=2", "batch_size=50", "learning_rate=0.01", "distillation=0.5", "flip=random")
    finish(start(tmp_path / "two", "baseline", overrides, *options))
    finish(start(tmp_path / "one", "baseline", overrides, *options, ranks=1))
    assert (folder_of(tmp_path / "two").path / "teacher.npz").exists()
    assert_close_runs(folder_of(tmp_path / "two"), folder_of(tmp_path / "one"))
