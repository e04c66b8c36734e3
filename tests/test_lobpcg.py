"""LOBPCG: from below, rising from call to call, and far faster than power iteration."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.errors import LipcertError
from lipcert.kinds import Kind
from lipcert.spectral import LOBPCG, PowerIteration
from maps import HARD, MAPS, cases, close, conv, dense_of, svd

ALL = MAPS | HARD


def calls(norm, a, count, state=None):
    """The values of many calls, each going on where the one before stopped, and the last state."""
    state = norm.start(a.in_shape, a.like) if state is None else state
    values = []
    with torch.no_grad():
        for _ in range(count):
            constant, state = norm.refine(a, state)
            values.append(float(constant))
    return values, state


@pytest.fixture(scope="module")
def gaussian():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 400, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- convergence


@cases(ALL)
def test_never_above_the_truth_and_close_to_it(build):
    a = build()
    truth = svd(a)
    few, many = LOBPCG(1)(a), LOBPCG(40)(a)
    assert few.kind == Kind.ESTIMATE
    for constant in (few, many):
        assert constant.value <= truth * (1 + 1e-12)
    close(many.value, truth, 1e-6)


@cases(ALL)
def test_values_never_fall_from_call_to_call(build):
    a = build()
    values, state = calls(LOBPCG(1), a, 25)
    # At the singular vector, residual and direction are rounding of relative size 1e-5.
    assert all(b >= a * (1 - 1e-9) for a, b in pairwise(values))
    close(torch.tensor(values[-1]), svd(a), 1e-4)
    assert state.shape == (2, *a.in_shape)
    close(torch.linalg.vector_norm(state[0]), torch.ones(()))


def test_one_call_and_many_reach_the_norm(gaussian):
    a = dense_of(gaussian)
    truth = float(svd(a).detach())
    assert calls(LOBPCG(60), a, 1)[0][0] == pytest.approx(truth, rel=1e-8)
    values = calls(LOBPCG(1), a, 60)[0]
    assert values[-1] == pytest.approx(truth, rel=1e-8)
    assert values[0] < 0.9 * truth
    assert values[-1] <= truth * (1 + 1e-12)


def test_calls_go_on_where_the_last_one_stopped(gaussian):
    """The direction is kept: without it, calls of one step are steepest ascent, which is slower."""
    a = dense_of(gaussian)
    start = LOBPCG(1).start(a.in_shape, a.like)
    start[1] = 0
    whole = calls(LOBPCG(12), a, 1, start)[0][0]
    kept = calls(LOBPCG(1), a, 12, start)[0][-1]
    assert kept == pytest.approx(whole, rel=1e-6)
    state = start
    for _ in range(12):
        constant, state = LOBPCG(1).refine(a, state)
        state = torch.stack([state[0], torch.zeros_like(state[0])])
    assert svd(a) - constant.value > 2 * (svd(a) - kept)


def test_far_faster_than_power_iteration(gaussian):
    a = dense_of(gaussian)
    truth = float(svd(a).detach())
    errors = {}
    for norm in (LOBPCG(1), PowerIteration(1)):
        torch.manual_seed(0)
        errors[norm] = [1 - value / truth for value in calls(norm, a, 50)[0]]
    assert errors[LOBPCG(1)][29] < 0.05 * errors[PowerIteration(1)][49]


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-3])
def test_close_singular_values(gap):
    torch.manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, n))[0] for n in (30, 40))
    values = torch.cat([torch.tensor([1.0, 1 - gap]), torch.linspace(0.9, 0.1, 28)])
    a = dense_of(left @ torch.diag(values) @ right[:30])
    for norm, count in ((LOBPCG(60), 1), (LOBPCG(1), 60)):
        found = calls(norm, a, count)[0][-1]
        assert 1 - max(gap, 1e-8) - 1e-12 <= found <= 1 + 1e-12


def test_it_follows_weights_that_move():
    """As in training: with one step a call it stays at the norm of weights that drift."""
    torch.manual_seed(0)
    weight, step = torch.randn(30, 20), torch.randn(30, 20)
    state = calls(LOBPCG(1), dense_of(weight), 30)[1]
    for t in range(50):
        a = dense_of(weight + 0.002 * t * step)
        constant, state = LOBPCG(1).refine(a, state)
        assert svd(a) * (1 - 1e-3) <= constant.value <= svd(a) * (1 + 1e-12)


# ---------------------------------------------------------------- hard states


def test_a_map_that_turns_zero_keeps_its_state():
    a, norm = dense_of(torch.randn(4, 3)), LOBPCG(20)
    state = calls(norm, a, 1)[1]
    nothing, kept = norm.refine(dense_of(torch.zeros(4, 3)), state)
    assert float(nothing) == 0
    close(kept[0], state[0])
    assert kept.isfinite().all()
    constant, kept = norm.refine(a, kept)
    close(constant.value, svd(a), 1e-10)


def test_weights_that_are_no_numbers_leave_no_trace():
    a, norm = dense_of(torch.randn(4, 3)), LOBPCG(5)
    state = calls(norm, a, 4)[1]
    for poison in (torch.nan, torch.inf):
        bad = a.weight.detach().clone()
        bad[0, 0] = poison
        constant, kept = norm.refine(dense_of(bad), state)
        assert not constant.value.isfinite()
        assert kept.isfinite().all()
        close(norm.refine(a, kept)[0].value, svd(a), 1e-10)


@pytest.mark.parametrize("start", ["singular vector", "no direction", "direction is the vector"])
def test_degenerate_states(start):
    a = dense_of(torch.randn(6, 5))
    v = torch.linalg.svd(a.dense())[2][0].detach()
    w = torch.nn.functional.normalize(torch.randn(5), dim=0)
    states = {
        "singular vector": torch.stack([v, torch.zeros(5)]),
        "no direction": torch.stack([w, torch.zeros(5)]),
        "direction is the vector": torch.stack([w, w]),
    }
    values, state = calls(LOBPCG(10), a, 3, states[start])
    close(torch.tensor(values[-1]), svd(a), 1e-10)
    assert state.isfinite().all()


def test_it_stays_at_the_norm_for_a_thousand_steps():
    """At the singular vector residual and direction are rounding: they must not grow."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        a = dense_of(torch.randn(12, 9)).to(dtype)
        values, state = calls(LOBPCG(10), a, 100)
        truth = float(svd(a).detach())
        assert all(abs(v - truth) <= tolerance * truth for v in values[20:])
        assert state.dtype == dtype
        close(torch.linalg.vector_norm(state[0]).double(), torch.ones(()), 1e-5)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_single_precision(size, gaussian):
    a = dense_of((gaussian[:60, :50] * size).float()).to(torch.float32)
    truth = float(svd(a).detach())
    value = calls(LOBPCG(40), a, 1)[0][0]
    assert value == pytest.approx(truth, rel=1e-5)
    assert value <= truth * (1 + 1e-6)


