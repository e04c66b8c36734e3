"""Recipes: functions that return a `Recipe`, found by name."""

from collections.abc import Callable

from lipcert.errors import LipcertError
from lipcert.recipe import Recipe
from lipcert.recipes.digits import gloro_digits, lmt_digits
from lipcert.recipes.mnist import gloro_mnist, lmt_mnist

_RECIPES: dict[str, Callable[[], Recipe]] = {
    make().name: make for make in (lmt_digits, gloro_digits, lmt_mnist, gloro_mnist)
}


def names() -> list[str]:
    """The names of all recipes."""
    return list(_RECIPES)


def get(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        LipcertError: There is none of this name; the message lists the names.
    """
    if name not in _RECIPES:
        raise LipcertError(f"There is no recipe {name!r}. Recipes: {', '.join(_RECIPES)}.")
    return _RECIPES[name]()
