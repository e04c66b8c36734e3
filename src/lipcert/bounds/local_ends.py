"""The last step of a local bound: logits as rows acting on functions known around each sample.

As in `ends`, the logits are a sum of terms W g(x). Around a sample some entries of g may not move
at all, and g as a whole is known to stay in a box: then the largest fall of a margin in the whole
ball is that of a linear function in a ball and a box.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.bounds.around import Around
from lipcert.bounds.ball_box import ball_box
from lipcert.bounds.margin import MarginConstants
from lipcert.bounds.tail import rows_of, tail
from lipcert.graph import Box, Node
from lipcert.kinds import Constant, Kind, weakest


@dataclass(frozen=True)
class LocalEnd:
    """One term of the logits around each of b samples.

    Attributes:
        reached: A Lipschitz constant of g, `(b,)`; its failure probability counts all norms used.
        rows: W, the same for all samples or one for each.
        weights: How much of each entry of g can change, between 0 and 1; None for all 1.
    """

    reached: Constant
    rows: Float[Tensor, "*b classes n"]
    weights: Float[Tensor, "b n"] | None = None

    def differences(self, wanted: Int[Tensor, " b"]) -> Float[Tensor, "b classes n"]:
        """W_j - W_i for i the wanted class of each sample."""
        wanted = wanted.to(self.rows.device)
        if self.rows.ndim == 2:
            return self.rows - self.rows[wanted][:, None]
        return self.rows - self.rows[torch.arange(len(wanted)), wanted][:, None]

    def changing(self, vectors: Float[Tensor, "b classes n"]) -> Float[Tensor, "b classes n"]:
        """Vectors without the parts that act on what cannot change."""
        return vectors if self.weights is None else vectors * self.weights[:, None]

    def constants(self, vectors: Float[Tensor, "b classes n"]) -> Float[Tensor, "b classes"]:
        """Lipschitz constants of vectors acting on g."""
        return (
            torch.linalg.vector_norm(self.changing(vectors), dim=-1) * self.reached.value[:, None]
        )


@dataclass(frozen=True, kw_only=True)
class EllipsoidEnd(LocalEnd):
    """A term of which an ellipsoid is known: d g d g^T <= S |dx|^2 for the changes of g.

    Attributes:
        basis: Orthonormal columns Q that span the rows.
        factor: F with Q^T S Q = F F^T for each sample.
        rest: A root of a number above S for each sample: for what rounding leaves outside of Q.
    """

    basis: Float[Tensor, "n k"]
    factor: Float[Tensor, "b k m"]
    rest: Float[Tensor, " b"]

    def constants(self, vectors: Float[Tensor, "b classes n"]) -> Float[Tensor, "b classes"]:
        """The root of v^T S v; differences come as one vector, so that nothing cancels."""
        inside = vectors @ self.basis
        outside = torch.linalg.vector_norm(vectors - inside @ self.basis.mT, dim=-1)
        known = torch.linalg.vector_norm(inside @ self.factor, dim=-1)
        return known + outside * self.rest[:, None]


@dataclass(frozen=True)
class BoxedEnd:
    """A term of which a box is known.

    Attributes:
        end: The term.
        box: Ends of g(x') - g(x) in the ball around each sample, `(b, n)` each.
    """

    end: LocalEnd
    box: Box


def boxed(around: Around, reached: Callable[[Node], Constant]) -> list[BoxedEnd]:
    """The logits as rows acting on nodes, each with its box and what reaches it."""
    found = []
    for map, source in tail(around.graph.output):
        constant, weights, centre = reached(source), around.weights(source), around.centre(source)
        lower, upper = ((end - centre).flatten(1) for end in around.box(source))
        rows = rows_of(map, source).to(constant.value)
        end = LocalEnd(constant, rows, None if weights is None else weights.flatten(1))
        found.append(BoxedEnd(end, (lower, upper)))
    return found


def local_margins(
    classes: int,
    ends: Sequence[LocalEnd],
    boxed: Sequence[BoxedEnd],
    around: Around,
) -> MarginConstants:
    """The constants of all pairs of logits around each sample, and their falls in the whole ball.

    Args:
        classes: Number of logits.
        ends: The terms that give the constants.
        boxed: The same logits as terms with boxes, which give the falls.
        around: The boxes.
    """

    def row(wanted: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
        terms = [end.constants(end.differences(wanted)) for end in ends]
        return torch.stack(terms).sum(0)

    def drop(wanted: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
        falls = [
            ball_box(b.end.differences(wanted), *b.box, b.end.reached.value * around.radii)
            for b in boxed
        ]
        return torch.stack(falls).sum(0)

    kind, failure = _claim([*ends, *(b.end for b in boxed)])
    return MarginConstants(
        *(row, classes, kind, failure, len(around.radii), around.radii),
        drop=drop,
        around=around,
        alone=lambda: local_logits(ends).value,
    )


def local_logits(ends: Sequence[LocalEnd]) -> Constant:
    """The constants of the single logits around each sample; `value` has shape `(b, classes)`."""
    terms = []
    for end in ends:
        rows = end.rows.expand(len(end.reached.value), *end.rows.shape[-2:])
        terms.append(end.constants(rows))
    return Constant(torch.stack(terms).sum(0), *_claim(ends))


def _claim(ends: Sequence[LocalEnd]) -> tuple[Kind, float]:
    """Kind and failure probability; each end's bound has counted every norm before it."""
    return (
        weakest(end.reached.kind for end in ends),
        max((end.reached.failure for end in ends), default=0.0),
    )
