"""Rules of functions of which only the Lipschitz constant is used: pooling by maxima, pairs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.graph import Box, Concat, Expansion, Lipschitz, Node, node, topological
from lipcert.layers import MaxMin
from lipcert.linear_kinds import Index
from lipcert.linear_map import Generic, Shape
from lipcert.rules.affine import per_axis
from lipcert.rules.registry import refuse, rule, rule_by_axes
from lipcert.rules.structural import fixed


def monotone(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Box]:
    """The box image of a function that rises with every input."""
    return lambda lower, upper: (fn(lower), fn(upper))


@rule(MaxMin)
def _max_min(module: MaxMin, x: Node) -> Lipschitz:
    # Each pair is sorted, and sorting never increases distances.
    return sorted_pairs(module, x)


def sorted_pairs(module: MaxMin, x: Node) -> Lipschitz:
    """MaxMin as a node: an input matters where either output of its pair does."""

    def needs(outputs: Tensor) -> Tensor:
        either = torch.maximum(*outputs.chunk(2, 1))
        if module.adjacent:
            return either.repeat_interleave(2, 1)
        return torch.cat([either, either], 1)

    expansion = pairs_expanded(x.shape, module.adjacent)
    return Lipschitz(
        module, x.shape, lambda: 1.0, monotone(module), needs=needs, expansion=expansion
    )


def pairs_expanded(shape: Shape, adjacent: bool = False) -> Expansion:
    """Sorting pairs: their sums stay as they are, of their differences the size is taken."""

    def turned(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a + b, a - b], 1) * math.sqrt(0.5)

    def before(x: Tensor) -> Tensor:
        return turned(x[:, ::2], x[:, 1::2]) if adjacent else turned(*x.chunk(2, 1))

    after = Generic(shape, shape, lambda x: turned(*x.chunk(2, 1)))
    sums, sizes = torch.ones(shape).chunk(2, 0)
    slopes = torch.cat([sums, -sizes]), torch.cat([sums, sizes])
    return Expansion(Generic(shape, shape, before), *slopes, after)


def _shares(n: int, pool: Callable[[Tensor], Tensor]) -> int:
    """How many windows of a pooling along one axis of n cells hold the most shared cell.

    Counted by pooling each unit vector: the maximum is 1 in just the windows that hold its cell.
    """
    return int((pool(torch.eye(n)[:, None]) > 0).sum(-1).max())


def _shared_maxima(x: Node, fn: Callable[[Tensor], Tensor], pools: list) -> Lipschitz:
    """|max a - max b| <= max |a - b| a window; a cell in m windows counts m times: sqrt(m).

    Args:
        x: The input; its last axes are pooled.
        fn: The pooling.
        pools: The pooling along each axis by itself.
    """
    with torch.no_grad():
        sizes = x.shape[-len(pools) :]
        counts = [_shares(n, pool) for n, pool in zip(sizes, pools, strict=True)]
        shape = tuple(fn(torch.zeros(1, *x.shape)).shape[1:])
    constant = math.sqrt(math.prod(counts))
    return Lipschitz(fn, shape, lambda: constant, monotone(fn))


_MAX_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.max_pool1d,
    2: F.max_pool2d,
    3: F.max_pool3d,
}


def _max_pool(
    axes: int,
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
    geometry = [per_axis(v, axes) for v in (kernel_size, stride or kernel_size, padding, dilation)]

    def fn(t: Tensor) -> Tensor:
        return _MAX_POOL[axes](t, *geometry, ceil_mode)

    pools = [
        partial(F.max_pool1d, kernel_size=k, stride=s, padding=p, dilation=d, ceil_mode=ceil_mode)
        for k, s, p, d in zip(*geometry, strict=True)
    ]
    return _shared_maxima(x, fn, pools)


def _max_pool_module(axes: int, module: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d, x: Node):
    m = module
    geometry = m.kernel_size, m.stride, m.padding, m.dilation
    return _max_pool(axes, x, *geometry, m.ceil_mode, m.return_indices)


_ADAPTIVE: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}


def _adaptive_max_pool(axes: int, x: Node, output_size, return_indices: bool = False) -> Lipschitz:
    if return_indices:
        raise LipcertError("the positions of maxima jump; use return_indices=False")
    sizes = tuple(
        n if size is None else size
        for n, size in zip(x.shape[-axes:], per_axis(output_size, axes), strict=True)
    )
    pools = [partial(F.adaptive_max_pool1d, output_size=size) for size in sizes]
    return _shared_maxima(x, lambda t: _ADAPTIVE[axes](t, sizes), pools)


def _adaptive_max_pool_module(
    axes: int, module: nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d | nn.AdaptiveMaxPool3d, x: Node
) -> Lipschitz:
    return _adaptive_max_pool(axes, x, module.output_size, module.return_indices)


rule_by_axes((F.max_pool1d, F.max_pool2d, F.max_pool3d), _max_pool)
rule_by_axes((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _max_pool_module)
rule_by_axes(
    (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d), _adaptive_max_pool
)
rule_by_axes(
    (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _adaptive_max_pool_module
)


@dataclass(frozen=True)
class Extreme:
    """The elementwise maximum (or minimum) of the two halves of a flat array."""

    shape: Shape
    largest: bool

    def __call__(self, halves: Tensor) -> Tensor:
        """The extremes of a batch of flat arrays."""
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
def _maximum(x: Node, other: Node) -> Node:
    return _extreme(x, other, largest=True)


@rule(torch.minimum, "minimum")
def _minimum(x: Node, other: Node) -> Node:
    return _extreme(x, other, largest=False)


@rule(torch.max, "max")
def _max_of_two(x: Node, other: Node | None = None, *rest, **named) -> Node:
    if not isinstance(other, Node):
        raise LipcertError("max over an axis has no rule; use torch.amax")
    return _maximum(x, other)


@rule(torch.min, "min")
def _min_of_two(x: Node, other: Node | None = None, *rest, **named) -> Node:
    if not isinstance(other, Node):
        raise LipcertError("min over an axis has no rule; use torch.amin")
    return _minimum(x, other)


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

            flat = (2 * size,)
            op = Lipschitz(both, flat, lambda: 1.0, monotone(both), expansion=pairs_expanded(flat))
            sorted_pair = node(op, n.inputs[0], name=n.name)
            for half, old in enumerate((n, partner)):
                source = torch.arange(size).reshape(n.shape) + half * size
                halves[old] = node(fixed(Index((2 * size,), n.shape, source)), sorted_pair)
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
