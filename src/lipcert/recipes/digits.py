"""Recipes for the embedded 8 x 8 digits: seconds on one core, no download."""

import dataclasses

from torch import nn

from lipcert import losses, models
from lipcert.data import DIGITS
from lipcert.layers import MaxMin
from lipcert.recipe import Recipe
from lipcert.recipes.parts import adam, product_by_power_iteration
from lipcert.schedules import Cosine, Linear


def _network(in_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Three hidden layers of 256 units with MaxMin, orthogonal at the start."""
    net = models.mlp(in_shape, classes, widths=(256, 256, 256), activation=MaxMin)
    models.initialise_orthogonally(net)
    return net


def lmt_digits() -> Recipe:
    """LMT on the digits, tuned by us on the held-out part of the training data."""
    return Recipe(
        name="lmt-digits",
        summary="LMT on the embedded digits: an MLP with MaxMin, certified at 36/255",
        data=DIGITS,
        model=_network,
        bound=product_by_power_iteration,
        loss=losses.lmt,
        loss_options={"stabilise": False},
        eps=1.5 * 36 / 255,
        eps_schedule=Linear(0.0, 1.0, until=0.5),
        epochs=60,
        batch_size=64,
        optimiser=adam,
        learning_rate=2e-3,
        learning_rate_schedule=Cosine(1.0, 0.0),
        radii=("36/255", "72/255", "108/255", "0.5"),
    )


def gloro_digits() -> Recipe:
    """The same with the loss of GloRo Nets."""
    return dataclasses.replace(
        lmt_digits(),
        name="gloro-digits",
        summary="GloRo Nets' loss on the embedded digits, otherwise as lmt-digits",
        loss=losses.gloro,
        loss_options={},
    )
