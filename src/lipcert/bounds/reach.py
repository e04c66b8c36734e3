"""How far each end of LipLT's paths can change, by true norms: sum of ||A_s|| r_s over sources s.

Where the maps A_s are large, `Auto` takes what is affordable, from the tightest to the loosest:
matrices for small ends, all from one sweep back; the circular cover, frequency by frequency; and
else the end's own norm times what reaches its input, as the product bound does.
"""

import math
from collections.abc import Mapping

import torch

from lipcert.bounds.affine_norm import affine_norm
from lipcert.bounds.cover import circular_cover
from lipcert.bounds.joint import joint_norm
from lipcert.bounds.margin import device_of
from lipcert.bounds.paths import Paths, rows_at_sources
from lipcert.bounds.slopes import steepest
from lipcert.bounds.steps import Step
from lipcert.graph import Affine, Concat, Graph, Input, Lipschitz, Node, Slope, Sum
from lipcert.kinds import Constant, Kind, weakest
from lipcert.linear_map import LinearMap, Matrix
from lipcert.spectral import Auto, Exact, Fourier, Strategy
from lipcert.spectral.circulant import is_circulant, products

_DENSE_SIDE = 1024  # larger maps go by frequency, where that is possible
_MATRIX_BYTES = 2**30
_PRODUCTS = 3e10  # multiplications of one end by frequency: some ten seconds on one core

Reached = dict[Node, Constant]


def reached_by_norms(graph: Graph, paths: Paths, norm: Strategy, joint: bool) -> Reached:
    """What reaches each end, from the first to the last.

    Args:
        graph: The graph.
        paths: To the ends wanted and to all inputs of sources before them.
        norm: A strategy without iterated vectors.
        joint: Whether to bound the sum of terms by one norm.
    """
    maps = paths.maps(paths.steps())
    known: Reached = {}
    cut: set[Node] = set()
    if isinstance(norm, Auto):
        large = [end for end in paths.ends if _is_large(maps[end])]
        known = _by_frequency(graph, paths, large)
        cut = set(large) - known.keys()
    if isinstance(norm, Auto | Exact) and not torch.is_grad_enabled():
        steps = paths.steps(torch.empty(0, dtype=torch.float64, device=device_of(graph)))
        for end in paths.ends:
            if end not in known and len(maps[end]) > 1 and _fits_memory(end, maps[end]):
                maps[end] = _matrices(graph, end, steps)
                cut.discard(end)
    return _summed(maps, norm, joint, known, cut)


def radius(source: Node, reached: Mapping[Node, Constant]) -> Constant:
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


def _summed(
    maps: Mapping[Node, Mapping[Node, LinearMap]],
    norm: Strategy,
    joint: bool,
    known: Mapping[Node, Constant],
    cut: set[Node],
) -> Reached:
    reached: Reached = {}
    failure = 0.0  # the union over every norm so far
    for end, terms in maps.items():
        if end in known:
            reached[end] = known[end]
            continue
        if end in cut:
            product_from(end, reached, norm)
            continue
        norms = {s: norm(map) for s, map in terms.items()}
        radii = {s: radius(s, reached) for s in terms}
        claims = [*norms.values(), *radii.values()]
        values = [norms[s].value * radii[s].value.to(norms[s].value) for s in terms]
        value = torch.stack([v.to(values[-1].device) for v in values]).sum()
        failure += sum(constant.failure for constant in norms.values())
        if joint and len(terms) > 1:
            together = joint_norm(terms, {s: radii[s].value for s in terms}, norms, norm)
            claims.append(together)
            failure += together.failure
            value = torch.minimum(value, together.value.to(value))
        kind = weakest(claim.kind for claim in claims)
        reached[end] = Constant(value, kind, min(1.0, failure))
    return reached


def _is_large(maps: Mapping[Node, LinearMap]) -> bool:
    return any(min(map.in_size, map.out_size) > _DENSE_SIDE for map in maps.values())


def _fits_memory(end: Node, maps: Mapping[Node, LinearMap]) -> bool:
    rows = math.prod(end.shape)
    numbers = rows * sum(map.in_size for map in maps.values())
    return rows <= _DENSE_SIDE and 8 * numbers <= _MATRIX_BYTES


def _matrices(graph: Graph, end: Node, steps: Mapping[Node, Step]) -> dict[Node, LinearMap]:
    """The maps of a small end as matrices, all from one sweep back."""
    size = math.prod(end.shape)
    rows = torch.eye(size, dtype=torch.float64, device=device_of(graph)).reshape(-1, *end.shape)
    found = rows_at_sources(graph, end, rows, steps)
    return {s: Matrix(s.shape, end.shape, found[s].flatten(1)) for s in reversed(found)}


def _by_frequency(graph: Graph, paths: Paths, large: list[Node]) -> Reached:
    """What reaches those of the large ends that have an affordable cover."""
    cover = circular_cover(graph) if large else None
    if cover is None:
        return {}
    ends = [cover.of[end] for end in paths.ends if end in cover.of]
    circular = Paths(cover.graph, ends)
    maps = circular.maps(circular.steps())
    cut = {end for end, terms in maps.items() if not _affordable(terms)}
    reached = _summed(maps, Fourier(), False, {}, cut)
    return {end: reached[cover.of[end]] for end in large if end in cover.of}


def _affordable(terms: Mapping[Node, LinearMap]) -> bool:
    maps = terms.values()
    return all(is_circulant(m) for m in maps) and sum(products(m) for m in maps) <= _PRODUCTS


def product_from(n: Node, reached: Reached, norm: Strategy) -> Constant:
    """The product bound from the nodes on whose reach is known; adds what it finds to these."""
    if n in reached:
        return reached[n]
    if isinstance(n.op, Input):
        return radius(n, reached)
    before = [product_from(i, reached, norm) for i in n.inputs]
    kinds = [b.kind for b in before]
    values = torch.stack([b.value.to(before[0].value) for b in before])
    failure = sum(b.failure for b in before)
    match n.op:
        case Affine() as op:
            own = affine_norm(op, norm)
            value = own.value.to(values) * values[0]
            kinds.append(own.kind)
            failure += own.failure
        case Slope():
            value = steepest(n).to(values) * values[0]
        case Lipschitz():
            own = radius(n, {n.inputs[0]: before[0]})
            value, kinds = own.value, [own.kind]
        case Concat():
            value = torch.linalg.vector_norm(values)
        case _:
            assert isinstance(n.op, Sum)
            value = values.sum()
    reached[n] = Constant(value, weakest(kinds), min(1.0, failure))
    return reached[n]
