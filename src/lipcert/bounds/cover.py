"""A network of zero-padded convolutions as the part of a circular network that is not cut off.

On a circular grid with enough room, a circular convolution of an image that is zero outside its
own cells gives the zero-padded one on the output's own cells, and something else outside. Cutting
that off is a multiplication with zeros and ones, so it can be done by the activation that follows:
its secant slopes then lie in the hull of their range and 0, which changes nothing for ReLU. The
circular network is what frequencies can see, so norms of long chains of convolutions become cheap;
what bounds its nodes bounds those of the network, which are parts of them.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipcert.bounds.slopes import everywhere
from lipcert.convolution import Conv
from lipcert.folding import as_convolution
from lipcert.graph import Affine, Box, Graph, Input, Node, Slope, Sum
from lipcert.linear_kinds import Index
from lipcert.linear_map import LinearMap, Shape
from lipcert.simplify import simplify
from lipcert.spectral.fourier import cells_needed


@dataclass(frozen=True)
class Cover:
    """A circular network.

    Attributes:
        graph: Its nodes, those of the network that have one first, up to the last of them.
        of: For each node of the network that has one its cover: the same value on the first cells
            of each axis of a larger grid.
        coarsest: Cells of each axis of a grid of which all others are multiples.
    """

    graph: Graph
    of: dict[Node, Node]
    coarsest: Shape


def circular_cover(graph: Graph) -> Cover | None:
    """The cover of as many nodes of a network as have one, or None if there are none.

    Nodes have one as long as there are only convolutions with zero padding, with average pooling
    before or after them or alone, activations with one
    range of slopes a channel, and sums, from the input on.
    """
    strides = _strides(graph)
    if not any(isinstance(n.op, Affine) for n in strides):
        return None
    cells, steps = _cells(strides)
    covers: dict[Node, Node] = {}
    nodes: list[Node] = []
    for n, stride in strides.items():
        grid = (n.shape[0], *(m // s for m, s in zip(cells, stride, strict=True)))
        inputs = tuple(covers[i] for i in n.inputs)
        cover = Node(_covered(n, grid), inputs or (n,), grid, n.name)
        nodes += [cover] if inputs else [n, cover]
        covers[n] = cover
    coarsest = tuple(m // s for m, s in zip(cells, steps, strict=True))
    return Cover(dataclasses.replace(graph, nodes=tuple(nodes)), covers, coarsest)


def _strides(graph: Graph) -> dict[Node, Shape]:
    """The nodes that can be covered, each with the stride of its grid against the input's.

    A convolution must read what is zero outside the image, where its padding is: the input,
    activations and sums of these, but no other convolution.
    """
    found: dict[Node, Shape] = {}
    zero_outside: set[Node] = set()
    for n in graph:
        if isinstance(n.op, Input):
            if len(n.shape) > 1:
                found[n] = (1,) * (len(n.shape) - 1)
                zero_outside.add(n)
        elif all(i in found for i in n.inputs):
            before = found[n.inputs[0]]
            conv = _convolution(n)
            if conv is not None:
                if n.inputs[0] in zero_outside:
                    found[n] = tuple(a * b for a, b in zip(before, conv.stride, strict=True))
            elif isinstance(n.op, Slope):
                if _same_everywhere(n):
                    found[n] = before
                    zero_outside.add(n)
            elif isinstance(n.op, Sum) and len({found[i] for i in n.inputs}) == 1:
                found[n] = before
                if zero_outside.issuperset(n.inputs):
                    zero_outside.add(n)
    return found


def _convolution(n: Node) -> Conv | None:
    """The zero-padded convolution that a node is; padding may not exceed the kernel."""
    if not isinstance(n.op, Affine):
        return None
    map = as_convolution(simplify(n.op.map().to(torch.float64)))
    if map is None:
        return None
    reach = [d * (k - 1) for d, k in zip(map.dilation, map.kernel, strict=True)]
    fits = all(before <= r for (before, _), r in zip(map.padding, reach, strict=True))
    return map if fits else None


def _same_everywhere(n: Node) -> bool:
    return all(slope.numel() == math.prod(slope.shape[:1]) for slope in everywhere(n))


def _cells(strides: dict[Node, Shape]) -> tuple[Shape, Shape]:
    """Cells an axis of the input's grid, with room for every convolution, and their divisors.

    The divisor of an axis is a multiple of every stride.
    """
    axes = len(next(iter(strides.values())))
    needs, steps = [1] * axes, [1] * axes
    for n, stride in strides.items():
        conv = _convolution(n)
        room = n.shape[1:] if conv is None else cells_needed(conv)
        before = stride if conv is None else strides[n.inputs[0]]
        for axis in range(axes):
            needs[axis] = max(needs[axis], room[axis] * before[axis])
            steps[axis] = math.lcm(steps[axis], stride[axis])
    cells = tuple(-(-need // step) * step for need, step in zip(needs, steps, strict=True))
    return cells, tuple(steps)


def _covered(n: Node, grid: Shape) -> Affine | Slope | Sum:
    match n.op:
        case Input():
            source = _placed(torch.arange(math.prod(n.shape)).reshape(n.shape), grid, -1)
            embedding = Index(n.shape, grid, source)
            return Affine(lambda: embedding)
        case Affine():
            return _circular(n, n.op, grid)
        case Slope():
            return _cut(n, n.op, grid)
        case _:
            return Sum()


def _circular(n: Node, op: Affine, grid: Shape) -> Affine:
    def map() -> LinearMap:
        conv = _convolution(n)
        assert conv is not None
        padding = tuple(
            (before, d * (k - 1) - before)
            for (before, _), d, k in zip(conv.padding, conv.dilation, conv.kernel, strict=True)
        )
        cells = tuple(m * s for m, s in zip(grid[1:], conv.stride, strict=True))
        in_shape = (conv.in_shape[0], *cells)
        return dataclasses.replace(
            conv, in_shape=in_shape, out_shape=grid, padding=padding, circular=True
        )

    bias = op.bias
    if bias is None:
        return Affine(map)
    return Affine(map, lambda: _placed(bias().expand(n.shape), grid, 0))


def _cut(n: Node, op: Slope, grid: Shape) -> Slope:
    """The activation on the cells of the network, and zero outside."""
    inside = tuple(slice(0, m) for m in n.shape[1:])
    if grid == n.shape:
        return op

    def fn(z: Tensor) -> Tensor:
        value = op.fn(z[(slice(None), slice(None), *inside)])
        return _placed(value, (len(z), *grid), 0)

    def with_zero(box: Box) -> Box:
        return box[0].clamp(max=0), box[1].clamp(min=0)

    return Slope(
        fn,
        lambda lower, upper: with_zero(op.secants(lower, upper)),
        lambda lower, upper: with_zero(op.image(lower, upper)),
    )


def _placed(values: Tensor, grid: Shape, outside: float) -> Tensor:
    """The values on the first cells of each axis of a larger array."""
    whole = values.new_full(grid, outside)
    whole[tuple(slice(0, m) for m in values.shape)] = values
    return whole
