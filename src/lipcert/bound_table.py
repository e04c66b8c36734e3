"""The bound table: what a bound says of a network, and which layer is loose."""

import math
import time
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.adversary import lower_bound
from lipcert.bounds import Bound, Layer, Product
from lipcert.graph import Graph, Node


class BoundName(StrEnum):
    """Bounds by the name typed on the command line."""

    AUTO = "auto"
    PRODUCT = "product"


def make_bound(name: BoundName, graph: Graph) -> Bound:
    """The bound of this name, with true norms. `auto` is the tightest of what is cheap."""
    match name:
        case BoundName.AUTO | BoundName.PRODUCT:
            return Product(graph)


@dataclass(frozen=True)
class LayerRow:
    """One layer of the bound table.

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
    """A bound, explained: `lipschitz` is of the whole logit vector, `pairs` of the margins."""

    bound: str
    kind: str
    seconds: float
    lipschitz: float
    sampled_lower_bound: float
    smallest_pair: float | None
    median_pair: float | None
    largest_pair: float | None
    layers: tuple[LayerRow, ...]


def bound_table(
    name: BoundName, graph: Graph, x: Float[Tensor, "n ..."], steps: int = 10
) -> BoundTable:
    """Evaluates a bound and looks, layer by layer, where it is loose.

    Args:
        name: Which bound.
        graph: The traced network.
        x: Points at which Jacobian norms are sampled.
        steps: Power iterations a sample.
    """
    graph.check(graph.model)
    bound = Product(graph)
    with torch.no_grad():
        begin = time.perf_counter()
        layers, pairs = _evaluated(bound)
        whole = layers[-1].prefix
        seconds = time.perf_counter() - begin
    sampled = {n.node: _sampled(graph, n.node, x, steps) for n in layers}
    loose = {n.node: math.log(_ratio(float(n.prefix), sampled[n.node])) for n in layers}
    nodes = [layer.node for layer in layers[1:]]
    added = {n: max(0.0, loose[n] - max(loose[i] for i in n.inputs)) for n in nodes}
    total = sum(added.values()) or 1.0
    rows = []
    for layer in layers[1:]:
        n, gain = layer.node, None if layer.gain is None else float(layer.gain)
        place = n.name, type(n.op).__name__
        rows.append(LayerRow(*place, gain, float(layer.prefix), sampled[n], added[n] / total))
    ends = (None,) * 3 if pairs is None else (pairs.min(), pairs.median(), pairs.max())
    low, middle, high = (None if e is None else float(e) for e in ends)
    return BoundTable(
        *(str(name), str(whole.kind), seconds, float(whole), sampled[graph.output]),
        *(low, middle, high, tuple(rows)),
    )


def _evaluated(bound: Product) -> tuple[list[Layer], Tensor | None]:
    """The layers, and the constants of all pairs; None if the output is no vector of logits."""
    shape = bound.graph.output.shape
    if len(shape) != 1 or shape[0] < 2:
        return bound.layers(), None
    layers, margins = bound.explained()
    dense = margins.dense()[0]
    return layers, dense[~torch.eye(len(dense), dtype=torch.bool, device=dense.device)]


def _ratio(bound: float, sampled: float) -> float:
    return bound / sampled if sampled > 0 and bound > 0 else 1.0


def _sampled(graph: Graph, n: Node, x: Tensor, steps: int) -> float:
    generator = torch.Generator(device=x.device).manual_seed(0)
    norms = lower_bound(lambda t: graph.values(t)[n].flatten(1), x, steps, generator)
    return float(norms.max())
