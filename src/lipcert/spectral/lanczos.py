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
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_map import LinearMap
from lipcert.simplify import simplify
from lipcert.spectral.exact import Exact, closed_form
from lipcert.spectral.strategy import Strategy, differentiable


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
            ritz, vector = _largest_ritz(map, self.steps)
            if not ritz.isfinite():
                return Constant(ritz, self.kind, self.failure)
            excess = relative_gap(side, self.steps, self.failure)
            value = (ritz.clamp(min=0) / (1 - excess)).sqrt()
        return Constant(differentiable(value, map, vector), self.kind, self.failure)


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


def _largest_ritz(map: LinearMap, steps: int) -> tuple[Tensor, Tensor]:
    """The largest Ritz value of A^T A (or A A^T, if smaller) and its unit vector."""
    on_input = map.in_size <= map.out_size
    forward, backward = (map.apply, map.adjoint) if on_input else (map.adjoint, map.apply)
    shape = map.in_shape if on_input else map.out_shape
    like = map.like
    vector = torch.randn(math.prod(shape), dtype=like.dtype, device=like.device)
    basis = [vector / torch.linalg.vector_norm(vector)]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    while True:
        image = backward(forward(basis[-1].reshape(1, *shape))).flatten()
        diagonal.append(basis[-1] @ image)
        if len(basis) == steps:
            break
        stacked = torch.stack(basis)
        for _ in range(2):  # twice is enough to keep the basis orthogonal to rounding
            image = image - (stacked @ image) @ stacked
        norm = torch.linalg.vector_norm(image)
        if not norm > 1e-14 * diagonal[0].abs():  # an invariant subspace, or NaN
            break
        beside.append(norm)
        basis.append(image / norm)
    tridiagonal = torch.diag(torch.stack(diagonal))
    if beside:
        side = torch.stack(beside[: len(diagonal) - 1])
        tridiagonal += torch.diag(side, 1) + torch.diag(side, -1)
    if not tridiagonal.isfinite().all():
        return tridiagonal.new_tensor(math.nan), basis[0].reshape(shape)
    values, vectors = torch.linalg.eigh(tridiagonal)
    top = vectors[:, -1] @ torch.stack(basis)
    return values[-1], (top / torch.linalg.vector_norm(top)).reshape(shape)
