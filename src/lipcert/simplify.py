"""Exact algebra on linear maps: the same map with fewer factors.

Folds BatchNorm and normalisation into convolutions, x + conv(x) into one convolution, chains of
reshapes into one, and so on, so that each strategy meets one operator instead of a product. The
result equals the input map (up to rounding) and stays differentiable in the live weights.
"""

import math

import torch
from torch import Tensor

from lipcert.convolution import Conv
from lipcert.linear_kinds import Dense, Index, Scale
from lipcert.linear_map import Add, Composition, LinearMap, Stack, Transpose


def simplify(map: LinearMap) -> LinearMap:
    """An equal map with as few factors and terms as the rules of this file allow."""
    match map:
        case Composition():
            return _compose([simplify(factor) for factor in _flat(map)])
        case Add():
            return _add([simplify(term) for term in map.terms])
        case Stack():
            return _stack(map)
        case Transpose():
            return _transpose(simplify(map.inner))
        case _:
            return map


def _flat(map: LinearMap) -> list[LinearMap]:
    if isinstance(map, Composition):
        return [part for factor in map.factors for part in _flat(factor)]
    return [map]


def _compose(factors: list[LinearMap]) -> LinearMap:
    merged: list[LinearMap] = []
    for factor in (part for f in factors for part in _flat(f)):
        merged.append(factor)
        while len(merged) > 1 and (joint := _merge(merged[-2], merged[-1])) is not None:
            merged[-2:] = [joint]
    if len(merged) == 1:
        return merged[0]
    return Composition(merged[0].in_shape, merged[-1].out_shape, tuple(merged))


def _merge(first: LinearMap, then: LinearMap) -> LinearMap | None:
    """`then` after `first` as one map, or None where there is no such rule."""
    ends = first.in_shape, then.out_shape
    if isinstance(first, Index) and first.is_reshape and first.in_shape == first.out_shape:
        return then
    if isinstance(then, Index) and then.is_reshape and then.in_shape == then.out_shape:
        return first
    match first, then:
        case Index(), Index():
            padded = torch.cat([first.source.flatten(), first.source.new_tensor([-1])])
            return Index(*ends, padded[then.source])
        case Scale(), Scale():
            return Scale(*ends, first.diagonal * then.diagonal)
        case Dense(), Dense() if _product_is_smaller(first.weight, then.weight):
            return Dense(*ends, then.weight @ first.weight)
        case Scale(), Dense() if _constant_leading(first):
            return Dense(*ends, then.weight * _row(first).to(then.weight))
        case Dense(), Scale() if _constant_leading(then):
            return Dense(*ends, then.diagonal.to(first.weight).reshape(-1, 1) * first.weight)
        case Scale(), Conv() if (scale := per_channel(first)) is not None:
            per_group = scale.to(then.weight).reshape(then.groups, 1, -1)
            grouped = then.weight.reshape(then.groups, -1, *then.weight.shape[1:])
            scaled = grouped * per_group.reshape(*per_group.shape, *(1,) * then.axes)
            return _reweighted(then, scaled.reshape(then.weight.shape))
        case Conv(), Scale() if (scale := per_channel(then)) is not None:
            column = scale.to(first.weight).reshape(-1, 1, *(1,) * first.axes)
            return _reweighted(first, column * first.weight)
        case Scale(), Transpose(inner=inner):  # C^T S = (S C)^T
            joint = _merge(inner, first)
            return None if joint is None else _transpose(joint)
        case Transpose(inner=inner), Scale():  # S C^T = (C S)^T
            joint = _merge(then, inner)
            return None if joint is None else _transpose(joint)
    return None


def _product_is_smaller(first: Tensor, then: Tensor) -> bool:
    return len(then) * first.shape[1] <= first.numel() + then.numel()


def _constant_leading(scale: Scale) -> bool:
    """Whether the diagonal varies along the last axis only."""
    return math.prod(scale.diagonal.shape[:-1]) == 1


def _row(scale: Scale) -> Tensor:
    return scale.diagonal.reshape(1, -1)


