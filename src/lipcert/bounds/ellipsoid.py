"""The ellipsoid bound: tighter than product and LipLT wherever depth compounds, for any graph.

An ellipsoid holds the changes of each node (`extent`), and one sweep gives the constants of all
pairs, of every logit and of every neuron. Nodes of many values and functions of which only the
constant is known are held by balls; from there on it is a bound of the rest times the radius of the
ball.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.bounds.affine_norm import affine_norm
from lipcert.bounds.cover import circular_cover
from lipcert.bounds.ends import End, margins, single_logits
from lipcert.bounds.extent import Extent, Gains, balanced
from lipcert.bounds.live import Live
from lipcert.bounds.local_ellipsoid import LocalEllipsoid
from lipcert.bounds.local_ends import local_logits, local_margins
from lipcert.bounds.margin import (
    Bound,
    MarginConstants,
    check_region,
    check_strategy,
    device_of,
    evaluating,
    samples,
)
from lipcert.bounds.sweep import Facts, Sweep, Way
from lipcert.bounds.tail import rows_of, tail
from lipcert.bounds.tightest import least, tightest_pairs
from lipcert.bounds.waves import Waves
from lipcert.errors import LipcertError
from lipcert.graph import Affine, Concat, Graph, Input, Lipschitz, Node, Sum
from lipcert.kinds import Constant, Kind
from lipcert.linear_kinds import identity
from lipcert.linear_map import LinearMap
from lipcert.region import L2Ball
from lipcert.simplify import simplify
from lipcert.spectral import Auto, Iterative, Strategy

LARGEST = 2048
"""Nodes of more values than this are held by balls."""

Seen = list[tuple[Extent, Float[Tensor, "classes n"]]]
"""What the logits see of a sweep: ellipsoids, and the logits' rows on each."""


