"""Slopes of secants through one point: against samples, exact fractions and formulas."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.graph import Slope
from lipcert.layers import ClippedMaxMin, ClippedReLU
from lipcert.rules.slopes import piecewise_linear
from rule_cases import ELEMENTWISE, MORE_ELEMENTWISE, calls

INF = math.inf
PIECEWISE = {
    *("relu", "leaky_relu(0.01)", "leaky_relu(1.5)", "leaky_relu(-2)", "hardtanh", "relu6"),
    *("hardsigmoid", "softshrink", "abs", "clamp(-.3,.7)", "prelu function", "softshrink(2)"),
    *("relu from 1", "below 1", "clamp_min", "clamp_max", "clamp_min_", "clamp_max_"),
    *("one-sided clamp", "constant clamp", "clipped", "clipped below zero"),
}


def clipped(threshold):
    module = ClippedReLU(1.0)
    module(torch.zeros(1, 1))
    module.threshold.data.fill_(threshold)
    return module


WAYS = {
    **{name: next(calls(*ways)) for name, ways in ELEMENTWISE.items()},
    **{name: way for name, (way, _) in MORE_ELEMENTWISE.items()},
    "clipped": clipped(0.7),
    "clipped below zero": clipped(-0.7),
}
every = pytest.mark.parametrize("name", WAYS)


def op_of(way, shape=(1,)):
    op = lc.trace(nn.Sequential(way), shape).output.op
    assert isinstance(op, Slope)
    return op


def cases():
    """Intervals with a point inside, `(n, 1)` each: special points everywhere, and open ends."""
    special = torch.tensor([-20.0, -3.0, -2.0, -1.0, -0.5, -0.3, 0.0, 0.5, 0.7, 1.0, 2.0, 3.0, 6.0])
    some = torch.cat([special, torch.randn(40), 8 * torch.randn(15)])
    three = some[torch.randint(len(some), (800, 3))].sort(1).values
    near = three.clone()
    near[:, 0] = near[:, 1] - 1e-9 * torch.rand(800)
    lower, centre, upper = torch.cat([three, near]).unbind(1)
    lower, upper = lower.clone(), upper.clone()
    lower[::7], upper[::5] = -INF, INF
    return centre[:, None], lower[:, None], upper[:, None]


def seen(op, centre, lower, upper, count=400):
    """Points of the intervals, infinite ends cut, and the changes of both sides from the centre."""
    lower, upper = lower.clamp(min=-60), upper.clamp(max=60)
    t = lower + (upper - lower) * torch.linspace(0, 1, count)
    value = op.fn(t.reshape(-1, 1)).reshape(t.shape)
    return t - centre, value - op.fn(centre)


@every
def test_they_hold_all_samples_and_are_no_wider_than_all_secants(name):
    op, (centre, lower, upper) = op_of(WAYS[name]), cases()
    wide = [end.expand_as(lower) for end in op.secants(lower, upper)]
    if op.anchored is None:
        assert name in ("sin", "cos")
        return
    low, high = (end.expand_as(lower) for end in op.anchored(centre, lower, upper))
    assert (low <= high).all()  # so none is NaN
    assert (low >= wide[0]).all()
    assert (high <= wide[1]).all()
    run, rise = seen(op, centre, lower, upper)
    slack = 1e-14 * (1 + op.fn(centre).abs() + rise.abs()) + 2.1e-9 * name.startswith("softplus")
    ends = torch.stack([low * run, high * run])
    assert (rise >= ends.amin(0) - slack).all()
    assert (rise <= ends.amax(0) + slack).all()


@every
def test_they_are_tight(name):
    op = op_of(WAYS[name])
    if op.anchored is None:
        return
    centre = 2 * torch.randn(400, 1)
    lower, upper = centre - 3 * torch.rand(400, 1), centre + 3 * torch.rand(400, 1)
    low, high = op.anchored(centre, lower, upper)
    run, rise = seen(op, centre, lower, upper, 2000)
    quotients, far = rise / run, run.abs() > 1e-3
    least = quotients.where(far, INF).amin(1, True)
    most = quotients.where(far, -INF).amax(1, True)
    gap = torch.maximum(least - low, high - most)
    wide = op.secants(lower, upper)
    before = torch.maximum(least - wide[0], wide[1] - most)
    assert (gap >= -1e-9).all()
    if name in PIECEWISE:
        assert gap.max() < 1e-3
    else:  # of what all secants give away
        assert gap.mean() < 0.45 * before.mean()


def test_every_piecewise_linear_function_is_known_here():
    straight = {name for name, way in WAYS.items() if "piecewise" in str(op_of(way).secants)}
    assert straight == PIECEWISE


def exact(centre, lower, upper, breaks, slopes):
    """The least and the greatest quotient, in fractions."""
    edges = [Fraction(b) for b in breaks]
    slopes = [Fraction(s) for s in slopes]
    c = Fraction(centre)

    def length(a, b, k):
        begin = a if k == 0 else max(a, edges[k - 1])
        end = b if k == len(edges) else min(b, edges[k])
        return max(Fraction(0), end - begin)

    found = []
    for t in (lower, upper, *(b for b in breaks if lower < b < upper)):
        t = Fraction(t)
        if t != c:
            near, far = min(t, c), max(t, c)
            total = sum(s * length(near, far, k) for k, s in enumerate(slopes))
            found.append(total / (far - near))
    for k, s in enumerate(slopes):
        begin = None if k == 0 else edges[k - 1]
        end = None if k == len(edges) else edges[k]
        left = (begin is None or begin < c) and (end is None or c <= end) and lower < c
        right = (begin is None or begin <= c) and (end is None or c < end) and c < upper
        if left or right:
            found.append(s)
    return min(found), max(found)


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-15, 1e-200])
def test_rounding_stays_on_the_wide_side(scale):
    """Near a break, in steps of a few ulps, where f(t) - f(c) over t - c would cancel."""
    for trial in range(60):
        count = 1 + trial % 4
        breaks = (torch.randn(count).sort().values * (1 if trial % 3 else scale)).tolist()
        slopes = (torch.randn(count + 1) * 10 ** torch.randn(count + 1)).tolist()
        if trial % 5 == 0:
            slopes = [0.0, 1.0, 0.0, 1.0, -1.0][: count + 1]
        op = piecewise_linear(lambda t: t, lambda b=breaks, s=slopes: (b, s))
        near = breaks[trial % count]
        three = near + scale * torch.randn(3)
        if trial % 2:
            steps = torch.randint(-3, 4, (3,)).tolist()
            three = torch.tensor([_moved(near, step) for step in steps])
        lower, centre, upper = three.sort().values.tolist()
        if lower == upper:
            continue
        low, high = op.anchored(*(torch.tensor([[v]]) for v in (centre, lower, upper)))
        least, most = exact(centre, lower, upper, breaks, slopes)
        size = max(abs(s) for s in slopes)
        assert Fraction(low.item()) <= least
        assert Fraction(high.item()) >= most
        assert least - Fraction(low.item()) <= 1e-13 * size
        assert Fraction(high.item()) - most <= 1e-13 * size


def _moved(x, steps):
    for _ in range(abs(steps)):
        x = math.nextafter(x, math.inf * steps)
    return x


def test_relu_by_hand():
    centre = torch.tensor([[2.0, 2.0, 2.0, -2.0, -2.0, 0.0, 0.0, 0.0, 2.0, -2.0]])
    lower = torch.tensor([[1.0, -2.0, -INF, -3.0, -3.0, -1.0, 0.0, -1.0, 0.0, -3.0]])
    upper = torch.tensor([[3.0, 3.0, INF, -1.0, 2.0, 1.0, 1.0, 0.0, 3.0, INF]])
    low, high = op_of(nn.ReLU(), (10,)).anchored(centre, lower, upper)
    expected = torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]])
    torch.testing.assert_close(low, expected, rtol=0, atol=1e-14)
    expected = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 1.0, 1.0]])
    torch.testing.assert_close(high, expected, rtol=0, atol=1e-14)
    straight = [0, 3, 6, 7, 8]
    assert torch.equal(low[0, straight], high[0, straight])  # linear there, exactly
    assert (high[0, 1:3] == 1).all()
    assert (low[0, 4:6] == 0).all()


def test_open_ends_by_hand():
    """From 2 on the flat part of a clamp, to the left without end and back."""
    centre = torch.tensor([[2.0, -2.0, 0.0]])
    lower, upper = torch.tensor([[-INF, -3.0, -INF]]), torch.tensor([[3.0, INF, 0.5]])
    low, high = op_of(nn.Hardtanh(), (3,)).anchored(centre, lower, upper)
    torch.testing.assert_close(low, torch.zeros(1, 3), rtol=0, atol=1e-14)
    torch.testing.assert_close(high, torch.tensor([[2 / 3, 2 / 3, 1.0]]))
    point = torch.tensor([[1.0]])
    low, high = op_of(nn.Tanh()).anchored(point, point, torch.full((1, 1), INF))
    assert low.item() == 0
    assert high.item() == pytest.approx(1 - math.tanh(1) ** 2)


def test_breaks_in_the_wrong_order_have_all_slopes():
    op = piecewise_linear(lambda t: t, lambda: ((1.0, -1.0), (0.5, 1.0, 0.25)))
    centre = torch.zeros(1, 1)
    low, high = op.anchored(centre, centre - 2, centre + 2)
    assert (low.item(), high.item()) == (0.25, 0.5)


def test_lengths_that_overflow_are_not_taken_for_nothing():
    centre = torch.full((1, 1), -1.5e308)
    low, high = op_of(nn.ReLU()).anchored(centre, centre, -centre)
    assert low.item() == 0
    assert high.item() >= 0.5


def test_a_single_point_has_the_slopes_there():
    point = torch.tensor([[-1.0, 0.0, 1.0]])
    low, high = op_of(nn.ReLU(), (3,)).anchored(point, point, point)
    assert low.tolist() == [[0, 0, 1]]
    assert high.tolist() == [[0, 1, 1]]
    low, high = op_of(nn.Tanh(), (3,)).anchored(point, point, point)
    torch.testing.assert_close(low, 1 - point.tanh().square())
    torch.testing.assert_close(high, low)


def test_a_centre_outside_by_rounding_widens_the_interval():
    op = op_of(nn.ReLU(), (2,))
    centre = torch.tensor([[-1e-17, 1e-17]])
    lower, upper = torch.tensor([[0.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    low, high = op.anchored(centre, lower, upper)
    assert (low == 0).all()
    assert (high == 1).all()


@pytest.mark.parametrize("way", [nn.ReLU(), nn.PReLU(1), nn.Tanh(), nn.Hardtanh()])
def test_nan_is_as_for_all_secants(way):
    op = op_of(way)
    values = torch.tensor([math.nan, -0.5, 0.5])
    for at in range(3):
        three = torch.tensor([[-0.5], [0.5], [1.5]])
        three[at] = values[0]
        lower, centre, upper = three[:, None]
        low, high = op.anchored(centre, lower, upper)
        hull = op.secants(torch.minimum(lower, centre), torch.maximum(upper, centre))
        for found, wide in zip((low, high), hull, strict=True):
            torch.testing.assert_close(found, wide.expand_as(found), equal_nan=True)


def test_live_slopes_of_each_channel():
    module = nn.PReLU(2)
    op = op_of(module, (2, 3))
    for weights in ([0.5, -2.0], [3.0, 1.0]):
        module.weight.data = torch.tensor(weights)
        centre = torch.ones(4, 2, 3)
        low, high = op.anchored(centre, -centre, 2 * centre)
        means = ((1 + torch.tensor(weights)) / 2)[:, None].expand(4, 2, 3)
        torch.testing.assert_close(low, means.clamp(max=1))
        torch.testing.assert_close(high, means.clamp(min=1))


def test_thresholds_of_each_unit():
    """Maxima rise up to their threshold, minima from theirs on."""
    module = ClippedMaxMin(1.0, -1.0)
    module(torch.zeros(1, 4))
    op = lc.trace(nn.Sequential(module), (4,)).output.op
    centre = torch.tensor([[0.0, 2.0, 0.0, -2.0]])
    low, high = op.anchored(centre, centre - 4, centre + 4)
    torch.testing.assert_close(low, torch.tensor([[0.25, 0.0, 0.25, 0.0]]))
    torch.testing.assert_close(high, torch.tensor([[1.0, 0.75, 1.0, 0.75]]))


def test_half_precision_of_boxes_is_kept():
    centre = torch.tensor([[1.0]], dtype=torch.float32)
    for way in (nn.ReLU(), nn.Tanh(), nn.Softshrink()):
        for end in op_of(way).anchored(centre, centre - 3, centre + 3):
            assert end.dtype == torch.float32
