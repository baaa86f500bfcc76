import json

import pytest
from pydantic import ValidationError

from cifar_core.recipe import RecipeError, read_recipe
from cifar_core.recipes import RECIPES, asked_precision, batch_size_note, get_recipe
from tests.conftest import REPOSITORY


def test_the_recipes_of_the_study_have_its_values():
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
        recipe = RECIPES[name].values()
        assert {key: recipe[key] for key in values} == values
        assert recipe["validation_images"] == 1000


def test_a_changed_recipe_has_a_name_of_its_own():
    recipe = get_recipe("deep", ["momentum=0.9", "epochs=2"])
    assert (recipe.momentum, recipe.epochs, recipe.learning_rate) == (0.9, 2, 0.05)
    assert recipe.name == "deep+epochs=2+momentum=0.9"


def test_setting_a_value_that_a_recipe_has_already_changes_nothing():
    assert get_recipe("deep", ["momentum=0.0"]) == RECIPES["deep"]
    assert get_recipe("sprint", ["sizes=20:3"]) == RECIPES["sprint"]


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        RECIPES["deep"].epochs = 1


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("shallow", None, "there is no recipe 'shallow'; the recipes are: baseline"),
        ("deep", "layers=3", "expected KEY=VALUE, where KEY is one of: model, dropout"),
        ("deep", "name=other", "expected KEY=VALUE"),
        ("deep", "epochs", "expected KEY=VALUE"),
        ("deep", "epochs=two", "epochs is two, but should be a valid integer"),
        ("deep", "epochs=0", "epochs is 0, but should be greater than 0"),
        ("deep", "dropout=1", "dropout is 1, but should be less than 1"),
        ("deep", "momentum=-0.1", "momentum is -0.1, but should be greater than or equal to 0"),
        ("deep", "learning_rate=0", "should be greater than 0"),
        ("deep", "learning_rate=nan", "should be a finite number"),
        ("deep", "model=transformer", "must be one of: baseline, deep"),
        ("deep", "sampler=random", "sampler is random, but should be 'subset' or 'weighted'"),
        ("sprint", "sizes=24", "must be SIZE:EPOCHS pairs separated by commas, such as 20:4,24:10"),
        ("sprint", "sizes=8:1", "sizes contains 8, but should be greater than or equal to 16"),
        ("sprint", "sizes=40:1", "sizes contains 40, but should be less than or equal to 32"),
        ("sprint", "sizes=20:0", "sizes contains 0, but should be greater than 0"),
        ("deep", "sizes=24:1", "requires a network with batch normalisation, which deep does not have"),
        ("deep", "optimizer=muon", "deep, which has no batch normalisation, must be trained with sgd"),
        ("sprint", "bias_learning_rate=0", "needs output_learning_rate and bias_learning_rate above 0"),
        ("deep", "width=16", "width is 16, but must be 0 for the network deep"),
        ("sprint", "width=0", "width is 0, but must be above 0 for the network whitened"),
        ("sprint", "widths=64,256", "together with 3 numbers in widths"),
        ("best", "widths=64,256,many", "must be channels separated by commas, such as 64,256,256"),
        ("best", "width=16", "width is 16, but must be above 0 for the network whitened, or 0 together with"),
        ("deep-fast", "activation=gelu", "the network deep-batch-norm does not have this option"),
        ("sprint", "depth=4", "should be less than or equal to 3"),
        ("sprint", "batch_size=3", "batch_size is 3, but must be at least 4 for the network whitened"),
        ("sprint", "whiten_bias_epochs=9", "whiten_bias_epochs is 9, but must be at most epochs, 5"),
        ("deep", "validated_epochs=1", "validated_epochs requires weights=last"),
        ("deep", "weight_decay=0.1", "weight_decay requires optimizer muon"),
        ("deep", "statistics_images=100", "requires a network with batch normalisation"),
        ("sprint", "warmup=1", "should be less than 1"),
        ("sprint", "hard_share=0", "hard_share is 0, but should be greater than 0"),
        ("sprint", "hard_share=1.5", "hard_share is 1.5, but should be less than or equal to 1"),
        ("deep", "hard_share=0.5", "hard_share below 1 requires optimizer muon"),
        ("sprint", "translate=-1", "should be greater than or equal to 0"),
        ("sprint", "translate=32", "translate is 32, but should be less than 32"),
        ("sprint", "cutout=33", "cutout is 33, but should be less than or equal to 32"),
        ("deep", f"split_seed={2**32}", "but should be less than 4294967296"),
        ("deep", f"batch_size={10**10}", "but should be less than or equal to 1000000000"),
        ("best", "widths=64,256,1000000", "widths contains 1000000, but should be less than or equal to 4096"),
        ("sprint", "width=513", "width is 513, but should be less than or equal to 512"),
    ],
)
def test_an_impossible_recipe_is_refused_and_the_message_says_what_is_possible(name, override, message):
    with pytest.raises(RecipeError) as caught:
        get_recipe(name, [override] if override else [])
    assert message in str(caught.value)


