"""LipLT around samples: norms of linear paths whose activations have the slopes of a ball.

An activation that the ball keeps on one piece is linear there: it only enters the maps, and nothing
starts at it. A smaller ball can still give a larger constant, as the maps' norms may grow by more
than the sources shrink, so what reaches a node is never taken above the global bound.

Reference: arXiv 2310.00116 (LipLT) with the boxes of arXiv 2111.01395 (Local-Lip).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds.around import Around
from lipcert.bounds.local_ends import BoxedEnd, LocalEnd, boxed
from lipcert.bounds.paths import Paths, rows_at_sources
from lipcert.bounds.reach import radius
from lipcert.bounds.steps import Step, linear_step, local_step
from lipcert.graph import Graph, Node, Slope
from lipcert.kinds import Constant, weakest
from lipcert.region import L2Ball

_ENTRIES = 2**20  # of the matrices of one end and sample; ends with larger ones count globally

Everywhere = Callable[[Node], Constant]


class LocalLipLT:
    """LipLT of one batch.

    Args:
        graph: The graph.
        paths: To all inputs of activations and opaque functions, and to the output.
        x: The samples, in the precision to work in.
        ball: The region.
        radii: Radius around each sample, `(b,)`.
        everywhere: The global bound up to any node.
        iterated: Gives what reaches the ends of the paths from the steps of all nodes, by iterated
            vectors; boxes then use the global bound, as all norms come at once. None: true norms.

    Attributes:
        around: The boxes.
    """

    def __init__(
        self,
        graph: Graph,
        paths: Paths,
        x: Float[Tensor, "b ..."],
        ball: L2Ball,
        radii: Float[Tensor, " b"],
        everywhere: Everywhere,
        iterated: Callable[[dict[Node, Step]], Mapping[Node, Constant]] | None,
    ):
        self._graph, self._paths, self._like = graph, paths, x
        self._everywhere, self._iterated = everywhere, iterated
        self._known: dict[Node, Constant] = {}
        self._steps: dict[Node, Step] = {}
        reach = self.reached if ball.progressive and iterated is None else everywhere
        self.around = Around(graph, x, ball, radii, lambda n: reach(n).value.to(x))

    def reached(self, n: Node) -> Constant:
        """The bound from the input to a node; `value` has shape `(b,)`."""
        if n not in self._known and self._iterated is not None and n in self._paths.ends:
            found = self._iterated(self._steps_upto(self._graph.output))
            self._known.update({end: self._capped(end, c) for end, c in found.items()})
        if n not in self._known:
            self._known[n] = self._reached(n)
        return self._known[n]

    def ends(self) -> list[LocalEnd]:
        """For each source of the output: how far it can move, and the rows of its map."""
        found = self._matrices(self._graph.output)
        return [LocalEnd(self._moved(s), rows) for s, rows in found.items()]

    def boxed(self) -> list[BoxedEnd]:
        """The terms of the logits, each with its box."""
        return boxed(self.around, self.reached)

    def _capped(self, n: Node, found: Constant) -> Constant:
        """No more than the global estimate."""
        whole = self._everywhere(n).value.to(found.value)
        return dataclasses.replace(found, value=torch.minimum(found.value, whole))

    def _reached(self, n: Node) -> Constant:
        whole = self._everywhere(n)
        ones = torch.ones_like(self.around.radii)
        if isinstance(n.op, Slope):
            before = self.reached(n.inputs[0])
            value = self.around.gain(n) * before.value
        elif n in self._paths.ends and self._affordable(n):
            value, before = self._by_matrices(n), whole
        else:
            value, before = whole.value * ones, whole
        value = torch.minimum(value, whole.value.to(value))
        kind = weakest((whole.kind, before.kind))
        return Constant(value, kind, max(whole.failure, before.failure))

    def _affordable(self, n: Node) -> bool:
        size = math.prod(n.shape) * sum(math.prod(s.shape) for s in self._paths.sources[n])
        return size <= _ENTRIES

    def _by_matrices(self, n: Node) -> Tensor:
        """The sum of ||A_s|| r_s."""
        maps = self._matrices(n)
        return torch.stack([_norms(maps[s]) * self._moved(s).value for s in maps]).sum(0)

    def _moved(self, s: Node) -> Constant:
        """How far a source can move."""
        found = radius(s, {i: self.reached(i) for i in s.inputs})
        return Constant(found.value.expand_as(self.around.radii), found.kind, found.failure)

    def _matrices(self, n: Node) -> dict[Node, Float[Tensor, "b rows n"]]:
        """The maps from every source to a node as matrices, one a sample."""
        like, size = self._like, math.prod(n.shape)
        rows = torch.eye(size, dtype=like.dtype, device=like.device)
        rows = rows.repeat_interleave(len(like), 0).reshape(size * len(like), *n.shape)
        found = rows_at_sources(self._graph, n, rows, self._steps_upto(n))
        return {
            s: matrix.reshape(size, len(like), math.prod(s.shape)).transpose(0, 1)
            for s, matrix in found.items()
        }

    def _steps_upto(self, n: Node) -> dict[Node, Step]:
        for i in self._graph.nodes[: self._graph.nodes.index(n) + 1]:
            if i not in self._steps:
                self._steps[i] = self._step(i)
        return self._steps

    def _step(self, n: Node) -> Step:
        if isinstance(n.op, Slope):
            return local_step(n, self.around.slopes(n), self._like)
        return linear_step(n, self._like)


def _norms(matrices: Float[Tensor, "b m n"]) -> Float[Tensor, " b"]:
    """The largest singular values, from the smaller Gram matrices."""
    scale = matrices.detach().abs().flatten(1).amax(1)[:, None, None]
    matrices = matrices / scale.where(scale > 0, 1)
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    largest = torch.linalg.eigvalsh(matrices @ matrices.mT)[:, -1]
    return scale[:, 0, 0] * largest.clamp(min=0).sqrt()
