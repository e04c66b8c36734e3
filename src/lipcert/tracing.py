"""From an ordinary module to the normal form.

The front end is thin on purpose: the module is run once, in eval mode, and every op that it ran is
lowered by its rule.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from lipcert.errors import LipcertError
from lipcert.fuse import fuse
from lipcert.graph import Graph, Input, Node, Op, Slope, node, signature, topological, unwrap
from lipcert.linear_map import Shape
from lipcert.recording import Recording, record
from lipcert.rules import registry
from lipcert.rules.one_lipschitz import join_max_min
from lipcert.rules.spot_check import slope_fault

_OPS = Op.__args__


def trace(model: nn.Module, input_shape: Shape) -> Graph:
    """The network in normal form, in eval mode, its weights live.

    Args:
        model: Any module made of ops with a known rule: one tensor in, one tensor out.
        input_shape: Shape of one sample, without the batch: (1, 28, 28) for pictures that come as
            (n, 1, 28, 28). A network that flattens its input runs on samples of shape
            (1, 1, 28, 28) as well, so a batch axis left in by mistake cannot always be noticed.

    Returns:
        The graph. It describes the eval-mode function whatever mode the module is in.

    Raises:
        LipcertError: Ops without a rule (all of them are listed, each with its place, the reason
            and what to do), a rule whose slopes do not hold on a grid of points, control flow that
            depends on the data, or a wrong input shape.
    """
    if not isinstance(model, nn.Module):
        raise LipcertError(f"trace takes a torch.nn.Module, not a {type(model).__name__}.")
    model = unwrap(model)
    whole = (input_shape,) if isinstance(input_shape, int) else input_shape
    shape = tuple(int(n) for n in whole)
    if not shape or min(shape) < 1:
        raise LipcertError(
            f"input_shape={input_shape}: give the shape of one sample without the batch, "
            "such as (1, 28, 28)."
        )
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        output = _Lowering(record(model, shape)).output()
    finally:
        for module, mode in modes.items():
            module.training = mode
    nodes = topological(fuse(join_max_min(output)))
    _name_apart(nodes)
    return Graph(model, shape, nodes, signature(model))


def _name_apart(nodes: tuple[Node, ...]) -> None:
    seen: dict[str, int] = {}
    for n in nodes:
        base = n.name or type(n.op).__name__.lower()
        seen[base] = seen.get(base, 0) + 1
        n.name = base if seen[base] == 1 else f"{base}#{seen[base]}"


class _Lowering:
    """Walks the recorded ops and applies rules; collects everything that has none."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.example = next(iter(recording.ops.nodes)).meta["value"]  # of the network's input
        self.values: dict[fx.Node, Any] = {}
        self.offenders: list[str] = []

    def output(self) -> Node:
        """The normal form of the network's output.

        Raises:
            LipcertError: Listing every op without a usable rule.
        """
        result: Any = None
        self._find_overwritten()
        for n in self.recording.ops.nodes:
            if n.op == "output":
                result = self._resolve(n.args[0])
            elif n.op == "placeholder":
                self.values[n] = Node(Input(), (), tuple(n.meta["value"].shape[1:]), "input")
            else:
                self.values[n] = self._lower(n)
        if self.offenders:
            lines = list(dict.fromkeys(f"\n  - {line}" for line in self.offenders))
            raise LipcertError(
                f"The network cannot be bounded: {len(lines)} op{'s' * (len(lines) > 1)} without a "
                f"usable rule.{''.join(lines)}"
            )
        if not isinstance(result, Node):
            constant = isinstance(result, registry.Live)
            given = type(result).__name__.removeprefix("immutable_")  # names of torch.fx
            raise LipcertError(
                "The network must return one tensor that depends on its input, not "
                f"{'a constant' if constant else given}; wrap it in a module that returns logits."
            )
        return result

    def _resolve(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda n: self.values[n])

    def _lower(self, n: fx.Node) -> Any:
        args, kwargs = self._resolve(n.args), self._resolve(n.kwargs)
        if n.op == "get_attr":
            path = str(n.target)
            return registry.Live(lambda: self.recording.attribute(path))
        nodes = _nodes_in((args, kwargs))
        if not nodes:
            return self._constant(n, args, kwargs)
        try:
            result = self._apply_rule(n, args, kwargs)
            if isinstance(result, _OPS):
                result = node(result, *nodes)
        except LipcertError as error:
            return self._offend(n, str(error))
        except (TypeError, AttributeError, LookupError, RuntimeError, ValueError) as error:
            return self._offend(n, f"called in a way its rule does not know ({error})")
        if not _nodes_in(result):
            return self._offend(n, f"its rule returned {type(result).__name__}, which is no node")
        for found, value in _pairs(result, n.meta["value"]):
            if found.shape != tuple(value.shape[1:]):
                wrong = f"its rule gives the shape {found.shape}, not {tuple(value.shape[1:])}"
                return self._offend(n, wrong)
        fresh = self._fresh(result)
        for found in fresh:
            if isinstance(found.op, Slope):
                fault = slope_fault(found.op, found.shape, self.example)
                if fault is not None:
                    return self._offend(n, fault)
            found.name = self.recording.name(n)
        return result

    def _constant(self, n: fx.Node, args, kwargs) -> registry.Live:
        """An op on constants alone: evaluated anew at each call."""
        function: Callable
        if n.op == "call_module":
            function = self.recording.module(n)
        elif n.op == "call_method":
            method = str(n.target)
            function = lambda this, *rest, **named: getattr(this, method)(*rest, **named)  # noqa: E731
        else:
            function = n.target  # type: ignore[assignment]
        return registry.Live(lambda: function(*_read(args), **_read(kwargs)))

    def _apply_rule(self, n: fx.Node, args, kwargs) -> Any:
        key: Any = n.target
        if n.op == "call_module":
            module = self.recording.module(n)
            key = registry.module_key(module)
            if module._forward_pre_hooks or module._forward_hooks:
                raise LipcertError(
                    "it has forward hooks, which a rule cannot see; remove them (for weight and "
                    "spectral normalisation use torch.nn.utils.parametrizations)"
                )
            args = (module, *args)
        found = registry.find(key)
        if found is None:
            raise LipcertError(registry.reason(key))
        return found(*args, **kwargs)

    def _offend(self, n: fx.Node, because: str) -> Any:
        self.offenders.append(f"{self.recording.place(n)}: {because}")

        def stand_in(value: Any) -> Any:
            if isinstance(value, Tensor):
                return Node(Input(), (), tuple(value.shape[1:]))
            if isinstance(value, tuple | list):
                return tuple(stand_in(v) for v in value)
            return value

        return stand_in(n.meta["value"])

    def _fresh(self, result: Any) -> list[Node]:
        """The nodes that an op added, in topological order."""
        known = {id(v) for value in self.values.values() for v in _nodes_in(value)}
        nodes = (n for last in _nodes_in(result) for n in topological(last))
        return [n for n in dict.fromkeys(nodes) if id(n) not in known and not n.name]

    def _find_overwritten(self) -> None:
        """Lists in-place ops whose old input is still read later: the graph would be wrong."""
        order = {n: i for i, n in enumerate(self.recording.ops.nodes)}
        for n in self.recording.ops.nodes:
            if not n.args or not self.recording.overwrites(n):
                continue
            storage = _storage(n.args[0])
            for other in self.recording.ops.nodes:
                if other is n or order[other] > order[n] or _storage(other) != storage:
                    continue
                if storage is not None and any(order[user] > order[n] for user in other.users):
                    self._offend(
                        n,
                        "it overwrites its input, which is read again later; use inplace=False",
                    )
                    break


def _storage(n: Any) -> int | None:
    value = n.meta.get("value") if isinstance(n, fx.Node) else None
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None


def _pairs(result: Any, value: Any) -> list[tuple[Node, Tensor]]:
    """The nodes of a rule's result with the values of the op on the example."""
    if isinstance(result, Node):
        return [(result, value)]
    if isinstance(result, tuple):
        return [p for r, v in zip(result, value, strict=True) for p in _pairs(r, v)]
    return []


def _nodes_in(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    if isinstance(value, tuple | list):
        return [n for item in value for n in _nodes_in(item)]
    if isinstance(value, dict):
        return [n for item in value.values() for n in _nodes_in(item)]
    return []


def _read(value: Any) -> Any:
    """Constants with their live tensors read."""
    if isinstance(value, registry.Live):
        return value()
    if isinstance(value, tuple | list):
        return type(value)(_read(item) for item in value)
    if isinstance(value, dict):
        return {key: _read(item) for key, item in value.items()}
    return value
