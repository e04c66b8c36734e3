"""What layers know of their norm: chains of them, and which number a bound takes."""

import math

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.bounds.affine_norm import affine_norm, expected_norm
from lipcert.fuse import fuse
from lipcert.graph import Affine, Input, KnownNorm, Node
from lipcert.kinds import Constant, Kind
from lipcert.layers import BatchCentering, FitChannels, Normalize, SOCConv2d
from lipcert.linear_kinds import Dense, identity
from lipcert.linear_map import Generic
from lipcert.spectral import Strategy
from oracles import jacobians


def known(value, kind=Kind.UPPER, failure=0.0, about=1.0):
    return KnownNorm(lambda: Constant(torch.tensor(value), kind, failure), lambda: about)


def chain(*knowns, n=3):
    """The one affine node that affine maps of these norms fuse to."""
    x = Node(Input(), (), (n,))
    for number, norm in enumerate(knowns):
        x = Node(Affine(lambda: identity((n,)), known=norm), (x,), (n,), str(number))
    (fused,) = (n for n in (fuse(x),) if isinstance(n.inputs[0].op, Input))
    return fused.op


def affine(net, shape):
    (found,) = (n.op for n in lc.trace(net.eval(), shape) if isinstance(n.op, Affine))
    return found


class Told(Strategy):
    """A strategy that says a given number and remembers whether it was asked."""

    def __init__(self, value, kind=Kind.UPPER, p=2.0):
        self.value, self.kind, self.p, self.asked = value, kind, p, 0

    def __call__(self, map):
        self.asked += 1
        return Constant(torch.tensor(self.value), self.kind)


# ---------------------------------------------------------------- chains


def test_a_chain_knows_the_product():
    norm = chain(known(2.0, about=3.0), known(0.25, about=0.5), known(6.0, about=7.0)).known
    assert norm.proved().value.item() == 3.0
    assert norm.about() == 10.5
    assert norm.proved().kind is Kind.UPPER
    assert norm.proved().failure == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_part_that_knows_nothing_is_enough(place):
    norms = [known(2.0), known(3.0), known(4.0)]
    norms[place] = None
    assert chain(*norms).known is None


def test_a_chain_claims_as_little_as_its_weakest_part():
    one = known(2.0, Kind.PROBABILISTIC, 0.1)
    two = known(2.0, Kind.PROBABILISTIC, 0.2)
    found = chain(known(1.0), one, two).known.proved()
    assert (found.kind, found.value.item()) == (Kind.PROBABILISTIC, 4.0)
    assert found.failure == pytest.approx(0.3)
    many = chain(*[known(1.0, Kind.PROBABILISTIC, 0.4)] * 3).known.proved()
    assert many.failure == 1.0
    assert chain(one, known(1.0, Kind.ESTIMATE)).known.proved().kind is Kind.ESTIMATE


def test_a_normalisation_and_a_skew_convolution():
    net = nn.Sequential(Normalize((0.5, 0.4), (0.5, 0.25)), SOCConv2d(2, 4))
    op = affine(net, (2, 4, 4))
    found = op.known.proved()
    assert found.kind is Kind.UPPER
    assert found.value.item() == pytest.approx(4 * net[1].constant().value.item(), rel=1e-12)
    assert op.known.about() == 4
    # Live: what is known follows the weights.
    net[0].std.mul_(2)
    assert op.known.proved().value.item() == pytest.approx(2, rel=1e-6)
    assert op.known.about() == 2
    slopes = jacobians(net, torch.rand(1, 2, 4, 4))
    assert torch.linalg.matrix_norm(slopes, 2) <= op.known.proved().value


def test_a_convolution_behind_a_normalisation_is_not_known():
    net = nn.Sequential(Normalize((0.5, 0.4), (0.5, 0.25)), nn.Conv2d(2, 4, 3))
    assert affine(net, (2, 4, 4)).known is None


# ---------------------------------------------------------------- copies


