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
from lipcert.recipes.crm import crm_cifar10_depth

SHAPES = {  # some smaller than the pictures, for speed
    "digits": (1, 8, 8),
    "ylecun/mnist": (1, 28, 28),
    "ufldl-stanford/svhn:cropped_digits": (3, 8, 8),
    "uoft-cs/cifar10": (3, 32, 32),
    "zh-plus/tiny-imagenet": (3, 24, 24),
}


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_takes_a_step_that_lowers_its_loss(name):
    recipe = recipes.get(name)
    shape = SHAPES[recipe.data]
    net = recipe.model(in_shape=shape, classes=10).eval()  # no dropout between the comparisons
    bound = recipe.bound(lc.trace(net, shape))
    optimiser = recipe.optimiser(net.parameters(), 1e-4)
    x = torch.rand(16, *shape)
    # What the loss protects: one that protects predictions may jump where a prediction goes wrong.
    y = recipe.loss.protects(net(x), torch.arange(16) % 10)

    def loss():
        logits = net(x)
        row = bound(x).row(recipe.loss.protects(logits, y))
        return recipe.loss(logits, y, row, 0.01, **recipe.loss_options)

    values = []
    for _ in range(2):
        optimiser.zero_grad()
        values.append(loss())
        values[-1].backward()
        optimiser.step()
    assert loss() < values[0]
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


CRM = {  # epochs, batch, r0, t, lambda, first epoch of decay, first and last rate
    "crm-mnist-c4f3_bcp": (400, 512, 2.2, 5, 30, 25, 1e-3, 1e-6),
    "crm-cifar10-c6f2_crm": (400, 512, 0.2, 5, 15, 200, 1e-3, 1e-6),
    "crm-cifar10-c6f2_bcp": (400, 512, 0.2, 5, 15, 200, 1e-3, 1e-6),
    "crm-tiny-c8f2_crm": (300, 256, 0.2, 12, 150, 100, 1e-4, 1e-7),
}


@pytest.mark.parametrize("name", CRM)
def test_the_settings_of_crm_in_epochs(name):
    recipe = recipes.get(name)
    epochs, batch, r0, t, weight, decay, first, last = CRM[name]
    assert (recipe.epochs, recipe.batch_size) == (epochs, batch)
    assert recipe.loss_options == {"t": t, "weight": weight}
    group = recipe.optimiser([torch.nn.Parameter(torch.zeros(1))], first).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-7, 0)
    steps = 70  # an epoch

    def at(schedule, step):
        return schedule(step / (epochs * steps - 1))

    radii = [recipe.eps * at(recipe.eps_schedule, 10 * steps + s) for s in (-700, -1, 0, 1000)]
    assert radii == [0, 0, r0, r0]
    rates = {0: first, decay * steps - 1: first, epochs * steps - 1: last}
    for step, rate in rates.items():
        found = recipe.learning_rate * at(recipe.learning_rate_schedule, step)
        assert found == pytest.approx(rate, rel=1e-9)
    assert recipe.learning_rate * at(recipe.learning_rate_schedule, (decay + 1) * steps) < first


def test_crm_on_cifar10_says_that_the_published_figure_is_of_another_scale():
    recipe = recipes.get("crm-cifar10-c6f2_crm")
    assert "36/255" in recipe.radii
    (certified,) = (p for p in recipe.published if "CRA" in p.what)
    assert "not comparable" in certified.certainty
    assert "[-1, 1]" in certified.certainty


def test_pictures_of_crm_keep_their_shape_and_range():
    for name, outside in (("crm-cifar10-c6f2_crm", 0.5), ("crm-tiny-c8f2_crm", 0.0)):
        pictures = recipes.get(name).augment(torch.ones(64, 3, 32, 32))
        assert pictures.shape == (64, 3, 32, 32)
        assert set(pictures.unique().tolist()) == {1.0, outside}


@pytest.mark.parametrize(("convolutions", "dense"), [(6, 2), (9, 3), (11, 4)])
def test_any_member_of_the_timing_study_has_a_recipe(convolutions, dense):
    recipe = crm_cifar10_depth(convolutions, dense)
    net = recipe.model(in_shape=(3, 32, 32), classes=10)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in net) == convolutions
    assert f"c{convolutions}f{dense}" in recipe.name
    assert recipe.epochs == 20
    assert recipe.eps_schedule(0.0) == 1


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
