"""Recipes: functions that return a `Recipe`, found by name."""

import difflib
from collections.abc import Callable

from lipcert.errors import LipcertError
from lipcert.recipe import Recipe
from lipcert.recipes import baselines, bcp, cll, crm, ellipsoid, local_lip, one_lipschitz
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
        *(local_lip.local_lip_digits, local_lip.lmt_local_digits, local_lip.crm_local_digits),
        *(local_lip.local_lip_mnist, local_lip.local_lip_cifar10_c4f3),
        *(local_lip.local_lip_cifar10, local_lip.local_lip_cifar10_max_min),
        *(local_lip.local_lip_tiny, local_lip.local_lip_tiny_max_min),
        *(bcp.bcp_mnist, bcp.bcp_cifar10),
        *(cll.cll_moons, cll.gloro_moons, cll.cll_digits),
        *(cll.cll_cifar10_c4f3, cll.cll_cifar10_c6f2, cll.gloro_cifar10_c4f3),
        *(cll.cll_tiny, cll.cll_tiny_slack),
        *(one_lipschitz.cll_cpl, one_lipschitz.cll_sll, one_lipschitz.cll_soc),
        *(one_lipschitz.cpl, one_lipschitz.sll, one_lipschitz.soc),
        *(ellipsoid.ellipsoid_digits, ellipsoid.ellipsoid_mnist_mlp),
        *(ellipsoid.ellipsoid_mnist_lmt, ellipsoid.ellipsoid_mnist),
        *(ellipsoid.ellipsoid_cifar10, ellipsoid.ellipsoid_tiny),
    )
}


def names() -> list[str]:
    """The names of all recipes."""
    return list(_RECIPES)


def get(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        LipcertError: There is none of this name; the message lists names like it, or all.
    """
    if name not in _RECIPES:
        near = ", ".join(difflib.get_close_matches(name, _RECIPES))
        meant = f"Did you mean {near}? All of them: lipcert recipes."
        known = f"Recipes: {', '.join(_RECIPES)}."
        raise LipcertError(f"There is no recipe {name!r}. {meant if near else known}")
    return _RECIPES[name]()
