"""The ellipsoid bound around samples: slopes of a ball, and of secants through its centre.

Two sweeps give two kinds of constants. *Anchored* ones hold the change of a node from its value at
the sample, which is all that a certificate needs; activations enter with the slopes of secants
through the sample. *Pairwise* ones are Lipschitz constants in the ball; activations enter with all
slopes that they have there.

Boxes come from the anchored sweep, entry by entry: the root of a number on the diagonal of S is how
far that entry moves. They narrow the slopes of the next activations, and these the next boxes.

Reference: this library; the steps are those of `extent`.
"""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds.around import Around
from lipcert.bounds.local_ends import BoxedEnd, EllipsoidEnd, LocalEnd, boxed
from lipcert.bounds.local_extent import (
    LocalExtent,
    stacked,
    through_constant,
    through_map,
    through_slopes,
    together,
)
from lipcert.bounds.slopes import everywhere
from lipcert.bounds.tail import rows_of, tail
from lipcert.graph import Affine, Concat, Graph, Input, Lipschitz, Node, Slope, Sum
from lipcert.kinds import Constant, Kind, weakest
from lipcert.region import L2Ball

LARGEST = 1024
"""Nodes of more values than this are held by balls."""

_ENTRIES = 2**23  # of the matrices of one node, all samples that go together: 64 MB


