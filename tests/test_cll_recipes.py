"""The settings of CLL and of its baselines in iterations, as published."""

import dataclasses

import pytest
import torch
from torch import nn

from lipcert import losses, models, recipes
from lipcert.layers import Householder, LastLayerNormalized, MaxMin, Normalize, SOCConv2d
from lipcert.losses.calibration import calibration

ITERATIONS = 801 * 390
DROPS = (156_000, 234_000, 304_200)

CLL = {  # data, batch, rate, eps, slack, decay, whether the scale rises
    "cll-cifar10-c4f3_cll": ("cifar10", 128, 1e-3, 0.15, 0.3, 1e-4, False),
    "cll-cifar10-c6f2_bcp": ("cifar10", 128, 1e-3, 0.15, 0.3, 1e-6, False),
    "cll-tiny-c8f2_bcp": ("tiny-imagenet", 256, 2.5e-4, 1.0, 0.025, 1e-3, True),
    "cll-tiny-c8f2_bcp-slack": ("tiny-imagenet", 256, 2.5e-4, 0.15, 0.3, 1e-5, True),
}


def at(schedule, iteration, iterations=ITERATIONS):
    """The value in this iteration, counted from 0, as the training asks for it."""
    return schedule(iteration / (iterations - 1))


@pytest.mark.parametrize("name", CLL)
def test_the_settings_of_cll_in_iterations(name):
    recipe = recipes.get(name)
    data, batch, rate, eps, slack, decay, rising = CLL[name]
    assert recipe.data.split("/")[1] == data
    assert (recipe.epochs, recipe.batch_size) == (801, batch)
    assert (recipe.eps, recipe.learning_rate) == (eps, rate)
    assert ITERATIONS == 312_390
    assert recipe.loss is losses.cll
    # Two-sided, K a constant for the gradient: what the loss does unless told otherwise.
    assert recipe.loss_options == {"slack": slack}
    assert recipe.regularise == losses.ConstantDecay(decay, power=2.0)
    assert all(recipe.eps_schedule(t) == 1 for t in (0.0, 0.01, 0.5, 1.0))
    schedule = recipe.learning_rate_schedule
    assert at(schedule, 0) == 1
    for number, drop in enumerate(DROPS):
        assert at(schedule, drop - 1) == pytest.approx(0.1**number)
        assert at(schedule, drop) == pytest.approx(0.1 ** (number + 1))
    assert at(schedule, ITERATIONS - 1) == pytest.approx(1e-3)
    group = recipe.optimiser([nn.Parameter(torch.zeros(1))], rate).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)
    assert set(recipe.loss_schedules) == ({"scale"} if rising else set())
    for change in recipe.loss_schedules.values():
        assert change(0.0) == pytest.approx(0.01)
        assert change(1 / 8) == pytest.approx(0.74, abs=0.001)
        assert change(0.5) == pytest.approx(1 - 0.99 / 2**10)
        assert change(1.0) == 1


POSTER = {  # 1 / sigma as the authors print it
    "cll-tiny-c8f2_bcp": 4.4,
    "cll-cifar100-cpl": 7.6,
    "cll-cifar100-sll": 6.5,
    "cll-cifar100-soc": 9.2,
}


@pytest.mark.parametrize("name", POSTER)
def test_radius_and_slack_give_the_constant_on_the_poster(name):
    recipe = recipes.get(name)
    constant = calibration(recipe.eps, recipe.loss_options["slack"]).constant
    assert round(constant, 1) == POSTER[name]


@pytest.mark.parametrize("name", ["cll-cifar10-c4f3_cll", "cll-tiny-c8f2_bcp"])
def test_weights_at_the_start(name):
    recipe = recipes.get(name)
    side = 32 if "cifar" in name else 64
    net = recipe.model(in_shape=(3, side, side), classes=200 if side == 64 else 10)
    assert any(isinstance(m, MaxMin) for m in net)
    assert not any(isinstance(m, nn.ReLU) for m in net)
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert not layer.bias.any()
            inputs = layer.weight[0].numel()
            few = 3 * (2 * layer.weight.numel()) ** -0.5  # three deviations of a deviation
            assert layer.weight.std().item() == pytest.approx(
                (2 / inputs) ** 0.5, rel=max(few, 0.005)
            )


def test_parameters_of_the_published_nets():
    counts = {"cll-cifar10-c4f3_cll": 2_431_018, "cll-cifar10-c6f2_bcp": 2_250_378}
    for name, count in counts.items():
        with torch.device("meta"):
            net = recipes.get(name).model(in_shape=(3, 32, 32), classes=10)
        assert sum(p.numel() for p in net.parameters()) == count
    with torch.device("meta"):
        net = recipes.get("cll-tiny-c8f2_bcp").model(in_shape=(3, 64, 64), classes=200)
        moons = recipes.get("cll-moons").model(in_shape=(2,), classes=2)
    assert sum(p.numel() for p in net.parameters()) == 4_342_984
    assert sum(p.numel() for p in moons.parameters()) == 3_782


