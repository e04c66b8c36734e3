"""The bound table: what bounds say of a network side by side, and which layer is loose."""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.adversary import lower_bound
from lipcert.bound_names import GLOBAL, LOCAL, BoundName, members
from lipcert.bounds import (
    Bound,
    Ellipsoid,
    Layer,
    LipLT,
    MarginConstants,
    Product,
)
from lipcert.bounds.tightest import least, tightest_pairs
from lipcert.errors import LipcertError
from lipcert.graph import Graph, Node
from lipcert.kinds import Constant
from lipcert.radii import parse_radius
from lipcert.region import L2Ball


@dataclass(frozen=True)
class BoundRow:
    """What one bound says; of a local bound the medians over samples, which bound nothing globally.

    Attributes:
        bound: Its name, of a local one with the samples and balls.
        kind: What it claims.
        seconds: How long it took.
        lipschitz: Constant of the whole logit vector.
        ratio: The same over the least global one of the table (the least of all if there is none).
        smallest_pair: The least constant of a difference of two logits; None without logits.
        median_pair: Their median.
        largest_pair: The largest.
        eps: Radius of the balls of a local bound; None for a global one.
    """

    bound: str
    kind: str
    seconds: float
    lipschitz: float
    ratio: float
    smallest_pair: float | None
    median_pair: float | None
    largest_pair: float | None
    eps: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """One layer of the product bound.

    Attributes:
        name: Module path or function names.
        op: Node kind.
        gain: The layer's own constant (None for sums and the like).
        prefix: Bound from the input up to and including the layer.
        sampled: Largest Jacobian norm seen up to there: the true constant is at least this.
        share: Part of the looseness added anywhere (on a log scale) that this layer adds; 0 where
            the bound becomes less loose, as it can at sums.
    """

    name: str
    op: str
    gain: float | None
    prefix: float
    sampled: float
    share: float


@dataclass(frozen=True)
class BoundTable:
    """Bounds of one network side by side, and the product bound explained.

    Attributes:
        bounds: One row a bound.
        sampled_lower_bound: Largest Jacobian norm of the logits seen: no global bound can be below.
        layers: The product bound layer by layer.
    """

    bounds: tuple[BoundRow, ...]
    sampled_lower_bound: float
    layers: tuple[LayerRow, ...]

    def __post_init__(self):
        if not self.bounds:
            raise LipcertError("there is no bound in 'bounds'")

    @property
    def best(self) -> BoundRow:
        """The bound with the least constant of the logit vector, a global one if there is any."""
        return min(self.bounds, key=lambda row: (row.eps is not None, row.lipschitz))


def bound_table(
    names: Sequence[BoundName],
    graph: Graph,
    x: Float[Tensor, "n ..."],
    eps: str | None = None,
    steps: int = 10,
) -> BoundTable:
    """Evaluates bounds and looks, layer by layer, where the product bound is loose.

    Args:
        names: Which bounds.
        graph: The traced network.
        x: Points at which Jacobian norms are sampled, and around which local bounds are taken.
        eps: Radius of the balls of local bounds, as text.
        steps: Power iterations a sample.

    Raises:
        LipcertError: A local bound is asked for without a radius.
    """
    local = [name for name in names if name in LOCAL]
    if not local:
        return tabulated(names, evaluated(names, graph), graph, x, steps)
    if eps is None:
        raise LipcertError(
            f"{local[0]} holds in balls around samples: say how large they are, e.g. --eps 36/255."
        )
    around = bounds_around(graph, L2Ball(parse_radius(eps)))
    with contextlib.ExitStack() as stack:
        for bound in around.values():
            stack.enter_context(bound.held())
        found = evaluated(names, graph, around)
        found.update({name: evaluated_around(around[name], x, eps) for name in local})
    return tabulated(names, found, graph, x, steps)


def bounds_around(graph: Graph, region: L2Ball) -> dict[BoundName, Product | LipLT | Ellipsoid]:
    """The local bounds by their names, with true norms."""
    return {
        BoundName.LOCAL_PRODUCT: Product(graph, region=region),
        BoundName.LOCAL_LIPLT: LipLT(graph, region=region),
        BoundName.LOCAL_ELLIPSOID: Ellipsoid(graph, region=region),
    }


@dataclass(frozen=True)
class Evaluated:
    """The numbers of a bound.

    Attributes:
        lipschitz: Of the whole logit vector; `(b,)` around samples.
        pairs: Of all pairs of logits; None for a network whose output is no vector of logits.
        layers: Of the product bound, node by node; empty for other bounds.
        seconds: How long it took.
        eps: Radius of the balls of a local bound, as text; None for a global one.
    """

    lipschitz: Constant
    pairs: MarginConstants | None
    layers: list[Layer]
    seconds: float
    eps: str | None = None


