"""The Eclipse bound: one number a node, from both ends of a chain."""

import itertools

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.bounds import eclipse
from lipcert.bounds.ellipsoid import Ellipsoid
from lipcert.layers import MaxMin
from nets import NETS
from oracles import differences, jacobians
from recursions import (
    eclipse_fast,
    he_net,
    least_eigenvalue,
    multipliers_and_bound,
    relu_net,
    weights,
)
from test_api import jaxtyping_off
from test_ellipsoid import over_all_patterns

UP = 1 + 1e-9
OFF = ~torch.eye(5, dtype=torch.bool)


@pytest.fixture(autouse=True)
def unchecked():
    with jaxtyping_off(), torch.no_grad():
        yield


def forwards(bound):
    """What the recursion from the input proves of the logits."""
    return Ellipsoid.prefix(bound, bound.graph.output).value


@pytest.mark.parametrize(("width", "depth"), [(5, 1), (12, 3), (20, 6)])
def test_it_is_the_published_recursion(width, depth):
    for seed in range(5):
        net = he_net(width, depth, seed)
        bound = lc.Eclipse(lc.trace(net, (width,)))
        torch.testing.assert_close(forwards(bound), eclipse_fast(weights(net)), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("width", "depth"), [(5, 1), (12, 3), (20, 6)])
def test_from_both_ends(width, depth):
    """Never above the published recursion of the network or of the transposed one, for any rows."""
    gains = []
    for seed in range(5):
        net = he_net(width, depth, seed)
        *before, last = weights(net)
        bound = lc.Eclipse(lc.trace(net, (width,)))
        K, each, whole = bound().dense()[0], bound.per_output().value, bound.lipschitz().value
        asked = [(whole, last), *((each[i], last[i : i + 1]) for i in range(5))]
        asked += [(K[i, j], last[i : i + 1] - last[j : j + 1]) for i, j in ((0, 1), (4, 2))]
        for found, rows in asked:
            one, other = (
                eclipse_fast([*before, rows]),
                eclipse_fast([w.mT for w in (rows, *before[::-1])]),
            )
            assert found <= UP * min(one, other)
            gains.append(float(found / one))
    assert sum(gains) / len(gains) < 0.99


def test_the_exact_maximum_over_all_patterns_is_never_above():
    generator = torch.Generator().manual_seed(0)
    for seed in range(30):
        layers = int(torch.randint(1, 4, (), generator=generator))
        widths = torch.randint(1, 4, (layers,), generator=generator).tolist()
        net = relu_net([3, *widths, 3], seed)
        if seed % 5 == 0:
            net[0].weight.mul_(10.0 ** (seed % 60 - 30))
        if seed % 7 == 0:
            net[-1].weight[0] = net[-1].weight[1]
        exact = over_all_patterns(net)
        found = lc.Eclipse(lc.trace(net, (3,)))().dense()[0]
        assert (found >= exact / UP).all()


@pytest.mark.parametrize("name", ["mlp", "conv", "own conv", "conv 1d", "pools", "resnet", "unet"])
def test_not_below_what_is_seen(name):
    net, shape = NETS[name].build(), NETS[name].shape
    bound = lc.Eclipse(lc.trace(net, shape))
    with torch.enable_grad():
        J = jacobians(net, torch.randn(200, *shape))
    assert bound().kind is lc.Kind.UPPER
    off = ~torch.eye(3, dtype=torch.bool)
    assert (differences(J)[off] <= UP * bound().dense()[0][off]).all()
    assert torch.linalg.matrix_norm(J, 2).max() <= UP * bound.lipschitz().value
    assert (J.norm(dim=2).amax(0) <= UP * bound.per_output().value).all()


@pytest.mark.parametrize("activation", [nn.Tanh, lambda: nn.LeakyReLU(-0.4), nn.PReLU, nn.GELU])
def test_other_slopes_on_a_chain(activation):
    torch.manual_seed(0)
    body = [nn.Linear(6, 8), activation(), activation(), nn.Linear(8, 8), activation()]
    first = activation()
    for net in (nn.Sequential(*body, nn.Linear(8, 5)), nn.Sequential(first, *body[:-1])):
        graph = lc.trace(net, (6,))
        bound = lc.Eclipse(graph)
        product = lc.Product(graph, norm=lc.Exact())
        with torch.enable_grad():
            J = jacobians(net, 2 * torch.randn(300, 6))
        K = bound().dense()[0]
        off = ~torch.eye(len(K), dtype=torch.bool)
        assert (differences(J)[off] <= UP * K[off]).all()
        assert (K[off] <= UP * product().dense()[0][off]).all()
        for n in graph.nodes[1:]:
            assert bound.prefix(n).value <= UP * product.prefix(n).value


