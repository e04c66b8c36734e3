"""The four radii: exact on linear nets, in order on others, and loud at a false certificate."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lipcert import Product, certify, smallest, trace
from lipcert.inequality import RADII, Inequality, measure, pair_slopes
from lipcert.models import lmt_mnist, mlp
from lipcert.smallest import smallest_perturbation


@pytest.fixture(autouse=True)
def own_attacks_only(monkeypatch):
    monkeypatch.setattr(smallest, "installed", lambda package: False)


def run(net, x, labels, certified, steps=20, restarts=2, batch_size=64, seed=0):
    effort = {"steps": steps, "restarts": restarts, "batch_size": batch_size, "seed": seed}
    return measure(net, x, labels, certified, **effort)


def certified_radius(net, x):
    return certify(net, x, bound=Product(trace(net, tuple(x.shape[1:])))).radius


def linear(classes=4, size=9):
    net = nn.Sequential(nn.Flatten(), nn.Linear(size, classes))
    x = 0.4 + 0.2 * torch.rand(20, 1, 3, 3)
    with torch.no_grad():
        net[1].bias.copy_(-net[1].weight.sum(1) / 2)  # a boundary through the middle of the box
    return net, x, net(x).argmax(1)


def test_all_four_are_the_same_for_a_linear_net():
    net, x, labels = linear()
    W, z = net[1].weight.detach(), net(x).detach()
    gaps = (W[labels][:, None] - W[None]).norm(dim=2)
    ratios = (z.gather(1, labels[:, None]) - z) / gaps
    exact = ratios.nan_to_num(nan=math.inf).amin(1)
    assert (exact < 0.4).all()  # inside the box
    found = run(net, x, labels, certified_radius(net, x), restarts=4)  # one for each rival too
    for name in RADII[:3]:
        np.testing.assert_allclose(getattr(found, name), exact, rtol=1e-6)
    assert (found.smallest_perturbation >= exact.numpy() * (1 - 1e-9)).all()
    np.testing.assert_allclose(found.smallest_perturbation, exact, rtol=0.02)
    assert set(found.found_by) == {"pgd"}
    assert not found.refuted().any()


@pytest.mark.parametrize("make", [mlp, lmt_mnist])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_the_order_holds(make, batch_size):
    net, x = make((1, 8, 8), 4), torch.rand(16, 1, 8, 8)
    labels = net(x).argmax(1)
    found = run(net, x, labels, certified_radius(net, x), batch_size=batch_size)
    assert (found.certified > 0).all()
    assert (found.certified <= found.sampled_global).all()
    assert (found.sampled_global <= found.sampled_local).all()
    assert (found.sampled_local <= found.smallest_perturbation * 1.001).all()
    assert (found.sampled_global < found.sampled_local).any()  # the two are not the same thing
    assert not found.refuted().any()


def test_wrong_predictions_have_radius_zero_everywhere():
    net, x, labels = linear()
    radius = certified_radius(net, x)
    labels[3] = (labels[3] + 1) % 4
    contradicted = run(net, x, labels, radius)
    assert contradicted.refuted().tolist() == [i == 3 for i in range(20)]
    radius[3] = 0
    found = run(net, x, labels, radius)
    assert not found.refuted().any()
    assert all(getattr(found, name)[3] == 0 for name in RADII)
    assert all((np.delete(getattr(found, name), 3) > 0).all() for name in RADII)


def test_a_false_certificate_is_refuted_by_the_attack():
    net, x, labels = linear()
    true = certified_radius(net, x)
    found = run(net, x, labels, true * torch.where(torch.arange(20) == 7, 1.3, 1.0))
    assert found.refuted().tolist() == [i == 7 for i in range(20)]


def test_a_false_certificate_is_refuted_by_the_slopes_where_the_attack_fails():
    ones = np.ones(2)
    seen = Inequality(ones, np.array([0.9, 1.0]), ones, np.full(2, np.inf), ("", ""), {})
    assert seen.refuted().tolist() == [True, False]


def test_where_nothing_is_found_the_distance_is_infinite():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        net[1].weight.mul_(0.01)
        net[1].bias.copy_(torch.tensor([10.0, 0.0, 0.0]))
    x, labels = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    found = run(net, x, labels, torch.ones(3), steps=5)
    assert np.isinf(found.smallest_perturbation).all()
    assert found.found_by == ("", "", "")
    assert np.isfinite(found.sampled_local).all()
    assert all(math.isnan(ratio) for ratio in found.ratios().values())


def test_a_constant_net_has_no_limit():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.copy_(torch.tensor([1.0, 0.0]))
    x, labels = torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.long)
    found = run(net, x, labels, torch.full((2,), math.inf), steps=3)
    assert all(np.isinf(getattr(found, name)).all() for name in RADII)
    assert not found.refuted().any()


def test_pair_slopes_are_differences_of_jacobian_rows(monkeypatch):
    net = lmt_mnist((1, 8, 8), 4).train()
    x = torch.rand(5, 1, 8, 8)
    slopes = pair_slopes(net, x)
    assert net.training
    for point, seen in zip(x, slopes, strict=True):
        J = torch.autograd.functional.jacobian(net, point[None]).reshape(4, -1)
        torch.testing.assert_close(seen, (J[:, None] - J[None]).norm(dim=2), atol=1e-7, rtol=1e-7)
    monkeypatch.setattr("lipcert.inequality._ENTRIES", 2 * 4 * 64)  # two points at a time
    torch.testing.assert_close(pair_slopes(net, x), slopes)


def test_the_smallest_perturbation_is_misclassified_in_the_box_and_where_it_says():
    net = lmt_mnist((1, 8, 8), 4).float()
    x = torch.rand(12, 1, 8, 8, dtype=torch.float32).round()
    labels = net(x).argmax(1)
    points, distance, by = smallest_perturbation(net, x, labels, 20, 2)
    assert by == ["pgd"] * 12
    assert (net(points).argmax(1) != labels).all()
    assert ((points >= 0) & (points <= 1)).all()
    torch.testing.assert_close(distance, (points.double() - x.double()).flatten(1).norm(dim=1))
    closer = x + 0.97 * (points - x)
    assert (net(closer).argmax(1) == labels).all()


def test_ratios_and_medians_are_of_the_samples_that_they_name():
    rows = np.array([[1.0, 2, 4, 8], [1, 2, 4, np.inf], [2, 2, 3, 3], [0, 0, 0, 0], [1, 1.5, 2, 3]])
    whole = Inequality(*rows.T, ("pgd",) * 5, {})
    assert list(whole.medians().values()) == [1, 2, 3, 3]
    assert list(whole.ratios().values()) == pytest.approx([1.5, 1.5, 1.5, 3.0])
