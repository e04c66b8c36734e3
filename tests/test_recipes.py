"""Recipes: each builds and trains one step; settings are checked before any work."""

import datasets
import pytest
import torch

import lipcert as lc
from lipcert import losses, models, recipes
from lipcert.data import Split, load
from lipcert.errors import LipcertError
from lipcert.layers import ClippedMaxMin, ClippedReLU
from lipcert.radii import parse_radius
from lipcert.recipe import SETTABLE, override, settings
from lipcert.recipes.crm import crm_cifar10_depth
from lipcert.recipes.local_lip import cropped

SHAPES = {  # some smaller than the pictures, for speed
    "digits": (1, 8, 8),
    "ylecun/mnist": (1, 28, 28),
    "ufldl-stanford/svhn:cropped_digits": (3, 8, 8),
    "uoft-cs/cifar10": (3, 32, 32),
    "uoft-cs/cifar100": (3, 32, 32),
    "zh-plus/tiny-imagenet": (3, 24, 24),
    "moons": (2,),
}


SMALLER = {  # for local and ellipsoid bounds
    "ylecun/mnist": (1, 12, 12),
    "uoft-cs/cifar10": (3, 12, 12),
}

_SIZE = models.PotentialSize(depth=2, channels=6, dense=1, width=8)
SMALL_NETS = {  # where the published ones have hundreds of millions of parameters
    "cll-cifar100-cpl": {"size": _SIZE},
    "cpl-cifar100": {"size": _SIZE},
    "cll-cifar100-sll": {"size": _SIZE},
    "sll-cifar100": {"size": _SIZE},
    "cll-cifar100-soc": {"blocks": 1, "channels": 4},
    "soc-cifar100": {"blocks": 1, "channels": 4},
}


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_takes_a_step_that_lowers_its_loss(name):
    recipe = recipes.get(name)
    slow = recipe.loss in (losses.bcp, losses.local_lip) or name.startswith("ellipsoid")
    shape = (SHAPES | SMALLER if slow else SHAPES)[recipe.data]
    net = recipe.model(
        in_shape=shape, classes=10, **SMALL_NETS.get(name, {})
    ).eval()  # no dropout between the comparisons
    bound = recipe.bound(lc.trace(net, shape))
    optimiser = recipe.optimiser(net.parameters(), 1e-4)
    x = torch.rand(16, *shape)
    # What the loss protects: one that protects predictions may jump where a prediction goes wrong.
    y = recipe.loss.protects(net(x), torch.arange(16) % 10)

    def loss():
        logits = net(x)
        constants = bound(x, 0.01) if bound.local else bound(x)
        row = constants.within(recipe.loss.protects(logits, y), 0.01)
        return recipe.loss(logits, y, row, 0.01, **recipe.loss_options)

    with torch.no_grad():  # iterated norms rise until they have converged, and the loss with them
        for _ in range(8 if bound.local or recipe.data == "moons" else 0):
            bound(x[:1], 0.01)
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


LOCAL_LIP = {  # epochs, warm-up, ramp, batch, eps, iterations, first and last rate, thresholds
    "local-lip-mnist-c4f3_bcp": (300, 0, 150, 256, 1.75, 5, 1e-3, 5e-6, 48_064),
    "local-lip-cifar10-c4f3_bcp": (800, 20, 400, 256, 0.1551, 2, 1e-3, 1e-6, 62_464),
    "local-lip-cifar10-c6f2_bcp": (800, 20, 400, 256, 0.1551, 2, 1e-3, 1e-6, 111_104),
    "local-lip-cifar10-c6f2_bcp-maxmin": (800, 20, 400, 256, 0.1551, 2, 1e-3, 1e-6, 111_104),
}


