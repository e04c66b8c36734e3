"""Activations with learned thresholds, and piecewise linear functions with live breaks."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipcert as lc
from lipcert.graph import Lipschitz, Slope
from lipcert.layers import ClippedMaxMin, ClippedReLU, project_thresholds
from lipcert.models import c4f3_bcp, mlp
from lipcert.rules.slopes import piecewise_linear
from oracles import jacobians

INF, NAN = math.inf, math.nan
BOTH = pytest.mark.parametrize("make", [ClippedReLU, ClippedMaxMin])
SHAPE = (4, 3, 2)


def learned(make, shape=SHAPE, scale=1.0):
    """The layer with random thresholds; some of them are crossed."""
    module = make()
    module(torch.zeros(1, *shape))
    for parameter in module.parameters():
        parameter.data = scale * torch.randn_like(parameter)
    return module


# ---------------------------------------------------------------- the layers


def test_clipped_relu_rises_from_zero_to_the_threshold_of_each_unit():
    module = ClippedReLU(0.5)
    x = torch.linspace(-2, 2, 9).expand(3, 9)
    torch.testing.assert_close(module(x), x.clamp(0, 0.5))
    theta = torch.linspace(-1, 1, 9)
    module.threshold.data = theta
    torch.testing.assert_close(module(x), torch.minimum(x, theta).relu())
    assert (module(x) >= 0).all()


def test_clipped_max_min_sorts_pairs_and_holds_each_half():
    module = ClippedMaxMin(1.5, -0.5)
    x = torch.tensor([[1.0, 5.0, -2.0, -3.0], [0.0, 0.25, 1.0, 0.5]])
    assert module(x).tolist() == [[1.0, 1.5, -0.5, -0.5], [1.0, 0.5, 0.0, 0.25]]
    module.upper.data, module.lower.data = torch.tensor([0.5, 9.0]), torch.tensor([0.75, -9.0])
    assert module(x).tolist() == [[0.5, 5.0, 0.75, -3.0], [0.5, 0.5, 0.75, 0.25]]


@BOTH
def test_no_distance_grows_for_any_thresholds(make):
    module = learned(make)
    x, y = 2 * torch.randn(2, 300, *SHAPE)
    before, after = (x - y).flatten(1).norm(dim=1), (module(x) - module(y)).flatten(1).norm(dim=1)
    assert (after <= before + 1e-12).all()
    slopes = jacobians(module, x[:20])
    assert (torch.linalg.matrix_norm(slopes, 2) <= 1 + 1e-12).all()
    assert (slopes.count_nonzero((1, 2)) < 24).all()  # some units are held


@BOTH
def test_thresholds_take_the_shape_of_a_sample_and_keep_it(make):
    module = make()
    before = list(module.parameters())
    module(torch.zeros(5, *SHAPE))
    halves = 2 if make is ClippedMaxMin else 1
    for old, new in zip(before, module.parameters(), strict=True):
        assert old is new
        assert new.shape == (4 // halves, 3, 2)
    for other in ((4, 3, 4), (4, 6), (2, 3, 2), (4, 1, 1)):
        with pytest.raises(lc.LipcertError, match=f"{make.__name__} has a threshold for each unit"):
            module(torch.zeros(5, *other))
    if make is ClippedMaxMin:
        with pytest.raises(lc.LipcertError, match="odd"):
            make()(torch.zeros(2, 5))


@BOTH
def test_an_optimiser_may_have_them_before_and_after(make):
    for first in (False, True):
        net = nn.Sequential(nn.Linear(4, 6), make())
        if first:
            net(torch.zeros(1, 4))
        optimiser = torch.optim.Adam(net.parameters(), 0.1)
        before = [p.clone() for p in make().parameters()]
        net(10 * torch.randn(64, 4)).square().sum().backward()
        optimiser.step()
        for old, new in zip(before, net[1].parameters(), strict=True):
            assert old.numel() == 0
            assert new.grad.shape == new.shape
            assert (new.data != {"upper": 1, "lower": -1}.get("", 2)).all()
        held = make()(torch.zeros(1, 6)) * 0
        assert (net[1](torch.full((1, 6), 9.0)) != held + 1).any()


@BOTH
def test_copies_states_precisions(make):
    fresh = copy.deepcopy(make())
    assert all(p.numel() == 0 for p in fresh.parameters())
    fresh.to(torch.float32)(torch.zeros(1, *SHAPE, dtype=torch.float32))
    assert all(p.dtype == torch.float32 for p in fresh.parameters())
    module = learned(make)
    x = torch.randn(3, *SHAPE)
    for other in (make(), fresh.double(), copy.deepcopy(module)):
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x), module(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        learned(make, (2, 5)).load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict(make().state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        make().load_state_dict({})


def test_models_make_them_and_print_them():
    net = c4f3_bcp((1, 28, 28), 10, activation=ClippedReLU)
    thresholds = [p for name, p in net.named_parameters() if "threshold" in name]
    assert sum(p.numel() for p in thresholds) == 48_064
    assert all((p == 1).all() for p in thresholds)
    assert "ClippedReLU(threshold=0.25)" in str(nn.Sequential(ClippedReLU(0.25)))
    assert "upper=0.3, lower=-0.3" in str(ClippedMaxMin(0.3, -0.3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClippedReLU(-0.1),
        lambda: ClippedReLU(INF),
        lambda: ClippedReLU(NAN),
        lambda: ClippedMaxMin(0.0, 0.1),
        lambda: ClippedMaxMin(NAN, -1.0),
        lambda: ClippedMaxMin(1.0, -INF),
    ],
)
def test_senseless_thresholds_are_refused(make):
    with pytest.raises(lc.LipcertError, match="needs"):
        make()


def test_projection_lifts_negative_thresholds_of_clipped_relu_alone():
    net = nn.Sequential(learned(ClippedReLU), learned(ClippedMaxMin), nn.Linear(2, 2))
    before = copy.deepcopy(net)
    project_thresholds(net)
    assert torch.equal(net[0].threshold, before[0].threshold.clamp(min=0))
    for name, parameter in net.named_parameters():
        if name != "0.threshold":
            assert torch.equal(parameter, before.get_parameter(name))
    # A threshold at 0 can still rise.
    zero = net[0].threshold == 0
    net[0](torch.ones(1, *SHAPE)).sum().backward()
    assert zero.any()
    assert (net[0].threshold.grad[zero] == 1).all()


# ---------------------------------------------------------------- their nodes


def intervals(shape, count=300):
    """Intervals of all widths, points and half-lines, with ends on breaks too."""
    ends = torch.randn(count, 2, *shape).mul(2).round(decimals=1)
    lower, upper = ends.amin(1), ends.amax(1)
    lower = lower.where(torch.rand(lower.shape) > 0.1, -INF)
    upper = upper.where(torch.rand(upper.shape) > 0.1, INF)
    return lower, upper


def samples(lower, upper):
    """Points of each interval, sorted, its ends among them."""
    low, high = lower.clamp(min=-20), upper.clamp(max=20)
    share = torch.cat([torch.linspace(0, 1, 41), torch.rand(200)]).sort().values
    share = share.reshape(-1, *(1,) * lower.ndim)
    inside = (low + (high - low) * share).clamp(low, high)
    zero = torch.zeros(1).clamp(low, high)[None]  # the break that all share
    return torch.cat([inside, zero]).sort(0).values


def assert_held(op, lower, upper):
    """Slopes and images hold all samples; slopes are those of some samples."""
    low, high = (end.expand_as(lower) for end in op.secants(lower, upper))
    bottom, top = op.image(lower, upper)
    assert not torch.stack([low, high, bottom, top]).isnan().any()
    x = samples(lower, upper)
    y = torch.stack([op.fn(t) for t in x])
    assert (bottom <= y).all()
    assert (y <= top).all()
    gap, rise = x.diff(dim=0), y.diff(dim=0)
    assert (rise <= high * gap + 1e-12).all()
    assert (low * gap - 1e-12 <= rise).all()
    assert torch.equal(y[0].where(lower.isinf(), bottom), bottom.where(~lower.isinf(), y[0]))
    return low, high, rise / gap


@BOTH
@pytest.mark.parametrize("shape", [SHAPE, (6,)])
def test_slopes_and_images_hold_for_crossed_thresholds_too(make, shape):
    module = learned(make, shape)
    for parameter in module.parameters():
        parameter.data = parameter.data.round(decimals=1)
        parameter.data.view(-1)[0] = 0.0
    graph = lc.trace(nn.Sequential(module), shape)
    op = graph.output.op
    assert isinstance(op, Slope)
    lower, upper = intervals(shape)
    low, high, slopes = assert_held(op, lower, upper)
    wide = (upper - lower) > 1e-9
    # Tight: a slope of 1 or 0 is claimed only where it is seen.
    seen = slopes.nan_to_num(0).amax(0) > 0.5, (slopes < 0.5).any(0)
    missed = wide & (((high == 1) & ~seen[0]) | ((low == 0) & ~seen[1]))
    assert missed.double().mean() < 0.02  # a piece shorter than the distance of samples
    assert ((high == 0) & wide).any()
    assert ((low == 1) & wide).any()


def test_units_with_crossed_thresholds_are_constant_everywhere():
    module = ClippedReLU()
    graph = lc.trace(nn.Sequential(module), (4,))
    module.threshold.data = torch.tensor([-1.0, 0.0, 0.5, NAN])
    line = torch.full((1, 1), INF)
    low, high = graph.output.op.secants(-line, line)
    assert low.tolist() == [[0, 0, 0, 0]]
    assert high.tolist() == [[0, 0, 1, 1]]


@BOTH
def test_nodes_are_named_after_the_module_and_sort_before_they_hold(make):
    net = nn.Sequential(nn.Linear(3, 4), make(), nn.Linear(4, 2))
    graph = lc.trace(net, (3,))
    own = [n for n in graph if n.name.split("#")[0] == "1"]
    kinds = [type(n.op) for n in own]
    assert kinds == ([Slope] if make is ClippedReLU else [Lipschitz, Slope])
    x = torch.randn(5, 3)
    torch.testing.assert_close(graph.values(x)[graph.output], net(x))
    for parameter in net[1].parameters():
        parameter.data = torch.randn_like(parameter)
    torch.testing.assert_close(graph.values(x)[graph.output], net(x))
    if make is ClippedMaxMin:
        op = own[0].op
        lower, upper = torch.randn(2, 5, 4).sort(0).values
        value = op.fn(lower + (upper - lower) * torch.rand(5, 4))
        bottom, top = op.image(lower, upper)
        assert ((bottom <= value) & (value <= top)).all()
        assert op.constant() == 1
        marks = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
        assert op.needs(marks).tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


@BOTH
@pytest.mark.parametrize("bound", [lc.Product, lc.LipLT])
def test_bounds_hold_with_random_thresholds(make, bound):
    def activation():
        return make()

    net = mlp((5,), 3, widths=(8, 6), activation=activation)
    graph = lc.trace(net, (5,))
    for name, parameter in net.named_parameters():
        if name.rsplit(".", 1)[1] not in ("weight", "bias"):
            parameter.data = torch.randn_like(parameter)
    constants = bound(graph, norm=lc.Exact())().dense()[0]
    slopes = jacobians(net, torch.randn(500, 5))
    steepest = (slopes[:, :, None] - slopes[:, None]).norm(dim=-1).amax(0)
    assert (steepest <= constants + 1e-9).all()
    assert steepest.max() > 0


# ---------------------------------------------------------------- piecewise linear functions

PIECES = {
    "rises": ((-0.5, 1.0), (0.5, 2.0, 0.0)),
    "falls": ((-1.0, 0.5), (-1.0, 0.25, -0.5)),
    "turns": ((0.0,), (-1.0, 1.0)),
    "two of one slope": ((-1.0, 0.0, 1.5), (1.0, 0.0, 1.0, 0.5)),
    "three slopes": ((-1.0, 0.5), (0.0, 1.0, 0.25)),
}


def through_zero(breaks, slopes):
    """The continuous function with these pieces whose value at the first break is 0."""

    def fn(x):
        ends = [-INF, *breaks, INF]
        first = breaks[0]
        y = slopes[0] * (x.clamp(max=first) - first) if slopes[0] else 0 * x.clamp(-9, 9)
        for begin, end, slope in zip(ends[1:-1], ends[2:], slopes[1:], strict=True):
            if slope:
                y = y + slope * (x.clamp(begin, end) - begin)
        return y

    return fn


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", PIECES)
def test_numbers_and_live_tensors_give_the_same(name, live):
    breaks, slopes = PIECES[name]
    fn = through_zero(breaks, slopes)
    shape = (2, 3)
    op = piecewise_linear(fn, lambda: (breaks, slopes))
    full = tuple(torch.full(shape, b) for b in breaks)
    other = piecewise_linear(
        fn, lambda: (full, tuple(torch.tensor(s) for s in slopes) if live else slopes)
    )
    lower, upper = intervals(shape)
    assert_held(op, lower, upper)
    for one, two in zip(op.secants(lower, upper), other.secants(lower, upper), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(op.image(lower, upper), other.image(lower, upper), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", PIECES)
def test_what_is_nan_has_the_widest_slopes(name, live):
    breaks, slopes = PIECES[name]
    pieces = tuple(torch.tensor(s) for s in slopes) if live else slopes
    op = piecewise_linear(through_zero(breaks, slopes), lambda: (breaks, pieces))
    for lower, upper in ((NAN, NAN), (NAN, -5.0), (NAN, 0.0), (5.0, NAN), (0.0, NAN)):
        low, high = op.secants(torch.tensor([[lower]]), torch.tensor([[upper]]))
        assert (low.item(), high.item()) == (min(slopes), max(slopes))
        assert any(e.isnan() for e in op.image(torch.tensor([[lower]]), torch.tensor([[upper]])))


def test_a_point_on_a_break_has_both_slopes_and_the_gradient_of_an_image_is_that_of_the_function():
    op = piecewise_linear(F.relu, lambda: ((0.0,), (0.0, 1.0)))
    low, high = op.secants(torch.zeros(1), torch.zeros(1))
    assert (low.item(), high.item()) == (0, 1)
    lower = torch.tensor([-1.0, 2.0, -INF], requires_grad=True)
    upper = torch.tensor([1.0, 3.0, 4.0], requires_grad=True)
    bottom, top = op.image(lower, upper)
    (bottom + 2 * top).sum().backward()
    assert lower.grad.tolist() == [0, 1, 0]
    assert upper.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_images_of_infinite_boxes(slope):
    op = lc.trace(nn.LeakyReLU(slope), (1,)).output.op
    line = torch.full((1,), INF)
    bottom, top = op.image(-line, line)
    assert bottom.item() == (-INF if slope else 0)
    assert top.item() == INF
