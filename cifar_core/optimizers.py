"""The optimizers that recipes use, their parameter groups, and the learning rate over time."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from cifar_core.device import computes_in_bf16
from cifar_core.models import Network
from cifar_core.recipe import Recipe

Method = TypeVar("Method", bound=Callable[..., Any])

_NEWTON_SCHULZ_STEPS = 3
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SGD_MOMENTUM = 0.85


def orthogonalise(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix; its singular values lie between 0.5 and 1.5 instead of at 1.

    Three Newton-Schulz steps of fifth order, with coefficients that make small singular values grow fastest
    (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks").

    Args:
        matrix: [M, N].
        dtype: of the computation.

    Returns:
        [M, N] of this dtype.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)
    x = x / (x.norm() + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


def _without_exemption(method: Method) -> Method:
    """A method of torch's optimizers as it is below the decorator that exempts it from compilation."""
    return getattr(method, "__wrapped__", method)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum; groups with `orthogonal` have orthogonalised steps and weights of fixed norm.

    Such groups are for weights of convolutions and linear layers followed by batch normalisation, whose norm has no
    effect on the output. The norm is kept at the square root of the number of output channels, so that the learning
    rate alone determines how far a step turns the weights. torch's own `Muon` accepts no convolutions and does not fix
    the norm. After airbench94 (Jordan 2024).

    Args:
        groups: parameter groups with `params`, `lr`, `momentum` in [0, 1), `orthogonal`, and optionally `weight_decay`,
            a multiple of the weights that is added to their gradients. The first dimension of orthogonal weights is
            that of the output channels.
        dtype: of the orthogonalisation.
    """

    # Whoever first calls one of torch's own methods of these names waits over a second: torch imports its compiler,
    # only to exempt the method from compilation.
    add_param_group = _without_exemption(torch.optim.Optimizer.add_param_group)
    zero_grad = _without_exemption(torch.optim.Optimizer.zero_grad)
    state_dict = _without_exemption(torch.optim.Optimizer.state_dict)
    load_state_dict = _without_exemption(torch.optim.Optimizer.load_state_dict)

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(groups, {})
        self._dtype = dtype

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every weight that has a gradient. Returns what `closure`, which computes the loss, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        if group.get("weight_decay"):
            gradient = gradient.add(weight, alpha=group["weight_decay"])
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        step = gradient.add(buffer, alpha=group["momentum"])
        if group["orthogonal"]:
            step = orthogonalise(step.reshape(len(step), -1), self._dtype).reshape(step.shape)
            weight.mul_(len(weight) ** 0.5 / weight.norm())
        weight.add_(step, alpha=-group["lr"])


def muon_groups(recipe: Recipe, model: Network) -> list[dict[str, Any]]:
    """The parameter groups of `Muon`, in this order: hidden weights, the output layer, hidden biases.

    A whitening bias has a fourth group, whose learning rate falls to 0 after `share` of all steps. Parameters that are
    not trained, such as fixed filters and scales, are in no group.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = [parameter for name, parameter in trained.items() if name.startswith("head.")]
    hidden = {name: parameter for name, parameter in trained.items() if not name.startswith("head.")}
    weights = [parameter for name, parameter in hidden.items() if name.endswith(".weight")]
    whitening = [parameter for name, parameter in hidden.items() if name == "whiten.bias"]
    biases = [value for name, value in hidden.items() if name.endswith(".bias") and name != "whiten.bias"]
    groups = [
        {"params": weights, "lr": recipe.learning_rate, "momentum": recipe.momentum, "orthogonal": True},
        _sgd_group(head, recipe.output_learning_rate, recipe.weight_decay),
        _sgd_group(biases, recipe.bias_learning_rate, recipe.weight_decay),
    ]
    if whitening:
        share = recipe.whiten_bias_epochs / recipe.epochs
        groups.append(_sgd_group(whitening, recipe.bias_learning_rate, recipe.weight_decay) | {"share": share})
    return groups


def _sgd_group(parameters: Sequence[Tensor], learning_rate: float, decay: float) -> dict[str, Any]:
    """A group that Muon trains with SGD. A step at the highest learning rate removes the share `decay` of weights."""
    group = {"params": parameters, "lr": learning_rate, "momentum": _SGD_MOMENTUM, "orthogonal": False}
    return group | ({"weight_decay": decay / learning_rate} if decay else {})


def muon_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it. On other processors it takes 5 to 60 times as long as float32."""
    return torch.bfloat16 if computes_in_bf16(device) else torch.float32


def make_optimizer(recipe: Recipe, model: Network, dtype: torch.dtype = torch.bfloat16) -> torch.optim.Optimizer:
    """The optimizer of a recipe. Each of its groups holds its highest learning rate as `initial_lr`.

    Args:
        recipe: its optimizer and learning rates.
        model: the network to train.
        dtype: of the orthogonalisation of Muon; see `muon_dtype`.
    """
    if recipe.optimizer == "muon":
        optimizer: torch.optim.Optimizer = Muon(muon_groups(recipe, model), dtype)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, done: float) -> None:
    """Sets the learning rates of all groups to what the schedule gives for the next step.

    Args:
        optimizer: an optimizer from `make_optimizer`.
        recipe: the recipe with the schedule.
        done: share of all steps that are done, counting half of the next step; in (0, 1).
    """
    if recipe.schedule == "constant":
        return
    factor = done / recipe.warmup if done < recipe.warmup else (1 - done) / (1 - recipe.warmup)
    for group in optimizer.param_groups:
        share = group.get("share")
        group["lr"] = group["initial_lr"] * (factor if share is None else max(0.0, 1 - done / share))
