"""Ellipsoids of several nodes at once: residual and concatenating networks."""

import itertools

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.bounds import ellipsoid
from lipcert.layers import MaxMin
from oracles import differences, jacobians
from test_api import jaxtyping_off

UP = 1 + 1e-9


@pytest.fixture(autouse=True)
def unchecked():
    with jaxtyping_off():
        yield


class Masked(nn.Module):
    """Slopes of 0 and 1 that can be set: a ReLU that is linear while a mask is there."""

    def __init__(self):
        super().__init__()
        self.mask = None

    def forward(self, x):
        return x * self.mask


class Residual(nn.Module):
    """x + W relu(V x + b), or with the input beside the branch instead of added."""

    def __init__(self, width, inside, activation, adding=True):
        super().__init__()
        self.enter, self.leave = nn.Linear(width, inside), nn.Linear(inside, width)
        self.act, self.adding = activation(), adding

    def forward(self, x):
        branch = self.leave(self.act(self.enter(x)))
        return x + branch if self.adding else torch.cat([x, branch], 1)


class Bottleneck(nn.Module):
    """A residual branch with two activations, each with its own part of the skip."""

    def __init__(self, width, activation):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.one, self.two, self.three = activation(), activation(), activation()

    def forward(self, x):
        x = self.one(x)
        return self.three(x - self.second(self.two(self.first(x))))


def build(kind, activation, seed):
    torch.manual_seed(seed)
    match kind:
        case "residual":
            body = [Residual(3, 2, activation), nn.Linear(3, 2), activation()]
            body += [Residual(2, 2, activation)]
            return nn.Sequential(*body, nn.Linear(2, 3))
        case "concat":
            return nn.Sequential(Residual(3, 3, activation, False), nn.Linear(6, 3))
        case "nested":
            body = [Residual(3, 2, activation, False), Residual(6, 3, activation)]
            return nn.Sequential(*body, nn.Linear(6, 3))
        case _:
            return nn.Sequential(nn.Linear(3, 2), Bottleneck(2, activation), nn.Linear(2, 3))


KINDS = ("residual", "concat", "nested", "bottleneck")


def over_all_patterns(kind, seed):
    """The largest distance of the logits' gradients over all slopes of 0 and 1."""
    net = build(kind, Masked, seed)
    units = [m for m in net.modules() if isinstance(m, Masked)]
    sizes = {"residual": (2, 2, 2), "concat": (3,), "nested": (2, 3), "bottleneck": (2, 2, 2)}[kind]
    found = torch.zeros(3, 3)
    for pattern in itertools.product((0.0, 1.0), repeat=sum(sizes)):
        for unit, mask in zip(units, torch.tensor(pattern).split(sizes), strict=True):
            unit.mask = mask
        with torch.no_grad():
            linear = net(torch.eye(3)) - net(torch.zeros(1, 3))
        found = torch.maximum(found, torch.cdist(linear.mT, linear.mT))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_pattern_is_above(kind):
    off = ~torch.eye(3, dtype=torch.bool)
    gains = []
    for seed in range(8):
        graph = lc.trace(build(kind, nn.ReLU, seed), (3,))
        bound = lc.Ellipsoid(graph)
        assert {way.joint for way in bound._ways} == {False, True}
        with torch.no_grad():
            exact, whole = over_all_patterns(kind, seed), bound().dense()[0]
            ways, each = bound._ways, {}
            for joint in (False, True):
                bound._ways = [way for way in ways if way.joint is joint]
                each[joint] = bound().dense()[0]
        assert (each[True][off] * UP >= exact[off]).all()
        assert (each[False][off] * UP >= exact[off]).all()
        torch.testing.assert_close(whole[off], torch.minimum(each[True], each[False])[off])
        gains.append(float((each[True][off] / each[False][off]).mean()))
    assert sum(gains) / len(gains) < 1  # they know how block and skip go together


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "activation", [nn.Tanh, lambda: nn.LeakyReLU(0.3), nn.GELU, lambda: nn.Softmax(1)]
)
def test_other_functions_beside_what_passes(kind, activation):
    net = build(kind, activation, 1)
    graph = lc.trace(net, (3,))
    bound = lc.Ellipsoid(graph)
    J = jacobians(net, 2 * torch.randn(300, 3))
    with torch.no_grad():
        ways = bound._ways
        for joint in (False, True):
            bound._ways = [way for way in ways if way.joint is joint]
            K, reached = bound().dense()[0], {n: bound.prefix(n).value for n in graph}
            assert (differences(J) <= UP * K + 1e-12).all()
            x = torch.randn(300, 3)
            y = x + 0.3 * torch.randn(300, 3)
            at_x, at_y = graph.values(x), graph.values(y)
            for n, value in reached.items():
                far = (at_x[n] - at_y[n]).norm(dim=1) / (x - y).norm(dim=1)
                assert (far <= UP * value).all(), n.name


