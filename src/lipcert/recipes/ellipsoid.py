"""Recipes of this library that train with the ellipsoid bound.

The bound leaves the network more room than product or LipLT do at the same certified radius: a net
trained with it can have a large product bound, and is worth little without its own. The loss and
the learning rate were chosen on the held-out part of MNIST (docs/log.md); the recipes for CIFAR-10
and Tiny-ImageNet take them over, and no full training of them was run.
"""

import dataclasses
from functools import partial
from typing import Any

from torch import nn

from lipcert import losses, models
from lipcert.augment import RandomAffine, random_flip
from lipcert.bounds import Bound, Ellipsoid
from lipcert.data import DIGITS
from lipcert.graph import Graph
from lipcert.recipe import Recipe
from lipcert.recipes.crm import CIFAR10, TINY_IMAGENET
from lipcert.recipes.mnist import MNIST, RADII
from lipcert.recipes.parts import adam
from lipcert.schedules import Cosine, Linear


def _ellipsoid(graph: Graph, every: int = 1) -> Bound:
    return Ellipsoid(graph, every=every)


def _orthogonal(make: Any, **sizes: Any) -> Any:
    """A network that begins with orthogonal weights, where these leave every layer of norm 1."""

    def model(in_shape: tuple[int, int, int], classes: int) -> nn.Module:
        net = make(in_shape, classes, **sizes)
        models.initialise_orthogonally(net)
        return net

    return model


def ellipsoid_mnist_lmt() -> Recipe:
    """LMT's small net on MNIST, tuned by us on the held-out part of the training data."""
    return Recipe(
        name="ellipsoid-mnist-lmt",
        summary="the ellipsoid bound on LMT's small net for MNIST, certified at 1.58",
        data=MNIST,
        model=_orthogonal(models.lmt_mnist),
        bound=partial(_ellipsoid, every=2),
        loss=losses.gloro,
        eps=1.58,
        eps_schedule=Linear(0.0, 1.0, until=0.5),
        epochs=80,
        batch_size=256,
        optimiser=adam,
        learning_rate=3e-3,
        learning_rate_schedule=Linear(1.0, 0.01, begin=0.5),
        radii=RADII,
    )


def ellipsoid_mnist_mlp() -> Recipe:
    """A dense network of four hidden layers of 100 units on MNIST."""
    return dataclasses.replace(
        ellipsoid_mnist_lmt(),
        name="ellipsoid-mnist-mlp",
        summary="the ellipsoid bound on an MLP of 4 x 100 ReLU units for MNIST, certified at 1.58",
        model=_orthogonal(models.mlp, widths=(100,) * 4, activation=nn.ReLU),
    )


def ellipsoid_mnist() -> Recipe:
    """The 4C3F net of BCP on MNIST."""
    return dataclasses.replace(
        ellipsoid_mnist_lmt(),
        name="ellipsoid-mnist-c4f3_bcp",
        summary="the ellipsoid bound on 4C3F for MNIST, certified at 1.58",
        model=_orthogonal(models.c4f3_bcp),
        learning_rate=1e-3,
    )


def ellipsoid_cifar10() -> Recipe:
    """The 6C2F net of BCP on CIFAR-10, at the radius and the length of GloRo Nets and CLL.

    The bound at every fourth step: in the same time that trains further than at every second one.
    """
    return dataclasses.replace(
        ellipsoid_mnist_lmt(),
        name="ellipsoid-cifar10-c6f2_bcp",
        summary="the ellipsoid bound on 6C2F for CIFAR-10, certified at 36/255",
        data=CIFAR10,
        model=_orthogonal(models.c6f2_bcp),
        bound=partial(_ellipsoid, every=4),
        eps=36 / 255,
        epochs=800,
        learning_rate=1e-3,
        augment=lambda x: RandomAffine(5, 0.1)(random_flip(x)),
        radii=("36/255", "72/255", "108/255"),
    )


def ellipsoid_tiny() -> Recipe:
    """The 8C2F net of BCP on Tiny-ImageNet."""
    return dataclasses.replace(
        ellipsoid_cifar10(),
        name="ellipsoid-tiny-c8f2_bcp",
        summary="the ellipsoid bound on 8C2F for Tiny-ImageNet, certified at 36/255",
        data=TINY_IMAGENET,
        model=_orthogonal(models.c8f2_bcp),
        epochs=300,
    )


def ellipsoid_digits() -> Recipe:
    """The embedded digits."""
    return dataclasses.replace(
        ellipsoid_mnist_lmt(),
        name="ellipsoid-digits",
        summary="the ellipsoid bound on the embedded digits: an MLP with ReLU, certified at 36/255",
        data=DIGITS,
        model=_orthogonal(models.mlp, widths=(256, 256, 256), activation=nn.ReLU),
        eps=3 * 36 / 255,
        epochs=60,
        batch_size=64,
        learning_rate=2e-3,
        learning_rate_schedule=Cosine(1.0, 0.0),
        radii=("36/255", "72/255", "108/255", "0.5"),
    )
