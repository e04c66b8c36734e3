"""Laws of the rules, for every row of rule_cases: values, slopes, matrices, constants, refusals."""

import contextlib
import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipcert as lc
from lipcert.graph import Affine, Input, Lipschitz, Slope
from lipcert.layers import Householder
from lipcert.linear_map import Add, Composition
from lipcert.rules import registry
from nets import Net
from oracles import best_quotients, jacobians
from rule_cases import (
    AFFINE,
    ELEMENTWISE,
    LIPSCHITZ,
    MORE_ELEMENTWISE,
    REFUSED,
    RISING,
    VECTOR,
    Fn,
    calls,
    net,
)

INF = math.inf
GOLDEN = Path(__file__).parent / "golden"  # provenance: inside each file
SUP_SLOPE = {
    name: row["closed_form"] or row["sup_abs_derivative"]
    for name, row in json.loads((GOLDEN / "activation_constants.json").read_text())[
        "constants"
    ].items()
}
MAX_POOL = json.loads((GOLDEN / "max_pool_constants.json").read_text())["max_pool"]

# (id, network, largest slope)
SLOPES = [
    *(
        (f"{name} {i}", way, SUP_SLOPE[name])
        for name, ways in ELEMENTWISE.items()
        for i, way in enumerate(calls(*ways))
    ),
    *((name, way, sup) for name, (way, sup) in MORE_ELEMENTWISE.items()),
]
each_slope = pytest.mark.parametrize(
    ("way", "sup"), [row[1:] for row in SLOPES], ids=[row[0] for row in SLOPES]
)
CONSTANTS = LIPSCHITZ | RISING | VECTOR
ROWS = {
    **{
        name: Net(lambda way=way: nn.Sequential(copy.deepcopy(way)), (3, 2))
        for name, way, _ in SLOPES
    },
    **AFFINE,
    **{name: row for name, (row, _) in CONSTANTS.items()},
}


def output(module, shape=(1,)):
    return lc.trace(module, shape).output


# ---------------------------------------------------------------- all rules


def keys_used(monkeypatch, name, rows):
    """The arguments that calls of a function of the registry had, over traces of rows."""
    used, function = set(), getattr(registry, name)

    def recording(key):
        found = function(key)
        if found is not None:
            used.add(key)
        return found

    monkeypatch.setattr(registry, name, recording)
    for row in rows:
        with contextlib.suppress(lc.LipcertError):
            lc.trace(row.build(), row.shape)
    return used


def test_every_rule_has_a_row_here(monkeypatch):
    home = "lipcert."  # rules of other modules come from examples that another test ran
    rules = {key for key, rule in registry._RULES.items() if rule.__module__.startswith(home)}
    missing = rules - keys_used(monkeypatch, "find", ROWS.values())
    assert not missing, f"add rows to rule_cases.py for {[registry.describe(k) for k in missing]}"


def test_every_reason_has_a_row_here_and_no_rule(monkeypatch):
    reasons = set(registry._REASONS)
    missing = reasons - keys_used(monkeypatch, "reason", [row for row, _ in REFUSED])
    assert not missing, f"add rows to rule_cases.py for {[registry.describe(k) for k in missing]}"
    assert not reasons & set(registry._RULES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ROWS)
def test_the_normal_form_computes_what_the_op_computes(name, dtype):
    row = ROWS[name]
    module = row.build().to(dtype)
    graph = lc.trace(module, row.shape)
    x = 2 * torch.randn(3, *row.shape, dtype=dtype)
    value, expected = graph.values(x)[graph.output], module(x.clone())
    assert graph.output.shape == expected.shape[1:]
    assert value.dtype == dtype
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(("row", "because"), REFUSED)
def test_refused_ops_say_why(row, because):
    with pytest.raises(lc.LipcertError, match="cannot be bounded: 1 op|2 ops") as caught:
        lc.trace(row.build(), row.shape)
    assert because in str(caught.value)


def test_a_second_rule_for_an_op_is_refused():
    with pytest.raises(lc.LipcertError, match=r"a rule for torch.nn.modules.activation.ReLU alr"):
        lc.rule(nn.ReLU)(lambda module, x: x)


# ---------------------------------------------------------------- elementwise functions


