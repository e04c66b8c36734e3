"""Ellipsoids by frequency: what they say of matrices, and of zero-padded convolutional networks."""

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.bounds import ellipsoid
from lipcert.bounds.cover import circular_cover
from lipcert.bounds.extent import balanced
from lipcert.bounds.waves import (
    everything,
    stacked_waves,
    summed_waves,
    through_circular,
    through_cut,
)
from lipcert.convolution import convolution
from lipcert.linear_kinds import identity
from oracles import differences, jacobians
from test_api import jaxtyping_off

UP = 1 + 1e-9
ONE = torch.ones((), dtype=torch.float64)


@pytest.fixture(autouse=True)
def unchecked():
    with jaxtyping_off():
        yield


def circular(into, out, kernel, stride, grid):
    """A circular convolution with random weights on a grid."""
    weight = torch.randn(out, into, *kernel)
    padding = tuple((k // 2, k - 1 - k // 2) for k in kernel)
    ones = (1,) * len(kernel)
    return convolution(weight, (into, *grid), stride, padding, ones, 1, circular=True)


def ball(channels, grid, strides):
    """The unit ball on a grid that the strides divide."""
    coarsest = tuple(m // s for m, s in zip(grid, strides, strict=True))
    return everything(channels, grid, coarsest, ONE, lc.Kind.UPPER)


def matrix_of(waves, channels):
    """S as a matrix on flattened images."""
    grid = [m * n for m, n in zip(waves.coarsest, waves.folds, strict=True)]
    extent = waves.onto(identity((channels, *grid)))
    return extent.scale**2 * extent.matrix


@pytest.mark.parametrize(
    ("kernel", "stride", "grid"),
    [
        ((3,), (1,), (7,)),
        ((3, 3), (1, 1), (6, 5)),
        ((4, 4), (2, 2), (8, 6)),
        ((3, 2), (3, 1), (9, 4)),
    ],
)
def test_convolutions_are_what_their_matrices_say(kernel, stride, grid):
    torch.manual_seed(0)
    first = circular(2, 3, kernel, stride, grid)
    waves = through_circular(ball(2, grid, stride), first)
    a = first.dense()
    torch.testing.assert_close(matrix_of(waves, 3), a @ a.mT)
    then = circular(3, 2, (2,) * len(grid), (1,) * len(grid), first.out_shape[1:])
    both = then.dense() @ a
    torch.testing.assert_close(matrix_of(through_circular(waves, then), 2), both @ both.mT)
    top = torch.linalg.matrix_norm(both, 2)
    torch.testing.assert_close(through_circular(waves, then).radius().value, top)


@pytest.mark.parametrize(("groups", "dilation"), [(2, 1), (1, 2), (2, 2)])
def test_groups_and_dilations_are_what_their_matrices_say(groups, dilation):
    torch.manual_seed(0)
    padding, steps = ((dilation, dilation),) * 2, (dilation,) * 2
    weight = torch.randn(6, 4 // groups, 3, 3)
    conv = convolution(weight, (4, 8, 6), (1, 1), padding, steps, groups, circular=True)
    waves = through_circular(ball(4, (8, 6), (1, 1)), conv)
    torch.testing.assert_close(matrix_of(waves, 6), conv.dense() @ conv.dense().mT)


@pytest.mark.parametrize("known", [True, False])
def test_an_activation_is_above_every_pattern(known):
    """P - D S D has no negative eigenvalue for slopes D that differ from place to place."""
    torch.manual_seed(1)
    first = circular(2, 3, (3, 3), (2, 2), (8, 8))
    waves = through_circular(ball(2, (8, 8), (2, 2)), first)
    low, high = torch.tensor([0.0, -0.2, 0.5]), torch.tensor([1.0, 0.7, 0.5])
    read = waves.transformed(torch.randn(4, 3, 3, 3)) if known else None
    after = matrix_of(through_cut(waves, low, high, read, balanced), 3)
    s = matrix_of(waves, 3)
    for _ in range(30):
        share = torch.rand(3, 4, 4).round()
        slopes = (low[:, None, None] * (1 - share) + high[:, None, None] * share).flatten()
        least = torch.linalg.eigvalsh(after - slopes[:, None] * s * slopes)[0]
        assert least >= -1e-10 * after.abs().max()


def test_sums_hold_every_sum():
    torch.manual_seed(2)
    maps = [circular(2, 3, (3, 3), (1, 1), (4, 4)) for _ in range(2)]
    waves = [through_circular(ball(2, (4, 4), (1, 1)), m) for m in maps]
    total = matrix_of(summed_waves(stacked_waves(waves), 3, 2), 3)
    whole = maps[0].dense() + maps[1].dense()
    assert torch.linalg.eigvalsh(total - whole @ whole.mT)[0] >= -1e-10 * total.abs().max()


def conv_net(kernel, stride, padding, size, seed, activation=nn.ReLU, groups=1, dilation=1):
    torch.manual_seed(seed)
    first = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups)
    shape = first(torch.zeros(1, 2, size, size)).shape[1:]
    then = nn.Conv2d(4, 4, 3, 1, dilation, dilation, groups)
    cells = then(torch.zeros(1, *shape)).shape[2:].numel()
    return nn.Sequential(
        *(first, activation(), then, activation(), nn.Flatten()),
        *(nn.Linear(4 * cells, 6), activation(), nn.Linear(6, 3)),
    )


def by_waves(graph):
    bound = lc.Ellipsoid(graph)
    bound._ways = [way for way in bound._ways if way.cover is not None]
    assert bound._ways
    return bound


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [(3, 1, 1, 6), (4, 2, 1, 7), (3, 2, 0, 8), (2, 2, 1, 6), (5, 1, 2, 6), (3, 3, 1, 7)],
)
def test_zero_padded_networks_are_never_above(kernel, stride, padding, size):
    for seed, activation in ((0, nn.ReLU), (1, lambda: nn.LeakyReLU(0.2)), (2, nn.Tanh)):
        net = conv_net(kernel, stride, padding, size, seed, activation)
        graph = lc.trace(net, (2, size, size))
        with torch.no_grad():
            bound = by_waves(graph)
            K, whole = bound().dense()[0], bound.lipschitz().value
            reached = {n: bound.prefix(n).value for n in graph}
        J = jacobians(net, 3 * torch.randn(50, 2, size, size))
        off = ~torch.eye(3, dtype=torch.bool)
        assert (differences(J)[..., off] <= UP * K[off]).all()
        assert torch.linalg.matrix_norm(J, 2).max() <= UP * whole
        x = torch.randn(100, 2, size, size)
        y = x + 0.1 * torch.randn_like(x)
        far = (x - y).flatten(1).norm(dim=1)
        at_x, at_y = graph.values(x), graph.values(y)
        for n, value in reached.items():
            assert ((at_x[n] - at_y[n]).flatten(1).norm(dim=1) / far <= UP * value).all(), n.name


@pytest.mark.parametrize(("groups", "dilation"), [(2, 1), (1, 2), (2, 2)])
def test_groups_and_dilations_in_zero_padded_networks(groups, dilation):
    net = conv_net(3, 1, dilation, 7, 0, nn.ReLU, groups, dilation)
    graph = lc.trace(net, (2, 7, 7))
    with torch.no_grad():
        bound = by_waves(graph)
        assert len(bound._ways[0].cover.of) == 5  # the input, two convolutions, their activations
        K, dense = bound().dense()[0], lc.Ellipsoid(graph)
        dense._ways = [way for way in dense._ways if way.cover is None]
        slow = dense().dense()[0]
    J = jacobians(net, 3 * torch.randn(100, 2, 7, 7))
    off = ~torch.eye(3, dtype=torch.bool)
    assert (differences(J)[..., off] <= UP * K[off]).all()
    assert (K[off] < 3 * slow[off]).all()


def test_the_best_of_both_is_taken():
    net = conv_net(3, 1, 1, 6, 0)
    graph = lc.trace(net, (2, 6, 6))
    with torch.no_grad():
        both, waves = lc.Ellipsoid(graph), by_waves(graph)
        matrices = lc.Ellipsoid(graph)
        matrices._ways = [way for way in matrices._ways if way.cover is None]
        each = torch.stack([waves().dense(), matrices().dense()])
    torch.testing.assert_close(both().dense().detach(), each.amin(0))


def test_it_is_tighter_than_the_others_on_a_deep_net():
    net = lc.models.c6f2_bcp((3, 12, 12), 10)
    graph = lc.trace(net, (3, 12, 12))
    with torch.no_grad():
        found = by_waves(graph)().dense().max()
        other = lc.LipLT(graph)().dense().max()
    assert found < 0.9 * other


def test_large_ends_after_images_are_balls(monkeypatch):
    net = conv_net(3, 1, 1, 6, 0)
    graph = lc.trace(net, (2, 6, 6))
    small = by_waves(graph)().dense().detach()
    monkeypatch.setattr(ellipsoid, "LARGEST", 5)
    larger = by_waves(graph)().dense().detach()
    off = ~torch.eye(3, dtype=torch.bool)
    assert (larger[0, off] > small[0, off]).all()


def test_gradients_and_broken_weights():
    net = conv_net(3, 2, 1, 6, 3)
    graph = lc.trace(net, (2, 6, 6))

    def value():
        return by_waves(graph)().row(torch.tensor([1]))[0, 2]

    value().backward()
    weight, step = net[2].weight, 1e-6
    direction = torch.randn_like(weight)
    with torch.no_grad():
        weight.add_(step * direction)
        above = value()
        weight.sub_(2 * step * direction)
        below = value()
    slope = (weight.grad * direction).sum()
    assert float((above - below) / (2 * step)) == pytest.approx(float(slope), rel=1e-4)
    with torch.no_grad():
        weight[0, 0, 0, 0] = torch.nan
        assert not (value() < torch.inf)
        weight.zero_()
        assert value() < 1e-6


def test_networks_without_convolutions_have_no_waves():
    assert circular_cover(lc.trace(nn.Sequential(nn.Linear(3, 2)), (3,))) is None
    assert all(w.cover is None for w in lc.Ellipsoid(lc.trace(nn.Linear(3, 2), (3,)))._ways)
