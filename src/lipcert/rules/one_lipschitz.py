"""Rules of functions of which only the Lipschitz constant is used: pooling by maxima, sorting."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.graph import Affine, Box, Concat, Lipschitz, Node, node, topological
from lipcert.layers import MaxMin
from lipcert.linear_map import Index, Shape
from lipcert.rules.affine import _tuple
from lipcert.rules.registry import refuse, rule


def monotone(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Box]:
    """The box image of a function that rises with every input."""
    return lambda lower, upper: (fn(lower), fn(upper))


@rule(MaxMin)
def max_min(module: MaxMin, x: Node) -> Lipschitz:
    # Each pair is sorted, and sorting never increases distances.
    return Lipschitz(module, x.shape, lambda: 1.0, monotone(module))


def _shares(n: int, pool: Callable[[Tensor], Tensor]) -> int:
    """How many windows of a pooling along one axis of n cells hold the most shared cell.

    Counted by pooling each unit vector: the maximum is 1 in just the windows that hold its cell.
    """
    return int((pool(torch.eye(n)[:, None]) > 0).sum(-1).max())


def _max_pool(x: Node, fn: Callable[[Tensor], Tensor], pools: list) -> Lipschitz:
    """|max a - max b| <= max |a - b| a window; a cell in m windows counts m times: sqrt(m)."""
    with torch.no_grad():
        counts = [_shares(n, pool) for n, pool in zip(x.shape[1:], pools, strict=True)]
        shape = tuple(fn(torch.zeros(1, *x.shape)).shape[1:])
    constant = math.sqrt(math.prod(counts))
    return Lipschitz(fn, shape, lambda: constant, monotone(fn))


_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@rule(F.max_pool1d, F.max_pool2d, F.max_pool3d)
def max_pool_function(
    x: Node,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Lipschitz:
    if return_indices:
        raise LipcertError("the positions of maxima jump; use return_indices=False")
    axes = len(x.shape) - 1
    stride = kernel_size if stride is None or stride == [] else stride
    geometry = [_tuple(v, axes) for v in (kernel_size, stride, padding, dilation)]

    def along(axis: int) -> Callable[[Tensor], Tensor]:
        k, s, p, d = (v[axis] for v in geometry)
        return lambda rows: F.max_pool1d(rows, k, s, p, d, ceil_mode)

    def fn(t: Tensor) -> Tensor:
        return _MAX_POOL[axes](t, *geometry, ceil_mode)

    return _max_pool(x, fn, [along(axis) for axis in range(axes)])


@rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def max_pool_module(module: nn.MaxPool2d, x: Node) -> Lipschitz:
    m = module
    geometry = m.kernel_size, m.stride, m.padding, m.dilation
    return max_pool_function(x, *geometry, m.ceil_mode, m.return_indices)


_ADAPTIVE = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


@rule(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
def adaptive_max_pool_function(x: Node, output_size, return_indices: bool = False) -> Lipschitz:
    if return_indices:
        raise LipcertError("the positions of maxima jump; use return_indices=False")
    axes = len(x.shape) - 1
    sizes = tuple(
        n if m is None else m for n, m in zip(x.shape[1:], _tuple(output_size, axes), strict=True)
    )
    pools = [lambda rows, m=m: F.adaptive_max_pool1d(rows, m) for m in sizes]
    return _max_pool(x, lambda t: _ADAPTIVE[axes](t, sizes), pools)


@rule(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def adaptive_max_pool_module(module: nn.AdaptiveMaxPool2d, x: Node) -> Lipschitz:
    return adaptive_max_pool_function(x, module.output_size, module.return_indices)


@dataclass(frozen=True)
class Extreme:
    """The elementwise maximum (or minimum) of the two halves of a flat array."""

    shape: Shape
    largest: bool

    def __call__(self, halves: Tensor) -> Tensor:
        first, second = halves.chunk(2, 1)
        pick = torch.maximum if self.largest else torch.minimum
        return pick(first, second).reshape(-1, *self.shape)


def _extreme(x: Node, other: Node, largest: bool) -> Node:
    if not (isinstance(x, Node) and isinstance(other, Node)):
        raise LipcertError("with a constant: use clamp(min=...) or clamp(max=...)")
    if x.shape != other.shape:
        raise LipcertError(f"of shapes {x.shape} and {other.shape}; expand one of them first")
    fn = Extreme(x.shape, largest)
    return node(Lipschitz(fn, x.shape, lambda: 1.0, monotone(fn)), node(Concat(), x, other))


@rule(torch.maximum, "maximum")
def maximum(x: Node, other: Node) -> Node:
    return _extreme(x, other, largest=True)


@rule(torch.minimum, "minimum")
def minimum(x: Node, other: Node) -> Node:
    return _extreme(x, other, largest=False)


@rule(torch.max, "max")
def max_of_two(x: Node, other: Node | None = None, *rest, **named) -> Node:
    if not isinstance(other, Node):
        raise LipcertError("max over an axis has no rule; max(x, y) and max-pooling have one")
    return maximum(x, other)


@rule(torch.min, "min")
def min_of_two(x: Node, other: Node | None = None, *rest, **named) -> Node:
    if not isinstance(other, Node):
        raise LipcertError("min over an axis has no rule; min(x, y) has one")
    return minimum(x, other)


def join_max_min(output: Node) -> Node:
    """Takes max(a, b) and min(a, b) of one pair as the two halves of one sorted pair.

    Sorting is 1-Lipschitz; taken apart, the two would count twice where they meet again, as in
    MaxMin written out by hand.
    """
    extremes: dict[tuple[frozenset[Node], bool], Node] = {}
    for n in topological(output):
        if isinstance(n.op, Lipschitz) and isinstance(n.op.fn, Extreme):
            extremes[frozenset(n.inputs[0].inputs), n.op.fn.largest] = n
    halves: dict[Node, Node] = {}
    for (pair, largest), n in extremes.items():
        if largest and (partner := extremes.get((pair, False))) is not None:
            size = math.prod(n.shape)

            def both(ab: Tensor) -> Tensor:
                first, second = ab.chunk(2, 1)
                return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], 1)

            op = Lipschitz(both, (2 * size,), lambda: 1.0, monotone(both))
            sorted_pair = node(op, n.inputs[0], name=n.name)
            for half, old in enumerate((n, partner)):
                source = torch.arange(size).reshape(n.shape) + half * size
                pick = Index((2 * size,), n.shape, source)
                halves[old] = node(Affine(lambda pick=pick: pick), sorted_pair)
    done: dict[Node, Node] = {}
    for old in topological(output):
        done[old] = halves.get(old, old)
    return _rewired(output, done)


def _rewired(output: Node, replaced: dict[Node, Node]) -> Node:
    """The graph with some nodes replaced, their users pointed at the replacements."""
    done: dict[Node, Node] = {}

    def build(old: Node) -> Node:
        if old not in done:
            new = replaced.get(old, old)
            inputs = tuple(build(i) for i in new.inputs)
            done[old] = new if inputs == new.inputs else Node(new.op, inputs, new.shape, new.name)
        return done[old]

    for old in topological(output):  # inputs first, so that the recursion stays shallow
        build(old)
    return done[output]


_DIVIDES = (
    "it divides by the sample's own size, so it has no useful Lipschitz constant (max |weight| / "
    "sqrt(eps) at best); use BatchNorm, or subtract the mean without dividing"
)
refuse(nn.LayerNorm, F.layer_norm, nn.GroupNorm, F.group_norm, because=_DIVIDES)
refuse(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, because=_DIVIDES)
refuse(nn.RMSNorm, F.rms_norm, F.normalize, nn.LocalResponseNorm, because=_DIVIDES)
refuse(
    *(nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
    *(nn.Transformer, F.scaled_dot_product_attention),
    because="dot-product attention is not Lipschitz (arXiv 2006.04710)",
)
refuse(
    *(nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell),
    because="gated recurrence multiplies functions of the input: not Lipschitz",
)
refuse(nn.Embedding, F.embedding, because="its input is an integer, not a point in space")