def evaluated(
    names: Sequence[BoundName],
    graph: Graph,
    around: Mapping[BoundName, Bound] | None = None,
) -> dict[BoundName, Evaluated]:
    """Global bounds by name with true norms, each norm of a method computed once.

    The product bound is always there, as it explains the layers.

    Args:
        names: Which; local ones are passed over.
        graph: The traced network.
        around: Local bounds, see `bounds_around`: what those of product and LipLT say of the
            network everywhere is taken, so that norms that they hold are not computed again.
    """
    graph.check(graph.model)
    logits, around = _has_logits(graph), around or {}
    wanted = {m for name in names if name not in LOCAL for m in members(name, graph)}
    found: dict[BoundName, Evaluated] = {}
    with torch.no_grad():
        for name, make in GLOBAL.items():
            if name not in wanted and name is not BoundName.PRODUCT:
                continue
            begin, layers = time.perf_counter(), []
            match name:
                case BoundName.PRODUCT:
                    product = around.get(BoundName.LOCAL_PRODUCT, None) or Product(graph)
                    assert isinstance(product, Product)
                    layers, pairs = product.explained() if logits else (product.layers(), None)
                    whole = layers[-1].prefix
                case BoundName.LIPLT:
                    liplt = around.get(BoundName.LOCAL_LIPLT, None) or LipLT(graph)
                    assert isinstance(liplt, LipLT)
                    prefixes, pairs = liplt.explained() if logits else (liplt.prefixes(), None)
                    whole = prefixes[graph.output]
                case _:
                    bound = make(graph)
                    with bound.held():
                        pairs, whole = bound() if logits else None, bound.lipschitz()
            found[name] = Evaluated(whole, pairs, layers, time.perf_counter() - begin)
        for name in (BoundName.AUTO, BoundName.TIGHT):
            if name in names:
                parts = [found[member] for member in members(name, graph)]
                together = [part.pairs for part in parts if part.pairs is not None]
                found[name] = Evaluated(
                    least([part.lipschitz for part in parts]),
                    tightest_pairs(together) if together else None,
                    [],
                    sum(part.seconds for part in parts),
                )
    return found


def evaluated_around(bound: Bound, x: Float[Tensor, "b ..."], eps: str) -> Evaluated:
    """A local bound in balls of radius `eps` around some samples, all at once."""
    begin, radius = time.perf_counter(), parse_radius(eps)
    with torch.no_grad(), bound.held():
        pairs = bound(x, eps=radius) if _has_logits(bound.graph) else None
        lipschitz = bound.lipschitz(x, eps=radius)
    return Evaluated(lipschitz, pairs, [], time.perf_counter() - begin, eps)


def _has_logits(graph: Graph) -> bool:
    return len(graph.output.shape) == 1 and graph.output.shape[0] > 1


def tabulated(
    names: Sequence[BoundName],
    found: Mapping[BoundName, Evaluated],
    graph: Graph,
    x: Float[Tensor, "n ..."],
    steps: int = 10,
) -> BoundTable:
    """The table of bounds that are evaluated already, see `bound_table`."""
    layers = found[BoundName.PRODUCT].layers
    sampled = {n.node: _sampled(graph, n.node, x, steps) for n in layers}
    reference = [name for name in names if name not in LOCAL] or names
    smallest = min(_whole(found[name]) for name in reference)
    rows = [_row(name, found[name], smallest) for name in names]
    return BoundTable(tuple(rows), sampled[graph.output], tuple(_explained(layers, sampled)))


@torch.no_grad()
def _row(name: BoundName, bound: Evaluated, smallest: float) -> BoundRow:
    label, eps = str(name), None if bound.eps is None else parse_radius(bound.eps)
    smallest_pair = median_pair = largest_pair = None
    if bound.pairs is not None:
        pairs = _median(bound.pairs.dense())
        pairs = pairs[~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)]
        smallest_pair, median_pair = float(pairs.min()), float(pairs.median())
        largest_pair = float(pairs.max())
    if bound.eps is not None:
        label += f", median of {len(bound.lipschitz.value)} samples in balls of {bound.eps}"
    whole = _whole(bound)
    return BoundRow(
        *(label, str(bound.lipschitz.kind), bound.seconds, whole, _ratio(whole, smallest)),
        *(smallest_pair, median_pair, largest_pair, eps),
    )


def _whole(bound: Evaluated) -> float:
    """The constant of the logit vector, of a local bound the median over the samples."""
    return float(_median(bound.lipschitz.value.detach().reshape(-1)))


def _median(values: Float[Tensor, "b ..."]) -> Float[Tensor, "..."]:
    """Over the first dimension, the mean of the middle two where their number is even."""
    ordered = values.sort(0).values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def _explained(layers: list[Layer], sampled: dict[Node, float]) -> list[LayerRow]:
    loose = {n.node: math.log(_ratio(float(n.prefix), sampled[n.node])) for n in layers}
    nodes = [layer.node for layer in layers[1:]]
    added = {n: max(0.0, loose[n] - max(loose[i] for i in n.inputs)) for n in nodes}
    total = sum(added.values()) or 1.0
    rows = []
    for layer in layers[1:]:
        n, gain = layer.node, None if layer.gain is None else float(layer.gain)
        place = n.name, type(n.op).__name__
        rows.append(LayerRow(*place, gain, float(layer.prefix), sampled[n], added[n] / total))
    return rows


def _ratio(bound: float, sampled: float) -> float:
    return bound / sampled if sampled > 0 and bound > 0 else 1.0


def _sampled(graph: Graph, n: Node, x: Tensor, steps: int) -> float:
    generator = torch.Generator(device=x.device).manual_seed(0)
    norms = lower_bound(lambda t: graph.values(t)[n].flatten(1), x, steps, generator)
    return float(norms.max())
