"""The bound table: what bounds say of a network side by side, and which layer is loose."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.adversary import lower_bound
from lipcert.bounds import Bound, Layer, LipLT, MarginConstants, Product, tightest
from lipcert.bounds.tightest import least, tightest_pairs
from lipcert.errors import LipcertError
from lipcert.graph import Graph, Node
from lipcert.kinds import Constant


class BoundName(StrEnum):
    """Bounds by the name typed on the command line."""

    AUTO = "auto"
    PRODUCT = "product"
    LIPLT = "liplt"


def make_bound(name: BoundName, graph: Graph) -> Bound:
    """The bound of this name, with true norms. `auto` is the tightest of what is cheap."""
    match name:
        case BoundName.AUTO:
            return tightest(Product(graph), LipLT(graph))
        case BoundName.PRODUCT:
            return Product(graph)
        case BoundName.LIPLT:
            return LipLT(graph)


@dataclass(frozen=True)
class BoundRow:
    """What one bound says.

    Attributes:
        bound: Its name.
        kind: What it claims.
        seconds: How long it took.
        lipschitz: Constant of the whole logit vector.
        ratio: The same over the least of the table.
        smallest_pair: The least constant of a difference of two logits; None without logits.
        median_pair: Their median.
        largest_pair: The largest.
    """

    bound: str
    kind: str
    seconds: float
    lipschitz: float
    ratio: float
    smallest_pair: float | None
    median_pair: float | None
    largest_pair: float | None


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
        sampled_lower_bound: Largest Jacobian norm of the logits seen: no bound can be below.
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
        """The bound with the least constant of the logit vector."""
        return min(self.bounds, key=lambda row: row.lipschitz)


def bound_table(
    names: Sequence[BoundName], graph: Graph, x: Float[Tensor, "n ..."], steps: int = 10
) -> BoundTable:
    """Evaluates bounds and looks, layer by layer, where the product bound is loose.

    Args:
        names: Which bounds.
        graph: The traced network.
        x: Points at which Jacobian norms are sampled.
        steps: Power iterations a sample.
    """
    return tabulated(names, evaluated(names, graph), graph, x, steps)


@dataclass(frozen=True)
class Evaluated:
    """The numbers of a bound.

    Attributes:
        lipschitz: Of the whole logit vector.
        pairs: Of all pairs of logits; None for a network whose output is no vector of logits.
        layers: Of the product bound, node by node; empty for other bounds.
        seconds: How long it took.
    """

    lipschitz: Constant
    pairs: MarginConstants | None
    layers: list[Layer]
    seconds: float


def evaluated(names: Sequence[BoundName], graph: Graph) -> dict[BoundName, Evaluated]:
    """Bounds by name with true norms, each norm of a method computed once.

    The product bound is always there, as it explains the layers.
    """
    graph.check(graph.model)
    logits = len(graph.output.shape) == 1 and graph.output.shape[0] > 1
    found: dict[BoundName, Evaluated] = {}
    with torch.no_grad():
        begin = time.perf_counter()
        product = Product(graph)
        layers, pairs = product.explained() if logits else (product.layers(), None)
        seconds = time.perf_counter() - begin
        found[BoundName.PRODUCT] = Evaluated(layers[-1].prefix, pairs, layers, seconds)
        if BoundName.LIPLT in names or BoundName.AUTO in names:
            begin = time.perf_counter()
            liplt = LipLT(graph)
            prefixes, pairs = liplt.explained() if logits else (liplt.prefixes(), None)
            seconds = time.perf_counter() - begin
            found[BoundName.LIPLT] = Evaluated(prefixes[graph.output], pairs, [], seconds)
        if BoundName.AUTO in names:
            members = list(found.values())
            together = [m.pairs for m in members if m.pairs is not None]
            found[BoundName.AUTO] = Evaluated(
                least([m.lipschitz for m in members]),
                tightest_pairs(together) if together else None,
                [],
                sum(m.seconds for m in members),
            )
    return found


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
    smallest = min(float(found[name].lipschitz) for name in names)
    rows = [_row(name, found[name], smallest) for name in names]
    return BoundTable(tuple(rows), sampled[graph.output], tuple(_explained(layers, sampled)))


def _row(name: BoundName, bound: Evaluated, smallest: float) -> BoundRow:
    ends: list[float | None] = [None] * 3
    if bound.pairs is not None:
        pairs = bound.pairs.dense()[0]
        pairs = pairs[~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)]
        ends = [float(pairs.min()), float(pairs.median()), float(pairs.max())]
    whole = float(bound.lipschitz)
    ratio = _ratio(whole, smallest)
    return BoundRow(str(name), str(bound.lipschitz.kind), bound.seconds, whole, ratio, *ends)


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
