"""Linear paths through a network whose activations are split into a linear part and a rest.

An elementwise function with secant slopes in [a, b] is phi(z) = C z + D psi(z), C = (a + b) / 2,
D = (b - a) / 2, and every secant slope of psi lies in [-1, 1]. Between two inputs the value of any
node changes by the sum over *sources* s of A_s times the change of s: the network's input, every
psi, and every function of which only a constant is known. A_s is linear: what all paths from the
source to the node do, activations replaced by their C.

`Paths` moves batches of vectors along these maps, all sources and all ends in one sweep, so that
one operator call a node serves every map at once; or gives the maps themselves.

Reference: arXiv 2310.00116 (LipLT), the loop transformation; here for any graph.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds.steps import Step, is_source, linear_step, pulled
from lipcert.graph import Affine, Concat, Graph, Input, Lipschitz, Node, Slope, Sum
from lipcert.linear_kinds import Scale, identity, zero
from lipcert.linear_map import Add, Composition, Generic, LinearMap, Stack, Transpose
from lipcert.simplify import simplify

Vectors = dict[Node, Tensor]
_PARTS = 100


class Paths:
    """The linear maps from every source to some nodes of a graph, the *ends*.

    Attributes:
        ends: The ends in topological order.
        sources: For each node that matters, the sources it depends on, in topological order.
        ends_after: For each node that matters, the ends at it or after it, in that order.
        order: For each pair (source, end after it) its place among the pairs (end, source of it).
    """

    def __init__(self, graph: Graph, ends: Sequence[Node]):
        self._graph = graph
        wanted = set(ends)
        after: dict[Node, set[Node]] = {n: {n} & wanted for n in graph}
        for n in reversed(graph.nodes):
            if not isinstance(n.op, Lipschitz):  # nothing linear passes an opaque function
                for i in n.inputs:
                    after[i] |= after[n]
        order = {n: place for place, n in enumerate(graph)}
        self._nodes = [n for n in graph if after[n]]
        self.ends = tuple(n for n in graph if n in wanted)
        self.ends_after = {n: tuple(sorted(after[n], key=order.__getitem__)) for n in self._nodes}
        self.sources: dict[Node, tuple[Node, ...]] = {}
        for n in self._nodes:
            before = {n} if is_source(n) else set()
            if not isinstance(n.op, Lipschitz):
                before.update(s for i in n.inputs for s in self.sources[i])
            self.sources[n] = tuple(sorted(before, key=order.__getitem__))

        # Activations that only affine maps read, with these maps.
        users = {n: [m for m in self._nodes if n in m.inputs] for n in self._nodes}
        self._readers = {
            n: users[n]
            for n in self._nodes
            if isinstance(n.op, Slope)
            and n not in wanted
            and all(isinstance(m.op, Affine) for m in users[n])
        }
        by_end = [(s, end) for end in self.ends for s in self.sources[end]]
        by_source = [(s, end) for s in self.starts() for end in self.ends_after[s]]
        place = {pair: i for i, pair in enumerate(by_end)}
        self.order = torch.tensor([place[pair] for pair in by_source], dtype=torch.long)

    def starts(self) -> list[Node]:
        """Every source of some end."""
        return [n for n in self._nodes if is_source(n)]

    def steps(self, like: Tensor | None = None) -> dict[Node, Step]:
        """The step of every node that matters, see `linear_step`.

        With `like`, the maps are the same from every source to every end, but an activation of
        equal slopes leaves the multiplication with C to the affine maps that read it, whose
        weights are fewer than the numbers of all vectors.
        """
        steps = {n: linear_step(n, like) for n in self._nodes}
        if like is not None:
            for n, readers in self._readers.items():
                c, d = steps[n].through, steps[n].emit
                if isinstance(c, Scale) and isinstance(d, Scale) and _fixed_number(c.diagonal):
                    share = d.diagonal / c.diagonal
                    steps[n] = Step(None, None if share == 1 else Scale(n.shape, n.shape, share))
                    for m in readers:
                        map = steps[m].through
                        assert map is not None
                        steps[m] = Step(simplify(Scale(m.shape, m.shape, c.diagonal) @ map))
        return steps

    def push(self, steps: Mapping[Node, Step], vectors: Vectors) -> Vectors:
        """A v for every pair of an end and a source of it.

        Steps may differ from sample to sample: an axis of the samples then comes before the
        shape of each node, here and in `pull`.

        Args:
            steps: From `steps`.
            vectors: For each source one vector for each end after it, `(ends, *source.shape)`.

        Returns:
            For each end the images from each source of it, `(sources, *end.shape)`.
        """
        held: Vectors = {}  # (ends after n, sources of n, *n.shape)
        images: Vectors = {}
        for n in self._nodes:
            parts = []
            if isinstance(n.op, Sum | Concat):
                parts.append(self._joined(n, held))
            elif n.inputs and not isinstance(n.op, Lipschitz):
                x = _take(held[n.inputs[0]], _places(self._later(n.inputs[0]), self._after(n)), 0)
                parts.append(_applied(steps[n].through, x))
            if is_source(n):
                parts.append(_applied(steps[n].emit, vectors[n][:, None]))
            held[n] = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            if n in self.ends:
                first, held[n] = held[n].split([1, len(held[n]) - 1])
                images[n] = first[0]
        return images

    def pull(self, steps: Mapping[Node, Step], images: Vectors) -> Vectors:
        """A^T y for every pair of an end and a source: from the layout `push` returns to its input.

        Args:
            steps: From `steps`.
            images: For each end one vector for each source of it, `(sources, *end.shape)`.
        """
        held: dict[Node, list[tuple[Tensor, list[int]]]] = {n: [] for n in self._nodes}
        vectors: Vectors = {}
        for n in reversed(self._nodes):
            own = [(images[n][None], [0])] if n in self.ends else []
            parts, size = own + held.pop(n), len(self._after(n))
            if is_source(n):
                emit, x = steps[n].emit, _placed([(y[:, -1], at) for y, at in parts], size, 0)
                vectors[n] = _applied(None if emit is None else emit.T, x)
            if isinstance(n.op, Input | Lipschitz):
                continue
            for place, i in enumerate(n.inputs):
                passing = _places(self.sources[n], self.sources[i])
                taken = [(_take(y, passing, 1), at) for y, at in parts]
                onward = _places(self._after(i), self._after(n))
                if isinstance(n.op, Slope) and steps[n].through is None:
                    held[i] += [(y, [onward[p] for p in at]) for y, at in taken]
                    continue
                y = _placed(taken, size, 0)
                lead = y.shape[: y.ndim - len(n.shape)]
                y = pulled(n, steps[n], y.reshape(-1, *n.shape), place).reshape(*lead, *i.shape)
                held[i].append((y, onward))
        return vectors

    def maps(self, steps: Mapping[Node, Step]) -> dict[Node, dict[Node, LinearMap]]:
        """The maps themselves: for each end, for each source of it."""
        held: dict[Node, dict[Node, LinearMap]] = {}
        for n in self._nodes:
            before = [held[i] for i in n.inputs]
            step, found = steps[n], {}
            if isinstance(n.op, Sum | Concat):
                for s in self.sources[n]:
                    found[s] = _joined_maps(n, s, before)
            elif step.through is not None:
                found = {s: simplify(step.through @ map) for s, map in before[0].items()}
            if is_source(n):
                found[n] = identity(n.shape) if step.emit is None else step.emit
            held[n] = {s: self._limited(n, s, map) for s, map in found.items()}
        return {n: held[n] for n in self.ends}

    def _limited(self, end: Node, source: Node, map: LinearMap) -> LinearMap:
        """The map; a sweep back in its place if it is made of many, as sums double the number."""
        if _parts(map) <= _PARTS:
            return map

        def back(y: Tensor) -> Tensor:
            steps = {n: linear_step(n, y) for n in self._nodes}
            return rows_at_sources(self._graph, end, y, steps)[source]

        return Generic(end.shape, source.shape, back).T

    def _after(self, n: Node) -> tuple[Node, ...]:
        return self.ends_after[n]

    def _later(self, n: Node) -> tuple[Node, ...]:
        """The ends after a node without itself."""
        return self.ends_after[n][1:] if n in self.ends else self.ends_after[n]

    def _joined(self, n: Node, held: Vectors) -> Tensor:
        """The sum or concatenation, each input's sources at their places among the node's."""
        parts = []
        for i in n.inputs:
            x = _take(held[i], _places(self._later(i), self._after(n)), 0)
            places = _places(self.sources[n], self.sources[i])
            parts.append(_placed([(x, places)], len(self.sources[n]), 1))
        if isinstance(n.op, Sum):
            return torch.stack(parts).sum(0)
        flat = [p.flatten(p.ndim - len(i.shape)) for p, i in zip(parts, n.inputs, strict=True)]
        return torch.cat(flat, -1)


def rows_at_sources(
    graph: Graph, end: Node, rows: Float[Tensor, "k ..."], steps: Mapping[Node, Step]
) -> dict[Node, Float[Tensor, "k ..."]]:
    """A^T applied to each row for every source of one node, in one sweep back.

    Args:
        graph: The graph.
        end: The node.
        rows: Vectors `(k, *end.shape)`.
        steps: Of the nodes up to `end`.
    """
    held: dict[Node, Tensor] = {end: rows}
    found: dict[Node, Tensor] = {}
    for n in reversed(graph.nodes):
        if n in held:
            y, step = held.pop(n), steps[n]
            if is_source(n):
                found[n] = y if step.emit is None else step.emit.adjoint(y)
            if not isinstance(n.op, Input | Lipschitz):
                for place, i in enumerate(n.inputs):
                    x = pulled(n, step, y, place)
                    held[i] = held[i] + x if i in held else x
    return found


def _applied(map: LinearMap | None, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The map applied to every vector, whatever axes come before its shape; None: the identity."""
    if map is None:
        return x
    lead = x.shape[: x.ndim - len(map.in_shape)]
    return map.apply(x.reshape(-1, *map.in_shape)).reshape(*lead, *map.out_shape)


