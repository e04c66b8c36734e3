"""Recipes for MNIST."""

from lipcert import losses, models
from lipcert.layers import MaxMin
from lipcert.recipe import Published, Recipe
from lipcert.recipes.parts import RECALLED, adam, product_by_power_iteration
from lipcert.schedules import Exponential, Linear

MNIST = "ylecun/mnist"
RADII = ("0.1", "0.3", "0.5", "1.0", "1.58")


def lmt_mnist() -> Recipe:
    """The MNIST experiment of LMT in its published settings (arXiv 1802.04034)."""
    return Recipe(
        name="lmt-mnist",
        summary="LMT as published: the small conv net, c = 1, 20 epochs",
        data=MNIST,
        model=models.lmt_mnist,
        bound=product_by_power_iteration,
        loss=losses.lmt,
        eps=1.0,
        epochs=20,
        batch_size=50,
        optimiser=adam,
        learning_rate=1e-3,
        radii=RADII,
        published=(
            Published(
                "median certified radius",
                1.02,
                "LMT, arXiv 1802.04034, section 6",
                RECALLED,
            ),
        ),
    )


def gloro_mnist() -> Recipe:
    """GloRo Nets' loss on the 4C3F net of BCP, certified at 1.58 (arXiv 2102.08452)."""

    def model(in_shape: tuple[int, int, int], classes: int):
        return models.c4f3_bcp(in_shape, classes, activation=MaxMin)

    return Recipe(
        name="gloro-mnist-c4f3_bcp",
        summary="GloRo Nets' loss on 4C3F with MaxMin, certified at 1.58",
        data=MNIST,
        model=model,
        bound=product_by_power_iteration,
        loss=losses.gloro,
        eps=1.75,
        eps_schedule=Linear(0.01, 1.0, until=0.5),
        epochs=100,
        batch_size=256,
        optimiser=adam,
        learning_rate=1e-3,
        learning_rate_schedule=Exponential(1.0, 0.005, begin=0.5),
        radii=RADII,
        published=(
            Published(
                "CRA at 1.58",
                0.628,
                "README of the gloro package",
                "read there; the settings behind it were not",
            ),
        ),
    )
