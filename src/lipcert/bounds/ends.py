"""The last step of a bound: logits as rows acting on functions whose constants are known.

The logits are a sum of terms W g(x), each with a bound L of the Lipschitz constant of g. Then the
margin f_i - f_j has the constant sum L |W_i - W_j|: exact vector norms, whatever L is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.bounds.margin import MarginConstants
from lipcert.kinds import Constant, Kind, weakest


@dataclass(frozen=True)
class End:
    """One term of the logits.

    Attributes:
        reached: A Lipschitz constant of g; its failure probability counts all norms used for it.
        rows: W, `(classes, n)`; None for the identity.
    """

    reached: Constant
    rows: Float[Tensor, "classes n"] | None


def margins(classes: int, ends: Sequence[End], p: float) -> MarginConstants:
    """The constants of all pairs of logits, for distances in the l_p norm."""
    q = _dual(p)

    def row(wanted: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
        terms = [
            _distances(end.rows, wanted, classes, end.reached.value, q) * end.reached.value
            for end in ends
        ]
        return torch.stack(terms).sum(0)

    def alone() -> Float[Tensor, " c"]:
        return single_logits(classes, ends, p).value

    return MarginConstants(row, classes, *_claim(ends), p=p, alone=alone)


def single_logits(classes: int, ends: Sequence[End], p: float) -> Constant:
    """The constants of the single logits; `value` has shape `(classes,)`."""
    total = torch.zeros(classes, dtype=torch.float64, device=ends[0].reached.value.device)
    for end in ends:
        size = 1 if end.rows is None else torch.linalg.vector_norm(end.rows, _dual(p), dim=1)
        total = total + end.reached.value * size
    return Constant(total, *_claim(ends))


def _dual(p: float) -> float:
    """Q with |sum_k a_k b_k| <= |a|_q |b|_p."""
    return math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)


def _claim(ends: Sequence[End]) -> tuple[Kind, float]:
    """Kind and failure probability of a result; the last bound reached has counted every norm."""
    return (
        weakest(end.reached.kind for end in ends),
        max((end.reached.failure for end in ends), default=0.0),
    )


def _distances(
    rows: Float[Tensor, "classes n"] | None,
    wanted: Int[Tensor, " b"],
    classes: int,
    like: Tensor,
    q: float,
) -> Float[Tensor, "b classes"]:
    """|W_i - W_j|_q for the wanted i and every j, from the differences themselves.

    (Through W W^T equal rows would come out as a large number times the rounding error.)
    """
    if rows is None:  # the unit vectors
        other = torch.arange(classes, device=like.device) != wanted.to(like.device)[:, None]
        return 2 ** (1 / q) * other.to(like.dtype)
    wanted = wanted.to(rows.device)
    rows = rows.to(torch.promote_types(rows.dtype, like.dtype))
    if q == math.inf:  # where torch's own distances count the gradient of a tie once an entry
        each = [(rows - row).abs().amax(1) for row in rows]
        return torch.stack(each)[wanted]
    exactly = "donot_use_mm_for_euclid_dist"
    if len(rows) <= len(wanted):
        upper = torch.triu_indices(classes, classes, 1)
        every = rows.new_zeros(classes, classes).index_put(tuple(upper), torch.pdist(rows, q))
        return (every + every.mT)[wanted]
    return torch.cdist(rows[wanted], rows, q, exactly)
