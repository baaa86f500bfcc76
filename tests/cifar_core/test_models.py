import pytest
import torch
from torch import nn
from torchvision import transforms

from cifar_core.layers import Dropout, GlobalMaxPool
from cifar_core.models import (
    NETWORKS,
    BaselineConvNet,
    DeepConvNet,
    NetworkOptions,
    WhitenedConvNet,
    fuse_batch_norm,
    make_model,
)
from tests.cifar_core.runs import number_layers

SMALL = NetworkOptions(widths=(4, 16, 32))
AIRBENCH96 = NetworkOptions(widths=(4, 16, 32), depth=3, activation="gelu", whiten_size=3, whiten_bias=True)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_networks_have_the_number_of_parameters_of_the_study():
    assert parameters(BaselineConvNet()) == 890_410
    assert parameters(DeepConvNet()) == 1_702_186
    assert parameters(DeepConvNet(classes=3)) == 1_702_186 - 7 * 513


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def as_the_study_writes_it(model, padding):
    """The same weights in plain layers, in the order of the study: ReLU directly after each convolution."""
    layers = []
    for block in model.blocks:
        for convolution in (block.conv1, block.conv2):
            assert convolution.kernel_size == (3, 3)
            assert convolution.stride == (1, 1)
            assert convolution.padding == (padding, padding)
            layers += [convolution, nn.ReLU()]
        layers.append(nn.MaxPool2d(2, stride=2))
    assert model.hidden.out_features == 512
    return nn.Sequential(*layers, nn.Flatten(), model.hidden, nn.ReLU(), model.head)


@pytest.mark.parametrize(("network", "padding"), [(BaselineConvNet, 0), (DeepConvNet, 1)])
def test_logits_and_gradients_are_those_of_the_layers_of_the_study(images, network, padding):
    torch.manual_seed(0)
    model = network(dropout=0.0)
    plain = as_the_study_writes_it(model, padding)
    to_tensor = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))]
    )
    normalised = torch.stack([to_tensor(image.numpy()) for image in images])
    labels = torch.arange(6)
    gradients = []
    for logits in (model(images), plain(normalised)):
        assert logits.shape == (6, 10)
        model.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        gradients.append([logits.detach()] + [parameter.grad.clone() for parameter in model.parameters()])
    for own, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("network", "widths"), [(BaselineConvNet, (32, 64)), (DeepConvNet, (32, 64, 128, 256))])
def test_each_block_has_two_convolutions_a_pooling_and_a_dropout(network, widths):
    model = network(dropout=0.2)
    layers = list(model.modules())
    convolutions = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)]
    assert convolutions == [width for width in widths for _ in range(2)]
    kinds = [type(layer) for layer in layers]
    assert kinds.count(nn.MaxPool2d) == kinds.count(Dropout) == len(model.blocks) == len(widths)


def test_the_statistics_of_normalisation_are_saved_with_the_weights():
    model = DeepConvNet()
    assert {"normalise.mean", "normalise.std"} <= model.state_dict().keys()
    black = model.normalise(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    torch.testing.assert_close(black[0, :, 0, 0], torch.tensor([-0.4914 / 0.247, -0.4822 / 0.243, -0.4465 / 0.261]))
    assert black.is_contiguous(memory_format=torch.channels_last)


# Dropout


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_the_share_p_and_keeps_the_expectation(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(64, 32, 13, 13, dtype=dtype).to(memory_format=torch.channels_last)
    y = Dropout(p)(x)
    count = y.numel()
    assert float((y == 0).double().mean()) == pytest.approx(p, abs=5 * (p * (1 - p) / count) ** 0.5)
    kept = y[y != 0].double().unique()
    assert len(kept) == 1
    assert float(kept) == pytest.approx(1 / (1 - p), rel=0.005 if dtype == torch.bfloat16 else 1e-4)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_dropout_treats_every_activation_independently():
    torch.manual_seed(1)
    kept = (Dropout(0.5)(torch.ones(100_001)) != 0).double()
    # Four activations share one random number, so neighbours and every fourth activation must be uncorrelated.
    for distance in (1, 2, 3, 4):
        assert abs(float(torch.corrcoef(torch.stack([kept[distance:], kept[:-distance]]))[0, 1])) < 0.02


def test_gradients_flow_where_activations_were_kept():
    torch.manual_seed(2)
    x = torch.rand(50, 50, requires_grad=True)
    y = Dropout(0.3)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), y.detach())


