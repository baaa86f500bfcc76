import dataclasses

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from cifar_core.data import Batches, Images, epoch_generator, split, subset_sampler
from cifar_core.device import CPU, DeviceError, choose_device, default_precision
from cifar_core.models import BaselineConvNet, WhitenedConvNet
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder, load_checkpoint
from cifar_core.stop_signal import StopSignal
from cifar_core.train import run
from cifar_core.trainer import Trainer, TrainingError
from tests.cifar_core.training import make_trainer


def test_a_run_writes_a_complete_run_folder(small, tmp_path, capsys):
    history = run(make_trainer(small, tmp_path), resume=False)
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


def test_loss_and_accuracy_are_printed_every_200_steps_and_written_as_events(small, tmp_path, capsys):
    run(make_trainer(small, tmp_path, overrides=("epochs=2", "batch_size=1")), resume=False)
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
    """Without dropout, the weights are those of a simple loop after every step."""
    ours = make_trainer(small, tmp_path, "baseline", ("epochs=2", "learning_rate=0.05"), seed=7)
    run(ours, resume=False)

    torch.manual_seed(7)
    model = BaselineConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train_indices, validation_indices = split(len(small.train))
    for epoch in range(2):
        total, correct = 0.0, 0
        for images, labels in Batches(small.train, subset_sampler(train_indices, epoch_generator(7, epoch)), 32):
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
        line = ours.state.history[epoch]
        assert line["train_loss"] == pytest.approx(total / len(train_indices), rel=1e-4)
        assert line["train_accuracy"] == pytest.approx(correct / len(train_indices), abs=0.02)
        with torch.inference_mode():
            expected = nn.functional.cross_entropy(
                model(small.train.images[validation_indices]), small.train.labels[validation_indices]
            )
        assert line["validation_loss"] == pytest.approx(float(expected), rel=1e-3)
    for own, expected in zip(ours.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-2, atol=1e-3)


def ordered_by_class(small):
    """The training images, class after class, as a folder holds them."""
    order = torch.argsort(small.train.labels, stable=True)
    train = Images(small.train.images[order], small.train.labels[order])
    return dataclasses.replace(small, train=train, fingerprint="ordered")


def test_whitening_uses_a_random_sample_of_all_classes(small, tmp_path, monkeypatch):
    monkeypatch.setattr("cifar_core.trainer.WHITENING_IMAGES", 60)
    ordered = ordered_by_class(small)
    seen = []
    init_whiten = WhitenedConvNet.init_whiten
    monkeypatch.setattr(
        WhitenedConvNet, "init_whiten", lambda model, images: (seen.append(images), init_whiten(model, images))
    )
    for seed in (0, 0, 1):
        make_trainer(ordered, tmp_path, "sprint", seed=seed)
    labels = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(ordered.train.images, ordered.train.labels, strict=True)
    }
    assert len({labels[image.numpy().tobytes()] for image in seen[0]}) == 10
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    _, held_out = split(300)
    kept = {ordered.train.images[row].numpy().tobytes() for row in held_out}
    assert not kept & {image.numpy().tobytes() for image in seen[0]}


@pytest.mark.parametrize("name", ["sprint", "deep-fast"])
def test_a_remainder_of_one_image_neither_fails_nor_makes_a_batch_of_its_own(small, tmp_path, name):
    # 270 training images in batches of 269: a last batch of one image could not be normalised.
    overrides = ["epochs=1", "batch_size=269", "sizes="]
    (line,) = run(make_trainer(small, tmp_path, name, overrides), resume=False)
    assert line["train_loss"] > 0
    ours = make_trainer(small, tmp_path / "again", name, overrides)
    assert [len(labels) for _, labels in ours.batches()] == [135, 135]


def test_the_weights_of_the_last_epoch_are_kept_if_the_recipe_says_so(small, tmp_path):
    overrides = ["epochs=3", "batch_size=27", "sizes=", "validated_epochs=1"]
    ours = make_trainer(small, tmp_path, "sprint", overrides)
    history = run(ours, resume=False)
    assert [line["validation_accuracy"] is None for line in history] == [True, True, False]
    best = load_checkpoint(RunFolder(tmp_path).best)
    assert best["epoch"] == 3
    assert all(torch.equal(best["model"][key], tensor) for key, tensor in ours.model.state_dict().items())


def test_a_whitening_bias_is_trained_for_the_first_epochs_only(small, tmp_path):
    ours = make_trainer(
        small, tmp_path, "airbench94", ("epochs=3", "batch_size=27", "widths=4,8,8", "whiten_bias_epochs=1")
    )
    seen = [ours.model.whiten.bias.detach().clone()]
    with ours.folder.lock(), StopSignal() as stop:
        ours.start(resume=False)
        seen += [ours.model.whiten.bias.detach().clone() for _ in ours.epochs(stop)]
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])


def test_statistics_of_batch_normalisation_are_those_of_the_training_images_if_recomputed(small, tmp_path):
    overrides = ["epochs=1", "batch_size=27", "sizes=", "width=4", "statistics_images=1000"]
    ours = make_trainer(small, tmp_path, "sprint", overrides)
    run(ours, resume=False)
    model = ours.model.eval()
    images = small.train.images[ours.train_indices]
    with torch.inference_mode():
        white = nn.functional.relu(model.whiten(model.normalise(images)))
        first = model.blocks[0].pool(model.blocks[0].conv1(white))
    torch.testing.assert_close(model.blocks[0].norm1.running_mean, first.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.blocks[0].norm1.running_var, first.var((0, 2, 3)), rtol=1e-2, atol=1e-4)
    assert model.blocks[0].norm1.momentum == 0.4


