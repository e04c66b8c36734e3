"""Ellipsoids that hold the changes of a node around samples, one root a sample.

The steps are those of `extent`, in batches: dz dz^T <= S |dx|^2 for the changes about a sample, or
between any two points of a ball, whichever the slopes are about. Neurons whose slope is one number
there are linear and add nothing. Which ones these are differs from sample to sample: left out, they
have rows and columns of zeros in S, and of the identity in G - S.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds.extent import APART
from lipcert.bounds.roots import fewer_rows
from lipcert.bounds.tail import matrix_of
from lipcert.linear_kinds import Index
from lipcert.linear_map import LinearMap

_FLOOR = 1e-6  # of the largest: keeps multipliers finite where nothing is read or nothing moves
_TRIES = 12  # at raising G above S; the last one has twice the G of the first


@dataclass(frozen=True)
class LocalExtent:
    """S = scale^2 R^T R for each sample, or scale^2 * identity where there is no R.

    Attributes:
        scale: A number a sample; NaN where nothing is known.
        root: R, finite; the largest entry of a sample's is about 1.
    """

    scale: Float[Tensor, " b"]
    root: Float[Tensor, "b m n"] | None = None

    def radius(self) -> Float[Tensor, " b"]:
        """A Lipschitz constant of the node: the longest half axis."""
        if self.root is None:
            return self.scale
        wide = self.root.shape[1] < self.root.shape[2]  # the smaller Gram matrix of the two
        root = self.root.mT if wide else self.root
        return self.scale * torch.linalg.eigvalsh(root.mT @ root)[:, -1].clamp(min=0).sqrt()

    def entries(self) -> Float[Tensor, "b n"] | None:
        """Lipschitz constants of the single entries; None where they are all the radius."""
        if self.root is None:
            return None
        return self.scale[:, None] * torch.linalg.vector_norm(self.root, dim=1)


def _power(sizes: Tensor) -> Tensor:
    """A power of 2 near positive finite numbers, 1 for others: to divide by it rounds nothing."""
    usable = sizes.isfinite() & (sizes > 0)
    return 2.0 ** torch.floor(torch.log2(sizes.where(usable, 1)))


def _largest(matrices: Float[Tensor, "b m n"]) -> Float[Tensor, " b"]:
    return matrices.abs().flatten(1).amax(1)


def normalised(scale: Float[Tensor, " b"], root: Float[Tensor, "b m n"]) -> LocalExtent:
    """The ellipsoids of scale^2 R^T R, the roots brought to entries of about 1.

    Where a root is not finite nothing is known: eigenvalues of it would raise an error.
    """
    largest = _largest(root)
    power = _power(largest)
    known = largest.isfinite()
    root = (root / power[:, None, None]).where(known[:, None, None], 0)
    return LocalExtent((scale * power).where(known, torch.nan), root)


def through_map(before: LocalExtent, map: LinearMap, norm: Float[Tensor, ""] | None) -> LocalExtent:
    """A S A^T; with `norm` given only |A| times the longest half axis, as a ball."""
    if isinstance(map, Index) and map.is_reshape:
        return before
    if norm is not None:
        return LocalExtent(before.radius() * norm.to(before.scale))
    count = len(before.scale)
    if before.root is None:
        turned = matrix_of(map).to(before.scale).mT
        if turned.shape[0] > turned.shape[1]:
            turned = torch.linalg.qr(turned, mode="r")[1]  # of the same Gram matrix
        carried = turned.expand(count, -1, -1)
    else:
        rows = before.root.reshape(-1, *map.in_shape)
        carried = map.apply(rows).reshape(*before.root.shape[:2], map.out_size)
    return normalised(before.scale, carried)


def through_slopes(
    before: LocalExtent,
    low: Float[Tensor, "b n"],
    high: Float[Tensor, "b n"],
    read: Float[Tensor, "b k n"] | None,
    dense: bool,
) -> LocalExtent:
    """The step of an elementwise function.

    Args:
        before: Of its input.
        low: Least slopes.
        high: Greatest slopes.
        read: Rows that later layers read of the output, to choose the multipliers by; None if not
            known.
        dense: Whether to give a matrix.
    """
    steep = torch.maximum(high.abs(), low.abs())
    if not dense:
        return LocalExtent(before.radius() * steep.amax(1))
    power = _power(steep.amax(1).square()).sqrt()
    low, high, steep = (slopes / power[:, None] for slopes in (low, high, steep))
    scale = before.scale * power
    if before.root is None:
        return normalised(scale, torch.diag_embed(steep))
    root, c, r = before.root, (low + high) / 2, (high - low) / 2
    s = root.mT @ root
    r = torch.maximum(r, torch.maximum(high - c, c - low))  # where the middle was rounded
    r = r * (root != 0).any(1)  # what does not move has no noise
    bent = r > 0
    within = s * (bent[:, :, None] & bent[:, None])
    top = torch.linalg.eigvalsh(within)[:, -1].clamp(min=0)
    gains = top[:, None] * (1 + APART) + _ratios(s, c, r, read)
    return normalised(scale, _stepped(root, s, c, r, gains))


def _ratios(
    s: Float[Tensor, "b n n"],
    c: Float[Tensor, "b n"],
    r: Float[Tensor, "b n"],
    read: Float[Tensor, "b k n"] | None,
) -> Float[Tensor, "b n"]:
    """sqrt(b_i / a_i): what is stretched over what is added, seen through the rows that are read.

    With a bound of S by its largest eigenvalue it minimises the trace of what is read of P.
    """
    added, stretched = r, torch.linalg.vector_norm(c[:, :, None] * s, dim=1)
    if read is not None:
        read = read / _power(_largest(read))[:, None, None]
        seen = r * torch.linalg.vector_norm(read, dim=1)
        through = torch.linalg.vector_norm((read * c[:, None]) @ s, dim=1)
        bent = r > 0
        used = ((seen * bent).amax(1) > 0) & ((through * bent).amax(1) > 0)
        added = seen.where(used[:, None], added)
        stretched = through.where(used[:, None], stretched)
    bent = r > 0
    added, stretched = added * bent, stretched * bent
    least, most = (_FLOOR * v.amax(1, keepdim=True) for v in (added, stretched))
    added, stretched = torch.maximum(added, least), torch.maximum(stretched, most)
    return stretched / added.where(added > 0, 1)


def _stepped(
    root: Float[Tensor, "b m n"],
    s: Float[Tensor, "b n n"],
    c: Float[Tensor, "b n"],
    r: Float[Tensor, "b n"],
    gains: Float[Tensor, "b n"],
) -> Float[Tensor, "b k n"]:
    """The root of P = G r^2 + c [S + S (G - S)^-1 S] c; NaN where no G is found.

    Args:
        root: R.
        s: S = R^T R.
        c: The middle slopes.
        r: Half the ranges; G is on the neurons where this is above 0.
        gains: G, raised here as far as rounding asks for.
    """
    bent, size = r > 0, s.shape[1]
    within = s * (bent[:, :, None] & bent[:, None])
    tiny = torch.finfo(s.dtype).tiny ** 0.5  # so that zero has a factor
    margin = torch.full_like(gains[:, :1], 16 * size * torch.finfo(s.dtype).eps)
    for _ in range(_TRIES):
        raised = torch.where(bent, gains * (1 + margin) + tiny, 1)
        # Half of the margin is for what the sum and the factor themselves round.
        lowered = torch.diag_embed(raised / (1 + margin / 2)) - within
        left, failed = torch.linalg.cholesky_ex(lowered)
        if not bool(failed.any()):
            break
        margin = torch.where(failed[:, None] > 0, (16 * margin).clamp(max=1), margin)
    spread = (s * bent[:, :, None]) * c[:, None]
    curved = torch.linalg.solve_triangular(left, spread, upper=False)
    noise = torch.diag_embed(raised.sqrt() * r)
    found = torch.cat([root * c[:, None], curved, noise], 1)
    found = found if found.shape[1] <= 4 * size else fewer_rows(found)
    return found.where(failed[:, None, None] == 0, torch.nan)


def through_constant(before: LocalExtent, constant: Float[Tensor, ""]) -> LocalExtent:
    """A function of which only the constant is known: a ball again."""
    return LocalExtent(before.radius() * constant.to(before.scale))


def together(parts: Sequence[LocalExtent]) -> LocalExtent:
    """The sum of the changes of several nodes of one shape.

    (sum a_i) (sum a_i)^T <= sum a_i a_i^T / theta_i for shares theta that add up to 1; how the
    nodes depend on each other is given up.
    """
    size = next((p.root.shape[2] for p in parts if p.root is not None), None)
    if size is None:
        return LocalExtent(torch.stack([p.scale for p in parts]).sum(0))
    scale, roots = _of_one_scale(parts, [size] * len(parts))
    return normalised(scale, torch.cat(_shared(roots), 1))


def stacked(parts: Sequence[LocalExtent], sizes: Sequence[int], dense: bool) -> LocalExtent:
    """The changes of several nodes one behind the other, as `together` shared among them."""
    if not dense or all(p.root is None for p in parts):
        return LocalExtent(
            torch.linalg.vector_norm(torch.stack([p.radius() for p in parts]), dim=0)
        )
    scale, roots = _of_one_scale(parts, sizes)
    before = [sum(sizes[:place]) for place in range(len(sizes))]
    wide = [
        torch.nn.functional.pad(root, (begin, sum(sizes) - begin - size))
        for root, begin, size in zip(_shared(roots), before, sizes, strict=True)
    ]
    return normalised(scale, torch.cat(wide, 1))


def _of_one_scale(
    parts: Sequence[LocalExtent], sizes: Sequence[int]
) -> tuple[Float[Tensor, " b"], list[Tensor]]:
    """The largest of the scales, and every part's root in units of it."""
    scale = torch.stack([p.scale for p in parts]).amax(0)
    unit = scale.where(scale > 0, 1)
    roots = []
    for part, size in zip(parts, sizes, strict=True):
        root = part.root
        if root is None:
            root = torch.eye(size, dtype=unit.dtype, device=unit.device)[None]
        roots.append(root * (part.scale / unit)[:, None, None])
    return scale, roots


def _shared(roots: list[Tensor]) -> list[Tensor]:
    """The roots of matrices divided by shares that minimise the trace of the sum."""
    sizes = torch.stack([root.square().sum((1, 2)).sqrt() for root in roots])
    sizes = sizes + _FLOOR**2 * sizes.amax(0) + torch.finfo(sizes.dtype).tiny
    shares = sizes / sizes.sum(0)
    return [root / share.sqrt()[:, None, None] for root, share in zip(roots, shares, strict=True)]
