"""Recipes: each builds and trains one step; settings are checked before any work."""

import datasets
import pytest
import torch

import lipcert as lc
from lipcert import recipes
from lipcert.data import Split, load
from lipcert.errors import LipcertError
from lipcert.radii import parse_radius
from lipcert.recipe import SETTABLE, override, settings

SHAPES = {  # smaller than SVHN's pictures, for speed
    "digits": (1, 8, 8),
    "ylecun/mnist": (1, 28, 28),
    "ufldl-stanford/svhn:cropped_digits": (3, 8, 8),
}


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_takes_a_step_that_lowers_its_loss(name):
    recipe = recipes.get(name)
    shape = SHAPES[recipe.data]
    net = recipe.model(in_shape=shape, classes=10).eval()  # no dropout between the comparisons
    bound = recipe.bound(lc.trace(net, shape))
    optimiser = recipe.optimiser(net.parameters(), 1e-4)
    x, y = torch.rand(16, *shape), torch.arange(16) % 10

    def loss():
        logits = net(x)
        row = bound(x).row(recipe.loss.protects(logits, y))
        return recipe.loss(logits, y, row, 0.01, **recipe.loss_options)

    before = loss()
    for _ in range(3):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
    assert loss() < before
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_says_where_its_numbers_come_from(name):
    recipe = recipes.get(name)
    assert recipe.name == name
    assert all(p.source and p.certainty for p in recipe.published)
    assert all(parse_radius(text) > 0 for text in recipe.radii)
    assert set(settings(recipe)) == set(SETTABLE)
    for progress in (0.0, 0.3, 1.0):
        assert 0 <= recipe.eps_schedule(progress) <= 1
        assert 0 <= recipe.learning_rate_schedule(progress) <= 1


@pytest.mark.parametrize(
    ("name", "end"), [("lmt-svhn-wrn16_4", 1e-2), ("lmt-svhn-wrn16_4-avg", 1e-1)]
)
def test_the_svhn_schedules_in_epochs(name, end):
    recipe = recipes.get(name)
    assert (recipe.epochs, recipe.batch_size, recipe.loss_options) == (160, 128, {})

    def at(schedule, epoch):
        steps = 515  # an epoch
        return schedule(epoch * steps / (160 * steps - 1))

    radii = {0: 1e-5, 2.5: end / 2, 5: end, 159: end}
    for epoch, radius in radii.items():
        found = recipe.eps * at(recipe.eps_schedule, epoch)
        assert found == pytest.approx(radius, rel=2e-3)
    rates = {0: 1e-2, 79.9: 1e-2, 80: 1e-3, 119.9: 1e-3, 120: 1e-4, 159: 1e-4}
    for epoch, rate in rates.items():
        found = recipe.learning_rate * at(recipe.learning_rate_schedule, epoch)
        assert found == pytest.approx(rate)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        (recipes.get("lmt-svhn-wrn16_4").data, ("ufldl-stanford/svhn", "cropped_digits")),
        (recipes.get("lmt-mnist").data, ("ylecun/mnist", None)),
    ],
)
def test_the_hub_is_asked_for_the_recipes_configuration(monkeypatch, source, asked):
    seen = []

    def builder(*arguments):
        seen.append(arguments)
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    with pytest.raises(LipcertError, match="hub"):
        load(source, Split.TRAIN)
    assert seen == [asked]


def test_settings_survive_as_text():
    recipe = recipes.get("lmt-mnist")
    typed = {"eps": "36/255", "epochs": "3", "learning_rate": "1e-4", "data": "/somewhere"}
    changed = override(recipe, typed)
    assert (changed.eps, changed.epochs, changed.learning_rate) == (36 / 255, 3, 1e-4)
    assert override(recipe, settings(changed)) == changed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nosuch", "1"),
        ("loss", "ce"),
        ("epochs", "0"),
        ("epochs", "2.5"),
        ("epochs", "many"),
        ("batch_size", "-1"),
        ("eps", "0"),
        ("eps", "-36/255"),
        ("eps", "1/0"),
        ("eps", "nan"),
        ("learning_rate", "0"),
        ("validation", "1"),
        ("seed", "-1"),
    ],
)
def test_a_senseless_setting_is_refused_by_name(field, value):
    with pytest.raises(LipcertError, match=field):
        override(recipes.get("lmt-digits"), {field: value})


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(LipcertError, match="lmt-digits"):
        recipes.get("lmt-cifar")


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "inf", "nan", "1/0", "36//255"])
def test_a_radius_is_a_positive_finite_number(text):
    with pytest.raises(LipcertError, match="eps"):
        parse_radius(text)


def test_a_radius_is_a_fraction_or_a_decimal():
    assert parse_radius("36/255") == 36 / 255
    assert parse_radius(" 1.58 ") == 1.58