def test_the_first_epochs_have_the_sizes_of_the_recipe_and_the_others_full_size():
    recipe = get_recipe("sprint", ["sizes=20:2,24:1", "epochs=5"])
    assert [recipe.image_size(epoch) for epoch in range(5)] == [20, 20, 24, 32, 32]
    assert get_recipe("deep").image_size(0) == 32


def test_sizes_are_readable_in_the_name_of_a_recipe_and_nested_lists_in_json():
    recipe = get_recipe("sprint", ["sizes=20:2,24:1"])
    assert recipe.sizes == ((20, 2), (24, 1))
    assert recipe.name == "sprint+sizes=20:2,24:1"
    values = json.loads(json.dumps(recipe.values()))
    assert values["sizes"] == [[20, 2], [24, 1]]
    assert read_recipe(values) == recipe
    assert get_recipe("sprint", ["sizes="]).sizes == ()


def test_a_saved_recipe_gets_the_defaults_of_values_that_did_not_exist_when_it_was_saved():
    values = RECIPES["deep"].values()
    older = {key: value for key, value in values.items() if key not in ("sizes", "optimizer", "width", "schedule")}
    assert read_recipe(older) == RECIPES["deep"]
    assert read_recipe(older | {"momentum": 0.9}) != RECIPES["deep"]


def test_widths_are_readable_in_the_name_of_a_recipe():
    recipe = get_recipe("airbench94", ["widths=32,64,128", "identity_init=false"])
    assert recipe.widths == (32, 64, 128)
    assert recipe.name == "airbench94+widths=32,64,128"
    assert read_recipe(json.loads(json.dumps(recipe.values()))) == recipe


def test_a_changed_batch_size_is_reported_with_rates_that_act_alike():
    assert batch_size_note("deep", get_recipe("deep")) is None
    note = batch_size_note("baseline", get_recipe("baseline", ["batch_size=64"]))
    assert note == (
        "batch_size is 64 and not 32, but learning_rate, momentum did not change with it; values that act alike per "
        "image: --set learning_rate=0.002 --set momentum=0.81"
    )
    note = batch_size_note("best", get_recipe("best", ["hard_share=1"]))
    assert note.startswith("batch_size is 2000 and not 2000 with hard_share=0.5, but learning_rate")
    assert "--set learning_rate=0.24" in note
    assert batch_size_note("best", get_recipe("best", ["hard_share=1", "batch_size=1000"])) is None
    changed = ["batch_size=500", "learning_rate=0.12", "momentum=0.88"]
    note = batch_size_note("airbench94", get_recipe("airbench94", changed))
    assert "output_learning_rate, bias_learning_rate, weight_decay did not change" in note
    assert "--set bias_learning_rate=26.5 --set weight_decay=0.001" in note


def test_only_the_last_epochs_are_validated_if_the_recipe_says_so():
    recipe = get_recipe("sprint", ["epochs=5", "validated_epochs=2"])
    assert [recipe.is_validated(epoch) for epoch in range(5)] == [False, False, False, True, True]
    assert all(map(get_recipe("sprint").is_validated, range(5)))


def test_sizes_saved_as_text_by_earlier_versions_are_converted():
    assert read_recipe(RECIPES["sprint"].values() | {"sizes": "20:3"}) == RECIPES["sprint"]
    assert read_recipe(RECIPES["deep"].values() | {"sizes": ""}) == RECIPES["deep"]


def test_every_committed_run_has_a_recipe_that_can_be_read():
    files = sorted(REPOSITORY.glob("docs/results/**/recipe.json"))
    assert len(files) > 20
    for file in files:
        recipe = read_recipe(json.loads(file.read_bytes())["recipe"])
        name, *overrides = recipe.name.split("+")
        if "histories" in file.parts:  # our own recipes have changed since
            assert recipe == get_recipe(name, overrides)


def test_a_saved_recipe_with_an_unknown_value_is_refused_with_advice():
    with pytest.raises(RecipeError, match="no recipe value 'layers'; train again, or use the version that saved"):
        read_recipe(RECIPES["deep"].values() | {"layers": 3})
    with pytest.raises(RecipeError, match="epochs is None, but should be a valid integer"):
        read_recipe(RECIPES["deep"].values() | {"epochs": None})


def test_a_key_is_set_once():
    with pytest.raises(RecipeError, match="--set epochs=2: epochs is 1 already; set it once"):
        get_recipe("deep", ["epochs=1", "epochs=2"])


def test_the_precision_is_asked_for_once():
    recipe = get_recipe("sprint", ["precision=fp32"])
    assert asked_precision(None, [], recipe) is None
    assert asked_precision("bf16", ["epochs=2"], recipe) == "bf16"
    assert asked_precision(None, ["precision=fp32"], recipe) == "fp32"
    with pytest.raises(RecipeError, match="--precision and --set precision are both given"):
        asked_precision("bf16", ["precision=fp32"], recipe)
