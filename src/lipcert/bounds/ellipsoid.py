"""The ellipsoid bound: tighter than product and LipLT wherever depth compounds, for any graph.

An ellipsoid holds the changes of each node (`extent`), and one sweep gives the constants of all
pairs, of every logit and of every neuron. Nodes of many values and functions of which only the
constant is known are held by balls; from there on it is a bound of the rest times the radius of the
ball.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.bounds.affine_norm import affine_norm
from lipcert.bounds.cover import circular_cover
from lipcert.bounds.ends import End, margins, single_logits
from lipcert.bounds.extent import (
    Extent,
    stacked,
    through_expansion,
    through_map,
    through_opaque,
    through_slopes,
    together,
)
from lipcert.bounds.margin import Bound, MarginConstants, check_strategy, device_of, evaluating
from lipcert.bounds.slopes import everywhere
from lipcert.bounds.tail import rows_of, tail
from lipcert.bounds.tightest import least, tightest_pairs
from lipcert.bounds.waves import Waves, added_up, everything, through_circular, through_cut
from lipcert.errors import LipcertError
from lipcert.graph import Affine, Concat, Expansion, Graph, Input, Lipschitz, Node, Slope, Sum
from lipcert.kinds import Constant
from lipcert.linear_kinds import identity
from lipcert.linear_map import LinearMap
from lipcert.simplify import simplify
from lipcert.spectral import Auto, Iterative, Strategy

LARGEST = 2048
"""Nodes of more values than this are held by balls."""


@dataclass(frozen=True)
class _Way:
    """One of several sweeps, each of which may be the better one.

    Attributes:
        expand: Whether functions with an expansion are expanded, or balls.
        waves: Whether convolutions go frequency by frequency, or as matrices where they are small.
    """

    expand: bool
    waves: bool


class Ellipsoid(Bound):
    """The ellipsoid bound, global, of kind upper.

    It can be above LipLT: `tightest(LipLT(graph), Ellipsoid(graph))` takes the best of each pair.
    Sums and concatenations that do not fuse into one map are split, which gives up how their parts
    depend on each other. Sorted pairs (MaxMin) keep the sums of pairs and bend their differences;
    as balls they can be better or worse. Zero-padded convolutions go frequency by frequency on a
    circular network that has room for them (`circular_cover`), with one multiplier a channel, and
    as matrices of up to `LARGEST` values. Each pair of classes takes the best of these sweeps.

    Args:
        graph: A traced network.
        norm: Spectral norms of the maps into nodes of more than `LARGEST` values.

    Raises:
        LipcertError: The strategy iterates vectors or is not of L2.
    """

    def __init__(self, graph: Graph, norm: Strategy | None = None):
        super().__init__(graph)
        self.norm = Auto() if norm is None else norm
        known = any(isinstance(n.op, Lipschitz) and n.op.expansion is not None for n in graph)
        covered = circular_cover(graph) is not None
        self._ways = [
            _Way(expand, waves)
            for expand in (False, True)[: 1 + known]
            for waves in (False, True)[: 1 + covered]
        ]
        check_strategy(self.norm, graph)
        if isinstance(self.norm, Iterative) or self.norm.p != 2:
            raise LipcertError(
                f"Ellipsoid(norm={self.norm!r}) needs a strategy for true L2 norms, e.g. "
                "lc.Auto(): it iterates no vectors, and is differentiable as it is."
            )

    def extra_repr(self) -> str:
        """The arguments, for ``print(bound)``."""
        return f"norm={self.norm}"

    def forward(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
        index: Int[Tensor, " b"] | None = None,
    ) -> MarginConstants:
        """The constants of all pairs, see `Bound`; nothing is looked at."""
        classes = self.classes
        return tightest_pairs([margins(classes, self._ends(e), self.p) for e in self._ways])

    def per_output(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """Lipschitz constants of the single logits, see `Bound`."""
        count = self.graph.output.shape[0]
        return least([single_logits(count, self._ends(e), self.p) for e in self._ways])

    def prefix(
        self,
        upto: Node | str,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """A Lipschitz constant of the function from the input to a node, see `Bound`."""
        target = self.graph.node(upto) if isinstance(upto, str) else upto
        with evaluating(self.graph):
            return least([self._sweep([target], e)[target].radius() for e in self._ways])

    def _ends(self, way: _Way) -> list[End]:
        """For each term of the output: the ellipsoid before it, and the rows of its map on it."""
        with evaluating(self.graph):
            terms = tail(self.graph.output)
            swept = self._sweep([source for _, source in terms], way)
            ends = []
            for map, source in terms:
                extent = swept[source]
                if isinstance(extent, Waves):
                    extent = extent.onto(identity(source.shape) if map is None else _exact(map))
                    rows = torch.eye(self.graph.output.shape[0]).to(extent.scale)
                else:
                    rows = rows_of(map, source)
                factor = extent.factor()
                seen = rows if factor is None else rows @ factor
                ends.append(End(Constant(extent.scale, extent.kind, extent.failure), seen))
            return ends

    def _sweep(self, targets: list[Node], way: _Way) -> dict[Node, Extent | Waves]:
        """Forward over the graph, as far as the targets need.

        Args:
            targets: The nodes that are wanted.
            way: How.
        """
        needed = set(targets)
        for n in reversed(self.graph.nodes):
            if n in needed:
                needed.update(n.inputs)
        slopes = {n: _of_neurons(n) for n in needed if isinstance(n.op, Slope)}
        read = self._read(slopes)
        one = torch.ones((), dtype=torch.float64, device=device_of(self.graph))
        found: dict[Node, Extent | Waves] = {}
        if way.waves:
            found.update(self._swept_by_waves(needed, read, one))
        for n in self.graph:
            if n not in needed or n in found:
                continue
            first = found[n.inputs[0]] if n.inputs else None
            small = math.prod(n.shape) <= LARGEST
            before = [e.ball() if isinstance(e, Waves) else e for e in (found[i] for i in n.inputs)]
            match n.op:
                case Input():
                    found[n] = Extent(one)
                case Affine() as op:
                    map = _exact(op.map())
                    if isinstance(first, Waves) and small:
                        found[n] = first.onto(map)
                        continue
                    norm = None if small else affine_norm(op, self.norm)
                    found[n] = through_map(before[0], map, norm)
                case Slope():
                    low, high = slopes[n]
                    found[n] = through_slopes(before[0], low.to(one), high.to(one), read.get(n))
                case Lipschitz(expansion=Expansion() as e) if (
                    way.expand and before[0].matrix is not None
                ):
                    found[n] = through_expansion(before[0], e, read.get(n))
                case Lipschitz() as op:
                    found[n] = through_opaque(before[0], op)
                case Sum():
                    found[n] = together(before, math.prod(n.shape), small)
                case Concat():
                    found[n] = stacked(before, [math.prod(i.shape) for i in n.inputs], small)
        return found

    def _swept_by_waves(
        self, needed: set[Node], read: dict[Node, Tensor], one: Tensor
    ) -> dict[Node, Waves]:
        """The nodes that have a place on a circular network, by the nodes of this one."""
        cover = circular_cover(self.graph)
        assert cover is not None
        found: dict[Node, Waves] = {}
        for n, at in cover.of.items():
            if n not in needed:
                continue
            before = [found[i] for i in n.inputs]
            match at.op:
                case Affine() as op if not n.inputs:
                    found[n] = everything(at.shape[0], at.shape[1:], one)
                case Affine() as op:
                    found[n] = through_circular(before[0], op.map())
                case Slope():
                    low, high = (s.to(one) for s in everywhere(at))
                    low, high = (s.flatten().expand(at.shape[0]) for s in (low, high))
                    rows = read.get(n)
                    rows = None if rows is None else rows.reshape(-1, *n.shape)
                    found[n] = through_cut(before[0], low, high, rows)
                case _:
                    found[n] = added_up(before)
        return found

    def _read(self, slopes: dict[Node, tuple[Tensor, Tensor]]) -> dict[Node, Tensor]:
        """What the logits read of each node, the network taken linear with the middle slopes."""
        output = self.graph.output
        if len(output.shape) != 1 or output.shape[0] > LARGEST:
            return {}
        size = output.shape[0]
        rows = torch.eye(size, dtype=torch.float64, device=device_of(self.graph))
        read: dict[Node, Tensor] = {output: rows - rows.mean(0)}
        for n in reversed(self.graph.nodes):
            if n not in read or (isinstance(n.op, Slope) and n not in slopes):
                continue
            at = read[n]
            match n.op:
                case Affine() as op:
                    map = _exact(op.map())
                    passed = [map.adjoint(at.reshape(size, *n.shape)).flatten(1)]
                case Slope():
                    low, high = slopes[n]
                    passed = [at * ((low + high) / 2).to(at)]
                case Sum():
                    passed = [at] * len(n.inputs)
                case Concat():
                    passed = list(at.split([math.prod(i.shape) for i in n.inputs], 1))
                case Lipschitz(expansion=Expansion() as e):
                    at = e.after.adjoint(at.reshape(size, *n.shape))
                    at = e.before.adjoint(at * ((e.low + e.high) / 2).to(at))
                    passed = [at.flatten(1)]
                case _:
                    continue
            for i, part in zip(n.inputs, passed, strict=True):
                read[i] = read[i] + part if i in read else part
        return read


def _exact(map: LinearMap) -> LinearMap:
    """The map folded, in float64."""
    return simplify(map.to(torch.float64))


def _of_neurons(n: Node) -> tuple[Tensor, Tensor]:
    """The least and the greatest slope of every neuron."""
    low, high = (slope.expand(n.shape).flatten() for slope in everywhere(n))
    return low, high
