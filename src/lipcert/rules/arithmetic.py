"""Rules of sums, differences, multiples and constant masks, with broadcasting."""

import math
import operator

import torch
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.graph import Affine, Concat, Node, Sum, node
from lipcert.linear_kinds import Index, Scale, identity
from lipcert.linear_map import LinearMap, Shape
from lipcert.rules.registry import Live, live, rule
from lipcert.rules.structural import BATCH, copying


def _broadcast(x: Node, shape: torch.Size) -> Node:
    if x.shape == tuple(shape):
        return x
    return node(copying(lambda t: _align(t, len(shape)).expand(BATCH, *shape), x), x)


def _align(t: Tensor, rank: int) -> Tensor:
    """Broadcasting lines shapes up at the end; the batch axis must stay in front."""
    if t.ndim != rank + 1:
        raise LipcertError("operands of different rank; reshape one of them first")
    return t


def _for_one_sample(constant: Live, shape: Shape) -> Live:
    """A constant without its batch axis.

    Raises:
        LipcertError: It differs between the samples, or does not broadcast to the shape.
    """
    given = constant().shape
    batched = len(given) > len(shape)
    if batched and given[0] != 1:
        raise LipcertError(f"a constant of shape {tuple(given)} that differs between the samples")
    if torch.broadcast_shapes(shape, given[batched:]) != shape:
        raise LipcertError(f"a constant of shape {tuple(given)} enlarges {shape}; expand it first")
    return Live(lambda: constant()[0]) if batched else constant


def _scaled(x: Node, constant: Live) -> Node:
    factor = _for_one_sample(constant, x.shape)
    return node(Affine(lambda: Scale(x.shape, x.shape, factor())), x)


def _shifted(x: Node, constant: Live) -> Node:
    same = identity(x.shape)
    return node(Affine(lambda: same, _for_one_sample(constant, x.shape)), x)


def _times(x: Node, factor: float) -> Node:
    number = live(factor)
    assert number is not None
    return x if factor == 1 else _scaled(x, number)


@rule(operator.add, operator.iadd, torch.add, "add", "add_")
def _add(x, y, *, alpha: float = 1) -> Node:
    if isinstance(x, Node) and isinstance(y, Node):
        shape = torch.broadcast_shapes(x.shape, y.shape)
        return node(Sum(), _broadcast(x, shape), _times(_broadcast(y, shape), alpha))
    if isinstance(x, Node):
        constant = _as_live(y)
        return _shifted(x, Live(lambda: alpha * constant()))
    return _shifted(_times(y, alpha), _as_live(x))


def _as_live(value) -> Live:
    constant = live(value)
    assert constant is not None
    return constant


@rule(operator.sub, operator.isub, torch.sub, "sub", "sub_")
def _subtract(x, y, *, alpha: float = 1) -> Node:
    return _add(x, y, alpha=-alpha)


@rule(torch.rsub)
def _subtract_from(x, y, *, alpha: float = 1) -> Node:
    return _subtract(y, x, alpha=alpha)


@rule(torch.where)
def _where(condition: Node | Live, x, y) -> Node:
    """Each entry is taken from the one or the other, as a constant mask says."""
    if isinstance(condition, Node):
        raise LipcertError(
            "its mask depends on the input, so it may jump; use a constant mask (a buffer), or "
            "relu, leaky_relu, clamp, torch.maximum or torch.minimum"
        )
    nodes = [branch for branch in (x, y) if isinstance(branch, Node)]
    shape = torch.broadcast_shapes(*(n.shape for n in nodes))
    nodes = [_broadcast(n, shape) for n in nodes]
    size = math.prod(shape)
    mask = _for_one_sample(condition, shape)
    if len(nodes) == 2:

        def picked() -> LinearMap:
            """The flat pair of both to the entries that the mask wants."""
            first = mask().expand(shape)
            places = torch.arange(size, device=first.device).reshape(shape)
            return Index((2 * size,), shape, torch.where(first, places, places + size))

        return node(Affine(picked), node(Concat(), *nodes))

    kept = mask if isinstance(x, Node) else Live(lambda: ~mask())
    other = _for_one_sample(_as_live(y if isinstance(x, Node) else x), shape)

    def masked() -> LinearMap:
        stays = kept().expand(shape)
        places = torch.arange(size, device=stays.device).reshape(shape)
        return Index(shape, shape, places.where(stays, -1))

    def shift() -> Tensor:
        return torch.where(kept(), 0, other())

    return node(Affine(masked, shift), nodes[0])


@rule("where")
def _where_method(x, condition: Node | Live, y) -> Node:
    return _where(condition, x, y)


@rule(torch.masked_fill, "masked_fill")
def _masked_fill(x: Node, mask: Node | Live, value) -> Node:
    return _where(mask, value, x)


@rule(operator.neg, torch.neg, "neg")
def _negative(x: Node) -> Node:
    return _times(x, -1.0)


@rule(operator.mul, operator.imul, torch.mul, "mul", "mul_")
def _multiply(x, y) -> Node:
    if isinstance(x, Node) and isinstance(y, Node):
        raise LipcertError("a product of two functions of the input is not Lipschitz")
    return _scaled(x, _as_live(y)) if isinstance(x, Node) else _scaled(y, _as_live(x))


@rule(operator.truediv, operator.itruediv, torch.div, "div", "div_")
def _divide(x, y) -> Node:
    if isinstance(y, Node):
        raise LipcertError("division by a function of the input is not Lipschitz")
    divisor = _as_live(y)
    return _scaled(x, Live(lambda: 1 / divisor().to(torch.float64)))
