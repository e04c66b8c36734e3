"""Power iteration: cheap, differentiable, and never a bound; for training."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.spectral.iterative import Iterative, Rows, Sweep, units


@dataclass(frozen=True)
class PowerIteration(Iterative):
    """||A v|| for v after some steps v <- A^T A v / ||A^T A v||: at most the norm of A.

    Attributes:
        steps: Steps a call. A bound keeps the vector between calls, so that one is enough in
            training.
    """

    steps: int = 1
    kept: ClassVar[int] = 1

    def __post_init__(self):
        if self.steps < 0:
            raise LipcertError(f"PowerIteration(steps={self.steps}): steps must not be negative.")

    def improve(self, apply: Sweep, adjoint: Sweep, state: Rows, order: Int[Tensor, " n"]) -> Rows:
        vectors = {key: rows[:, 0] for key, rows in state.items()}
        for _ in range(self.steps):
            images = {key: units(rows, None) for key, rows in apply(vectors).items()}
            better = adjoint(images)
            vectors = {key: units(better[key], old) for key, old in vectors.items()}
        return {key: rows[:, None] for key, rows in vectors.items()}
