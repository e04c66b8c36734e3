"""Convolutions frequency by frequency: upper for zero padding, exact for circular padding.

A zero-padded convolution on n cells is a crop of the circular one on a larger grid of N cells
whose extra cells hold zeros, so its norm is at most the circular one's, which is the largest norm
of the symbol over all frequencies. N must leave room for every cell that the kernel reads. (The
circular norm on n cells itself is no bound: it can be smaller.)

Reference: Sedghi, Gupta & Long 2019 (arXiv 1805.10408) for circular padding.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from lipcert.convolution import Conv
from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_map import LinearMap, Transpose
from lipcert.simplify import simplify
from lipcert.spectral import circulant
from lipcert.spectral.exact import nonzero, without_isometries
from lipcert.spectral.strategy import Strategy, wants_gradient

_CHUNK_BYTES = 2**27


@dataclass(frozen=True)
class Fourier(Strategy):
    """Convolutions, and what folds into one: BatchNorm, scaling, x + conv(x), transposition.

    In float64. The excess over the exact norm shrinks as the image grows against the kernel: some
    percent on 8 x 8 cells, tenths of a percent on 32 x 32 (3 x 3 kernels, random weights).
    """

    kind: ClassVar[Kind] = Kind.UPPER

    def __call__(self, map: LinearMap) -> Constant:
        conv = as_convolution(map)
        if conv is None:
            return self._of_several(map)
        with torch.no_grad():
            value, frequency, group = _largest(conv)
        if not (torch.is_grad_enabled() and conv.weight.requires_grad) or not value.isfinite():
            return Constant(value, self.kind)
        block = symbol(conv, frequency[None])[0, group]
        return Constant(value + _gradient(block), self.kind)

    def _of_several(self, map: LinearMap) -> Constant:
        """Circular convolutions one after the other, and sums of such."""
        map = simplify(map.to(torch.float64))
        if not circulant.is_circulant(map):
            raise LipcertError(
                f"Fourier() fits convolutions; the map {map.in_shape} -> {map.out_shape} is a "
                f"{type(without_isometries(map)).__name__}. Use norm=Auto()."
            )
        best = map.like.new_tensor(-1.0)
        where = torch.zeros(1, len(map.out_shape) - 1)
        with torch.no_grad():
            for frequencies in circulant.frequencies(map):
                blocks = circulant.symbol(map, frequencies).flatten(2)
                scale = nonzero(blocks.abs().max())
                norms = _norms(blocks / scale) * scale
                if norms.isnan().any():
                    return Constant(norms.new_tensor(math.nan), self.kind)
                top = int(norms.argmax())
                if norms[top] > best:
                    best, where = norms[top], frequencies[top : top + 1]
        if not wants_gradient(map) or not best.isfinite():
            return Constant(best, self.kind)
        block = circulant.symbol(map, where).flatten(2)[0]
        return Constant(best + _gradient(block), self.kind)


def _gradient(block: Complex[Tensor, "m n"]) -> Tensor:
    """Zero, with the gradient of the block's spectral norm."""
    with torch.no_grad():
        top = torch.linalg.svd(block, full_matrices=False)[2][0].conj()
    norm = torch.linalg.vector_norm(block @ top)
    return norm - norm.detach()


def _norms(blocks: Complex[Tensor, "... m n"]) -> Float[Tensor, "..."]:
    """The spectral norms of matrices, through the smaller of their Gram matrices; may hold NaN."""
    short = blocks.shape[-2] <= blocks.shape[-1]
    gram = blocks @ blocks.mH if short else blocks.mH @ blocks
    if not gram.isfinite().all():
        return gram.real.new_full(gram.shape[:-2], math.nan)
    return torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0).sqrt()


def fits(map: LinearMap) -> bool:
    """Whether `Fourier` fits the map."""
    return as_convolution(map) is not None or circulant.is_circulant(simplify(map))


