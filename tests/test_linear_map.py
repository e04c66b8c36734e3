"""Laws of linear maps, over a table of every kind and over random convolutions."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipcert.convolution import Conv
from lipcert.linear_kinds import Dense, Scale, Separable, identity
from lipcert.linear_map import Matrix, Stack
from lipcert.simplify import simplify
from maps import (
    COMPOUND,
    CONVS,
    MAPS,
    SINGLE,
    cases,
    close,
    geometries,
    index,
    live,
    random_convolution,
)


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
    """Entry by entry."""
    ends = [matrix * x.flatten(1)[:, None] for x in (lower, upper)]
    return torch.minimum(*ends).sum(-1), torch.maximum(*ends).sum(-1)


def boxes(shape):
    """Boxes of positive width and points, mixed."""
    middle, radius = torch.randn(4, *shape), torch.rand(4, *shape)
    radius[1] = 0
    radius[2] *= torch.rand(shape) < 0.5
    return middle - radius, middle + radius


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


# Sums and products of magnitudes are only upper bounds.
SUMMED = {name: SINGLE[name] for name in ("transposed sum",)}
KNOWN = {name: build for name, build in SINGLE.items() if name not in SUMMED}
KNOWN["stack"] = COMPOUND["stack"]


@cases(KNOWN)
def test_magnitude_is_that_of_the_matrix(build):
    a = build()
    magnitude = a.magnitude()
    assert (magnitude.in_shape, magnitude.out_shape) == (a.in_shape, a.out_shape)
    close(magnitude.dense(), a.dense().abs())
    y = torch.randn(2, *a.out_shape)
    close(magnitude.adjoint(y).flatten(1), y.flatten(1) @ a.dense().abs())


@cases(COMPOUND | SUMMED)
def test_magnitude_of_parts_is_at_least_that_of_the_matrix(build):
    a = build()
    assert (a.magnitude().dense() >= a.dense().abs() - 1e-12).all()


@cases(MAPS)
def test_magnitude_is_live_and_follows_the_precision(build):
    a = build()
    x = torch.randn(2, *a.in_shape)
    single = a.to(torch.float32).magnitude()
    assert single.apply(x.float()).dtype == torch.float32
    close(single.apply(x.float()).double(), a.magnitude().apply(x), 1e-4)
    close(simplify(a.magnitude()).dense(), a.magnitude().dense())
    if weights := a.tensors():
        assert all(w is not None for w in torch.autograd.grad(a.magnitude().dense().sum(), weights))


@cases(KNOWN)
def test_interval_is_the_smallest_box(build):
    a = build()
    lower, upper = boxes(a.in_shape)
    low, high = a.interval(lower, upper)
    assert low.shape == high.shape == (4, *a.out_shape)
    expected = smallest_box(a.dense(), lower, upper)
    close(low.flatten(1), expected[0])
    close(high.flatten(1), expected[1])
    close(low[1:2], a.apply(lower[1:2]))  # a box of width zero is a point
    assert low[1].equal(high[1])


@cases(COMPOUND | SUMMED)
def test_interval_of_parts_holds_the_smallest_box(build):
    a = build()
    lower, upper = boxes(a.in_shape)
    low, high = a.interval(lower, upper)
    smallest = smallest_box(a.dense(), lower, upper)
    assert (low.flatten(1) <= smallest[0] + 1e-12).all()
    assert (high.flatten(1) >= smallest[1] - 1e-12).all()
    close(low[1:2], a.apply(lower[1:2]))
    close(low + high, 2 * a.apply((lower + upper) / 2))


def test_interval_of_a_composition_goes_factor_by_factor():
    first, then = Dense((4,), (3,), live(3, 4)), Dense((3,), (2,), live(2, 3))
    lower, upper = boxes((4,))
    close((then @ first).interval(lower, upper), then.interval(*first.interval(lower, upper)))


def test_interval_of_a_sum_goes_term_by_term():
    one, other = Dense((4,), (3,), live(3, 4)), Dense((4,), (3,), live(3, 4))
    lower, upper = boxes((4,))
    parts = zip(one.interval(lower, upper), other.interval(lower, upper), strict=True)
    close((one + other).interval(lower, upper), tuple(a + b for a, b in parts))


@cases(MAPS)
def test_interval_in_single_precision(build):
    a = build().to(torch.float32)
    lower, upper = (end.float() for end in boxes(a.in_shape))
    low, high = a.interval(lower, upper)
    wide = a.to(torch.float64).interval(lower.double(), upper.double())
    assert low.dtype == high.dtype == torch.float32
    close(low.double(), wide[0], 1e-4)
    close(high.double(), wide[1], 1e-4)


@pytest.mark.parametrize("name", ["dense", "conv 2d, leftover row", "composition", "stack"])
def test_interval_is_differentiable_in_weights_and_ends(name):
    a = MAPS[name]()
    lower, upper = (end[[0, 3]].requires_grad_() for end in boxes(a.in_shape))

    def ends(*_):
        return a.interval(lower, upper)

    assert torch.autograd.gradcheck(ends, (*a.tensors(), lower, upper))


# ---------------------------------------------------------------- random convolutions


fuzz = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@fuzz
@given(geometries(), st.integers(0, 999))
def test_random_convolutions(geometry, seed):
    c = random_convolution(geometry, seed)
    matrix = by_definition(c)
    close(c.dense(), matrix)
    close(c.T.dense(), matrix.mT)
    close(c.magnitude().dense(), matrix.abs())
    lower, upper = boxes(c.in_shape)
    for end, expected in zip(
        c.interval(lower, upper), smallest_box(matrix, lower, upper), strict=True
    ):
        close(end.flatten(1), expected)
