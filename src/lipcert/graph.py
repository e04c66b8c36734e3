"""The network in normal form: a graph of five kinds of nodes, pure data.

A bound sees only these kinds, never an op: a rule states a fact about its op by lowering it to
them, once. Facts refer to live parameters: they are functions that read the module's attributes
when they are called, so a graph stays true while its network trains.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_map import LinearMap, Shape

Box = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Input:
    """The input of the network."""


@dataclass(frozen=True, eq=False)
class KnownNorm:
    """What a layer knows of the L2 norm of its map.

    Attributes:
        proved: Gives a bound with what it claims, for less than a strategy takes.
        about: Gives what training leads to, for nothing; used while vectors are iterated.
    """

    proved: Callable[[], Constant]
    about: Callable[[], float] = lambda: 1.0


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> A x + bias.

    Attributes:
        map: Gives A with the weights as they are now.
        bias: Gives the bias, which broadcasts to the output's shape; None for no bias.
        known: What the layer knows of |A|; None where a strategy has to find it.
    """

    map: Callable[[], LinearMap]
    bias: Callable[[], Tensor] | None = None
    known: KnownNorm | None = None


@dataclass(frozen=True, eq=False)
class Slope:
    """An elementwise function whose secant slopes are bounded.

    Attributes:
        fn: The function.
        secants: `(lower, upper) -> (a, b)`: every (f(s) - f(t)) / (s - t) with s, t in the
            interval lies in [a, b]; elementwise on arrays `(b, *shape)`, ends may be infinite.
            Results broadcast against the arguments.
        image: `(lower, upper) -> (low, high)`: an interval holding f of the interval.
        flat: Gives two ends: f is constant up to the first and from the second on; infinite where
            it is not, numbers or live tensors that broadcast to a sample. None if not known.
        anchored: `(centre, lower, upper) -> (a, b)`: every (f(t) - f(centre)) / (t - centre) with
            t in the interval, which contains the centre, lies in [a, b]; as `secants`, and never
            wider. None where only all secants are known.
    """

    fn: Callable[[Tensor], Tensor]
    secants: Callable[[Tensor, Tensor], Box]
    image: Callable[[Tensor, Tensor], Box]
    flat: Callable[[], tuple[Tensor | float, Tensor | float]] | None = None
    anchored: Callable[[Tensor, Tensor, Tensor], Box] | None = None


@dataclass(frozen=True, eq=False)
class Expansion:
    """A function that acts elementwise in other coordinates: after . phi . before.

    Attributes:
        before: To the coordinates.
        low: Least slopes there, of the shape that `before` gives.
        high: Greatest slopes there.
        after: Back.
    """

    before: LinearMap
    low: Tensor
    high: Tensor
    after: LinearMap


@dataclass(frozen=True, eq=False)
class Lipschitz:
    """A function of which only its L2 Lipschitz constant is used.

    Attributes:
        fn: The function, on batches.
        shape: Shape of its output, without the batch.
        constant: Gives k with |f(s) - f(t)| <= k |s - t|, a number or a live scalar tensor.
        image: A box holding f of a box.
        kind: What the constant claims.
        needs: From a 0/1 array over outputs, `(b, *shape)`, to one over inputs that is 1 wherever
            an output marked 1 depends on the input; None if that is not known.
        expansion: The same function elementwise in other coordinates, for bounds that take more
            than the constant; None if there are none.
    """

    fn: Callable[[Tensor], Tensor]
    shape: Shape
    constant: Callable[[], Tensor | float]
    image: Callable[[Tensor, Tensor], Box]
    kind: Kind = Kind.UPPER
    needs: Callable[[Tensor], Tensor] | None = None
    expansion: Expansion | None = None


@dataclass(frozen=True, eq=False)
class Sum:
    """All inputs added; their shapes are equal."""


@dataclass(frozen=True, eq=False)
class Concat:
    """All inputs flattened and put one behind the other."""


Op = Input | Affine | Slope | Lipschitz | Sum | Concat


@dataclass(eq=False)
class Node:
    """One op with its inputs.

    Attributes:
        op: The fact.
        inputs: The nodes it reads.
        shape: Shape of its value, without the batch.
        name: Where it comes from: module path or function name.
    """

    op: Op
    inputs: tuple["Node", ...]
    shape: Shape
    name: str = ""

    def __repr__(self) -> str:
        return f"Node({self.name!r}, {type(self.op).__name__}, shape={self.shape})"


