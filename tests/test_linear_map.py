"""Laws of linear maps, over a table of every kind and over random convolutions."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipcert.convolution import Conv, convolution
from lipcert.linear_map import (
    Add,
    Composition,
    Dense,
    Generic,
    Index,
    LinearMap,
    Matrix,
    Scale,
    Separable,
    Stack,
    identity,
    zero,
)


def live(*shape):
    """A weight as a network has it: a leaf that wants a gradient."""
    return torch.randn(shape).requires_grad_()


def conv(in_shape, out, kernel, stride=1, padding=0, dilation=1, groups=1, circular=False):
    axes = len(in_shape) - 1

    def each(value):
        return value if isinstance(value, tuple) else (value,) * axes

    sides = tuple(p if isinstance(p, tuple) else (p, p) for p in each(padding))
    weight = live(out, in_shape[0] // groups, *each(kernel))
    return convolution(weight, in_shape, each(stride), sides, each(dilation), groups, circular)


def index(in_shape, source):
    source = torch.as_tensor(source)
    return Index(in_shape, tuple(source.shape), source)


CONVS = {
    "1d": lambda: conv((3, 7), 4, 3, padding=1),
    "1d, leftover cells": lambda: conv((2, 8), 3, 2, stride=3, padding=1),
    "2d": lambda: conv((2, 4, 5), 3, (3, 2)),
    "2d, leftover row": lambda: conv((2, 6, 6), 3, 3, stride=2, padding=1),
    "3d": lambda: conv((2, 3, 3, 2), 2, 2, padding=1),
    "3d, strides": lambda: conv((1, 4, 3, 5), 3, (2, 1, 3), stride=(2, 1, 3), padding=(0, 1, 2)),
    "asymmetric": lambda: conv((2, 3, 4), 2, 3, padding=((1, 0), (0, 2))),
    "same, even": lambda: conv((2, 4, 4), 2, (2, 4), padding=((0, 1), (1, 2))),
    "dilated": lambda: conv((2, 5, 5), 2, 3, stride=(1, 2), padding=2, dilation=2),
    "grouped": lambda: conv((4, 3, 3), 6, 3, padding=1, groups=2),
    "depthwise": lambda: conv((3, 4, 4), 6, 2, stride=2, groups=3),
    "kernel beyond image": lambda: conv((2, 2, 3), 2, 5, padding=(2, 1)),
    "stride beyond kernel": lambda: conv((2, 7), 2, 2, stride=4),
    "padding beyond kernel": lambda: conv((2, 3), 2, 1, padding=2),
    "1x1": lambda: conv((3, 2, 2), 4, 1),
    "circular": lambda: conv((2, 4, 5), 3, 3, padding=1, circular=True),
    "circular, stride 2": lambda: conv((2, 4, 6), 3, 3, stride=2, padding=1, circular=True),
    "circular, stride 3": lambda: conv((2, 9), 2, 5, stride=3, padding=2, circular=True),
    "circular, even": lambda: conv((1, 4, 4), 2, 2, padding=((0, 1), (1, 0)), circular=True),
    "circular, dilated groups": lambda: conv(
        (4, 6), 2, 3, padding=2, dilation=2, groups=2, circular=True
    ),
    "circular, 3d": lambda: conv((1, 2, 3, 3), 2, 3, padding=1, circular=True),
    "circular, wraps": lambda: conv((2, 2), 2, 5, padding=2, circular=True),
}

SINGLE = {
    "matrix": lambda: Matrix((2, 3), (2, 2), live(4, 6)),
    "dense": lambda: Dense((5,), (3,), live(3, 5)),
    "dense, leading axes": lambda: Dense((2, 3, 3), (2, 3, 4), live(4, 3)),
    "scale": lambda: Scale((3, 2, 2), (3, 2, 2), live(3, 1, 1)),
    "scale by a number": lambda: Scale((3, 2), (3, 2), live()),
    "scale in space": lambda: Scale((2, 3), (2, 3), live(2, 3)),
    "identity": lambda: identity((2, 3)),
    "zero": lambda: zero(identity((2, 3))),
    "reshape": lambda: index((2, 3), torch.arange(6).reshape(3, 2)),
    "permutation": lambda: index((2, 3), torch.arange(6).reshape(2, 3).mT.flip(0)),
    "copies and gaps": lambda: index((2, 2), [[0, -1, 3], [3, 3, 1]]),
    "separable": lambda: Separable((2, 3, 4), (2, 5, 2), (None, live(5, 3), live(2, 4))),
    "separable, untouched": lambda: Separable((2, 3), (2, 3), (None, None)),
    "transposed dense": lambda: Dense((5,), (3,), live(3, 5)).T,
    "transposed index": lambda: index((2, 2), [[0, -1, 3], [3, 3, 1]]).T,
    "transposed separable": lambda: Separable((2, 3), (4, 2), (live(4, 2), live(2, 3))).T,
    "transposed conv": lambda: conv((2, 6, 6), 3, 3, stride=2, padding=1).T,
    "transposed sum": lambda: (Dense((4,), (3,), live(3, 4)) + Dense((4,), (3,), live(3, 4))).T,
    "generic": lambda: Generic((2, 3), (2, 3), lambda x: 2 * x.cumsum(-1) - x),
    **{f"conv {name}": build for name, build in CONVS.items()},
}

COMPOUND = {
    "composition": lambda: Composition(
        (2, 4, 4),
        (5,),
        (
            conv((2, 4, 4), 3, 3, stride=2, padding=1),
            index((3, 2, 2), torch.arange(12)),
            Scale((12,), (12,), live(12)),
            Dense((12,), (5,), live(5, 12)),
        ),
    ),
    "sum": lambda: Add(
        (2, 4),
        (2, 4),
        (conv((2, 4), 2, 3, padding=1), identity((2, 4)), Scale((2, 4), (2, 4), live(2, 1))),
    ),
    "stack": lambda: Stack(
        (2, 3),
        (16,),
        (Dense((2, 3), (2, 3), live(3, 3)), index((2, 3), [0, 0, 5, -1]), identity((2, 3))),
    ),
    "block": lambda: (
        Dense((3,), (4,), live(4, 3)).T
        @ (Dense((3,), (4,), live(4, 3)) + Matrix((3,), (4,), live(4, 3)))
    ),
    "transposed composition": lambda: (
        (Dense((4,), (2,), live(2, 4)) @ Scale((4,), (4,), live(4))).T
    ),
}
MAPS = SINGLE | COMPOUND


def cases(table):
    return pytest.mark.parametrize("build", [pytest.param(b, id=name) for name, b in table.items()])


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def by_definition(c: Conv):
    """The matrix of a convolution, tap by tap."""
    matrix = torch.zeros(*c.out_shape, *c.in_shape)
    count, width = c.weight.shape[:2]
    for place in itertools.product(*map(range, c.out_shape[1:])):
        for tap in itertools.product(*map(range, c.kernel)):
            geometry = zip(place, c.stride, tap, c.dilation, c.padding, strict=True)
            cell = tuple(i * s + t * d - before for i, s, t, d, (before, _) in geometry)
            if c.circular:
                cell = tuple(p % n for p, n in zip(cell, c.in_shape[1:], strict=True))
            if any(not 0 <= p < n for p, n in zip(cell, c.in_shape[1:], strict=True)):
                continue
            for o in range(count):
                first = o // (count // c.groups) * width
                entry = (o, *place, slice(first, first + width), *cell)
                matrix[entry] += c.weight.detach()[(o, slice(None), *tap)]
    return matrix.reshape(c.out_size, c.in_size)


def smallest_box(matrix, lower, upper):
    """Entry by entry, with 0 * inf = 0."""
    ends = [torch.where(matrix == 0, 0, matrix * x.flatten(1)[:, None]) for x in (lower, upper)]
    return torch.minimum(*ends).sum(-1), torch.maximum(*ends).sum(-1)


def boxes(shape):
    """Boxes of positive width, points, half-infinite and infinite ones, mixed."""
    middle, radius = torch.randn(6, *shape), torch.rand(6, *shape)
    radius[1] = 0
    lower, upper = middle - radius, middle + radius
    lower[2:] = lower[2:].where(torch.rand(4, *shape) < 0.7, -math.inf)
    upper[3:] = upper[3:].where(torch.rand(3, *shape) < 0.7, math.inf)
    lower[5], upper[5] = -math.inf, math.inf
    return lower, upper


# ---------------------------------------------------------------- apply, adjoint, dense


@cases(MAPS)
def test_adjoint_identity(build):
    a = build()
    x, y = torch.randn(3, *a.in_shape), torch.randn(3, *a.out_shape)
    left = (a.apply(x) * y).flatten(1).sum(1)
    right = (x * a.adjoint(y)).flatten(1).sum(1)
    assert a.apply(x).shape == y.shape
    assert a.adjoint(y).shape == x.shape
    close(left, right)


@cases(MAPS)
def test_adjoint_agrees_with_automatic_differentiation(build):
    a = build()
    x = torch.randn(2, *a.in_shape, requires_grad=True)
    y = torch.randn(2, *a.out_shape)
    close(a.adjoint(y), torch.autograd.grad(a.apply(x), x, y)[0])


@cases(MAPS)
def test_dense_is_the_matrix_of_apply_and_adjoint(build):
    a = build()
    matrix = a.dense()
    x, y = torch.randn(3, *a.in_shape), torch.randn(3, *a.out_shape)
    assert matrix.shape == (a.out_size, a.in_size)
    close(a.apply(x).flatten(1), x.flatten(1) @ matrix.mT)
    close(a.adjoint(y).flatten(1), y.flatten(1) @ matrix)


@cases(MAPS)
def test_live_weights_get_one_gradient_by_every_route(build):
    a = build()
    weights = a.tensors()
    if not weights:
        pytest.skip("made of no weights")
    x, y = torch.randn(1, *a.in_shape), torch.randn(1, *a.out_shape)
    routes = (
        (a.apply(x) * y).sum(),
        (x * a.adjoint(y)).sum(),
        (y.flatten() @ a.dense() @ x.flatten()),
        (x * a.T.apply(y)).sum(),
    )
    first, *others = (torch.autograd.grad(route, weights) for route in routes)
    for gradients in others:
        for gradient, expected in zip(gradients, first, strict=True):
            close(gradient, expected, 1e-11)


@cases(MAPS)
def test_another_precision_keeps_the_live_weights(build):
    a = build()
    single = a.to(torch.float32)
    x, y = torch.randn(2, *a.in_shape), torch.randn(2, *a.out_shape)
    image, back = single.apply(x.float()), single.adjoint(y.float())
    assert image.dtype == back.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in single.tensors())
    close(image.double(), a.apply(x), 1e-4)
    close(back.double(), a.adjoint(y), 1e-4)
    if weights := a.tensors():
        gradients = torch.autograd.grad((image * y.float()).sum(), weights)
        expected = torch.autograd.grad((a.apply(x) * y).sum(), weights)
        for gradient, wanted in zip(gradients, expected, strict=True):
            close(gradient, wanted, 1e-4)
    assert (single.dense() - a.dense()).abs().max() < 1e-4
    assert single.dense().dtype == torch.float64


@cases(CONVS)
def test_convolution_by_definition(build):
    c = build()
    close(c.dense(), by_definition(c))


def test_kinds_by_their_matrices():
    w = live(3, 4)
    close(Dense((2, 4), (2, 3), w).dense(), torch.kron(torch.eye(2), w))
    close(Matrix((2, 2), (3,), w).dense(), w)
    close(Scale((2, 3), (2, 3), w[:2, :1]).dense(), w[:2, :1].expand(2, 3).flatten().diag())
    close(index((3,), [2, -1, 2]).dense(), torch.tensor([[0, 0, 1], [0, 0, 0], [0, 0, 1.0]]))
    rows = live(2, 3)
    close(Separable((4, 3), (3, 2), (w, rows)).dense(), torch.kron(w, rows))


def test_weights_are_found_in_parts():
    w, d = live(3, 4), live()
    a = Stack((4,), (7,), (Dense((4,), (3,), w), Scale((4,), (4,), d) @ identity((4,))))
    assert [id(t) for t in a.tensors()] == [id(w), id(d)]
    assert a.like is w
    assert (Scale((4,), (4,), d) + identity((4,))).like is d
    assert index((3,), [2, -1, 2]).copies().tolist() == [0, 0, 2]


# ---------------------------------------------------------------- algebra


def test_algebra_is_that_of_matrices():
    a, b = Dense((4,), (3,), live(3, 4)), Matrix((3,), (2,), live(2, 3))
    c = index((4,), [1, -1, 1])
    product, sums = b @ a, a + c
    assert (product.in_shape, product.out_shape) == ((4,), (2,))
    close(product.dense(), b.dense() @ a.dense())
    close(sums.dense(), a.dense() + c.dense())
    close((b @ sums).T.dense(), (b.dense() @ (a.dense() + c.dense())).mT)
    close(((b @ a) + (b @ c)).dense(), (b @ (a + c)).dense())
    assert (a.T.in_shape, a.T.out_shape) == ((3,), (4,))


@cases(MAPS)
def test_transposition_is_an_involution(build):
    a = build()
    close(a.T.dense(), a.dense().mT)
    close(a.T.T.dense(), a.dense())


# ---------------------------------------------------------------- boxes


@cases(SINGLE | {"stack": COMPOUND["stack"]})
def test_interval_is_the_smallest_box(build):
    a = build()
    lower, upper = boxes(a.in_shape)
    low, high = a.interval(lower, upper)
    assert low.shape == high.shape == (6, *a.out_shape)
    expected = smallest_box(a.dense(), lower, upper)
    close(low.flatten(1), expected[0])
    close(high.flatten(1), expected[1])
    close(low[1:2], a.apply(lower[1:2]))  # a box of width zero is a point


@cases(COMPOUND)
def test_interval_of_parts_holds_the_smallest_box(build):
    a = build()
    lower, upper = boxes(a.in_shape)
    low, high = a.interval(lower, upper)
    smallest = smallest_box(a.dense(), lower, upper)
    assert (low.flatten(1) <= smallest[0] + 1e-12).all()
    assert (high.flatten(1) >= smallest[1] - 1e-12).all()


@cases(MAPS)
def test_interval_in_single_precision(build):
    a = build().to(torch.float32)
    lower, upper = (end.float() for end in boxes(a.in_shape))
    low, high = a.interval(lower, upper)
    wide = a.to(torch.float64).interval(lower.double(), upper.double())
    assert low.dtype == high.dtype == torch.float32
    close(low.double(), wide[0], 1e-4)
    close(high.double(), wide[1], 1e-4)


def test_infinite_ends_reach_only_what_reads_them():
    a = Dense((2,), (3,), torch.tensor([[1.0, 0.0], [0.0, -2.0], [1.0, 1.0]]))
    lower, upper = torch.tensor([[-math.inf, 1.0]]), torch.tensor([[0.0, math.inf]])
    low, high = a.interval(lower, upper)
    assert low.tolist() == [[-math.inf, -math.inf, -math.inf]]
    assert high.tolist() == [[0.0, -2.0, math.inf]]


# ---------------------------------------------------------------- random convolutions


@st.composite
def geometries(draw):
    """A weight shape and the other arguments of `convolution` with an output that exists."""
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2]))
    widths = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    n, k, s, d, p = [], [], [], [], []
    for _ in range(axes):
        k.append(draw(st.integers(1, 4 if axes < 3 else 2)))
        s.append(draw(st.integers(1, 3)))
        d.append(draw(st.integers(1, 2)))
        p.append((draw(st.integers(0, 3)), draw(st.integers(0, 3))))
        smallest = max(1, d[-1] * (k[-1] - 1) + 1 - sum(p[-1]))
        n.append(draw(st.integers(smallest, max(smallest, 6 if axes < 3 else 4))))
    shape = (widths[0] * groups, *n)
    weight = (widths[1] * groups, widths[0], *k)
    return weight, (shape, tuple(s), tuple(p), tuple(d), groups)


def random_convolution(geometry, seed) -> LinearMap:
    torch.manual_seed(seed)
    weight, rest = geometry
    return convolution(torch.randn(weight).requires_grad_(), *rest)


fuzz = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@fuzz
@given(geometries(), st.integers(0, 999))
def test_random_convolutions(geometry, seed):
    c = random_convolution(geometry, seed)
    matrix = by_definition(c)
    close(c.dense(), matrix)
    close(c.T.dense(), matrix.mT)
    lower, upper = boxes(c.in_shape)
    for end, expected in zip(
        c.interval(lower, upper), smallest_box(matrix, lower, upper), strict=True
    ):
        close(end.flatten(1), expected)
