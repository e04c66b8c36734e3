"""Recipes of networks that are 1-Lipschitz by construction: CLL on them, and what they had before.

Settings are those of the authors' code of CLL (arXiv 2309.06166); the baselines are what it states
of the codes of CPL, SLL and SOC. No script of theirs trains SOC on CIFAR-100: eps and slack are
chosen to give the constant 9.2 that the poster states. What differs: colours keep their hue (the
authors of SLL change it by 0.02), everything is in single precision (half precision for SOC there),
and no test data choose the epoch.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer as Optimiser

from lipcert import losses, models
from lipcert.augment import ColourJitter, ReflectedCrop, random_flip
from lipcert.layers import LastLayerNormalized, Normalize
from lipcert.recipe import Published, Recipe
from lipcert.recipes.cll import POSTER, READ
from lipcert.recipes.local_lip import SMALL_RADII, cropped
from lipcert.recipes.parts import adam, product_by_power_iteration
from lipcert.schedules import Piecewise, Steps

CIFAR100 = "uoft-cs/cifar100"
_SOC_MEAN = (0.4914, 0.4822, 0.4465)
_TRIANGLE = Piecewise(((0.0, 0.0), (0.4, 1.0), (0.8, 0.05), (1.0, 0.0)))


def _centred(
    in_shape: tuple[int, int, int],
    classes: int,
    make: Callable[..., nn.Sequential],
    mean: tuple[float, ...] = (0.5071, 0.4866, 0.4409),
    std: float = 1.0,
    **options: Any,
) -> nn.Sequential:
    """A net behind a layer that subtracts a mean colour and divides by one number."""
    first = Normalize(mean, (std,) * in_shape[0])
    return nn.Sequential(first, *make(in_shape, classes, **options))


def _reflected(x: Tensor) -> Tensor:
    """Mirrored left to right, and cropped with mirrored borders of 4 pixels."""
    return random_flip(ReflectedCrop(4)(x))


def _coloured(x: Tensor) -> Tensor:
    """The same, and other colours."""
    return ColourJitter(0.1, (0.5, 2.0), (0.3, 2.0))(_reflected(x))


def _quick_adam(parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimiser:
    """Adam that forgets sooner, as SLL is trained."""
    return torch.optim.Adam(parameters, learning_rate, betas=(0.5, 0.9))


def _decayed(parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimiser:
    """AdamW with a decay of 5e-4 on kernels and matrices; the authors decay biases too."""
    every = list(parameters)
    vectors = {"params": [p for p in every if p.ndim == 1], "weight_decay": 0.0}
    others = {"params": [p for p in every if p.ndim > 1], "weight_decay": 5e-4}
    return torch.optim.AdamW([vectors, others], learning_rate)


def _sgd(parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimiser:
    """Gradient descent with momentum 0.9 and a decay of 5e-4."""
    return torch.optim.SGD(parameters, learning_rate, momentum=0.9, weight_decay=5e-4)


def _published(numbers: tuple[float, float, float, float]) -> tuple[Published, ...]:
    """Clean accuracy and CRA at three radii, as on the poster."""
    names = ("clean accuracy", *(f"CRA at {radius}" for radius in SMALL_RADII))
    rows = zip(names, numbers, strict=True)
    return tuple(Published(what, value, POSTER, READ) for what, value in rows)


def _calibrated(name: str, summary: str, slack: float, decay: float, **settings: Any) -> Recipe:
    """What the recipes of CLL share: pairs, two-sided, a decay of the last layer's constant."""
    return Recipe(
        name=name,
        summary=summary,
        data=CIFAR100,
        bound=product_by_power_iteration,
        loss=losses.cll,
        loss_options={"slack": slack},
        regularise=losses.ConstantDecay(decay),
        radii=SMALL_RADII,
        seed=1,
        **settings,
    )


