import copy

import pytest
import torch

from cifar_core.device import CPU
from cifar_core.distributed import RankError, Ranks
from cifar_core.hard_images import HardImages, trained_images
from cifar_core.predictors import Predictor
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder, load_checkpoint
from cifar_core.teacher import Teacher
from cifar_core.train import run
from cifar_core.trainer import Trainer, TrainingError
from tests.cifar_core.training import make_trainer

CLASSES = 4


def striped(count, seed=0):
    """Images whose class is the quarter of the image that is light, uint8 [N, 32, 32, 3], and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    images = torch.randint(0, 100, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        image[8 * label : 8 * label + 8] += 120
    return images, labels


def chooser(share=0.7):
    torch.manual_seed(0)
    return HardImages(get_recipe("sprint", [f"hard_share={share}"]), CLASSES, striped(200)[0], bf16=False)


def test_images_with_wrong_labels_are_found():
    hard_images = chooser()
    for step in range(40):
        images, labels = striped(120, seed=step)
        labels[::12] = (labels[::12] + 1) % CLASSES  # 10 of them
        chosen = hard_images.choose(images, labels, step, 80)
    assert len(chosen) == 84
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(range(0, 120, 12)) <= set(chosen.tolist())


def test_the_small_network_is_trained_in_every_fourth_step_on_the_chosen_images():
    hard_images, (images, labels) = chooser(), striped(40)
    changed = []
    for step in range(8):
        before = hard_images.to_dict()["model"]["head.weight"].clone()
        hard_images.choose(images, labels, step, 80)
        changed.append(not torch.equal(before, hard_images.to_dict()["model"]["head.weight"]))
    assert changed == [True, False, False, False] * 2


@pytest.mark.parametrize(
    ("share", "batch", "expected"),
    [(1, 100, 100), (0.5, 100, 50), (0.5, 101, 51), (0.01, 100, 2), (0.3, 1, 1), (0.55, 100, 55)],
)
def test_the_share_of_a_batch_is_rounded_up_and_normalisation_has_two_images(share, batch, expected):
    assert trained_images(get_recipe("best", [f"hard_share={share}"]), batch) == expected


def test_a_run_trains_on_the_chosen_images_and_counts_these(small, tmp_path):
    trainer = make_trainer(small, tmp_path, "sprint", ["epochs=2", "batch_size=27", "hard_share=0.5", "sizes=20:1"])
    hard_images, model = trainer.state.hard_images, trainer.model
    chosen, trained = [], []

    def choose(images, labels, step, steps):
        indices = type(hard_images).choose(hard_images, images, labels, step, steps)
        chosen.append((step, steps, images[indices]))
        return indices

    hard_images.choose = choose
    model.register_forward_pre_hook(lambda _, inputs: trained.append(inputs[0]) if model.training else None)
    history = run(trainer, resume=False)
    assert [step for step, _, _ in chosen] == list(range(20))
    assert {steps for _, steps, _ in chosen} == {20}
    assert all(torch.equal(images, seen) for (_, _, images), seen in zip(chosen, trained, strict=True))
    assert {len(images) for images in trained} == {14}
    for line in history:
        right = line["train_accuracy"] * 140
        assert right == pytest.approx(round(right), abs=1e-6)
        assert 0 < right <= 140


def test_the_teachers_answers_follow_the_chosen_images(small, tmp_path):
    changes = ["epochs=1", "batch_size=30", "hard_share=0.5", "distillation=0.9", "label_smoothing=0"]
    recipe, dataset = get_recipe("sprint", changes), small
    teacher = Teacher(Predictor("teacher", dataset.classes, None, None, ""), "0" * 64)
    trainer = Trainer(recipe, dataset, RunFolder(tmp_path), 0, CPU, "fp32", teacher=teacher)
    images, labels = dataset.train.images[:30], dataset.train.labels[:30]
    answers = torch.randn(30, 10, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([1, 5, 8, 11, 29])
    trainer.state.hard_images.choose = lambda *_: chosen
    trainer.model.train()
    logits = copy.deepcopy(trainer.model)(images[chosen])
    trainer.train_step(images, labels, answers)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = 0.1 * cross_entropy(logits, labels[chosen]) + 0.9 * cross_entropy(logits, answers[chosen].softmax(1))
    assert float(trainer.state.losses[0]) == pytest.approx(expected.item(), rel=1e-5)


def test_a_small_network_that_diverges_stops_the_run(small, tmp_path):
    trainer = make_trainer(small, tmp_path, "sprint", ["epochs=1", "hard_share=0.5"])
    trainer.state.hard_images.restore(
        {
            key: {name: value * float("nan") for name, value in state.items()} if key == "model" else state
            for key, state in trainer.state.hard_images.to_dict().items()
        }
    )
    with pytest.raises(TrainingError, match="a weight is not finite"):
        trainer.finish_epoch()


def test_several_ranks_are_refused(small, tmp_path):
    recipe = get_recipe("sprint", ["hard_share=0.5"])
    with pytest.raises(RankError, match=r"hard_share is 0\.5, which needs one process; 2 were started: start"):
        Trainer(recipe, small, RunFolder(tmp_path), 0, CPU, "fp32", ranks=Ranks(0, 2))


def test_all_images_are_trained_on_by_default(small, tmp_path):
    trainer = make_trainer(small, tmp_path, "sprint", ["epochs=1"])
    assert trainer.state.hard_images is None
    run(trainer, resume=False)
    assert "hard_images" not in load_checkpoint(RunFolder(tmp_path).last)
