"""Power iteration: cheap, differentiable, and never a bound; for training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_map import LinearMap
from lipcert.spectral.strategy import Strategy

Key = TypeVar("Key")
Rows = dict[Key, Float[Tensor, "k ..."]]


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
        norms, rows = self.refine_many(
            lambda rows: {0: map.apply(rows[0])},
            lambda rows: {0: map.adjoint(rows[0])},
            {0: vector[None]},
        )
        return Constant(norms[0][0], self.kind), rows[0][0]

    def refine_many(
        self,
        apply: Callable[[Rows], Rows],
        adjoint: Callable[[Rows], Rows],
        vectors: Rows,
    ) -> tuple[dict[Key, Float[Tensor, " k"]], Rows]:
        """The norms of many maps at once, each row of `vectors` belonging to one map.

        Args:
            apply: A v of every map; its rows may stand under other keys and in another order.
            adjoint: From that layout back: A^T y of every map.
            vectors: Unit vectors to start from.

        Returns:
            The norm of each row of what `apply` returns, and better vectors.
        """
        with torch.no_grad():
            for _ in range(self.steps):
                images = {key: _units(rows, None) for key, rows in apply(vectors).items()}
                back = adjoint(images)
                vectors = {key: _units(back[key], old) for key, old in vectors.items()}
        return {key: _norms(rows) for key, rows in apply(vectors).items()}, vectors


def _norms(rows: Tensor) -> Tensor:
    """In float64: in float32, squares of 1e-30 are zero and those of 1e30 infinite."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float64).to(rows)


def _units(rows: Tensor, fallback: Tensor | None) -> Tensor:
    """The rows x / ||x||; where that is 0/0, the fallback (or x) instead. No synchronisation."""
    norms = _norms(rows)
    ok = (norms > 0) & norms.isfinite()
    shape = (-1, *(1,) * (rows.ndim - 1))
    units = rows / norms.where(ok, 1).reshape(shape)
    return units if fallback is None else units.where(ok.reshape(shape), fallback)
