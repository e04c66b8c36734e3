"""The ellipsoid bound: never below the truth, exact where that is known, tighter with depth."""

import itertools
import math

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.bounds import ellipsoid
from lipcert.layers import MaxMin
from nets import NETS
from oracles import best_quotients, differences, jacobians
from test_api import jaxtyping_off

UP = 1 + 1e-9


def relu_net(widths, seed):
    torch.manual_seed(seed)
    layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def over_all_patterns(net):
    """The largest norm of each difference of rows over all 0/1 patterns of the ReLUs.

    It is convex in the slope of each neuron alone, so that no slopes in between give more.
    """
    first, *rest = [m.weight.detach() for m in net if isinstance(m, nn.Linear)]
    sizes = [len(first), *(len(w) for w in rest[:-1])]
    patterns = torch.tensor(list(itertools.product((0.0, 1.0), repeat=sum(sizes))))
    maps = first.expand(len(patterns), *first.shape)
    for weight, part in zip(rest, patterns.split(sizes, 1), strict=True):
        maps = weight @ (part[:, :, None] * maps)
    return torch.cdist(maps, maps).amax(0)


@pytest.fixture
def unchecked():
    with jaxtyping_off():
        yield


def test_the_exact_maximum_over_all_patterns_is_never_above(unchecked):
    """Nets of up to 9 neurons, some of them scaled, with equal rows or zero neurons."""
    generator = torch.Generator().manual_seed(0)
    tightness = []
    for seed in range(30):
        layers = int(torch.randint(1, 4, (), generator=generator))
        widths = torch.randint(1, 4, (layers,), generator=generator).tolist()
        net = relu_net([3, *widths, 3], seed)
        with torch.no_grad():
            if seed % 5 == 0:
                net[0].weight.mul_(10.0 ** (seed % 60 - 30))
            if seed % 7 == 0:
                net[-1].weight[0] = net[-1].weight[1]
            if seed % 11 == 0:
                net[0].weight[0] = 0
            exact = over_all_patterns(net)
            found = lc.Ellipsoid(lc.trace(net, (3,)))().dense()[0]
        assert (found >= exact / UP).all()
        if (exact > 0).any():
            tightness.append(float((found[exact > 0] / exact[exact > 0]).mean()))
    assert sum(tightness) / len(tightness) < 1.2


@pytest.mark.parametrize("name", NETS)
def test_not_below_what_is_seen(name, unchecked):
    net, shape = NETS[name].build(), NETS[name].shape
    with torch.no_grad():
        bound = lc.Ellipsoid(lc.trace(net, shape))
        K, whole, each = bound().dense()[0], bound.lipschitz().value, bound.per_output().value
    quotients = best_quotients(net, shape, pairs=300)
    J = jacobians(net, torch.randn(100, *shape))
    assert bound().kind is lc.Kind.UPPER
    off = ~torch.eye(3, dtype=torch.bool)
    for seen in (quotients, J):
        assert (differences(seen)[..., off] <= UP * K[off]).all()
    assert torch.linalg.matrix_norm(J, 2).max() <= UP * whole
    assert quotients.norm(dim=1).max() <= UP * whole
    assert (J.norm(dim=2).amax(0) <= UP * each).all()
    assert (quotients.abs().amax(0) <= UP * each).all()


def test_one_affine_map_is_exact():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 4))
    graph = lc.trace(net, (3, 4))
    bound, exact = lc.Ellipsoid(graph), lc.Product(graph, norm=lc.Exact())
    torch.testing.assert_close(bound().dense(), exact().dense())
    torch.testing.assert_close(bound.lipschitz().value, exact.lipschitz().value)


def test_a_map_and_its_slopes_by_hand():
    """One neuron: |v| |w|, whatever the slopes; two parallel ones with opposite signs."""
    net = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2))
    net[0].weight.data = torch.tensor([[3.0, 4.0]])
    net[2].weight.data = torch.tensor([[2.0], [-1.0]])
    found = lc.Ellipsoid(lc.trace(net, (2,)))().row(torch.tensor([0]))[0, 1].detach()
    assert float(found) == pytest.approx(15.0, rel=1e-5)
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    net[0].weight.data = torch.tensor([[1.0], [-1.0]])
    net[2].weight.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]])  # |x|: its constant is 1
    found = lc.Ellipsoid(lc.trace(net, (1,)))().row(torch.tensor([0]))[0, 1].detach()
    assert 1 <= float(found) <= 2 * UP


