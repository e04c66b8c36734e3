"""Recipes of BCP: global norms, boxes, and the last layer over ball and box.

Settings are those of the authors' code (BCP, NeurIPS 2020), but that radius and kappa stay where
their ramps end; see `lipcert.recipes.local_lip`.
"""

from typing import Any

from torch import nn

from lipcert import losses, models
from lipcert.recipe import Published, Recipe
from lipcert.recipes.crm import CIFAR10
from lipcert.recipes.local_lip import SMALL_RADII, cropped, initialised, local_product
from lipcert.recipes.mnist import MNIST, RADII
from lipcert.recipes.parts import adam
from lipcert.schedules import EpochRamp, Steps

_README = "README of github.com/sungyoon-lee/bcp"


def _network(in_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The larger net for CIFAR-10."""
    return initialised(models.c6f2_bcp(in_shape, classes))


def _bcp(name: str, summary: str, spans: tuple[int, int, int], eps: float, **rest: Any) -> Recipe:
    """What both recipes of BCP share; `spans` are epochs in all, of the warm-up and of the ramp."""
    epochs, warmup, ramp = spans
    return Recipe(
        name=name,
        summary=summary,
        bound=local_product(eps, 1, masked=()),
        loss=losses.bcp,
        loss_schedules={"kappa": EpochRamp(1.0, 0.0, ramp, epochs, warmup)},
        eps=eps,
        eps_schedule=EpochRamp(0.0, 1.0, ramp, epochs, warmup),
        epochs=epochs,
        optimiser=adam,
        seed=2019,
        **rest,
    )


def bcp_mnist() -> Recipe:
    """The MNIST experiment of BCP."""
    read = "read there"
    return _bcp(
        name="bcp-mnist",
        summary="BCP as published on MNIST: 4C3F, eps = 1.58, 60 epochs",
        spans=(60, 1, 20),
        data=MNIST,
        model=models.c4f3_bcp,
        eps=1.58,
        batch_size=50,
        learning_rate=3e-4,
        learning_rate_schedule=Steps(1.0, 0.1, at=(21 / 60, 30 / 60, 40 / 60)),
        radii=RADII,
        published=(
            Published("clean accuracy", 0.9254, _README, read),
            Published("accuracy under attack (PGD) at 1.58", 0.6623, _README, read),
            Published("CRA at 1.58", 0.4820, _README, read),
        ),
    )


def bcp_cifar10() -> Recipe:
    """The CIFAR-10 experiment of BCP with its larger net."""
    read = 'read there, in a block that is commented out; its "Model2" is taken for 6C2F'
    return _bcp(
        name="bcp-cifar10",
        summary="BCP as published on CIFAR-10: 6C2F, eps = 36/255, 200 epochs",
        spans=(200, 10, 121),
        data=CIFAR10,
        model=_network,
        eps=36 / 255,
        batch_size=128,
        learning_rate=1e-3,
        learning_rate_schedule=Steps(1.0, 0.5, at=tuple(e / 200 for e in range(140, 200, 10))),
        augment=cropped,
        radii=SMALL_RADII,
        published=(
            Published("clean accuracy", 0.6572, _README, read),
            Published("accuracy under attack (PGD) at 36/255", 0.6078, _README, read),
            Published("CRA at 36/255", 0.5130, _README, read),
        ),
    )
