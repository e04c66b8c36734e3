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

import functools
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.bounds.ends import End, margins, single_logits
from lipcert.bounds.local_ends import local_logits, local_margins
from lipcert.bounds.local_liplt import LocalLipLT
from lipcert.bounds.margin import (
    Bound,
    MarginConstants,
    check_region,
    check_strategy,
    device_of,
    evaluating,
    samples,
)
from lipcert.bounds.paths import Paths, rows_at_sources
from lipcert.bounds.reach import product_from, radius, reached_by_norms
from lipcert.bounds.steps import Step
from lipcert.bounds.tightest import least
from lipcert.errors import LipcertError
from lipcert.graph import Graph, Lipschitz, Node, Slope
from lipcert.kinds import Constant, Kind
from lipcert.region import L2Ball
from lipcert.spectral import Auto, Iterative, Strategy
from lipcert.spectral.iterative import Rows


class LipLT(Bound):
    """The LipLT bound: global, or around each sample.

    Around samples activations have the slopes of the ball (see `local_liplt`), and `drop` is the
    worst case of the last layer over ball and box. A smaller ball can have larger constants, so
    `tightest` with the global bound is better than either.

    With exact norms never above the product bound where all neurons of a layer have the same range
    of slopes and nothing is concatenated; otherwise either can be the tighter one (`tightest` takes
    the best of each pair of classes).

    Args:
        graph: A traced network.
        norm: How spectral norms are computed. The default gives true upper bounds. For training
            `LOBPCG(1)` or `PowerIteration(1)` keep vectors for each map from call to call, as
            buffers of this module, and move all of them at once: a step is one sweep of the network
            forward and one back.
        joint: Bound the sum of the terms by one norm of all maps together, which is at most the
            sum of their norms; costs a few more norms a layer. Not with iterated vectors.
        region: Where the bound is to hold; everywhere by default.
    """

    def __init__(
        self,
        graph: Graph,
        norm: Strategy | None = None,
        joint: bool = False,
        region: L2Ball | None = None,
    ):
        super().__init__(graph)
        self.norm = Auto() if norm is None else norm
        self.joint = joint
        self.region = region
        self.local = region is not None
        check_strategy(self.norm, graph)
        check_region(region, self.norm)
        self.p = self.norm.p
        if joint and (isinstance(self.norm, Iterative) or self.norm.p != 2):
            raise LipcertError(
                "joint=True needs an L2 strategy without iterated vectors, e.g. norm=lc.Auto(); "
                "train with joint=False."
            )
        self._inner = Paths(graph, [n.inputs[0] for n in graph if _spreads(n)])
        self._whole = Paths(graph, [*self._inner.ends, graph.output])
        self._place = {n: place for place, n in enumerate(graph)}
        if isinstance(self.norm, Iterative):
            like = self._like()
            for s in self._whole.starts():
                states = [self.norm.start(s.shape, like) for _ in self._whole.ends_after[s]]
                self.register_buffer(self._name(s), torch.stack(states))

    def extra_repr(self) -> str:
        """The arguments, for ``print(bound)``."""
        return f"norm={self.norm}, joint={self.joint}"

    def forward(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
        index: Int[Tensor, " b"] | None = None,
    ) -> MarginConstants:
        """The constants of all pairs, see `Bound`; `index` is not looked at."""
        if self.region is None:
            return margins(self.classes, self._ends(), self.p)
        with evaluating(self.graph):
            local = self._around(x, eps)
            return local_margins(self.classes, local.ends(), local.boxed(), local.around)

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
            return local_logits(self._around(x, eps).ends())

    def prefix(
        self,
        upto: Node | str,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """A Lipschitz constant of the function from the input to a node, see `Bound`."""
        target = self.graph.node(upto) if isinstance(upto, str) else upto
        with evaluating(self.graph):
            if self.region is None:
                return self._prefix(target)
            found = self._around(x, eps).reached(target)
            if isinstance(self.norm, Iterative) or target in self._whole.ends:
                return found
            # Between the ends of paths it goes on as the product bound does.
            return least([found, self._once(target, lambda: self._prefix(target))])

    def _prefix(self, target: Node) -> Constant:
        """The global one."""
        if isinstance(self.norm, Iterative) and target in self._whole.ends:
            return self._iterated(self._whole)[target]
        paths = _upto(self.graph, self._inner, target)
        return reached_by_norms(self.graph, paths, self.norm, self.joint)[target]

    def prefixes(self) -> dict[Node, Constant]:
        """The bounds of sub-networks that come along.

        From the input to each input of an activation or opaque function, and to the output.
        """
        with evaluating(self.graph):
            return self._reached(self._whole)

    def explained(self) -> tuple[dict[Node, Constant], MarginConstants]:
        """`prefixes()` and the constants of all pairs, every norm computed once."""
        classes, prefixes = self.classes, self.prefixes()
        return prefixes, margins(classes, self._ends(prefixes), self.p)

    def _around(
        self, x: Float[Tensor, "b ..."] | None, eps: float | Float[Tensor, " b"] | None
    ) -> LocalLipLT:
        """The bound around each sample, its parts worked out when asked for."""
        assert self.region is not None
        x = samples(x, self.graph, self.norm)
        reached = dict(self._once("reached", lambda: self._reached(self._whole)))
        return LocalLipLT(
            *(self.graph, self._whole, x, self.region, self.region.radii(x, eps)),
            lambda n: product_from(n, reached, self.norm),
            functools.partial(self._iterated_locally, len(x))
            if isinstance(self.norm, Iterative)
            else None,
        )

    def _ends(self, reached: dict[Node, Constant] | None = None) -> list[End]:
        """For each source of the output: how far it can change, and the rows of its map."""
        with evaluating(self.graph):
            reached = self._reached(self._inner) if reached is None else reached
            output, like = self.graph.output, self._like()
            rows = torch.eye(output.shape[0], dtype=like.dtype, device=like.device)
            steps = Paths(self.graph, [output]).steps(like)
            found = rows_at_sources(self.graph, output, rows, steps)
            return [End(radius(s, reached), rows.flatten(1)) for s, rows in found.items()]

    def _like(self) -> Tensor:
        """The precision to work in: that of the weights while training, else float64."""
        dtype = _dtype(self.graph) if isinstance(self.norm, Iterative) else torch.float64
        return torch.empty(0, dtype=dtype, device=device_of(self.graph))

    def _reached(self, paths: Paths) -> dict[Node, Constant]:
        """What reaches each end."""
        if isinstance(self.norm, Iterative):
            return self._iterated(paths)
        return reached_by_norms(self.graph, paths, self.norm, self.joint)

    def _iterated(self, paths: Paths) -> dict[Node, Constant]:
        """The same by power iteration, all maps at once, from the vectors kept."""
        assert isinstance(self.norm, Iterative)
        like = self._like()  # the network may have moved or changed its precision since
        kept = {s: getattr(self, self._name(s)).to(like) for s in paths.starts()}
        steps = paths.steps(like)
        # The output comes last in the graph, so its rows are the last ones kept.
        state = {s: rows[: len(paths.ends_after[s])] for s, rows in kept.items()}
        norms, better = self.norm.refine_many(
            lambda rows: paths.push(steps, rows),
            lambda rows: paths.pull(steps, rows),
            state,
            paths.order.to(like.device),
        )
        for s, rows in kept.items():
            fresh = torch.cat([better[s], rows[len(better[s]) :]])
            setattr(self, self._name(s), fresh)  # the old tensor may be in someone's graph
        return _accumulated(paths, norms)

    def _iterated_locally(self, count: int, steps: dict[Node, Step]) -> dict[Node, Constant]:
        """The same for the maps of each of some samples, from the vectors of the global ones."""
        assert isinstance(self.norm, Iterative)
        like, paths = self._like(), self._whole

        def samples_apart(rows: Rows) -> Rows:
            return {n: r.unflatten(0, (-1, count)) for n, r in rows.items()}

        def together(rows: Rows) -> Rows:
            return {n: r.flatten(0, 1) for n, r in rows.items()}

        kept = {s: getattr(self, self._name(s)).to(like) for s in paths.starts()}
        order = paths.order.to(like.device)[:, None] * count + torch.arange(count).to(like.device)
        norms, _ = self.norm.refine_many(
            lambda rows: together(paths.push(steps, samples_apart(rows))),
            lambda rows: together(paths.pull(steps, samples_apart(rows))),
            {s: rows.repeat_interleave(count, 0) for s, rows in kept.items()},
            order.flatten(),
        )
        return _accumulated(paths, samples_apart(norms))

    def _name(self, source: Node) -> str:
        return f"vectors_{self._place[source]}"


def _accumulated(paths: Paths, norms: Mapping[Node, Tensor]) -> dict[Node, Constant]:
    """What reaches each end: the sum of ||A_s|| r_s over its sources, for all samples alike."""
    reached: dict[Node, Constant] = {}
    for end in paths.ends:
        terms = [
            norm * radius(s, reached).value.to(norm)
            for norm, s in zip(norms[end], paths.sources[end], strict=True)
        ]
        reached[end] = Constant(torch.stack(terms).sum(0), Kind.ESTIMATE)
    return reached


def _spreads(n: Node) -> bool:
    """Whether a node is a source whose change depends on what reaches its input."""
    return isinstance(n.op, Slope | Lipschitz)


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