def cll_cpl() -> Recipe:
    """CLL on CPL-XL, CIFAR-100."""
    return _calibrated(
        "cll-cifar100-cpl",
        "CLL as published on CIFAR-100 with CPL-XL: eps = 1, slack 1e-3, 200 epochs",
        slack=1e-3,
        decay=1e-3,
        model=partial(
            _centred, make=models.cpl_net, size=dataclasses.replace(models.XLARGE, width=4096)
        ),
        eps=1.0,
        epochs=200,
        batch_size=256,
        optimiser=adam,
        learning_rate=1e-3,
        learning_rate_schedule=_TRIANGLE,
        augment=_reflected,
        published=_published((0.479, 0.363, 0.281, 0.215)),
    )


def cpl() -> Recipe:
    """The baseline CPL-XL: a hinge on absolute margins, logits without a last layer."""
    return dataclasses.replace(
        cll_cpl(),
        name="cpl-cifar100",
        summary="CPL-XL on CIFAR-100 with its own loss, a hinge at a margin of 0.7",
        model=partial(
            _centred,
            make=models.cpl_net,
            size=dataclasses.replace(models.XLARGE, width=4096),
            head=models.first_features,
        ),
        loss=losses.hinge,
        loss_options={"margin": 0.7},
        regularise=None,
        published=_published((0.478, 0.334, 0.209, 0.126)),
    )


def cll_sll() -> Recipe:
    """CLL on SLL-XL, CIFAR-100."""
    return _calibrated(
        "cll-cifar100-sll",
        "CLL as published on CIFAR-100 with SLL-XL: eps = 1, slack 3e-3, 1000 epochs",
        slack=3e-3,
        decay=1e-5,
        model=partial(_centred, make=models.sll_net, size=models.XLARGE),
        eps=1.0,
        epochs=1000,
        batch_size=256,
        optimiser=_quick_adam,
        learning_rate=1e-2,
        learning_rate_schedule=_TRIANGLE,
        augment=_coloured,
        published=_published((0.469, 0.366, 0.290, 0.234)),
    )


def sll() -> Recipe:
    """The baseline SLL-XL: cross-entropy with temperature and offset."""
    return dataclasses.replace(
        cll_sll(),
        name="sll-cifar100",
        summary="SLL-XL on CIFAR-100 with its own loss: temperature 1/4, offset 1.5 sqrt 2",
        model=partial(
            _centred, make=models.sll_net, size=models.XLARGE, head=models.first_features
        ),
        loss=losses.ce,
        loss_options={"temperature": 0.25, "offset": 1.5 * math.sqrt(2)},
        regularise=None,
        published=_published((0.465, 0.365, 0.290, 0.233)),
    )


def cll_soc() -> Recipe:
    """CLL on LipConvNet-20, CIFAR-100."""
    return _calibrated(
        "cll-cifar100-soc",
        "CLL on CIFAR-100 with LipConvNet-20 of SOC: eps = 0.5, slack 0.02 (ours), 200 epochs",
        slack=0.02,
        decay=1e-5,
        model=partial(_centred, make=models.lipconvnet, blocks=4, mean=_SOC_MEAN, std=0.2507),
        eps=0.5,
        epochs=200,
        batch_size=128,
        optimiser=_decayed,
        learning_rate=1e-3,
        learning_rate_schedule=Steps(1.0, 0.1, at=(0.5, 0.75)),
        augment=cropped,
        published=_published((0.482, 0.351, 0.253, 0.183)),
    )


def soc() -> Recipe:
    """The baseline LipConvNet-20: cross-entropy and certificate regularisation."""
    return dataclasses.replace(
        cll_soc(),
        name="soc-cifar100",
        summary="LipConvNet-20 of SOC on CIFAR-100 with certificate regularisation",
        model=partial(
            _centred,
            make=models.lipconvnet,
            blocks=4,
            mean=_SOC_MEAN,
            std=0.2507,
            head=LastLayerNormalized,
        ),
        loss=losses.certificate_regularisation,
        loss_options={"weight": 0.1},
        regularise=None,
        optimiser=_sgd,
        learning_rate=0.1,
        published=_published((0.478, 0.348, 0.237, 0.158)),
    )
