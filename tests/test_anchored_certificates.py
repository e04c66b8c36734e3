"""Certificates with the ellipsoid bound around each sample."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import lipcert as lc
from test_api import jaxtyping_off


@pytest.fixture(autouse=True)
def unchecked():
    with jaxtyping_off():
        yield


def relu_net(seed=0, widths=(8, 30, 30, 30, 4)):
    torch.manual_seed(seed)
    layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    net = nn.Sequential(*layers[:-1])
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight)
    return net


def test_radii_grow_by_more_than_twice_on_a_net_trained_for_nothing():
    net = relu_net()
    graph = lc.trace(net, (8,))
    x = 2 * torch.randn(10, 8)
    local = lc.tightest(lc.Ellipsoid(graph), lc.Ellipsoid(graph, region=lc.L2Ball(0.5)))
    alone = lc.certify(net, x, bound=lc.Ellipsoid(graph))
    found = lc.certify(net, x, bound=local, bisections=10)
    assert found.kind is lc.Kind.UPPER
    assert (found.radius >= alone.radius).all()
    assert found.radius.mean() > 2 * alone.radius.mean()
    # And no change within them turns the prediction.
    directions = torch.nn.functional.normalize(torch.randn(500, 10, 8), dim=2)
    for share in (0.5, 0.9, 1.0):
        moved = net(x + share * found.radius[:, None] * directions)
        assert (moved.argmax(2) == found.prediction).all()


def test_constants_in_the_ball_are_of_all_pairs_of_points_there():
    net = relu_net(1)
    graph = lc.trace(net, (8,))
    bound = lc.Ellipsoid(graph, region=lc.L2Ball(0.3))
    x = torch.randn(5, 8)
    whole, each = bound.lipschitz(x).value, bound.per_output(x).value
    radii = 0.3 * torch.rand(2, 200, 5, 1)
    a, b = x + radii * torch.nn.functional.normalize(torch.randn(2, 200, 5, 8), dim=3)
    moved, far = net(a) - net(b), (a - b).norm(dim=2)
    assert (moved.norm(dim=2) <= whole * far * (1 + 1e-9)).all()
    assert (moved.abs() <= each * far[..., None] * (1 + 1e-9)).all()
    assert repr(bound).count("region") == 1


def test_a_region_and_training_do_not_go_together():
    with pytest.raises(lc.LipcertError, match="leave out region"):
        lc.Ellipsoid(lc.trace(relu_net(), (8,)), region=lc.L2Ball(0.3), every=1)
