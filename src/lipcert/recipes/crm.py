"""Recipes of CRM, which all train with the LipLT bound.

Its norms are estimated by `LOBPCG(2)` where the authors take 5 or 10 power iterations: along a
training on CIFAR-10 its error was between those of their 10 and 20, for a fraction of the time
(`benchmarks/liplt.py`).

The authors' settings are those of their code: README and scripts. `eps` is the largest radius that
the loss penalises (r0 there); it is 0 in the first 10 epochs, so that they are plain cross-entropy.

CIFAR-10. The authors' code maps pixels to [-1, 1] and applies 36/255 to those inputs, in training
and in certification. That is 18/255 in pixels of [0, 1], in which this library and nearly all
others state radii; whether their printed certified accuracy of 64.16 % was measured that way could
not be settled, and the same group's later baseline of the same net, in pixels, is 36.25 %. So the
figure can not be laid beside ours. The recipes take the settings at face value, in pixels:
r0 = 0.2, t = 5 and lambda = 15 on unscaled inputs. The same training as the authors' code in other
units would be a net that begins with `Normalize` to [-1, 1], with r0 = 0.1, t = 10 and lambda = 30;
it aims below 36/255.
"""

import dataclasses
from functools import partial
from typing import Any

from torch import Tensor, nn

from lipcert import losses, models
from lipcert.augment import RandomAffine, random_flip
from lipcert.bounds import Bound, LipLT
from lipcert.data import DIGITS
from lipcert.graph import Graph
from lipcert.recipe import Published, Recipe
from lipcert.recipes.mnist import MNIST, RADII
from lipcert.recipes.parts import adam
from lipcert.schedules import Constant, Cosine, Exponential, Switch
from lipcert.spectral import LOBPCG

CIFAR10 = "uoft-cs/cifar10"
TINY_IMAGENET = "zh-plus/tiny-imagenet"
_SOURCE = "CRM, arXiv 2310.00116, as quoted by a public survey"
_QUOTED = "second hand: the survey says it read the paper's table, which we could not"
_OTHER_SCALE = (
    f"{_QUOTED}; not comparable: the authors' code certifies inputs of [-1, 1], where 36/255 is "
    "18/255 in pixels"
)


def _liplt(graph: Graph) -> Bound:
    """LipLT with two warm steps a call: an estimate, for training."""
    return LipLT(graph, norm=LOBPCG(2))


def _published(name: str, summary: str, decay: int, **settings: Any) -> Recipe:
    """What all recipes of the authors share; `decay` is the first epoch with a lower rate."""
    settings = {"epochs": 400, "batch_size": 512, "learning_rate": 1e-3, "eps": 0.2} | settings
    epochs = settings["epochs"]
    return Recipe(
        name=name,
        summary=summary,
        loss=losses.crm,
        eps_schedule=Switch(0.0, 1.0, at=10 / epochs),
        optimiser=partial(adam, epsilon=1e-7),
        learning_rate_schedule=Exponential(1.0, 1e-3, begin=decay / epochs),
        seed=1,
        **settings,
    )


def crm_mnist() -> Recipe:
    """The MNIST experiment of CRM in its published settings."""
    return _published(
        name="crm-mnist-c4f3_bcp",
        summary="CRM as published: 4C3F, r0 = 2.2, 400 epochs",
        data=MNIST,
        model=models.c4f3_bcp,
        bound=_liplt,
        loss_options={"t": 5.0, "weight": 30.0},
        eps=2.2,
        decay=25,
        radii=RADII,
        published=(
            Published("clean accuracy", 0.9627, _SOURCE, _QUOTED),
            Published("CRA at 1.58", 0.6337, _SOURCE, _QUOTED),
        ),
    )


def _cifar_pictures(x: Tensor) -> Tensor:
    """Flipped, turned by up to 10 degrees, shifted by a tenth; grey from outside, as published."""
    return RandomAffine(10, 0.1, fill=0.5)(random_flip(x))


