"""Circular covers: the network on the first cells of a larger ring, and bounds that come of it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipcert as lc
from lipcert.bounds import reach
from lipcert.bounds.cover import circular_cover
from lipcert.bounds.slopes import everywhere
from lipcert.graph import Affine, Slope, Sum
from lipcert.layers import MaxMin
from lipcert.simplify import simplify
from lipcert.spectral import circulant
from oracles import best_quotients, jacobians

UP = 1 + 1e-9


def conv(i, o, k, stride=1, padding=0, dilation=1, groups=1, axes=2, bias=True, mode="zeros"):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    return kind(i, o, k, stride, padding, dilation, groups, bias, mode)


class Residual(nn.Module):
    """Sums of equal strides: an identity shortcut and a strided one."""

    def __init__(self):
        super().__init__()
        self.stem = conv(1, 3, 3, 1, 1)
        self.one, self.two = conv(3, 3, 3, 1, 1), conv(3, 3, 4, 1, "same")
        self.down, self.past, self.short = (
            conv(3, 4, 3, 2, 1),
            conv(4, 4, 3, 1, 1),
            conv(3, 4, 1, 2),
        )

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.two(torch.sigmoid(self.one(x))))
        return F.leaky_relu(self.past(F.relu(self.down(x))) + self.short(x), 0.3)


def prelu(*slopes):
    module = nn.PReLU(len(slopes))
    module.weight.data = torch.tensor(slopes)
    return module


COVERED = {
    "one": (lambda: nn.Sequential(conv(2, 3, 3, 1, 1), nn.ReLU()), (2, 5, 6)),
    "strides": (
        lambda: nn.Sequential(
            *(conv(1, 3, 3, 2, 1), nn.ReLU(), conv(3, 2, 4, 2, 1), nn.ReLU()),
            *(conv(2, 2, 3, 1, 1), nn.ReLU()),
        ),
        (1, 9, 11),
    ),
    "strides of one axis": (
        lambda: nn.Sequential(
            conv(1, 2, 3, (2, 1), 1), nn.ReLU(), conv(2, 3, (2, 3), (1, 3)), nn.Tanh()
        ),
        (1, 8, 10),
    ),
    "no padding": (
        lambda: nn.Sequential(conv(1, 2, 3), nn.ReLU(), conv(2, 2, 4, 2), nn.ReLU()),
        (1, 9, 10),
    ),
    "even, same": (
        lambda: nn.Sequential(
            *(conv(1, 2, (2, 4), 1, "same"), nn.ReLU(), conv(2, 3, 4, 1, "same"), nn.Sigmoid()),
            *(conv(3, 1, 2, 1, "same"), nn.ReLU()),
        ),
        (1, 5, 7),
    ),
    "full padding": (
        lambda: nn.Sequential(conv(1, 2, 3, 1, 2), nn.ReLU(), conv(2, 2, 4, 1, 3), nn.ReLU()),
        (1, 4, 5),
    ),
    "dilated": (
        lambda: nn.Sequential(
            *(conv(1, 2, 3, 1, 2, 2), nn.LeakyReLU(0.2), conv(2, 2, 3, 2, 3, 3), nn.LeakyReLU(2.0)),
        ),
        (1, 8, 9),
    ),
    "groups": (
        lambda: nn.Sequential(
            conv(2, 4, 3, 1, 1, groups=2), nn.ReLU(), conv(4, 4, 3, 2, 1, groups=4), nn.ReLU()
        ),
        (2, 6, 6),
    ),
    "sigmoid": (
        lambda: nn.Sequential(
            *(conv(1, 2, 3, 1, 1), nn.Sigmoid(), conv(2, 2, 3, 1, 1), nn.Softplus()),
            *(conv(2, 2, 3, 2, 1), nn.Sigmoid()),
        ),
        (1, 6, 7),
    ),
    "prelu per channel": (
        lambda: nn.Sequential(
            conv(1, 3, 3, 1, 1), prelu(0.5, -0.25, 2.0), conv(3, 2, 3, 1, 1), prelu(0.1, 0.2)
        ),
        (1, 6, 6),
    ),
    "tanh": (
        lambda: nn.Sequential(conv(1, 2, 3, 1, 1), nn.Tanh(), conv(2, 3, 5, 2, 2), nn.GELU()),
        (1, 7, 7),
    ),
    "batch norm": (
        lambda: nn.Sequential(
            conv(1, 2, 3, 1, 1), nn.BatchNorm2d(2), nn.ReLU(), conv(2, 2, 3, 1, 1, bias=False)
        ),
        (1, 6, 6),
    ),
    "no bias": (
        lambda: nn.Sequential(
            conv(1, 2, 3, 1, 1, bias=False), nn.ReLU(), conv(2, 2, 3, 1, 1, bias=False)
        ),
        (1, 6, 6),
    ),
    "1d": (
        lambda: nn.Sequential(
            conv(2, 3, 3, 2, 1, axes=1), nn.ReLU(), conv(3, 2, 4, 3, 2, axes=1), nn.Sigmoid()
        ),
        (2, 17),
    ),
    "3d": (
        lambda: nn.Sequential(
            *(conv(1, 2, 3, 1, 1, axes=3), nn.ReLU()),
            *(conv(2, 2, (2, 1, 3), (1, 2, 2), axes=3), nn.ReLU()),
        ),
        (1, 3, 4, 5),
    ),
    "residual": (Residual, (1, 8, 8)),
}
covered = pytest.mark.parametrize("name", COVERED)


def graph_of(make, shape, seed=0):
    torch.manual_seed(seed)
    net = make().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return lc.trace(net, shape)


def corner(value, like):
    return value[(slice(None), slice(None), *(slice(0, m) for m in like.shape[2:]))]


# ---------------------------------------------------------------- values


@covered
def test_the_cover_computes_the_network_on_the_first_cells(name):
    graph = graph_of(*COVERED[name])
    cover = circular_cover(graph)
    assert list(cover.of) == list(graph)
    x = torch.randn(4, *graph.input_shape)
    values, circular = graph.values(x), cover.graph.values(x)
    for n, twin in cover.of.items():
        found = circular[twin]
        assert found.shape[1:] == twin.shape
        torch.testing.assert_close(corner(found, values[n]), values[n], rtol=1e-9, atol=1e-10)


@covered
def test_activations_give_zero_outside(name):
    """Also where phi(0) is not zero: what they let through would reach the network's own cells."""
    graph = graph_of(*COVERED[name])
    cover = circular_cover(graph)
    circular = cover.graph.values(torch.randn(2, *graph.input_shape))
    for n, twin in cover.of.items():
        if isinstance(n.op, Slope):
            outside = circular[twin].clone()
            corner(outside, torch.empty(1, *n.shape)).zero_()
            assert not outside.any()


