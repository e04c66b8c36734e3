"""Networks without joins, where a bound may run from either end and from both to the middle.

For slopes D fixed anywhere, the difference of two outputs is M(D) times that of the inputs, and the
rows R of outputs that are asked for are R M(D). The transposed product has the same norm, and its
factors are those of a network too: so steps of an ellipsoid that hold for all slopes can be taken
from the rows back to the input. Ellipsoids meet at any node between: with dz dz^T <= S |dx|^2 from
the input and v v^T <= T for the rows v that are read of z, |v^T dz|^2 is at most the largest
eigenvalue of S^(1/2) T S^(1/2).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.bounds.extent import Extent, normalised, through_map, through_slopes
from lipcert.bounds.sweep import Facts, Sweep, Way
from lipcert.graph import Affine, Input, Node, Slope
from lipcert.kinds import Constant


def chain(last: Node) -> list[Node] | None:
    """The nodes from after the input up to one; None if one is not affine or elementwise."""
    found: list[Node] = []
    while not isinstance(last.op, Input):
        if not isinstance(last.op, Affine | Slope):
            return None
        found.append(last)
        last = last.inputs[0]
    return found[::-1]


def values_within(nodes: list[Node], largest: int) -> bool:
    """Whether no node of a chain has more values than this."""
    return all(math.prod(n.shape) <= largest for n in nodes)


class Backwards:
    """Bounds of rows read at the end of a chain, carried back to where they meet the input's.

    Args:
        facts: Of the network.
        nodes: The chain.
    """

    def __init__(self, facts: Facts, nodes: list[Node]):
        self._facts, self._nodes = facts, nodes
        sweep = Sweep(facts, nodes[-1:], Way(None, False, False))
        self._before: dict[Node, Extent] = {}
        for n in nodes:
            # At other nodes the result is that of one of these.
            if isinstance(n.op, Affine) or n is nodes[-1]:
                extent = sweep.of(n)
                assert isinstance(extent, Extent)
                self._before[n] = extent

    def rows(self, rows: Float[Tensor, "k n"]) -> Constant:
        """A Lipschitz constant of rows of the last node's value."""
        one, kind = self._facts.one, self._facts.kind
        return self._met(normalised(one, rows, kind, 0.0))

    def whole(self) -> Constant:
        """A Lipschitz constant of the last node's value."""
        return self._met(Extent(self._facts.one, kind=self._facts.kind))

    def _met(self, at: Extent) -> Constant:
        """The least of all meetings, for an ellipsoid of what is read of the last node."""
        facts, found = self._facts, []
        for n in reversed(self._nodes):
            if n in self._before:
                found.append(_meeting(self._before[n], at))
            if isinstance(n.op, Slope):
                at = through_slopes(at, *facts.slopes[n], None, facts.gains(n))
            elif n is not self._nodes[0]:
                at = through_map(at, facts.maps[n].T)
        if isinstance(self._nodes[0].op, Slope):
            found.append(at.radius().value)
        return Constant(torch.stack(found).amin(), facts.kind)


def _meeting(before: Extent, after: Extent) -> Tensor:
    """The norm of Q R^T, for S = R^T R and T = Q^T Q."""
    if before.root is None:
        return before.scale * after.radius().value
    if after.root is None:
        return after.scale * before.radius().value
    met = after.root @ before.root.mT
    return normalised(before.scale * after.scale, met, after.kind, 0.0).radius().value


def lazily(
    classes: int, of: Callable[[int, int], Tensor]
) -> Callable[[Int[Tensor, " b"]], Float[Tensor, "b c"]]:
    """Rows as `MarginConstants` has them, each pair computed when it is first asked for."""
    known: dict[tuple[int, int], Tensor] = {}

    def pair(i: int, j: int) -> Tensor:
        j = (i + 1) % classes if i == j else j  # the diagonal means nothing
        key = min(i, j), max(i, j)
        if key not in known:
            known[key] = of(*key)
        return known[key]

    def row(wanted: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
        rows = {i: torch.stack([pair(i, j) for j in range(classes)]) for i in set(wanted.tolist())}
        return torch.stack([rows[i] for i in wanted.tolist()])

    return row