def intervals():
    """Intervals of all widths, single points and half-lines, with ends at special points too."""
    special = torch.tensor([-20.0, -3.0, -1.0, -0.3, 0.0, 0.5, 0.7, 1.0, 2.0, 3.0, 6.0])
    ends = torch.cat([special, torch.randn(60), 8 * torch.randn(20)])
    lower = ends[torch.randint(len(ends), (500,))]
    upper = ends[torch.randint(len(ends), (500,))]
    lower, upper = torch.minimum(lower, upper), torch.maximum(lower, upper)
    infinite = torch.full_like(ends, INF)
    return torch.cat([lower, -infinite, ends, ends, -infinite[:1]])[:, None], torch.cat(
        [upper, ends, infinite, ends, infinite[:1]]
    )[:, None]


def inside(lower, upper, n=400):
    """Sorted points of each interval, its ends among them; infinite ends are cut."""
    lower, upper = lower.clamp(min=-60), upper.clamp(max=60)
    return lower + (upper - lower) * torch.linspace(0, 1, n)


@each_slope
def test_secants_and_images_hold_all_samples(way, sup):
    op = output(nn.Sequential(way)).op
    assert isinstance(op, Slope)
    lower, upper = intervals()
    low, high = (end.expand_as(lower) for end in op.secants(lower, upper))
    assert not low.isnan().any()
    assert not high.isnan().any()
    assert (low <= high).all()
    # Softplus has a jump of 2e-9 in torch, at its threshold of 20.
    jump = 2.1e-9 if "softplus" in str(op.fn) or "Softplus" in str(way) else 0
    x = inside(lower, upper)
    y = op.fn(x)
    for apart in (1, 7, 50, 399):
        gap = x[:, apart:] - x[:, :-apart]
        rise = y[:, apart:] - y[:, :-apart]
        slack = 1e-14 * (1 + y.abs().amax(1, keepdim=True)) + jump
        assert (rise <= high * gap + slack).all()
        assert (rise >= low * gap - slack).all()
    bottom, top = op.image(lower, upper)
    assert not bottom.isnan().any()
    assert not top.isnan().any()
    assert (bottom <= y + 1e-12).all()
    assert (y <= top + 1e-12).all()


@each_slope
def test_secants_and_images_are_tight(way, sup):
    """On random intervals, which have no special point at an end."""
    op = output(nn.Sequential(way)).op
    if op.fn in (torch.sin, torch.cos):
        return  # these use their overall range, which the next test checks
    lower = 4 * torch.randn(300, 1)
    upper = lower + 6 * torch.rand(300, 1)
    x = inside(lower, upper, 2001)
    y = op.fn(x)
    slopes = y.diff(dim=1) / x.diff(dim=1)
    low, high = op.secants(lower, upper)
    bottom, top = op.image(lower, upper)
    for bound, seen in (
        (high, slopes.amax(1)),
        (low, slopes.amin(1)),
        (top, y.amax(1)),
        (bottom, y.amin(1)),
    ):
        # A few intervals end so close to a kink that the samples miss it.
        assert (bound.squeeze(1) - seen).abs().quantile(0.95) < 0.01


@each_slope
def test_the_largest_slope_is_that_of_the_reference(way, sup):
    op = output(nn.Sequential(way)).op
    everywhere = torch.full((1, 1), INF)
    low, high = op.secants(-everywhere, everywhere)
    assert max(-low.item(), high.item()) == pytest.approx(sup, abs=1e-9)
    bottom, top = op.image(-everywhere, everywhere)
    far = op.fn(torch.tensor([-1e6, 1e6]))
    assert bottom <= far.min() + 1e-5
    assert far.max() <= top + 1e-5


@each_slope
def test_the_lipschitz_constant_is_the_largest_slope(way, sup):
    assert float(lc.lipschitz(nn.Sequential(way), (2, 3))) == pytest.approx(sup, abs=1e-9)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3)])
def test_prelu_has_a_slope_for_each_channel(shape):
    module = nn.Sequential(nn.PReLU(4))
    module[0].weight.data = torch.tensor([0.5, -2.0, 1.0, 3.0])
    op = output(module, shape).op
    lower = -torch.rand(5, *shape)
    low, high = (end.expand_as(lower) for end in op.secants(lower, torch.ones_like(lower)))
    channels = (low.movedim(1, -1).reshape(-1, 4), high.movedim(1, -1).reshape(-1, 4))
    assert (channels[0] == torch.tensor([0.5, -2.0, 1.0, 1.0])).all()
    assert (channels[1] == torch.tensor([1.0, 1.0, 1.0, 3.0])).all()
    bottom, top = op.image(lower, torch.full_like(lower, INF))
    assert (top == INF).all()
    assert (bottom == torch.minimum(op.fn(lower), torch.zeros(()))).all()
    assert float(lc.lipschitz(module, shape)) == 3


