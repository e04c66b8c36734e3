"""The ops that a module runs on an example, in order: torch.fx with values.

Every op is kept with the value it had, so shapes are plain numbers and code such as
`x.view(x.shape[0], -1)` or `b, c, h, w = x.shape` works.
"""

import inspect
import itertools
import operator
import os
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from torch import Tensor, fx, nn

from lipcert.errors import LipcertError
from lipcert.linear_map import Shape
from lipcert.rules import registry
from lipcert.rules.structural import BATCH

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LIBRARIES = (torch.__file__, jaxtyping.__file__, __file__)
_NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in _LIBRARIES)


@dataclass(frozen=True)
class Recording:
    """The ops of one call.

    Attributes:
        root: The module that the targets of the ops are looked up in.
        ops: The ops in order; `meta["value"]` of each is the value it had.
    """

    root: nn.Module
    ops: fx.Graph

    def module(self, op: fx.Node) -> nn.Module:
        """The module that a call_module op calls."""
        return self.root.get_submodule(str(op.target))

    def name(self, op: fx.Node) -> str:
        """Where an op comes from: its module's path in the network, or its function's name."""
        return str(op.target)[len("net.") :] if op.op == "call_module" else op.name

    def attribute(self, path: str) -> Any:
        """A parameter, buffer or other tensor of the network, as it is now."""
        return operator.attrgetter(path)(self.root)

    def overwrites(self, op: fx.Node) -> bool:
        """Whether an op changes its first argument in place."""
        if op.op == "call_module":
            return bool(getattr(self.module(op), "inplace", False))
        if op.target in (*_AUGMENTED, operator.setitem):
            return True
        name = op.target if isinstance(op.target, str) else getattr(op.target, "__name__", "")
        ends = re.fullmatch(r"[a-z].*[^_]_", name) is not None
        return ends or bool(op.kwargs.get("inplace", False))

    def place(self, op: fx.Node) -> str:
        """Which op, and where in the user's code, for messages."""
        if op.op == "call_module":
            kind = registry.describe(registry.module_key(self.module(op)))
            return f"{self.name(op) or 'the network itself'} ({kind})"
        stack = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s+(.*)', op.stack_trace or "")
        own = [s for s in stack if not s[0].startswith(_NOT_THE_USERS)]
        line = f" at {own[-1][0]}:{own[-1][1]}: {own[-1][2].strip()}" if own else ""
        target: Any = op.target
        return f"{registry.describe(target)}{line}"


def record(model: nn.Module, shape: Shape) -> Recording:
    """Runs the module once on two example samples.

    Raises:
        LipcertError: It takes several tensors, its control flow depends on the data, or it does
            not run on inputs of this shape.
    """
    try:
        inspect.signature(model.forward).bind(None)
    except TypeError as error:
        raise LipcertError(
            f"The network must take one tensor, but its forward does not ({error}); wrap it in a "
            "module that does."
        ) from None
    example = torch.rand((BATCH, *shape), generator=torch.Generator().manual_seed(0))
    weights = itertools.chain(model.parameters(), model.buffers())
    like = next((t for t in weights if t.is_floating_point()), example)
    example = example.to(like.device, like.dtype)
    root = _Call(model)
    try:
        with torch.no_grad():
            return Recording(root, _Tracer(example).trace(root))
    except LipcertError:
        raise
    except fx.proxy.TraceError as error:
        raise LipcertError(
            f"The network's code depends on the data{_user_frame(error)}. Only control flow over "
            "shapes and settings can be traced; write the rest without branches."
        ) from None
    except Exception as error:
        what = next(iter(str(error).splitlines()), type(error).__name__)
        raise LipcertError(
            f"The network does not run on an input of shape {shape}{_user_frame(error)}: "
            f"{what.rstrip('.')}. Check input_shape (one sample, without the batch)."
        ) from error


def _user_frame(error: BaseException) -> str:
    """The last line of the user's own code in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_NOT_THE_USERS)]
    if not own:
        return ""
    return f", in {own[-1].filename}:{own[-1].lineno}: {own[-1].line}"


class _Call(nn.Module):
    """Calls the network as its users do: with its hooks and its default arguments."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


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
        return (self[i] for i in range(len(self.value)))  # type: ignore[index]

    def __float__(self) -> float:
        raise fx.proxy.TraceError("a number read from the data")

    __int__ = __index__ = __float__

    def _record(self, function: Callable, *args: Any):
        return self.tracer.create_proxy("call_function", function, (self, *args), {})

    # torch.fx takes x += y for x = x + y, which is another thing where x has a second name.
    def __iadd__(self, other):
        return self._record(operator.iadd, other)

    def __isub__(self, other):
        return self._record(operator.isub, other)

    def __imul__(self, other):
        return self._record(operator.imul, other)

    def __itruediv__(self, other):
        return self._record(operator.itruediv, other)

    def __setitem__(self, index, value):
        self._record(operator.setitem, index, value)


_AUGMENTED = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


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
        of_torch = key.__module__.startswith("torch.nn") and not isinstance(module, _CONTAINERS)
        return registry.find(key) is not None or of_torch

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

    def create_arg(self, a):
        argument: Any = super().create_arg(a)
        if isinstance(a, Tensor):  # a constant that is neither a parameter nor a buffer
            argument.meta["value"] = a
        return argument

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
                return operator.attrgetter(target)(self.root)
            case "call_module":
                return self.root.get_submodule(target)(*args, **kwargs)
            case "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            case _:
                return target(*args, **kwargs)