def as_convolution(map: LinearMap) -> Conv | None:
    """A convolution with the norm of the map, in float64, or None if it does not fold into one."""
    map = without_isometries(simplify(map.to(torch.float64)))
    while isinstance(map, Transpose):
        map = map.inner
    return map if isinstance(map, Conv) else None


def _largest(conv: Conv) -> tuple[Tensor, Tensor, int]:
    """The largest symbol norm with its frequency and channel group."""
    best = conv.weight.new_tensor(-1.0)
    where, group = torch.zeros(conv.axes), 0
    scale = nonzero(conv.weight.abs().max())
    for frequencies in _chunks(conv):
        norms = _norms(symbol(conv, frequencies) / scale)
        if norms.isnan().any():
            return norms.new_tensor(math.nan), where, group
        top = int(norms.argmax())
        if norms.flatten()[top] > best:
            best = norms.flatten()[top]
            where, group = frequencies[top // norms.shape[1]], top % norms.shape[1]
    return best * scale, where, group


def grid(conv: Conv) -> tuple[int, ...]:
    """Cells an axis of a circular grid that holds the zero-padded image, a multiple of stride."""
    needed = conv.in_shape[1:] if conv.circular else cells_needed(conv)
    return tuple(-(-n // s) * s for n, s in zip(needed, conv.stride, strict=True))


def cells_needed(conv: Conv) -> tuple[int, ...]:
    """Cells an axis so that whatever the kernel reads outside the image lies beside it."""
    axes = zip(
        conv.in_shape[1:],
        conv.out_shape[1:],
        conv.kernel,
        conv.stride,
        conv.padding,
        conv.dilation,
        strict=True,
    )
    return tuple(
        max(n + before, (n_out - 1) * s + (k - 1) * d - before + 1, n)
        for n, n_out, k, s, (before, _), d in axes
    )


def _chunks(conv: Conv) -> Iterator[Float[Tensor, "f axes"]]:
    """The coarse frequencies (cycles per cell), half of them: the other half is conjugate."""
    cells = grid(conv)
    coarse = [n // s for n, s in zip(cells, conv.stride, strict=True)]
    ranges = [torch.arange(coarse[0] // 2 + 1), *(torch.arange(m) for m in coarse[1:])]
    index = torch.cartesian_prod(*ranges).reshape(-1, conv.axes)
    # Converted before the division, which would round to the default precision.
    frequencies = index.to(conv.weight) / torch.tensor(cells).to(conv.weight)
    block_bytes = 16 * conv.weight.shape[0] * conv.weight.shape[1] * math.prod(conv.stride)
    yield from frequencies.split(max(1, _CHUNK_BYTES // block_bytes))


def symbol(
    conv: Conv, frequencies: Float[Tensor, "f axes"]
) -> Complex[Tensor, "f groups rows columns"]:
    """The blocks of the circular convolution at coarse frequencies, one a group.

    With a stride s, the s^axes fine frequencies that alias onto a coarse one stand side by side,
    divided by the square root of their number.

    Args:
        conv: The convolution.
        frequencies: Cycles per input cell, shape `(f, axes)`.

    Returns:
        Shape `(f, groups, out / groups, s^axes * in / groups)`.
    """
    aliases = torch.tensor(list(itertools.product(*(range(s) for s in conv.stride))))
    shifts = aliases.to(frequencies) / torch.tensor(conv.stride).to(frequencies)
    fine = frequencies[:, None] + shifts  # (f, aliases, axes)
    taps = torch.cartesian_prod(*(torch.arange(k) for k in conv.kernel)).reshape(-1, conv.axes)
    offsets = (taps * torch.tensor(conv.dilation)).to(frequencies)
    angles = 2 * math.pi * (fine @ offsets.mT)  # (f, aliases, taps)
    phases = torch.polar(torch.ones_like(angles), angles) / len(aliases) ** 0.5
    weight = conv.weight.reshape(conv.groups, -1, conv.weight.shape[1], len(taps))
    blocks = torch.einsum("fat,goit->fgoai", phases, weight.to(phases.dtype))
    return blocks.flatten(3)