def test_it_is_the_matrix_inequality():
    """P - (c + r d) S (c + r d) has no negative eigenvalue for any diagonal |d| <= 1."""
    from lipcert.bounds.extent import Extent, balanced, through_slopes

    torch.manual_seed(0)
    for trial in range(50):
        a = torch.randn(5, 3 if trial % 2 else 7)
        low = torch.rand(5) - 0.5
        high = low + torch.rand(5) * (torch.rand(5) > 0.3)
        read = [None, torch.randn(2, 5), torch.zeros(2, 5)][trial % 3]
        one = torch.ones(())
        after = through_slopes(Extent(one, a.mT), low, high, read, balanced)
        p = after.scale**2 * after.matrix
        for _ in range(50):
            slopes = low + (high - low) * torch.rand(5).round()
            least = torch.linalg.eigvalsh(p - slopes[:, None] * (a @ a.mT) * slopes)[0]
            assert least >= -1e-10 * p.abs().max()


@pytest.mark.parametrize(("width", "depth"), [(20, 2), (20, 5), (64, 5)])
def test_tighter_than_the_others_with_depth(width, depth):
    torch.manual_seed(1)
    net = relu_net([20, *[width] * depth, 10], 1)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    graph = lc.trace(net, (20,))
    found = [float(b(graph).lipschitz()) for b in (lc.Product, lc.LipLT, lc.Ellipsoid)]
    assert found[2] < (0.85 if depth > 2 else 0.98) * found[1] < found[0]


