"""Rules of ops that copy, stack or overlap values: reshapes, slices, blocks, concatenations."""

import builtins
import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.graph import Affine, Concat, Input, KnownNorm, Node, node
from lipcert.kinds import Constant, Kind
from lipcert.linear_kinds import Index, identity
from lipcert.linear_map import LinearMap
from lipcert.rules.registry import Key, Live, refuse, rule

# Rules see batches of this size; two samples show whether an op keeps them apart.
BATCH = 2


def fixed(map: LinearMap) -> Affine:
    """An op whose map has no weights."""
    return Affine(lambda: map)


def copying(fn: Callable[[Tensor], Tensor], x: Node) -> Affine:
    """The map of an op whose outputs are copies of inputs, or zeros.

    Found by pushing the positions 1, 2, ... of two samples through the op.

    Raises:
        LipcertError: The op mixes the samples of the batch.
    """
    size = identity(x.shape).in_size
    positions = torch.arange(1, BATCH * size + 1, dtype=torch.float64)
    moved = fn(positions.reshape(BATCH, *x.shape)).round().long()
    first = moved[0]
    if len(moved) != BATCH or not torch.equal(moved[1], first + size * (first > 0)):
        raise LipcertError("it mixes the samples of the batch; keep the first axis as it is")
    index = Index(x.shape, tuple(first.shape), first - 1)
    norm = math.sqrt(int(index.copies().max())) if index.in_size else 0.0
    proved = Constant(torch.tensor(norm, dtype=torch.float64), Kind.UPPER)
    return Affine(lambda: index, known=KnownNorm(lambda: proved, lambda: norm))


