"""One sweep of ellipsoids over a graph, from the input to the nodes that are wanted."""

import math
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
from lipcert.bounds.waves import (
    Waves,
    everything,
    stacked_waves,
    summed_waves,
    through_circular,
    through_cut,
)
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
        self._live: dict[Node, Live] = {}
        to_come = set(facts.graph)
        for n in facts.graph:
            to_come.discard(n)
            if n in self._needed:
                self._take(n, to_come)

    def of(self, n: Node) -> Extent | Waves:
        """The ellipsoid of a node."""
        return self._live[n].of(n)

    def live(self, n: Node) -> Live:
        """The ellipsoid that a node is in, with others or alone."""
        return self._live[n]

    def _take(self, n: Node, to_come: set[Node]) -> None:
        """One node; `to_come` are those after it."""
        at = None if self._way.cover is None else self._way.cover.of.get(n)
        beside: list[Node] = []
        if isinstance(n.op, Input):
            after: Extent | Waves = self._begin(at)
        elif at is None and any(isinstance(self._live[i].held, Waves) for i in n.inputs):
            after = self._out_of_waves(n)
        else:
            beside = self._beside(n, at, to_come)
            before = self._joined([*n.inputs, *beside])
            if before is None:
                beside, before = [], self._joined(list(n.inputs))
            if at is not None:
                after = self._waved(
                    n, at, None if before is None else _waves(before), beside, to_come
                )
            elif before is None:
                after = self._split(n, [_extent(self.of(i)) for i in n.inputs])
            else:
                after = self._stepped(n, _extent(before), beside, to_come)
        sizes = [size(n) if at is None else at.shape[0]]
        sizes += [self._live[b].size(b) for b in beside]
        live = Live(after, (n, *beside), tuple(sizes))
        self._live.update(dict.fromkeys(live.nodes, live))

    def _begin(self, at: Node | None) -> Extent | Waves:
        """The input, as a ball."""
        one, kind = self.facts.one, self.facts.kind
        if at is None:
            return Extent(one, kind=kind)
        assert self._way.cover is not None
        return everything(at.shape[0], at.shape[1:], self._way.cover.coarsest, one, kind)

    def _out_of_waves(self, n: Node) -> Extent:
        """A node without a place on the circular network, of nodes of which some have one."""
        if isinstance(n.op, Affine) and size(n) <= self.facts.largest:
            return _waves(self.of(n.inputs[0])).onto(self.facts.maps[n])
        held = [self.of(i) for i in n.inputs]
        parts = [h.ball() if isinstance(h, Waves) else h for h in held]
        return self._stepped(n, parts[0], [], set()) if len(parts) == 1 else self._split(n, parts)

    def _waved(
        self, n: Node, at: Node, before: Waves | None, beside: list[Node], to_come: set[Node]
    ) -> Waves:
        """A node on the circular network."""
        facts = self.facts
        match at.op:
            case Affine() as op:
                conv = op.map()
                assert isinstance(conv, Conv)
                assert before is not None
                return through_circular(before, conv)
            case Slope():
                assert before is not None
                low, high = (s.to(facts.one).flatten() for s in everywhere(at))
                low, high = (s.expand(at.shape[0]) for s in (low, high))
                passive = facts.one.expand(before.roots.shape[-1] - len(low))
                low, high = torch.cat([low, passive]), torch.cat([high, passive])
                read = self._read(n, beside, to_come)
                shapes = [k.shape for k in (n, *beside)]
                waves = None
                if read is not None:
                    parts = read.split([math.prod(shape) for shape in shapes], 1)
                    waves = torch.cat(
                        [
                            before.transformed(part.unflatten(1, shape))
                            for part, shape in zip(parts, shapes, strict=True)
                        ],
                        -1,
                    )
                return through_cut(before, low, high, waves, facts.gains(n))
            case _:
                if before is None:
                    before = stacked_waves([_waves(self.of(i)) for i in n.inputs])
                return summed_waves(before, at.shape[0], len(n.inputs))

    def _read(self, n: Node, beside: list[Node], to_come: set[Node]) -> Tensor | None:
        """What is read of a node, and by later nodes of those beside it; None if not known."""
        reading = self.facts.reading
        read = reading.of(n)
        if read is None or not beside:
            return read
        return torch.cat([read, *(reading.by(b, to_come) for b in beside)], 1)

    def _stepped(self, n: Node, before: Extent, beside: list[Node], to_come: set[Node]) -> Extent:
        """One node, of one ellipsoid of its inputs and of what stays beside it."""
        facts, passive = self.facts, sum(self._live[b].size(b) for b in beside)
        read = self._read(n, beside, to_come)
        match n.op:
            case Affine() as op:
                norm = affine_norm(op, facts.norm) if self._is_ball(n, None) else None
                return through_map(before, facts.maps[n], norm, passive)
            case Slope():
                low, high = (torch.cat([s, facts.one.expand(passive)]) for s in facts.slopes[n])
                return through_slopes(before, low, high, read, facts.gains(n))
            case Lipschitz(expansion=Expansion() as e) if (
                self._way.expand and before.root is not None
            ):
                return through_expansion(before, e, read, facts.gains(n), passive)
            case Lipschitz() as op:
                return through_opaque(before, op, size(n.inputs[0]), passive)
            case Concat():
                return before
            case _:
                return summed(before, size(n), len(n.inputs))

    def _is_ball(self, n: Node, at: Node | None) -> bool:
        """Whether only the norm of its map is taken, which says nothing of nodes beside it."""
        return at is None and isinstance(n.op, Affine) and size(n) > self.facts.largest

    def _split(self, n: Node, parts: list[Extent]) -> Extent:
        """A sum or a concatenation of nodes of which is not known how they go together."""
        adding = not isinstance(n.op, Concat)
        small = size(n) <= self.facts.largest
        if not small or all(p.root is None for p in parts):
            return joined_balls(parts, adding)
        if adding:
            return together(parts, size(n))
        return stacked(parts, [size(i) for i in n.inputs])

    def _beside(self, n: Node, at: Node | None, to_come: set[Node]) -> list[Node]:
        """The nodes that are in one ellipsoid with the inputs, and read later again."""
        if not self._way.joint or self._is_ball(n, at):
            return []
        if at is not None and at.shape[1:] != at.inputs[0].shape[1:]:
            return []
        later = {i for user in to_come & self._needed for i in user.inputs} | self._targets
        groups = [self._live[i] for i in n.inputs]
        near = dict.fromkeys(k for group in groups for k in group.nodes)
        return [k for k in near if k in later and self._live[k] in groups]

    def _joined(self, wanted: list[Node]) -> Extent | Waves | None:
        """One ellipsoid of several nodes; None if there is none, or only a split one."""
        if len(wanted) == 1:
            return self._live[wanted[0]].of(wanted[0])
        if not self._way.joint or sum(self._live[k].size(k) for k in wanted) > self.facts.largest:
            return None
        groups = {id(self._live[k]): self._live[k] for k in wanted}
        if len(groups) == 1:
            return next(iter(groups.values())).of(*wanted)
        parts = list(groups.values())
        if isinstance(parts[0].held, Waves):
            whole: Extent | Waves = stacked_waves([_waves(p.held) for p in parts])
        else:
            whole = stacked([_extent(p.held) for p in parts], [sum(p.sizes) for p in parts])
        nodes, sizes = [k for p in parts for k in p.nodes], [n for p in parts for n in p.sizes]
        return Live(whole, tuple(nodes), tuple(sizes)).of(*wanted)


def _waves(held: Extent | Waves) -> Waves:
    assert isinstance(held, Waves)
    return held


def _extent(held: Extent | Waves) -> Extent:
    assert isinstance(held, Extent)
    return held
