"""Power iteration: cheap, differentiable, and never a bound; for training."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_map import LinearMap
from lipcert.spectral.strategy import Strategy


@dataclass(frozen=True)
class PowerIteration(Strategy):
    """||A v|| for v after some steps v <- A^T A v / ||A^T A v||: at most the norm of A.

    The steps run without gradient; the last application is differentiated, which gives the
    gradient u^T dA v of the norm at the singular vectors found. The vector is never taken from the
    loss, so it survives batches without a gradient, and a map that becomes zero keeps the old one.

    Attributes:
        steps: Steps a call. A bound keeps the vector between calls, so that one is enough in
            training.
    """

    steps: int = 1
    kind: ClassVar[Kind] = Kind.ESTIMATE

    def __post_init__(self):
        if self.steps < 0:
            raise LipcertError(f"PowerIteration(steps={self.steps}): steps must not be negative.")

    def start(self, map: LinearMap) -> Tensor:
        like = map.like
        vector = torch.randn(map.in_shape, dtype=like.dtype, device=like.device)
        return vector / torch.linalg.vector_norm(vector)

    def __call__(self, map: LinearMap) -> Constant:
        return self.refine(map, self.start(map))[0]

    def refine(self, map: LinearMap, vector: Tensor) -> tuple[Constant, Tensor]:
        with torch.no_grad():
            for _ in range(self.steps):
                vector = _unit(map.adjoint(_unit(map.apply(vector[None]), None)), vector)
        norm = _norm(map.apply(vector[None]))
        return Constant(norm, self.kind), vector


def _norm(x: Tensor) -> Tensor:
    """In float64: in float32, squares of 1e-30 are zero and those of 1e30 infinite."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).to(x)


def _unit(x: Tensor, fallback: Tensor | None) -> Tensor:
    """The vector x / ||x||; where that is 0/0, the fallback (or x) instead. No synchronisation."""
    norm = _norm(x)
    ok = (norm > 0) & norm.isfinite()
    unit = x / norm.where(ok, 1)
    return unit if fallback is None else unit[0].where(ok, fallback)
