"""Ellipsoids of images, frequency by frequency.

On a circular network (`cover`) every convolution is a matrix a frequency, so an ellipsoid that
starts as a ball stays a matrix S(f) a frequency f: a stride adds up the frequencies that it folds
onto one, and an activation takes one multiplier a channel, the same at every place. What bounds the
circular network bounds the zero-padded one, which is a part of it.

Images are real, so S(-f) is the conjugate of S(f) and half of the frequencies are enough. They are
chosen on the coarsest grid of the network; a finer grid takes all of its frequencies that fold onto
those, so that a stride is a sum over neighbours in memory.

Notation as in `extent`; S(f) acts on z's Fourier coefficients, those of the unitary transform.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from lipcert.bounds.extent import (
    Extent,
    Gains,
    Moving,
    normalised,
    shares_of,
    stepped,
)
from lipcert.bounds.roots import gram, largest_eigenvalue, power_of_two, square_root
from lipcert.bounds.tail import matrix_of
from lipcert.convolution import Conv
from lipcert.kinds import Constant, Kind
from lipcert.linear_map import LinearMap, Shape


@dataclass(frozen=True)
class Waves:
    """S(f) = scale^2 R(f)^H R(f) at half of the frequencies f of a grid, of one node or of several.

    Attributes:
        scale: A number, of the precision of the roots.
        roots: R, entries of moderate size; for each frequency of the coarsest grid (those of its
            last axis up to the middle) all that fold onto it.
        coarsest: Cells of each axis of the coarsest grid.
        folds: How many times as many cells each axis of this grid has.
        kind: What S claims.
    """

    # The columns are the channels of a node, and those of others on the same grid behind them.
    scale: Tensor
    roots: Complex[Tensor, "f folds m c"]
    coarsest: Shape
    folds: Shape
    kind: Kind = Kind.UPPER

    def chosen(self, index: Int[Tensor, " k"]) -> "Waves":
        """That of some of the channels."""
        return dataclasses.replace(self, roots=self.roots[..., index.to(self.roots.device)])

    def matrices(self) -> Complex[Tensor, "f folds c c"]:
        """S(f) / scale^2."""
        return gram(self.roots)

    def radius(self) -> Constant:
        """A Lipschitz constant of the node: the longest half axis."""
        top = square_root(largest_eigenvalue(self.matrices()))
        return Constant(self.scale * top, self.kind)

    def ball(self) -> Extent:
        """The ball around it."""
        return Extent(self.radius().value, kind=self.kind)

    def onto(self, map: LinearMap) -> Extent:
        """The ellipsoid of the outputs of a map of the image, as a matrix."""
        rows, power = _unit(matrix_of(map).to(self.scale))
        roots = self.roots * self.weights().sqrt()
        seen = roots @ self.transformed(rows.reshape(-1, *map.in_shape)).mT
        seen = torch.view_as_real(seen).movedim(-1, 0).flatten(0, -2)
        return normalised(self.scale * power, seen, self.kind, 0.0)

    def transformed(self, images: Float[Tensor, "k c *cells"]) -> Complex[Tensor, "f folds k c"]:
        """The Fourier coefficients of images that are zero on the rest of the grid."""
        count, channels, *cells = images.shape
        grid = math.prod(self.coarsest) * math.prod(self.folds)
        found, axes = (images * grid**-0.5).to(self.roots.dtype), len(cells)
        cycles = _cycles(self.coarsest, self.folds)
        for of, size in reversed(list(zip(cycles, cells, strict=True))):
            # As a matrix an axis: the cells are few, and torch.fft takes more time for each.
            angles = of.reshape(-1, 1) * torch.arange(size) * (2 * math.pi)
            turns = torch.complex(angles.cos(), -angles.sin())
            found = turns.to(found) @ found.reshape(-1, size).mT
        shape = [n for of in cycles for n in of.shape]
        found = found.reshape(*shape, count, channels)
        found = found.permute(*range(0, 2 * axes, 2), *range(1, 2 * axes, 2), -2, -1)
        return found.reshape(-1, math.prod(self.folds), count, channels)

    def weights(self) -> Float[Tensor, "f 1 1 1"]:
        """How many frequencies of the whole grid each one stands for: itself and its negative."""
        last = self.coarsest[-1]
        along = torch.full((last // 2 + 1,), 2.0).to(self.scale)
        along[0] = 1
        if last % 2 == 0:
            along[-1] = 1
        return along.repeat(math.prod(self.coarsest[:-1]))[:, None, None, None]


def everything(channels: int, grid: Shape, coarsest: Shape, like: Tensor, kind: Kind) -> Waves:
    """The unit ball of images on a grid.

    Args:
        channels: How many.
        grid: Cells of each axis.
        coarsest: Those of the coarsest grid of the network; they divide the others.
        like: A number of the precision and on the device to work on.
        kind: What is to be claimed in that precision.
    """
    folds = tuple(m // n for m, n in zip(grid, coarsest, strict=True))
    eye = torch.eye(channels, dtype=like.dtype.to_complex(), device=like.device)
    frequencies = math.prod(coarsest[:-1]) * (coarsest[-1] // 2 + 1)
    roots = eye.expand(frequencies, math.prod(folds), channels, channels)
    return Waves(torch.ones_like(like), roots, coarsest, folds, kind)


def through_circular(before: Waves, conv: Conv) -> Waves:
    """A circular convolution with a stride that divides the grid.

    Channels behind those that it reads are other nodes' and stay as they are; only without stride.
    """
    weight, power = _unit(conv.weight.to(before.scale))
    into = conv.in_shape[0]
    carried = before.roots[..., :into] @ _symbols(before, conv, weight).mH
    scale, folds = before.scale * power, before.folds
    if math.prod(conv.stride) > 1:
        folds = tuple(a // s for a, s in zip(folds, conv.stride, strict=True))
        # Along each axis, frequency k + m of the finer grid of m s cells folds onto k of m.
        split = [n for pair in zip(conv.stride, folds, strict=True) for n in pair]
        axes, order = len(folds), len(carried)
        carried = carried.reshape(order, *split, *carried.shape[-2:])
        places = [0, *range(2, 2 + 2 * axes, 2), *range(1, 1 + 2 * axes, 2), -2, -1]
        carried = carried.permute(places).reshape(order, math.prod(folds), -1, conv.out_shape[0])
        scale = scale / math.sqrt(math.prod(conv.stride))
    else:
        carried = torch.cat([carried, before.roots[..., into:] * (1 / power)], -1)
    return dataclasses.replace(before, scale=scale, roots=carried, folds=folds)


def through_cut(
    before: Waves,
    low: Float[Tensor, " c"],
    high: Float[Tensor, " c"],
    read: Complex[Tensor, "f folds k c"] | None,
    gains: Gains,
) -> Waves:
    """An activation with one range of slopes a channel; channels that pass have the slopes 1 and 1.

    Args:
        before: Of its input.
        low: Least slopes.
        high: Greatest slopes.
        read: Rows that later layers read of its output, `transformed`; None if not known.
        gains: Chooses the multipliers.
    """
    s, c, r = before.matrices(), (low + high) / 2, (high - low) / 2
    power = power_of_two(s.detach().diagonal(dim1=-2, dim2=-1).real.sqrt())
    power = power.where(power.isfinite(), 1)
    inverse = 1 / power
    s, scale, found = s * inverse.square(), before.scale * power, None
    if bool((r > 0).any()):
        moving = (r > 0).nonzero()[:, 0]
        spread = s if len(moving) == len(c) else s[..., moving]
        inner = s if len(moving) == len(c) else spread[..., moving, :]
        if read is None or not bool((read != 0).any()):
            most = torch.full_like(c[0], math.prod(before.coarsest) * math.prod(before.folds))
            added = r[moving].square() * most
            stretched = c[:, None] * spread
        else:
            rows = read * (1 / power_of_two(read))
            weights = (_squares(rows) * before.weights()).sum((0, 1, 2))
            added, most = r[moving].square() * weights[moving], weights.max()
            stretched = (rows.conj() * c) @ spread
        stretched = (_squares(stretched) * before.weights()).sum((0, 1, 2))
        found = gains(Moving(inner, c[moving], r[moving], added, stretched, most))
    roots = stepped(before.roots * inverse, s, c, r, found)
    return dataclasses.replace(before, scale=scale, roots=roots)


def summed_waves(before: Waves, channels: int, terms: int) -> Waves:
    """The sum of the first nodes of an ellipsoid, all of some channels; others behind them stay."""
    roots = before.roots
    first = roots[..., : channels * terms].unflatten(-1, (terms, channels)).sum(-2)
    return dataclasses.replace(before, roots=torch.cat([first, roots[..., channels * terms :]], -1))


def stacked_waves(parts: Sequence[Waves]) -> Waves:
    """One ellipsoid of several on one grid, of which is not known how they go together."""
    largest = torch.stack([p.scale.detach() for p in parts]).max()
    scale = largest.where(largest > 0, 1)
    shares = shares_of([_squares(p.roots).sum() * (p.scale / scale).square() for p in parts])
    width = sum(p.roots.shape[-1] for p in parts)
    blocks, begin = [], 0
    for p, share in zip(parts, shares, strict=True):
        root = p.roots * (p.scale / scale / share.sqrt())
        end = begin + root.shape[-1]
        blocks.append(torch.nn.functional.pad(root, (begin, width - end)))
        begin = end
    return dataclasses.replace(parts[0], scale=scale, roots=torch.cat(blocks, -2))


def _symbols(before: Waves, conv: Conv, weight: Tensor) -> Complex[Tensor, "f folds out in"]:
    """The matrices of a circular convolution at the frequencies of its input."""
    taps = torch.tensor(list(itertools.product(*(range(k) for k in conv.kernel))))
    offsets = taps * torch.tensor(conv.dilation) - torch.tensor([b for b, _ in conv.padding])
    angles = 2 * math.pi * (_frequencies(before.coarsest, before.folds) @ offsets.double().mT)
    phases = torch.cat([angles.cos(), angles.sin()], 1).reshape(2 * len(angles), -1)
    weight = dataclasses.replace(conv, weight=weight).ungrouped().flatten(2)
    out, into = weight.shape[:2]
    values = phases.to(weight) @ weight.reshape(out * into, -1).mT
    real, imaginary = values.reshape(-1, 2, out * into).unbind(1)
    matrices = torch.complex(real.contiguous(), imaginary.contiguous())
    return matrices.reshape(len(before.roots), -1, out, into)


def _cycles(coarsest: Shape, folds: Shape) -> list[Float[Tensor, "cells folds"]]:
    """Cycles per cell along each axis, for the coarsest grid's and for all that fold onto one."""
    counts = (*coarsest[:-1], coarsest[-1] // 2 + 1)
    return [
        (torch.arange(count)[:, None] + size * torch.arange(fold)).double() / (size * fold)
        for count, size, fold in zip(counts, coarsest, folds, strict=True)
    ]


def _frequencies(coarsest: Shape, folds: Shape) -> Float[Tensor, "all axes"]:
    """Cycles per cell of each frequency, in the order of `Waves`; float64."""
    spread, axes = [], len(folds)
    for axis, of in enumerate(_cycles(coarsest, folds)):
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = of.shape
        spread.append(of.reshape(shape))
    return torch.stack(torch.broadcast_tensors(*spread), -1).reshape(-1, axes)


def _squares(values: Complex[Tensor, "..."]) -> Float[Tensor, "..."]:
    return torch.view_as_real(values.resolve_conj()).square().sum(-1)


def _unit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor with the largest entry about 1, and what it was divided by."""
    power = power_of_two(weight)
    power = power.where(power.isfinite(), 1)
    return weight * (1 / power), power
