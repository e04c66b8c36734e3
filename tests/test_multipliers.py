"""Searched multipliers: sound whatever the search does, never above where it starts, tight."""

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.bounds import multipliers
from lipcert.bounds.ellipsoid import Ellipsoid
from nets import NETS
from oracles import differences, jacobians
from recursions import he_net, least_eigenvalue, multipliers_and_bound, relu_net
from test_api import jaxtyping_off
from test_ellipsoid import over_all_patterns

UP = 1 + 1e-9


@pytest.fixture(autouse=True)
def unchecked():
    with jaxtyping_off():
        yield


def off(classes):
    return ~torch.eye(classes, dtype=torch.bool)


def whole(bound):
    """The search for the logit vector, without the closed form beside it."""
    end = bound.graph.output
    with torch.no_grad():
        return bound._searched([end], lambda sweep: sweep.of(end).radius().value)


def test_the_exact_maximum_over_all_patterns_is_never_above():
    """Whatever steps are taken: also wild ones."""
    generator = torch.Generator().manual_seed(0)
    tightness = []
    for seed in range(8):
        layers = int(torch.randint(1, 4, (), generator=generator))
        widths = torch.randint(1, 4, (layers,), generator=generator).tolist()
        net = relu_net([3, *widths, 3], seed)
        with torch.no_grad():
            if seed % 5 == 0:
                net[0].weight.mul_(10.0 ** (20 - seed * 4))
            if seed % 4 == 0:
                net[-1].weight[0] = net[-1].weight[1]
            exact = over_all_patterns(net)
        graph = lc.trace(net, (3,))
        for rate in (0.1, 10.0):
            found = lc.Multipliers(graph, steps=4, rate=rate)().dense()[0]
            assert (found >= exact / UP).all()
        found = lc.Multipliers(graph, steps=20, pairwise=True)().row(torch.tensor([2]))[0, :2]
        assert (found >= exact[2, :2] / UP).all()
        tightness.append(float((found / exact[2, :2]).mean()))
    assert sum(tightness) / len(tightness) < 1.03


@pytest.mark.parametrize(
    "name", ["mlp", "conv", "conv 1d", "pools", "resnet", "maxmin by hand", "branches"]
)
def test_between_what_is_seen_and_the_closed_form(name):
    net, shape = NETS[name].build(), NETS[name].shape
    graph = lc.trace(net, shape)
    bound, closed = lc.Multipliers(graph, steps=10), lc.Ellipsoid(graph)
    J = jacobians(net, torch.randn(200, *shape))
    with torch.no_grad():
        K, most = bound().dense()[0], closed().dense()[0]
        each, logits = bound.per_output().value, closed.per_output().value
        length, longest = bound.lipschitz().value, closed.lipschitz().value
    assert bound().kind is lc.Kind.UPPER
    assert (differences(J)[off(3)] <= UP * K[off(3)]).all()
    assert torch.linalg.matrix_norm(J, 2).max() <= UP * length
    assert (J.norm(dim=2).amax(0) <= UP * each).all()
    assert (most * UP >= K).all()
    assert (each <= logits * UP).all()
    assert length <= longest * UP
    gain = float((K / most)[off(3)].mean() + length / longest)
    # Of functions of which only the constant is known there is nothing to be moved.
    assert gain < (2.001 if name == "conv 1d" else 1.97)


def test_it_is_the_matrix_inequality_and_nearly_its_least():
    for activation in (nn.ReLU, lambda: nn.LeakyReLU(0.3)):
        net = he_net(10, 3)
        net = nn.Sequential(*(activation() if isinstance(m, nn.ReLU) else m for m in net))
        bound = lc.Multipliers(lc.trace(net, (10,)), steps=100)
        sweep = whole(bound)
        nodes, rows = bound.graph.nodes[1:-1], net[-1].weight.detach()
        with torch.no_grad():
            found, rho = multipliers_and_bound(sweep.facts, nodes, sweep.facts.gains, rows)
            assert least_eigenvalue(sweep.facts, nodes, found, rows, rho * UP) >= -1e-9
            assert least_eigenvalue(sweep.facts, nodes, found, rows, rho * (1 - 1e-3)) < 0
        assert float(rho.sqrt()) == pytest.approx(float(bound.lipschitz()))
        # At the optimum no step along a multiplier helps.
        for k, gains in enumerate(found):
            for factor in (0.98, 1.02):
                others = [g * factor if i == k else g for i, g in enumerate(found)]
                moved = iter(others)
                assert proved(sweep.facts, nodes, moved, rows) >= 0.9995 * rho.sqrt()
            assert (gains > 0).all()


def proved(facts, nodes, gains, rows):
    """What given multipliers prove of some rows."""
    from lipcert.bounds.extent import Extent, through_map, through_slopes
    from lipcert.graph import Affine

    at = Extent(facts.one)
    with torch.no_grad():
        for n in nodes:
            if isinstance(n.op, Affine):
                at = through_map(at, facts.maps[n])
            else:
                own = next(gains) / at.scale**2
                at = through_slopes(at, *facts.slopes[n], None, lambda _, own=own: own)
        return at.scale * torch.linalg.eigvalsh(rows @ at.matrix @ rows.mT)[-1].sqrt()