def test_dropout_accepts_a_tensor_of_any_layout():
    torch.manual_seed(3)
    strided = torch.rand(8, 16, 10).transpose(0, 2)[::2]
    y = Dropout(0.5)(strided)
    assert ((y == 0) | torch.isclose(y, 2 * strided)).all()
    assert 0.4 < float((y == 0).double().mean()) < 0.6


def test_dropout_is_the_identity_in_evaluation_and_at_zero():
    x = torch.rand(5, 5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_an_impossible_dropout_is_refused(dropout):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        BaselineConvNet(dropout=dropout)


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        DeepConvNet(classes=1)


# Batch normalisation


def has_batch_norm(model):
    return any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in model.modules())


def trained_a_little(name, images, options=SMALL):
    """A network whose batch normalisation has statistics of images, and random scales and shifts."""
    torch.manual_seed(4)
    model = make_model(name, 10, options)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    for _ in range(5):
        model(images)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "options"), [("deep-batch-norm", SMALL), ("whitened", SMALL), ("whitened", AIRBENCH96)]
)
def test_fusing_preserves_the_function_and_removes_batch_normalisation(images, name, options):
    model = trained_a_little(name, images, options)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fused = fuse_batch_norm(model)
    assert not has_batch_norm(fused)
    assert has_batch_norm(model)
    with torch.inference_mode():
        expected, logits = model(images), fused(images)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(logits.softmax(1), expected.softmax(1), atol=1e-5, rtol=0)
    assert expected.std(0).min() > 1e-4  # different images, different logits


def test_the_fused_deep_network_is_the_network_of_the_study(images):
    fused, study = fuse_batch_norm(make_model("deep-batch-norm", 10, SMALL)), DeepConvNet()
    assert parameters(fused) == parameters(study) == 1_702_186
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (fused, study)]
    assert shapes[0] == shapes[1]
    study.load_state_dict(fused.state_dict())
    with torch.inference_mode():
        assert torch.equal(study.eval()(images), fused(images))


def test_fusing_a_network_without_batch_normalisation_returns_it():
    model = DeepConvNet()
    assert fuse_batch_norm(model) is model


def test_a_batch_normalisation_that_cannot_be_fused_is_an_error():
    model = make_model("deep-batch-norm", 10, SMALL)
    model.blocks[0].dropout = nn.BatchNorm2d(32)
    with pytest.raises(TypeError, match="no entry in the table of fusible layers"):
        fuse_batch_norm(model)


@pytest.mark.parametrize("name", ["deep-batch-norm", "whitened"])
@pytest.mark.parametrize("size", [16, 24, 32])
def test_networks_with_batch_normalisation_accept_smaller_images(name, size):
    images = torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8)
    assert make_model(name, 10, SMALL)(images).shape == (4, 10)