# ---------------------------------------------------------------- many maps


def test_many_maps_in_another_order_equal_one_by_one():
    """The images come in another order than the vectors, under other keys, as in a sweep."""
    torch.manual_seed(0)
    narrow = [dense_of(torch.randn(5, 4) * s) for s in (1.0, 30.0, 0.01)]
    wide = [dense_of(torch.randn(m, 7)) for m in (5, 3)]
    maps = {"narrow": narrow, "wide": wide}
    # images: "a" = narrow 2, wide 0, narrow 0 (5 outputs each); "b" = wide 1; "c" = narrow 1.
    homes = [("narrow", 2), ("wide", 0), ("narrow", 0)], [("wide", 1)], [("narrow", 1)]
    images = dict(zip("abc", homes, strict=True))
    flat = [place for places in homes for place in places]
    inputs = [(key, i) for key in maps for i in range(len(maps[key]))]
    order = torch.tensor([flat.index(place) for place in inputs])
    assert not order.equal(order.argsort())

    def apply(rows):
        return {
            key: torch.cat([maps[k][i].apply(rows[k][i : i + 1]) for k, i in places])
            for key, places in images.items()
        }

    def adjoint(rows):
        found = {}
        for key, places in images.items():
            for row, (k, i) in zip(rows[key], places, strict=True):
                found[k, i] = maps[k][i].adjoint(row[None])
        return {
            k: torch.cat([found[k, i] for i in range(len(maps[k]))]) for k in ("wide", "narrow")
        }

    norm = LOBPCG(3)
    state = {k: torch.stack([norm.start(a.in_shape, a.like) for a in maps[k]]) for k in maps}
    for _ in range(4):
        expected = {
            (k, i): norm.refine(maps[k][i], state[k][i]) for k in maps for i in range(len(maps[k]))
        }
        norms, state = norm.refine_many(apply, adjoint, state, order)
        for key, places in images.items():
            for value, place in zip(norms[key], places, strict=True):
                close(value, expected[place][0].value, 1e-9)
        for k in maps:
            for i, rows in enumerate(state[k]):
                close(rows[0], expected[k, i][1][0], 1e-6)
    for key, places in images.items():
        for value, (k, i) in zip(norms[key], places, strict=True):
            close(value, svd(maps[k][i]), 1e-4)


# ---------------------------------------------------------------- gradients and settings


@pytest.mark.parametrize(
    "build", [lambda: dense_of(torch.randn(6, 5)), lambda: conv((2, 5, 5), 3, 3, 2, 1)]
)
def test_the_gradient_is_that_of_the_norm(build):
    a = build()
    (found,) = torch.autograd.grad(LOBPCG(60)(a).value, a.weight)
    (expected,) = torch.autograd.grad(svd(a), a.weight)
    close(found, expected, 1e-6)


def test_only_the_last_application_is_differentiated():
    """u^T dA v at whatever v was found, also far from the singular vector."""
    a = dense_of(torch.randn(6, 5))
    constant, state = LOBPCG(1).refine(a, LOBPCG(1).start(a.in_shape, a.like))
    assert not state.requires_grad
    v = state[0]
    u = (a.weight @ v).detach()
    (found,) = torch.autograd.grad(constant.value, a.weight)
    close(found, torch.outer(u / u.norm(), v))
    assert constant.value < 0.999 * svd(a)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps):
    with pytest.raises(LipcertError, match="at least one step"):
        LOBPCG(steps)


def test_the_product_bound_trains_with_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    bound = lc.Product(lc.trace(net, (6,)), LOBPCG(1))
    exact = lc.Product(bound.graph)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    before = float(exact.lipschitz())
    for _ in range(40):
        loss = bound().dense()[0].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(exact.lipschitz()) < 0.7 * before
    with torch.no_grad():
        for _ in range(30):
            value = float(bound.lipschitz())
    assert value == pytest.approx(float(exact.lipschitz()), rel=1e-3)
    assert value <= float(exact.lipschitz()) * (1 + 1e-12)
    assert bound().kind == Kind.ESTIMATE
    state = bound.state_dict()
    assert state
    assert all(rows.shape[0] == LOBPCG.kept for rows in state.values())


def test_weights_scaled_give_scaled_norms():
    a = dense_of(torch.randn(8, 6))
    start = LOBPCG(3).start(a.in_shape, a.like)
    value = LOBPCG(3).refine(a, start)[0].value
    for factor in (1e-50, 1e-8, 1e8, 1e50):
        scaled = replace(a, weight=a.weight * factor)
        close(LOBPCG(3).refine(scaled, start)[0].value / factor, value, 1e-9)
