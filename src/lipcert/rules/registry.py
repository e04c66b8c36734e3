"""The table of rules: one function per op, found by exact class, function or method name."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipcert.errors import LipcertError

Key = type[nn.Module] | Callable | str
Rule = Callable[..., Any]

_RULES: dict[Key, Rule] = {}
_REASONS: dict[Key, str] = {}


def rule(*keys: Key) -> Callable[[Rule], Rule]:
    """Declare a function as the rule of module classes, functions or tensor methods (by name).

    A rule states a fact about an op. It is called as the op is, with every tensor that depends on
    the network's input replaced by a `Node` (its `shape` is without the batch) and every other
    tensor by a `Live`; the rule of a module gets the module first. It returns an op (`Affine`,
    `Slope`, `Lipschitz`), which then reads the nodes among the arguments, or a `Node`, or a tuple
    of nodes. It raises `LipcertError` with the reason for settings that it does not cover.

    Example:
        A scaled activation of your own::

            @lc.rule(ScaledTanh)
            def scaled_tanh(module, x):
                return smooth(module, derivative=..., peaks=(0.0,))

    Raises:
        LipcertError: A key has a rule already (a second one would silently change constants).
    """

    def declare(function: Rule) -> Rule:
        for key in keys:
            if key in _RULES:
                raise LipcertError(f"There is a rule for {describe(key)} already.")
            _RULES[key] = function
        return function

    return declare


def rule_by_axes(keys: Sequence[Key], function: Callable[..., Any]) -> None:
    """Declare the rule of ops that come in one, two and three dimensions.

    Args:
        keys: The op in 1, 2, 3 dimensions.
        function: A rule that takes the number of dimensions first.
    """
    for axes, key in enumerate(keys, start=1):
        rule(key)(partial(function, axes))


def refuse(*keys: Key, because: str) -> None:
    """State why ops have no rule; the reason is printed with the op's place."""
    for key in keys:
        _REASONS[key] = because


def find(key: Key) -> Rule | None:
    """The rule of a module class, function or method name."""
    return _RULES.get(key)


def reason(key: Key) -> str:
    """Why there is no rule, and what to do."""
    default = "no rule; write one with @lipcert.rule if you know its Lipschitz constant"
    return _REASONS.get(key, default)


def rules() -> Mapping[Key, Rule]:
    """Every rule by its key, in the order of declaration; a view that cannot be written to."""
    return MappingProxyType(_RULES)


def refusals() -> Mapping[Key, str]:
    """Every stated reason by its key; a view that cannot be written to."""
    return MappingProxyType(_REASONS)


def module_key(module: nn.Module) -> type[nn.Module]:
    """The class a module's rule is found by, looking through parametrizations."""
    return parametrize.type_before_parametrizations(module)


def describe(key: Key) -> str:
    """The name of a key in messages."""
    if isinstance(key, str):
        return f"Tensor.{key}"
    module = getattr(key, "__module__", "") or ""
    name = getattr(key, "__qualname__", str(key))
    if not isinstance(key, type):  # torch binds its functions in classes of its own
        name = getattr(key, "__name__", name)
    path = f"{module}.{name}".replace("torch._C._nn.", "torch.nn.functional.")
    path = re.sub(r"torch\._C\._(\w+)\.\1_", r"torch.\1.", path)
    return path.removeprefix("builtins.").removeprefix("_")


class Live:
    """A tensor that does not depend on the network's input, read anew at each call."""

    def __init__(self, read: Callable[[], Tensor]):
        self.read = read

    def __call__(self) -> Tensor:
        """The tensor as it is now."""
        return self.read()


def live(value: "Live | Tensor | float | None") -> Live | None:
    """A `Live` of anything constant; None stays None."""
    if value is None or isinstance(value, Live):
        return value
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return Live(lambda: tensor)


def attribute(module: nn.Module, name: str) -> Live | None:
    """A module's parameter or buffer as it is at each call; None if the module has none."""
    return None if getattr(module, name) is None else Live(lambda: getattr(module, name))
