import dataclasses

import numpy as np
import pytest
import torch

from cifar_core.device import CPU
from cifar_core.manifest import read_manifest
from cifar_core.predictors import Predictor, predict_all
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder
from cifar_core.teacher import Teacher, TeacherError, distillation_loss, read_teacher
from cifar_core.train import run
from cifar_core.trainer import Trainer
from tests.cifar_core.training import make_trainer
from tests.conftest import REPOSITORY

SMALL = ["epochs=2", "batch_size=27", "sizes=", "validated_epochs=0"]


@pytest.fixture(scope="module")
def teacher_run(small, tmp_path_factory):
    trainer = make_trainer(small, tmp_path_factory.mktemp("teacher"), "sprint", ("epochs=4", "batch_size=27", "sizes="))
    run(trainer, resume=False)
    return trainer.folder


def student(small, path, teacher, *overrides, precision="fp32"):
    recipe = get_recipe("deep-fast", [*SMALL, *overrides])
    return Trainer(recipe, small, RunFolder(path), 0, CPU, precision, teacher=teacher)


def test_the_loss_is_least_for_the_probabilities_of_the_teacher():
    teacher = torch.tensor([[2.0, 0.0, -1.0]])
    least = distillation_loss(teacher + 5, teacher)
    assert float(least) == pytest.approx(float(-(teacher.softmax(1) * teacher.log_softmax(1)).sum()))
    assert distillation_loss(teacher + torch.tensor([[0.5, 0.0, 0.0]]), teacher) > least


def test_each_batch_has_the_logits_of_its_images_as_they_are_mirrored(small, teacher_run, tmp_path):
    ours = student(small, tmp_path, read_teacher(teacher_run.path, CPU), "distillation=0.9", "translate=0", "cutout=0")
    tmp_path.mkdir(exist_ok=True)
    for epoch in (0, 1):
        ours.state.epoch = epoch
        ours._start_epoch()
        images, _, logits = next(iter(ours.batches()))
        expected, _ = predict_all(ours.teacher.predictor, images.numpy())
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_the_teacher_computes_in_the_precision_of_the_run(small, teacher_run, tmp_path):
    logits = {}
    for precision in ("fp32", "bf16"):
        ours = student(
            small, tmp_path / precision, read_teacher(teacher_run.path, CPU), "distillation=0.9", precision=precision
        )
        ours.folder.path.mkdir()
        ours._start_epoch()
        logits[precision] = ours.epoch_batches.teacher_logits
    rounding = (logits["bf16"] - logits["fp32"]).abs() / logits["fp32"].abs().max()
    assert 1e-5 < float(rounding.max()) < 0.05


def test_a_run_with_a_teacher_computes_its_outputs_once(small, teacher_run, tmp_path, monkeypatch):
    teacher = read_teacher(teacher_run.path, CPU)
    first = run(student(small, tmp_path, teacher, "distillation=0.9"), resume=False)
    assert first[-1]["train_loss"] < first[0]["train_loss"]
    monkeypatch.setattr("cifar_core.teacher.predict_all", lambda *_: pytest.fail("computed again"))
    again = teacher.logits(small.train.images, tmp_path / "teacher.npz")
    assert again.shape == (2, 300, 10)
    assert run(student(small, tmp_path, teacher, "distillation=0.9"), resume=True) == first


def constant(answer, digest):
    """A teacher that gives this logit to every image and class."""

    def predict(images):
        logits = np.full((len(images), 10), answer, np.float32)
        return logits, logits

    return Teacher(Predictor("constant", tuple("0123456789"), predict, None, ""), digest)


def test_kept_outputs_of_another_teacher_or_of_another_number_of_images_are_computed_again(tmp_path):
    images, file = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), tmp_path / "teacher.npz"
    assert (constant(1, "a").logits(images, file) == 1).all()
    assert (constant(2, "a").logits(images, file) == 1).all()  # of the same weights: those that are kept
    assert (constant(3, "b").logits(images, file) == 3).all()
    for count in (3, 5):
        more = torch.zeros(count, 32, 32, 3, dtype=torch.uint8)
        assert constant(count, "b").logits(more, file).shape == (2, count, 10)
        assert (constant(9, "b").logits(more, file) == count).all()  # they replaced the others
    np.savez(file, teacher=np.asarray("b"), logits=np.zeros((1, 4, 10), np.float32))  # without the mirrored images
    assert constant(4, "b").logits(images, file).shape == (2, 4, 10)


def encrypted(archive: bytes) -> bytes:
    """A zip archive whose directory says that its files are encrypted."""
    entry = archive.index(b"PK\x01\x02")
    return archive[: entry + 8] + b"\x01" + archive[entry + 9 :]


@pytest.mark.parametrize(
    "damage", ["empty", "cut off", "encrypted", "not written by this library", "without the teacher"]
)
def test_damaged_outputs_of_a_teacher_are_computed_again(tmp_path, damage):
    images, file = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), tmp_path / "teacher.npz"
    constant(1, "a").logits(images, file)
    whole = file.read_bytes()
    if damage == "without the teacher":
        np.savez(file, logits=np.ones((2, 4, 10), np.float32))
    else:
        damaged = {"empty": b"", "cut off": whole[: len(whole) // 2], "encrypted": encrypted(whole)}
        file.write_bytes(damaged.get(damage, b"text"))
    assert (constant(2, "a").logits(images, file) == 2).all()
    assert (constant(3, "a").logits(images, file) == 2).all()


def test_a_teacher_that_is_missing_not_wanted_or_of_other_classes_is_refused(small, teacher_run, tmp_path):
    teacher = read_teacher(teacher_run.path, CPU)
    with pytest.raises(TeacherError, match="name a teacher with --teacher RUN"):
        student(small, tmp_path, None, "distillation=0.5")
    with pytest.raises(TeacherError, match="has no distillation"):
        student(small, tmp_path, teacher)
    other = dataclasses.replace(teacher, predictor=dataclasses.replace(teacher.predictor, classes=("cat", "dog")))
    with pytest.raises(TeacherError, match="has the classes cat, dog, but"):
        student(small, tmp_path, other, "distillation=0.5")


def test_a_teacher_that_was_trained_on_images_that_the_run_holds_out_is_refused(small, teacher_run, tmp_path):
    teacher = read_teacher(teacher_run.path, CPU)  # of 300 images, both hold out 30
    with pytest.raises(
        TeacherError,
        match=r"on \d+ of the 30 images .*with --set validation_images=1000 --set split_seed=0",
    ):
        student(small, tmp_path, teacher, "distillation=0.9", "split_seed=1")
    fewer = student(small, tmp_path, teacher, "distillation=0.9", "validation_images=20")
    assert len(fewer.validation) == 20
    elsewhere = dataclasses.replace(teacher, predictor=dataclasses.replace(teacher.predictor, trained_on="others"))
    student(small, tmp_path, elsewhere, "distillation=0.9", "split_seed=1")


def test_the_folder_of_an_export_is_a_teacher():
    teacher = read_teacher(REPOSITORY / "exported", CPU)
    assert teacher.digest == read_manifest(REPOSITORY / "exported").variant("fp32").sha256
    assert teacher.predictor.name.startswith("deep-distilled-0-")
