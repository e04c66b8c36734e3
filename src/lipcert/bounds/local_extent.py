"""Ellipsoids that hold the changes of a node around samples, one matrix a sample.

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

from lipcert.linear_kinds import Index
from lipcert.linear_map import LinearMap

_FLOOR = 1e-6  # of the largest: keeps multipliers finite where nothing is read or nothing moves
_TRIES = 12  # at raising G above S; the last one has twice the G of the first


@dataclass(frozen=True)
class LocalExtent:
    """S = scale^2 * matrix for each sample, or scale^2 * identity where there is no matrix.

    Attributes:
        scale: A number a sample; NaN where nothing is known.
        matrix: Finite, the largest entry of a sample's is about 1.
    """

    scale: Float[Tensor, " b"]
    matrix: Float[Tensor, "b n n"] | None = None

    def radius(self) -> Float[Tensor, " b"]:
        """A Lipschitz constant of the node: the longest half axis."""
        if self.matrix is None:
            return self.scale
        return self.scale * torch.linalg.eigvalsh(self.matrix)[:, -1].clamp(min=0).sqrt()

    def entries(self) -> Float[Tensor, "b n"] | None:
        """Lipschitz constants of the single entries; None where they are all the radius."""
        if self.matrix is None:
            return None
        return self.scale[:, None] * self.matrix.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()


def _power(sizes: Tensor) -> Tensor:
    """A power of 4 near positive finite numbers, 1 for others: to divide by it rounds nothing."""
    usable = sizes.isfinite() & (sizes > 0)
    return 4.0 ** torch.floor(torch.log2(sizes.where(usable, 1)) / 2)


def _largest(matrices: Float[Tensor, "b m n"]) -> Float[Tensor, " b"]:
    return matrices.abs().flatten(1).amax(1)


def normalised(scale: Float[Tensor, " b"], matrix: Float[Tensor, "b n n"]) -> LocalExtent:
    """The ellipsoids of scale^2 * matrix, the matrices brought to entries of about 1.

    Where a matrix is not finite nothing is known: eigenvalues of it would raise an error.
    """
    largest = _largest(matrix)
    power = _power(largest)
    known = largest.isfinite()
    matrix = (matrix / power[:, None, None]).where(known[:, None, None], 0)
    return LocalExtent((scale * power.sqrt()).where(known, torch.nan), matrix)


def through_map(before: LocalExtent, map: LinearMap, norm: Float[Tensor, ""] | None) -> LocalExtent:
    """A S A^T; with `norm` given only |A| times the longest half axis, as a ball."""
    if isinstance(map, Index) and map.is_reshape:
        return before
    if norm is not None:
        return LocalExtent(before.radius() * norm.to(before.scale))
    if before.matrix is None:
        eye = torch.eye(map.out_size, dtype=before.scale.dtype, device=before.scale.device)
        turned = map.adjoint(eye.reshape(-1, *map.out_shape)).flatten(1)[None]  # A^T, by rows
    else:
        count = len(before.scale)
        rows = map.apply(before.matrix.reshape(-1, *map.in_shape)).reshape(
            count, map.in_size, map.out_size
        )
        turned = rows.mT
    # In two steps, so that squares of large weights stay in range.
    power = _power(_largest(turned))
    turned = turned / power[:, None, None]
    product = map.apply(turned.reshape(-1, *map.in_shape))
    product = product.reshape(len(turned), map.out_size, map.out_size)
    matrix = ((product + product.mT) / 2).expand(len(before.scale), -1, -1)
    return normalised(before.scale * power.sqrt(), matrix)


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
    if before.matrix is None:
        return normalised(scale, torch.diag_embed(steep.square()))
    s, c, r = before.matrix, (low + high) / 2, (high - low) / 2
    r = torch.maximum(r, torch.maximum(high - c, c - low))  # where the middle was rounded
    bent = r > 0
    within = s * (bent[:, :, None] & bent[:, None])
    top = torch.linalg.eigvalsh(within)[:, -1].clamp(min=0)
    gains = top[:, None] + _ratios(s, c, r, read)
    return normalised(scale, _stepped(s, c, r, gains))


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
    s: Float[Tensor, "b n n"],
    c: Float[Tensor, "b n"],
    r: Float[Tensor, "b n"],
    gains: Float[Tensor, "b n"],
) -> Float[Tensor, "b n n"]:
    """P = G r^2 + c [S + S (G - S)^-1 S] c with G on the neurons with r > 0; NaN where none is."""
    bent = r > 0
    within = s * (bent[:, :, None] & bent[:, None])
    tiny = torch.finfo(s.dtype).tiny
    margin = torch.full_like(gains[:, :1], 16 * gains.shape[1] * torch.finfo(s.dtype).eps)
    for _ in range(_TRIES):
        raised = torch.where(bent, gains * (1 + margin) + tiny, 1)
        left, failed = torch.linalg.cholesky_ex(torch.diag_embed(raised) - within)
        if not bool(failed.any()):
            break
        margin = torch.where(failed[:, None] > 0, (16 * margin).clamp(max=1), margin)
    spread = (s * bent[:, :, None]) * c[:, None]
    curved = torch.linalg.solve_triangular(left, spread, upper=False)
    noise = torch.diag_embed((raised * r.square()).where(bent, 0))
    matrix = c[:, :, None] * s * c[:, None] + curved.mT @ curved + noise
    return matrix.where(failed[:, None, None] == 0, torch.nan)


def through_constant(before: LocalExtent, constant: Float[Tensor, ""]) -> LocalExtent:
    """A function of which only the constant is known: a ball again."""
    return LocalExtent(before.radius() * constant.to(before.scale))


def together(parts: Sequence[LocalExtent]) -> LocalExtent:
    """The sum of the changes of several nodes of one shape.

    (sum a_i) (sum a_i)^T <= sum a_i a_i^T / theta_i for shares theta that add up to 1; how the
    nodes depend on each other is given up.
    """
    size = next((p.matrix.shape[1] for p in parts if p.matrix is not None), None)
    if size is None:
        return LocalExtent(torch.stack([p.scale for p in parts]).sum(0))
    scale, matrices = _of_one_scale(parts, [size] * len(parts))
    return normalised(scale, torch.stack(_shared(matrices)).sum(0))


def stacked(parts: Sequence[LocalExtent], sizes: Sequence[int], dense: bool) -> LocalExtent:
    """The changes of several nodes one behind the other, as `together` shared among them."""
    if not dense or all(p.matrix is None for p in parts):
        return LocalExtent(
            torch.linalg.vector_norm(torch.stack([p.radius() for p in parts]), dim=0)
        )
    scale, matrices = _of_one_scale(parts, sizes)
    whole = scale.new_zeros(len(scale), sum(sizes), sum(sizes))
    at = 0
    for block, size in zip(_shared(matrices), sizes, strict=True):
        whole[:, at : at + size, at : at + size] = block
        at += size
    return normalised(scale, whole)


def _of_one_scale(
    parts: Sequence[LocalExtent], sizes: Sequence[int]
) -> tuple[Float[Tensor, " b"], list[Tensor]]:
    """The largest of the scales, and every part's matrix in units of it."""
    scale = torch.stack([p.scale for p in parts]).amax(0)
    unit = scale.where(scale > 0, 1)
    matrices = []
    for part, size in zip(parts, sizes, strict=True):
        matrix = part.matrix
        if matrix is None:
            matrix = torch.eye(size, dtype=unit.dtype, device=unit.device)[None]
        matrices.append(matrix * (part.scale / unit).square()[:, None, None])
    return scale, matrices


def _shared(matrices: list[Tensor]) -> list[Tensor]:
    """The matrices divided by shares that minimise the trace of the sum."""
    traces = [m.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0) for m in matrices]
    roots = torch.stack(traces).sqrt()
    roots = roots + _FLOOR**2 * roots.amax(0) + torch.finfo(roots.dtype).tiny
    shares = roots / roots.sum(0)
    return [m / share[:, None, None] for m, share in zip(matrices, shares, strict=True)]
