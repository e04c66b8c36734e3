"""Recipes: functions that return a `Recipe`, found by name."""

from collections.abc import Callable

from lipcert.errors import LipcertError
from lipcert.recipe import Recipe
from lipcert.recipes import baselines, crm
from lipcert.recipes.digits import gloro_digits, lmt_digits
from lipcert.recipes.mnist import gloro_mnist, lmt_mnist
from lipcert.recipes.svhn import lmt_svhn, lmt_svhn_average, lmt_svhn_batch

_RECIPES: dict[str, Callable[[], Recipe]] = {
    make().name: make
    for make in (
        *(lmt_digits, gloro_digits),
        *(lmt_mnist, gloro_mnist),
        *(baselines.plain, baselines.weight_decay, baselines.parseval),
        *(baselines.spectral_norm_regularisation, baselines.adversarial),
        baselines.parseval_svhn,
        *(crm.crm_digits, crm.crm_mnist),
        *(crm.crm_cifar10, crm.crm_cifar10_bcp, crm.crm_cifar10_deepest, crm.crm_tiny),
        *(lmt_svhn, lmt_svhn_average, lmt_svhn_batch),
    )
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
