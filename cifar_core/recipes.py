"""Every recipe by name: the rows of the study first, then our own; and changing the values of a recipe.

The accuracies quoted next to the study's rows are the study's own, on the official archive; our results are in
docs/results.md.
"""

from collections.abc import Sequence
from typing import Any

from cifar_core.recipe import Precision, Recipe, RecipeError, as_text, read_recipe

__all__ = [
    "KEYS",
    "RECIPES",
    "Recipe",
    "RecipeError",
    "asked_precision",
    "batch_size_note",
    "get_recipe",
    "read_recipe",
]

_OURS: dict[str, Any] = {
    "precision": "bf16",
    "optimizer": "muon",
    "batch_size": 500,
    "learning_rate": 0.12,
    "momentum": 0.6,
    "output_learning_rate": 0.02,
    "bias_learning_rate": 30.0,
    "schedule": "one-cycle",
    "label_smoothing": 0.1,
    "flip": "alternating",
    "weights": "last",
}
"""Values that `sprint` and `deep-fast` share. Muon, schedule and flip follow airbench94 (Jordan 2024)."""

_AIRBENCH: dict[str, Any] = {
    "model": "whitened",
    "precision": "bf16",
    "optimizer": "muon",
    "batch_size": 2000,
    "learning_rate": 0.24,
    "momentum": 0.6,
    # The script sums the loss over a batch and divides the logits by the number of features; these are its rates for
    # the mean loss and without the division: 0.67 * 2000 / 256**2 and 0.053 * 2000.
    "output_learning_rate": 0.02045,
    "bias_learning_rate": 106.0,
    "weight_decay": 0.004,
    "schedule": "one-cycle",
    "label_smoothing": 0.2,
    "flip": "alternating",
    "translate": 2,
    "activation": "gelu",
    "whiten_bias_epochs": 3,
    "weights": "last",
}
"""The training of airbench94_muon.py (Jordan 2024)."""

_CURVE: dict[str, Any] = _AIRBENCH | {
    "widths": (64, 256, 384),
    "batch_size": 1000,
    "learning_rate": 0.17,
    "output_learning_rate": 0.0102,
    "bias_learning_rate": 53.0,
    "weight_decay": 0.002,
    "validated_epochs": 1,
}
"""The same, wider, with twice as many steps, each of which moves the weights as far per image; the momentum stays."""

_DEEPER: dict[str, Any] = _CURVE | {"depth": 3, "translate": 4}

_FEW_IMAGES: dict[str, Any] = {
    "model": "deep-batch-norm",
    "precision": "fp32",
    "optimizer": "muon",
    "batch_size": 100,
    "momentum": 0.9,
    "output_learning_rate": 0.01,
    "bias_learning_rate": 3.0,
    "schedule": "one-cycle",
    "warmup": 0.1,
    "label_smoothing": 0.1,
    "flip": "alternating",
    "translate": 3,
    "cutout": 8,
    "identity_init": True,
    "weights": "last",
    "validated_epochs": 1,
}
"""Values of the recipes for few images."""

_STUDY = (
    # The base model. Published: best validation accuracy 73.6 % at epoch 12, final 72.3 %.
    Recipe(name="baseline"),
    # Published: 77.8 % at epoch 18; 74.95 % on the test set.
    Recipe(name="dropout-0.2", dropout=0.2),
    # Published: 76.2 % at epoch 19.
    Recipe(name="dropout-0.5", dropout=0.5),
    # Published: 62.7 % at epoch 17.
    Recipe(name="dropout-0.8", dropout=0.8),
    # Published: about 5 points more than after 20 epochs.
    Recipe(name="dropout-0.8-60", dropout=0.8, epochs=60),
    # Published: 81.96 % on the test set. The study does not say whether the momentum of 0.9 applies here. At batch
    # size 32, a learning rate of 0.05 with this momentum acts like 0.5, and the loss rises again after a few
    # epochs; without momentum the same recipe trains well. The other reading is `--set momentum=0.9`.
    Recipe(name="deep", model="deep", dropout=0.2, epochs=25, learning_rate=0.05, momentum=0.0),
)
_OWN = (
    # The study's best accuracy as fast as possible.
    Recipe(
        name="sprint",
        model="whitened",
        width=16,
        **_OURS | {"momentum": 0.75},
        epochs=5,
        sizes=((20, 3),),
        translate=1,
    ),
    # With batch normalisation fused it is the study's deep network. More validation images than in other recipes,
    # because its probabilities are calibrated on them.
    Recipe(
        name="deep-fast",
        model="deep-batch-norm",
        **_OURS,
        epochs=28,
        translate=3,
        cutout=8,
        validation_images=2500,
        validated_epochs=1,
    ),
    # The same network, learning from a teacher with the same images held out (`long`). The teacher's outputs stand for
    # what was cut out and shifted, so less of that is better. Its calibration has more coefficients than that of
    # `deep-fast`, and twice as many images to fit them on.
    Recipe(
        name="deep-distilled",
        model="deep-batch-norm",
        **_OURS,
        epochs=32,
        translate=2,
        validation_images=5000,
        validated_epochs=1,
        distillation=0.95,
    ),
    # For a few hundred images of one's own: the network of `deep-fast` from fresh weights, or from trained ones with
    # --init. From trained weights, smaller steps suffice and keep what was learned.
    Recipe(name="small", **_FEW_IMAGES, learning_rate=0.06, epochs=60),
    Recipe(name="fine-tune", **_FEW_IMAGES, learning_rate=0.01, epochs=20),
    # airbench94's training in our trainer, with 1,000 of the images held out.
    Recipe(name="airbench94", **_AIRBENCH, widths=(64, 256, 256), epochs=8),
    # Points of the curve of accuracy against time: about 0.8, 1, 2 and 4 times the time of airbench94's script on a CPU
    # with AMX. From about 12 epochs on, a third convolution in each group and cutout bring more than further epochs;
    # with 8 they cost accuracy.
    Recipe(name="fast", **_CURVE, epochs=7),
    Recipe(name="medium", **_CURVE, epochs=9),
    Recipe(name="long", **_DEEPER, epochs=14, cutout=10),
    # Of each 2,000 images the hardest 1,000 are trained on, so the rates are those for batches of 1,000.
    Recipe(name="best", **_DEEPER | {"batch_size": 2000}, epochs=42, cutout=12, hard_share=0.5),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*_STUDY, *_OWN)}