class LocalEllipsoid:
    """The ellipsoid bound of one batch, of kind upper where the norms are.

    Sweeps keep the matrices of few nodes and samples at a time, and only vectors of each node for
    later; what is asked for afterwards may take another sweep.

    Args:
        graph: The graph.
        x: The samples, float64.
        ball: The region. Boxes are those of the sweep whether it is `progressive` or not.
        radii: Radius around each sample, `(b,)`; 0 is allowed.
        norm: Gives the norm of an affine node's map; asked for nodes of more than `largest` values.
        largest: Nodes of more values than this are held by balls.

    Attributes:
        around: The boxes.
    """

    def __init__(
        self,
        graph: Graph,
        x: Float[Tensor, "b ..."],
        ball: L2Ball,
        radii: Float[Tensor, " b"],
        norm: Callable[[Node], Constant],
        largest: int = LARGEST,
    ):
        self._graph, self._make, self._norms = graph, norm, dict[Node, Constant]()
        sizes = [math.prod(n.shape) for n in graph if not isinstance(n.op, Input)]
        widest = max((size for size in sizes if size <= largest), default=1)
        outputs = min(math.prod(graph.output.shape), largest)
        count = max(1, _ENTRIES // max(widest**2, outputs * max(sizes, default=1)))
        self._parts = [
            _Part(graph, some, ball, r, self._norm, largest)
            for some, r in zip(x.split(count), radii.split(count), strict=True)
        ]
        if len(self._parts) == 1:
            self.around = self._parts[0].around
        else:
            self.around = Around(
                *(graph, x, ball, radii),
                lambda n: self.constants(n, True).value,
                lambda n: _joined(part.moves(n) for part in self._parts),
            )

    def constants(self, n: Node, anchored: bool) -> Constant:
        """How far a node moves when the input moves by 1; `value` has shape `(b,)`.

        Args:
            n: The node.
            anchored: Whether moves start at the sample, or anywhere in the ball.
        """
        value = torch.cat([part.radius(n, anchored) for part in self._parts])
        return Constant(value, *self._claim(n))

    def per_entry(self, n: Node, anchored: bool) -> Constant:
        """How far each entry of a node moves, as `constants`; `value` has shape `(b, *shape)`."""
        value = torch.cat([part.entries(n, anchored) for part in self._parts])
        return Constant(value.reshape(-1, *n.shape), *self._claim(n))

    def ends(self, anchored: bool = True) -> list[LocalEnd]:
        """The terms of the logits with the ellipsoids before them."""
        terms = tail(self._graph.output)
        rows = [rows_of(map, source).to(self.around.radii) for map, source in terms]
        bases = [(_basis(r), source) for r, (_, source) in zip(rows, terms, strict=True)]
        found = [part.ends(bases, anchored) for part in self._parts]
        ends = []
        for r, (basis, source), pieces in zip(rows, bases, zip(*found, strict=True), strict=True):
            factor, rest = (_joined(piece[k] for piece in pieces) for k in (0, 1))
            reached = self.constants(source, anchored)
            if factor is None or rest is None:
                ends.append(LocalEnd(reached, r))
            else:
                ends.append(EllipsoidEnd(reached, r, basis=basis, factor=factor, rest=rest))
        return ends

    def boxed(self) -> list[BoxedEnd]:
        """The terms of the logits, each with its box."""
        return boxed(self.around, lambda n: self.constants(n, True))

    def _norm(self, n: Node) -> Constant:
        if n not in self._norms:
            self._norms[n] = self._make(n)
        return self._norms[n]

    def _claim(self, n: Node) -> tuple[Kind, float]:
        """What is claimed of a node: what all norms claim so far, boxes use them too."""
        kinds = [c.kind for c in self._norms.values()]
        kinds += [m.op.kind for m in self._graph if isinstance(m.op, Lipschitz)]
        return weakest(kinds), min(1.0, sum(c.failure for c in self._norms.values()))


class _Part:
    """Some of the samples."""

    def __init__(
        self,
        graph: Graph,
        x: Float[Tensor, "b ..."],
        ball: L2Ball,
        radii: Float[Tensor, " b"],
        norm: Callable[[Node], Constant],
        largest: int,
    ):
        self._graph, self._x, self._norm, self._largest = graph, x, norm, largest
        self._radii: dict[tuple[Node, bool], Tensor] = {}
        self._entries: dict[tuple[Node, bool], Tensor | None] = {}
        self._read: dict[Node, Tensor] | None = None
        self._live: dict[Node, LocalExtent] = {}  # of the anchored sweep that is under way
        self.around = Around(*(graph, x, ball, radii), lambda n: self.radius(n, True), self.moves)

    def radius(self, n: Node, anchored: bool) -> Float[Tensor, " b"]:
        """The longest half axis."""
        if (n, anchored) not in self._radii:
            if anchored and n in self._live:
                extent = self._live[n]
            else:
                extent = self._sweep([n], anchored)[n]
            self._radii[n, anchored] = extent.radius()
        return self._radii[n, anchored]

    def entries(self, n: Node, anchored: bool) -> Float[Tensor, "b n"]:
        """How far each entry moves."""
        if (n, anchored) not in self._entries:
            self._sweep([n], anchored)
        found = self._entries[n, anchored]
        if found is None:
            found = self.radius(n, anchored)[:, None].expand(-1, math.prod(n.shape))
        return found

    def moves(self, n: Node) -> Float[Tensor, "b ..."] | None:
        """How far each entry moves from the sample, where a matrix tells more than the radius."""
        if not self._small(n):
            return None
        if (n, True) not in self._entries:
            self._sweep([n], True)
        found = self._entries[n, True]
        return None if found is None else found.reshape(-1, *n.shape)

    def ends(
        self, terms: list[tuple[Tensor, Node]], anchored: bool
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """For orthonormal columns Q at nodes: F with Q^T S Q = F F^T, and a root of a bound of S.

        None twice where a node has no matrix. The radii of the nodes are found as well.
        """
        swept = self._sweep([source for _, source in terms], anchored)
        found: list[tuple[Tensor | None, Tensor | None]] = []
        for basis, source in terms:
            extent = swept[source]
            self._radii[source, anchored] = extent.radius()
            if extent.root is None:
                found.append((None, None))
                continue
            factor = extent.scale[:, None, None] * (extent.root @ basis).mT
            whole = torch.linalg.vector_norm(extent.root.flatten(1), dim=1)
            found.append((factor, extent.scale * whole))
        return found

    def _sweep(self, targets: list[Node], anchored: bool) -> dict[Node, LocalExtent]:
        """Forward as far as the targets need; the anchored one leaves the boxes on its way."""
        if not anchored and not all((n, True) in self._entries for n in targets):
            self._sweep(targets, True)
        needed, last = set(targets), dict[Node, Node]()
        for n in reversed(self._graph.nodes):
            if n in needed:
                needed.update(n.inputs)
                for i in n.inputs:
                    last.setdefault(i, n)
        live: dict[Node, LocalExtent] = {}
        if anchored:
            self._live = live
        for n in self._graph:
            if n not in needed:
                continue
            live[n] = extent = self._step(n, [live[i] for i in n.inputs], anchored)
            self._entries[n, anchored] = extent.entries()
            if extent.root is None:
                self._radii[n, anchored] = extent.scale
            if anchored:
                self.around.box(n)
            for i in set(n.inputs):
                if last[i] is n and i not in targets:
                    del live[i]
        self._live = {}
        return live

    def _step(self, n: Node, before: list[LocalExtent], anchored: bool) -> LocalExtent:
        small = self._small(n)
        match n.op:
            case Input():
                return LocalExtent(self._x.new_ones(len(self._x)))
            case Affine():
                norm = None if small else self._norm(n).value
                return through_map(before[0], self.around.map(n), norm)
            case Slope():
                slopes = self.around.anchored if anchored and small else self.around.slopes
                low, high = (s.expand(len(self._x), *n.shape).flatten(1) for s in slopes(n))
                read = self._all_read().get(n) if small else None
                return through_slopes(before[0], low, high, read, small)
            case Lipschitz(constant=constant):
                return through_constant(before[0], torch.as_tensor(constant()))
            case Sum():
                return together(before)
            case Concat():
                return stacked(before, [math.prod(i.shape) for i in n.inputs], small)

    def _small(self, n: Node) -> bool:
        return math.prod(n.shape) <= self._largest

    def _all_read(self) -> dict[Node, Float[Tensor, "b k n"]]:
        """What the logits read of each activation, to choose multipliers by.

        The network is taken linear, with slopes between those at the samples and the middle ones of
        all inputs: later layers' boxes are not known yet.
        """
        if self._read is None:
            self._read = self._read_back()
        return self._read

    def _read_back(self) -> dict[Node, Float[Tensor, "b k n"]]:
        output, count = self._graph.output, len(self._x)
        size = math.prod(output.shape)
        if len(output.shape) != 1 or size > self._largest:
            return {}
        wanted: set[Node] = set()  # small activations, and what comes after them
        for n in self._graph:
            self.around.centre(n)
            if (isinstance(n.op, Slope) and self._small(n)) or wanted.intersection(n.inputs):
                wanted.add(n)
        rows = torch.eye(size, dtype=self._x.dtype, device=self._x.device)
        reading = {output: (rows - rows.mean(0)).repeat(count, 1)}
        found: dict[Node, Tensor] = {}
        for n in reversed(self._graph.nodes):
            if n not in wanted or n not in reading:
                continue
            at = reading.pop(n)
            match n.op:
                case Affine():
                    passed = [self.around.map(n).adjoint(at.reshape(-1, *n.shape)).flatten(1)]
                case Slope(secants=secants):
                    if self._small(n):
                        found[n] = at.reshape(count, size, math.prod(n.shape))
                    centre = self.around.centre(n.inputs[0])
                    ends = *secants(centre, centre), *(s.to(centre) for s in everywhere(n))
                    middle = torch.stack(torch.broadcast_tensors(*ends)).mean(0)
                    middle = middle.expand_as(centre).flatten(1)
                    passed = [at * middle.repeat_interleave(size, 0)]
                case Sum():
                    passed = [at] * len(n.inputs)
                case Concat():
                    passed = list(at.split([math.prod(i.shape) for i in n.inputs], 1))
                case _:
                    continue
            for i, part in zip(n.inputs, passed, strict=True):
                reading[i] = reading[i] + part if i in reading else part
        return found


def _joined(parts: Iterable[Tensor | None]) -> Tensor | None:
    """The parts of one batch; None where they are."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def _basis(rows: Float[Tensor, "classes n"]) -> Float[Tensor, "n k"]:
    """Orthonormal columns that span the rows."""
    largest = rows.abs().max()
    return torch.linalg.qr(rows.mT / largest.where(largest > 0, 1))[0]