@covered
def test_the_cover_is_circulant(name):
    graph = graph_of(*COVERED[name])
    cover = circular_cover(graph)
    for n, twin in cover.of.items():
        if isinstance(n.op, Affine):
            a = simplify(twin.op.map())
            assert circulant.is_circulant(a)
            assert a.in_shape == twin.inputs[0].shape
    ratios = {
        n: tuple(
            m / k for m, k in zip(cover.of[graph.nodes[0]].shape[1:], twin.shape[1:], strict=True)
        )
        for n, twin in cover.of.items()
    }
    assert all(r.is_integer() for ratio in ratios.values() for r in ratio)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 5, 12)])
def test_biases_read_from_every_cell_stay_inside(shape):
    """A large bias: if it lay outside, or the padding wrapped, values would be far off."""

    def make():
        net = nn.Sequential(
            *(conv(1, 2, 5, 1, 2), nn.ReLU(), conv(2, 2, 5, 2, 2), nn.ReLU(), conv(2, 1, 3, 1, 1)),
        )
        for module in net:
            if isinstance(module, nn.Conv2d):
                module.bias.data.fill_(100)
        return net

    graph = graph_of(make, shape)
    cover = circular_cover(graph)
    x = torch.randn(2, *shape)
    found = cover.graph.values(x)[cover.of[graph.output]]
    expected = graph.model(x)
    torch.testing.assert_close(corner(found, expected), expected, rtol=1e-12, atol=1e-9)


# ---------------------------------------------------------------- slopes


@covered
def test_slopes_widen_to_zero_and_no_further(name):
    graph = graph_of(*COVERED[name])
    cover = circular_cover(graph)
    for n, twin in cover.of.items():
        if isinstance(n.op, Slope):
            low, high = everywhere(n)
            found = everywhere(twin)
            if twin.shape == n.shape:
                assert torch.equal(found[0], low)
                assert torch.equal(found[1], high)
            else:
                assert torch.equal(found[0], low.clamp(max=0))
                assert torch.equal(found[1], high.clamp(min=0))


