"""The norm from closed forms and eigenvalues: upper, and equal to the largest singular value."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_kinds import Dense, Index, Scale, Separable
from lipcert.linear_map import Composition, LinearMap, Matrix, Transpose
from lipcert.simplify import simplify
from lipcert.spectral.strategy import Strategy, differentiable, wants_gradient

# Beyond this the Gram matrix alone takes more than 2 GB.
LARGEST_SIDE = 16384
_CHUNK_BYTES = 2**27


@dataclass(frozen=True)
class Exact(Strategy):
    """The largest singular value, in float64.

    Diagonal, copying and separable maps have closed forms. Any other map goes through the
    eigenvalues of A A^T or A^T A, whichever is smaller; time grows with the cube of that side.
    """

    kind: ClassVar[Kind] = Kind.UPPER

    def __call__(self, map: LinearMap) -> Constant:
        map = without_isometries(simplify(map.to(torch.float64)))
        closed = closed_form(map)
        if closed is not None:
            return Constant(closed, self.kind)
        side = min(map.in_size, map.out_size)
        if not isinstance(map, Dense | Matrix) and side > LARGEST_SIDE:
            raise LipcertError(
                f"Exact() needs the eigenvalues of a {side} x {side} matrix for the map "
                f"{map.in_shape} -> {map.out_shape}, more than its limit of {LARGEST_SIDE}. "
                "Use norm=Auto(), which takes the cheapest strategy that is a true bound."
            )
        wanted = wants_gradient(map)
        with torch.no_grad():
            gram, scale = scaled_gram(map)
            eigenvalues, vectors = _eigen(gram, vectors=wanted)
            value = scale * eigenvalues[-1].clamp(min=0).sqrt()
        if vectors is None:
            return Constant(value, self.kind)
        shape = map.in_shape if len(vectors) == map.in_size else map.out_shape
        return Constant(differentiable(value, map, vectors[:, -1].reshape(shape)), self.kind)


def _eigen(gram: Tensor, vectors: bool) -> tuple[Tensor, Tensor | None]:
    if not gram.isfinite().all():
        # Eigenvalue routines may raise or never return on these; NaN says "nothing is known".
        return gram.new_full((len(gram),), math.nan), None
    if vectors:
        values, basis = torch.linalg.eigh(gram)
        return values, basis
    return torch.linalg.eigvalsh(gram), None


def closed_form(map: LinearMap) -> Float[Tensor, ""] | None:
    """The norm of a diagonal, copying or separable map; None for other kinds."""
    match map:
        case Scale():
            return map.diagonal.abs().max()
        case Index():
            return map.copies().max().to(torch.float64).sqrt()
        case Separable():
            norms = [_matrix_norm(m) for m in map.matrices if m is not None]
            return torch.stack(norms).prod() if norms else torch.ones((), dtype=torch.float64)
        case Transpose():
            return closed_form(map.inner)
        case _:
            return None


def _matrix_norm(matrix: Tensor) -> Tensor:
    if not matrix.isfinite().all():
        return matrix.new_tensor(math.nan)
    return torch.linalg.matrix_norm(matrix, 2)


def without_isometries(map: LinearMap) -> LinearMap:
    """A map of the same norm without what does not matter to it.

    That is: reshapes, permutations and flips at its ends, and the leading axes of a dense map. On
    the output side a copying map may go if it copies every input exactly once; on the input side
    if no input is copied twice and none of its outputs is a constant zero.
    """
    factors = list(map.factors) if isinstance(map, Composition) else [map]
    while len(factors) > 1 and isinstance(last := factors[-1], Index) and _all_once(last):
        factors.pop()
    while len(factors) > 1 and isinstance(first := factors[0], Index) and _distinct(first):
        factors.pop(0)
    if len(factors) > 1:
        return Composition(factors[0].in_shape, factors[-1].out_shape, tuple(factors))
    only = factors[0]
    if isinstance(only, Dense):
        rows, columns = only.weight.shape
        return Dense((columns,), (rows,), only.weight)
    return only


def _all_once(index: Index) -> bool:
    return index.is_reshape or bool((index.copies() == 1).all())


def _distinct(index: Index) -> bool:
    return index.is_reshape or bool((index.source >= 0).all() and (index.copies() <= 1).all())


def scaled_gram(map: LinearMap) -> tuple[Float[Tensor, "n n"], Float[Tensor, ""]]:
    """G and s with s^2 G = A A^T or A^T A, whichever is smaller; s keeps squares in range."""
    if isinstance(map, Dense | Matrix):
        scale = nonzero(map.weight.abs().max())
        weight = map.weight / scale
        return (weight @ weight.mT if len(weight) < weight.shape[1] else weight.mT @ weight), scale
    on_input = map.in_size <= map.out_size
    forward, backward = (map.apply, map.adjoint) if on_input else (map.adjoint, map.apply)
    side = min(map.in_size, map.out_size)
    shape = map.in_shape if on_input else map.out_shape
    like = map.like
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn((1, side), generator=generator, dtype=like.dtype).to(like.device)
    scale = nonzero(forward(probe.reshape(1, *shape)).abs().max())
    gram = like.new_empty(side, side)
    chunk = max(1, _CHUNK_BYTES // (8 * max(map.in_size, map.out_size)))
    for begin in range(0, side, chunk):
        count = min(chunk, side - begin)
        basis = like.new_zeros(count, side)
        basis[torch.arange(count), begin + torch.arange(count)] = 1
        image = forward(basis.reshape(count, *shape)) / scale
        gram[begin : begin + count] = (backward(image) / scale).reshape(count, side)
    return (gram + gram.mT) / 2, scale


def nonzero(scale: Tensor) -> Tensor:
    """The scale to divide by: 1 for zero."""
    return scale.where(scale != 0, 1)
