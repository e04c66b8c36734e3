"""Linear maps for tests: builders, a table of every kind, random convolutions, random products."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from lipcert.convolution import convolution
from lipcert.linear_kinds import Dense, Index, Scale, Separable, identity, zero
from lipcert.linear_map import Add, Composition, Generic, LinearMap, Matrix, Stack


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


def chain(*factors):
    return Composition(factors[0].in_shape, factors[-1].out_shape, factors)


def total(*terms):
    return Add(terms[0].in_shape, terms[0].out_shape, terms)


def stack(*parts):
    return Stack(parts[0].in_shape, (sum(p.out_size for p in parts),), parts)


def scale(shape, *diagonal):
    return Scale(shape, shape, live(*diagonal))


def number(shape):
    """A scale of no axes, in double precision whatever the weights are."""
    return Scale(shape, shape, torch.randn((), dtype=torch.float64).requires_grad_())


def dense(m, n):
    return Dense((n,), (m,), live(m, n))


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
    "zero": lambda: zero((2, 3), (2, 3)),
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


FOLDED = {
    "x + conv x": lambda: total(identity((2, 4, 4)), conv((2, 4, 4), 2, 3, padding=1)),
    "x + circular conv x": lambda: total(
        identity((2, 4)), conv((2, 4), 2, 3, padding=1, circular=True)
    ),
    "bn, conv, bn": lambda: chain(
        scale((4, 3, 3), 4, 1, 1), conv((4, 3, 3), 6, 3, 2, 1, groups=2), scale((6, 2, 2), 6, 1, 1)
    ),
    "number, transposed conv": lambda: chain(number((3, 4)), conv((2, 7), 3, 3, 2, 1).T),
    "flip, conv, flatten": lambda: chain(
        index((2, 4), torch.arange(8).reshape(2, 4).flip(1)),
        conv((2, 4), 3, 3, padding=1),
        index((3, 4), torch.arange(12)),
    ),
}
FOURIER = CONVS | FOLDED


def cases(table):
    return pytest.mark.parametrize("build", [pytest.param(b, id=name) for name, b in table.items()])


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


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


def random_leaf(rng: random.Random, shape) -> LinearMap:
    """A map from arrays of this shape that simplify has a rule for, or nearly has."""
    size = identity(shape).in_size
    choices = [
        lambda: identity(shape),
        lambda: number(shape),
        lambda: scale(shape, *shape),
        lambda: scale(shape, shape[0], *(1,) * (len(shape) - 1)),
        lambda: index(shape, torch.randint(-1, size, (rng.randint(2, 6),))),
        lambda: index(shape, torch.randperm(size).reshape(shape)),
        lambda: index(shape, torch.arange(size)),
        lambda: Dense(shape, (*shape[:-1], m := rng.randint(1, 4)), live(m, shape[-1])),
        lambda: Dense(shape, shape, live(shape[-1], shape[-1])),
    ]
    if len(shape) > 1:
        rest = (None,) * (len(shape) - 1)
        groups = rng.choice([g for g in (1, 2, shape[0]) if shape[0] % g == 0])
        out = groups * rng.randint(1, 2)
        k, s, d, p = rng.randint(1, 3), rng.randint(1, 2), rng.randint(1, 2), rng.randint(2, 4)
        choices += [
            lambda: Separable(shape, (2, *shape[1:]), (live(2, shape[0]), *rest)),
            lambda: conv(shape, out, k, s, p, d, groups),
            lambda: conv(shape, shape[0], 3, 1, d, d, groups),
            lambda: conv((2, *shape[1:]), shape[0], 3, 1, 1).T,
        ]
    return rng.choice(choices)()


def random_map(rng: random.Random, shape, depth: int = 2) -> LinearMap:
    """Products, sums and stacks, one in the other."""
    if depth == 0:
        return random_leaf(rng, shape)
    kind = rng.choice(["chain", "chain", "chain", "total", "stack", "turned"])
    if kind == "turned":
        map = random_map(rng, shape, depth - 1)
        return rng.choice([chain(map, map.T), map.T.T])
    if kind == "stack":
        return stack(*(random_map(rng, shape, depth - 1) for _ in range(2)))
    if kind == "chain":
        factors = [random_map(rng, shape, depth - 1)]
        while len(factors) < 3:
            factors.append(random_map(rng, factors[-1].out_shape, depth - 1))
        return chain(*factors)
    first = random_map(rng, shape, depth - 1)
    tries = (random_map(rng, shape, depth - 1) for _ in range(8))
    return total(first, *(m for m in tries if m.out_shape == first.out_shape))


# ---------------------------------------------------------------- hard cases for norms


def dense_of(weight):
    weight = torch.as_tensor(weight, dtype=torch.get_default_dtype())
    return Dense((weight.shape[1],), (len(weight),), weight.clone().requires_grad_())


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n))[0]


def with_singular_values(values, m, n):
    diagonal = torch.zeros(m, n)
    diagonal[torch.arange(len(values)), torch.arange(len(values))] = torch.as_tensor(values)
    return orthogonal(m) @ diagonal @ orthogonal(n)


def svd(map: LinearMap):
    """The norm, by the singular values of the dense matrix: the oracle."""
    return torch.linalg.svdvals(map.dense())[0]


HARD = {
    "zero": lambda: dense_of(torch.zeros(3, 4)),
    "1x1": lambda: dense_of([[-3.0]]),
    "1x1 zero": lambda: dense_of([[0.0]]),
    "fan-in 1": lambda: dense_of(torch.randn(5, 1)),
    "fan-out 1": lambda: dense_of(torch.randn(1, 5)),
    "rank one": lambda: dense_of(torch.outer(torch.randn(4), torch.randn(6))),
    "orthogonal": lambda: dense_of(orthogonal(6)),
    "orthogonal columns": lambda: dense_of(orthogonal(6)[:, :3]),
    "repeated": lambda: dense_of(with_singular_values([2.0, 2.0, 2.0, 1.0, 0.5], 5, 7)),
    "close": lambda: dense_of(with_singular_values([1.0, 1 - 1e-9, 0.3], 4, 3)),
    "decaying": lambda: dense_of(with_singular_values([10.0**-i for i in range(8)], 8, 8)),
    "nearly orthogonal": lambda: dense_of(with_singular_values([1 + 1e-9, 1, 1, 1, 1], 5, 5)),
    "nilpotent": lambda: dense_of(torch.diag(torch.ones(5), 1)),
    "blocks": lambda: dense_of(torch.block_diag(torch.ones(2, 2), 5 * torch.ones(3, 2))),
    "dead rows": lambda: dense_of(torch.cat([torch.zeros(2, 4), torch.randn(2, 4)])),
    "large": lambda: dense_of(torch.randn(40, 30)),
    "zero conv": lambda: zero_weights(conv((2, 4, 4), 3, 3, padding=1)),
    "identities": lambda: total(
        identity((2, 3)), index((2, 3), torch.arange(6).reshape(2, 3).flip(1))
    ),
    "copies, dense": lambda: chain(index((3,), [0, 0, 1, 2]), dense(2, 4)),
    "gaps, dense": lambda: chain(index((2,), [0, -1, 1]), dense(2, 3)),
    "crop, dense": lambda: chain(index((5,), [4, 1, 2]), dense(2, 3)),
    "dense, copies": lambda: chain(dense(3, 2), index((3,), [0, 0, 1, 2])),
    "dense, gaps": lambda: chain(dense(2, 3), index((2,), [0, -1, 1])),
    "dense, crop": lambda: chain(dense(5, 3), index((5,), [4, 1, 2])),
    "conv, bn": lambda: chain(conv((2, 4, 4), 3, 3, 2, 1), scale((3, 2, 2), 3, 1, 1)),
    "zero scale": lambda: Scale((2, 3), (2, 3), torch.zeros(2, 1)),
}


def detached(map):
    return replace(map, weight=map.weight.detach())


def zero_weights(map):
    return replace(map, weight=torch.zeros_like(map.weight).requires_grad_())


def each(strategies):
    return pytest.mark.parametrize("norm", strategies, ids=repr)
