"""The product bound: norms multiplied along the network, for any traced graph.

Affine pieces count their spectral norm, elementwise functions their steepest slope, sums the sum
and concatenations the root of the squares of what they join. A margin f_i - f_j goes through the
last affine piece W exactly: K_ij = L |W_i - W_j| with L the bound of what feeds it.

Reference: arXiv 1802.04034 (LMT), Propositions 1 and 2; arXiv 2102.08452 (GloRo).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds.ends import End, margins, single_logits
from lipcert.bounds.margin import Bound, MarginConstants, check_strategy, device_of, evaluating
from lipcert.bounds.slopes import steepest
from lipcert.graph import Affine, Concat, Graph, Input, Lipschitz, Node, Slope, Sum
from lipcert.kinds import Constant, Kind, weakest
from lipcert.linear_kinds import Dense
from lipcert.linear_map import LinearMap
from lipcert.simplify import simplify
from lipcert.spectral import Auto, Iterative, Strategy


@dataclass(frozen=True)
class Layer:
    """One row of a bound's table.

    Attributes:
        node: The node.
        gain: The node's own constant; None for sums, concatenations and the input.
        prefix: The bound from the input up to and including the node.
    """

    node: Node
    gain: Constant | None
    prefix: Constant


class Product(Bound):
    """The global product bound.

    Args:
        graph: A traced network.
        norm: How spectral norms are computed. The default gives true upper bounds; for training
            `PowerIteration(1)` keeps one vector a piece from call to call, as buffers of this
            module, and costs about one extra sample a step.
    """

    def __init__(self, graph: Graph, norm: Strategy | None = None):
        super().__init__(graph)
        self.norm = Auto() if norm is None else norm
        check_strategy(self.norm, graph)
        self.p = self.norm.p
        self._buffer_of: dict[Node, str] = {}
        if isinstance(self.norm, Iterative):
            for place, n in enumerate(graph):
                if isinstance(n.op, Affine):
                    self._buffer_of[n] = f"vectors_{place}"
                    like = n.op.map().like.detach()
                    start = self.norm.start(n.inputs[0].shape, like)
                    self.register_buffer(self._buffer_of[n], start)

    def extra_repr(self) -> str:
        """The argument, for ``print(bound)``."""
        return f"norm={self.norm}"

    def forward(self, x: Float[Tensor, "b ..."] | None = None) -> MarginConstants:
        """The constants of all pairs; `x` is not looked at."""
        return margins(self.classes, self._ends(), self.p)

    def lipschitz(self) -> Constant:
        """A Lipschitz constant of the whole output vector."""
        return self.prefix(self.graph.output)

    def per_output(self) -> Constant:
        """Lipschitz constants of the single logits; `value` has shape `(classes,)`."""
        return single_logits(self.graph.output.shape[0], self._ends(), self.p)

    def prefix(self, upto: Node | str) -> Constant:
        """A Lipschitz constant of the function from the input to a node (or its name)."""
        target = self.graph.node(upto) if isinstance(upto, str) else upto
        with evaluating(self.graph):
            return self._sweep([target])[target].prefix

    def layers(self) -> list[Layer]:
        """Every node with its own constant and the bound up to it."""
        with evaluating(self.graph):
            return list(self._sweep([self.graph.output]).values())

    def explained(self) -> tuple[list[Layer], MarginConstants]:
        """`layers()` and the constants of all pairs, every norm computed once."""
        classes, layers = self.classes, self.layers()
        ends = self._ends({layer.node: layer for layer in layers})
        return layers, margins(classes, ends, self.p)

    def _ends(self, reached: dict[Node, Layer] | None = None) -> list[End]:
        """For each term of the output: the bound of what feeds it, and the rows of its map."""
        with evaluating(self.graph):
            tail = _tail(self.graph.output)
            swept = reached or self._sweep([source for _, source in tail])
            return [
                End(swept[source].prefix, None if map is None else _rows(map))
                for map, source in tail
            ]

    def _sweep(self, targets: list[Node]) -> dict[Node, Layer]:
        """Forward over the graph, as far as the targets need."""
        needed = set(targets)
        for n in reversed(self.graph.nodes):
            if n in needed:
                needed.update(n.inputs)
        layers: dict[Node, Layer] = {}
        failure, device = 0.0, device_of(self.graph)
        for n in self.graph:
            if n in needed:
                gain = self._gain(n)
                before = [layers[i].prefix for i in n.inputs]
                parts = [*before, *([gain] if gain else [])]
                kind = weakest(part.kind for part in parts)
                failure += gain.failure if gain else 0.0  # the union over every norm so far
                value = _combine(n, gain, before, self.p).to(device)
                prefix = Constant(value, kind, min(1.0, failure))
                layers[n] = Layer(n, gain, prefix)
        return layers

    def _gain(self, n: Node) -> Constant | None:
        match n.op:
            case Affine(map=map):
                return self._spectral_norm(n, map())
            case Slope():
                return Constant(steepest(n), Kind.UPPER)
            case Lipschitz(constant=constant, kind=kind):
                return Constant(torch.as_tensor(constant(), dtype=torch.float64), kind)
            case _:
                return None

    def _spectral_norm(self, n: Node, map: LinearMap) -> Constant:
        if not isinstance(self.norm, Iterative):
            return self.norm(map)
        name = self._buffer_of[n]
        map = simplify(map)
        vectors = getattr(self, name).to(map.like)  # of the precision that the network has now
        constant, better = self.norm.refine(map, vectors)
        setattr(self, name, better)  # a fresh tensor: the old one may be in someone's graph
        return constant


def _combine(n: Node, gain: Constant | None, before: list[Constant], p: float) -> Tensor:
    match n.op:
        case Input():
            return torch.ones((), dtype=torch.float64)
        case Sum():
            return torch.stack([b.value for b in before]).sum()
        case Concat():
            return torch.linalg.vector_norm(torch.stack([b.value for b in before]), p)
        case _:
            assert gain is not None
            return gain.value * before[0].value


def _tail(output: Node) -> list[tuple[LinearMap | None, Node]]:
    """The output as a sum of affine maps (None: the identity) of nodes."""
    match output.op:
        case Sum():
            return [end for i in output.inputs for end in _tail(i)]
        case Affine(map=map):
            return [(map(), output.inputs[0])]
        case _:
            return [(None, output)]


def _rows(map: LinearMap) -> Float[Tensor, "classes n"]:
    """The rows of the map's matrix."""
    map = simplify(map.to(torch.float64))
    if isinstance(map, Dense) and len(map.in_shape) == 1:
        return map.weight
    basis = torch.eye(map.out_size, dtype=torch.float64, device=map.like.device)
    return map.adjoint(basis.reshape(-1, *map.out_shape)).flatten(1)