def test_it_is_the_matrix_inequality():
    for seed, activation in itertools.product(range(3), (nn.ReLU, lambda: nn.LeakyReLU(0.2))):
        net = he_net(10, 3, seed)
        net = nn.Sequential(*(activation() if isinstance(m, nn.ReLU) else m for m in net))
        bound = lc.Eclipse(lc.trace(net, (10,)))
        facts, nodes, rows = bound._facts(), bound.graph.nodes[1:-1], net[-1].weight
        found, rho = multipliers_and_bound(facts, nodes, bound._gains, rows)
        torch.testing.assert_close(rho.sqrt(), forwards(bound))
        assert least_eigenvalue(facts, nodes, found, rows, rho * UP) >= -1e-9
        assert least_eigenvalue(facts, nodes, found, rows, rho * (1 - 1e-3)) < 0


def test_orthogonal_layers_are_where_it_is_better():
    net = relu_net([12, *[30] * 4, 5])
    for layer in net[::2]:
        nn.init.orthogonal_(layer.weight)
    graph = lc.trace(net, (12,))
    found = [float(b(graph).lipschitz()) for b in (lc.Eclipse, lc.Ellipsoid, lc.Product)]
    assert found[0] < found[1]
    assert found[0] < found[2]


def test_what_passes_beside_is_kept():
    """Sorted pairs, and skips: numbers just above S would blow up what is beside."""
    torch.manual_seed(0)
    net = lc.models.mlp((10,), 3, widths=(16, 16, 16), activation=MaxMin)
    graph = lc.trace(net, (10,))
    assert lc.Eclipse(graph).lipschitz().value < 0.95 * lc.Product(graph).lipschitz().value


@pytest.mark.parametrize("power", [-60, 60])
def test_scales_pass_through(power):
    net = relu_net([4, 6, 6, 5])
    graph = lc.trace(net, (4,))
    before = lc.Eclipse(graph)().dense()
    net[2].weight.mul_(2.0**power)
    after = lc.Eclipse(graph)().dense()
    torch.testing.assert_close(after, before * 2.0**power, rtol=1e-9, atol=0)


def test_large_nodes_are_followed_from_the_input_only(monkeypatch):
    net = he_net(12, 3)
    bound = lc.Eclipse(lc.trace(net, (12,)))
    assert bound.lipschitz().value < 0.999 * forwards(bound)
    monkeypatch.setattr(eclipse, "LARGEST_BACKWARDS", 11)
    assert bound.lipschitz().value == forwards(bound)


def test_gradients_and_training():
    net = he_net(8, 2)
    graph = lc.trace(net, (8,))

    def value():
        return lc.Eclipse(graph)().row(torch.tensor([1]))[0, 2]

    with torch.enable_grad():
        value().backward()
    weight, step = net[2].weight, 1e-6
    direction, slope = torch.randn_like(weight), weight.grad
    weight.add_(step * direction)
    above = value()
    weight.sub_(2 * step * direction)
    assert float((above - value()) / (2 * step)) == pytest.approx(
        float((slope * direction).sum()), rel=1e-4
    )
    bound = lc.Eclipse(graph, every=1)
    with torch.enable_grad():
        bound().row(torch.tensor([0])).sum().backward()
    assert bound().kind is lc.Kind.ESTIMATE


def test_zero_and_broken_weights():
    net = relu_net([3, 4, 4, 5])
    graph = lc.trace(net, (3,))
    net[2].weight.zero_()
    K = lc.Eclipse(graph)().dense()
    assert K.isfinite().all()
    assert K.max() < 1e-6
    net[2].weight[0, 0] = torch.nan
    assert not (lc.Eclipse(graph)().row(torch.tensor([0]))[0, 1] < torch.inf)


def test_pairs_are_computed_once_when_asked_for(monkeypatch):
    bound = lc.Eclipse(lc.trace(relu_net([4, 6, 6, 5]), (4,)))
    asked = []
    whole = eclipse.Backwards.rows
    monkeypatch.setattr(
        eclipse.Backwards, "rows", lambda self, rows: asked.append(1) or whole(self, rows)
    )
    constants = bound()
    assert not asked
    constants.row(torch.tensor([2, 2]))
    assert len(asked) == 4
    K = constants.dense()[0]
    assert len(asked) == 10
    torch.testing.assert_close(K, K.mT)


def test_strategies_that_do_not_fit_are_refused():
    graph = lc.trace(relu_net([3, 4, 5]), (3,))
    with pytest.raises(lc.LipcertError, match=r"Eclipse.* true L2 norms"):
        lc.Eclipse(graph, norm=lc.PowerIteration(1))
