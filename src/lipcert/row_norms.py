"""Euclidean norms of the rows of a linear map: how far one output moves for an L2 step.

Output i of A x changes by at most ||A_i|| r when x moves by r.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.convolution import Conv
from lipcert.linear_kinds import Dense, Index, Scale, Separable
from lipcert.linear_map import Add, Composition, LinearMap, Matrix, Stack, Transpose
from lipcert.simplify import simplify

# Entries of the largest matrix that is built for its rows: 32 MB.
LARGEST_MATRIX = 2**22


def row_norms(map: LinearMap) -> Float[Tensor, "..."] | None:
    """The norm of every row of the matrix of a map, or a number above it; cheap.

    Exact for matrices and convolutions, at their borders too; above it for sums. Differentiable in
    the weights; the gradient of a row of zeros is zero.

    Returns:
        A tensor that broadcasts to `out_shape`, with the precision and device of the weights; None
        where only a matrix of more than `LARGEST_MATRIX` entries would tell.
    """
    map = simplify(map)
    norms = _row_norms(map)
    return None if norms is None else norms.to(map.like)


def _row_norms(map: LinearMap) -> Tensor | None:
    norms = None
    match map:
        case Dense():
            return _norms(map.weight)
        case Matrix():
            return _norms(map.weight).reshape(map.out_shape)
        case Scale():
            return map.diagonal.abs()
        case Index():
            return (map.source >= 0).to(torch.float64)
        case Separable():
            return _outer(map)
        case Conv() if not map.taps_meet:
            return _of_convolution(map)
        case Transpose(inner=inner):
            norms = _column_norms(inner)
        case Stack():
            norms = _together(map)
        case Add():
            parts = [_row_norms(term) for term in map.terms]
            norms = None if any(p is None for p in parts) else _sum(parts)  # type: ignore[arg-type]
        case Composition():
            norms = _of_one_factor(map)
    if norms is None and map.in_size * map.out_size <= LARGEST_MATRIX:
        return _norms(map.dense()).reshape(map.out_shape)
    return norms


def _norms(rows: Float[Tensor, "m n"]) -> Float[Tensor, " m"]:
    """The norms of rows, each divided by its largest entry so that squares stay in range."""
    largest = rows.detach().abs().amax(1)
    largest = largest.where(largest != 0, 1)
    return largest * torch.linalg.vector_norm(rows / largest[:, None], dim=1)


def filter_norms(map: Conv) -> Float[Tensor, "out *ones"]:
    """The norms of whole filters: of rows that no border cuts, and above those of others."""
    return _norms(map.weight.flatten(1)).reshape(-1, *(1,) * map.axes)


def _of_convolution(map: Conv) -> Tensor:
    """At borders only a part of a filter counts: the squares that meet the input are summed."""
    whole = filter_norms(map)
    scale = whole.detach().where(whole != 0, 1)
    squares = (map.weight / scale[:, None]).square()
    ones = squares.new_ones(1, *map.in_shape)
    sums = dataclasses.replace(map, weight=squares).apply(ones)[0]
    return scale * sums.where(sums > 0, 1).sqrt() * (sums > 0)


def _outer(map: Separable) -> Tensor:
    """The rows of a Kronecker product are Kronecker products of rows."""
    axes = len(map.out_shape)
    total = torch.ones((1,) * axes, dtype=map.like.dtype, device=map.like.device)
    for axis, matrix in enumerate(map.matrices):
        if matrix is not None:
            total = total * _norms(matrix).to(total).reshape(-1, *(1,) * (axes - 1 - axis))
    return total


def _column_norms(map: LinearMap) -> Tensor | None:
    """The norms of the columns where they are as cheap as the rows; `Dense` never gets here."""
    match map:
        case Matrix():
            return _norms(map.weight.mT).reshape(map.in_shape)
        case Index():
            return map.copies().to(torch.float64).sqrt().reshape(map.in_shape)
        case Separable():
            return _outer(map.transposed())
        case _:
            return None


def _together(map: Stack) -> Tensor | None:
    like, norms = map.like, []
    for part in map.parts:
        norm = _row_norms(part)
        if norm is None:
            return None
        norms.append(norm.to(like).expand(part.out_shape).flatten())
    return torch.cat(norms).reshape(map.out_shape)


def _sum(parts: list[Tensor]) -> Tensor:
    """||a + b|| <= ||a|| + ||b||."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def _of_one_factor(map: Composition) -> Tensor | None:
    """The rows of the one factor that is no copying and no scaling.

    What comes after it moves, copies or scales its rows. A scale before it stretches each row by
    at most its largest number, an index that copies no input twice stretches none.
    """
    inner = [f for f in map.factors if not isinstance(f, Index | Scale)]
    if len(inner) > 1:
        return None
    at = map.factors.index(inner[0]) if inner else 0
    norms = _row_norms(map.factors[at])
    if norms is None:
        return None
    like = map.like
    norms = norms.to(like)
    for factor in map.factors[:at]:
        if isinstance(factor, Scale):
            norms = norms * factor.diagonal.abs().max().to(like)
        elif isinstance(factor, Index) and (factor.copies() > 1).any():
            return None
    shape = map.factors[at].out_shape
    for factor in map.factors[at + 1 :]:
        if isinstance(factor, Scale):
            norms = norms * factor.diagonal.abs().to(like)
        elif isinstance(factor, Index):
            norms = factor.apply(norms.expand(shape)[None])[0]
        shape = factor.out_shape
    return norms