def node(op: Op, *inputs: Node, name: str = "") -> Node:
    """A node with its shape worked out from the op and its inputs."""
    match op:
        case Affine():
            shape = op.map().out_shape
        case Lipschitz():
            shape = op.shape
        case Concat():
            shape = (sum(math.prod(i.shape) for i in inputs),)
        case _:
            shape = inputs[0].shape
    return Node(op, inputs, shape, name)


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced network.

    Attributes:
        model: The network whose live parameters the nodes read.
        input_shape: Without the batch.
        nodes: In topological order: the input first, the output last.
        signature: The modules of the network when it was traced, to notice changes.
    """

    model: nn.Module
    input_shape: Shape
    nodes: tuple[Node, ...]
    signature: tuple = field(repr=False)

    @property
    def output(self) -> Node:
        """The node of the network's output."""
        return self.nodes[-1]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __repr__(self) -> str:
        """A line a node."""
        return "\n".join([f"Graph of {type(self.model).__name__}:", *(f"  {n}" for n in self)])

    def node(self, name: str) -> Node:
        """The node of this name (as printed by the bound table).

        Raises:
            LipcertError: There is none; the message lists the names.
        """
        for candidate in self.nodes:
            if candidate.name == name:
                return candidate
        names = ", ".join(repr(n.name) for n in self.nodes)
        raise LipcertError(f"The graph has no node {name!r}. Its nodes are: {names}.")

    def values(self, x: Tensor) -> dict[Node, Tensor]:
        """The value of every node for a batch `(b, *input_shape)`, from the normal form."""
        values: dict[Node, Tensor] = {}
        for n in self.nodes:
            values[n] = _value(n, [values[i] for i in n.inputs], x)
        return values

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuses copies and pickles: they would still read the weights of the traced network."""
        raise LipcertError(
            "A traced graph, and a bound with it, can not be copied or pickled: its nodes read the "
            "network that was traced. Copy or save the network alone, trace it again, and take the "
            "bound's vectors over: new.load_state_dict(old.state_dict())."
        )

    def check(self, model: nn.Module) -> None:
        """Raises LipcertError unless this graph still describes `model`."""
        model = unwrap(model)
        if model is not self.model:
            raise LipcertError(
                "The bound was traced from another network "
                f"({type(self.model).__name__}, not this {type(model).__name__}). A bound and its "
                "network belong together: graph = lc.trace(net, input_shape)."
            )
        self.check_modules()
        bad = [name for name, t in model.state_dict().items() if not _finite(t)]
        if bad:
            raise LipcertError(
                f"The network holds NaN or infinite weights in: {', '.join(bad[:5])}. Nothing can "
                "be certified; reload the weights or train again with a smaller step size."
            )

    def check_modules(self) -> None:
        """Raises LipcertError if a layer was replaced or got other settings since the tracing."""
        found = signature(self.model)
        if found != self.signature:
            old, new = dict(self.signature), dict(found)
            names = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
            raise LipcertError(
                f"The network changed after it was traced, at: {', '.join(names[:5])}. Trace it "
                "again: graph = lc.trace(net, input_shape)."
            )


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _value(n: Node, inputs: list[Tensor], x: Tensor) -> Tensor:
    match n.op:
        case Input():
            return x
        case Affine(map=map, bias=bias):
            y = map().apply(inputs[0])
            return y if bias is None else y + bias().to(y)
        case Slope(fn=fn) | Lipschitz(fn=fn):
            return fn(inputs[0])
        case Sum():
            return torch.stack(inputs).sum(0)
        case Concat():
            return torch.cat([i.flatten(1) for i in inputs], 1)


def topological(output: Node) -> tuple[Node, ...]:
    """Every node that the output depends on, inputs before users."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(output, False)]
    while stack:
        current, done = stack.pop()
        if done:
            order.append(current)
        elif current not in seen:
            seen.add(current)
            stack.append((current, True))
            stack.extend((i, False) for i in reversed(current.inputs))
    return tuple(order)


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside data-parallel and compile wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif (inner := getattr(model, "_orig_mod", None)) is not None:
            model = inner
        else:
            return model


def signature(model: nn.Module) -> tuple:
    """What must stay as it was at tracing: every module, its class and settings."""
    return tuple(
        (name, (id(m), parametrize.type_before_parametrizations(m), m.extra_repr()))
        for name, m in model.named_modules()
    )
