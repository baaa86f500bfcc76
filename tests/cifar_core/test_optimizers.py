import pytest
import torch
from torch import nn

from cifar_core import optimizers
from cifar_core.device import CPU, default_precision
from cifar_core.optimizers import Muon, make_optimizer, muon_dtype, orthogonalise, set_learning_rate
from cifar_core.recipes import RECIPES, get_recipe
from tests.cifar_core.training import make_trainer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (16, 16)])
def test_an_orthogonalised_matrix_has_singular_values_near_one_and_the_same_vectors(shape, dtype):
    # Singular values between 0.2 and 1, spread out like those of gradients.
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape)))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape)))
    matrix = left @ torch.diag(torch.linspace(0.2, 1, min(shape))) @ right.T
    result = orthogonalise(matrix, dtype)
    assert (result.shape, result.dtype) == (shape, dtype)
    result = result.float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.4
    assert values.max() < 1.6
    aligned = left.T @ result @ right  # diagonal if the singular vectors are the same
    off = aligned - torch.diag(aligned.diag())
    assert off.abs().max() < 0.06  # bfloat16


@pytest.mark.parametrize(
    ("instructions", "precision", "dtype"),
    [("avx2", "fp32", torch.float32), ("avx512_bf16", "bf16", torch.bfloat16), ("amx_bf16", "bf16", torch.bfloat16)],
)
def test_recipes_and_muon_use_bf16_only_where_the_processor_computes_in_it(
    processor_with, small, tmp_path, monkeypatch, instructions, precision, dtype
):
    processor_with(instructions)
    assert default_precision(RECIPES["sprint"], CPU) == precision
    assert default_precision(RECIPES["baseline"], CPU) == "fp32"
    assert (muon_dtype(CPU), muon_dtype(torch.device("cuda"))) == (dtype, torch.bfloat16)
    used = []
    monkeypatch.setattr(optimizers, "orthogonalise", lambda matrix, dtype: used.append(dtype) or matrix)
    trainer = make_trainer(small, tmp_path, "sprint", ("hard_share=0.5", "batch_size=20"))
    trainer.train_step(*next(iter(trainer.batches())))
    assert set(used) == {dtype}


def test_the_scale_of_a_gradient_has_no_effect():
    matrix = torch.randn(8, 20)
    torch.testing.assert_close(orthogonalise(matrix * 1e-4), orthogonalise(matrix), atol=0.03, rtol=0)


def test_orthogonal_steps_turn_weights_of_fixed_norm():
    weight = nn.Parameter(torch.randn(8, 4, 3, 3) * 5)
    optimizer = Muon([{"params": [weight], "lr": 0.0, "momentum": 0.6, "orthogonal": True}])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert float(weight.detach().norm()) == pytest.approx(8**0.5, rel=1e-5)
    before = weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    # All eight directions turn by about the learning rate, independent of the size of the gradient.
    assert 0.1 * 0.4 * 8**0.5 < (weight - before).norm() < 0.1 * 1.6 * 8**0.5


def test_other_groups_are_sgd_with_nesterov_momentum():
    ours, expected = (nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = Muon([{"params": [ours], "lr": 0.3, "momentum": 0.85, "orthogonal": False}])
    reference = torch.optim.SGD([expected], lr=0.3, momentum=0.85, nesterov=True)
    for _ in range(5):
        gradient = torch.randn(5)
        for weight, stepping in ((ours, optimizer), (expected, reference)):
            weight.grad = gradient.clone()
            stepping.step()
    torch.testing.assert_close(ours, expected)


def test_a_closure_computes_its_loss_with_gradients():
    weight = nn.Parameter(torch.full((3,), 2.0))
    optimizer = Muon([{"params": [weight], "lr": 0.1, "momentum": 0.0, "orthogonal": False}])

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 12.0
    torch.testing.assert_close(weight.detach(), torch.full((3,), 2.0 - 0.1 * 4.0))


def test_a_weight_without_a_gradient_is_not_changed():
    weight = nn.Parameter(torch.ones(4, 4))
    Muon([{"params": [weight], "lr": 0.1, "momentum": 0.6, "orthogonal": True}]).step()
    assert torch.equal(weight.detach(), torch.ones(4, 4))


def test_muon_orthogonalises_hidden_weights_but_not_the_output_layer_and_biases():
    recipe = RECIPES["deep-fast"]
    model = recipe.make_model(10)
    orthogonal, output, biases = make_optimizer(recipe, model).param_groups
    assert orthogonal["orthogonal"]
    assert not output["orthogonal"]
    assert not biases["orthogonal"]
    assert [tuple(parameter.shape) for parameter in output["params"]] == [(10, 512), (10,)]
    assert len(orthogonal["params"]) == 9  # eight convolutions and the hidden layer
    assert all(bias.dim() == 1 for bias in biases["params"])
    counted = sum(parameter.numel() for group in (orthogonal, output, biases) for parameter in group["params"])
    assert counted == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_one_cycle_rises_linearly_and_then_falls_linearly_to_zero():
    recipe = get_recipe("deep-fast", ["warmup=0.25"])
    optimizer = make_optimizer(recipe, recipe.make_model(10))
    for done, share in ((0.125, 0.5), (0.25, 1.0), (0.625, 0.5), (1.0, 0.0)):
        set_learning_rate(optimizer, recipe, done)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(share * group["initial_lr"])


def test_a_constant_learning_rate_never_changes():
    recipe = RECIPES["deep"]
    optimizer = make_optimizer(recipe, recipe.make_model(10))
    set_learning_rate(optimizer, recipe, 0.9)
    assert optimizer.param_groups[0]["lr"] == 0.05