@pytest.mark.parametrize("name", LOCAL_LIP)
def test_the_settings_of_local_lip_in_epochs(name):
    recipe = recipes.get(name)
    epochs, warmup, ramp, batch, eps, iterations, first, last, thresholds = LOCAL_LIP[name]
    assert (recipe.epochs, recipe.batch_size, recipe.eps) == (epochs, batch, eps)
    net = recipe.model(in_shape=SHAPES[recipe.data], classes=10)
    others = [p for key, p in net.named_parameters() if key.split(".")[1] not in ("weight", "bias")]
    assert sum(p.numel() for p in others) == thresholds
    convolutions = [m for m in net if isinstance(m, torch.nn.Conv2d)]
    assert not any(m.bias.any() for m in convolutions)
    wide = convolutions[-1].weight  # 4 x 4, 64 outputs
    assert wide.std().item() == pytest.approx((2 / (16 * 64)) ** 0.5, rel=0.02)
    assert recipe.bound(lc.trace(net, SHAPES[recipe.data])).norm == lc.PowerIteration(iterations)
    schedules = [recipe.eps_schedule]
    if recipe.loss is losses.bcp:
        schedules.append(lambda t: 1 - recipe.loss_schedules["kappa"](t))
    else:
        assert not recipe.loss_schedules
    for schedule in schedules:
        assert schedule(0.999 * warmup / epochs) == 0
        assert schedule((warmup + ramp / 2) / epochs) == pytest.approx(0.5, abs=0.01)
        assert schedule((warmup + ramp - 2) / epochs) < 1
        assert schedule((warmup + ramp) / epochs) == 1
        assert schedule(1.0) == 1
    flat = (epochs // 2 + 25) / epochs
    rates = {0.0: first, flat: first, 1.0: last}
    for progress, rate in rates.items():
        found = recipe.learning_rate * recipe.learning_rate_schedule(progress)
        assert found == pytest.approx(rate)
    assert recipe.learning_rate_schedule(flat + 0.01) < 1
    with torch.no_grad():
        others[0].fill_(-1)
    recipe.after_step(net)
    assert (others[0] == (-1 if "maxmin" in name else 0)).all()


def test_thresholds_of_local_lip_at_the_start():
    def found(name):
        net = recipes.get(name).model(in_shape=SHAPES[recipes.get(name).data], classes=10)
        layers = [m for m in net if isinstance(m, ClippedReLU | ClippedMaxMin)]
        return [tuple(p.detach().unique().item() for p in m.parameters()) for m in layers]

    assert set(found("local-lip-mnist-c4f3_bcp")) == {(1.0,)}
    assert set(found("local-lip-cifar10-c4f3_bcp")) == {(1.0,)}
    assert set(found("local-lip-cifar10-c6f2_bcp")) == {(2.0,)}
    six = found("local-lip-cifar10-c6f2_bcp-maxmin")
    assert six[:2] == [(0.1, -0.1), (0.1, -0.15)]
    assert six[-1] == (1.2, -1.2)
    eight = found("local-lip-tiny-c8f2_bcp-maxmin")
    assert [t for t, _ in eight] == [0.8, 1.0, 1.4, 1.4, 1.4, 1.6, 2.0, 3.0, 1.6]


def test_the_bounds_of_bcp_and_local_lip_in_their_recipes():
    """Which maps are counted for each sample: all, some, none."""
    cases = {
        "local-lip-mnist-c4f3_bcp": None,
        "local-lip-tiny-c8f2_bcp": ("0", "6", "12", "14", "16+17"),
        "bcp-mnist": (),
        "bcp-cifar10": (),
    }
    for name, masked in cases.items():
        bound = recipes.get(name).bound
        assert bound.keywords["masked"] == masked
        assert bound.keywords["region"].eps == recipes.get(name).eps


def test_pictures_of_local_lip_are_crops_after_padding_by_four():
    x = torch.arange(1.0, 32 * 32 + 1).reshape(1, 1, 32, 32).expand(4000, 1, 32, 32)
    crops = cropped(x)
    padded = torch.nn.functional.pad(x[:1], (4, 4, 4, 4))[0, 0]
    windows = padded.unfold(0, 32, 1).unfold(1, 32, 1)  # the 81 crops
    either = torch.cat([windows.reshape(81, -1), windows.flip(3).reshape(81, -1)])
    marks = torch.randn(32 * 32)
    same = torch.isclose((crops.flatten(1) @ marks)[:, None], either @ marks, rtol=0, atol=1e-6)
    assert (same.sum(1) == 1).all()
    counts = same.sum(0)
    assert counts.min() > 5  # 25 on average
    assert counts.max() < 60


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


def test_an_unknown_recipe_lists_those_like_it_or_all():
    with pytest.raises(LipcertError, match=r"mean .*bcp-cifar10.* lipcert recipes"):
        recipes.get("bcp-cifar")
    with pytest.raises(LipcertError, match=r"lmt-digits.*ellipsoid-tiny-c8f2_bcp"):
        recipes.get("?")


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "inf", "nan", "1/0", "36//255"])
def test_a_radius_is_a_positive_finite_number(text):
    with pytest.raises(LipcertError, match="eps"):
        parse_radius(text)


def test_a_radius_is_a_fraction_or_a_decimal():
    assert parse_radius("36/255") == 36 / 255
    assert parse_radius(" 1.58 ") == 1.58
