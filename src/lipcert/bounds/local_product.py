"""The product bound around samples: norms of maps without the units that are constant there.

Each affine piece counts the norm of diag(needed) W diag(weights): what is used of its output, what
can change of its input, see `around`. An activation counts its steepest slope.

Reference: arXiv 2111.01395 (Local-Lip), section 3; here for any graph and any activation.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds.around import Around
from lipcert.bounds.local_ends import BoxedEnd, boxed
from lipcert.graph import Affine, Concat, Graph, Input, Lipschitz, Node, Slope, Sum
from lipcert.kinds import Constant, Kind, weakest
from lipcert.linear_map import LinearMap
from lipcert.region import L2Ball
from lipcert.spectral import Iterative

MaskedNorm = Callable[[Node, LinearMap, Tensor | None, Tensor | None], Constant]


class LocalProduct:
    """The product bound of one batch.

    Args:
        graph: The graph.
        x: The samples, in the precision to work in.
        ball: The region.
        radii: Radius around each sample, `(b,)`.
        norm: Gives the norms of an affine node's map for each sample, from what can change at its
            input and what is needed of its output.
        everywhere: The global bound up to a node.

    Attributes:
        around: The boxes.
    """

    def __init__(
        self,
        graph: Graph,
        x: Float[Tensor, "b ..."],
        ball: L2Ball,
        radii: Float[Tensor, " b"],
        norm: MaskedNorm,
        everywhere: Callable[[Node], Constant],
    ):
        self._norm = norm
        self._reached: dict[Node, Constant] = {}
        self._failure = 0.0  # the union over every norm so far
        reach = self.reached if ball.progressive else everywhere
        self.around = Around(graph, x, ball, radii, lambda n: reach(n).value.to(x))
        self._ones = torch.ones_like(radii)

    def reached(self, n: Node) -> Constant:
        """The bound from the input to what matters of a node; `value` has shape `(b,)`."""
        if n not in self._reached:
            before = [self.reached(i) for i in n.inputs]
            values = [b.value for b in before]
            kinds = [b.kind for b in before]
            match n.op:
                case Input():
                    value = self._ones
                case Affine():
                    weights = self.around.weights(n.inputs[0])
                    gain = self._norm(n, self.around.map(n), weights, self.around.needed(n))
                    kinds.append(gain.kind)
                    self._failure += gain.failure
                    value = gain.value * values[0]
                case Slope():
                    value = self.around.gain(n) * values[0]
                case Lipschitz(constant=constant, kind=kind):
                    kinds.append(kind)
                    value = torch.as_tensor(constant()).to(values[0]) * values[0]
                case Sum():
                    value = torch.stack(values).sum(0)
                case Concat():
                    value = torch.linalg.vector_norm(torch.stack(values), dim=0)
            kind = weakest(kinds) if kinds else Kind.UPPER
            self._reached[n] = Constant(value, kind, min(1.0, self._failure))
        return self._reached[n]

    def ends(self) -> list[BoxedEnd]:
        """The terms of the logits, each with its box."""
        return boxed(self.around, self.reached)


def iterated_norms(
    norm: Iterative,
    map: LinearMap,
    columns: Float[Tensor, "b ..."] | None,
    rows: Float[Tensor, "b ..."] | None,
    state: Float[Tensor, "b kept ..."],
) -> tuple[Constant, Tensor]:
    """Estimates of the norms of diag(rows) A diag(columns) for each sample, and better states."""

    def times(weights: Tensor | None, x: Tensor) -> Tensor:
        return x if weights is None else x * weights

    norms, better = norm.refine_many(
        lambda v: {0: times(rows, map.apply(times(columns, v[0])))},
        lambda y: {0: times(columns, map.adjoint(times(rows, y[0])))},
        {0: state},
        torch.arange(len(state), device=state.device),
    )
    return Constant(norms[0], norm.kind), better[0]
