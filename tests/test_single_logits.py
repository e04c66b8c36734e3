"""The hinge by hand, and what losses of single logits get: MarginConstants.within(None, eps)."""

import math

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.bounds import MarginConstants
from lipcert.kinds import Kind
from lipcert.losses import hinge
from oracles import jacobians


def by_hand(logits, labels, margin):
    total = 0.0
    n, classes = len(logits), len(logits[0])
    for scores, label in zip(logits, labels, strict=True):
        for j, score in enumerate(scores):
            if j != label:
                total += max(0.0, margin - (scores[label] - score)) / classes
    return total / n


@pytest.mark.parametrize("margin", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_hinge(margin, classes):
    logits, labels = torch.randn(20, classes), torch.arange(20) % classes
    found = hinge(logits, labels, torch.ones(20, classes), 0.1, margin=margin)
    assert found.item() == pytest.approx(by_hand(logits.tolist(), labels.tolist(), margin))
    assert found > 0


def test_the_margin_of_the_hinge_is_that_of_the_authors_if_none_is_given():
    logits, labels = torch.randn(20, 4), torch.arange(20) % 4
    K = torch.ones(20, 4)
    assert torch.equal(hinge(logits, labels, K, 0.1), hinge(logits, labels, K, 0.1, margin=0.7))


def test_the_hinge_looks_at_neither_constants_nor_radius():
    logits, labels = torch.randn(6, 3), torch.arange(6) % 3
    found = hinge(logits, labels, torch.ones(6, 3), 0.1)
    assert torch.equal(hinge(logits, labels, torch.full((6, 3), math.inf), 0.0), found)
    assert torch.equal(hinge.protects(logits, labels), labels)


def test_margins_that_are_large_enough_cost_nothing():
    logits = torch.tensor([[1.0, 0.3, -5.0]], requires_grad=True)
    hinge(logits, torch.tensor([0]), torch.ones(1, 3), 0.1, margin=0.69).backward()
    assert not logits.grad.any()
    logits.grad = None
    hinge(logits, torch.tensor([0]), torch.ones(1, 3), 0.1, margin=0.71).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0, 0.0]]) / 3)


def test_half_precision_is_widened():
    logits = torch.randn(6, 3)
    found = hinge(logits.bfloat16(), torch.arange(6) % 3, torch.ones(6, 3), 0.1)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(
        by_hand(logits.bfloat16().tolist(), (torch.arange(6) % 3).tolist(), 0.7), rel=1e-5
    )


@pytest.mark.parametrize("margin", [0.0, -0.7, math.nan])
def test_a_hinge_without_margin_is_refused(margin):
    with pytest.raises(lc.LipcertError, match="margin"):
        hinge(torch.zeros(1, 2), torch.tensor([0]), torch.ones(1, 2), 0.1, margin=margin)


# ---------------------------------------------------------------- constants of single logits


@pytest.fixture
def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)
EPS = 0.2


def bounds(net):
    graph = lc.trace(net, (4,))
    everywhere = lc.Product(graph)
    around = lc.Product(graph, region=lc.L2Ball(EPS))
    return everywhere, around, lc.tightest(everywhere, around)


def test_single_logits_everywhere(net):
    everywhere, _, _ = bounds(net)
    first = torch.linalg.matrix_norm(net[0].weight, 2)
    expected = first * net[2].weight.norm(dim=1)
    for eps in (0.0, EPS, 100.0):
        found = everywhere().within(None, eps)
        assert found.shape == (1, 3)
        torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[0], everywhere.per_output().value)


def test_single_logits_around_samples(net):
    everywhere, around, _ = bounds(net)
    found = around(X).within(None, EPS)
    assert found.shape == (5, 3)
    torch.testing.assert_close(found, around.per_output(X).value)
    assert (found <= everywhere().within(None, EPS) * (1 + 1e-9)).all()
    assert (found < 0.999 * everywhere().within(None, EPS)).any()
    near = X[:, None] + EPS * nn.functional.normalize(torch.randn(5, 200, 4), dim=2)
    change = (net(near) - net(X)[:, None]).abs().amax(1) / EPS
    assert (change <= found * (1 + 1e-9)).all()
    assert (change > 0).all()


def test_single_logits_outside_the_ball_are_not_known(net):
    _, around, _ = bounds(net)
    constants = around(X, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
    found = constants.within(None, 0.3)
    assert found[:2].isinf().all()
    assert found[2:].isfinite().all()
    assert constants.within(None, 0.1).isfinite().all()


@pytest.mark.parametrize("swapped", [False, True])
def test_single_logits_of_the_tightest(net, swapped):
    everywhere, around, best = bounds(net)
    if swapped:
        best = lc.tightest(around, everywhere)
    inside = best(X).within(None, EPS)
    both = torch.minimum(around(X).within(None, EPS), everywhere().within(None, EPS))
    torch.testing.assert_close(inside, both)
    outside = best(X).within(None, 2 * EPS)  # the global constants alone speak
    torch.testing.assert_close(outside, everywhere().within(None, EPS).expand(5, 3))


def test_single_logits_of_two_global_bounds(net):
    graph = lc.trace(net, (4,))
    one, two = lc.Product(graph, norm=lc.Exact()), lc.LipLT(graph)
    found = lc.tightest(one, two)().within(None, EPS)
    torch.testing.assert_close(
        found, torch.minimum(one().within(None, EPS), two().within(None, EPS))
    )


@pytest.mark.parametrize("which", [0, 1, 2])
def test_single_logits_have_no_smaller_a_constant_than_their_slope(net, which):
    bound = bounds(net)[which]
    found = bound(X).within(None, 1e-3)
    assert (jacobians(net, X).norm(dim=2) <= found * (1 + 1e-9)).all()


def known(alone, **more):
    row = torch.ones(1, 3)
    return MarginConstants(lambda c: row.expand(len(c), 3), 3, Kind.UPPER, alone=alone, **more)


def test_drops_of_margins_are_none_of_single_logits():
    """A drop speaks of differences; at one logit nothing of it is used."""
    constants = known(
        lambda: torch.full((2, 3), 5.0),
        batch=2,
        valid_radius=torch.ones(2),
        drop=lambda c: torch.full((len(c), 3), 1e-3),
    )
    assert (constants.within(None, 0.5) == 5).all()
    assert (constants.within(torch.tensor([0, 1]), 0.5) == 2e-3).all()


def test_the_least_of_all_members():
    other = known(
        lambda: torch.tensor([[9.0, 1.0, 2.0]]), batch=1, valid_radius=torch.tensor([0.3])
    )
    constants = known(lambda: torch.tensor([3.0, 4.0, 5.0]), others=(other,))
    assert constants.within(None, 0.3).tolist() == [[3, 1, 2]]
    assert constants.within(None, 0.31).tolist() == [[3, 4, 5]]


def test_a_bound_that_knows_differences_only_says_so():
    for constants in (known(None), known(lambda: torch.ones(3), others=(known(None),))):
        with pytest.raises(lc.LipcertError, match=r"single logits.*cll"):
            constants.within(None, 0.1)
        assert constants.within(torch.tensor([0]), 0.1).shape == (1, 3)