def crm_cifar10() -> Recipe:
    """The CIFAR-10 experiment of CRM, its settings taken as radii in pixels of [0, 1].

    The published figure is of another scale and no aim; see the head of this file.
    """
    return _published(
        name="crm-cifar10-c6f2_crm",
        summary="CRM's settings on CIFAR-10 read in pixels: its 6C2F, r0 = 0.2, 400 epochs",
        data=CIFAR10,
        model=models.c6f2_crm,
        bound=_liplt,
        loss_options={"t": 5.0, "weight": 15.0},
        decay=200,
        augment=_cifar_pictures,
        radii=("18/255", "36/255", "72/255", "108/255"),
        published=(
            Published("clean accuracy", 0.7482, _SOURCE, _QUOTED),
            Published("CRA at 36/255 as the authors scale it", 0.6416, _SOURCE, _OTHER_SCALE),
        ),
    )


def crm_cifar10_bcp() -> Recipe:
    """The same on the three times larger 6C2F of BCP, which most other papers use."""
    return dataclasses.replace(
        crm_cifar10(),
        name="crm-cifar10-c6f2_bcp",
        summary="CRM's settings on CIFAR-10 read in pixels: the 6C2F of BCP, 400 epochs",
        model=models.c6f2_bcp,
        published=(),
    )


def crm_cifar10_depth(convolutions: int, dense: int) -> Recipe:
    """A member of the timing study: `models.crm_depth` on CIFAR-10 for 20 epochs.

    As in the authors' scripts the radii are penalised from the first epoch on. Only the deepest
    member goes by a name on the command line.
    """
    return dataclasses.replace(
        crm_cifar10(),
        name=f"crm-cifar10-c{convolutions}f{dense}_crm",
        summary=f"CRM's timing study on CIFAR-10: {convolutions}C{dense}F, 20 epochs",
        model=partial(models.crm_depth, convolutions=convolutions, dense=dense),
        epochs=20,
        eps_schedule=Constant(1.0),
        published=(),
    )


def crm_cifar10_deepest() -> Recipe:
    """The deepest net of the timing study, 11C4F."""
    return crm_cifar10_depth(11, 4)


def _tiny_pictures(x: Tensor) -> Tensor:
    """Flipped, turned by up to 20 degrees, shifted by a fifth; black from outside, as published."""
    return RandomAffine(20, 0.2)(random_flip(x))


def crm_tiny() -> Recipe:
    """The Tiny-ImageNet experiment of CRM, after its scripts.

    Above 101 classes the authors multiply LipLT up to the last hidden layer by the distances of the
    last layer's rows. This recipe uses the LipLT constants of all pairs, which are smaller.
    """
    return _published(
        name="crm-tiny-c8f2_crm",
        summary="CRM after its scripts on Tiny-ImageNet: 8C2F, r0 = 0.2, 300 epochs",
        data=TINY_IMAGENET,
        model=models.c8f2_crm,
        bound=_liplt,
        loss_options={"t": 12.0, "weight": 150.0},
        epochs=300,
        batch_size=256,
        learning_rate=1e-4,
        decay=100,
        augment=_tiny_pictures,
        radii=("36/255", "72/255", "108/255"),
    )


def _dense_net(in_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Three hidden layers of 256 ReLU units, orthogonal at the start."""
    net = models.mlp(in_shape, classes, widths=(256, 256, 256))
    models.initialise_orthogonally(net)
    return net


def crm_digits() -> Recipe:
    """CRM on the digits, tuned by us on the held-out part of the training data.

    ReLU and not MaxMin, on which LipLT is the product bound. With t = 5 the softmin of nine radii
    can lie 0.44 below the smallest one, more than the radii in question; t = 15 certified two
    points more of the held-out part at 36/255 and eight fewer at 0.5. A larger `eps` shifts
    certified accuracy from small radii to large ones.
    """
    return Recipe(
        name="crm-digits",
        summary="CRM on the embedded digits: an MLP with ReLU, certified at 36/255",
        data=DIGITS,
        model=_dense_net,
        bound=_liplt,
        loss=losses.crm,
        loss_options={"t": 15.0, "weight": 15.0},
        eps=0.3,
        eps_schedule=Switch(0.0, 1.0, at=0.1),
        epochs=60,
        batch_size=64,
        optimiser=adam,
        learning_rate=2e-3,
        learning_rate_schedule=Cosine(1.0, 0.0),
        radii=("36/255", "72/255", "108/255", "0.5"),
    )