def per_channel(scale: Scale) -> Tensor | None:
    """The diagonal as one number a channel, or None where it varies in space."""
    diagonal = scale.diagonal
    if diagonal.numel() == 1:
        return diagonal.reshape(1).expand(scale.in_shape[0])
    same_in_space = diagonal.ndim == len(scale.in_shape) and math.prod(diagonal.shape[1:]) == 1
    return diagonal.flatten() if same_in_space else None


def _reweighted(conv: Conv, weight: Tensor) -> Conv:
    same = conv.stride, conv.padding, conv.dilation, conv.groups, conv.circular
    return Conv(conv.in_shape, conv.out_shape, weight, *same)


def _transpose(map: LinearMap) -> LinearMap:
    match map:
        case Transpose():
            return map.inner
        case Dense():
            return Dense(map.out_shape, map.in_shape, map.weight.mT)
        case Scale():
            return map
        case _:
            return map.T


def _add(terms: list[LinearMap]) -> LinearMap:
    flat: list[LinearMap] = []
    for term in terms:
        for part in term.terms if isinstance(term, Add) else (term,):
            for place, other in enumerate(flat):
                if (joint := _sum(other, part)) is not None or (
                    joint := _sum(part, other)
                ) is not None:
                    flat[place] = joint
                    break
            else:
                flat.append(part)
    return flat[0] if len(flat) == 1 else Add(flat[0].in_shape, flat[0].out_shape, tuple(flat))


def _sum(left: LinearMap, right: LinearMap) -> LinearMap | None:
    """`left + right` as one map, or None where there is no such rule in this order."""
    scale, right = _as_scale(left), _as_scale(right) or right
    match right:
        case Scale() if scale is not None:
            return Scale(right.in_shape, right.out_shape, scale.diagonal + right.diagonal)
        case Dense() if scale is not None and _constant_leading(scale):
            diagonal = _row(scale).to(right.weight).flatten().expand(len(right.weight))
            return Dense(right.in_shape, right.out_shape, right.weight + diagonal.diag())
        case Dense() if isinstance(left, Dense):
            return Dense(right.in_shape, right.out_shape, left.weight + right.weight)
        case Conv() if scale is not None and (channels := per_channel(scale)) is not None:
            return _add_identity(right, channels)
        case Conv() if isinstance(left, Conv) and _geometry(left) == _geometry(right):
            return _reweighted(right, left.weight + right.weight)
    return None


def _as_scale(map: LinearMap) -> Scale | None:
    if isinstance(map, Scale):
        return map
    if isinstance(map, Index) and map.is_reshape and map.in_shape == map.out_shape:
        return Scale(map.in_shape, map.out_shape, torch.ones(()))
    return None


def _geometry(conv: Conv) -> tuple:
    return conv.kernel, conv.stride, conv.padding, conv.dilation, conv.groups, conv.circular


def _add_identity(conv: Conv, channels: Tensor) -> Conv | None:
    """The sum conv + diag(channels): a tap in the middle, if output i sits where input i does."""
    taps = [before / d for (before, _), d in zip(conv.padding, conv.dilation, strict=True)]
    centred = all(t.is_integer() and t < k for t, k in zip(taps, conv.kernel, strict=True))
    if not centred or set(conv.stride) != {1} or conv.in_shape != conv.out_shape:
        return None
    count, width = conv.weight.shape[:2]
    middle = torch.zeros_like(conv.weight)
    rows = torch.arange(count, device=middle.device)
    centre: tuple[Tensor | int, ...] = (rows, rows % width, *(int(t) for t in taps))
    middle[centre] = 1
    column = channels.to(middle).reshape(-1, 1, *(1,) * conv.axes)
    return _reweighted(conv, conv.weight + middle * column)


def _stack(stack: Stack) -> LinearMap:
    parts = [simplify(part) for part in stack.parts]
    if all(isinstance(part, Index) for part in parts):
        source = torch.cat([p.source.flatten() for p in parts if isinstance(p, Index)])
        return Index(stack.in_shape, stack.out_shape, source)
    return Stack(stack.in_shape, stack.out_shape, tuple(parts))
