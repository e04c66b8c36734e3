"""One sweep of ellipsoids over a graph, from the input to the nodes that are wanted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lipcert.bounds.affine_norm import affine_norm
from lipcert.bounds.cover import Cover
from lipcert.bounds.extent import (
    Extent,
    Gains,
    through_expansion,
    through_map,
    through_opaque,
    through_slopes,
)
from lipcert.bounds.live import Live, joined_balls, size, stacked, summed, together
from lipcert.bounds.reading import Reading
from lipcert.bounds.slopes import everywhere
from lipcert.bounds.waves import Waves, added_up, everything, through_circular, through_cut
from lipcert.convolution import Conv
from lipcert.graph import Affine, Box, Concat, Expansion, Graph, Input, Lipschitz, Node, Slope
from lipcert.kinds import Kind
from lipcert.linear_map import LinearMap
from lipcert.simplify import simplify
from lipcert.spectral import Strategy


@dataclass(frozen=True)
class Way:
    """One of several sweeps, each of which may be the better one.

    Attributes:
        cover: The circular network on which convolutions go frequency by frequency; None to take
            them as matrices where they are small.
        expand: Whether functions with an expansion are expanded, or balls.
        joint: Whether nodes that are read later again stay in one ellipsoid with what comes after.
    """

    cover: Cover | None
    expand: bool
    joint: bool


@dataclass(frozen=True)
class Facts:
    """What all sweeps of a network ask for, with its weights as they are now.

    Attributes:
        graph: The network.
        one: The number 1 in the precision and on the device to work on.
        kind: What is claimed in this precision.
        gains: Chooses the multipliers of a node.
        norm: Gives norms of maps into nodes of more than `largest` values.
        largest: Nodes of more values are balls.
    """

    graph: Graph
    one: Tensor
    kind: Kind
    gains: Callable[[Node], Gains]
    norm: Strategy
    largest: int
    maps: dict[Node, LinearMap] = field(init=False)
    slopes: dict[Node, Box] = field(init=False)
    reading: Reading = field(init=False)

    def __post_init__(self):
        dtype = self.one.dtype
        maps, slopes = {}, {}
        for n in self.graph:
            if isinstance(n.op, Affine):
                maps[n] = simplify(n.op.map().to(dtype))
            elif isinstance(n.op, Slope):
                low, high = (s.to(self.one).expand(n.shape).flatten() for s in everywhere(n))
                slopes[n] = low, high
        object.__setattr__(self, "maps", maps)
        object.__setattr__(self, "slopes", slopes)
        object.__setattr__(
            self, "reading", Reading(self.graph, maps, slopes, self.one, self.largest)
        )


class Sweep:
    """The ellipsoids of some nodes.

    Args:
        facts: Of the network.
        targets: The nodes wanted.
        way: How to sweep.
    """

    def __init__(self, facts: Facts, targets: Sequence[Node], way: Way):
        self.facts, self._way = facts, way
        self._needed = set(targets)
        for n in reversed(facts.graph.nodes):
            if n in self._needed:
                self._needed.update(n.inputs)
        self._targets = set(targets)
        self._waves: dict[Node, Waves] = {}
        self._live: dict[Node, Live] = {}
        if way.cover is not None:
            self._cross(way.cover)
        to_come = set(facts.graph)
        for n in facts.graph:
            to_come.discard(n)
            if n in self._needed and n not in self._waves:
                self._take(n, to_come)

    def of(self, n: Node) -> Extent | Waves:
        """The ellipsoid of a node."""
        return self._waves[n] if n in self._waves else self._live[n].of(n)

    def live(self, n: Node) -> Live | None:
        """The ellipsoid that a node is in, with others or alone; None where it has waves."""
        return None if n in self._waves else self._live[n]

    def _cross(self, cover: Cover) -> None:
        """The nodes that have a place on a circular network."""
        facts = self.facts
        for n, at in cover.of.items():
            if n not in self._needed:
                continue
            before = [self._waves[i] for i in n.inputs]
            match at.op:
                case Affine() if not n.inputs:
                    self._waves[n] = everything(
                        at.shape[0], at.shape[1:], cover.coarsest, facts.one, facts.kind
                    )
                case Affine() as op:
                    conv = op.map()
                    assert isinstance(conv, Conv)
                    self._waves[n] = through_circular(before[0], conv)
                case Slope():
                    low, high = (s.to(facts.one).flatten() for s in everywhere(at))
                    low, high = (s.expand(at.shape[0]) for s in (low, high))
                    rows = facts.reading.of(n)
                    rows = None if rows is None else rows.reshape(-1, *n.shape)
                    self._waves[n] = through_cut(before[0], low, high, rows, facts.gains(n))
                case _:
                    self._waves[n] = added_up(before)

    def _take(self, n: Node, to_come: set[Node]) -> None:
        """One node; `to_come` are those after it."""
        facts, op = self.facts, n.op
        if isinstance(op, Input):
            self._live[n] = Live(Extent(facts.one, kind=facts.kind), (n,))
            return
        first = n.inputs[0]
        small = size(n) <= facts.largest
        if isinstance(op, Affine) and first in self._waves and small:
            self._live[n] = Live(self._waves[first].onto(facts.maps[n]), (n,))
            return
        for i in n.inputs:
            if i in self._waves and i not in self._live:
                self._live[i] = Live(self._waves[i].ball(), (i,))
        beside = self._beside(n, to_come) if small else []
        before = self._joined([*n.inputs, *beside])
        if before is None:
            beside, before = [], self._joined(list(n.inputs))
        if before is None:
            after = self._split(n, small)
        else:
            after = self._stepped(n, before, beside, to_come)
        live = Live(after, (n, *beside))
        self._live.update(dict.fromkeys(live.nodes, live))

    def _stepped(self, n: Node, before: Extent, beside: list[Node], to_come: set[Node]) -> Extent:
        """One node, of one ellipsoid of its inputs and of what stays beside it."""
        facts, passive = self.facts, sum(size(b) for b in beside)
        read = facts.reading.of(n)
        if read is not None and beside:
            read = torch.cat([read, *(facts.reading.by(b, to_come) for b in beside)], 1)
        match n.op:
            case Affine() as op:
                large = size(n) > facts.largest
                norm = affine_norm(op, facts.norm) if large else None
                return through_map(before, facts.maps[n], norm, passive)
            case Slope():
                low, high = (torch.cat([s, facts.one.expand(passive)]) for s in facts.slopes[n])
                return through_slopes(before, low, high, read, facts.gains(n))
            case Lipschitz(expansion=Expansion() as e) if (
                self._way.expand and before.matrix is not None
            ):
                return through_expansion(before, e, read, facts.gains(n), passive)
            case Lipschitz() as op:
                return through_opaque(before, op, size(n.inputs[0]), passive)
            case Concat():
                return before
            case _:
                return summed(before, size(n), len(n.inputs))

    def _split(self, n: Node, small: bool) -> Extent:
        """A sum or a concatenation of nodes of which is not known how they go together."""
        adding = not isinstance(n.op, Concat)
        parts = [self._live[i].of(i) for i in n.inputs]
        if not small or all(p.matrix is None for p in parts):
            return joined_balls(parts, adding)
        if adding:
            return together(parts, size(n))
        return stacked(parts, [size(i) for i in n.inputs])

    def _beside(self, n: Node, to_come: set[Node]) -> list[Node]:
        """The nodes that are in one ellipsoid with the inputs, and read later again."""
        if not self._way.joint:
            return []
        later = {i for user in to_come & self._needed for i in user.inputs} | self._targets
        groups = [self._live[i] for i in n.inputs]
        near = dict.fromkeys(k for group in groups for k in group.nodes)
        return [k for k in near if k in later and self._live[k] in groups]

    def _joined(self, wanted: list[Node]) -> Extent | None:
        """One ellipsoid of several nodes; None if there is none, or only a split one."""
        if len(wanted) == 1:
            return self._live[wanted[0]].of(wanted[0])
        if not self._way.joint or sum(size(k) for k in wanted) > self.facts.largest:
            return None
        groups = {id(self._live[k]): self._live[k] for k in wanted}
        if len(groups) == 1:
            return next(iter(groups.values())).of(*wanted)
        parts = list(groups.values())
        whole = stacked([p.extent for p in parts], [sum(map(size, p.nodes)) for p in parts])
        return Live(whole, tuple(k for p in parts for k in p.nodes)).of(*wanted)