class Ellipsoid(Bound):
    """The ellipsoid bound: global, or around each sample.

    It can be above LipLT: `tightest(LipLT(graph), Ellipsoid(graph))` takes the best of each pair.
    Sums and concatenations are followed in one ellipsoid with what they join, where that has at
    most `LARGEST` values, and split else. Sorted pairs (MaxMin) keep the sums of pairs and bend
    their differences; as balls they can be better or worse. Zero-padded convolutions go frequency
    by frequency on a circular network that has room for them (`circular_cover`), with one
    multiplier a channel, and as matrices of up to `LARGEST` values. Each pair of classes takes the
    best of these sweeps.

    Around samples the margins' constants hold for changes from the sample: activations enter with
    the slopes of secants through it (`local_ellipsoid`). `lipschitz` and the like hold between any
    two points of the ball. Matrices of up to 1,024 values only, and no sorted pairs: it can be
    above the global bound, so take `tightest` of both.

    For training give `every`: then the constants are of kind estimate, one sweep in float32 with
    frequencies wherever there are some, at the first of every so many calls with gradients. The
    others repeat them without gradients, which the next gradient makes up for.

    Args:
        graph: A traced network.
        norm: Spectral norms of the maps into nodes of more than `LARGEST` values.
        region: Where the bound is to hold; everywhere by default.
        every: None for certificates. For training, at every how many calls to compute.

    Raises:
        LipcertError: The strategy iterates vectors or is not of L2, or `every` is below 1.
    """

    calls: Tensor
    pairs: Tensor
    single: Tensor

    def __init__(
        self,
        graph: Graph,
        norm: Strategy | None = None,
        region: L2Ball | None = None,
        every: int | None = None,
    ):
        super().__init__(graph)
        self.norm = Auto() if norm is None else norm
        check_strategy(self.norm, graph)
        check_region(region, self.norm)
        self.region = region
        self.local = region is not None
        if isinstance(self.norm, Iterative) or self.norm.p != 2:
            raise LipcertError(
                f"{type(self).__name__}(norm={self.norm!r}) needs a strategy for true L2 norms, "
                "e.g. lc.Auto(): it iterates no vectors. To train with it give every=1."
            )
        if every is not None and not (isinstance(every, int) and every > 0):
            raise LipcertError(f"every={every!r}: needs a whole number of at least 1, or None.")
        if every is not None and region is not None:
            raise LipcertError("every= is for training with the global bound: leave out region=.")
        self.every = every
        self._ways = _ways(graph)
        if every is not None:
            self._ways = self._ways[-1:]
            zeros = torch.zeros(self.classes, self.classes, dtype=torch.float64)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("pairs", zeros)
            self.register_buffer("single", zeros[0].clone())

    @property
    def is_cheap(self) -> bool:
        """Whether no node has to be held by a ball because it has too many values."""
        covers = [way.cover for way in self._ways if way.cover is not None]
        within = set(covers[0].of) if covers else set()
        others = [n for n in self.graph if n not in within and not isinstance(n.op, Input)]
        return all(math.prod(n.shape) <= LARGEST for n in others)

    def extra_repr(self) -> str:
        """The arguments, for ``print(bound)``."""
        named = {"region": self.region, "every": self.every}
        given = [f"{name}={value}" for name, value in named.items() if value is not None]
        return ", ".join([f"norm={self.norm}", *given])

    def forward(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
        index: Int[Tensor, " b"] | None = None,
    ) -> MarginConstants:
        """The constants of all pairs, see `Bound`."""
        if self.region is not None:
            with evaluating(self.graph):
                local = self._around(x, eps)
                return local_margins(self.classes, local.ends(), local.boxed(), local.around)
        if self.every is None or not torch.is_grad_enabled():
            return self._margins()
        if int(self.calls) % self.every == 0:
            fresh = self._margins()
            assert fresh.alone is not None
            pairs, single = fresh.dense()[0], fresh.alone()
            self.pairs, self.single = pairs.detach(), single.detach()
            # In value once, in gradient as often as the calls that it stands for.
            pairs = self.pairs + self.every * (pairs - self.pairs)
            single = self.single + self.every * (single - self.single)
        else:
            pairs, single = self.pairs, self.single
        self.calls = self.calls + 1
        return MarginConstants(
            lambda wanted: pairs[wanted], self.classes, Kind.ESTIMATE, alone=lambda: single
        )

    def per_output(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """Lipschitz constants of the single logits, see `Bound`."""
        logits = self.logits
        if self.region is not None:
            with evaluating(self.graph):
                return local_logits(self._around(x, eps).ends(anchored=False))
        return least([single_logits(logits, ends, self.p) for ends in self._ends()])

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
                return self._around(x, eps).constants(target, anchored=False)
            facts = self._facts()
            return least([Sweep(facts, [target], w).of(target).radius() for w in self._ways])

    def _around(
        self, x: Float[Tensor, "b ..."] | None, eps: float | Float[Tensor, " b"] | None
    ) -> LocalEllipsoid:
        """The bound around each sample."""
        assert self.region is not None
        x = samples(x, self.graph, self.norm)

        def norm(n: Node) -> Constant:
            op = n.op
            assert isinstance(op, Affine)
            return self._once(n, lambda: affine_norm(op, self.norm))

        return LocalEllipsoid(self.graph, x, self.region, self.region.radii(x, eps), norm)

    def _gains(self, n: Node) -> Gains:
        """The multipliers of a node."""
        return balanced

    def _facts(self) -> Facts:
        dtype = torch.float64 if self.every is None else torch.float32
        one = torch.ones((), dtype=dtype, device=device_of(self.graph))
        kind = Kind.UPPER if self.every is None else Kind.ESTIMATE
        return Facts(self.graph, one, kind, self._gains, self.norm, LARGEST)

    def _margins(self) -> MarginConstants:
        return tightest_pairs([margins(self.classes, ends, self.p) for ends in self._ends()])

    def _ends(self) -> list[list[End]]:
        """Of each sweep: the ellipsoids before the output, and the rows of its map on them."""
        with evaluating(self.graph):
            facts, terms = self._facts(), tail(self.graph.output)
            sources = list(dict.fromkeys(source for _, source in terms))
            return [ends_of(seen(Sweep(facts, sources, way), terms)) for way in self._ways]


def seen(sweep: Sweep, terms: list[tuple[LinearMap | None, Node]]) -> Seen:
    """What the logits see of one sweep: ellipsoids, and the logits' rows on each."""
    one, parts = sweep.facts.one, []
    rows: dict[Live, dict[Node, Tensor]] = {}
    for map, source in terms:
        live, found = sweep.live(source), sweep.of(source)
        if isinstance(found, Waves):
            exact = identity(source.shape) if map is None else simplify(map.to(one.dtype))
            parts.append((found.onto(exact), torch.eye(exact.out_size).to(one)))
        else:
            part = rows.setdefault(live, {})
            new = rows_of(map, source).to(one)
            part[source] = part[source] + new if source in part else new
    for live, by in rows.items():
        extent = live.of(*by)
        assert isinstance(extent, Extent)
        parts.append((extent, torch.cat(list(by.values()), 1)))
    return parts


def ends_of(parts: Seen) -> list[End]:
    """The last step of a bound for what the logits see of a sweep."""
    ends = []
    for extent, rows in parts:
        reached = Constant(extent.scale, extent.kind, extent.failure)
        ends.append(End(reached, rows if extent.root is None else rows @ extent.root.mT))
    return ends


def _ways(graph: Graph) -> list[Way]:
    """The sweeps that differ on a network; the last one uses all that there is."""
    cover = circular_cover(graph)
    within = set() if cover is None else set(cover.of)
    known = any(isinstance(n.op, Lipschitz) and n.op.expansion is not None for n in graph)
    joins = [n for n in graph if isinstance(n.op, Sum | Concat)]
    # As matrices, what is too large to be joined is split whether the sweep is joint or not.
    fitting = any(sum(math.prod(i.shape) for i in n.inputs) <= LARGEST for n in joins)
    # As matrices too, unless that would only find balls where frequencies find more.
    small = all(math.prod(n.shape) <= LARGEST for n in within)
    return [
        Way(covered, expand, joint)
        for covered in ((None, cover) if small and cover is not None else (cover,))
        for joint in ((False, True) if joins and (covered is not None or fitting) else (False,))
        for expand in ((False, True) if known else (False,))
    ]
