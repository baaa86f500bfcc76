"""The recipe airbench94 trains as the script does, and the script is run under the same conditions."""

import dataclasses
import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

from cifar_core.data import Images
from cifar_core.optimizers import make_optimizer, set_learning_rate
from cifar_core.recipes import RECIPES, get_recipe
from tests.conftest import REPOSITORY

BATCH, STEPS = 2000, 6


def test_the_recipe_has_the_network_of_the_script():
    recipe = RECIPES["airbench94"]
    model = recipe.make_model(10)
    # 1,972,792 parameters in the script, whose fixed scales are parameters too, as they are here
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_972_792
    assert model.whiten.bias is not None
    assert recipe.activation == "gelu"


def test_output_layer_and_biases_are_updated_as_with_the_scripts_summed_loss_and_divided_logits():
    """The script: loss summed over the batch, logits divided by 256, decay 2e-6 * 2000 per step and rate."""
    torch.manual_seed(0)
    recipe = get_recipe("airbench94")
    model = recipe.make_model(10)
    features, labels = torch.randn(BATCH, 256), torch.randint(0, 10, (BATCH,))
    bias = model.blocks[2].norm2.bias
    head = nn.Parameter(256 * model.head.weight.detach().clone())
    shift = nn.Parameter(bias.detach().clone())
    script = torch.optim.SGD(
        [
            {"params": [shift], "lr": 0.053, "weight_decay": 0.004 / 0.053},
            {"params": [head], "lr": 0.67, "weight_decay": 0.004 / 0.67},
        ],
        momentum=0.85,
        nesterov=True,
    )
    ours = make_optimizer(recipe, model)
    for step in range(STEPS):
        factor = 1 - (step + 0.5) / STEPS
        set_learning_rate(ours, recipe, (step + 0.5) / STEPS)
        for group, rate in zip(script.param_groups, (0.053, 0.67), strict=True):
            group["lr"] = rate * factor
        for optimizer, logits, reduction in (
            (ours, model.head(features + bias), "mean"),
            (script, (features + shift) @ head.T / 256, "sum"),
        ):
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels, label_smoothing=0.2, reduction=reduction).backward()
            optimizer.step()
    torch.testing.assert_close(model.head.weight.detach(), head.detach() / 256, rtol=5e-3, atol=1e-5)
    torch.testing.assert_close(bias.detach(), shift.detach(), rtol=5e-3, atol=1e-4)


def test_the_rate_of_the_whitening_bias_falls_to_zero_in_three_of_eight_epochs():
    recipe = RECIPES["airbench94"]
    optimizer = make_optimizer(recipe, recipe.make_model(10))
    *_, whitening = optimizer.param_groups
    assert [tuple(parameter.shape) for parameter in whitening["params"]] == [(24,)]
    for done, share in ((0.0, 1.0), (1.5 / 8, 0.5), (3 / 8, 0.0), (0.9, 0.0)):
        set_learning_rate(optimizer, recipe, done)
        assert whitening["lr"] == pytest.approx(share * recipe.bias_learning_rate)


@pytest.mark.parametrize(("instructions", "dtype"), [("avx2", "float32"), ("avx512_bf16", "bfloat16")])
def test_the_script_computes_in_the_precision_of_our_recipes(tmp_path, instructions, dtype):
    (tmp_path / "cpuinfo").write_text(f"flags\t: {instructions}\n")
    # In a process of its own, because functions of torch are replaced.
    code = (
        "import sys, pathlib, torch; sys.argv = ['start']\n"
        "from cifar_core import device, processor, recipes\n"
        f"processor._CPU_INFO = pathlib.Path({str(tmp_path / 'cpuinfo')!r})\n"
        f"sys.path.insert(0, {str(REPOSITORY / 'benchmarks/peers')!r})\n"
        "import airbench_start; airbench_start.stand_in_for_cuda()\n"
        "ours = device.default_precision(recipes.RECIPES['fast'], device.CPU)\n"
        "print(torch.nn.Linear(1, 1).half().weight.dtype, torch.zeros(1).bfloat16().dtype, ours)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    ours = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    assert done.stdout.split() == [f"torch.{dtype}", f"torch.{dtype}", ours]


def test_the_script_gets_its_training_images_in_random_order(small, tmp_path, monkeypatch):
    specification = importlib.util.spec_from_file_location("start", REPOSITORY / "benchmarks/peers/airbench_start.py")
    start = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(start)
    order = torch.argsort(small.train.labels, stable=True)
    ordered = dataclasses.replace(small, train=Images(small.train.images[order], small.train.labels[order]))
    monkeypatch.chdir(tmp_path)
    start.lay_out(ordered, 0)
    written = torch.load("cifar10/train.pt", weights_only=True)
    assert len(set(written["labels"][:60].tolist())) == 10  # the script whitens with the first images
    before, after = (
        sorted((image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
        for images, labels in ((ordered.train.images, ordered.train.labels), (written["images"], written["labels"]))
    )
    assert before == after