def test_sorted_pairs_beside_a_skip():
    torch.manual_seed(0)
    net = nn.Sequential(Residual(6, 8, MaxMin), Residual(6, 4, MaxMin), nn.Linear(6, 3))
    graph = lc.trace(net, (6,))
    bound = lc.Ellipsoid(graph)
    J = jacobians(net, 2 * torch.randn(500, 6))
    with torch.no_grad():
        for way in bound._ways:
            one = lc.Ellipsoid(graph)
            one._ways = [way]
            assert (differences(J) <= UP * one().dense()[0] + 1e-12).all()


def test_a_linear_skip_is_exact():
    """x - x and x + x, with the activation's branch of weight zero."""
    net = build("residual", nn.ReLU, 0)
    with torch.no_grad():
        net[0].leave.weight.zero_()
        net[3].leave.weight.zero_()
        net[1].weight.copy_(torch.eye(2, 3))
        found = lc.Ellipsoid(lc.trace(net, (3,)))().dense()[0]
    last = net[-1].weight.detach()
    torch.testing.assert_close(found, torch.cdist(last, last), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adding", [True, False])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_what_stays_beside_a_node_that_is_too_large(monkeypatch, size, adding):
    """The branch inside is a ball; what goes round it moves all the same."""
    monkeypatch.setattr(ellipsoid, "LARGEST", 6)
    for seed in range(5):
        torch.manual_seed(seed)
        body = Residual(3, 8, nn.ReLU, adding)
        with torch.no_grad():
            body.enter.weight.mul_(size)
        width = 3 if adding else 6
        net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), body, nn.ReLU(), nn.Linear(width, 3))
        seen = jacobians(net, 10 * torch.randn(300, 3))
        graph = lc.trace(net, (3,))
        for bound in (lc.Ellipsoid(graph), lc.Eclipse(graph), lc.Multipliers(graph, steps=3)):
            with torch.no_grad():
                assert bound.lipschitz().value * UP >= torch.linalg.matrix_norm(seen, 2).max()
                pairs = bound().dense()[0]
            assert (pairs * UP >= differences(seen)).all()


def test_what_is_too_large_is_split(monkeypatch):
    graph = lc.trace(build("nested", nn.ReLU, 0), (3,))
    whole = lc.Ellipsoid(graph)().dense()[0]
    monkeypatch.setattr(ellipsoid, "LARGEST", 6)
    split = lc.Ellipsoid(graph)().dense()[0]
    off = ~torch.eye(3, dtype=torch.bool)
    assert (split[off] >= whole[off] / UP).all()
    assert (split[off] * UP >= over_all_patterns("nested", 0)[off]).all()


class ConvBlock(nn.Module):
    """relu(x + W relu(V x)) with zero-padded convolutions, by half the size if strided."""

    def __init__(self, channels, stride=1):
        super().__init__()
        self.enter = nn.Conv2d(channels, channels, 3, stride, 1)
        self.leave = nn.Conv2d(channels, channels, 3, 1, 1)
        self.skip = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return torch.relu(self.skip(x) + self.leave(torch.relu(self.enter(x))))


@pytest.mark.parametrize("strides", [(1,), (1, 1), (2,), (1, 2)])
def test_residual_blocks_by_frequency(strides):
    torch.manual_seed(0)
    blocks = [ConvBlock(3, stride) for stride in strides]
    net = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), *blocks)
    cells = net(torch.zeros(1, 2, 6, 6))[0].numel()
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(cells, 3))
    graph = lc.trace(net, (2, 6, 6))
    J = jacobians(net, 2 * torch.randn(100, 2, 6, 6))
    x = torch.randn(100, 2, 6, 6)
    y = x + 0.2 * torch.randn_like(x)
    at_x, at_y = graph.values(x), graph.values(y)
    found = {}
    with torch.no_grad():
        bound = lc.Ellipsoid(graph)
        for way in [way for way in bound._ways if way.cover is not None]:
            bound._ways = [way]
            assert {n for n in graph if isinstance(n.op, lc.graph.Sum)} <= way.cover.of.keys()
            K = bound().dense()[0]
            found[way.joint] = float(K.max())
            assert (differences(J) <= UP * K + 1e-12).all()
            for n in graph:
                far = (at_x[n] - at_y[n]).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
                assert (far <= UP * bound.prefix(n).value).all(), n.name
    if 1 in strides:
        assert found[True] < 0.95 * found[False]


def test_gradients_through_shares():
    """Nodes of which is not known how they go together: the shares move with the weights."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return torch.cat([torch.relu(self.one(x)), torch.relu(self.other(x))], 1)

    torch.manual_seed(2)
    net = nn.Sequential(Two(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    bound = lc.Ellipsoid(lc.trace(net, (4,)))
    bound._ways = [way for way in bound._ways if not way.joint]
    weight = net[0].one.weight

    def value():
        return bound().row(torch.tensor([1]))[0, 2]

    (slope,) = torch.autograd.grad(value(), weight)
    direction, step = torch.randn_like(weight), 1e-6
    with torch.no_grad():
        weight.add_(step * direction)
        above = value()
        weight.sub_(2 * step * direction)
        below = value()
    assert float((above - below) / (2 * step)) == pytest.approx(
        float((slope * direction).sum()), rel=1e-4
    )
