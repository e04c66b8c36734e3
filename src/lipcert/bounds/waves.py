"""Ellipsoids of images, frequency by frequency.

On a circular network (`cover`) every convolution is a matrix a frequency, so an ellipsoid that
starts as a ball stays a matrix S(f) a frequency f: a stride adds up the frequencies that it folds
onto one, and an activation takes one multiplier a channel, the same at every place. What bounds the
circular network bounds the zero-padded one, which is a part of it.

Notation as in `extent`; S(f) acts on z's Fourier coefficients, those of the unitary transform.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from lipcert.bounds.extent import Extent, multipliers, normalised, stepped
from lipcert.kinds import Constant, Kind
from lipcert.linear_map import LinearMap, Shape
from lipcert.spectral.circulant import symbol


@dataclass(frozen=True)
class Waves:
    """S(f) = scale^2 * blocks[f] at every frequency f of a grid, index k for k / cells cycles.

    Attributes:
        scale: A number, float64.
        blocks: Hermitian, the largest entry about 1.
    """

    scale: Tensor
    blocks: Complex[Tensor, "*grid c c"]

    @property
    def grid(self) -> Shape:
        """Cells of each axis."""
        return tuple(self.blocks.shape[:-2])

    def radius(self) -> Constant:
        """A Lipschitz constant of the node: the longest half axis."""
        return Constant(self.scale * _largest(self.blocks).clamp(min=0).sqrt(), Kind.UPPER)

    def ball(self) -> Extent:
        """The ball around it."""
        return Extent(self.radius().value)

    def onto(self, map: LinearMap) -> Extent:
        """The ellipsoid of the outputs of a map of the image, as a matrix."""
        eye = torch.eye(map.out_size).to(map.like).to(self.scale)
        rows = self._transformed(map.adjoint(eye.reshape(-1, *map.out_shape)))
        seen = (self.blocks @ rows.mT).mT  # S(f) v for each row v
        product = torch.einsum("...ic,...jc->ij", rows.conj(), seen).real
        return normalised(self.scale, (product + product.mT) / 2, Kind.UPPER, 0.0)

    def _transformed(self, images: Float[Tensor, "k c *cells"]) -> Complex[Tensor, "*grid k c"]:
        """The Fourier coefficients of images that are zero on the rest of the grid."""
        axes = tuple(range(2, images.ndim))
        found = torch.fft.fftn(images.to(self.scale), s=self.grid, dim=axes, norm="ortho")
        return found.movedim((0, 1), (-2, -1))


def everything(channels: int, grid: Shape, like: Tensor) -> Waves:
    """The unit ball of images on a grid."""
    eye = torch.eye(channels, dtype=torch.complex128, device=like.device)
    return Waves(torch.ones_like(like), eye.expand(*grid, channels, channels))


def through_circular(before: Waves, map: LinearMap) -> Waves:
    """A circular convolution with a stride that divides the grid."""
    grid = map.out_shape[1:]
    index = torch.cartesian_prod(*(torch.arange(m) for m in grid)).reshape(-1, len(grid))
    at = (index.to(torch.float64) / torch.tensor(grid).to(torch.float64)).to(before.scale.device)
    matrices = symbol(map, at).flatten(3).movedim(3, 1)  # (f, aliases, out, in)
    folds = [n // m for n, m in zip(before.grid, grid, strict=True)]
    # Input frequency k + a m folds onto k of m cells: split each axis into (a, k).
    split = [size for fold, m in zip(folds, grid, strict=True) for size in (fold, m)]
    blocks = before.blocks.reshape(*split, *before.blocks.shape[-2:])
    axes = len(grid)
    order = [*range(1, 2 * axes, 2), *range(0, 2 * axes, 2), 2 * axes, 2 * axes + 1]
    blocks = blocks.permute(order).reshape(len(at), math.prod(folds), *before.blocks.shape[-2:])
    product = (matrices @ blocks @ matrices.mH).sum(1)
    return _normalised(before.scale, product.reshape(*grid, *product.shape[-2:]))


def through_cut(
    before: Waves,
    low: Float[Tensor, " c"],
    high: Float[Tensor, " c"],
    read: Float[Tensor, "k c *cells"] | None,
) -> Waves:
    """An activation with one range of slopes a channel.

    Args:
        before: Of its input.
        low: Least slopes.
        high: Greatest slopes.
        read: Rows that later layers read of its output, on the cells of the network; None if not
            known.
    """
    s, c, r = before.blocks, (low + high) / 2, (high - low) / 2
    moving = (r > 0).nonzero()[:, 0]
    if not len(moving):
        return _normalised(before.scale, stepped(s, c, r, None))
    inner, spread = s[..., moving, :][..., moving], s[..., moving]
    if read is None or not bool((read != 0).any()):
        added = r[moving].square()
        stretched = (c[:, None] * spread).abs().square().sum(-2).flatten(0, -2).mean(0)
    else:
        rows = before._transformed(read / read.detach().abs().max())
        added = r[moving].square() * rows[..., moving].abs().square().flatten(0, -2).sum(0)
        stretched = ((rows.conj() * c) @ spread).abs().square().flatten(0, -2).sum(0)
    gains = multipliers(_largest(inner).clamp(min=0), added, stretched)
    return _normalised(before.scale, stepped(s, c, r, gains))


def added_up(parts: list[Waves]) -> Waves:
    """The sum of the changes of several nodes, split as in `extent.together`."""
    largest = torch.stack([p.scale.detach() for p in parts]).max()
    scale = largest.where(largest > 0, 1)
    blocks = [p.blocks * (p.scale / scale).square() for p in parts]
    traces = [b.detach().diagonal(dim1=-2, dim2=-1).real.sum() for b in blocks]
    roots = torch.stack(traces).clamp(min=0).sqrt()
    roots = roots + 1e-12 * roots.max() + 1e-300
    total = torch.stack([b * (roots.sum() / t) for b, t in zip(blocks, roots, strict=True)]).sum(0)
    return _normalised(scale, total)


def _normalised(scale: Tensor, blocks: Tensor) -> Waves:
    largest = blocks.detach().abs().max()
    usable = (largest > 0) & largest.isfinite()
    power = 4.0 ** torch.floor(torch.log2(largest.where(usable, 1)) / 2)
    return Waves(scale * power.sqrt(), (blocks + blocks.mH) / (2 * power))


def _largest(blocks: Complex[Tensor, "*grid c c"]) -> Float[Tensor, ""]:
    """The largest eigenvalue of any; in the gradient only its own vector counts."""
    flat = blocks.flatten(0, -3)
    with torch.no_grad():
        if not flat.abs().sum().isfinite():
            return torch.full_like(flat.real[0, 0, 0], torch.nan)
        where = torch.linalg.eigvalsh(flat)[:, -1].argmax()
        values, vectors = torch.linalg.eigh(flat[where])
        top = vectors[:, -1]
    seen = (top.conj() @ flat[where] @ top).real
    return values[-1] + seen - seen.detach()