class Copies(nn.Module):
    """Copies values by positions."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, x):
        return x[:, self.index]


@pytest.mark.parametrize(
    ("net", "shape", "norm"),
    [
        (nn.Flatten(), (2, 3), 1.0),
        (Copies([3, 0, 1]), (4,), 1.0),
        (Copies([0, 0, 2, 0]), (4,), math.sqrt(3)),
        (Copies([0, 0, 1, 1]), (4,), math.sqrt(2)),
        (nn.ReflectionPad2d(1), (1, 3, 3), 3.0),  # the cell in the middle, 3 x 3 times
        (nn.ReflectionPad2d(1), (1, 4, 5), 2.0),
        (nn.ZeroPad2d(2), (1, 3, 3), 1.0),
        (FitChannels(5), (2, 3, 3), 1.0),
        (FitChannels(1), (2, 3, 3), 1.0),
        (BatchCentering(2), (2, 3, 3), 1.0),
        (nn.PixelUnshuffle(2), (1, 4, 4), 1.0),
    ],
)
def test_a_layer_that_copies_knows_the_root_of_its_most_copies(net, shape, norm):
    op = affine(net, shape)
    matrix = jacobians(net, torch.zeros(1, *shape))[0]
    assert op.known.proved().kind is Kind.UPPER
    assert op.known.proved().value.item() == pytest.approx(norm, rel=1e-15)
    assert op.known.about() == pytest.approx(norm, rel=1e-15)
    assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(norm, rel=1e-12)


# ---------------------------------------------------------------- which number is taken


@pytest.mark.parametrize(("own", "found"), [(2.0, 3.0), (3.0, 2.0), (2.0, 2.0)])
def test_the_smaller_of_both(own, found):
    strategy = Told(found)
    norm = affine_norm(Affine(lambda: identity((3,)), known=known(own)), strategy)
    assert norm.value == 2.0
    assert norm.kind is Kind.UPPER
    assert strategy.asked == 1


def test_the_kind_is_that_of_the_number_that_is_taken():
    op = Affine(lambda: identity((3,)), known=known(2.0))
    assert affine_norm(op, Told(1.9, Kind.PROBABILISTIC)).kind is Kind.PROBABILISTIC
    assert affine_norm(op, Told(2.1, Kind.PROBABILISTIC)).kind is Kind.UPPER
    nothing = affine_norm(op, Told(math.nan))
    assert nothing.value == 2.0


def test_without_a_known_norm_the_strategy_decides():
    found = affine_norm(Affine(lambda: identity((3,))), Told(7.0))
    assert found.value == 7.0
    assert expected_norm(Affine(lambda: identity((3,)))) is None


def test_a_known_norm_is_one_of_the_euclidean_distance():
    op = Affine(lambda: identity((3,)), known=known(0.5))
    assert affine_norm(op, Told(7.0, p=1.0)).value == 7.0


def test_while_training_the_layer_says_about_what_it_will_be():
    found = expected_norm(Affine(lambda: identity((3,)), known=known(2.0, about=1.5)))
    assert found.value == 1.5
    assert found.kind is Kind.ESTIMATE


def black_box(calls, n=5):
    def doubled(x):
        calls.append(len(x))
        return 2 * x

    return Generic((n,), (n,), doubled)


@pytest.mark.parametrize("nested", ["alone", "chain", "sum"])
def test_functions_without_structure_are_not_tried_where_their_norm_is_known(nested):
    calls = []
    generic, dense = black_box(calls), Dense((5,), (5,), torch.eye(5))
    map = {"alone": generic, "chain": dense @ (generic @ dense), "sum": dense + generic}[nested]
    strategy = Told(0.1)
    assert affine_norm(Affine(lambda: map, known=known(2.5)), strategy).value == 2.5
    assert not strategy.asked
    assert not calls
    norm = affine_norm(Affine(lambda: map), lc.Exact())  # nothing is known: it is tried
    assert norm.value.item() == pytest.approx({"sum": 3.0}.get(nested, 2.0))
    assert calls


def test_a_skew_convolution_is_never_made_a_matrix(monkeypatch):
    net = nn.Sequential(SOCConv2d(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    calls = []
    real = SOCConv2d.linear
    monkeypatch.setattr(SOCConv2d, "linear", lambda m, x: calls.append(len(x)) or real(m, x))
    graph = lc.trace(net, (2, 4, 4))
    first = next(n for n in graph if isinstance(n.op, Affine))
    first.op.map().apply(torch.zeros(1, 2, 4, 4))
    assert calls == [1]  # the patch does see it
    calls.clear()
    constant = lc.Product(graph).prefix(first.name)
    assert constant.kind is Kind.UPPER
    assert not calls
    slopes = jacobians(net[0], torch.rand(1, 2, 4, 4))
    assert torch.linalg.matrix_norm(slopes, 2) <= constant.value <= 1 + 1e-6