def test_the_baseline_of_cll_differs_in_the_loss():
    ours, gloro = recipes.get("cll-cifar10-c4f3_cll"), recipes.get("gloro-cifar10-c4f3_cll")
    assert gloro.loss is losses.gloro
    assert (gloro.loss_options, gloro.regularise) == ({}, None)
    for t in (0.0, 0.1, 0.5, 1.0):  # from 0 to eps with the power 5
        assert gloro.eps_schedule(t) == pytest.approx(1 - (1 - t) ** 5)
    for field in ("eps", "epochs", "batch_size", "learning_rate", "data", "optimiser"):
        assert getattr(gloro, field) == getattr(ours, field)


def test_moons_are_learnt_one_sided_as_in_the_paper():
    recipe = recipes.get("cll-moons")
    assert recipe.loss_options == {"slack": 1e-4, "margin_offset": losses.Offset.ONE_SIDED}
    assert (recipe.eps, recipe.batch_size, recipe.seed) == (0.15, 100, 123)
    assert recipe.regularise == losses.ConstantDecay(1e-6)
    assert recipe.validation == 0


@pytest.mark.parametrize(
    ("name", "side", "most"), [("cll-cifar10-c6f2_bcp", 32, 4), ("cll-tiny-c8f2_bcp", 64, 8)]
)
def test_pictures_move_by_up_to_an_eighth_and_change_their_colours(name, side, most):
    """A bright pixel in the middle, where a turn by 2 degrees changes nothing."""
    middle = side // 2
    x = torch.zeros(600, 3, side, side)
    x[:, :, middle, middle] = 0.5
    found = recipes.get(name).augment(x)
    assert found.shape == x.shape
    bright = found[:, 0] > 0.2
    assert (bright.flatten(1).sum(1) == 1).all()
    rows, columns = bright.nonzero()[:, 1], bright.nonzero()[:, 2]
    assert (rows.min(), rows.max()) == (middle - most, middle + most)
    # Mirrored, the pixel was left of the middle by one.
    assert (columns.min(), columns.max()) == (middle - 1 - most, middle + most)
    values = found[:, 0].flatten(1).amax(1)
    assert values.min() < 0.33
    assert values.max() > 0.67


# ---------------------------------------------------------------- 1-Lipschitz networks

ONE_LIPSCHITZ = {  # eps, slack, decay, epochs, batch, rate
    "cll-cifar100-cpl": (1.0, 1e-3, 1e-3, 200, 256, 1e-3),
    "cll-cifar100-sll": (1.0, 3e-3, 1e-5, 1000, 256, 1e-2),
    "cll-cifar100-soc": (0.5, 0.02, 1e-5, 200, 128, 1e-3),
}
TRIANGLES = ["cll-cifar100-cpl", "cpl-cifar100", "cll-cifar100-sll", "sll-cifar100"]


@pytest.mark.parametrize("name", ONE_LIPSCHITZ)
def test_the_settings_of_cll_on_1_lipschitz_networks(name):
    recipe = recipes.get(name)
    eps, slack, decay, epochs, batch, rate = ONE_LIPSCHITZ[name]
    assert recipe.data == "uoft-cs/cifar100"
    assert (recipe.eps, recipe.loss_options) == (eps, {"slack": slack})
    assert recipe.loss is losses.cll
    assert recipe.regularise == losses.ConstantDecay(decay)
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (epochs, batch, rate)
    assert recipe.seed == 1


@pytest.mark.parametrize("name", TRIANGLES)
def test_the_triangular_rate(name):
    recipe = recipes.get(name)
    iterations = recipe.epochs * 196
    schedule = recipe.learning_rate_schedule
    corners = {0.0: 0.0, 0.2: 0.5, 0.4: 1.0, 0.6: 0.525, 0.8: 0.05, 0.9: 0.025, 1.0: 0.0}
    for share, expected in corners.items():
        iteration = share * (iterations - 1)
        assert at(schedule, iteration, iterations) == pytest.approx(expected, abs=1e-9)
    values = [at(schedule, i * 196, iterations) for i in range(recipe.epochs)]
    assert values.index(max(values)) == pytest.approx(0.4 * recipe.epochs, abs=1)


