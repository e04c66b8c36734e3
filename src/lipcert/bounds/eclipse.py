"""The Eclipse bound: the ellipsoid bound with one multiplier a node, from both ends of a chain."""

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds.chain import Backwards, chain, lazily, values_within
from lipcert.bounds.ellipsoid import Ellipsoid
from lipcert.bounds.extent import APART, Gains, Moving
from lipcert.bounds.margin import MarginConstants, evaluating
from lipcert.bounds.tail import rows_of, tail
from lipcert.bounds.tightest import least, tightest_pairs
from lipcert.graph import Graph, Node
from lipcert.kinds import Constant
from lipcert.spectral import Strategy

LARGEST_BACKWARDS = 1024
"""Networks with nodes of more values than this are followed from the input only."""


def one_number(moving: Moving) -> Float[Tensor, " m"]:
    """One multiplier for all neurons of a node: those of ECLipsE-Fast where slopes are alike.

    With S <= s the ellipsoid after a function of slopes c - r .. c + r is within the ball of
    g r^2 + c^2 s g / (g - s), least at g = s (1 + |c| / r), and then s (|c| + r)^2; for the largest
    |c| and r of the node. Slopes from 0 on give g = 2 s. More is taken where entries beside these
    neurons are stretched more than they are themselves.
    """
    top = moving.top()
    own = top * moving.middle.abs().max() / moving.half.max()
    apart = torch.maximum(own, APART * top)
    stretched, added = moving.stretched.sum(), moving.added.sum()
    if bool((stretched > 0) & (added > 0)):
        apart = torch.maximum(apart, (stretched / added).sqrt())
    return (top + apart).expand(len(moving.half))


class Eclipse(Ellipsoid):
    """ECLipsE-Fast for any graph: `Ellipsoid` with one number a node in place of one a neuron.

    It is the better one for layers that are nearly orthogonal, and never above the product of the
    norms on chains of layers whose slopes are alike.

    On a chain (affine maps and elementwise functions one after the other, none of more than 1024
    outputs) it also runs from the rows of each pair of logits back to the input, as the transposed
    network has the same norm; both meet at the node where this gives least. Pairs are computed
    when they are asked for. For training (`every`) it runs from the input only.

    Args:
        graph: A traced network.
        norm: As for `Ellipsoid`.
        every: As for `Ellipsoid`.

    Reference: arXiv 2404.04375 (ECLipsE-Fast); other slopes, graphs and meetings: this library.
    """

    def __init__(self, graph: Graph, norm: Strategy | None = None, every: int | None = None):
        super().__init__(graph, norm, every=every)

    def per_output(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """Lipschitz constants of the single logits, see `Bound`."""
        forwards, ends = super().per_output(), self._backwards()
        if ends is None:
            return forwards
        backwards, rows = ends
        with evaluating(self.graph):
            each = torch.stack([backwards.rows(row[None]).value for row in rows])
        return least([forwards, Constant(each, forwards.kind)])

    def prefix(
        self,
        upto: Node | str,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """A Lipschitz constant of the function from the input to a node, see `Bound`."""
        target = self.graph.node(upto) if isinstance(upto, str) else upto
        forwards, nodes = super().prefix(target), self._chain(target)
        if nodes is None:
            return forwards
        with evaluating(self.graph):
            return least([forwards, Backwards(self._facts(), nodes).whole()])

    def _gains(self, n: Node) -> Gains:
        return one_number

    def _margins(self) -> MarginConstants:
        forwards, ends = super()._margins(), self._backwards()
        if ends is None:
            return forwards
        backwards, rows = ends

        def of(i: int, j: int) -> Tensor:
            with evaluating(self.graph):
                return backwards.rows(rows[i : i + 1] - rows[j : j + 1]).value

        row = lazily(self.classes, of)
        return tightest_pairs([forwards, MarginConstants(row, self.classes, forwards.kind)])

    def _backwards(self) -> tuple[Backwards, Float[Tensor, "classes n"]] | None:
        """What runs back on a chain, and the logits' rows on its last node."""
        (map, source), *others = tail(self.graph.output)
        nodes = None if others else self._chain(source)
        if nodes is None:
            return None
        with evaluating(self.graph):
            facts = self._facts()
            return Backwards(facts, nodes), rows_of(map, source).to(facts.one)

    def _chain(self, last: Node) -> list[Node] | None:
        nodes = None if self.every is not None else chain(last)
        small = nodes and values_within(nodes, LARGEST_BACKWARDS)
        return nodes if small else None
