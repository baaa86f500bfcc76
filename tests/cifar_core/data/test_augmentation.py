import pytest
import torch

from cifar_core.data import Augmentation, resize

SEED = 3


@pytest.fixture
def images():
    return torch.randint(0, 256, (40, 12, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def augment_all(augmentation, epoch):
    augmentation.start_epoch(epoch)
    return augmentation.batch(torch.arange(40))


def is_mirrored(images, seen):
    """Whether each image is mirrored; every image must be unchanged or mirrored."""
    straight = (seen == images).flatten(1).all(1)
    mirrored = (seen == images.flip(2)).flatten(1).all(1)
    assert (straight | mirrored).all()
    return mirrored


def test_alternating_flip_shows_every_image_both_ways_in_two_epochs(images):
    augmentation = Augmentation(images, SEED, "alternating", translate=0, cutout=0)
    epochs = [is_mirrored(images, augment_all(augmentation, epoch)) for epoch in range(3)]
    assert torch.equal(epochs[0], ~epochs[1])
    assert torch.equal(epochs[0], epochs[2])
    assert 5 < epochs[0].sum() < 35


def test_random_flip_mirrors_about_half_of_the_images_differently_in_each_epoch(images):
    augmentation = Augmentation(images, SEED, "random", translate=0, cutout=0)
    epochs = [is_mirrored(images, augment_all(augmentation, epoch)) for epoch in range(3)]
    assert all(5 < mirrored.sum() < 35 for mirrored in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], ~epochs[1])


def test_translated_images_are_windows_of_the_reflected_image(images):
    seen = augment_all(Augmentation(images, SEED, "none", translate=2, cutout=0), 0)
    padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="reflect")
    padded = padded.to(torch.uint8).permute(0, 2, 3, 1)
    shifts = []
    for number in range(40):
        found = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if torch.equal(seen[number], padded[number, row : row + 12, column : column + 10])
        ]
        assert len(found) == 1
        shifts += found
    assert {row for row, _ in shifts} == {column for _, column in shifts} == set(range(5))


def test_cutout_sets_a_square_to_grey_and_changes_nothing_else(images):
    images[images == 128] = 127
    seen = augment_all(Augmentation(images, SEED, "none", translate=0, cutout=4), 0)
    grey = (seen == 128).all(3)
    assert torch.equal(seen[~grey], images[~grey])
    rows, columns = grey.any(2).sum(1), grey.any(1).sum(1)
    assert torch.equal(grey.sum((1, 2)), rows * columns)  # a rectangle
    assert rows.max() == columns.max() == 4
    assert rows.min() >= 2  # at least half of the square lies within the image
    assert columns.min() >= 2


def test_augmentation_depends_only_on_seed_and_epoch(images):
    def seen(seed, epoch, indices):
        augmentation = Augmentation(images, seed, "random", translate=2, cutout=3)
        augmentation.start_epoch(epoch)
        return augmentation.batch(torch.tensor(indices))

    whole = seen(SEED, 1, list(range(40)))
    torch.rand(7)
    assert torch.equal(seen(SEED, 1, [30, 2, 17]), whole[[30, 2, 17]])
    assert not torch.equal(seen(SEED, 2, list(range(40))), whole)
    assert not torch.equal(seen(SEED + 1, 1, list(range(40))), whole)


def test_the_original_images_are_never_changed(images):
    before = images.clone()
    for epoch in range(2):
        augment_all(Augmentation(images, SEED, "alternating", translate=0, cutout=4), epoch)
    assert torch.equal(images, before)


def test_resized_images_keep_their_content_and_brightness():
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).view(1, 1, 32, 1).expand(2, 32, 32, 3).contiguous()
    small = resize(ramp, 16)
    assert (small.shape, small.dtype) == ((2, 16, 16, 3), torch.uint8)
    torch.testing.assert_close(small.float().mean(), ramp.float().mean(), atol=1.0, rtol=0)
    assert (small[0, :, 1:, 0].int() > small[0, :, :-1, 0].int()).all()
    assert resize(ramp, 32) is ramp


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [12, 16])
def test_augmented_images_are_the_same_on_cuda(images, size):
    seen = []
    for device in ("cpu", "cuda"):
        augmentation = Augmentation(resize(images.to(device), size), SEED, "alternating", translate=2, cutout=4)
        augmentation.start_epoch(1)
        seen.append(augmentation.batch(torch.arange(40, device=device)))
    assert seen[1].is_cuda
    assert torch.equal(seen[1].cpu(), seen[0])


def test_brightness_and_contrast_change_all_pixels_of_an_image_alike_and_both_ways():
    levels = torch.arange(88, 168, dtype=torch.uint8).view(1, 8, 10, 1).expand(200, 8, 10, 3).contiguous()
    seen = {}
    for name, brightness, contrast in (("brightness", 0.2, 0.0), ("contrast", 0.0, 0.5), ("both", 0.2, 0.5)):
        augmentation = Augmentation(levels, SEED, "none", 0, 0, brightness, contrast)
        augmentation.start_epoch(0)
        seen[name] = augmentation.batch(torch.arange(200)).float()
    shift = (seen["brightness"] - levels.float()).flatten(1)
    assert (shift.max(1).values == shift.min(1).values).all()
    assert -51 <= shift.min() < -40
    assert 40 < shift.max() <= 51
    from_grey = levels.float() - 128
    slope = ((seen["contrast"] - 128) * from_grey).sum((1, 2, 3)) / (from_grey**2).sum((1, 2, 3))
    assert ((seen["contrast"] - 128 - slope.view(-1, 1, 1, 1) * from_grey).abs() < 1).all()
    assert 0.49 < slope.min() < 0.6
    assert 1.4 < slope.max() < 1.51
    assert abs(float(torch.corrcoef(torch.stack([shift[:, 0], slope]))[0, 1])) < 0.3  # they are independent


def test_brighter_pixels_end_at_white_and_darker_ones_at_black():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(100, 4, 2, 3).contiguous()
    augmentation = Augmentation(images, SEED, "none", 0, 0, 0.5)
    augmentation.start_epoch(0)
    seen = augmentation.batch(torch.arange(100))
    assert (seen[:, :, 0] <= 128).all()
    assert (seen[:, :, 1] >= 127).all()
