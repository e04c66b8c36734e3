"""Ellipsoids of the nodes that are still to be read, several of them in one.

In a chain each node has an ellipsoid of its own. Where a node is read later again, as the input of
a residual block is, its changes and those of the block are carried in one ellipsoid, so that their
sum knows how they go together: the steps of `extent` act on one node's entries, and those of the
other nodes pass as linear ones do. Without this (or where one ellipsoid would be too large) each
node has its own, and what joins them splits:

    (sum a_i) (sum a_i)^T <= sum a_i a_i^T / theta_i    for shares theta that add up to 1.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipcert.bounds.extent import Extent, normalised, shares_of
from lipcert.bounds.waves import Waves
from lipcert.graph import Node
from lipcert.kinds import weakest


@dataclass(frozen=True, eq=False)
class Live:
    """One ellipsoid of the changes of several nodes, one behind the other.

    Attributes:
        held: The ellipsoid.
        nodes: Whose changes they are.
        sizes: How many entries each has, or how many channels where it goes by frequency.
    """

    held: Extent | Waves
    nodes: tuple[Node, ...]
    sizes: tuple[int, ...]

    def of(self, *wanted: Node) -> Extent | Waves:
        """The ellipsoid of some of the nodes, in this order; a node may be named twice."""
        if wanted == self.nodes:
            return self.held
        begins = dict(zip(self.nodes, itertools.accumulate((0, *self.sizes)), strict=False))
        counts = dict(zip(self.nodes, self.sizes, strict=True))
        return self.held.chosen(torch.cat([torch.arange(counts[n]) + begins[n] for n in wanted]))

    def size(self, n: Node) -> int:
        """How many entries or channels one of the nodes has."""
        return self.sizes[self.nodes.index(n)]


def size(n: Node) -> int:
    """How many entries a node has."""
    return math.prod(n.shape)


def summed(before: Extent, entries: int, terms: int) -> Extent:
    """The sum of the first nodes of an ellipsoid, all of one size; the others behind it stay."""
    root = _root(before, entries * terms)
    first = root[:, : entries * terms].unflatten(1, (terms, entries)).sum(1)
    found = torch.cat([first, root[:, entries * terms :]], 1)
    return normalised(before.scale, found, before.kind, before.failure)


def stacked(parts: Sequence[Extent], sizes: Sequence[int]) -> Extent:
    """One ellipsoid of several, of which is not known how they go together."""
    largest = torch.stack([p.scale.detach() for p in parts]).max()
    scale = largest.where(largest > 0, 1)
    roots = [_root(p, n) * (p.scale / scale) for p, n in zip(parts, sizes, strict=True)]
    shares = shares_of([root.square().sum() for root in roots])
    blocks = [root / share.sqrt() for root, share in zip(roots, shares, strict=True)]
    kind, failure = weakest(p.kind for p in parts), min(1.0, sum(p.failure for p in parts))
    return normalised(scale, torch.block_diag(*blocks), kind, failure)


def together(parts: Sequence[Extent], entries: int) -> Extent:
    """The sum of several of one size, of which is not known how they go together."""
    return summed(stacked(parts, [entries] * len(parts)), entries, len(parts))


def joined_balls(parts: Sequence[Extent], adding: bool) -> Extent:
    """The ball around several, behind one another or added."""
    kind, failure = weakest(p.kind for p in parts), min(1.0, sum(p.failure for p in parts))
    radii = torch.stack([p.radius().value for p in parts])
    value = radii.sum() if adding else torch.linalg.vector_norm(radii)
    return Extent(value, None, kind, failure)


def _root(part: Extent, entries: int) -> Tensor:
    return torch.eye(entries).to(part.scale) if part.root is None else part.root
