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

from lipcert.bounds.roots import (
    fewer_rows,
    gram,
    half_inverse,
    largest_eigenvalue,
    power_of_two,
    raised_factor,
    square_root,
)
from lipcert.bounds.tail import matrix_of
from lipcert.graph import Expansion, Lipschitz
from lipcert.kinds import Constant, Kind, weakest
from lipcert.linear_kinds import Index
from lipcert.linear_map import LinearMap

_FLOOR = 0.03
"""Weights below this share of the largest count as much: what the logits hardly read of a network
that is taken linear, they may read of the network itself."""
_FAINT = 1e-6
"""The same against the largest of what is read of any entry."""


@dataclass(frozen=True)
class Extent:
    """S = scale^2 R^T R, or scale^2 * identity where there is no R.

    Attributes:
        scale: A number, of the precision of the root.
        root: R; its largest entry is about 1.
        kind: What S claims.
        failure: Probability that the claim is false.
    """

    scale: Tensor
    root: Float[Tensor, "m n"] | None = None
    kind: Kind = Kind.UPPER
    failure: float = 0.0

    @property
    def matrix(self) -> Float[Tensor, "n n"] | None:
        """R^T R, or None."""
        return None if self.root is None else gram(self.root)

    def chosen(self, index: Int[Tensor, " k"]) -> "Extent":
        """That of some of the entries; an entry may be named twice."""
        if self.root is None:
            root = (torch.arange(int(index.max()) + 1)[:, None] == index).to(self.scale)
        else:
            root = self.root[:, index.to(self.root.device)]
        return dataclasses.replace(self, root=root)

    def radius(self) -> Constant:
        """A Lipschitz constant of the node: the longest half axis."""
        value = self.scale
        if self.root is not None:
            # Of the smaller Gram matrix of the two.
            root = self.root if len(self.root) >= self.root.shape[1] else self.root.mT
            value = value * square_root(largest_eigenvalue(gram(root)))
        return Constant(value, self.kind, self.failure)


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
        read: The largest |V_i|^2, of entries with r = 0 too.
    """

    matrices: Float[Tensor, "*f m m"] | Complex[Tensor, "*f m m"]
    middle: Float[Tensor, " m"]
    half: Float[Tensor, " m"]
    added: Float[Tensor, " m"]
    stretched: Float[Tensor, " m"]
    read: Float[Tensor, ""]

    def top(self) -> Float[Tensor, ""]:
        """The largest eigenvalue of any of the matrices."""
        return largest_eigenvalue(self.matrices).clamp(min=0)


APART = 1e-9
"""By how much of the largest eigenvalue multipliers are above it at least: nearer, P is huge."""

Gains = Callable[[Moving], Tensor]
"""Gives G, one number a neuron; raised afterwards as far as rounding asks for."""


def balanced(moving: Moving) -> Float[Tensor, " m"]:
    """g_i = top + sqrt(b_i / a_i), which minimises a bound of tr(V P V^T).

    Where nothing is read of a neuron, a floor keeps g_i finite.
    """
    least = _FAINT * moving.read * moving.half.square()
    a, b = torch.maximum(_floored(moving.added), least), _floored(moving.stretched)
    return moving.top() * (1 + APART) + square_root(b / a)


def _floored(weights: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    return torch.maximum(weights, _FLOOR * weights.max())


def normalised(scale: Tensor, root: Tensor, kind: Kind, failure: float) -> Extent:
    """The ellipsoid of scale^2 R^T R, its root brought to entries of about 1.

    One that is not finite becomes zeros of a scale that is none: eigenvalues of it raise errors.
    """
    power = power_of_two(root)
    if not power.isfinite():
        return Extent(scale * torch.nan, torch.zeros_like(root), kind, failure)
    return Extent(scale * power, root * (1 / power), kind, failure)


def through_map(
    before: Extent, map: LinearMap, norm: Constant | None = None, passive: int = 0
) -> Extent:
    """A S A^T; with `norm` given only |A|^2 times the longest half axis, as a ball.

    Args:
        before: Of its input.
        map: A.
        norm: |A|, to take the ball, which holds no other nodes.
        passive: How many entries at the end of S are other nodes', which stay as they are.
    """
    if isinstance(map, Index) and map.is_reshape:
        return before
    if norm is not None:
        assert not passive
        longest = before.radius()
        kind = weakest((norm.kind, before.kind))
        failure = min(1.0, norm.failure + before.failure)
        return Extent(longest.value * norm.value.to(longest.value), None, kind, failure)
    root, size = before.root, map.in_size
    if root is None:
        carried = matrix_of(map).to(before.scale).mT
    else:
        carried = map.apply(root[:, :size].reshape(-1, *map.in_shape)).reshape(len(root), -1)
        carried = torch.cat([carried, root[:, size:]], 1)
    return normalised(before.scale, carried, before.kind, before.failure)


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
    if before.root is None:
        steepest = torch.maximum(high.abs(), low.abs()).max()
        return Extent(before.scale * steepest, None, before.kind, before.failure)
    c, r = (low + high) / 2, (high - low) / 2
    root, s, found = before.root, gram(before.root), None
    if bool((r > 0).any()):
        moving = (r > 0).nonzero()[:, 0]
        spread = s[:, moving]
        if read is None or not bool((read != 0).any()):
            added, stretched = r[moving].square(), (c[:, None] * spread).square().sum(0)
            most = torch.ones_like(c[0])
        else:
            read = read / read.detach().abs().max()
            weights = read.square().sum(0)
            added, most = r[moving].square() * weights[moving], weights.max()
            stretched = ((read * c) @ spread).square().sum(0)
        found = gains(Moving(spread[moving], c[moving], r[moving], added, stretched, most))
    return normalised(before.scale, stepped(root, s, c, r, found), before.kind, before.failure)


def stepped(
    root: Float[Tensor, "*f k n"] | Complex[Tensor, "*f k n"],
    s: Float[Tensor, "*f n n"] | Complex[Tensor, "*f n n"],
    c: Float[Tensor, " n"],
    r: Float[Tensor, " n"],
    gains: Float[Tensor, " m"] | None,
) -> Tensor:
    """The root of P = G r^2 + c [S + S (G - S)^-1 S] c, of one or of many frequencies.

    Args:
        root: R.
        s: S = R^H R.
        c: The middle slopes.
        r: Half the ranges of the slopes.
        gains: G on the neurons with r > 0, raised here as far as rounding asks for; None if there
            are no such neurons.
    """
    if gains is None:
        return root * c
    if _from_zero(c, r):  # P = c G (G - S)^-1 G c
        lowered, left, gains = raised_factor(s, gains)
        return half_inverse(lowered, left, torch.diag((gains * c).to(s)).expand_as(s))
    moving = (r > 0).nonzero()[:, 0]
    spread = s[..., moving]
    lowered, left, gains = raised_factor(spread[..., moving, :], gains)
    bent = half_inverse(lowered, left, (spread * c[:, None]).mH)
    noise = torch.diag(gains.sqrt() * r[moving]).to(s)
    noise = torch.zeros(len(moving), len(c)).to(s).index_add(1, moving, noise)
    found = torch.cat([root * c, bent, noise.expand(*bent.shape[:-2], -1, -1)], -2)
    return found if found.shape[-2] <= 4 * len(c) else fewer_rows(found)


def _from_zero(c: Float[Tensor, " n"], r: Float[Tensor, " n"]) -> bool:
    """Whether every neuron has slopes from 0 on to some other number."""
    return bool(((c.abs() == r) & (r > 0)).all())


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
    root, out = before.root, math.prod(op.shape)
    assert root is not None
    s = gram(root)
    inner, across = s[:size, :size], s[:size, size:]
    # One multiplier for all: each entry gets the same share of both weights.
    half, each = constant.expand(size), constant.new_ones(size) / size
    added, stretched = out * constant.square() * each, across.square().sum() * each
    moving = Moving(inner, 0 * half, half, added, stretched, torch.ones_like(constant))
    lowered, left, gains = raised_factor(inner, balanced(moving))
    bent = half_inverse(lowered, left, across)
    ball = torch.diag((gains[0].sqrt() * constant).expand(out))
    found = torch.block_diag(ball, torch.cat([root[:, size:], bent]))
    return normalised(before.scale, found, kind, before.failure)


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
    roots = square_root(torch.stack(list(traces)))
    roots = roots + 1e-12 * roots.max() + torch.finfo(roots.dtype).tiny
    return list(roots / roots.sum())
