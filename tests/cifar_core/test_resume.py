import dataclasses
import json
import signal

import pytest
import torch

from cifar_core.run_folder import RunError, RunFolder, load_checkpoint
from cifar_core.stop_signal import Interrupted, StopSignal
from cifar_core.train import run
from tests.cifar_core.runs import number_layers
from tests.cifar_core.training import assert_same_run, make_trainer


@pytest.mark.parametrize(
    ("stop_after", "hard_share"),
    [pytest.param(1, 1, marks=pytest.mark.slow), (13, 1), (13, 0.5), pytest.param(24, 1, marks=pytest.mark.slow)],
)
def test_our_own_recipes_resume_with_the_same_bits(small, tmp_path, stop_after, hard_share):
    """The run is stopped in an epoch of small images or in one of full size."""
    overrides = ("epochs=3", "batch_size=27", "sizes=20:1", "cutout=8", f"hard_share={hard_share}")
    through = make_trainer(small, tmp_path / "through", "sprint", overrides)
    run(through, resume=False)
    stopped = make_trainer(small, tmp_path / "stopped", "sprint", overrides)
    steps, train_step = 0, stopped.train_step

    def step_and_stop(images, labels):
        nonlocal steps
        train_step(images, labels)
        steps += 1
        if steps == stop_after:
            signal.raise_signal(signal.SIGTERM)

    stopped.train_step = step_and_stop
    with pytest.raises(Interrupted):
        run(stopped, resume=False)
    run(make_trainer(small, tmp_path / "stopped", "sprint", overrides), resume=True)
    assert_same_run(through.folder, stopped.folder)


def test_a_run_whose_recipe_was_saved_by_an_earlier_version_is_resumed(small, tmp_path):
    run(make_trainer(small, tmp_path), resume=False)
    description = RunFolder(tmp_path).description()
    for key in ("optimizer", "width"):
        del description["recipe"][key]
    description["recipe"]["sizes"] = ""
    RunFolder(tmp_path).write_description(description)
    run(make_trainer(small, tmp_path), resume=True)
    description["recipe"]["momentum"] = 0.5
    RunFolder(tmp_path).write_description(description)
    with pytest.raises(RunError, match="was started with recipe"):
        run(make_trainer(small, tmp_path), resume=True)


def test_a_run_stopped_within_an_epoch_resumes_at_the_next_step(small, tmp_path):
    whole = make_trainer(small, tmp_path / "whole")
    run(whole, resume=False)
    parts = make_trainer(small, tmp_path / "parts")
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
    again = make_trainer(small, tmp_path / "parts")
    run(again, resume=True)
    assert_same_run(again.folder, whole.folder)


def test_an_existing_run_is_not_overwritten(small, tmp_path):
    run(make_trainer(small, tmp_path), resume=False)
    with pytest.raises(RunError, match="holds a run already; continue it with --resume"):
        run(make_trainer(small, tmp_path), resume=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"precision": "bf16"}, "precision fp32"), ({"overrides": ("epochs=3",)}, "recipe"), ({"seed": 1}, "seed 0")],
)
def test_a_run_with_another_recipe_seed_or_precision_is_not_resumed(small, tmp_path, change, named):
    run(make_trainer(small, tmp_path), resume=False)
    with pytest.raises(RunError, match=f"was started with {named}"):
        run(make_trainer(small, tmp_path, **change), resume=True)


