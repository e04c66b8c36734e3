"""Fusing affine sub-graphs: conv + BatchNorm, x + conv(x), slices and reshapes become one map.

Every rewriting keeps the function of the graph; a fused map is never looser than its parts when
its norm is exact.
"""

import torch

from lipcert.graph import Affine, Concat, KnownNorm, Node, Sum, topological
from lipcert.kinds import Constant, weakest
from lipcert.linear_kinds import identity
from lipcert.linear_map import Add, Composition, LinearMap, Stack


def fuse(output: Node) -> Node:
    """The graph of `output` with its affine sub-graphs fused."""
    done: dict[Node, Node] = {}
    for old in topological(output):
        inputs = tuple(done[i] for i in old.inputs)
        fresh = old if inputs == old.inputs else Node(old.op, inputs, old.shape, old.name)
        if isinstance(fresh.op, Sum | Concat):
            fresh = _merge_branches(fresh)
        done[old] = fresh
    chained: dict[Node, Node] = {}
    for old in topological(done[output]):
        inputs = tuple(chained[i] for i in old.inputs)
        fresh = old if inputs == old.inputs else Node(old.op, inputs, old.shape, old.name)
        if isinstance(fresh.op, Affine) and isinstance(fresh.inputs[0].op, Affine):
            fresh = _chain(fresh.inputs[0], fresh)
        chained[old] = fresh
    return chained[done[output]]


def _chain(first: Node, then: Node) -> Node:
    """`then` after `first`, both affine, as one affine node on the input of `first`."""
    assert isinstance(first.op, Affine)
    assert isinstance(then.op, Affine)
    a, b = first.op, then.op

    def map() -> LinearMap:
        return b.map() @ a.map()  # strategies simplify it, in the precision they work in

    def bias() -> torch.Tensor:
        shift = 0 if b.bias is None else b.bias()
        if a.bias is None:
            return torch.as_tensor(shift)
        return _push(b.map(), a.bias().expand(1, *first.shape))[0] + shift

    has_bias = a.bias is not None or b.bias is not None
    name = "+".join(n for n in (first.name, then.name) if n)
    op = Affine(map, bias if has_bias else None, _known_of_chain(a.known, b.known))
    return Node(op, first.inputs, then.shape, name)


def _known_of_chain(a: KnownNorm | None, b: KnownNorm | None) -> KnownNorm | None:
    """The product of the norms that two layers know, if both know one."""
    if a is None or b is None:
        return None

    def proved() -> Constant:
        first, then = a.proved(), b.proved()
        kind, failure = weakest((first.kind, then.kind)), min(1.0, first.failure + then.failure)
        return Constant(first.value * then.value.to(first.value), kind, failure)

    return KnownNorm(proved, lambda: a.about() * b.about())


def _push(map: LinearMap, value: torch.Tensor) -> torch.Tensor:
    """In float64: what is rounded here moves the kinks that a local bound looks at."""
    return map.to(torch.float64).apply(value.to(torch.float64))


def _ancestors(n: Node) -> list[Node]:
    """The node itself, and on down its affine ancestors to the first one that is not affine."""
    line = [n]
    while isinstance(line[-1].op, Affine):
        line.append(line[-1].inputs[0])
    return line


def _merge_branches(branching: Node) -> Node:
    """A sum or concatenation of affine functions of one node is an affine function of it."""
    lines = [_ancestors(i) for i in branching.inputs]
    common = next((n for n in lines[0] if all(n in line for line in lines)), None)
    if common is None:
        return branching
    paths = [line[: line.index(common)] for line in lines]

    def branch(path: list[Node]) -> LinearMap:
        maps = [n.op.map() for n in reversed(path) if isinstance(n.op, Affine)]
        if not maps:
            return identity(common.shape)
        return Composition(maps[0].in_shape, maps[-1].out_shape, tuple(maps))

    def map() -> LinearMap:
        branches = tuple(branch(path) for path in paths)
        kind = Add if isinstance(branching.op, Sum) else Stack
        return kind(common.shape, branching.shape, branches)

    def offset(path: list[Node]) -> torch.Tensor:
        """The branch at zero, without a batch."""
        value = torch.zeros(1, *common.shape)
        for n in reversed(path):
            assert isinstance(n.op, Affine)
            shift = None if n.op.bias is None else n.op.bias()
            value = _push(n.op.map(), value)
            value = value if shift is None else value + shift
        return value[0]

    def bias() -> torch.Tensor:
        offsets = [offset(path) for path in paths]
        if isinstance(branching.op, Sum):
            return torch.stack(offsets).sum(0)
        return torch.cat([o.flatten() for o in offsets])

    name = "+".join(dict.fromkeys(n.name for path in paths for n in reversed(path) if n.name))
    return Node(Affine(map, bias), (common,), branching.shape, name or branching.name)
