"""Norms of rows against the dense matrix, over every kind of map."""

import math

import pytest
import torch

from lipcert.linear_kinds import Dense, Separable, identity
from lipcert.linear_map import Generic, Matrix
from lipcert.row_norms import filter_norms, row_norms
from maps import (
    COMPOUND,
    CONVS,
    HARD,
    MAPS,
    SINGLE,
    cases,
    chain,
    close,
    conv,
    index,
    live,
    scale,
    stack,
)

ALL = MAPS | HARD
# Above the truth: sums, and what is made of these.
EXACT = SINGLE
SHUFFLES = {
    "scaled rows": lambda: chain(Dense((4,), (3,), live(3, 4)), scale((3,), 3)),
    "copied rows": lambda: chain(Dense((4,), (3,), live(3, 4)), index((3,), [[2, -1], [0, 2]])),
    "permuted columns": lambda: chain(index((4,), [2, 0, 3, 1]), Dense((4,), (3,), live(3, 4))),
    "dense after copies": lambda: chain(index((3,), [0, 0, 1, 2]), Dense((4,), (3,), live(3, 4))),
    "dense after pooling": lambda: chain(
        Separable((2, 4), (2, 2), (None, live(2, 4))),
        index((2, 2), [0, 1, 2, 3]),
        Dense((4,), (3,), live(3, 4)),
    ),
    "transposed matrix": lambda: Matrix((2, 3), (4,), live(4, 6)).T,
    "index, scale": lambda: chain(index((3,), [1, -1, 0]), scale((3,), 3)),
}


def true_norms(map):
    return torch.linalg.vector_norm(map.dense(), dim=1)


def flat(map):
    return row_norms(map).expand(map.out_shape).flatten()


@cases(ALL | SHUFFLES)
def test_never_below_the_rows_of_the_matrix(build):
    a = build()
    assert (flat(a) >= true_norms(a) * (1 - 1e-12)).all()


@cases(EXACT | SHUFFLES | {"stack": COMPOUND["stack"]})
def test_exact_for_the_matrix_kinds(build):
    a = build()
    close(flat(a), true_norms(a))


@cases(CONVS)
def test_a_convolution_has_the_norms_of_its_filters(build):
    """Inside the image; at its borders those of the part that meets it."""
    a = build()
    if a.taps_meet:
        pytest.skip("its rows are not its filters")
    rows = true_norms(a).reshape(a.out_shape)
    close(row_norms(a).expand(a.out_shape), rows)
    whole = filter_norms(a)
    assert whole.shape == (a.out_shape[0], *(1,) * a.axes)
    assert (whole >= rows * (1 - 1e-12)).all()
    if a.circular or not any(map(any, a.padding)):
        close(whole.expand(a.out_shape), rows)


def test_taps_that_meet_in_one_cell_add_up():
    a = CONVS["circular, wraps"]()
    with torch.no_grad():
        a.weight.fill_(1.0)
    close(flat(a), true_norms(a))
    assert (flat(a) > torch.linalg.vector_norm(a.weight.flatten(1), dim=1).max()).all()


def test_sums_add_and_stacks_stand_below_each_other():
    one, other = Dense((4,), (3,), live(3, 4)), Dense((4,), (3,), live(3, 4))
    close(flat(stack(one, other)), torch.cat([true_norms(one), true_norms(other)]))
    a = one + Matrix((4,), (3,), other.weight)
    close(flat(a), true_norms(one) + true_norms(other))


def test_a_scale_before_counts_by_its_largest_number():
    a = chain(scale((2, 5), 2, 5), conv((2, 5), 3, 3))
    expected = true_norms(a.factors[1]) * a.factors[0].diagonal.abs().max()
    close(flat(a), expected)


def test_large_maps_without_structure_are_not_known():
    unknown = Generic((3000,), (3000,), lambda x: x.cumsum(-1))
    assert row_norms(unknown) is None
    assert row_norms(unknown + identity((3000,))) is None
    assert row_norms(chain(unknown, scale((3000,), 1))) is None
    assert row_norms(unknown.T) is None


def test_large_maps_with_structure_are_cheap():
    a = conv((3, 200, 200), 4, 3, padding=1)
    assert row_norms(a).shape == (4, 200, 200)
    weight = live(30, 7)
    assert row_norms(Dense((4000, 7), (4000, 30), weight)).shape == (30,)
    shuffled = chain(a, index(a.out_shape, torch.arange(160_000).flip(0)))
    assert row_norms(shuffled).shape == (160_000,)


@cases(MAPS | SHUFFLES)
def test_gradients_against_differences(build):
    a = build()
    weights = [w for w in a.tensors() if w.requires_grad]
    if weights:
        assert torch.autograd.gradcheck(lambda *_: row_norms(a), weights)


@cases({name: build for name, build in (MAPS | SHUFFLES).items() if build().tensors()})
def test_gradients_of_zero_rows_are_zero(build):
    a = build()
    weights = a.tensors()
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    gradients = torch.autograd.grad(row_norms(a).sum(), weights, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
    if not a.dense().any():  # else the map holds an identity
        assert all(g is None or not g.any() for g in gradients)


@cases(MAPS)
def test_precision_is_that_of_the_weights(build):
    a = build().to(torch.float32)
    norms = row_norms(a)
    assert norms.dtype == a.like.dtype
    close(norms.double(), row_norms(a.to(torch.float64)), 1e-4)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_squares_stay_in_range(size):
    a = Dense((2,), (2,), torch.tensor([[3.0, 4.0], [3 * size, 4 * size]]))
    close(flat(a) / torch.tensor([1, size]), torch.tensor([5.0, 5.0]))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_no_number_comes_of_weights_that_are_none(poison):
    for a in (Dense((3,), (2,), live(2, 3)), conv((2, 4), 2, 3), scale((3,), 3)):
        with torch.no_grad():
            a.tensors()[0].view(-1)[0] = poison
        assert not flat(a)[0].isfinite()