# ---------------------------------------------------------------- affine functions


def test_the_rows_of_affine_functions_are_affine():
    others = {name for name in AFFINE if not isinstance(_only(name).op, Affine)}
    same = {"Identity", "x.clone", "torch.clone", "x.contiguous"}
    assert others == same | {name for name in AFFINE if "ropout" in name}


def _only(name):
    row = AFFINE[name]
    graph = lc.trace(row.build(), row.shape)
    assert len(graph.nodes) <= 2
    return graph.output


@pytest.mark.parametrize("name", AFFINE)
def test_the_matrix_is_the_jacobian(name):
    row = AFFINE[name]
    module = row.build()
    graph = lc.trace(module, row.shape)
    if isinstance(graph.output.op, Input):
        return
    if name == "x.detach":  # its derivative, as autograd knows it, lacks a term
        module.f = lambda s, x: 2 * x
    matrix = graph.output.op.map().dense()
    jacobian = jacobians(module, torch.randn(1, *row.shape))[0]
    torch.testing.assert_close(matrix, jacobian)
    norm = torch.linalg.matrix_norm(jacobian, 2)
    assert float(lc.spectral_norm(module, row.shape)) == pytest.approx(norm.item(), rel=1e-9)
    if name in ("Conv2d circulant", "Conv2d same circular"):
        fourier = lc.spectral_norm(module, row.shape, lc.Fourier())
        assert float(fourier) == pytest.approx(norm.item(), rel=1e-9)
    elif "Conv" in name or "conv" in name:
        with contextlib.suppress(lc.LipcertError):  # not a convolution alone
            assert float(lc.spectral_norm(module, row.shape, lc.Fourier())) >= norm * (1 - 1e-9)


@pytest.mark.parametrize("name", AFFINE)
def test_boxes_go_through_the_matrix(name):
    row = AFFINE[name]
    graph = lc.trace(row.build(), row.shape)
    if isinstance(graph.output.op, Input):
        return
    map = graph.output.op.map()
    centre, radius = torch.randn(2, 2, *row.shape)
    radius = radius.abs()
    low, high = map.interval(centre - radius, centre + radius)
    reach = (map.dense().abs() @ radius.flatten(1).mT).mT.reshape(high.shape)
    assert (high >= map.apply(centre) + reach - 1e-12).all()
    assert (low <= map.apply(centre) - reach + 1e-12).all()
    if not isinstance(map, Composition | Add):  # these go part by part
        torch.testing.assert_close(high, map.apply(centre) + reach)
        torch.testing.assert_close(low, map.apply(centre) - reach)


def test_a_constant_mask_joins_two_functions_and_is_read_anew():
    module = Fn(lambda s, x: torch.where(s.mask, x.sin(), (2 * x).tanh()))
    module.register_buffer("mask", torch.tensor([True, False, True]))
    graph = lc.trace(module, (3,))
    constant = float(lc.Product(graph).lipschitz())
    assert constant == pytest.approx(5**0.5)  # as if both reached every entry
    assert best_quotients(module, (3,)).norm(dim=1).max() <= constant
    for mask in ([False, True, True], [True, True, True]):
        module.mask = torch.tensor(mask)
        x = torch.randn(4, 3)
        torch.testing.assert_close(graph.values(x)[graph.output], module(x))


def test_folding_counts_the_blocks_that_share_a_cell():
    for size, kernel, stride, count in ((6, 2, 2, 1), (6, 3, 3, 1), (5, 3, 1, 9), (6, 3, 2, 4)):
        blocks = F.unfold(torch.zeros(1, 2, size, size), kernel, stride=stride).shape[1:]
        fold = nn.Fold(size, kernel, stride=stride)
        assert float(lc.spectral_norm(fold, tuple(blocks))) == pytest.approx(count**0.5)


# ---------------------------------------------------------------- functions with a constant


@pytest.mark.parametrize("angle", [0.0, 0.7, -2.2, math.pi, 4.0])
def test_householder_reflects_a_half_plane_and_keeps_norms(angle):
    module = Householder(2)
    module.angle.data = torch.tensor([angle])
    z = torch.randn(200, 2)
    v = torch.tensor([math.sin(angle / 2), -math.cos(angle / 2)])
    mirrored = z - 2 * (z @ v)[:, None] * v
    torch.testing.assert_close(module(z), torch.where((z @ v)[:, None] > 0, mirrored, z))
    turns = jacobians(module, z)
    torch.testing.assert_close(turns.mT @ turns, torch.eye(2).expand_as(turns))
    assert {round(float(d)) for d in torch.linalg.det(turns)} == {1, -1}


