"""The questions of section 1.4 of the study, each as a property. The third is a remark, so there is nothing to test."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from cifar_core.calibration import Calibration
from cifar_core.models import BaselineConvNet, DeepConvNet

# softplus of this number is 1, so it leaves the logits as they are.
UNCHANGED = Calibration("temperature", (float(np.log(np.e - 1)),))


@given(
    st_numpy.arrays(
        np.float32, st.tuples(st.integers(1, 8), st.integers(2, 12)), elements=st.floats(-1e4, 1e4, width=32)
    )
)
def test_1_softmax_turns_logits_into_probabilities(logits):
    probabilities = UNCHANGED.probabilities(logits)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-9)
    # p_i = e^{a_i} / Σ e^{a_j}, in double precision and shifted to avoid overflow
    exponentials = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    np.testing.assert_allclose(probabilities, exponentials / exponentials.sum(1, keepdims=True), atol=1e-6)


@given(
    momentum=st.floats(0, 0.99),
    dampening=st.floats(0, 1),
    learning_rate=st.floats(1e-4, 0.5),
    fused=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_2_the_optimizer_accumulates_the_velocity(momentum, dampening, learning_rate, fused, seed):
    """b_t = μ·b_{t−1} + (1 − τ)·g_t, and θ_t = θ_{t−1} − γ·b_t; the first velocity is the first gradient itself."""
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.randn(7, dtype=torch.float64, generator=generator).requires_grad_()
    # Without momentum there is no velocity: torch uses the gradient itself and ignores the dampening.
    optimizer = torch.optim.SGD([parameter], lr=learning_rate, momentum=momentum, dampening=dampening, fused=fused)
    expected, velocity = parameter.detach().clone(), None
    for _ in range(6):
        gradient = torch.randn(7, dtype=torch.float64, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step()
        if momentum == 0:
            velocity = gradient
        else:
            velocity = gradient if velocity is None else momentum * velocity + (1 - dampening) * gradient
            torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], velocity)
        expected = expected - learning_rate * velocity
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("network", [BaselineConvNet, DeepConvNet])
def test_4_dropout_is_active_in_training_and_inactive_in_testing(network):
    torch.manual_seed(0)
    model = network(dropout=0.5)
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))
        without = network(dropout=0.0)
        without.load_state_dict(model.state_dict())
        assert torch.equal(model(images), without.train()(images))
