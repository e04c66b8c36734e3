"""The product bound: norms multiplied along the network, for any traced graph.

Affine pieces count their spectral norm, elementwise functions their steepest slope, sums the sum
and concatenations the root of the squares of what they join. A margin f_i - f_j goes through the
last affine piece W exactly: K_ij = L |W_i - W_j| with L the bound of what feeds it.

Reference: arXiv 1802.04034 (LMT), Propositions 1 and 2; arXiv 2102.08452 (GloRo).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.bounds.affine_norm import affine_norm, expected_norm
from lipcert.bounds.ends import End, margins, single_logits
from lipcert.bounds.local_ends import local_logits, local_margins
from lipcert.bounds.local_product import LocalProduct, iterated_norms
from lipcert.bounds.margin import (
    Bound,
    MarginConstants,
    check_region,
    check_strategy,
    device_of,
    evaluating,
    samples,
)
from lipcert.bounds.sample_vectors import SampleVectors
from lipcert.bounds.slopes import steepest
from lipcert.bounds.tail import rows_of, tail
from lipcert.errors import LipcertError
from lipcert.graph import Affine, Concat, Graph, Input, Lipschitz, Node, Slope, Sum
from lipcert.kinds import Constant, Kind, weakest
from lipcert.linear_kinds import Index
from lipcert.linear_map import LinearMap
from lipcert.region import L2Ball
from lipcert.simplify import simplify
from lipcert.spectral import Auto, Iterative, Strategy, masked_norms


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
    """The product bound: global, or around each sample.

    Around samples it is the bound of Local-Lip: constant units are left out of the norms on both
    sides, and `drop` is the worst case of the last layer over ball and box, as in BCP.

    Args:
        graph: A traced network.
        norm: How spectral norms are computed. The default gives true upper bounds; for training
            `PowerIteration(1)` keeps one vector a piece from call to call, as buffers of this
            module, and costs about one extra sample a step. Around samples, true norms are those of
            the whole map where a sample's own would cost too much (see `masked_norms`), and
            iterated vectors start from those of the whole map.
        region: Where the bound is to hold; everywhere by default.
        masked: The nodes (by name) whose norms are taken for each sample, where the others count
            their whole norm; all by default. None at all, `masked=()`, is the bound of BCP.
        starts: Keeps each sample's iterated vectors from epoch to epoch.
    """

    def __init__(
        self,
        graph: Graph,
        norm: Strategy | None = None,
        region: L2Ball | None = None,
        masked: Sequence[str] | None = None,
        starts: SampleVectors | None = None,
    ):
        super().__init__(graph)
        self.norm = Auto() if norm is None else norm
        check_strategy(self.norm, graph)
        check_region(region, self.norm)
        self.p = self.norm.p
        self.region = region
        self.local = region is not None
        self._masked = {n for n in graph if masked is None or n.name in masked}
        unknown = set(masked or ()) - {n.name for n in graph if isinstance(n.op, Affine)}
        if unknown:
            names = ", ".join(n.name for n in graph if isinstance(n.op, Affine))
            raise LipcertError(
                f"masked names {', '.join(sorted(unknown))}, but the affine nodes are: {names}."
            )
        self.starts = starts
        self._buffer_of: dict[Node, str] = {}
        if isinstance(self.norm, Iterative):
            for place, n in enumerate(graph):
                if isinstance(n.op, Affine):
                    self._buffer_of[n] = f"vectors_{place}"
                    like = n.op.map().like.detach()
                    start = self.norm.start(n.inputs[0].shape, like)
                    self.register_buffer(self._buffer_of[n], start)
        if starts is not None:
            if region is None or not isinstance(self.norm, Iterative):
                raise LipcertError(
                    "starts keeps iterated vectors of samples: it needs a region and a strategy "
                    "such as norm=lc.PowerIteration(2)."
                )
            starts.prepare({name: getattr(self, name).shape for name in self._buffer_of.values()})

    def extra_repr(self) -> str:
        """The arguments, for ``print(bound)``."""
        return f"norm={self.norm}" + (f", region={self.region}" if self.region else "")

    def forward(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
        index: Int[Tensor, " b"] | None = None,
    ) -> MarginConstants:
        """The constants of all pairs, see `Bound`."""
        if self.region is None:
            return margins(self.classes, self._ends(), self.p)
        with evaluating(self.graph):
            local = self._around(x, eps, index)
            ends = local.ends()
            return local_margins(self.classes, [e.end for e in ends], ends, local.around)

    def per_output(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """Lipschitz constants of the single logits, see `Bound`."""
        logits = self.logits
        if self.region is None:
            return single_logits(logits, self._ends(), self.p)
        with evaluating(self.graph):
            return local_logits([e.end for e in self._around(x, eps).ends()])

    def prefix(
        self,
        upto: Node | str,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """A Lipschitz constant of the function from the input to a node, see `Bound`."""
        target = self.graph.node(upto) if isinstance(upto, str) else upto
        with evaluating(self.graph):
            if self.region is not None:
                return self._around(x, eps).reached(target)
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
            terms = tail(self.graph.output)
            swept = reached or self._sweep([source for _, source in terms])
            return [
                End(swept[source].prefix, None if map is None else rows_of(map, source))
                for map, source in terms
            ]

    def _around(
        self,
        x: Float[Tensor, "b ..."] | None,
        eps: float | Float[Tensor, " b"] | None,
        index: Int[Tensor, " b"] | None = None,
    ) -> LocalProduct:
        """The bound around each sample, its parts worked out when asked for."""
        assert self.region is not None
        x = samples(x, self.graph, self.norm)
        radii = self.region.radii(x, eps)

        layers = self._once("layers", lambda: self._sweep([self.graph.output]))

        def norm(n: Node, map: LinearMap, columns: Tensor | None, rows: Tensor | None) -> Constant:
            whole = layers[n].gain
            assert whole is not None
            if (
                n not in self._masked
                or isinstance(map, Index)
                or (columns is None and rows is None)
            ):
                return dataclasses.replace(whole, value=whole.value.to(x).expand(len(x)))
            if not isinstance(self.norm, Iterative):
                return masked_norms(self.norm, map, columns, rows, whole)
            return self._iterated(n, map, columns, rows, index)

        return LocalProduct(self.graph, x, self.region, radii, norm, lambda n: layers[n].prefix)

    def _iterated(
        self,
        n: Node,
        map: LinearMap,
        columns: Tensor | None,
        rows: Tensor | None,
        index: Int[Tensor, " b"] | None,
    ) -> Constant:
        """Estimates of the masked norms, from samples' own vectors or those of the whole map."""
        assert isinstance(self.norm, Iterative)
        some = rows if columns is None else columns
        assert some is not None
        name, count = self._buffer_of[n], len(some)
        whole = getattr(self, name).to(map.like)
        state = whole.expand(count, *whole.shape)
        if self.starts is not None and index is not None:
            state = self.starts.load(name, index, state)
        norms, better = iterated_norms(self.norm, map, columns, rows, state)
        if self.starts is not None and index is not None:
            self.starts.store(name, index, better)
        return norms

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
            case Affine():
                return self._whole(n)
            case Slope():
                return Constant(steepest(n), Kind.UPPER)
            case Lipschitz(constant=constant, kind=kind):
                return Constant(torch.as_tensor(constant(), dtype=torch.float64), kind)
            case _:
                return None

    def _whole(self, n: Node) -> Constant:
        """The norm of an affine node's map."""
        assert isinstance(n.op, Affine)
        if not isinstance(self.norm, Iterative):
            op = n.op
            return self._once(n, lambda: affine_norm(op, self.norm))
        if self.region is None and (expected := expected_norm(n.op)) is not None:
            return expected
        name = self._buffer_of[n]
        map = simplify(n.op.map())
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
