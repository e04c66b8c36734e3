"""Kinds of truth: what a number claims, carried by every constant, bound and certificate."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


class Kind(StrEnum):
    """What a constant claims about the true one.

    `UPPER`: never below it (in real arithmetic). `PROBABILISTIC`: never below it but for a stated
    failure probability. `ESTIMATE`: close to it, from an unknown side; it proves nothing.
    """

    UPPER = "upper"
    PROBABILISTIC = "probabilistic"
    ESTIMATE = "estimate"


def weakest(kinds: Iterable[Kind]) -> Kind:
    """The kind of a result computed from parts of these kinds (upper when there are none)."""
    order = list(Kind)
    return max(kinds, key=order.index, default=Kind.UPPER)


@dataclass(frozen=True)
class Constant:
    """A spectral norm or Lipschitz constant with what it claims.

    Attributes:
        value: The plain number, a scalar tensor (differentiable in live weights).
        kind: What the number claims.
        failure: Probability that the claim is false; 0 unless `kind` is probabilistic.
    """

    value: Tensor
    kind: Kind
    failure: float = 0.0

    def __float__(self) -> float:
        return float(self.value.detach())

    def __repr__(self) -> str:
        failure = f", failure={self.failure:.1e}" if self.failure else ""
        value = f"{float(self):.6g}" if self.value.ndim == 0 else str(self.value.detach().tolist())
        return f"Constant({value}, {self.kind}{failure})"
