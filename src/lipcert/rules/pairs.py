"""Rules of activations that sort or reflect pairs and groups of channels."""

import torch
from torch import Tensor

from lipcert.graph import Box, Lipschitz, Node
from lipcert.layers import GroupSort, Householder, Householder2
from lipcert.rules.one_lipschitz import monotone
from lipcert.rules.registry import rule


@rule(GroupSort)
def _group_sort(module: GroupSort, x: Node) -> Lipschitz:
    """Sorted values rise with every input; an input matters where any output of its group does."""

    def needs(outputs: Tensor) -> Tensor:
        any_of = outputs.unflatten(1, (-1, module.size)).amax(2)
        return any_of.repeat_interleave(module.size, 1)

    return Lipschitz(module, x.shape, lambda: 1.0, monotone(module), needs=needs)


@rule(Householder)
def _householder(module: Householder, x: Node) -> Lipschitz:
    """Each output is the smaller (or the larger) of two linear functions of its pair."""

    def image(lower: Tensor, upper: Tensor) -> Box:
        angle = module.angle.view(-1, *(1,) * (lower.ndim - 2)).to(lower)
        first, second = zip(lower.chunk(2, 1), upper.chunk(2, 1), strict=True)
        turned = _weighted(first, angle.cos(), second, angle.sin())
        mirrored = _weighted(first, angle.sin(), second, -angle.cos())
        smaller = (angle / 2).sin() > 0, (angle / 2).cos() < 0
        a = _piece_by_piece(first, turned, smaller[0])
        b = _piece_by_piece(second, mirrored, smaller[1])
        return torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]], 1)

    return Lipschitz(module, x.shape, lambda: 1.0, image)


@rule(Householder2)
def _householder2(module: Householder2, x: Node) -> Lipschitz:
    """Each output is one of four linear functions of its pair."""

    def image(lower: Tensor, upper: Tensor) -> Box:
        first, second = zip(lower.chunk(2, 1), upper.chunk(2, 1), strict=True)
        halves = [
            [_weighted(first, p, second, q) for p, q in outputs]
            for outputs in zip(*module.pieces(lower), strict=True)
        ]
        low = [torch.stack([box[0] for box in boxes]).amin(0) for boxes in halves]
        high = [torch.stack([box[1] for box in boxes]).amax(0) for boxes in halves]
        return torch.cat(low, 1), torch.cat(high, 1)

    return Lipschitz(module, x.shape, lambda: 1.0, image)


def _weighted(a: Box, p: Tensor, b: Box, q: Tensor) -> Box:
    """The interval of p a + q b, with 0 * inf = 0."""
    ends = [
        [torch.where(weight == 0, 0, weight * end) for end in box]
        for box, weight in ((a, p), (b, q))
    ]
    (low, high), (more_low, more_high) = ((torch.minimum(*e), torch.maximum(*e)) for e in ends)
    return low + more_low, high + more_high


def _piece_by_piece(a: Box, b: Box, smaller: Tensor) -> Box:
    """An interval of the smaller (or the larger) of two numbers, from their intervals."""
    low, high = (
        torch.where(smaller, torch.minimum(s, t), torch.maximum(s, t))
        for s, t in zip(a, b, strict=True)
    )
    return low, high
