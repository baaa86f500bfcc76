import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cifar_core.data import (
    Batches,
    DataError,
    Images,
    batch_sizes,
    epoch_generator,
    split,
    subset_sampler,
    weighted_sampler,
)


def sha256(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def test_cifar10_is_split_into_the_same_49000_and_1000_images_on_every_machine():
    training, validation = split(50_000)
    assert (len(training), len(validation)) == (49_000, 1_000)
    assert sha256(validation) == "f97076ea6db59a96dc81a59d1b573bc8aaecdb8efa1e93c0d79928bfbf8a43f8"


@given(count=st.integers(20, 3000), held_out=st.integers(1, 2000), seed=st.integers(0, 2**32 - 1))
def test_every_image_is_either_trained_on_or_held_out(count, held_out, seed):
    training, validation = split(count, held_out, seed)
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(count))
    assert len(validation) == min(held_out, count // 10)


def test_too_few_images_to_split_are_refused():
    with pytest.raises(DataError, match="at least 20"):
        split(19)


# Samplers and batches


@pytest.mark.parametrize("kind", ["weighted", "subset"])
def test_a_sampler_draws_every_training_image_once_and_no_other_image(kind):
    training, _ = split(500)
    generator = epoch_generator(seed=3, epoch=0)
    sampler = weighted_sampler(training, 500, generator) if kind == "weighted" else subset_sampler(training, generator)
    order = list(sampler)
    assert sorted(order) == training.tolist()
    assert order != training.tolist()


def test_the_order_of_an_epoch_depends_only_on_seed_and_epoch():
    indices = torch.arange(100)
    torch.manual_seed(1)
    first = list(subset_sampler(indices, epoch_generator(5, 2)))
    torch.manual_seed(2)
    assert list(subset_sampler(indices, epoch_generator(5, 2))) == first
    assert list(subset_sampler(indices, epoch_generator(5, 3))) != first
    assert list(subset_sampler(indices, epoch_generator(6, 2))) != first


@pytest.mark.parametrize("start", [0, 1, 3])
def test_batches_hold_images_and_labels_in_the_given_order(start):
    images = torch.arange(10 * 32 * 32 * 3).reshape(10, 32, 32, 3).to(torch.uint8)
    data = Images(images, torch.arange(10))
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    batches = Batches(data, order, batch_size=3, start=start)
    received = list(batches)
    assert len(received) == len(batches) == 4 - start
    assert torch.cat([labels for _, labels in received]).tolist() == order[3 * start :].tolist()
    for batch, labels in received:
        assert torch.equal(batch, images[labels])


def test_even_batches_differ_by_at_most_one_image_and_none_is_smaller_than_half_a_batch(small):
    assert batch_sizes(49_000, 2000, even=True) == [1960] * 25
    assert batch_sizes(101, 50, even=True) == [34, 34, 33]
    assert batch_sizes(101, 50, even=False) == [50, 50, 1]
    assert batch_sizes(18, 2000, even=True) == [18]
    received = [len(labels) for _, labels in Batches(small.train, torch.arange(101), 50, start=1, even=True)]
    assert received == [34, 33]


@given(count=st.integers(18, 5000), batch_size=st.integers(4, 2000))
def test_no_even_batch_holds_a_single_image(count, batch_size):
    sizes = batch_sizes(count, batch_size, even=True)
    assert sum(sizes) == count
    assert max(sizes) <= batch_size
    assert min(sizes) >= max(2, max(sizes) - 1)


def test_a_batch_size_below_one_is_refused(small):
    with pytest.raises(ValueError, match="must be at least 1"):
        Batches(small.train, torch.arange(3), batch_size=0)
