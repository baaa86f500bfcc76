import dataclasses

import pytest
import torch
from torch import nn

from cifar_core.models import make_model
from cifar_core.optimizers import Muon, make_optimizer, orthogonalised, set_learning_rate
from cifar_core.recipes import RECIPES


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (16, 16)])
def test_an_orthogonalised_matrix_has_singular_values_near_one_and_the_same_vectors(shape):
    # Singular values between 0.2 and 1, far from each other as those of gradients are.
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape)))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape)))
    matrix = left @ torch.diag(torch.linspace(0.2, 1, min(shape))) @ right.T
    result = orthogonalised(matrix).float()
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.4
    assert values.max() < 1.6
    aligned = left.T @ result @ right  # diagonal, if the vectors are the same
    off = aligned - torch.diag(aligned.diag())
    assert off.abs().max() < 0.06  # bfloat16


def test_the_scale_of_a_gradient_does_not_matter():
    matrix = torch.randn(8, 20)
    torch.testing.assert_close(orthogonalised(matrix * 1e-4), orthogonalised(matrix), atol=0.03, rtol=0)


def test_orthogonal_steps_turn_weights_of_fixed_norm():
    weight = nn.Parameter(torch.randn(8, 4, 3, 3) * 5)
    optimizer = Muon([{"params": [weight], "lr": 0.0, "momentum": 0.6, "orthogonal": True}])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert float(weight.detach().norm()) == pytest.approx(8**0.5, rel=1e-5)
    before = weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    # All eight directions are turned by about the learning rate, whatever the gradient's own size.
    assert 0.1 * 0.4 * 8**0.5 < (weight - before).norm() < 0.1 * 1.6 * 8**0.5


def test_other_groups_are_sgd_with_nesterov_momentum():
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = Muon([{"params": [ours], "lr": 0.3, "momentum": 0.85, "orthogonal": False}])
    reference = torch.optim.SGD([theirs], lr=0.3, momentum=0.85, nesterov=True)
    for _ in range(5):
        gradient = torch.randn(5)
        for weight, each in ((ours, optimizer), (theirs, reference)):
            weight.grad = gradient.clone()
            each.step()
    torch.testing.assert_close(ours, theirs)


def test_muon_turns_the_hidden_weights_and_sgd_has_the_output_and_the_biases():
    recipe = RECIPES["deep-fast"]
    model = make_model(recipe.model, 10)
    orthogonal, output, biases = make_optimizer(recipe, model).param_groups
    assert orthogonal["orthogonal"]
    assert not output["orthogonal"]
    assert not biases["orthogonal"]
    assert [tuple(each.shape) for each in output["params"]] == [(10, 512), (10,)]
    assert len(orthogonal["params"]) == 9  # eight convolutions, the hidden layer
    assert all(each.dim() == 1 for each in biases["params"])
    counted = sum(each.numel() for group in (orthogonal, output, biases) for each in group["params"])
    assert counted == sum(each.numel() for each in model.parameters() if each.requires_grad)


def test_one_cycle_goes_linearly_up_and_down_to_nothing():
    recipe = dataclasses.replace(RECIPES["deep-fast"], warmup=0.25)
    optimizer = make_optimizer(recipe, make_model(recipe.model, 10))
    for done, share in ((0.125, 0.5), (0.25, 1.0), (0.625, 0.5), (1.0, 0.0)):
        set_learning_rate(optimizer, recipe, done)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(share * group["initial_lr"])


def test_a_constant_learning_rate_stays():
    recipe = RECIPES["deep"]
    optimizer = make_optimizer(recipe, make_model(recipe.model, 10, recipe.dropout))
    set_learning_rate(optimizer, recipe, 0.9)
    assert optimizer.param_groups[0]["lr"] == 0.05
