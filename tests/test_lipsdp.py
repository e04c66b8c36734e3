"""LipSDP by a solver: what its multipliers prove, beside what the search finds."""

import importlib.util

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.bounds import lipsdp
from oracles import differences, jacobians
from recursions import he_net, relu_net
from test_api import jaxtyping_off
from test_ellipsoid import over_all_patterns

UP = 1 + 1e-9


@pytest.fixture(autouse=True)
def unchecked():
    with jaxtyping_off(), torch.no_grad():
        yield


@pytest.fixture
def solver():
    pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")


def test_the_search_and_the_solver_agree(solver):
    net = he_net(8, 2)
    graph = lc.trace(net, (8,))
    one, other = lc.LipSDP(graph), lc.Multipliers(graph, steps=60, pairwise=True)
    found = one.lipschitz().value
    assert found < 0.92 * lc.Ellipsoid(graph).lipschitz().value
    torch.testing.assert_close(other.lipschitz().value, found, rtol=5e-3, atol=0)
    K, L = one().row(torch.tensor([2])), other().row(torch.tensor([2]))
    torch.testing.assert_close(L, K, rtol=5e-3, atol=0)
    assert one().kind is lc.Kind.UPPER


def test_each_logit_and_prefixes(solver):
    net = he_net(6, 2)
    graph = lc.trace(net, (6,))
    bound = lc.LipSDP(graph)
    each, closed = bound.per_output().value, lc.Ellipsoid(graph).per_output().value
    assert (each < closed).all()
    assert (each <= bound.lipschitz().value * (1 + 1e-6)).all()
    for n in graph.nodes[1:]:
        found, most = bound.prefix(n).value, lc.Ellipsoid(graph).prefix(n).value
        assert found <= most * UP
        assert found >= 0.5 * most
    torch.testing.assert_close(
        bound.prefix(graph.nodes[1]).value, torch.linalg.matrix_norm(net[0].weight, 2)
    )


def test_the_exact_maximum_over_all_patterns_is_never_above(solver):
    tightness = []
    for seed in range(5):
        net = relu_net([3, 3, 2 + seed % 2, 3], seed)
        if seed == 3:
            net[0].weight.mul_(1e20)
            net[4].weight.mul_(1e-10)
        exact = over_all_patterns(net)
        found = lc.LipSDP(lc.trace(net, (3,)))().dense()[0]
        off = ~torch.eye(3, dtype=torch.bool)
        assert (found >= exact / UP)[off].all()
        tightness.append(float((found / exact)[off].mean()))
    assert sum(tightness) / len(tightness) < 1.03


@pytest.mark.parametrize(
    "activation", [nn.Tanh, lambda: nn.LeakyReLU(-0.4), nn.GELU, lambda: nn.PReLU(6)]
)
def test_other_slopes(activation, solver):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 6), activation(), nn.Linear(6, 6), activation(), nn.Linear(6, 3)
    )
    if isinstance(net[1], nn.PReLU):
        net[1].weight.copy_(torch.tensor([1.0, 0.9, 0.0, -0.5, 2.0, 1.0]))  # two are linear
    graph = lc.trace(net, (5,))
    bound = lc.LipSDP(graph)
    with torch.enable_grad():
        J = jacobians(net, 2 * torch.randn(300, 5))
    found = bound.lipschitz().value
    assert torch.linalg.matrix_norm(J, 2).max() <= UP * found
    searched = lc.Multipliers(graph, steps=200).lipschitz().value
    torch.testing.assert_close(searched, found, rtol=5e-3, atol=0)
    K = bound().row(torch.tensor([0]))[0]
    assert (differences(J)[0, 1:] <= UP * K[1:]).all()


def test_the_solver_is_not_believed(solver, monkeypatch):
    """Multipliers that are wrong prove less; the closed form is then the better one."""
    net = he_net(6, 2)
    graph = lc.trace(net, (6,))
    solved = lipsdp._solved
    right = lc.LipSDP(graph).lipschitz().value
    for factor in (0.01, 0.9, 1.1, 100.0):
        wrong = lambda layers, rows, factor=factor: {  # noqa: E731
            n: g * factor for n, g in solved(layers, rows).items()
        }
        monkeypatch.setattr(lipsdp, "_solved", wrong)
        found = lc.LipSDP(graph).lipschitz().value
        assert found >= right / (1 + 1e-6)
        assert found <= lc.Ellipsoid(graph).lipschitz().value


def test_zero_and_broken_weights(solver):
    net = relu_net([3, 4, 4, 3])
    graph = lc.trace(net, (3,))
    net[2].weight.zero_()
    assert lc.LipSDP(graph).lipschitz().value < 1e-6
    net[2].weight[0, 0] = torch.nan
    assert not lc.LipSDP(graph).lipschitz().value < torch.inf


def test_pairs_are_solved_once_when_asked_for(solver, monkeypatch):
    asked, solved = [], lipsdp._solved
    monkeypatch.setattr(lipsdp, "_solved", lambda *args: asked.append(1) or solved(*args))
    constants = lc.LipSDP(lc.trace(relu_net([4, 5, 3]), (4,)))()
    assert not asked
    constants.row(torch.tensor([2, 2]))
    constants.row(torch.tensor([2]))
    assert len(asked) == 2


def test_networks_that_do_not_fit_are_refused(solver):
    joined = lc.trace(lc.models.mlp((6,), 3, widths=(6,), activation=lc.layers.MaxMin), (6,))
    with pytest.raises(lc.LipcertError, match=r"one after the other.*Multipliers"):
        lc.LipSDP(joined)
    with pytest.raises(lc.LipcertError, match=r"at most 500 neurons.*has 600"):
        lc.LipSDP(lc.trace(relu_net([4, 300, 300, 3]), (4,)))
    with pytest.raises(lc.LipcertError, match=r"2000 inputs.* and 2001"):
        lc.LipSDP(lc.trace(relu_net([2001, 3, 3]), (2001,)))


@pytest.mark.parametrize("package", ["cvxpy", "clarabel"])
def test_a_missing_solver_says_how_to_get_it(package, monkeypatch):
    if importlib.util.find_spec("cvxpy") is None:
        package = "cvxpy"
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(lc.LipcertError, match=r'pip install "lipcert\[sdp\]"'):
        lc.LipSDP(lc.trace(relu_net([3, 4, 3]), (3,)))