@pytest.mark.parametrize("name", ["cll-cifar100-soc", "soc-cifar100"])
def test_the_rate_of_skew_convolutions(name):
    recipe = recipes.get(name)
    iterations = 200 * 391
    schedule = recipe.learning_rate_schedule
    for drop, before in ((iterations // 2, 1.0), (3 * iterations // 4, 0.1)):
        assert at(schedule, drop - 1, iterations) == pytest.approx(before)
        assert at(schedule, drop, iterations) == pytest.approx(before / 10)


def optimiser(name, parameters):
    recipe = recipes.get(name)
    return recipe.optimiser(parameters, recipe.learning_rate)


def test_the_optimisers():
    one = [nn.Parameter(torch.zeros(2, 2))]
    cpl, sll = optimiser("cll-cifar100-cpl", one), optimiser("cll-cifar100-sll", one)
    assert type(cpl) is type(sll) is torch.optim.Adam
    assert (cpl.defaults["betas"], cpl.defaults["weight_decay"]) == ((0.9, 0.999), 0)
    assert (sll.defaults["betas"], sll.defaults["weight_decay"]) == ((0.5, 0.9), 0)
    soc = optimiser("soc-cifar100", one)
    assert type(soc) is torch.optim.SGD
    settings = soc.param_groups[0]
    assert (settings["momentum"], settings["weight_decay"], settings["lr"]) == (0.9, 5e-4, 0.1)


def test_skew_convolutions_decay_in_their_kernels_alone():
    net = nn.Sequential(SOCConv2d(3, 4), Householder(4), nn.Flatten(), nn.Linear(64, 3))
    made = optimiser("cll-cifar100-soc", net.parameters())
    assert type(made) is torch.optim.AdamW
    decay = {id(p): g["weight_decay"] for g in made.param_groups for p in g["params"]}
    expected = {
        name: 5e-4 if name in ("0.weight", "3.weight") else 0.0
        for name, _ in net.named_parameters()
    }
    assert {name: decay[id(p)] for name, p in net.named_parameters()} == expected


BASELINES = {
    "cpl-cifar100": ("cll-cifar100-cpl", losses.hinge, {"margin": 0.7}),
    "sll-cifar100": ("cll-cifar100-sll", losses.ce, {"temperature": 0.25, "offset": 4.5**0.5}),
    "soc-cifar100": ("cll-cifar100-soc", losses.certificate_regularisation, {"weight": 0.1}),
}


@pytest.mark.parametrize("name", BASELINES)
def test_the_baselines(name):
    ours, loss, options = BASELINES[name]
    recipe, other = recipes.get(name), recipes.get(ours)
    assert recipe.loss is loss
    assert recipe.loss_options == pytest.approx(options)
    assert recipe.regularise is None
    for field in ("epochs", "batch_size", "data", "augment", "radii"):
        assert getattr(recipe, field) == getattr(other, field)


SIZES = {  # what the recipe's model is asked to be made of
    "cll-cifar100-cpl": (70, 120, 15, 4096),
    "cpl-cifar100": (70, 120, 15, 4096),
    "cll-cifar100-sll": (70, 120, 15, 2048),
    "sll-cifar100": (70, 120, 15, 2048),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_of_potential_nets(name):
    assert dataclasses.astuple(recipes.get(name).model.keywords["size"]) == SIZES[name]


@pytest.mark.parametrize(
    ("name", "std", "head"),
    [
        ("cll-cifar100-cpl", 1.0, nn.Linear),
        ("cpl-cifar100", 1.0, None),
        ("cll-cifar100-soc", 0.2507, nn.Linear),
        ("soc-cifar100", 0.2507, LastLayerNormalized),
    ],
)
def test_what_stands_before_and_behind_the_backbone(name, std, head):
    small = (
        {"blocks": 1, "channels": 2}
        if "soc" in name
        else {"size": models.PotentialSize(1, 3, 1, 4)}
    )
    net = recipes.get(name).model(in_shape=(3, 32, 32), classes=10, **small)
    assert isinstance(net[0], Normalize)
    assert net[0].std.tolist() == pytest.approx([std] * 3)
    if head is None:
        assert not list(net[-1].parameters())
    else:
        assert type(net[-1]) is head
    assert net.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_colours_and_borders():
    torch.manual_seed(4)
    x = torch.rand(1, 3, 32, 32).expand(300, 3, 32, 32)
    moved = recipes.get("cll-cifar100-cpl").augment(x)
    assert set(moved.unique().tolist()) <= set(x.unique().tolist())  # mirrored borders, no new ones
    assert len(moved.flatten(1).unique(dim=0)) > 100
    coloured = recipes.get("cll-cifar100-sll").augment(x)
    assert not set(coloured.unique().tolist()) <= set(x.unique().tolist())
    white = recipes.get("cll-cifar100-soc").augment(torch.ones(300, 3, 32, 32))
    assert set(white.unique().tolist()) == {0.0, 1.0}  # black borders