@pytest.mark.parametrize(
    "change", ["network", "no optimizer", "shapes", "best.pt", "rng", "history", "momentum", "seed"]
)
def test_a_checkpoint_that_is_not_a_state_of_the_run_is_refused(small, tmp_path, change):
    trainer = make_trainer(small, tmp_path / "run")
    run(trainer, resume=False)
    saved = load_checkpoint(trainer.folder.last)
    named = "this is not a state of this run"
    if change == "network":
        saved["model"] = make_trainer(small, tmp_path / "other", "deep").model.state_dict()
    elif change == "no optimizer":
        del saved["optimizer"]
    elif change == "shapes":
        saved["losses"] = torch.zeros(1, 2, 3)
    elif change == "best.pt":
        saved = load_checkpoint(trainer.folder.best)
    elif change == "history":
        saved["history"] = saved["history"][:1]
    elif change == "momentum":
        saved["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    elif change == "seed":
        saved["seed"] = 7
        named = "was started with seed 7, not 0"
    else:
        saved["rng"] = "four"
    torch.save(saved, trainer.folder.last)
    with pytest.raises(RunError, match=rf"last\.pt: .*{named}"):
        run(make_trainer(small, tmp_path / "run"), resume=True)


def test_a_run_is_resumed_with_the_same_data_under_another_name_but_not_with_other_data(small, tmp_path):
    run(make_trainer(small, tmp_path), resume=False)
    run(make_trainer(dataclasses.replace(small, name="moved"), tmp_path), resume=True)
    with pytest.raises(RunError, match="was started with data"):
        run(make_trainer(dataclasses.replace(small, fingerprint="other"), tmp_path), resume=True)


@pytest.mark.parametrize("name", ["dropout-0.2", "sprint", "deep-fast"])
def test_a_checkpoint_from_before_layers_had_names_is_resumed_with_the_same_bits(small, tmp_path, name):
    overrides = ["epochs=2", "batch_size=45"] + ([] if name == "dropout-0.2" else ["sizes=20:1"])
    whole = make_trainer(small, tmp_path / "whole", name, overrides)
    run(whole, resume=False)
    earlier = make_trainer(small, tmp_path / "earlier", name, overrides)
    with earlier.folder.lock(), StopSignal() as stop:
        earlier.start(resume=False)
        next(earlier.epochs(stop))
    for file in (earlier.folder.last, earlier.folder.best):
        checkpoint = load_checkpoint(file)
        torch.save(checkpoint | {"model": number_layers(checkpoint["model"])}, file)
    resumed = make_trainer(small, tmp_path / "earlier", name, overrides)
    run(resumed, resume=True)
    for key, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[key]), key
    histories = [[{**line, "seconds": 0} for line in trainer.state.history] for trainer in (whole, resumed)]
    assert histories[0] == histories[1]


def test_a_finished_run_without_its_last_state_stays_finished(small, tmp_path):
    history = run(make_trainer(small, tmp_path), resume=False)
    RunFolder(tmp_path).last.unlink()
    best = RunFolder(tmp_path).best.read_bytes()
    assert run(make_trainer(small, tmp_path), resume=True) == history
    assert RunFolder(tmp_path).best.read_bytes() == best


def test_an_unfinished_run_without_its_last_state_is_not_trained_from_the_start(small, tmp_path):
    trainer = make_trainer(small, tmp_path)
    with trainer.folder.lock(), StopSignal() as stop:
        trainer.start(resume=False)
        next(trainer.epochs(stop))
    trainer.folder.last.unlink()
    with pytest.raises(RunError, match=r"last\.pt: this file of the run is missing"):
        run(make_trainer(small, tmp_path), resume=True)
    assert len(trainer.folder.history()) == 1


def test_a_folder_that_lost_its_description_is_not_trained_in(small, tmp_path):
    run(make_trainer(small, tmp_path), resume=False)
    (tmp_path / "recipe.json").unlink()
    best = RunFolder(tmp_path).best.read_bytes()
    for resume in (False, True):
        with pytest.raises(RunError, match=r"holds a run already|recipe\.json: this file of the run is missing"):
            run(make_trainer(small, tmp_path), resume=resume)
    assert RunFolder(tmp_path).best.read_bytes() == best


@pytest.mark.parametrize(
    ("lost", "epochs", "message"),
    [
        (("last.pt", "history.jsonl"), 2, r"last\.pt: this file of the run is missing"),
        (("last.pt", "best.pt"), 3, r"best\.pt: this file of the run is missing"),
        (("best.pt",), 3, r"best\.pt: this file of the run is missing"),
        (("recipe.json",), 2, r"recipe\.json: this file of the run is missing"),
    ],
)
def test_a_run_that_lost_files_is_not_trained_from_the_start(small, tmp_path, lost, epochs, message):
    trainer = make_trainer(small, tmp_path, overrides=("epochs=3", "weights=last"))
    with trainer.folder.lock(), StopSignal() as stop:
        trainer.start(resume=False)
        for _ in zip(trainer.epochs(stop), range(epochs), strict=False):
            pass
    for name in lost:
        (tmp_path / name).unlink()
    kept = {file: file.read_bytes() for file in tmp_path.glob("*.pt")}
    with pytest.raises(RunError, match=message):
        run(make_trainer(small, tmp_path, overrides=("epochs=3", "weights=last")), resume=True)
    assert {file: file.read_bytes() for file in tmp_path.glob("*.pt")} == kept


