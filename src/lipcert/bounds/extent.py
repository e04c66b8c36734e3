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

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from lipcert.graph import Expansion, Lipschitz
from lipcert.kinds import Constant, Kind, weakest
from lipcert.linear_kinds import Index
from lipcert.linear_map import LinearMap

_FLOOR = 0.03
"""Weights below this share of the largest count as much: what the logits hardly read of a network
that is taken linear, they may read of the network itself."""


@dataclass(frozen=True)
class Extent:
    """S = scale^2 * matrix, or scale^2 * identity where there is no matrix.

    Attributes:
        scale: A number, of the precision of the matrix.
        matrix: Its largest entry is about 1.
        kind: What S claims.
        failure: Probability that the claim is false.
    """

    scale: Tensor
    matrix: Float[Tensor, "n n"] | None = None
    kind: Kind = Kind.UPPER
    failure: float = 0.0

    def chosen(self, index: Int[Tensor, " k"]) -> "Extent":
        """That of some of the entries; an entry may be named twice."""
        if self.matrix is None:
            matrix = (index[:, None] == index).to(self.scale)
        else:
            index = index.to(self.matrix.device)
            matrix = self.matrix[index][:, index]
        return dataclasses.replace(self, matrix=matrix)

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
        return root(self.matrix).mT


@dataclass(frozen=True)
class Moving:
    """What multipliers are chosen by: the neurons whose slopes have a range, r > 0.

    Attributes:
        matrices: S of them, one matrix or one a frequency, the largest entry about 1.
        middle: c, their middle slopes.
        half: r, half the ranges.
        added: a_i = r_i^2 |V_i|^2, the weight of what is added, V being the rows that are read; the
            identity where these are not known.
        stretched: b_i = |(V c S)_i|^2, the weight of what is stretched.
    """

    matrices: Float[Tensor, "*f m m"] | Complex[Tensor, "*f m m"]
    middle: Float[Tensor, " m"]
    half: Float[Tensor, " m"]
    added: Float[Tensor, " m"]
    stretched: Float[Tensor, " m"]

    def top(self) -> Float[Tensor, ""]:
        """The largest eigenvalue of any of the matrices."""
        return largest_eigenvalue(self.matrices).clamp(min=0)


Gains = Callable[[Moving], Tensor]
"""Gives G, one number a neuron; raised afterwards as far as rounding asks for."""


def balanced(moving: Moving) -> Float[Tensor, " m"]:
    """g_i = top + sqrt(b_i / a_i), which minimises a bound of tr(V P V^T)."""
    top, b, a = moving.top(), _floored(moving.stretched), _floored(moving.added)
    return top + (b / a).sqrt() if bool(((b > 0) & (a > 0)).all()) else top.expand(len(a))