KEYS = tuple(key for key in Recipe.model_fields if key != "name")
"""The values that `--set` can change."""


def get_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with this name, changed by `key=value` overrides.

    A changed recipe gets a name of its own (`deep+momentum=0.9`), so that its runs do not mix with the original's.

    Raises:
        RecipeError: The recipe or a key is unknown, a key occurs twice, or a value has the wrong type or is out of
            range.
    """
    if name not in RECIPES:
        raise RecipeError(f"there is no recipe {name!r}; the recipes are: {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    changes: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or key not in KEYS:
            raise RecipeError(f"--set {override}: expected KEY=VALUE, where KEY is one of: {', '.join(KEYS)}")
        if key in changes:
            raise RecipeError(f"--set {override}: {key} is {changes[key]} already; set it once")
        changes[key] = text
    changed = read_recipe(recipe.values() | changes)
    suffix = "".join(
        f"+{key}={as_text(getattr(changed, key))}"
        for key in sorted(changes)
        if getattr(changed, key) != getattr(recipe, key)
    )
    return changed.model_copy(update={"name": name + suffix})


def asked_precision(option: Precision | None, overrides: Sequence[str], recipe: Recipe) -> Precision | None:
    """The precision that the user asked for, also if it is the recipe's own; None if the user left it open.

    Args:
        option: the value of `--precision`.
        overrides: the `key=value` of `--set`.
        recipe: the recipe with these overrides.

    Raises:
        RecipeError: Both give a precision.
    """
    if not any(override.partition("=")[0] == "precision" for override in overrides):
        return option
    if option is not None:
        raise RecipeError("--precision and --set precision are both given; give one of them")
    return recipe.precision


def batch_size_note(name: str, recipe: Recipe) -> str | None:
    """What to change together with the batch size; None if the recipe has the batch size of the original.

    Learning rates and momentum do not follow `--set batch_size`. With SGD, and for the output layer and biases of the
    optimizer Muon, a learning rate proportional to the batch size keeps the step per image. Muon's steps have a fixed
    length, and the square root is the usual choice. The momentum is chosen so that it averages over as many images.

    Args:
        name: name of the original recipe.
        recipe: the recipe with the changes of `--set`.
    """
    original = RECIPES[name]
    ratio = recipe.batch_size * recipe.hard_share / (original.batch_size * original.hard_share)
    if ratio == 1:
        return None
    muon = recipe.optimizer == "muon"
    scaled = {"learning_rate": original.learning_rate * (ratio**0.5 if muon else ratio)}
    if muon:
        scaled |= {key: getattr(original, key) * ratio for key in ("output_learning_rate", "bias_learning_rate")}
        scaled |= {"weight_decay": original.weight_decay * ratio} if original.weight_decay else {}
    scaled["momentum"] = original.momentum**ratio
    kept = [key for key in scaled if getattr(recipe, key) == getattr(original, key) and scaled[key] != 0]
    if not kept:
        return None
    options = " ".join(f"--set {key}={scaled[key]:.3g}" for key in kept)
    batch, usual = (
        f"{each.batch_size}" + (f" with hard_share={each.hard_share:g}" if each.hard_share < 1 else "")
        for each in (recipe, original)
    )
    return (
        f"batch_size is {batch} and not {usual}, but {', '.join(kept)} did not change with it; values that act alike "
        f"per image: {options}"
    )