def test_a_run_that_was_killed_while_it_first_saved_starts_anew(small, tmp_path):
    run(make_trainer(small, tmp_path / "whole"), resume=False)
    trainer = make_trainer(small, tmp_path / "killed")
    with trainer.folder.lock(), StopSignal() as stop:
        trainer.start(resume=False)
        next(trainer.epochs(stop))
    for name in ("last.pt", "history.jsonl"):
        (tmp_path / "killed" / name).unlink()
    run(make_trainer(small, tmp_path / "killed"), resume=True)
    assert_same_run(RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed"))


def test_a_finished_run_in_a_folder_that_cannot_be_written_to_stays_finished(small, tmp_path):
    history = run(make_trainer(small, tmp_path), resume=False)
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()  # now the folder cannot be locked, as on a read-only file system
    assert run(make_trainer(small, tmp_path), resume=True) == history
    with pytest.raises(RunError, match="cannot be written to"):
        run(make_trainer(small, tmp_path), resume=False)


def damage(folder, content):
    (folder / "history.jsonl").write_bytes(content)


@pytest.mark.parametrize("content", [b"damaged", b""])
@pytest.mark.parametrize("blocked", [".lock", ".history.jsonl.partial"])
def test_a_finished_run_with_a_damaged_history_that_cannot_be_written_stays_finished(
    small, tmp_path, caplog, content, blocked
):
    history = run(make_trainer(small, tmp_path), resume=False)
    damage(tmp_path, content)
    (tmp_path / ".lock").unlink()
    (tmp_path / blocked).mkdir()  # now it cannot be written, as on a read-only file system
    assert run(make_trainer(small, tmp_path), resume=True) == history
    assert (tmp_path / "history.jsonl").read_bytes() == content
    assert "history.jsonl: this file cannot be written anew, and is left as it is" in caplog.text


def test_the_history_of_a_finished_run_is_mended_only_under_the_lock(small, tmp_path, caplog):
    history = run(make_trainer(small, tmp_path), resume=False)
    damage(tmp_path, b"damaged")
    with RunFolder(tmp_path).lock():
        assert run(make_trainer(small, tmp_path), resume=True) == history
    assert (tmp_path / "history.jsonl").read_bytes() == b"damaged"
    assert "another process is training in this folder" in caplog.text
    run(make_trainer(small, tmp_path), resume=True)
    caplog.clear()
    assert RunFolder(tmp_path).history() == history
    assert not caplog.text


def test_a_run_whose_recipe_this_version_cannot_read_is_named(small, tmp_path):
    run(make_trainer(small, tmp_path), resume=False)
    description = RunFolder(tmp_path).description()
    description["recipe"]["layers"] = 3
    RunFolder(tmp_path).write_description(description)
    with pytest.raises(RunError, match=rf"{tmp_path}: this version has no recipe value 'layers'"):
        run(make_trainer(small, tmp_path), resume=True)


@pytest.mark.parametrize("content", [b"damaged", b"", None])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_damaged_history_is_written_again_from_the_last_state(small, tmp_path, epochs, content):
    trainer = make_trainer(small, tmp_path)
    with trainer.folder.lock(), StopSignal() as stop:
        trainer.start(resume=False)
        for _ in zip(range(epochs), trainer.epochs(stop), strict=False):
            pass
    before = trainer.folder.history()
    (tmp_path / "history.jsonl").unlink()
    if content is not None:
        damage(tmp_path, content)
    assert run(make_trainer(small, tmp_path), resume=True)[:epochs] == before
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[:epochs]] == before
    assert len(lines) == 2