@rule(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
def _unchanged_module(module: nn.Module, x: Node) -> Node:
    return x


@rule(F.dropout, F.dropout2d, F.dropout3d, F.alpha_dropout)
def _unchanged_by_dropout(x: Node, p: float = 0.5, training: bool = True, *rest, **named) -> Node:
    if training:
        raise LipcertError("it is random whatever the mode of the module; pass self.training")
    return x


@rule(torch.clone, "clone", "contiguous", "detach", "requires_grad_")
def _unchanged(x: Node, *args, **named) -> Node:
    return x


def _copy_rule(*keys: Key, fn: Callable) -> None:
    @rule(*keys)
    def copy(x: Node, *args, **named) -> Affine:
        return copying(lambda t: fn(t, *args, **named), x)


_COPYING: tuple[tuple[tuple[Key, ...], Callable], ...] = (
    ((torch.flatten, "flatten"), torch.flatten),
    ((torch.reshape, "reshape", "view"), lambda t, *s: t.reshape(*s)),
    ((torch.permute, "permute"), lambda t, *d: t.permute(*d)),
    ((torch.transpose, "transpose"), torch.transpose),
    ((torch.movedim, "movedim"), torch.movedim),
    ((torch.squeeze, "squeeze"), torch.squeeze),
    ((torch.unsqueeze, "unsqueeze"), torch.unsqueeze),
    ((torch.roll, "roll"), torch.roll),
    ((torch.flip,), torch.flip),
    (("flip",), lambda t, *d: t.flip(*d)),
    ((torch.narrow, "narrow"), torch.narrow),
    ((torch.select, "select"), torch.select),
    (("expand",), lambda t, *s: t.expand(*s)),
    (("repeat",), lambda t, *s: t.repeat(*s)),
    ((torch.repeat_interleave, "repeat_interleave"), torch.repeat_interleave),
    ((torch.unflatten, "unflatten"), torch.unflatten),
    ((F.pixel_shuffle,), F.pixel_shuffle),
    ((F.pixel_unshuffle,), F.pixel_unshuffle),
    ((F.unfold,), F.unfold),
    ((torch.channel_shuffle,), torch.channel_shuffle),
    ((torch.tril, "tril"), torch.tril),
    ((torch.triu, "triu"), torch.triu),
)
for _keys, _fn in _COPYING:
    _copy_rule(*_keys, fn=_fn)


@rule(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold)
def _copying_module(module: nn.Module, x: Node) -> Affine:
    return copying(module, x)


@rule(torch.index_select, "index_select")
def _index_select(x: Node, dim: int, index: Live) -> Affine | Node:
    def selected() -> Affine:
        return copying(lambda t: t.index_select(dim, index().cpu()), x)

    return Node(Affine(lambda: selected().map()), (x,), selected().map().out_shape)


@rule(F.fold)
def _fold(x: Node, output_size, kernel_size, dilation=1, padding=0, stride=1) -> Affine:
    """Overlapping blocks added up: the adjoint of cutting the image into blocks."""
    height, width = (output_size,) * 2 if isinstance(output_size, int) else output_size
    kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
    image = Node(Input(), (), (x.shape[0] // math.prod(kernel), height, width))
    blocks = copying(lambda t: F.unfold(t, kernel, dilation, padding, stride), image).map()
    return fixed(blocks.T)


@rule(nn.Fold)
def _fold_module(module: nn.Fold, x: Node) -> Affine:
    m = module
    return _fold(x, m.output_size, m.kernel_size, m.dilation, m.padding, m.stride)


@rule(
    *(getattr(nn, f"{kind}Pad{n}d") for n in (1, 2, 3) for kind in ("Zero", "Reflection")),
    *(getattr(nn, f"{kind}Pad{n}d") for n in (1, 2, 3) for kind in ("Replication", "Circular")),
)
def _padding_module(module: nn.Module, x: Node) -> Affine:
    return copying(module, x)


@rule(builtins.getattr)
def _tensor_attribute(x: Node | tuple, name: str) -> Node | Affine:
    if isinstance(x, tuple) and name == "values":  # of a sort: values and indices
        return x[0]
    if isinstance(x, tuple) or name not in ("T", "mT"):
        raise LipcertError(f"the attribute .{name} has no rule")
    return copying(lambda t: getattr(t, name), x)


@rule(operator.getitem)
def _item(x: Node | tuple, index) -> Node | tuple | Affine:
    if isinstance(x, Node):
        return copying(lambda t: t[index], x)
    return x[index]


def _pieces(x: Node, fn: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Node, ...]:
    def piece(i: int) -> Node:
        return node(copying(lambda t: fn(t)[i], x), x)

    return tuple(piece(i) for i in range(len(fn(torch.zeros(BATCH, *x.shape)))))


_CUTTING: tuple[tuple[tuple[Key, ...], Callable], ...] = (
    ((torch.chunk, "chunk"), torch.chunk),
    ((torch.split, "split"), torch.split),
    ((torch.unbind, "unbind"), torch.unbind),
    ((torch.tensor_split, "tensor_split"), torch.tensor_split),
)


def _cut_rule(*keys: Key, fn: Callable) -> None:
    @rule(*keys)
    def cut(x: Node, *args, **named) -> tuple[Node, ...]:
        return _pieces(x, lambda t: fn(t, *args, **named))


for _keys, _fn in _CUTTING:
    _cut_rule(*_keys, fn=_fn)


def _layout(parts: list[Tensor], join: Callable[[list[Tensor]], Tensor]) -> Index:
    """Where the parts, flattened and stacked, end up in the joined array (without batch)."""
    sizes = [p[0].numel() for p in parts]
    positions = torch.arange(sum(sizes), dtype=torch.float64).split(sizes)
    shaped = [q.reshape(1, *p.shape[1:]) for q, p in zip(positions, parts, strict=True)]
    source = join(shaped)[0].long()
    return Index((sum(sizes),), tuple(source.shape), source)


def _joined(parts: list[Node | Live], dim: int, join: Callable) -> Node:
    nodes = [p for p in parts if isinstance(p, Node)]
    if len(nodes) != len(parts):
        raise LipcertError("joining with a constant has no rule; add the constant later instead")
    like = [torch.zeros(1, *p.shape) for p in nodes]
    if dim % join(like).ndim == 0:
        raise LipcertError("along the batch axis it mixes the samples")
    return node(fixed(_layout(like, join)), node(Concat(), *nodes))


@rule(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors, dim: int = 0) -> Node:
    return _joined(list(tensors), dim, lambda ts: torch.cat(ts, dim))


@rule(torch.stack)
def _stack(tensors, dim: int = 0) -> Node:
    return _joined(list(tensors), dim, lambda ts: torch.stack(ts, dim))


refuse(
    operator.setitem,
    because="writing into a part of an array has no rule; build the array with torch.cat",
)