def photographs():
    """200 images in which neighbouring pixels are similar, uint8 [200, 32, 32, 3]."""
    torch.manual_seed(5)
    noise = torch.rand(200, 3, 8, 8)
    images = (nn.functional.interpolate(noise, size=32, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("size", [2, 3])
def test_the_first_convolution_whitens_patches_with_both_signs(size):
    images = photographs()
    model = WhitenedConvNet((4, 16, 32), options=NetworkOptions(whiten_size=size))
    model.init_whiten(images)
    white = model.whiten(model.normalise(images)).permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(white[:12], -white[12:])
    second_moments = white[:12] @ white[:12].T / white.shape[1]
    off = second_moments - torch.diag(second_moments.diag())
    assert off.abs().max() < 0.02
    assert second_moments.diag().max() < 1.01
    assert second_moments.diag().min() > 0.5  # the constant damps the weakest directions
    assert not model.whiten.weight.requires_grad


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("pixels", [20, 24, 32])
def test_the_whitening_layer_computes_in_bf16_what_it_computes_in_fp32(size, pixels):
    """Some processors were reported to compute 2x2 convolutions in bf16 wrongly."""
    images = photographs()[:50, :pixels, :pixels]
    model = WhitenedConvNet((4, 16, 32), options=NetworkOptions(whiten_size=size, whiten_bias=True))
    model.to(memory_format=torch.channels_last)
    model.init_whiten(images)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            white = model.whiten(model.normalise(images))
        (white.float().square().mean()).backward()
        results.append((white.detach().float(), model.whiten.bias.grad.clone()))
    (exact, exact_gradient), (rounded, gradient) = results
    # bf16 has 8 bits: each of at most 28 rounded products is off by up to 2**-8 of its size.
    scale = model.whiten.weight.abs().sum((1, 2, 3)).max() * 2.5
    assert (rounded - exact).abs().max() < 2**-7 * scale
    assert float(torch.corrcoef(torch.stack([rounded.flatten(), exact.flatten()]))[0, 1]) > 0.999
    torch.testing.assert_close(gradient, exact_gradient, rtol=0.05, atol=0.02 * float(exact_gradient.abs().max()))


def test_convolutions_with_identity_initialisation_pass_their_input_on():
    for model in (
        make_model("whitened", 10, AIRBENCH96),
        make_model("deep-batch-norm", 10, NetworkOptions(identity_init=True)),
    ):
        convolutions = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Conv2d)]
        assert len(convolutions) in (8, 9)
        for layer in convolutions:
            x = torch.randn(1, layer.in_channels, 5, 5)
            passed = min(layer.in_channels, layer.out_channels)
            torch.testing.assert_close(layer(x)[:, :passed], x[:, :passed])
    plain = make_model("deep-batch-norm", 10, NetworkOptions()).blocks[0].conv2
    assert not torch.allclose(plain(torch.ones(1, 32, 5, 5)), torch.ones(1, 32, 5, 5))


def test_a_third_convolution_adds_the_input_of_the_second_one(images):
    torch.manual_seed(7)
    group = make_model("whitened", 10, AIRBENCH96).blocks[0].eval()
    x = torch.randn(2, 24, 16, 16)
    first = nn.functional.gelu(group.norm1(group.pool(group.conv1(x))))
    second = group.norm3(group.conv3(nn.functional.gelu(group.norm2(group.conv2(first)))))
    torch.testing.assert_close(group(x), nn.functional.gelu(first + second))


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match=f"the networks are: {', '.join(NETWORKS)}"):
        make_model("shallow", 10, SMALL)


def test_global_max_pooling_returns_the_maximum_of_each_channel():
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert GlobalMaxPool()(x).tolist() == [[11.0, 23.0]]


# Weights saved by earlier versions


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_saved_before_layers_had_names_are_loaded_number_layers(images, name):
    torch.manual_seed(6)
    saved, loaded = (make_model(name, 10, SMALL) for _ in range(2))
    state = number_layers(saved.state_dict())
    assert "0.mean" in state
    loaded.load_weights(state)
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(images), saved.eval()(images))


def test_weights_of_another_network_are_refused_with_and_without_names():
    state = BaselineConvNet().state_dict()
    for other in (state, number_layers(state)):
        with pytest.raises(RuntimeError, match="DeepConvNet"):
            DeepConvNet().load_weights(other)
    with pytest.raises(RuntimeError, match="size mismatch"):
        DeepConvNet(classes=3).load_weights(number_layers(DeepConvNet().state_dict()))
