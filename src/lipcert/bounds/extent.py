"""Where the changes of a node lie, as an ellipsoid that is carried through the network.

Each node has a matrix S with dz dz^T <= S |dx|^2 for all changes dz of its value: an ellipsoid, not
only a ball. Elementwise functions enter with one multiplier a neuron, in closed form.

For slopes c - r .. c + r write the change of phi as c dz + r psi, |psi_i| <= |dz_i|. With diagonal
G > S on the neurons with r > 0,

    P = G r^2 + c [S + S (G - S)^-1 S] c

holds the changes after phi. By Woodbury the bracket is N = (S^-1 - G^-1)^-1, so that with t^2 =
psi^T G^-1 psi <= dz^T G^-1 dz one has dz^T N^-1 dz + t^2 <= dz^T S^-1 dz <= |dx|^2; and for every v
by the inequality of Cauchy and Schwarz (v^T (c dz + r psi))^2 <= (v^T P v) (dz^T N^-1 dz + t^2).
(Singular S by a limit.) G only has to be above S; it is chosen to keep P small in the directions
that the logits read.

Reference: this library; of the family of ECLipsE and of LipSDP (arXiv 1906.04893).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from lipcert.graph import Expansion, Lipschitz
from lipcert.kinds import Constant, Kind, weakest
from lipcert.linear_kinds import Index
from lipcert.linear_map import LinearMap

_FLOOR = 1e-12  # of the largest: keeps multipliers finite where nothing is read or nothing moves


@dataclass(frozen=True)
class Extent:
    """S = scale^2 * matrix, or scale^2 * identity where there is no matrix.

    Attributes:
        scale: A number, float64.
        matrix: Its largest entry is about 1.
        kind: What S claims.
        failure: Probability that the claim is false.
    """

    scale: Tensor
    matrix: Float[Tensor, "n n"] | None = None
    kind: Kind = Kind.UPPER
    failure: float = 0.0

    def radius(self) -> Constant:
        """A Lipschitz constant of the node: the longest half axis."""
        value = self.scale
        if self.matrix is not None:
            value = value * largest_eigenvalue(self.matrix).clamp(min=0).sqrt()
        return Constant(value, self.kind, self.failure)

    def factor(self) -> Float[Tensor, "n n"] | None:
        """F with S <= scale^2 F F^T, None for the identity."""
        if self.matrix is None:
            return None
        values, vectors = torch.linalg.eigh(self.matrix)
        slack = len(values) * torch.finfo(values.dtype).eps * values[-1].detach().clamp(min=1e-300)
        return vectors * (values.clamp(min=0) + slack).sqrt()


def largest_eigenvalue(matrix: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """The largest eigenvalue; in the gradient only its own vector counts."""
    with torch.no_grad():
        if not matrix.requires_grad:
            return torch.linalg.eigvalsh(matrix)[-1]
        values, vectors = torch.linalg.eigh(matrix)
        top = vectors[:, -1]
    return values[-1] + (top @ matrix @ top - (top @ matrix @ top).detach())


def normalised(scale: Tensor, matrix: Tensor, kind: Kind, failure: float) -> Extent:
    """The ellipsoid of scale^2 * matrix, its matrix brought to entries of about 1.

    A matrix that is not finite becomes a ball without a radius: eigenvalues of it raise errors.
    """
    largest = matrix.detach().abs().max()
    if not largest.isfinite():
        return Extent(scale * torch.nan, None, kind, failure)
    # A power of two, so that nothing is rounded; even, so that its root is one too.
    power = 4.0 ** torch.floor(torch.log2(largest.where(largest > 0, 1)) / 2)
    return Extent(scale * power.sqrt(), matrix / power, kind, failure)


def through_map(before: Extent, map: LinearMap, norm: Constant | None) -> Extent:
    """A S A^T; with `norm` given only |A|^2 times the longest half axis, as a ball."""
    if isinstance(map, Index) and map.is_reshape:
        return before
    if norm is not None:
        longest = before.radius()
        kind = weakest((norm.kind, before.kind))
        failure = min(1.0, norm.failure + before.failure)
        return Extent(longest.value * norm.value.to(longest.value), None, kind, failure)
    if before.matrix is None:
        eye = torch.eye(map.out_size).to(map.like).to(before.scale)
        right = map.adjoint(eye.reshape(-1, *map.out_shape))
    else:
        rows = map.apply(before.matrix.reshape(-1, *map.in_shape)).flatten(1)
        right = rows.mT.reshape(-1, *map.in_shape)
    product = map.apply(right).flatten(1)
    return normalised(before.scale, (product + product.mT) / 2, before.kind, before.failure)


def through_slopes(
    before: Extent,
    low: Float[Tensor, " n"],
    high: Float[Tensor, " n"],
    read: Float[Tensor, "k n"] | None,
) -> Extent:
    """The step of an elementwise function.

    Args:
        before: Of its input.
        low: Least slopes.
        high: Greatest slopes.
        read: Rows that later layers read of the output, to choose the multipliers by; None if not
            known.
    """
    if before.matrix is None:
        steepest = torch.maximum(high.abs(), low.abs()).max()
        return Extent(before.scale * steepest, None, before.kind, before.failure)
    s, c, r = before.matrix, (low + high) / 2, (high - low) / 2
    moving = (r > 0).nonzero()[:, 0]
    if not len(moving):
        return normalised(before.scale, stepped(s, c, r, None), before.kind, before.failure)
    inner, spread = s[moving][:, moving], s[:, moving]
    if read is None or not bool((read != 0).any()):
        added, stretched = r[moving].square(), (c[:, None] * spread).square().sum(0)
    else:
        read = read / read.detach().abs().max()
        added = r[moving].square() * read[:, moving].square().sum(0)
        stretched = ((read * c) @ spread).square().sum(0)
    gains = multipliers(largest_eigenvalue(inner).clamp(min=0), added, stretched)
    matrix = stepped(s, c, r, gains)
    return normalised(before.scale, (matrix + matrix.mT) / 2, before.kind, before.failure)


def stepped(
    s: Float[Tensor, "*f n n"] | Complex[Tensor, "*f n n"],
    c: Float[Tensor, " n"],
    r: Float[Tensor, " n"],
    gains: Float[Tensor, " m"] | None,
) -> Tensor:
    """P = G r^2 + c [S + S (G - S)^-1 S] c, the matrices of one or of many frequencies.

    Args:
        s: S.
        c: The middle slopes.
        r: Half the ranges of the slopes.
        gains: G on the neurons with r > 0, raised here as far as rounding asks for; None if there
            are no such neurons.
    """
    through = c[:, None] * s * c
    if gains is None:
        return through
    moving = (r > 0).nonzero()[:, 0]
    spread = s[..., moving]
    left, gains = _raised_factor(spread[..., moving, :], gains)
    bent = torch.linalg.solve_triangular(left, (spread * c[:, None]).mH, upper=False)
    noise = torch.zeros_like(c).index_add(0, moving, gains * r[moving].square())
    return through + bent.mH @ bent + torch.diag(noise)


def multipliers(
    top: Float[Tensor, ""], added: Float[Tensor, " m"], stretched: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """g_i = top + sqrt(b_i / a_i), which minimises a bound of tr(V P V^T).

    Args:
        top: The largest eigenvalue of S.
        added: a_i = r_i^2 |V_i|^2, the weight of what is added; V are the rows that are read, the
            identity where these are not known.
        stretched: b_i = |(V c S)_i|^2, the weight of what is stretched.
    """
    most, least = stretched.detach().max(), added.detach().max()
    if most == 0 or least == 0:
        return top.expand(len(added))
    ratio = stretched.clamp(min=float(_FLOOR * most)) / added.clamp(min=float(_FLOOR * least))
    return top + ratio.sqrt()


def _raised_factor(
    inner: Float[Tensor, "*f m m"] | Complex[Tensor, "*f m m"], gains: Float[Tensor, " m"]
) -> tuple[Tensor, Float[Tensor, " m"]]:
    """The Cholesky factor of G - S, and G, raised as far as rounding asks for."""
    margin = 16 * len(gains) * torch.finfo(gains.dtype).eps
    while True:
        raised = gains * (1 + margin) + torch.finfo(gains.dtype).tiny
        left, info = torch.linalg.cholesky_ex(torch.diag(raised) - inner)
        if not bool(info.any()) or not bool(gains.isfinite().all()) or margin > 1:
            return left, raised
        margin *= 16


def together(parts: list[Extent], size: int, dense: bool) -> Extent:
    """The sum of the changes of several nodes of one shape.

    (sum a_i) (sum a_i)^T <= sum a_i a_i^T / theta_i for shares theta that add up to 1; how the
    nodes depend on each other is given up.
    """
    kind, failure = weakest(p.kind for p in parts), min(1.0, sum(p.failure for p in parts))
    if not dense or all(p.matrix is None for p in parts):
        value = torch.stack([p.radius().value for p in parts]).sum()
        return Extent(value, None, kind, failure)
    largest = torch.stack([p.scale.detach() for p in parts]).max()
    scale = largest.where(largest > 0, 1)
    matrices = [_matrix(p, size) * (p.scale / scale).square() for p in parts]
    total = sum(m / t for m, t in zip(matrices, _shares(matrices), strict=True))
    assert isinstance(total, Tensor)
    return normalised(scale, total, kind, failure)


def stacked(parts: list[Extent], sizes: list[int], dense: bool) -> Extent:
    """The changes of several nodes one behind the other, as `together` shared among them."""
    kind, failure = weakest(p.kind for p in parts), min(1.0, sum(p.failure for p in parts))
    if not dense or all(p.matrix is None for p in parts):
        radii = torch.stack([p.radius().value for p in parts])
        return Extent(torch.linalg.vector_norm(radii), None, kind, failure)
    largest = torch.stack([p.scale.detach() for p in parts]).max()
    scale = largest.where(largest > 0, 1)
    matrices = [
        _matrix(p, n) * (p.scale / scale).square() for p, n in zip(parts, sizes, strict=True)
    ]
    blocks = [m / t for m, t in zip(matrices, _shares(matrices), strict=True)]
    return normalised(scale, torch.block_diag(*blocks), kind, failure)


def _matrix(part: Extent, size: int) -> Float[Tensor, "n n"]:
    return torch.eye(size).to(part.scale) if part.matrix is None else part.matrix


def _shares(matrices: list[Tensor]) -> list[Tensor]:
    """Shares that minimise the trace of the sum."""
    roots = torch.stack([m.detach().trace().clamp(min=0).sqrt() for m in matrices])
    roots = roots + _FLOOR * roots.max() + 1e-300
    return list(roots / roots.sum())


def through_opaque(before: Extent, op: Lipschitz) -> Extent:
    """A function of which only the constant is known: a ball again."""
    longest = before.radius()
    value = torch.as_tensor(op.constant()).to(longest.value) * longest.value
    return Extent(value, None, weakest((op.kind, before.kind)), before.failure)


def through_expansion(before: Extent, e: Expansion, read: Float[Tensor, "k n"] | None) -> Extent:
    """A function that acts elementwise in other coordinates.

    Args:
        before: Of its input.
        e: The coordinates and the slopes there.
        read: Rows that later layers read of its output, as for `through_slopes`.
    """
    middle = None
    if read is not None:
        middle = e.after.adjoint(read.reshape(-1, *e.after.out_shape)).flatten(1)
    low, high = (slope.flatten().to(before.scale) for slope in (e.low, e.high))
    inside = through_map(before, e.before, None)
    return through_map(through_slopes(inside, low, high, middle), e.after, None)
