import dataclasses

import pytest

from cifar_core.recipes import RECIPES, Recipe, RecipeError, completed, get_recipe


def test_the_studys_rows_have_the_studys_values():
    base = {"batch_size": 32, "learning_rate": 0.001, "momentum": 0.9, "model": "baseline"}
    published = {
        "baseline": base | {"dropout": 0.0, "epochs": 20},
        "dropout-0.2": base | {"dropout": 0.2, "epochs": 20},
        "dropout-0.5": base | {"dropout": 0.5, "epochs": 20},
        "dropout-0.8": base | {"dropout": 0.8, "epochs": 20},
        "dropout-0.8-60": base | {"dropout": 0.8, "epochs": 60},
        "deep": {
            "batch_size": 32,
            "learning_rate": 0.05,
            "momentum": 0.0,
            "model": "deep",
            "dropout": 0.2,
            "epochs": 25,
        },
    }
    for name, values in published.items():
        recipe = dataclasses.asdict(RECIPES[name])
        assert {key: recipe[key] for key in values} == values
        assert recipe["validation_images"] == 1000


def test_an_overridden_recipe_has_a_name_of_its_own():
    recipe = get_recipe("deep", ["momentum=0.9", "epochs=2"])
    assert (recipe.momentum, recipe.epochs, recipe.learning_rate) == (0.9, 2, 0.05)
    assert recipe.name == "deep+epochs=2+momentum=0.9"


def test_an_override_by_the_same_value_changes_nothing():
    assert get_recipe("deep", ["momentum=0.0"]) == RECIPES["deep"]


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["deep"].epochs = 1


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("shallow", None, "no recipe is called 'shallow'; there are: baseline"),
        ("deep", "depth=3", "expected key=value with one of the keys model, dropout"),
        ("deep", "name=other", "expected key=value"),
        ("deep", "epochs", "expected key=value"),
        ("deep", "epochs=two", "'two' is not a int"),
        ("deep", "epochs=0", "epochs is 0, but must be at least 1"),
        ("deep", "dropout=1", "must be at least 0 and below 1"),
        ("deep", "momentum=-0.1", "must be at least 0 and below 1"),
        ("deep", "learning_rate=0", "must be above 0"),
        ("deep", "learning_rate=nan", "must be above 0"),
        ("deep", "model=transformer", "must be one of: baseline, deep"),
        ("deep", "sampler=random", "must be one of: subset, weighted"),
        ("sprint", "sizes=24", "must be like 20:2,24:1"),
        ("sprint", "sizes=8:1", "each size must be 16 to 32"),
        ("deep", "sizes=24:1", "for a network with batch normalisation"),
        ("deep", "optimizer=muon", "needs output_learning_rate"),
        ("deep", "width=16", "above 0 for the network whitened and 0 for others"),
        ("sprint", "width=0", "above 0 for the network whitened and 0 for others"),
        ("sprint", "warmup=1", "must be at least 0 and below 1"),
        ("sprint", "translate=-1", "must be at least 0"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_with_what_can(name, override, message):
    with pytest.raises(RecipeError) as caught:
        get_recipe(name, [override] if override else None)
    assert message in str(caught.value)


def test_sizes_name_the_epochs_they_are_for_and_full_size_comes_after():
    recipe = get_recipe("sprint", ["sizes=20:2,24:1", "epochs=5"])
    assert [recipe.image_size(epoch) for epoch in range(5)] == [20, 20, 24, 32, 32]
    assert get_recipe("deep").image_size(0) == 32


def test_the_values_of_an_older_recipe_are_completed_with_the_defaults_of_the_newer():
    values = dataclasses.asdict(RECIPES["deep"])
    older = {key: value for key, value in values.items() if key not in ("sizes", "optimizer", "width", "schedule")}
    assert completed(older) == values
    assert completed(older | {"momentum": 0.9}) != values


def test_muon_is_refused_without_batch_normalisation():
    with pytest.raises(RecipeError, match="without batch normalisation needs sgd"):
        Recipe("x", optimizer="muon", output_learning_rate=0.1, bias_learning_rate=0.1)