def test_boxes_hold_what_the_cut_lets_through():
    graph = graph_of(*COVERED["sigmoid"])
    cover = circular_cover(graph)
    values = cover.graph.values(torch.randn(50, *graph.input_shape))
    for twin in cover.of.values():
        if isinstance(twin.op, Slope):
            before, after = values[twin.inputs[0]], values[twin]
            low, high = twin.op.image(before.amin(0, keepdim=True), before.amax(0, keepdim=True))
            assert (after >= low - 1e-12).all()
            assert (after <= high + 1e-12).all()


# ---------------------------------------------------------------- what has no cover


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = conv(1, 2, 3, 1, 1), conv(1, 2, 3, 1, 1)
        self.head = conv(4, 2, 3, 1, 1)

    def forward(self, x):
        return self.head(torch.relu(torch.cat([self.one(x), self.two(x)], 1)))


class TwoStrides(nn.Module):
    """The shortcut has the right shape, from a grid of another stride: a crop in the middle."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.down = conv(1, 2, 3, 1, 1), conv(2, 2, 4), conv(2, 2, 3, 2, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return torch.relu(torch.relu(self.wide(x)) + torch.relu(self.down(x)))


UNCOVERED = {
    "dense": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (6,), None),
    "dense on images": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3)),
        (1, 6, 6),
        None,
    ),
    "activation alone": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), (1, 6, 6), None),
    "circular padding": (
        lambda: nn.Sequential(conv(1, 2, 3, 1, 1, mode="circular"), nn.ReLU(), conv(2, 2, 3)),
        (1, 6, 6),
        None,
    ),
    "reflected padding": (
        lambda: nn.Sequential(conv(1, 2, 3, 1, 1, mode="reflect"), nn.ReLU()),
        (1, 6, 6),
        None,
    ),
    "padding beyond the kernel": (
        lambda: nn.Sequential(conv(1, 2, 1, 1, 2), nn.ReLU(), conv(2, 2, 3)),
        (1, 6, 6),
        None,
    ),
    "circular later": (
        lambda: nn.Sequential(
            conv(1, 2, 3, 1, 1), nn.ReLU(), conv(2, 2, 3, 1, 1, mode="circular"), nn.ReLU()
        ),
        (1, 6, 6),
        3,
    ),
    "max pool": (
        lambda: nn.Sequential(conv(1, 2, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), conv(2, 2, 3)),
        (1, 6, 6),
        3,
    ),
    "maxmin": (
        lambda: nn.Sequential(conv(1, 2, 3, 1, 1), MaxMin(), conv(2, 2, 3, 1, 1)),
        (1, 6, 6),
        2,
    ),
    "transposed": (
        lambda: nn.Sequential(conv(1, 2, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(2, 1, 2, 2)),
        (1, 6, 6),
        3,
    ),
    "head": (
        lambda: nn.Sequential(
            conv(1, 2, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4), nn.ReLU()
        ),
        (1, 6, 6),
        3,
    ),
    "concat": (Concatenated, (1, 6, 6), None),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_is_no_zero_padded_convolution_ends_the_cover(name):
    make, shape, count = UNCOVERED[name]
    graph = graph_of(make, shape)
    cover = circular_cover(graph)
    if name == "concat":  # the convolutions before may be covered, nothing after
        names = {n.name for n in cover.of} if cover else set()
        assert "head" not in names
        return
    if count is None:
        assert cover is None
        return
    assert list(cover.of) == list(graph)[:count]
    x = torch.randn(2, *shape)
    values, circular = graph.values(x), cover.graph.values(x)
    for n, twin in cover.of.items():
        torch.testing.assert_close(corner(circular[twin], values[n]), values[n])


def test_slopes_of_single_neurons_end_the_cover():
    graph = graph_of(*COVERED["one"])
    relu = graph.output.op
    shape = graph.output.shape
    graph.output.op = Slope(
        relu.fn,
        lambda low, high: (
            torch.zeros(1, *shape),
            torch.linspace(1, 2, math.prod(shape)).reshape(1, *shape),
        ),
        relu.image,
    )
    assert graph.output not in circular_cover(graph).of


def test_a_sum_over_two_grids_is_not_covered():
    graph = graph_of(TwoStrides, (1, 6, 6))
    cover = circular_cover(graph)
    assert any(isinstance(n.op, Sum) for n in graph)
    assert not any(isinstance(n.op, Sum) for n in cover.of)
    x = torch.randn(2, 1, 6, 6)
    values, circular = graph.values(x), cover.graph.values(x)
    for n, twin in cover.of.items():
        torch.testing.assert_close(corner(circular[twin], values[n]), values[n])


# ---------------------------------------------------------------- bounds


@pytest.fixture
def by_frequency(monkeypatch):
    """As if every map was large."""
    monkeypatch.setattr(reach, "_DENSE_SIDE", 1)


@covered
def test_bounds_by_frequency_hold(name, by_frequency):
    graph = graph_of(*COVERED[name])
    net = graph.model
    bound = lc.LipLT(graph)
    assert bound.lipschitz().kind == lc.Kind.UPPER
    value = float(bound.lipschitz()) * UP
    slopes = torch.linalg.matrix_norm(jacobians(net, torch.randn(20, *graph.input_shape)), 2)
    assert slopes.max() <= value
    quotients = best_quotients(net, graph.input_shape, pairs=40, steps=6)
    assert quotients.norm(dim=1).max() <= value
    for n, constant in bound.prefixes().items():
        x = torch.randn(12, *graph.input_shape)
        y = x + 0.1 * torch.randn_like(x)
        change = (graph.values(x)[n] - graph.values(y)[n]).flatten(1).norm(dim=1)
        assert (change <= float(constant) * UP * (x - y).flatten(1).norm(dim=1)).all()


RELU = [
    "one",
    "strides",
    "no padding",
    "even, same",
    "full padding",
    "groups",
    "no bias",
    "1d",
    "3d",
]


@pytest.mark.parametrize("name", RELU)
def test_by_frequency_it_is_a_little_above_the_exact_one(name, monkeypatch):
    """For activations whose slopes reach 0: cutting widens nothing, only the ring is larger."""
    make, shape = COVERED[name]
    shape = (shape[0], *(8,) * (len(shape) - 1)) if len(shape) < 4 else shape

    def relu():
        net = make()
        for place, module in enumerate(net):
            if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                net[place] = nn.ReLU()
        return net

    graph = graph_of(relu, shape)
    exact = lc.LipLT(graph, lc.Exact()).prefixes()
    monkeypatch.setattr(reach, "_DENSE_SIDE", 1)
    found = lc.LipLT(graph).prefixes()
    assert found.keys() == exact.keys()
    for n, constant in exact.items():
        # Looser where the strides leave an image smaller than the kernel.
        most = (3 if name == "strides" else 2) * float(constant)
        assert float(constant) * (1 - 1e-9) <= float(found[n]) <= most
    assert any(float(found[n]) > float(exact[n]) * (1 + 1e-6) for n in exact)


def test_a_head_behind_the_cover(by_frequency):
    """Covered ends feed ends that are not, and logits with pairs."""
    make = lambda: nn.Sequential(  # noqa: E731
        *(conv(1, 3, 3, 1, 1), nn.ReLU(), conv(3, 3, 3, 2, 1), nn.ReLU(), conv(3, 3, 3, 1, 1)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 3)),
    )
    graph = graph_of(make, (1, 8, 8))
    bound, exact = lc.LipLT(graph), lc.LipLT(graph, lc.Exact())
    K, truth = bound().dense()[0], exact().dense()[0]
    off = ~torch.eye(3, dtype=torch.bool)
    assert (K[off] >= truth[off] * (1 - 1e-9)).all()
    assert (K[off] <= 2 * truth[off]).all()
    assert not torch.allclose(K, truth)
    x = torch.randn(20, 1, 8, 8)
    certificate = lc.certify(graph.model, x, bound=bound)
    assert (certificate.radius <= lc.certify(graph.model, x, bound=exact).radius * UP).all()


def test_live_weights_are_read_anew(by_frequency):
    graph = graph_of(*COVERED["strides"])
    bound = lc.LipLT(graph)
    before = float(bound.lipschitz())
    with torch.no_grad():
        graph.model[0].weight.mul_(2)
    assert float(bound.lipschitz()) == pytest.approx(2 * before)


def test_the_gradient_goes_through_the_cover(by_frequency):
    graph = graph_of(*COVERED["strides"])
    net, bound = graph.model, lc.LipLT(graph)
    weights = [net[0].weight, net[2].weight, net[4].weight]
    slopes = torch.autograd.grad(bound.lipschitz().value, weights)
    directions = [torch.randn_like(w) for w in weights]
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for w, d in zip(weights, directions, strict=True):
                w.add_(step * d)
            ends.append(float(bound.lipschitz()))
    predicted = float(sum((g * d).sum() for g, d in zip(slopes, directions, strict=True)))
    assert predicted == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)
