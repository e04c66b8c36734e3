"""Recipes for SVHN, cropped to one digit a picture."""

import dataclasses

from torch import nn

from lipcert import losses
from lipcert.recipe import Published, Recipe
from lipcert.recipes.parts import RECALLED, nesterov, product_by_power_iteration
from lipcert.schedules import Linear, Steps
from lipcert.wide_resnet import WideResNet

SVHN = "ufldl-stanford/svhn:cropped_digits"
_SOURCE = "LMT, arXiv 1802.04034, section 6"


def _average(in_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The variant whose strided shortcuts average."""
    return WideResNet(in_shape, classes, average=True)


def lmt_svhn() -> Recipe:
    """The SVHN experiment of LMT in its published settings (arXiv 1802.04034), but for the data.

    The authors trained on the splits `train` and `extra` together, 604 388 pictures. This recipe
    reads the 73 257 of `train` alone, because a source gives one training split; expect a lower
    accuracy. No augmentation, no weight decay, pixels in [0, 1].
    """
    return Recipe(
        name="lmt-svhn-wrn16_4",
        summary="LMT as published, without the extra data: WRN-16-4, c = 0.01, 160 epochs",
        data=SVHN,
        model=WideResNet,
        bound=product_by_power_iteration,
        loss=losses.lmt,
        eps=1e-2,
        eps_schedule=Linear(1e-3, 1.0, until=5 / 160),
        epochs=160,
        batch_size=128,
        optimiser=nesterov,
        learning_rate=1e-2,
        learning_rate_schedule=Steps(1.0, 0.1, at=(80 / 160, 120 / 160)),
        radii=("0.01", "0.029", "0.08", "0.2", "0.5", "1.0"),
        published=(
            Published("median certified radius, at least", 0.029, _SOURCE, RECALLED),
            Published("clean accuracy", 0.9638, _SOURCE, RECALLED),
            Published("accuracy under attack (CW) at 0.2", 0.8690, _SOURCE, RECALLED),
            Published("accuracy under attack (CW) at 0.5", 0.5511, _SOURCE, RECALLED),
            Published("accuracy under attack (CW) at 1.0", 0.1769, _SOURCE, RECALLED),
        ),
    )


def lmt_svhn_average() -> Recipe:
    """The variant with average-pooled shortcuts and a tenfold radius, on `train` alone as well."""
    return dataclasses.replace(
        lmt_svhn(),
        name="lmt-svhn-wrn16_4-avg",
        summary="LMT as published, without the extra data: averaging WRN-16-4, c = 0.1, 160 epochs",
        model=_average,
        eps=1e-1,
        eps_schedule=Linear(1e-4, 1.0, until=5 / 160),
        published=(
            Published("median certified radius, at least", 0.08, _SOURCE, RECALLED),
            Published("clean accuracy", 0.86, _SOURCE, RECALLED),
        ),
    )