def test_held_out_images_are_never_trained_on(small, tmp_path):
    ours = make_trainer(small, tmp_path, overrides=("epochs=1", "batch_size=270"))
    _, held_out = split(len(small.train))
    seen = {image.numpy().tobytes() for images, _ in ours.batches() for image in images}
    assert not seen & {small.train.images[row].numpy().tobytes() for row in held_out}
    assert len(seen) == 270


@pytest.mark.parametrize("overrides", [("epochs=1", "sampler=weighted"), ("epochs=1", "model=deep")])
def test_every_kind_of_recipe_trains(small, tmp_path, overrides):
    (line,) = run(make_trainer(small, tmp_path, overrides=overrides), resume=False)
    assert 0 < line["train_loss"] < 3


@pytest.mark.parametrize("name", ["sprint", "deep-fast", "best"])
def test_our_own_recipes_learn(small, tmp_path, name):
    overrides = ["epochs=4", "batch_size=27", "sizes=24:2", "cutout=8", "brightness=0.1", "contrast=0.1"] + (
        ["widths=8,32,64"] if name == "best" else []
    )
    precision = default_precision(get_recipe(name), CPU)
    history = run(make_trainer(small, tmp_path, name, overrides, precision=precision), resume=False)
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.3
    assert history[-1]["train_accuracy"] > 0.5
    rates = [line["learning_rate"] for line in history]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.02 * get_recipe(name).learning_rate


def test_the_first_epochs_use_smaller_images_and_all_images_are_augmented(small, tmp_path):
    ours = make_trainer(small, tmp_path, "sprint", ("sizes=20:1,24:2", "epochs=4", "batch_size=270", "translate=0"))
    seen = []
    for epoch in range(4):
        ours.state.epoch = epoch
        ((images, labels),) = ours.batches()
        assert len(labels) == 270
        seen.append(images)
    assert [tuple(images.shape[1:3]) for images in seen] == [(20, 20), (24, 24), (24, 24), (32, 32)]
    originals = {image.numpy().tobytes() for image in small.train.images}
    straight = [image.numpy().tobytes() in originals for image in seen[3]]
    mirrored = [image.flip(1).numpy().tobytes() in originals for image in seen[3]]
    assert all(first or second for first, second in zip(straight, mirrored, strict=True))
    assert 0 < sum(straight) < 270


def test_bf16_trains_and_the_saved_weights_are_in_fp32(small, tmp_path):
    history = run(
        make_trainer(small, tmp_path, overrides=("epochs=5", "batch_size=8", "learning_rate=0.01"), precision="bf16"),
        resume=False,
    )
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.3
    tensors = load_checkpoint(RunFolder(tmp_path).best)["model"].values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_another_seed_gives_another_model(small, tmp_path):
    first, second = (run(make_trainer(small, tmp_path / str(seed), seed=seed), resume=False) for seed in (0, 1))
    assert first[-1]["train_loss"] != second[-1]["train_loss"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_requesting_cuda_without_a_cuda_device_is_an_error():
    with pytest.raises(DeviceError, match="finds no CUDA device"):
        choose_device("cuda")
    assert choose_device("auto") == CPU


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(small, tmp_path):
    ours = make_trainer(small, tmp_path, overrides=("epochs=3",))
    with ours.folder.lock(), StopSignal() as stop:
        ours.start(resume=False)
        epochs = ours.epochs(stop)
        next(epochs)
        before = ours.folder.last.read_bytes()
        ours.state.optimizer.param_groups[0]["lr"] = 1e30
        with pytest.raises(TrainingError) as caught:
            next(epochs)
    message = str(caught.value)
    # The loss of the first step is computed before its update destroys the weights.
    assert "the loss is nan at epoch 2, step 2 of 9, learning rate 0.001" in message or "loss is inf" in message
    assert "is from before this" in message
    assert "--set learning_rate=0.0001" in message
    assert ours.folder.last.read_bytes() == before
    assert len(ours.folder.history()) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dropout-0.2", ["epochs=3", "learning_rate=0.02"]),
        ("sprint", ["epochs=3", "sizes=20:1", "batch_size=50", "precision=fp32"]),
        ("deep-fast", ["epochs=3", "sizes=24:2", "batch_size=50", "precision=fp32", "validated_epochs=0"]),
        ("best", ["epochs=3", "widths=4,8,8", "batch_size=50", "precision=fp32", "statistics_images=100"]),
    ],
)
def test_training_on_cuda_learns_and_resumes(small, tmp_path, name, changes):
    recipe = get_recipe(name, changes)
    ours = Trainer(recipe, small, RunFolder(tmp_path), 0, torch.device("cuda"), "fp32")
    with ours.folder.lock(), StopSignal() as stop:
        ours.start(resume=False)
        next(ours.epochs(stop))
    again = Trainer(recipe, small, RunFolder(tmp_path), 0, torch.device("cuda"), "fp32")
    history = run(again, resume=True)
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_shifts_and_squares_shrink_with_the_images(small, tmp_path):
    overrides = ("epochs=4", "sizes=16:2", "translate=4", "cutout=12")
    trainer = make_trainer(small, tmp_path, "deep-fast", overrides)
    for epoch, translate, cutout in ((0, 2, 6), (2, 4, 12)):
        trainer.state.epoch = epoch
        trainer.batches()
        augmentation = trainer.epoch_batches.augmentation
        assert (augmentation.translate, augmentation.cutout) == (translate, cutout)