def _floored(weights: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    return torch.maximum(weights, _FLOOR * weights.max())


def largest_eigenvalue(
    matrices: Float[Tensor, "*f n n"] | Complex[Tensor, "*f n n"],
) -> Float[Tensor, ""]:
    """The largest eigenvalue of any; in the gradient only its own vector counts."""
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    with torch.no_grad():
        if not flat.abs().sum().isfinite():
            return flat.real.new_full((), torch.nan)
        values = torch.linalg.eigvalsh(flat)[:, -1]
        where = values.argmax()
        if not matrices.requires_grad:
            return values[where]
        top = torch.linalg.eigh(flat[where])[1][:, -1]
    seen = (top.conj() @ flat[where] @ top).real
    return values[where] + seen - seen.detach()


def normalised(scale: Tensor, matrix: Tensor, kind: Kind, failure: float) -> Extent:
    """The ellipsoid of scale^2 * matrix, its matrix brought to entries of about 1.

    A matrix that is not finite becomes a ball without a radius: eigenvalues of it raise errors.
    """
    power = power_of_two(matrix)
    if not power.isfinite():
        return Extent(scale * torch.nan, None, kind, failure)
    return Extent(scale * power.sqrt(), (matrix + matrix.mT) / (2 * power), kind, failure)


def power_of_two(matrices: Tensor) -> Tensor:
    """About the largest entry: a power of two, so that nothing is rounded; even, as its root is."""
    numbers = matrices.detach()
    largest = (torch.view_as_real(numbers) if numbers.is_complex() else numbers).abs().max()
    return 4.0 ** torch.floor(torch.log2(largest.where(largest != 0, 1)) / 2)


def through_map(
    before: Extent, map: LinearMap, norm: Constant | None = None, passive: int = 0
) -> Extent:
    """A S A^T; with `norm` given only |A|^2 times the longest half axis, as a ball.

    Args:
        before: Of its input.
        map: A.
        norm: |A|, to take the ball.
        passive: How many entries at the end of S are other nodes', which stay as they are.
    """
    if isinstance(map, Index) and map.is_reshape:
        return before
    if norm is not None:
        longest = before.radius()
        kind = weakest((norm.kind, before.kind))
        failure = min(1.0, norm.failure + before.failure)
        return Extent(longest.value * norm.value.to(longest.value), None, kind, failure)
    s, size = before.matrix, map.in_size
    if s is None:
        eye = torch.eye(map.out_size).to(before.scale)
        left = map.adjoint(eye.reshape(-1, *map.out_shape)).reshape(len(eye), -1)
    else:
        rows = map.apply(s[:, :size].reshape(-1, *map.in_shape)).reshape(len(s), -1)
        left = torch.cat([rows, s[:, size:]], 1).mT if passive else rows.mT
    product = map.apply(left[:, :size].reshape(-1, *map.in_shape)).reshape(len(left), -1)
    if passive:
        product = torch.cat([product, left[:, size:]], 1)
    return normalised(before.scale, product, before.kind, before.failure)


def through_slopes(
    before: Extent,
    low: Float[Tensor, " n"],
    high: Float[Tensor, " n"],
    read: Float[Tensor, "k n"] | None,
    gains: Gains,
) -> Extent:
    """The step of an elementwise function; entries that pass have the slopes 1 and 1.

    Args:
        before: Of its input.
        low: Least slopes.
        high: Greatest slopes.
        read: Rows that later layers read of the output; None if not known.
        gains: Chooses the multipliers.
    """
    if before.matrix is None:
        steepest = torch.maximum(high.abs(), low.abs()).max()
        return Extent(before.scale * steepest, None, before.kind, before.failure)
    s, c, r = before.matrix, (low + high) / 2, (high - low) / 2
    found = None
    if bool((r > 0).any()):
        moving = (r > 0).nonzero()[:, 0]
        spread = s[:, moving]
        if read is None or not bool((read != 0).any()):
            added, stretched = r[moving].square(), (c[:, None] * spread).square().sum(0)
        else:
            read = read / read.detach().abs().max()
            added = r[moving].square() * read[:, moving].square().sum(0)
            stretched = ((read * c) @ spread).square().sum(0)
        found = gains(Moving(spread[moving], c[moving], r[moving], added, stretched))
    return normalised(before.scale, stepped(s, c, r, found), before.kind, before.failure)


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
    if gains is None:
        return c[:, None] * s * c
    if _from_zero(c, r):
        root = roots_stepped(s, c, r, gains)
        return root.mH @ root
    moving = (r > 0).nonzero()[:, 0]
    spread = s[..., moving]
    left, gains = _raised_factor(spread[..., moving, :], gains)
    bent = torch.linalg.solve_triangular(left, (spread * c[:, None]).mH, upper=False)
    noise = torch.zeros_like(c).index_add(0, moving, gains * r[moving].square())
    return c[:, None] * s * c + bent.mH @ bent + torch.diag(noise)


def roots_stepped(
    s: Float[Tensor, "*f n n"] | Complex[Tensor, "*f n n"],
    c: Float[Tensor, " n"],
    r: Float[Tensor, " n"],
    gains: Float[Tensor, " m"],
) -> Tensor:
    """R with R^H R >= P, see `stepped`."""
    if _from_zero(c, r):  # P = c G (G - S)^-1 G c
        left, gains = _raised_factor(s, gains)
        right = torch.diag((gains * c).to(s)).expand_as(s)
        return torch.linalg.solve_triangular(left, right, upper=False)
    return root(stepped(s, c, r, gains))


def _from_zero(c: Float[Tensor, " n"], r: Float[Tensor, " n"]) -> bool:
    """Whether every neuron has slopes from 0 on to some other number."""
    return bool(((c.abs() == r) & (r > 0)).all())


def root(matrices: Float[Tensor, "*f n n"] | Complex[Tensor, "*f n n"]) -> Tensor:
    """R with R^H R >= M, above by no more than rounding asks for; of no use where M is not finite.

    A Cholesky factor has a gradient also where eigenvalues are equal.
    """
    size = matrices.shape[-1]
    largest = matrices.detach().diagonal(dim1=-2, dim2=-1).real.amax().clamp(min=0)
    tiny = torch.finfo(largest.dtype).tiny ** 0.5  # so that zero has a root
    noise, eye = size * torch.finfo(largest.dtype).eps * largest + tiny, torch.eye(size)
    while True:
        left, info = torch.linalg.cholesky_ex(matrices + noise * eye.to(matrices))
        if not bool(info.any()) or not bool(noise.isfinite()):
            return left.mH
        noise = 16 * noise


def _raised_factor(
    inner: Float[Tensor, "*f m m"] | Complex[Tensor, "*f m m"], gains: Float[Tensor, " m"]
) -> tuple[Tensor, Float[Tensor, " m"]]:
    """The Cholesky factor of G - S, and G, raised as far as rounding asks for.

    Where they are far from above S, all are raised to its largest eigenvalue.
    """
    margin = 16 * len(gains) * torch.finfo(gains.dtype).eps
    while True:
        raised = gains * (1 + margin) + torch.finfo(gains.dtype).tiny
        left, info = torch.linalg.cholesky_ex(torch.diag(raised) - inner)
        if not bool(info.any()) or not bool(gains.isfinite().all()):
            return left, raised
        if margin > 1:
            top = largest_eigenvalue(inner)
            gains, margin = torch.maximum(gains, top), 16 * len(gains) * torch.finfo(top.dtype).eps
            if not top.isfinite():
                return torch.full_like(left, torch.nan), raised
        margin *= 16


def through_opaque(before: Extent, op: Lipschitz, size: int, passive: int = 0) -> Extent:
    """A function of which only the constant is known: a ball again, if it stands alone.

    Beside other nodes it is a step with c = 0 and r = its constant, one multiplier for all entries:
    they hold as in the recursion, as that only asks for psi^T psi <= dz^T dz.

    Args:
        before: Of its input.
        op: The function.
        size: How many entries its input has.
        passive: As for `through_map`.
    """
    constant = torch.as_tensor(op.constant()).to(before.scale)
    kind = weakest((op.kind, before.kind))
    if not passive:
        return Extent(constant * before.radius().value, None, kind, before.failure)
    s, out = before.matrix, math.prod(op.shape)
    assert s is not None
    inner, across = s[:size, :size], s[:size, size:]
    # One multiplier for all: each entry gets the same share of both weights.
    half, each = constant.expand(size), constant.new_ones(size) / size
    added, stretched = out * constant.square() * each, across.square().sum() * each
    left, gains = _raised_factor(inner, balanced(Moving(inner, 0 * half, half, added, stretched)))
    bent = torch.linalg.solve_triangular(left, across, upper=False)
    ball = torch.diag((gains[0] * constant.square()).expand(out))
    matrix = torch.block_diag(ball, s[size:, size:] + bent.mT @ bent)
    return normalised(before.scale, matrix, kind, before.failure)


def through_expansion(
    before: Extent, e: Expansion, read: Float[Tensor, "k n"] | None, gains: Gains, passive: int = 0
) -> Extent:
    """A function that acts elementwise in other coordinates.

    Args:
        before: Of its input.
        e: The coordinates and the slopes there.
        read: As for `through_slopes`, of its output.
        gains: Chooses the multipliers.
        passive: As for `through_map`.
    """
    size, like = e.after.out_size, before.scale
    if read is not None:
        inside = e.after.to(like.dtype).adjoint(read[:, :size].reshape(-1, *e.after.out_shape))
        read = torch.cat([inside.flatten(1), read[:, size:]], 1)
    low, high = (
        torch.cat([slope.flatten().to(like), like.new_ones(passive)]) for slope in (e.low, e.high)
    )
    into = through_map(before, e.before.to(like.dtype), passive=passive)
    bent = through_slopes(into, low, high, read, gains)
    return through_map(bent, e.after.to(like.dtype), passive=passive)


def shares_of(traces: Sequence[Tensor]) -> list[Tensor]:
    """Shares that minimise the trace of a split sum."""
    roots = torch.stack(list(traces)).clamp(min=0).sqrt()
    roots = roots + 1e-12 * roots.max() + torch.finfo(roots.dtype).tiny
    return list(roots / roots.sum())
