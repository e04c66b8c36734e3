"""Lanczos with a random start: an upper bound that fails with a stated probability.

For maps whose matrix is too large: only apply and adjoint are used.

Let M = A^T A (or A A^T) be n x n with eigenvalues 1 = l_1 >= l_2 >= ... after scaling, b the unit
start and a its component along the first eigenvector. The Ritz value after k steps is the largest
Rayleigh quotient of p(M) b over polynomials p of degree k - 1. Take p <= 1 in size on [0, 1 - e]
and p(1) = T = T_(k-1)((1 + e) / (1 - e)), the scaled Chebyshev polynomial. Then
  sum_i (1 - e - l_i) p(l_i)^2 b_i^2 <= (1 - e) (1 - a^2) - e T^2 a^2,
and as soon as the right side is at most 0 the Ritz value is at least 1 - e, so that
  l_1 <= Ritz / (1 - e)    if    (1 - a^2) / a^2 <= T^2 e / (1 - e).
For a start uniform on the sphere the density of a is at most sqrt((n - 1) / (2 pi)) for n >= 3, so
|a| < p sqrt(pi / (2 (n - 1))) has a probability of at most p. That p is the failure probability.
In the spirit of Kuczynski and Wozniakowski 1992, who get slightly better constants.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_map import LinearMap, Shape
from lipcert.simplify import simplify
from lipcert.spectral.exact import Exact, closed_form
from lipcert.spectral.strategy import Strategy, differentiable

Product = Callable[[Float[Tensor, "b ..."]], Float[Tensor, "b ..."]]


@dataclass(frozen=True)
class Lanczos(Strategy):
    """Lanczos in float64 with full reorthogonalisation, inflated by the proof in this file.

    Attributes:
        failure: Probability that the value is below the norm.
        steps: Applications of the map and its adjoint. 100 steps cost about 1 % of slack at
            n = 10,000 and failure 1e-9; the slack falls with the square of the steps.
    """

    failure: float = 1e-9
    steps: int = 100
    kind: ClassVar[Kind] = Kind.PROBABILISTIC

    def __post_init__(self):
        if not 0 < self.failure < 1:
            raise LipcertError(f"Lanczos(failure={self.failure}): must lie between 0 and 1.")
        if self.steps < 2:
            raise LipcertError(f"Lanczos(steps={self.steps}): steps must be at least 2.")

    def __call__(self, map: LinearMap) -> Constant:
        map = simplify(map.to(torch.float64))
        side = min(map.in_size, map.out_size)
        if side <= self.steps or closed_form(map) is not None:
            return Exact()(map)  # as many steps as dimensions find the norm itself
        with torch.no_grad():
            product, shape = gram_product(map)
            ritz, vectors = largest_ritz(product, random_starts(1, shape, map.like), self.steps)
            if not ritz.isfinite().all():
                return Constant(ritz[0], self.kind, self.failure)
            value = self.inflated(ritz[0], side)
        return Constant(differentiable(value, map, vectors[0]), self.kind, self.failure)

    def inflated(self, ritz: Tensor, side: int) -> Tensor:
        """The bounds on the norm that Ritz values of the Gram matrix of this side give."""
        return (ritz.clamp(min=0) / (1 - relative_gap(side, self.steps, self.failure))).sqrt()


def relative_gap(n: int, steps: int, failure: float) -> float:
    """The smallest e (by bisection, rounded up) for which the proof of this file holds."""
    overlap = failure * math.sqrt(math.pi / (2 * (n - 1)))
    needed = math.log((1 - overlap**2) / overlap**2)

    def reached(e: float) -> float:
        chebyshev = (steps - 1) * math.acosh((1 + e) / (1 - e))
        log_t = chebyshev + math.log1p(math.exp(-2 * chebyshev)) - math.log(2)
        return 2 * log_t + math.log(e / (1 - e))

    low, high = 1e-15, 1 - 1e-15
    while high - low > 1e-12 * high:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reached(middle) >= needed else (middle, high)
    return high


def gram_product(
    map: LinearMap, columns: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Product, Shape]:
    """The product of x with B^T B, or B B^T where that is smaller, and the shape of one x.

    B is diag(rows) A diag(columns), with its own weights for each x of the batch: `columns`
    `(b, *in_shape)` and `rows` `(b, *out_shape)`, ones if None.
    """

    def times(x: Tensor, weights: Tensor | None) -> Tensor:
        return x if weights is None else x * weights

    def from_input(x: Tensor) -> Tensor:
        image = times(times(map.apply(times(x, columns)), rows), rows)
        return times(map.adjoint(image), columns)

    def from_output(y: Tensor) -> Tensor:
        image = times(times(map.adjoint(times(y, rows)), columns), columns)
        return times(map.apply(image), rows)

    if map.in_size <= map.out_size:
        return from_input, map.in_shape
    return from_output, map.out_shape


def random_starts(count: int, shape: Shape, like: Tensor) -> Float[Tensor, "b ..."]:
    """Unit vectors, each uniform on the sphere and independent of the others."""
    starts = torch.randn(count, math.prod(shape), dtype=like.dtype, device=like.device)
    return (starts / torch.linalg.vector_norm(starts, dim=1, keepdim=True)).reshape(-1, *shape)


def largest_ritz(
    product: Product, start: Float[Tensor, "b ..."], steps: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b ..."]]:
    """The largest Ritz values of a batch of positive semidefinite matrices, and unit vectors.

    A matrix whose subspace becomes invariant goes on with zeros, which add eigenvalues 0 only.

    Args:
        product: From one vector a matrix to the products.
        start: Unit vectors.
        steps: Dimension of the subspaces.
    """
    count, shape = len(start), start.shape[1:]
    size = math.prod(shape)
    basis = start.new_zeros(count, steps, size)
    basis[:, 0] = start.flatten(1)
    tridiagonal = start.new_zeros(count, steps, steps)
    for k in range(steps):
        vector = basis[:, k]
        image = product(vector.reshape(count, *shape)).flatten(1)
        tridiagonal[:, k, k] = (vector * image).sum(1)
        if k == steps - 1:
            break
        known = basis[:, : k + 1]
        for _ in range(2):  # twice is enough to keep the basis orthogonal to rounding
            image = image - ((known @ image[:, :, None]).mT @ known)[:, 0]
        norm = torch.linalg.vector_norm(image, dim=1)
        going = norm > 1e-14 * tridiagonal[:, 0, 0].abs()  # else an invariant subspace, or NaN
        if not going.any():
            break
        norm = norm.where(going, 0)
        tridiagonal[:, k, k + 1] = tridiagonal[:, k + 1, k] = norm
        basis[:, k + 1] = torch.where(going[:, None], image / norm[:, None], 0)
    finite = tridiagonal.isfinite().all(-1).all(-1)
    values, vectors = torch.linalg.eigh(tridiagonal.where(finite[:, None, None], 0))
    top = (vectors[:, None, :, -1] @ basis)[:, 0]
    length = torch.linalg.vector_norm(top, dim=1)
    vector = torch.where(length[:, None] > 0, top / length[:, None], basis[:, 0])
    return values[:, -1].where(finite, math.nan), vector.reshape(start.shape)
