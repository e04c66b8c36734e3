"""What the logits read of each node, the network taken linear with the middle slopes.

Multipliers are chosen so that ellipsoids are small in these directions; any choice is sound.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.graph import Affine, Box, Concat, Expansion, Graph, Lipschitz, Node, Slope, Sum
from lipcert.linear_map import LinearMap

_ROWS = 32


class Reading:
    """Rows of the logits' differences from their mean, followed back through a network.

    Args:
        graph: The network.
        maps: Of its affine nodes, in the precision to work in.
        slopes: The least and the greatest slopes of the neurons of its elementwise functions.
        one: The number 1 in that precision, on the device to work on.
        largest: Outputs of more values are not followed.
    """

    def __init__(
        self,
        graph: Graph,
        maps: dict[Node, LinearMap],
        slopes: dict[Node, Box],
        one: Tensor,
        largest: int,
    ):
        self._maps, self._slopes = maps, slopes
        self._edges: dict[tuple[Node, Node], Tensor] = {}
        self._whole: dict[Node, Tensor] = {}
        self._users: dict[Node, list[Node]] = {n: [] for n in graph}
        for n in graph:
            for i in dict.fromkeys(n.inputs):
                self._users[i].append(n)
        output = graph.output
        if len(output.shape) != 1 or output.shape[0] > largest:
            return
        rows = torch.eye(output.shape[0]).to(one)
        self._whole[output] = _sketched(rows - rows.mean(0))
        for n in reversed(graph.nodes):
            if n != output:
                self._collect(n)
            if n in self._whole:
                self._pass_on(n)

    def of(self, n: Node) -> Float[Tensor, "k n"] | None:
        """What is read of a node by all that come after it; None if not known."""
        return self._whole.get(n)

    def by(self, n: Node, users: set[Node]) -> Float[Tensor, "k n"]:
        """What some of the nodes after it read of a node; zeros where that is not known."""
        found = [rows for user, rows in self._read_by(n) if user in users]
        if not found:
            like = next(iter(self._whole.values()))
            return like.new_zeros(len(like), math.prod(n.shape))
        return torch.stack(found).sum(0)

    def _read_by(self, n: Node) -> list[tuple[Node, Tensor]]:
        return [(u, self._edges[n, u]) for u in self._users[n] if (n, u) in self._edges]

    def _collect(self, n: Node) -> None:
        found = [rows for _, rows in self._read_by(n)]
        if found:
            self._whole[n] = found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def _pass_on(self, n: Node) -> None:
        at = self._whole[n]
        size = len(at)
        match n.op:
            case Affine():
                passed = [self._maps[n].adjoint(at.reshape(size, *n.shape)).reshape(size, -1)]
            case Slope():
                low, high = self._slopes[n]
                passed = [at * ((low + high) / 2)]
            case Sum():
                passed = [at] * len(n.inputs)
            case Concat():
                passed = list(at.split([math.prod(i.shape) for i in n.inputs], 1))
            case Lipschitz(expansion=Expansion() as e):
                at = e.after.to(at.dtype).adjoint(at.reshape(size, *n.shape))
                at = e.before.to(at.dtype).adjoint(at * ((e.low + e.high) / 2).to(at))
                passed = [at.flatten(1)]
            case _:
                return
        for i, part in zip(n.inputs, passed, strict=True):
            self._edges[i, n] = self._edges[i, n] + part if (i, n) in self._edges else part


def _sketched(rows: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """Fewer rows of about the same inner products, as only these are asked for."""
    if len(rows) <= _ROWS:
        return rows
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (_ROWS, len(rows)), generator=generator).to(rows) * 2 - 1
    return signs @ rows / math.sqrt(_ROWS)