def test_a_search_starts_from_the_closed_form():
    for name in ("mlp", "conv", "resnet"):
        graph = lc.trace(NETS[name].build(), NETS[name].shape)
        found = whole(lc.Multipliers(graph, steps=1, rate=1e-14)).of(graph.output).radius()
        with torch.no_grad():
            closed = lc.Ellipsoid(graph).lipschitz().value
        torch.testing.assert_close(found.value, closed, rtol=1e-9, atol=0)


def test_the_best_of_a_wild_search_is_kept():
    graph = lc.trace(he_net(8, 3), (8,))
    found = whole(lc.Multipliers(graph, steps=4, rate=30.0)).of(graph.output).radius()
    assert found.value <= lc.Ellipsoid(graph).lipschitz().value * UP


def test_one_number_a_node_is_between():
    graph = lc.trace(he_net(16, 4), (16,))
    with torch.no_grad():
        layer = whole(lc.Multipliers(graph, per_neuron=False)).of(graph.output).radius().value
        neuron = lc.Multipliers(graph).lipschitz().value
        start = Ellipsoid.prefix(lc.Eclipse(graph), graph.output).value
        closed = lc.Ellipsoid(graph).lipschitz().value
    assert neuron < 0.98 * layer
    assert neuron < 0.8 * closed  # its numbers moved together would end at 0.96
    assert layer < 0.98 * start


def test_pair_by_pair_is_tighter_and_asked_for(monkeypatch):
    graph = lc.trace(he_net(10, 3), (10,))
    one = lc.Multipliers(graph, steps=60)().dense()[0]
    searches = []
    whole_search = lc.Multipliers._searched
    monkeypatch.setattr(
        lc.Multipliers,
        "_searched",
        lambda self, *args: searches.append(1) or whole_search(self, *args),
    )
    constants = lc.Multipliers(graph, steps=60, pairwise=True)()
    assert not searches
    row = constants.row(torch.tensor([3, 3]))
    assert len(searches) == 4
    other = torch.arange(5) != 3
    assert (row[0, other] <= one[3, other] * (1 + 1e-4)).all()
    assert (row[0, other] / one[3, other]).mean() < 0.95


def test_each_is_searched_for_once_while_weights_are_held(monkeypatch):
    graph = lc.trace(relu_net([4, 5, 3]), (4,))
    bound = lc.Multipliers(graph, steps=3)
    searches = []
    descend = lc.Multipliers._descend
    monkeypatch.setattr(
        lc.Multipliers, "_descend", lambda self, *args: searches.append(1) or descend(self, *args)
    )
    with bound.held():
        for _ in range(2):
            bound()
            bound.per_output()
            bound.lipschitz()
    assert len(searches) == 3
    bound()
    assert len(searches) == 4


def test_results_have_no_gradients_and_weights_none_either():
    net = relu_net([4, 5, 3])
    bound = lc.Multipliers(lc.trace(net, (4,)), steps=3)
    K = bound().dense()
    assert not K.requires_grad
    assert not bound.lipschitz().value.requires_grad
    assert not bound.per_output().value.requires_grad
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("power", [-60, 60])
def test_scales_pass_through(power):
    net = relu_net([4, 6, 6, 3])
    graph = lc.trace(net, (4,))
    before = lc.Multipliers(graph, steps=20)().dense()
    with torch.no_grad():
        net[2].weight.mul_(2.0**power)
    after = lc.Multipliers(graph, steps=20)().dense()
    torch.testing.assert_close(after, before * 2.0**power, rtol=1e-6, atol=0)


def test_zero_and_broken_weights():
    net = relu_net([3, 4, 4, 3])
    graph = lc.trace(net, (3,))
    with torch.no_grad():
        net[2].weight.zero_()
        for pairwise in (False, True):
            K = lc.Multipliers(graph, steps=3, pairwise=pairwise)().dense()
            assert K.isfinite().all()
            assert K.max() < 1e-6
        net[2].weight[0, 0] = torch.nan
    assert not (lc.Multipliers(graph, steps=3)().row(torch.tensor([0]))[0, 1] < torch.inf)
    assert not lc.Multipliers(graph, steps=3).lipschitz().value < torch.inf


def test_it_certifies():
    net = relu_net([4, 8, 8, 3])
    graph = lc.trace(net, (4,))
    x = torch.randn(20, 4)
    certificate = lc.certify(net, x, bound=lc.Multipliers(graph, steps=30))
    closed = lc.certify(net, x, bound=lc.Ellipsoid(graph))
    assert certificate.kind is lc.Kind.UPPER
    assert (certificate.radius >= closed.radius).all()
    assert (certificate.radius > 1.02 * closed.radius).any()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1.5}, {"rate": 0}, {"rate": -1.0}])
def test_bad_arguments_are_refused(wrong):
    graph = lc.trace(relu_net([3, 4, 3]), (3,))
    with pytest.raises(lc.LipcertError, match="at least one step and a positive rate"):
        lc.Multipliers(graph, **wrong)
    assert "steps=7" in repr(multipliers.Multipliers(graph, steps=7))
