"""Simplified maps are equal maps: folds by table, then sums, stacks and products at random."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipcert.convolution import Conv
from lipcert.linear_kinds import Dense, Index, Scale, identity, zero
from lipcert.linear_map import Add, Composition, LinearMap, Stack, Transpose
from lipcert.simplify import simplify
from maps import (
    cases,
    chain,
    close,
    conv,
    dense,
    index,
    live,
    number,
    random_map,
    scale,
    stack,
    total,
)


def same(channels=2, n=4, kernel=3, dilation=1, groups=1, circular=False):
    """A convolution that keeps the shape and whose centre is a tap."""
    before = (kernel - 1) // 2 * dilation
    sides = ((before, dilation * (kernel - 1) - before),) * 2
    shape = (channels, n, n)
    return conv(shape, channels, kernel, 1, sides, dilation, groups, circular)


def leaves(map: LinearMap) -> int:
    match map:
        case Composition(factors=parts) | Add(terms=parts) | Stack(parts=parts):
            return sum(leaves(part) for part in parts)
        case Transpose():
            return leaves(map.inner)
        case _:
            return 1


def gradients(matrix, map: LinearMap):
    """Of a fixed function of the matrix, in the weights of the map."""
    numbers = torch.arange(matrix.numel()).reshape(matrix.shape).sin()
    options = {"allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad((matrix * numbers).sum(), map.tensors(), **options)


def assert_equal_maps(after, before):
    """The same matrix between the same shapes, the same gradient in every live weight."""
    assert (after.in_shape, after.out_shape) == (before.in_shape, before.out_shape)
    x = torch.randn(2, *before.in_shape)
    assert after.apply(x).shape == before.apply(x).shape
    a, b = after.dense(), before.dense()
    size = b.detach().abs().max().clamp(min=1)
    close(a / size, b / size)
    if before.tensors():
        for found, expected in zip(gradients(a, before), gradients(b, before), strict=True):
            size = expected.abs().max().clamp(min=1)
            close(found / size, expected / size)


# ---------------------------------------------------------------- what folds into one

BIG = (3, 6, 6)
TO_ONE = {
    "conv, scale": (Conv, lambda: chain(conv(BIG, 4, 3, 2, 1), scale((4, 3, 3), 4, 1, 1))),
    "scale, conv": (Conv, lambda: chain(scale(BIG, 3, 1, 1), conv(BIG, 4, 3, 2, 1))),
    "scale, grouped conv, scale": (
        Conv,
        lambda: chain(
            scale((4, 3, 3), 4, 1, 1),
            conv((4, 3, 3), 6, 3, padding=1, groups=2),
            scale((6, 3, 3), 6, 1, 1),
        ),
    ),
    "number, conv, number": (
        Conv,
        lambda: chain(number(BIG), conv(BIG, 2, 2, 2), number((2, 3, 3))),
    ),
    "circular conv, scale": (
        Conv,
        lambda: chain(same(circular=True), scale((2, 4, 4), 2, 1, 1)),
    ),
    "1d conv, scale": (Conv, lambda: chain(conv((2, 5), 3, 2), scale((3, 4), 3, 1))),
    "3d scale, conv": (
        Conv,
        lambda: chain(scale((2, 2, 3, 2), 2, 1, 1, 1), conv((2, 2, 3, 2), 1, 2)),
    ),
    "transposed conv, scale": (
        Transpose,
        lambda: chain(conv(BIG, 4, 3, 2, 1).T, scale(BIG, 3, 1, 1)),
    ),
    "scale, transposed conv": (
        Transpose,
        lambda: chain(scale((4, 3, 3), 4, 1, 1), conv(BIG, 4, 3, 2, 1).T),
    ),
    "number, transposed grouped conv, scale": (
        Transpose,
        lambda: chain(
            number((6, 3, 3)),
            conv((4, 3, 3), 6, 3, padding=1, groups=2).T,
            scale((4, 3, 3), 4, 1, 1),
        ),
    ),
    "transpose of conv, scale": (
        Transpose,
        lambda: chain(conv(BIG, 4, 3, 2, 1), scale((4, 3, 3), 4, 1, 1)).T,
    ),
    "transpose of transposed conv, scale": (
        Conv,
        lambda: chain(conv(BIG, 4, 3, 2, 1).T, scale(BIG, 3, 1, 1)).T,
    ),
    "dense, scale": (Dense, lambda: chain(dense(4, 3), scale((4,), 4))),
    "scale, dense": (Dense, lambda: chain(scale((3,), 3), dense(4, 3))),
    "number, dense, number": (Dense, lambda: chain(number((3,)), dense(4, 3), number((4,)))),
    "dense with leading axes, scale": (
        Dense,
        lambda: chain(scale((2, 3), 1, 3), Dense((2, 3), (2, 4), live(4, 3)), scale((2, 4), 4)),
    ),
    "dense, dense": (Dense, lambda: chain(dense(3, 4), dense(2, 3), dense(2, 2))),
    "transposed dense, dense": (Dense, lambda: chain(dense(4, 3).T, dense(3, 3).T.T)),
    "transposed scale": (Scale, lambda: scale((2, 3), 2, 1).T),
    "scales": (
        Scale,
        lambda: chain(scale(BIG, 3, 1, 1), number(BIG), scale(BIG, 6), scale(BIG, 3, 6, 6)),
    ),
    "copies": (
        Index,
        lambda: chain(
            index((2, 2), [[0, -1, 3], [3, 3, 1]]), index((2, 3), [5, 1, -1, 2, 0]), identity((5,))
        ),
    ),
    "there and back": (
        Dense,
        lambda: chain(index((4,), [3, 1, 0, 2]), index((4,), [2, 1, 3, 0]), dense(2, 4)),
    ),
    "identities": (
        Conv,
        lambda: chain(identity(BIG), identity(BIG), conv(BIG, 2, 3), identity((2, 4, 4))),
    ),
    "nested": (
        Conv,
        lambda: chain(
            chain(scale(BIG, 3, 1, 1), chain(conv(BIG, 4, 3, 2, 1))),
            chain(identity((4, 3, 3)), scale((4, 3, 3), 4, 1, 1)),
        ),
    ),
    "x + conv x": (Conv, lambda: total(identity((2, 4, 4)), same())),
    "conv x + x": (Conv, lambda: total(same(), identity((2, 4, 4)))),
    "scale + grouped conv": (Conv, lambda: total(scale((4, 4, 4), 4, 1, 1), same(4, groups=2))),
    "number + depthwise conv": (Conv, lambda: total(number((4, 4, 4)), same(4, groups=4))),
    "x + dilated conv": (Conv, lambda: total(identity((2, 4, 4)), same(dilation=2))),
    "x + even conv": (Conv, lambda: total(identity((2, 4, 4)), same(kernel=4))),
    "x + circular conv": (Conv, lambda: total(identity((2, 4, 4)), same(circular=True))),
    "x + wrapping conv": (
        Conv,
        lambda: total(identity((2, 3, 3)), same(n=3, kernel=5, circular=True)),
    ),
    "x + 1x1 conv": (Conv, lambda: total(identity((2, 4, 4)), same(kernel=1))),
    "x + bn conv x + conv x + x": (
        Conv,
        lambda: total(
            identity((2, 4, 4)),
            chain(same(), scale((2, 4, 4), 2, 1, 1)),
            total(same(), identity((2, 4, 4))),
        ),
    ),
    "x + x + conv": (Conv, lambda: total(identity((2, 4, 4)), identity((2, 4, 4)), same())),
    "x + dense": (Dense, lambda: total(identity((3,)), dense(3, 3), scale((3,), 3), number((3,)))),
    "x + dense, leading axes": (
        Dense,
        lambda: total(scale((2, 3), 1, 3), Dense((2, 3), (2, 3), live(3, 3))),
    ),
    "denses": (Dense, lambda: total(dense(2, 3), total(dense(2, 3), dense(2, 3)))),
    "x + scale": (Scale, lambda: total(identity((2, 3)), scale((2, 3), 3), number((2, 3)))),
    "stack of copies": (
        Index,
        lambda: stack(
            index((2, 2), [[0, -1], [3, 3]]),
            chain(identity((2, 2)), index((2, 2), [1, 2])),
            zero((2, 2), (2, 2)),
        ),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize(("kind", "build"), TO_ONE.values(), ids=TO_ONE.keys())
def test_folds_into_one(kind, build, dtype):
    torch.set_default_dtype(dtype)
    before = build()
    after = simplify(before)
    assert isinstance(after, kind)
    assert leaves(after) == 1
    if dtype == torch.float64:
        assert_equal_maps(after, before)
    else:
        x, y = torch.randn(2, *before.in_shape), torch.randn(2, *before.out_shape)
        for found, expected in (
            (after.apply(x), before.apply(x)),
            (after.adjoint(y), before.adjoint(y)),
        ):
            assert found.dtype == torch.float32
            close(found, expected, 1e-4)
        close(after.dense(), before.dense(), 1e-5)


# ---------------------------------------------------------------- what must not, or only in part

IN_PART = {
    "x + strided conv": (2, lambda: total(identity((2, 3, 3)), conv((2, 3, 3), 2, 3, 2, 2))),
    "x + conv between cells": (
        2,
        lambda: total(identity((2, 5)), conv((2, 5), 2, 3, padding=((1, 3),), dilation=2)),
    ),
    "x in space + conv": (2, lambda: total(scale((2, 4, 4), 4, 4), same())),
    "3x3 + x + 1x1": (2, lambda: total(same(), identity((2, 4, 4)), same(kernel=1))),
    "shifted convs": (
        2,
        lambda: total(conv((2, 4), 2, 2, padding=((0, 1),)), conv((2, 4), 2, 2, padding=((1, 0),))),
    ),
    "grouped + full conv": (2, lambda: total(same(4, groups=2), same(4))),
    "zero padding + circular": (2, lambda: total(same(), same(circular=True))),
    "permutation + conv": (2, lambda: total(index((2, 2), [[1, 0], [3, 2]]), conv((2, 2), 2, 1))),
    "scale in space, conv": (2, lambda: chain(scale((2, 4, 4), 4, 4), same())),
    "conv, scale by columns": (2, lambda: chain(same(n=2), scale((2, 2, 2), 2))),
    "conv, permutation, scale": (
        3,
        lambda: chain(
            same(n=1),
            index((2, 1, 1), torch.tensor([1, 0]).reshape(2, 1, 1)),
            scale((2, 1, 1), 2, 1, 1),
        ),
    ),
    "scale of rows, dense": (
        2,
        lambda: chain(scale((2, 3), 2, 1), Dense((2, 3), (2, 4), live(4, 3))),
    ),
    "scale of rows + dense": (
        2,
        lambda: total(scale((2, 3), 2, 1), Dense((2, 3), (2, 3), live(3, 3))),
    ),
    "bottleneck": (2, lambda: chain(dense(1, 4), dense(4, 1))),
    "stack": (
        2,
        lambda: stack(chain(same(), scale((2, 4, 4), 2, 1, 1)), chain(number((2, 4, 4)), same())),
    ),
    "conv, flatten, bn": (
        3,
        lambda: chain(same(n=2), index((2, 2, 2), torch.arange(8)), scale((8,), 8)),
    ),
    "transposed copies": (1, lambda: index((2, 2), [[0, -1, 3], [3, 3, 1]]).T),
    "transposed chain": (2, lambda: chain(dense(1, 4), dense(4, 1)).T),
}


@pytest.mark.parametrize(("count", "build"), IN_PART.values(), ids=IN_PART.keys())
def test_folds_only_what_is_equal(count, build):
    before = build()
    after = simplify(before)
    assert leaves(after) == count
    assert_equal_maps(after, before)


@cases({name: build for name, (_, build) in (TO_ONE | IN_PART).items()})
def test_simplify_twice_is_simplify_once(build):
    once = simplify(build())
    twice = simplify(once)
    assert leaves(twice) == leaves(once)
    close(twice.dense(), once.dense())


# ---------------------------------------------------------------- at random


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6))
def test_random_maps(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    before = random_map(rng, rng.choice([(4,), (2, 3), (2, 3, 3)]))
    after = simplify(before)
    assert leaves(after) <= leaves(before)
    assert_equal_maps(after, before)