def test_orthogonal_layers_with_maxmin_are_as_in_the_product():
    net = lc.models.mlp((8,), 3, widths=(8, 8), activation=MaxMin)
    lc.models.initialise_orthogonally(net)
    graph = lc.trace(net, (8,))
    one, other = lc.Ellipsoid(graph), lc.Product(graph, norm=lc.Exact())
    torch.testing.assert_close(one().dense(), other().dense(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adjacent", [False, True])
def test_sorted_pairs_are_more_than_a_constant(adjacent):
    """Their sums pass unchanged: below the product where these carry most."""
    torch.manual_seed(0)
    activation = lambda: MaxMin(adjacent)  # noqa: E731
    net = lc.models.mlp((10,), 3, widths=(16, 16, 16, 16), activation=activation)
    graph = lc.trace(net, (10,))
    one, other = lc.Ellipsoid(graph), lc.Product(graph, norm=lc.Exact())
    assert float(one.lipschitz()) < 0.8 * float(other.lipschitz())
    J = jacobians(net, torch.randn(500, 10))
    assert torch.linalg.matrix_norm(J, 2).max() <= UP * one.lipschitz().value
    expansion = next(n.op.expansion for n in graph if getattr(n.op, "expansion", None))
    x = torch.randn(50, 16)
    inside = expansion.before.apply(x)
    bent = torch.where(expansion.low < 0, inside.abs(), inside)
    torch.testing.assert_close(expansion.after.apply(bent), MaxMin(adjacent)(x))


@pytest.mark.parametrize("power", [-60, -20, 20, 60])
def test_scales_pass_through(power):
    net = relu_net([4, 6, 6, 3], 0)
    graph = lc.trace(net, (4,))
    before = lc.Ellipsoid(graph)().dense().detach()
    with torch.no_grad():
        net[2].weight.mul_(2.0**power)
    after = lc.Ellipsoid(graph)().dense().detach()
    torch.testing.assert_close(after, before * 2.0**power, rtol=1e-9, atol=0)


def test_gradients_are_those_of_the_value():
    net = relu_net([4, 6, 5, 3], 3)
    graph = lc.trace(net, (4,))

    def value():
        return lc.Ellipsoid(graph)().row(torch.tensor([1]))[0, 2]

    value().backward()
    weight = net[2].weight
    direction = torch.randn_like(weight)
    step = 1e-6
    with torch.no_grad():
        weight.add_(step * direction)
        above = value()
        weight.sub_(2 * step * direction)
        below = value()
        weight.add_(step * direction)
    slope = (weight.grad * direction).sum()
    assert float((above - below) / (2 * step)) == pytest.approx(float(slope), rel=1e-5)


def test_large_nodes_are_balls(monkeypatch):
    net = relu_net([6, 10, 8, 3], 0)
    graph = lc.trace(net, (6,))
    small = lc.Ellipsoid(graph)().dense().detach()
    monkeypatch.setattr(ellipsoid, "LARGEST", 9)
    larger = lc.Ellipsoid(graph)().dense().detach()
    product = lc.Product(graph, norm=lc.Exact())().dense().detach()
    off = ~torch.eye(3, dtype=torch.bool)
    assert (larger[0, off] > small[0, off]).all()
    assert (larger[0, off] <= product[0, off] * UP).all()


def test_zero_and_broken_weights():
    net = relu_net([3, 4, 4, 2], 0)
    graph = lc.trace(net, (3,))
    with torch.no_grad():
        net[2].weight.zero_()
        K = lc.Ellipsoid(graph)().dense()
        assert K.isfinite().all()
        assert K.max() < 1e-6
        net[2].weight[0, 0] = math.nan
        assert not (lc.Ellipsoid(graph)().row(torch.tensor([0]))[0, 1] < math.inf)


def test_it_certifies_and_meets_others():
    net = relu_net([4, 8, 8, 3], 0)
    graph = lc.trace(net, (4,))
    x = torch.randn(20, 4)
    best = lc.tightest(lc.LipLT(graph), lc.Ellipsoid(graph))
    certificate = lc.certify(net, x, bound=best)
    alone = lc.certify(net, x, bound=lc.Ellipsoid(graph))
    assert certificate.kind is lc.Kind.UPPER
    assert (certificate.radius >= alone.radius).all()


def test_strategies_that_do_not_fit_are_refused():
    graph = lc.trace(relu_net([3, 4, 2], 0), (3,))
    for norm in (lc.PowerIteration(1), lc.RowSum()):
        with pytest.raises(lc.LipcertError, match="true L2 norms"):
            lc.Ellipsoid(graph, norm=norm)


def test_multipliers_below_the_ellipsoid_are_raised():
    """Whatever chooses them: a bound may be loose then, but not wrong."""
    from lipcert.bounds.extent import Extent, through_slopes

    torch.manual_seed(0)
    a = torch.randn(5, 7)
    low, high, one = torch.zeros(5), torch.ones(5), torch.ones(())
    for gains in (torch.zeros(5), torch.full((5,), 1e-4), torch.tensor([1e3, 1e-6, 0, 1, 1])):
        for least in (low, low - 0.1):
            after = through_slopes(Extent(one, a.mT), least, high, None, lambda m, g=gains: g)
            p = after.scale**2 * after.matrix
            for _ in range(50):
                slopes = least + (high - least) * torch.rand(5).round()
                seen = slopes[:, None] * (a @ a.mT) * slopes
                assert torch.linalg.eigvalsh(p - seen)[0] >= -1e-9 * p.abs().max()


def test_dead_neurons_beside_others():
    """Slopes of 0 and 0 have neither a middle nor a range."""
    from lipcert.bounds.extent import Extent, balanced, through_slopes

    torch.manual_seed(0)
    a = torch.randn(3, 4)
    high = torch.tensor([1.0, 1.0, 0.0])
    after = through_slopes(Extent(torch.ones(()), a.mT), torch.zeros(3), high, None, balanced)
    alive = through_slopes(
        Extent(torch.ones(()), a[:2].mT), torch.zeros(2), high[:2], None, balanced
    )
    assert (after.matrix[2] == 0).all()
    torch.testing.assert_close(after.scale**2 * after.matrix[:2, :2], alive.scale**2 * alive.matrix)


def test_neurons_that_a_linear_network_would_not_read():
    """Their multipliers stay within reach: not above the product here, though it is deeper."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    weights = ([[2.0, 1], [1, 2]], [[1.0, 1], [1, -1]], [[1.0, 1], [-1, -1]])
    for layer, rows in zip(net[::2], weights, strict=True):
        layer.weight.data = torch.tensor(rows)
    graph = lc.trace(net, (2,))
    found, other = (b(graph)().dense().max() for b in (lc.Ellipsoid, lc.Product))
    assert found < other


def test_outputs_without_axes():
    """A network that gives one number a sample, with no axis for it."""

    class Gap(nn.Module):
        def forward(self, x):
            return x[:, 0] - torch.relu(x[:, 1])

    bound = lc.Ellipsoid(lc.trace(Gap(), (2,)))
    assert float(bound.lipschitz()) == pytest.approx(2**0.5, rel=1e-6)


def almost_equal_neurons(a, b, d, wide):
    """Two neurons of the same weights, of which only the difference is read."""
    layers = [nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)]
    net = nn.Sequential(*(layers if wide else [*layers[:2], nn.Linear(2, 2)]))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[a], [a * (1 + d)]]))
        net[0].bias.copy_(torch.tensor([1.0, -1.0]))
        row = torch.tensor([b, -b * (1 - d)])
        if wide:
            net[2].weight.copy_(row[None])
            net[4].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        else:
            net[2].weight.copy_(torch.stack([row, -row]))
        net[2].bias.zero_()
    return net


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("d", [0.0, 1e-14, 1e-11, 1e-8, 1e-4])
@pytest.mark.parametrize("make", [lc.Ellipsoid, lc.Eclipse, lambda g: lc.Multipliers(g, steps=5)])
def test_what_cancels_keeps_its_digits(make, d, wide, unchecked):
    """Multipliers near S blow up what the next map cancels; the pattern (1, 0) is the truth."""
    for a, b in ((2.6, 1.7), (1.0, 1.0), (0.3, 7.1)):
        net = almost_equal_neurons(a, b, d, wide)
        bound = make(lc.trace(net, (1,)))
        with torch.no_grad():
            found, whole = float(bound().dense()[0, 0, 1]), float(bound.lipschitz())
        assert found >= 2 * a * b * (1 - 1e-12)
        assert whole >= 2**0.5 * a * b * (1 - 1e-12)