def _fixed_number(diagonal: Tensor) -> bool:
    """Whether a slope is one positive number that does not learn."""
    return diagonal.ndim == 0 and not diagonal.requires_grad and bool(diagonal > 0)


def _parts(map: LinearMap) -> int:
    """Of how many maps a map is made."""
    match map:
        case Composition(factors=parts) | Add(terms=parts) | Stack(parts=parts):
            return sum(_parts(part) for part in parts)
        case Transpose(inner=inner):
            return _parts(inner)
        case _:
            return 1


def _joined_maps(n: Node, source: Node, before: Sequence[Mapping[Node, LinearMap]]) -> LinearMap:
    """The map from a source to a sum or concatenation of nodes."""
    if isinstance(n.op, Sum):
        terms = tuple(maps[source] for maps in before if source in maps)
        return simplify(Add(source.shape, n.shape, terms))
    parts = (
        maps.get(source) or zero(source.shape, i.shape)
        for i, maps in zip(n.inputs, before, strict=True)
    )
    return simplify(Stack(source.shape, n.shape, tuple(parts)))


def _places(of: Sequence[Node], wanted: Sequence[Node]) -> list[int]:
    """Where the wanted nodes stand in a longer list."""
    position = {n: place for place, n in enumerate(of)}
    return [position[n] for n in wanted]


def _take(x: Tensor, places: list[int], axis: int) -> Tensor:
    """Some entries of an axis; a view where they are neighbours, as in plain chains."""
    if len(places) == x.shape[axis]:
        return x  # all of them, in their order
    first, count = places[0], len(places)
    if places == list(range(first, first + count)):
        return x.narrow(axis, first, count)
    return x.index_select(axis, torch.tensor(places, device=x.device))


def _placed(parts: Sequence[tuple[Tensor, list[int]]], size: int, axis: int) -> Tensor:
    """The parts added up, each at its places of an axis of the given size."""
    if [place for _, places in parts for place in places] == list(range(size)):
        return parts[0][0] if len(parts) == 1 else torch.cat([x for x, _ in parts], axis)
    shape = list(parts[0][0].shape)
    shape[axis] = size
    total = parts[0][0].new_zeros(shape)
    for x, places in parts:
        total = total.index_add(axis, torch.tensor(places, device=x.device), x)
    return total
