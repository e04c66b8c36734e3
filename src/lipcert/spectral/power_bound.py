"""LMT's evaluation norm: power iteration with its error term, from many random starts.

Let M = A^T A be n x n with largest eigenvalue m, x a unit start with a^2 >= 1 / n of its mass along
an eigenvector of m, l' and l the last two values of |M x|. The mass along that eigenvector never
falls from step to step, and l^2 l'^2 - l'^4 is a variance of the spectrum as x sees it, so
  (m - l')^2 <= n |l - l'| l' / 2,
which is the tight form m <= l' + sqrt(n |l - l'| l' / 2). The paper adds to l the root e of
e^2 = n |l - l'| (l + e) instead, which is larger. For a start uniform on the sphere the density of
a is at most sqrt((n - 1) / (2 pi)) (n >= 3), so a^2 < 1 / n with probability at most sqrt(2 / pi),
and all starts fail with that to the power of their number.

Reference: arXiv 1802.04034, appendix on the computation of spectral norms; Friedman 1998.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_map import LinearMap
from lipcert.simplify import simplify
from lipcert.spectral.exact import Exact
from lipcert.spectral.strategy import Strategy

_SMALLEST = 3  # sides below have no such density


@dataclass(frozen=True)
class PowerBound(Strategy):
    """Power iteration in float64 plus its error term; the largest over the starts.

    `Lanczos` costs a fraction of it at about a percent of slack; this one is there to compare.

    Attributes:
        starts: Random starts; the failure probability is at most 0.798 to this power.
        steps: Iterations.
        tight: The tight error term instead of the paper's.
    """

    starts: int = 128
    steps: int = 1000
    tight: bool = True
    kind: ClassVar[Kind] = Kind.PROBABILISTIC

    def __post_init__(self):
        if self.starts < 1 or self.steps < 2:
            raise LipcertError(f"{self}: needs at least 1 start and 2 steps.")

    def __call__(self, map: LinearMap) -> Constant:
        map = simplify(map.to(torch.float64))
        if map.in_size < _SMALLEST or not map.tensors():
            return Exact()(map)
        failure = math.sqrt(2 / math.pi) ** self.starts
        with torch.no_grad():
            like = map.like
            x = torch.randn(self.starts, *map.in_shape, dtype=like.dtype, device=like.device)
            before = now = x.new_zeros(self.starts)
            for _ in range(self.steps):
                norm = x.flatten(1).norm(dim=1).reshape(-1, *(1,) * len(map.in_shape))
                x = map.adjoint(map.apply(x / norm.where(norm != 0, 1)))
                before, now = now, x.flatten(1).norm(dim=1)
            change = map.in_size * (now - before).abs()
            if self.tight:
                bound = before + (change * before / 2).sqrt()
            else:
                bound = now + (change + (change * (4 * now + change)).sqrt()) / 2
            return Constant(bound.max().sqrt(), self.kind, failure)
