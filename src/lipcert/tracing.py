"""From an ordinary module to the normal form.

The front end is thin on purpose: torch.fx runs the module once, in eval mode, on two example
samples; every op is kept with the value it had, so shapes are plain numbers and code such as
`x.view(x.shape[0], -1)` or `b, c, h, w = x.shape` works. Then every op is lowered by its rule.
"""

import re
from typing import Any

import torch
from torch import Tensor, fx, nn


from lipcert.errors import LipcertError
from lipcert.fuse import fuse
from lipcert.graph import Graph, Input, Node, Op, node, signature, topological, unwrap
from lipcert.linear_map import Shape
from lipcert.rules import registry
from lipcert.rules.one_lipschitz import join_max_min
from lipcert.rules.structural import BATCH

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_OPS = Op.__args__  # type: ignore[attr-defined]


def trace(model: nn.Module, input_shape: Shape) -> Graph:
    """The network in normal form, in eval mode, its weights live.

    Args:
        model: Any module made of ops with a known rule: one tensor in, one tensor out.
        input_shape: Shape of one sample, without the batch.

    Returns:
        The graph. It describes the eval-mode function whatever mode the module is in.

    Raises:
        LipcertError: Ops without a rule (all of them are listed, each with its place, the reason
            and what to do), control flow that depends on the data, or a wrong input shape.
    """
    model = unwrap(model)
    shape = tuple(int(n) for n in input_shape)
    if not shape or min(shape) < 1:
        raise LipcertError(
            f"input_shape={tuple(input_shape)}: give the shape of one sample without the batch, "
            "such as (1, 28, 28)."
        )
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        recorded = _record(model, shape)
        output = _Lowering(model, recorded).output()
    finally:
        for module, mode in modes.items():
            module.training = mode
    output = fuse(join_max_min(output))
    nodes = topological(output)
    if not isinstance(nodes[0].op, Input):
        raise LipcertError("The output of the network does not depend on its input.")
    _name_apart(nodes)
    return Graph(model, shape, nodes, signature(model))


def _name_apart(nodes: tuple[Node, ...]) -> None:
    seen: dict[str, int] = {}
    for n in nodes:
        base = n.name or type(n.op).__name__.lower()
        seen[base] = seen.get(base, 0) + 1
        n.name = base if seen[base] == 1 else f"{base}#{seen[base]}"


class _Proxy(fx.Proxy):
    """A proxy that knows its example value, so that shapes are plain numbers."""

    @property
    def value(self) -> Any:
        return self.node.meta["value"]

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    def size(self, dim: int | None = None):
        return self.value.size() if dim is None else self.value.size(dim)

    def dim(self) -> int:
        return self.value.dim()

    def numel(self) -> int:
        return self.value.numel()

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self):
        return (self[i] for i in range(len(self.value)))


class _Tracer(fx.Tracer):
    """Records ops with the values they have on an example."""

    proxy_buffer_attributes = True

    def __init__(self, example: Tensor):
        super().__init__()
        self.example = example
        self.record_stack_traces = True
        self.evaluating = False  # while a value is computed, modules behave as usual

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        key = registry.module_key(module)
        ours_not = key.__module__.startswith("torch.nn") and not isinstance(module, _CONTAINERS)
        return registry.find(key) is not None or ours_not

    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if self.evaluating:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m, forward, args, kwargs):
        if self.evaluating:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_proxy(self, kind, target, args, kwargs, *rest, **named):
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        n = proxy.node
        given, options = fx.node.map_arg((n.args, n.kwargs), lambda a: a.meta["value"])
        self.evaluating = True
        try:
            n.meta["value"] = self._evaluate(kind, target, given, options)
        finally:
            self.evaluating = False
        return proxy

    def _evaluate(self, kind: str, target: Any, args: tuple, kwargs: dict) -> Any:
        match kind:
            case "placeholder":
                return self.example
            case "get_attr":
                return _attribute(self.root, target)
            case "call_module":
                return self.root.get_submodule(target)(*args, **kwargs)
            case "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            case _:
                return target(*args, **kwargs)


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _record(model: nn.Module, shape: Shape) -> fx.Graph:
    like = next(model.parameters(), None)
    generator = torch.Generator().manual_seed(0)
    example = torch.rand((BATCH, *shape), generator=generator)
    if like is not None:
        example = example.to(like.device, like.dtype)
    try:
        with torch.no_grad():
            return _Tracer(example).trace(model)
    except fx.proxy.TraceError as error:
        place = _user_frame(error)
        raise LipcertError(
            f"The network's code depends on the data{place}. Only control flow over shapes and "
            "settings can be traced; use torch.where-free, branch-free code for the rest."
        ) from None
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, LipcertError):
            raise
        raise LipcertError(
            f"The network does not run on an input of shape {shape}{_user_frame(error)}: "
            f"{str(error).splitlines()[0]} Check input_shape (one sample, without the batch)."
        ) from None


