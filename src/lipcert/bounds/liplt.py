"""LipLT: norms of whole linear paths in place of products of norms, for any traced graph.

With every activation split into C z + D psi(z) (see `paths`), the value of a node changes by at
most

    reached(node) = sum over sources s of ||A_s|| r_s,

A_s the linear map of all paths from s, r_s how far s itself can change: 1 for the input, what has
reached its input for a psi, k times that for an opaque k-Lipschitz function. One sweep from the
input to the output finds all of them. The margin f_i - f_j goes through single rows of the last
maps, so all pairs of classes cost one sweep back with one row a class.

Reference: arXiv 2310.00116 for chains of layers with slopes in [0, 1]; the residual form, slopes of
single neurons, opaque functions and general graphs follow from the same triangle inequality.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds.ends import End, margins, single_logits
from lipcert.bounds.joint import joint_norm
from lipcert.bounds.margin import Bound, MarginConstants, device_of, full_precision
from lipcert.bounds.paths import Paths, rows_at_sources
from lipcert.errors import LipcertError
from lipcert.graph import Graph, Input, Lipschitz, Node, Slope
from lipcert.kinds import Constant, Kind, weakest
from lipcert.spectral import Auto, PowerIteration, Strategy


class LipLT(Bound):
    """The global LipLT bound.

    Never above the product bound where all neurons of a layer have the same range of slopes and
    nothing is concatenated; otherwise either can be the tighter one (`tightest` takes the best of
    each pair of classes).

    Args:
        graph: A traced network.
        norm: How spectral norms are computed. The default gives true upper bounds. For training
            `PowerIteration(1)` keeps a vector for each map from call to call, as buffers of this
            module, and moves all of them at once: a step is one sweep of the network forward and
            one back.
        joint: Bound the sum of the terms by one norm of all maps together, which is at most the
            sum of their norms; costs a few more norms a layer. Not with `PowerIteration`.
    """

    def __init__(self, graph: Graph, norm: Strategy | None = None, joint: bool = False):
        super().__init__(graph)
        self.norm = Auto() if norm is None else norm
        self.joint = joint
        if not isinstance(self.norm, Strategy):
            raise LipcertError(
                f"norm={norm!r} is no strategy; give one as a value, e.g. norm=lc.Auto()."
            )
        if joint and isinstance(self.norm, PowerIteration):
            raise LipcertError(
                "joint=True needs a strategy without iterated vectors, e.g. norm=lc.Auto(); train "
                "with joint=False."
            )
        self._inner = Paths(graph, [n.inputs[0] for n in graph if _spreads(n)])
        self._whole = Paths(graph, [*self._inner.ends, graph.output])
        self._place = {n: place for place, n in enumerate(graph)}
        if isinstance(self.norm, PowerIteration):
            for s in self._whole.starts():
                shape = len(self._whole.ends_after[s]), *s.shape
                rows = torch.randn(shape, dtype=_dtype(graph), device=device_of(graph))
                units = torch.nn.functional.normalize(rows.flatten(1)).reshape(shape)
                self.register_buffer(self._name(s), units)

    def forward(self, x: Float[Tensor, "b ..."] | None = None) -> MarginConstants:
        """The constants of all pairs; `x` is not looked at."""
        return margins(self.classes, self._ends())

    def lipschitz(self) -> Constant:
        """A Lipschitz constant of the whole output vector."""
        return self.prefix(self.graph.output)

    def per_output(self) -> Constant:
        """Lipschitz constants of the single logits; `value` has shape `(classes,)`."""
        return single_logits(self.graph.output.shape[0], self._ends())

    def prefix(self, upto: Node | str) -> Constant:
        """A Lipschitz constant of the function from the input to a node (or its name)."""
        target = self.graph.node(upto) if isinstance(upto, str) else upto
        with full_precision(self.graph):
            if isinstance(self.norm, PowerIteration) and target in self._whole.ends:
                return self._iterated(self._whole)[target]
            return self._swept(_upto(self.graph, self._inner, target))[target]

    def prefixes(self) -> dict[Node, Constant]:
        """A constant of the function from the input to each input of an activation or opaque
        function, and to the output: the sub-network bounds that come along."""
        with full_precision(self.graph):
            if isinstance(self.norm, PowerIteration):
                return self._iterated(self._whole)
            return self._swept(self._whole)

    def _ends(self) -> list[End]:
        """For each source of the output: how far it can change, and the rows of its map."""
        with full_precision(self.graph):
            if isinstance(self.norm, PowerIteration):
                reached, dtype = self._iterated(self._inner), _dtype(self.graph)
            else:
                reached, dtype = self._swept(self._inner), torch.float64
            like = torch.empty(0, dtype=dtype, device=device_of(self.graph))
            output = self.graph.output
            paths = Paths(self.graph, [output])
            rows = torch.eye(output.shape[0], dtype=dtype, device=like.device)
            found = rows_at_sources(self.graph, output, rows, paths.steps(like))
            return [End(_radius(s, reached), rows.flatten(1)) for s, rows in found.items()]

    def _swept(self, paths: Paths) -> dict[Node, Constant]:
        """What reaches each end, one norm of one map after the other."""
        reached: dict[Node, Constant] = {}
        failure = 0.0
        for end, maps in paths.maps(paths.steps()).items():
            norms = {s: self.norm(map) for s, map in maps.items()}
            radii = {s: _radius(s, reached) for s in maps}
            device = device_of(self.graph)
            value = torch.stack(
                [norms[s].value.to(device) * radii[s].value.to(device) for s in maps]
            ).sum()
            failure += sum(norm.failure for norm in norms.values())  # the union over every norm
            if self.joint and len(maps) > 1:
                together = joint_norm(maps, {s: radii[s].value for s in maps}, norms, self.norm)
                failure += together.failure
                value = torch.minimum(value, together.value)
            kind = weakest(part.kind for part in (*norms.values(), *radii.values()))
            reached[end] = Constant(value, kind, min(1.0, failure))
        return reached

    def _iterated(self, paths: Paths) -> dict[Node, Constant]:
        """The same by power iteration, all maps at once, from the vectors kept."""
        assert isinstance(self.norm, PowerIteration)
        kept = {s: getattr(self, self._name(s)) for s in paths.starts()}
        steps = paths.steps(torch.empty(0, dtype=_dtype(self.graph), device=device_of(self.graph)))
        # The output comes last in the graph, so its rows are the last ones kept.
        vectors = {s: rows[: len(paths.ends_after[s])] for s, rows in kept.items()}
        norms, better = self.norm.refine_many(
            lambda rows: paths.push(steps, rows), lambda rows: paths.pull(steps, rows), vectors
        )
        for s, rows in kept.items():
            fresh = torch.cat([better[s], rows[len(better[s]) :]])
            setattr(self, self._name(s), fresh)  # the old tensor may be in someone's graph
        reached: dict[Node, Constant] = {}
        for end in paths.ends:
            radii = [_radius(s, reached).value.to(norms[end]) for s in paths.sources[end]]
            reached[end] = Constant((norms[end] * torch.stack(radii)).sum(), Kind.ESTIMATE)
        return reached

    def _name(self, source: Node) -> str:
        return f"vectors_{self._place[source]}"


def _spreads(n: Node) -> bool:
    """Whether a node is a source whose change depends on what reaches its input."""
    return isinstance(n.op, Slope | Lipschitz)


def _radius(source: Node, reached: Mapping[Node, Constant]) -> Constant:
    """How far a source can change, for a change of the input by 1."""
    match source.op:
        case Input():
            return Constant(torch.ones((), dtype=torch.float64), Kind.UPPER)
        case Lipschitz(constant=constant, kind=kind):
            before = reached[source.inputs[0]]
            k = torch.as_tensor(constant()).to(before.value)
            return Constant(k * before.value, weakest((kind, before.kind)), before.failure)
        case _:
            return reached[source.inputs[0]]


def _upto(graph: Graph, inner: Paths, target: Node) -> Paths:
    """The paths to a node and to the ends that it depends on."""
    needed = {target}
    for n in reversed(graph.nodes):
        if n in needed:
            needed.update(n.inputs)
    return Paths(graph, [*(end for end in inner.ends if end in needed), target])


def _dtype(graph: Graph) -> torch.dtype:
    weights = (p.dtype for p in graph.model.parameters() if p.is_floating_point())
    return next(weights, torch.get_default_dtype())
