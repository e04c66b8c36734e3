"""A value kept as long as the tensors it is made of stay as they are."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Cache(Generic[T]):
    """Keeps one value that is made of tensors: a transformed weight, or a norm of it.

    Kept only where nothing is to be differentiated. It notices every change of the tensors that
    torch counts (optimisers, `load_state_dict`, `.to`), not one written through `.data`. A copy of
    the cache, pickled or deep, starts empty; it is no part of a module's state.
    """

    def __init__(self) -> None:
        self._made_of: tuple[Tensor, ...] = ()
        self._versions: tuple = ()
        self._value: T | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, ()

    def __call__(self, made_of: Sequence[Tensor], make: Callable[[], T], *settings: Any) -> T:
        """The kept value, or what `make()` gives.

        Args:
            made_of: Every tensor that the value depends on.
            make: Makes the value.
            settings: What else it depends on, such as the shape of an input.
        """
        if torch.compiler.is_compiling():
            return make()
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in made_of)
        unversioned = any(t.is_inference() for t in made_of)
        if differentiable or unversioned:
            return make()
        versions = tuple((t._version, t.data_ptr(), t.dtype) for t in made_of), settings
        same = len(made_of) == len(self._made_of) and all(map(operator.is_, made_of, self._made_of))
        if self._value is None or not same or versions != self._versions:
            # What is made in inference mode is of no use outside.
            with torch.inference_mode(False), torch.no_grad():
                self._value = make()
            self._made_of, self._versions = tuple(made_of), versions
        return self._value