def _user_frame(error: BaseException) -> str:
    """The last line of the user's own code in a traceback."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/lipcert/" not in f.filename]
    if not own or own[-1].name in ("<module>",):
        return ""
    return f", in {own[-1].filename}:{own[-1].lineno}: {own[-1].line}"


class _Lowering:
    """Walks the recorded ops and applies rules; collects everything that has none."""

    def __init__(self, model: nn.Module, recorded: fx.Graph):
        self.model = model
        self.recorded = recorded
        self.values: dict[fx.Node, Any] = {}
        self.offenders: list[str] = []

    def output(self) -> Node:
        result: Any = None
        inputs = [n for n in self.recorded.nodes if n.op == "placeholder"]
        if len([n for n in inputs if n.users]) > 1:
            raise LipcertError(
                "The network takes several tensors; wrap it in a module that takes one."
            )
        self._find_overwritten()
        for n in self.recorded.nodes:
            if n.op == "output":
                result = self._resolve(n.args[0])
            elif n.op == "placeholder":
                self.values[n] = Node(Input(), (), tuple(n.meta["value"].shape[1:]), "input")
            else:
                self.values[n] = self._lower(n)
        if self.offenders:
            lines = "\n".join(f"  - {line}" for line in dict.fromkeys(self.offenders))
            count = len(dict.fromkeys(self.offenders))
            raise LipcertError(
                f"The network cannot be bounded: {count} op{'s' * (count > 1)} without a usable "
                f"rule.\n{lines}"
            )
        if not isinstance(result, Node):
            raise LipcertError(
                "The network must return one tensor that depends on its input, not "
                f"{type(result).__name__}; wrap it in a module that returns the logits."
            )
        return result

    def _resolve(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda n: self.values[n])

    def _lower(self, n: fx.Node) -> Any:
        args, kwargs = self._resolve(n.args), self._resolve(n.kwargs)
        if n.op == "get_attr":
            path = str(n.target)
            return registry.Live(lambda: _attribute(self.model, path))
        nodes = _nodes_in((args, kwargs))
        if not nodes:
            return self._constant(n, args, kwargs)
        try:
            result = self._apply_rule(n, args, kwargs)
        except LipcertError as error:
            return self._offend(n, str(error))
        except TypeError as error:
            return self._offend(n, f"called in a way its rule does not know ({error})")
        if isinstance(result, _OPS):
            result = node(result, *nodes)
        return self._named(result, n)

    def _constant(self, n: fx.Node, args, kwargs) -> Any:
        """An op on constants alone: evaluated anew at each call."""
        if n.op == "call_module":
            module = self.model.get_submodule(str(n.target))
            return registry.Live(lambda: module(*_read(args), **_read(kwargs)))
        if n.op == "call_method":
            method = str(n.target)
            return registry.Live(
                lambda: getattr(_read(args[0]), method)(*_read(args[1:]), **_read(kwargs))
            )
        function: Any = n.target
        return registry.Live(lambda: function(*_read(args), **_read(kwargs)))

    def _apply_rule(self, n: fx.Node, args, kwargs) -> Any:
        key: Any = n.target
        if n.op == "call_module":
            module = self.model.get_submodule(str(n.target))
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
        self.offenders.append(f"{_place(n, self.model)}: {because}")

        def stand_in(value: Any) -> Any:
            if isinstance(value, Tensor):
                return Node(Input(), (), tuple(value.shape[1:]))
            if isinstance(value, tuple | list):
                return tuple(stand_in(v) for v in value)
            return value

        return stand_in(n.meta["value"])

    def _named(self, result: Any, n: fx.Node) -> Any:
        """Names the new nodes of an op after it."""
        name = str(n.target) if n.op == "call_module" else n.name
        known = {id(v) for value in self.values.values() for v in _nodes_in(value)}
        for last in _nodes_in(result):
            for fresh in topological(last):
                if id(fresh) not in known and not fresh.name:
                    fresh.name = name
        return result

    def _find_overwritten(self) -> None:
        """Lists in-place ops whose old input is still read later: the graph would be wrong."""
        order = {n: i for i, n in enumerate(self.recorded.nodes)}
        for n in self.recorded.nodes:
            if not _in_place(n, self.model) or not n.args:
                continue
            storage = _storage(n.args[0])
            for other in self.recorded.nodes:
                if other is n or order[other] > order[n] or _storage(other) != storage:
                    continue
                if storage is not None and any(order[user] > order[n] for user in other.users):
                    self._offend(
                        n,
                        "it overwrites its input, which is read again later; use inplace=False",
                    )
                    break


def _in_place(n: fx.Node, model: nn.Module) -> bool:
    if n.op == "call_module":
        return bool(getattr(model.get_submodule(str(n.target)), "inplace", False))
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    ends = re.fullmatch(r"[a-z].*[^_]_", name) is not None
    return ends or bool(n.kwargs.get("inplace", False))


def _storage(n: Any) -> int | None:
    value = n.meta.get("value") if isinstance(n, fx.Node) else None
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None


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


def _place(n: fx.Node, model: nn.Module) -> str:
    if n.op == "call_module":
        kind = registry.describe(registry.module_key(model.get_submodule(str(n.target))))
        return f"{n.target} ({kind})"
    target: Any = n.target
    stack = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s+(.*)', n.stack_trace or "")
    own = [s for s in stack if "/torch/" not in s[0] and "/lipcert/" not in s[0]]
    line = f" at {own[-1][0]}:{own[-1][1]}: {own[-1][2].strip()}" if own else ""
    return f"{registry.describe(target)}{line}"


