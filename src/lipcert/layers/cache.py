"""A value kept as long as the tensors it is made of stay as they are."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Cache(Generic[T]):
    """Keeps one value that is made of tensors: a transformed weight, or a norm of it.

    Kept only where nothing is to be differentiated, and only as long as the tensors equal the
    copies that it holds of them: versions of tensors do not tell of what is written through
    `.data`. A copy of the cache, pickled or deep, starts empty; it is no part of a module's state.
    """

    def __init__(self) -> None:
        self._made_of: tuple[Tensor, ...] = ()
        self._settings: tuple = ()
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
        if torch.is_grad_enabled() and any(t.requires_grad for t in made_of):
            return make()
        if self._value is None or settings != self._settings or not self._holds(made_of):
            # What is made in inference mode is of no use outside.
            with torch.inference_mode(False), torch.no_grad():
                self._value = make()
                self._made_of = tuple(t.clone() for t in made_of)
            self._settings = settings
        return self._value

    def _holds(self, tensors: Sequence[Tensor]) -> bool:
        if len(tensors) != len(self._made_of):
            return False
        return all(
            (t.dtype, t.device, t.shape) == (kept.dtype, kept.device, kept.shape)
            and torch.equal(t, kept)
            for t, kept in zip(tensors, self._made_of, strict=True)
        )
