"""What every node of a graph can be while the input stays in a ball around each sample.

Boxes come from two sides: from the box before, entry by entry, and from how far the node before can
move at all (its Lipschitz constant times the radius), row by row. A box narrows the slopes of the
activation after it. An entry that cannot change is left out of the norms on both sides of it.

Notation for a node n and inputs at a distance of at most rho from the sample: n = c + w * e, with w
in [0, 1] the node's *weights*, zero where it is constant, and e an unknown vector of norm at most
reach(n) rho. Entries of n that nothing after it *needs* may be left out of e.

Reference: BCP (NeurIPS 2020) for boxes; arXiv 2111.01395 (Local-Lip) for constant units.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.convolution import Conv
from lipcert.graph import Affine, Box, Concat, Graph, Input, Lipschitz, Node, Slope, Sum
from lipcert.linear_kinds import Index
from lipcert.linear_map import LinearMap
from lipcert.region import L2Ball
from lipcert.row_norms import filter_norms, row_norms
from lipcert.simplify import simplify


class Around:
    """A ball around each sample, followed through a graph; each fact is worked out when asked for.

    Args:
        graph: The graph.
        x: The samples `(b, *input_shape)`, in the precision to work in.
        ball: The region.
        radii: Radius around each sample, `(b,)`.
        reach: Gives how far a node moves when the input moves by 1, a number or `(b,)`. It is asked
            for nodes whose own boxes are known, and for those before an affine node.
        moves: Gives how far each entry of an affine node moves from its value at the sample when
            the input moves by 1, `(b, *shape)`, once the boxes of all nodes before are known; None
            where it does not know more than `reach`.
    """

    def __init__(
        self,
        graph: Graph,
        x: Float[Tensor, "b ..."],
        ball: L2Ball,
        radii: Float[Tensor, " b"],
        reach: Callable[[Node], Tensor],
        moves: Callable[[Node], Tensor | None] = lambda n: None,
    ):
        self.graph = graph
        self.radii = radii
        self._x, self._ball, self._reach, self._moves = x, ball, reach, moves
        self._users: dict[Node, list[Node]] = {n: [] for n in graph}
        for n in graph:
            for i in n.inputs:
                self._users[i].append(n)
        self._maps: dict[Node, LinearMap] = {}
        self._centres: dict[Node, Tensor] = {}
        self._boxes: dict[Node, Box] = {}
        self._gains: dict[Node, Tensor] = {}
        self._weights: dict[Node, Tensor | None] = {}
        self._cubes: set[Node] = set()

    def map(self, n: Node) -> LinearMap:
        """The map of an affine node in the precision of the samples."""
        assert isinstance(n.op, Affine)
        if n not in self._maps:
            self._maps[n] = simplify(n.op.map().to(self._x.dtype))
        return self._maps[n]

    def centre(self, n: Node) -> Float[Tensor, "b ..."]:
        """The value of a node at the samples."""
        if n not in self._centres:
            before = [self.centre(i) for i in n.inputs]
            self._centres[n] = self._value(n, before)
        return self._centres[n]

    def box(self, n: Node) -> Box:
        """Lower and upper ends of every entry of a node in the ball, `(b, *shape)` each."""
        if n not in self._boxes:
            self._boxes[n] = self._box(n)
        return self._boxes[n]

    def slopes(self, n: Node) -> Box:
        """The least and the greatest secant slope of a `Slope` node in the ball."""
        assert isinstance(n.op, Slope)
        return n.op.secants(*self.box(n.inputs[0]))

    def anchored(self, n: Node) -> Box:
        """The least and the greatest slope of a `Slope` node's secants through the sample."""
        assert isinstance(n.op, Slope)
        source = n.inputs[0]
        if n.op.anchored is None:
            return self.slopes(n)
        return n.op.anchored(self.centre(source), *self.box(source))

    def gain(self, n: Node) -> Float[Tensor, " b"]:
        """The steepest slope of any entry of a `Slope` node in the ball, in size."""
        if n not in self._gains:
            self._narrow(n)
        return self._gains[n]

    def weights(self, n: Node) -> Float[Tensor, "b ..."] | None:
        """How much of an entry can change, between 0 (constant) and 1; None for all 1."""
        if n not in self._weights:
            match n.op:
                case Slope():
                    self._narrow(n)
                case Affine() if isinstance(self.map(n), Index):
                    w = self.weights(n.inputs[0])
                    self._weights[n] = None if w is None else self.map(n).apply(w)
                case Sum() | Concat():
                    self._weights[n] = self._joined_weights(n)
                case _:
                    self._weights[n] = None
        return self._weights[n]

    def needed(self, n: Node) -> Float[Tensor, "b ..."] | None:
        """1 where something after the node depends on an entry, else 0; None for all 1."""
        total: Tensor | None = None
        for user in self._users[n]:
            wanted = self._wanted_by(user)
            if wanted is None:
                return None
            total = wanted if total is None else torch.maximum(total, wanted)
        return total

    def _wanted_by(self, user: Node) -> Tensor | None:
        """What a node needs of its only input; sums and such would need boxes not known yet."""
        match user.op:
            case Slope():
                w, rest = self.weights(user), self.needed(user)
                assert w is not None
                alive = (w > 0).to(w)
                return alive if rest is None else alive * rest
            case Lipschitz(needs=needs) if needs is not None:
                rest = self.needed(user)
                return None if rest is None else needs(rest)
            case Affine() if isinstance(self.map(user), Index):
                rest = self.needed(user)
                return None if rest is None else (self.map(user).adjoint(rest) > 0).to(rest)
            case _:
                return None

    def _value(self, n: Node, before: list[Tensor]) -> Tensor:
        match n.op:
            case Input():
                return self._x
            case Affine(bias=bias):
                y = self.map(n).apply(before[0])
                return y if bias is None else y + bias().to(y)
            case Slope(fn=fn) | Lipschitz(fn=fn):
                return fn(before[0])
            case Sum():
                return torch.stack(before).sum(0)
            case Concat():
                return torch.cat([i.flatten(1) for i in before], 1)

    def _box(self, n: Node) -> Box:
        match n.op:
            case Input():
                r = _column(self.radii, n)
                if self._ball.clip is None:
                    self._cubes.add(n)
                    return self._x - r, self._x + r
                low, high = self._ball.clip
                return (self._x - r).clamp(min=low), (self._x + r).clamp(max=high)
            case Affine():
                return self._affine_box(n)
            case Slope(image=image) | Lipschitz(image=image):
                return image(*self.box(n.inputs[0]))
            case Sum():
                lower, upper = zip(*(self.box(i) for i in n.inputs), strict=True)
                return torch.stack(lower).sum(0), torch.stack(upper).sum(0)
            case Concat():
                boxes = [[end.flatten(1) for end in self.box(i)] for i in n.inputs]
                return torch.cat([b[0] for b in boxes], 1), torch.cat([b[1] for b in boxes], 1)

    def _affine_box(self, n: Node) -> Box:
        assert isinstance(n.op, Affine)
        source, map = n.inputs[0], self.map(n)
        lower, upper = self.box(source)
        if isinstance(map, Index):
            if map.is_reshape and source in self._cubes:
                self._cubes.add(n)
            moved = map.apply(lower), map.apply(upper)
            return moved if n.op.bias is None else self._shifted(n, moved)
        found = self._moved(n)
        if found is None:
            found = self._moved_by_rows(n, map)
        # The box of a cube tells nothing that its ball does not, if every row's norm is exact.
        if found is None or not self._ball.progressive or source not in self._cubes:
            entrywise = self._shifted(n, map.interval(lower, upper))
            found = entrywise if found is None else _Intersection.apply(*entrywise, *found)
        return found

    def _moved(self, n: Node) -> Box | None:
        """The box of how far each entry moves, if that is known."""
        moves = self._moves(n)
        if moves is None:
            return None
        r = _column(self.radii, n) * moves
        return self.centre(n) - r, self.centre(n) + r

    def _moved_by_rows(self, n: Node, map: LinearMap) -> Box | None:
        """The box of how far the node before moves, by the norms of the rows."""
        if isinstance(map, Conv) and not self._ball.progressive:
            norms: Tensor | None = filter_norms(map)
        else:
            norms = row_norms(map)
        if norms is None:
            return None
        r = _column(self.radii * self._reach(n.inputs[0]), n) * norms.to(self._x)
        return self.centre(n) - r, self.centre(n) + r

    def _shifted(self, n: Node, box: Box) -> Box:
        assert isinstance(n.op, Affine)
        if n.op.bias is None:
            return box
        bias = n.op.bias().to(box[0])
        return box[0] + bias, box[1] + bias

    def _narrow(self, n: Node) -> None:
        """Gain and weights of an activation from its slopes."""
        low, high = self.slopes(n)
        steepness = torch.maximum(high, -low).expand(len(self._x), *n.shape)
        gain = steepness.flatten(1).amax(1)
        self._gains[n] = gain
        if not bool((gain == 1).all()):
            steepness = steepness / _column(gain.where(gain > 0, 1), n)
        before = self.weights(n.inputs[0])
        self._weights[n] = steepness if before is None else steepness * before

    def _joined_weights(self, n: Node) -> Tensor | None:
        parts = [self.weights(i) for i in n.inputs]
        if all(part is None for part in parts):
            return None
        if isinstance(n.op, Sum):
            known = [part for part in parts if part is not None]
            return torch.stack(known).amax(0) if len(known) == len(parts) else None
        filled = [
            self._x.new_ones(len(self._x), *i.shape) if part is None else part
            for part, i in zip(parts, n.inputs, strict=True)
        ]
        return torch.cat([part.flatten(1) for part in filled], 1)


def _column(numbers: Tensor, n: Node) -> Tensor:
    """One number a sample, to be broadcast to the values of a node."""
    return numbers.reshape(-1, *(1,) * len(n.shape))


class _Intersection(torch.autograd.Function):
    """Of two boxes; where rounding lets the ends cross, the lower one is both.

    The gradient goes to the end that was taken. (Those of torch.maximum and minimum take five times
    as long, and every layer of every training step meets them.)
    """

    @staticmethod
    def forward(ctx, low_a: Tensor, up_a: Tensor, low_b: Tensor, up_b: Tensor) -> Box:
        ctx.save_for_backward(low_a >= low_b, up_a <= up_b)
        lower = torch.maximum(low_a, low_b)
        return lower, torch.maximum(torch.minimum(up_a, up_b), lower)

    @staticmethod
    def backward(ctx, lower: Tensor, upper: Tensor) -> tuple[Tensor, ...]:
        low_first, up_first = ctx.saved_tensors
        to_low, to_up = lower * low_first, upper * up_first
        return to_low, to_up, lower - to_low, upper - to_up