def test_householder_sorts_at_the_start_and_learns_its_angles():
    module = Householder(6)
    x = torch.randn(5, 6, 2)
    a, b = x.chunk(2, 1)
    torch.testing.assert_close(module(x), torch.cat([torch.minimum(a, b), torch.maximum(a, b)], 1))
    module(x)[:, 0].sum().backward()
    assert (module.angle.grad != 0).tolist() == [True, False, False]


@pytest.mark.parametrize("angle", [0.0, 0.7, -2.2, math.pi, 4.0])
def test_images_of_householder_are_right_at_infinity_and_follow_the_angle(angle):
    module = Householder(2)
    op = output(module, (2,)).op
    module.angle.data = torch.tensor([angle])  # after tracing
    lower, upper = torch.tensor([[-INF, -1.0], [0.5, -INF]]), torch.tensor([[2.0, 3.0], [INF, INF]])
    bottom, top = op.image(lower, upper)
    assert not bottom.isnan().any()
    assert not top.isnan().any()
    low, high = lower.clamp(min=-1e3)[:, None], upper.clamp(max=1e3)[:, None]
    value = module((low + (high - low) * torch.rand(2, 500, 2)).flatten(0, 1)).reshape(2, 500, 2)
    assert (bottom[:, None] <= value + 1e-9).all()
    assert (value <= top[:, None] + 1e-9).all()
    if angle == 0.0:  # b is reflected to |b|, a stays
        torch.testing.assert_close(top[0], torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("channels", [0, 3])
def test_householder_needs_pairs(channels):
    with pytest.raises(lc.LipcertError, match=f"channels={channels} must be"):
        Householder(channels)
    with pytest.raises(lc.LipcertError, match="made for 4 channels"):
        Householder(4)(torch.zeros(2, 6))


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_hold_and_images_contain(name):
    row, constant = CONSTANTS[name]
    module = row.build()
    graph = lc.trace(module, row.shape)
    (n,) = (n for n in graph if isinstance(n.op, Lipschitz))
    assert float(lc.Product(graph).lipschitz()) == pytest.approx(constant, rel=1e-12)
    seen = best_quotients(module, row.shape, 500).norm(dim=1).max()
    assert seen <= constant * (1 + 1e-12) + 1e-12
    assert seen >= 0.4 * constant
    lower, upper = torch.randn(2, 300, *n.inputs[0].shape).sort(0).values
    bottom, top = n.op.image(lower, upper)
    value = n.op.fn(lower + (upper - lower) * torch.rand_like(lower))
    assert (bottom <= value + 1e-12).all()
    assert (value <= top + 1e-12).all()
    if name not in VECTOR:  # both ends of the box are attained
        assert torch.equal(bottom, n.op.fn(lower))
        assert torch.equal(top, n.op.fn(upper))


@pytest.mark.parametrize("row", MAX_POOL)
def test_max_pool_constants_are_the_reference_and_attained(row):
    geometry = row["k"], row["s"], row["p"], row["dilation"]
    pool = nn.MaxPool2d(*geometry, ceil_mode=row["ceil_mode"])
    size = row["H"]
    assert float(lc.lipschitz(pool, (1, size, size))) == pytest.approx(row["L_exact"], rel=1e-12)
    bumps = torch.eye(size * size).reshape(-1, 1, size, size)
    change = (pool(bumps) - pool(0 * bumps)).flatten(1).norm(dim=1)
    assert change.max().item() == pytest.approx(row["L_exact"], rel=1e-12)


def test_a_maximum_of_the_same_pair_twice_is_sorted_once():
    row = net(lambda s, x: torch.cat([torch.max(*x.chunk(2, 1)), torch.min(*x.chunk(2, 1))], 1), 6)
    assert float(lc.lipschitz(row.build(), row.shape)) == pytest.approx(2**0.5)
    shared = net(lambda s, x: _sorted(*x.chunk(2, 1)), 6)
    assert float(lc.lipschitz(shared.build(), shared.shape)) == 1


def _sorted(a, b):
    return torch.cat([torch.minimum(b, a), torch.maximum(a, b)], 1)
