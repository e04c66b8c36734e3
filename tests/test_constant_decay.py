"""The decay of the constant, and trainings with calibrated losses."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert import losses, recipes, tables
from lipcert import run as runs
from lipcert.data import from_tensors
from lipcert.losses import ConstantDecay
from lipcert.recipe import override
from lipcert.schedules import Linear, Polynomial
from lipcert.train import train


def small_net():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_decay_is_that_of_the_largest_pair():
    net = small_net()
    rows = net[2].weight
    pairs = (rows[:, None] - rows).square().sum(2).add(1e-300).sqrt()
    K = torch.linalg.matrix_norm(net[0].weight, 2) * pairs.max()
    constants = lc.Product(lc.trace(net, (4,)))()
    for power in (2.0, 1.0, 3.0):
        expected = torch.autograd.grad(
            0.1 * K**power, net.parameters(), allow_unused=True, retain_graph=True
        )
        value = ConstantDecay(0.1, power)(constants, 0.5)
        assert value.item() == pytest.approx(0.1 * K.item() ** power)
        found = torch.autograd.grad(value, net.parameters(), allow_unused=True, retain_graph=True)
        for place in (0, 2):
            torch.testing.assert_close(found[place], expected[place])
    assert ConstantDecay(0.1)(constants, 0.0).item() == pytest.approx(0.1 * K.item() ** 2)


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0])
def test_decay_has_a_gradient_however_small_the_constants(size):
    net = small_net()
    with torch.no_grad():
        net[2].weight.mul_(size)
    ConstantDecay(1.0)(lc.Product(lc.trace(net, (4,)))(), 0.0).backward()
    assert net[2].weight.grad.isfinite().all()
    assert (net[2].weight.grad * net[2].weight).sum() > 0  # downhill is smaller


def test_local_decay_is_the_mean_over_samples():
    net, x = small_net(), torch.rand(5, 4)
    graph = lc.trace(net, (4,))
    bound = lc.Product(graph, region=lc.L2Ball(0.05))
    dense = bound(x).dense()
    expected = torch.stack(
        [sample.fill_diagonal_(0).max() ** 2 for sample in dense.detach()]
    ).mean()
    assert expected < bound(x).dense().max() ** 2
    value = ConstantDecay(1.0)(bound(x), 0.0)
    torch.testing.assert_close(value, expected.to(value))
    value.backward()
    assert net[0].weight.grad.any()
    both = lc.tightest(lc.Product(graph), bound)
    torch.testing.assert_close(ConstantDecay(1.0)(both(x), 0.0), expected.to(value))


@pytest.mark.parametrize(
    "options", [{"weight": -1.0}, {"weight": math.nan}, {"weight": 1, "power": 0}]
)
def test_decay_out_of_range(options):
    with pytest.raises(lc.LipcertError, match="weight >= 0 and power > 0"):
        ConstantDecay(**options)


# ---------------------------------------------------------------- in recipes


@pytest.fixture
def data():
    labels = torch.arange(90) % 3
    images = torch.randint(0, 100, (90, 1, 4, 4))
    images[torch.arange(90), 0, 0, labels] += 155  # something to learn
    return from_tensors(images.to(torch.uint8), labels)


def recipe(loss, **fields):
    short = override(recipes.get("lmt-digits"), {"epochs": 12, "batch_size": 32})
    fields = {"loss_options": {}, "eps_schedule": Linear(1.0, 1.0), **fields}
    return dataclasses.replace(short, loss=loss, **fields)


@pytest.mark.parametrize("loss", [losses.cll, losses.cll_per_logit])
def test_trainings_learn_and_the_decay_holds_the_constant(tmp_path, data, loss):
    torch.set_default_dtype(torch.float32)
    constants = []
    for weight in (0.0, 1e-2):
        run = runs.create(
            tmp_path / str(weight),
            recipe(
                loss,
                loss_options={"margin_offset": "one_sided"},
                loss_schedules={"slack": Polynomial(0.5, 0.1, 2)},
                regularise=ConstantDecay(weight),
            ),
        )
        net = train(run, data)
        constants.append(lc.lipschitz(net, (1, 4, 4)).value.item())
        last = json.loads(run.path("metrics.jsonl").read_text().splitlines()[-1])
        assert last["train_accuracy"] > 0.9
        assert last["validation_cra_estimate"] > 0
    assert constants[1] < 0.5 * constants[0]


def test_a_radius_that_starts_at_zero_is_refused(tmp_path, data):
    torch.set_default_dtype(torch.float32)
    run = runs.create(tmp_path, recipe(losses.cll, eps_schedule=Linear(0.0, 1.0)))
    with pytest.raises(lc.LipcertError, match="eps_schedule"):
        train(run, data)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, ("0.08648", "11.56")),
        ({"loss_options": {"slack": 0.25}}, ("0.07708", "12.97")),
        ({"loss_schedules": {"slack": Linear(0.9, 0.01)}}, ("0.02834", "35.29")),
        ({"eps_schedule": Linear(1.0, 2.0)}, ("0.173", "5.782")),
        ({"loss_options": {"sigma": 0.2}}, ("0.2", "5")),
    ],
)
def test_the_calibration_of_a_recipe_is_shown(capsys, fields, shown):
    of_ours = dataclasses.replace(recipe(losses.cll, **fields), eps=0.15)
    tables.show_recipe(of_ours)
    line = next(x for x in capsys.readouterr().out.splitlines() if "calibration" in x)
    assert f"sigma {shown[0]}, Lipschitz constant {shown[1]} " in line
    tables.show_recipe(recipes.get("lmt-digits"))
    assert "calibration" not in capsys.readouterr().out
