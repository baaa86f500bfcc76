import pytest
import torch
from torch import nn
from torchvision import transforms

from cifar_core.models import (
    NETWORKS,
    BaselineConvNet,
    DeepConvNet,
    Dropout,
    GlobalMaxPool,
    WhitenedConvNet,
    fuse_batch_norm,
    make_model,
)
from tests.cifar_core.runs import number_layers


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


def trained_a_little(name, images):
    """A network whose batch normalisation has statistics of images, and random scales and shifts."""
    torch.manual_seed(4)
    model = make_model(name, 10, width=4 if name == "whitened" else 0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    for _ in range(5):
        model(images)
    return model.eval()


@pytest.mark.parametrize("name", ["deep-batch-norm", "whitened"])
def test_fusing_preserves_the_function_and_removes_batch_normalisation(images, name):
    model = trained_a_little(name, images)
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
    fused, study = fuse_batch_norm(make_model("deep-batch-norm", 10)), DeepConvNet()
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
    model = make_model("deep-batch-norm", 10)
    model.blocks[0].dropout = nn.BatchNorm2d(32)
    with pytest.raises(TypeError, match="no entry in the table of fusible layers"):
        fuse_batch_norm(model)


@pytest.mark.parametrize("name", ["deep-batch-norm", "whitened"])
@pytest.mark.parametrize("size", [16, 24, 32])
def test_networks_with_batch_normalisation_accept_smaller_images(name, size):
    images = torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8)
    assert make_model(name, 10, width=4 if name == "whitened" else 0)(images).shape == (4, 10)


def test_the_first_convolution_whitens_patches_with_both_signs():
    torch.manual_seed(5)
    # Neighbouring pixels are similar, as in photographs.
    noise = torch.rand(200, 3, 8, 8)
    images = (nn.functional.interpolate(noise, size=32, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    images = images.permute(0, 2, 3, 1).contiguous()
    model = WhitenedConvNet((4, 16, 32))
    model.init_whiten(images)
    white = model.whiten(model.normalise(images)).permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(white[:12], -white[12:])
    second_moments = white[:12] @ white[:12].T / white.shape[1]
    off = second_moments - torch.diag(second_moments.diag())
    assert off.abs().max() < 0.02
    assert second_moments.diag().max() < 1.01
    assert second_moments.diag().min() > 0.5  # the constant damps the weakest directions
    assert not model.whiten.weight.requires_grad


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match=f"the networks are: {', '.join(NETWORKS)}"):
        make_model("shallow", 10)


def test_global_max_pooling_returns_the_maximum_of_each_channel():
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert GlobalMaxPool()(x).tolist() == [[11.0, 23.0]]


# Weights saved by earlier versions


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_saved_before_layers_had_names_are_loaded_number_layers(images, name):
    width = 4 if name == "whitened" else 0
    torch.manual_seed(6)
    saved, loaded = (make_model(name, 10, width=width) for _ in range(2))
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
