import pytest
import torch
from torch import nn

from cifar_core import convolution
from cifar_core.convolution import Conv3x3, apart, side_by_side


@pytest.fixture
def matrix_units(monkeypatch):
    monkeypatch.setattr(convolution, "has_matrix_units", lambda: True)


@pytest.fixture
def rows_made(monkeypatch):
    """The shape of each tensor that was laid side by side."""
    made = []

    def recorded(images):
        made.append(tuple(images.shape))
        return side_by_side(images)

    monkeypatch.setattr(convolution, "side_by_side", recorded)
    return made


def images_of(count, channels, height, width):
    images = torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last)


def gradients(layer, images, towards):
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
    return output, *torch.autograd.grad(output, (images, layer.weight), towards.to(output.dtype))


SHAPES = [
    (17, 64, 64, 7, 7),
    (1, 16, 8, 7, 7),
    (64, 3, 16, 8, 8),
    (9, 64, 96, 15, 15),
    (33, 24, 32, 3, 3),
    (40, 32, 16, 5, 5),
    (21, 16, 16, 1, 1),
    (30, 16, 32, 6, 4),
]


@pytest.mark.parametrize(("count", "channels", "outputs", "height", "width"), SHAPES)
@pytest.mark.usefixtures("matrix_units")
def test_output_and_gradients_are_those_of_a_convolution(count, channels, outputs, height, width, rows_made):
    torch.manual_seed(1)
    layer = Conv3x3(channels, outputs)
    images, towards = images_of(count, channels, height, width), images_of(count, outputs, height, width)
    found = gradients(layer, images, towards)
    assert rows_made
    exact = nn.Conv2d(channels, outputs, 3, padding=1, bias=False, dtype=torch.float64)
    exact.weight.data.copy_(layer.weight.data.bfloat16())
    values = images.bfloat16().double().requires_grad_()
    output = exact(values)
    expected = output, *torch.autograd.grad(output, (values, exact.weight), towards.bfloat16().double())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        difference = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert difference < 0.01, difference  # bfloat16 has steps of 0.4 to 0.8 %


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("size", [4, 8])
def test_the_gradient_of_an_input_that_needs_none_is_not_computed(monkeypatch, size):
    computed, gradients_of = [], convolution._gradients

    def recorded(*arguments):
        computed.append(arguments[-1])
        return gradients_of(*arguments)

    monkeypatch.setattr(convolution, "_gradients", recorded)
    layer = Conv3x3(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        layer(images_of(20, 16, size, size)).sum().backward()
    assert computed == [(False, True)]


@pytest.mark.usefixtures("matrix_units")
def test_a_bias_from_fused_batch_normalisation_is_added_also_in_training():
    layer = Conv3x3(8, 8)
    layer.bias = nn.Parameter(torch.full((8,), 100.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(images_of(4, 8, 4, 4)).min() > 50
        assert layer(images_of(4, 8, 4, 4)[0]).min() > 50


@pytest.mark.parametrize(("count", "width"), [(1, 3), (8, 7), (19, 7), (5, 15), (2, 40), (3, 100)])
def test_images_side_by_side_come_apart_again(count, width):
    images = images_of(count, 5, 6, width)
    rows = side_by_side(images)
    assert rows.shape[1:3] == (5, 6)
    assert rows.shape[3] % (width + 1) == 0
    assert rows.is_contiguous(memory_format=torch.channels_last)
    assert not rows[..., width :: width + 1].any()
    assert rows.abs().sum() == pytest.approx(float(images.abs().sum()), rel=1e-5)
    assert torch.equal(apart(rows, images.shape), images)


@pytest.mark.parametrize(
    ("training", "autocast", "units", "size", "channels"),
    [
        (False, True, True, 7, 64),  # evaluation
        (True, False, True, 7, 64),  # fp32
        (True, True, False, 7, 64),  # a processor without matrix units
        (True, True, True, 16, 64),  # rows are long enough
        (True, True, True, 15, 32),  # the copies would take longer than what they save
    ],
)
def test_elsewhere_it_is_exactly_the_convolution_of_torch(
    monkeypatch, rows_made, training, autocast, units, size, channels
):
    monkeypatch.setattr(convolution, "has_matrix_units", lambda: units)
    layer = Conv3x3(channels, channels).train(training)
    images = images_of(6, channels, size, size)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(images)
        expected = nn.functional.conv2d(images, layer.weight, padding=1)
    output.sum().backward()
    assert torch.equal(output, expected)
    assert not rows_made


def test_the_initial_weights_are_those_of_torch():
    torch.manual_seed(3)
    ours = Conv3x3(4, 8)
    torch.manual_seed(3)
    theirs = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    assert torch.equal(ours.weight, theirs.weight)
