"""Circular convolutions one after the other and added up: exact, frequency by frequency.

On a circular grid every convolution is a matrix a frequency, its symbol; compositions multiply
symbols and sums add them. A stride folds several frequencies of the input onto one of the output,
whose blocks stand side by side.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from lipcert.convolution import Conv
from lipcert.linear_kinds import Index, Scale
from lipcert.linear_map import Add, Composition, LinearMap
from lipcert.simplify import per_channel

_CHUNK_BYTES = 2**27


def is_circulant(map: LinearMap) -> bool:
    """Whether the map is made of circular convolutions and numbers a channel only.

    A zero padding of the input to a circular grid may come before: it keeps lengths, so the norm
    on the grid is a bound.
    """
    first, *others = _starts(map)
    same = all(
        start is first or (start and first and start.source.equal(first.source)) for start in others
    )
    return len(map.in_shape) > 1 and same and _circulant(map)


def _circulant(map: LinearMap, first: bool = True) -> bool:
    match map:
        case Conv():
            return map.circular
        case Scale():
            return per_channel(map) is not None
        case Index():
            return (map.is_reshape and map.in_shape == map.out_shape) or (first and _pads(map))
        case Composition():
            return all(_circulant(f, first and i == 0) for i, f in enumerate(map.factors))
        case Add():
            return all(_circulant(term, first) for term in map.terms)
        case _:
            return False


def _pads(map: Index) -> bool:
    same = len(map.in_shape) == len(map.out_shape) and map.in_shape[0] == map.out_shape[0]
    return same and bool((map.copies() == 1).all())


def _starts(map: LinearMap) -> Iterator[Index | None]:
    """For each term the embedding that it begins with, if it does."""
    match map:
        case Index() if not (map.is_reshape and map.in_shape == map.out_shape):
            yield map
        case Composition(factors=factors):
            yield from _starts(factors[0])
        case Add(terms=terms):
            for term in terms:
                yield from _starts(term)
        case _:
            yield None


def frequencies(map: LinearMap) -> Iterator[Float[Tensor, "f axes"]]:
    """The frequencies of the output's grid in chunks, half of them: the others are conjugate."""
    cells = map.out_shape[1:]
    ranges = [torch.arange(cells[0] // 2 + 1), *(torch.arange(m) for m in cells[1:])]
    index = torch.cartesian_prod(*ranges).reshape(-1, len(cells))
    # Converted before the division, which would round to the default precision.
    every = index.to(torch.float64) / torch.tensor(cells).to(torch.float64)
    inputs = map.in_shape[0] * math.prod(_strides(map))
    yield from every.to(map.like.device).split(
        max(1, _CHUNK_BYTES // (64 * map.out_shape[0] * inputs))
    )


def symbol(map: LinearMap, at: Float[Tensor, "f axes"]) -> Complex[Tensor, "f out in *aliases"]:
    """The matrices of a circulant map at some frequencies, in float64.

    Args:
        map: See `is_circulant`.
        at: Cycles per cell of the output's grid.

    Returns:
        For each frequency and each channel of output and input the coefficient of every input
        frequency that folds onto it: (at + a) / stride for a = 0, ..., stride - 1, axis by axis.
    """
    match map:
        case Conv():
            return _of_convolution(map, at)
        case Composition(factors=factors):
            result, fine = symbol(factors[-1], at), at
            folds = _strides(factors[-1])
            for factor in reversed(factors[:-1]):
                fine = folded(at, folds)
                inner = symbol(factor, fine.flatten(0, -2))
                result = _product(result, inner.unflatten(0, fine.shape[:-1]))
                folds = tuple(a * b for a, b in zip(folds, _strides(factor), strict=True))
            return result
        case Add(terms=terms):
            return torch.stack([symbol(term, at) for term in terms]).sum(0)
        case _:
            numbers = per_channel(map) if isinstance(map, Scale) else None
            numbers = at.new_ones(map.out_shape[0]) if numbers is None else numbers
            matrix = torch.diag(numbers.to(torch.complex128)).to(at.device)
            return matrix.reshape(1, *matrix.shape, *(1,) * at.shape[1]).expand(
                len(at), *(-1,) * (2 + at.shape[1])
            )


def products(map: LinearMap) -> float:
    """About how many complex multiplications the symbol takes at all frequencies."""
    match map:
        case Composition(factors=factors):
            last = map.out_shape[0]
            inner = (f.out_shape[0] * math.prod(f.in_shape) for f in factors[:-1])
            return sum(products(f) for f in factors) + last * sum(inner)
        case Add(terms=terms):
            return sum(products(term) for term in terms)
        case _:
            return 0.0


def folded(at: Float[Tensor, "f axes"], strides: tuple[int, ...]) -> Float[Tensor, "f *s axes"]:
    """The input frequencies that a stride folds onto each output frequency."""
    axes = [
        (at[:, axis, None] + torch.arange(s).to(at)) / s for axis, s in enumerate(strides)
    ]  # (f, s) an axis
    shape = len(at), *strides
    spread = [
        x.reshape(len(at), *(s if a == axis else 1 for a, s in enumerate(strides))).expand(shape)
        for axis, x in enumerate(axes)
    ]
    return torch.stack(spread, -1)


def _strides(map: LinearMap) -> tuple[int, ...]:
    """By how much the grid shrinks along each axis; paddings to the grid do not count."""
    match map:
        case Conv():
            return map.stride
        case Composition(factors=factors):
            return tuple(math.prod(s) for s in zip(*(_strides(f) for f in factors), strict=True))
        case Add(terms=terms):
            return _strides(terms[0])
        case _:
            return (1,) * (len(map.in_shape) - 1)


def _of_convolution(conv: Conv, at: Tensor) -> Tensor:
    fine = folded(at, conv.stride)
    taps = torch.tensor(list(itertools.product(*(range(k) for k in conv.kernel)))).to(at)
    before = torch.tensor([b for b, _ in conv.padding]).to(at)
    offsets = taps * torch.tensor(conv.dilation).to(at) - before
    angles = 2 * math.pi * (fine.flatten(0, -2) @ offsets.mT)
    phases = torch.polar(torch.ones_like(angles), angles) / math.prod(conv.stride) ** 0.5
    weight = conv.ungrouped().flatten(2).to(torch.complex128)
    matrices = torch.einsum("ft,oit->foi", phases, weight)
    return matrices.unflatten(0, fine.shape[:-1]).movedim(
        tuple(range(1, 1 + conv.axes)), tuple(range(-conv.axes, 0))
    )


def _product(outer: Tensor, inner: Tensor) -> Tensor:
    """The symbol of a composition: `outer` (f, o, m, *a), `inner` (f, *a, m, i, *b)."""
    axes = outer.ndim - 3
    letters = "abc"[:axes], "uvw"[:axes]
    a, b = letters
    pairs = "".join(y + x for x, y in zip(a, b, strict=True))  # the inner fold is the coarser one
    product = torch.einsum(f"fom{a},f{a}mi{b}->foi{pairs}", outer, inner)
    shape = [x * y for x, y in zip(outer.shape[3:], inner.shape[-axes:], strict=True)]
    return product.reshape(*product.shape[:3], *shape)
