"""Attacks of other packages: judged by the network itself, and a clear word if they are missing."""

import math
import sys

import pytest
import torch
from torch import nn

from lipcert.errors import LipcertError
from lipcert.external_attacks import autoattack, carlini_wagner, deepfool, installed
from lipcert.models import lmt_mnist

DISTANCE = 0.25


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)  # pyautoattack takes it for granted


def half_spaces(classes):
    """Class j > 0 begins where pixel j exceeds pixel 0 by sqrt(2) times 0.25 times j."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.zero_()
        for j in range(1, classes):
            net[1].weight[j, j], net[1].weight[j, 0] = 1.0, -1.0
            net[1].bias[j] = -math.sqrt(2) * DISTANCE * j
    x = torch.full((6, 1, 4, 4), 0.5)
    return net, x, torch.zeros(6, dtype=torch.long)


@pytest.mark.parametrize("attack", [deepfool, carlini_wagner])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_boundary_of_a_linear_net(attack, dtype):
    pytest.importorskip("foolbox")
    net, x, labels = half_spaces(5)
    net, x = net.to(dtype).train(), x.to(dtype)
    result = attack(net, x, labels)
    assert result.found.all()
    assert net.training
    assert result.adversarial.dtype == dtype
    assert (net(result.adversarial).argmax(1) != labels).all()
    assert (result.distance >= DISTANCE * (1 - 1e-5)).all()
    assert (result.distance <= 1.1 * DISTANCE).all()
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("attack", [deepfool, carlini_wagner])
def test_samples_that_are_wrong_already_stay_where_they_are(attack):
    pytest.importorskip("foolbox")
    net, x, labels = half_spaces(5)
    labels[2] = 1
    result = attack(net, x, labels)
    assert result.found.all()
    assert result.distance[2] == 0
    assert (result.distance[[0, 1, 3, 4, 5]] > 0.2).all()


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autoattack_succeeds_just_beyond_the_boundary_and_not_before(classes, dtype):
    pytest.importorskip("pyautoattack")
    net, x, labels = half_spaces(classes)
    net, x = net.to(dtype), x.to(dtype)
    state = torch.get_rng_state()
    beyond = autoattack(net, x, labels, 1.05 * DISTANCE, steps=20)
    assert torch.equal(torch.get_rng_state(), state)
    assert beyond.found.all()
    assert (beyond.distance <= 1.05 * DISTANCE).all()
    assert (beyond.distance >= DISTANCE * (1 - 1e-5)).all()
    assert not autoattack(net, x, labels, 0.95 * DISTANCE, steps=20).found.any()


def test_autoattack_repeats_itself():
    pytest.importorskip("pyautoattack")
    net, x = lmt_mnist((1, 8, 8), 5), torch.rand(8, 1, 8, 8)
    labels = net(x).argmax(1)
    first, second = (autoattack(net, x, labels, 0.3, steps=10) for _ in range(2))
    assert torch.equal(first.adversarial, second.adversarial)
    assert first.found.any()


@pytest.mark.parametrize(
    ("attack", "package"),
    [
        (deepfool, "foolbox"),
        (carlini_wagner, "foolbox"),
        (lambda *a: autoattack(*a, 0.5), "pyautoattack"),
    ],
)
def test_a_missing_extra_is_named_with_the_line_that_installs_it(attack, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert not installed(package)
    with pytest.raises(LipcertError, match=r"pip install -e '.\[attacks\]'") as caught:
        attack(*half_spaces(3))
    assert package in str(caught.value)


def test_bad_requests_are_refused():
    pytest.importorskip("foolbox")
    pytest.importorskip("pyautoattack")
    net, x, labels = half_spaces(3)
    for attack in (deepfool, carlini_wagner, lambda *a: autoattack(*a, 0.5)):
        with pytest.raises(LipcertError, match=r"\[0, 1\]"):
            attack(net, x - 1, labels)
    for eps in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(LipcertError, match="eps"):
            autoattack(net, x, labels, eps)
