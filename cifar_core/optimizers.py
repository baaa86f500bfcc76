"""Which optimizer a recipe trains with, and its learning rate over time. Knows neither data nor the loop."""

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor, nn

from cifar_core.recipes import Recipe

_STEPS = 3
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About the nearest semi-orthogonal matrix, times singular values between 0.5 and 1.5.

    Three Newton-Schulz steps of fifth order in bfloat16, whose coefficients make small singular values grow fastest
    (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks").

    Args:
        matrix: [M, N].
    """
    a, b, c = _COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum; in groups with `orthogonal`, steps are orthogonalised and weights of fixed norm.

    Those are for weights of convolutions and linear layers that batch normalisation follows, whose norm therefore does
    not matter: it is kept at √(output channels), so that the learning rate alone says how far a step turns them.
    torch's own `Muon` takes neither convolutions nor this norm. After airbench94 (Jordan 2024).

    Args:
        groups: with `params`, `lr`, `momentum` in [0, 1) and `orthogonal`; their weights have output channels first.
    """

    def __init__(self, groups: list[dict[str, object]]) -> None:
        super().__init__(groups, {})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step, of those weights that have a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(weight.grad)
                step = weight.grad.add(buffer, alpha=group["momentum"])
                if group["orthogonal"]:
                    step = orthogonalised(step.reshape(len(step), -1)).reshape(step.shape)
                    weight.mul_(len(weight) ** 0.5 / weight.norm())
                weight.add_(step, alpha=-group["lr"])
        return loss


def make_optimizer(recipe: Recipe, model: nn.Sequential) -> torch.optim.Optimizer:
    """The recipe's optimizer; each of its groups knows its greatest learning rate as `initial_lr`."""
    if recipe.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, fused=True
        )
    else:
        *layers, output = model
        hidden = [each for layer in layers for each in layer.parameters() if each.requires_grad]
        weights, biases = [each for each in hidden if each.dim() > 1], [each for each in hidden if each.dim() == 1]
        plain = {"momentum": 0.85, "orthogonal": False}
        optimizer = Muon(
            [
                {"params": weights, "lr": recipe.learning_rate, "momentum": recipe.momentum, "orthogonal": True},
                {"params": list(output.parameters()), "lr": recipe.output_learning_rate, **plain},
                {"params": biases, "lr": recipe.bias_learning_rate, **plain},
            ]
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, done: float) -> None:
    """Sets what the schedule says.

    Args:
        optimizer: of `make_optimizer`.
        recipe: with the schedule.
        done: share of all steps that are done, the one to come by half; in (0, 1).
    """
    if recipe.schedule == "constant":
        return
    factor = done / recipe.warmup if done < recipe.warmup else (1 - done) / (1 - recipe.warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
