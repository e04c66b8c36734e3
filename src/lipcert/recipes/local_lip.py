"""Recipes of Local-Lip, which train with product bounds around each sample.

Settings are those of the authors' code (arXiv 2111.01395). `eps` is the radius of the training,
which lies above that of the certificates. Two things differ. The
schedules of radius and kappa end where they should, while in the authors' code they go on beyond
(`EpochRamp(legacy=True)` does that). And boxes use the local constants of the layers
before them, which is never worse. The authors choose the best epoch on the test set; a run here
ends with its last one.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lipcert import losses, models
from lipcert.augment import RandomAffine, random_flip
from lipcert.bounds import Bound, Product
from lipcert.data import DIGITS
from lipcert.graph import Graph
from lipcert.layers import ClippedMaxMin, ClippedReLU, project_thresholds
from lipcert.recipe import Published, Recipe
from lipcert.recipes.crm import CIFAR10, TINY_IMAGENET, crm_digits
from lipcert.recipes.digits import lmt_digits
from lipcert.recipes.mnist import MNIST, RADII
from lipcert.recipes.parts import RECALLED, adam
from lipcert.region import L2Ball
from lipcert.schedules import Cosine, EpochRamp, Exponential, Linear
from lipcert.spectral import PowerIteration

SMALL_RADII = ("36/255", "72/255", "108/255")
_PAPER = "Local-Lip, arXiv 2111.01395"
_POSTER = "a later poster, in github.com/mlosch/CLL"
# Convolutions 1, 4, 7, 8 and the first dense layer, which is one map with the flatten before it.
_TINY_LOCAL = ("0", "6", "12", "14", "16+17")
# (t_max, t_min) of each activation of the two nets with MaxMin.
_MAX_MIN_C6F2 = [
    *((0.1, -0.1), (0.1, -0.15), (0.15, -0.15), (0.15, -0.15)),
    *((0.2, -0.2), (0.3, -0.3), (1.2, -1.2)),
]
_MAX_MIN_C8F2 = [(t, -t) for t in (0.8, 1.0, 1.4, 1.4, 1.4, 1.6, 2.0, 3.0, 1.6)]


def local_product(
    eps: float, iterations: int, masked: Sequence[str] | None = None
) -> Callable[[Graph], Bound]:
    """The local product bound with warm iterations: an estimate, for training."""
    return partial(Product, norm=PowerIteration(iterations), region=L2Ball(eps), masked=masked)


def initialised(net: nn.Module) -> nn.Module:
    """The net, its convolutions drawn from N(0, 2 / (k k outputs)), their biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return net


def _clipped_relu_net(
    in_shape: tuple[int, int, int],
    classes: int,
    make: Callable[..., nn.Module],
    threshold: float = 1.0,
) -> nn.Module:
    """A net with clipped ReLU."""
    return initialised(make(in_shape, classes, activation=partial(ClippedReLU, threshold)))


def _clipped_max_min_net(
    in_shape: tuple[int, int, int],
    classes: int,
    make: Callable[..., nn.Module],
    thresholds: Sequence[tuple[float, float]],
) -> nn.Module:
    """A net with clipped MaxMin, the thresholds at the start by layer."""
    layers = iter(thresholds)
    return initialised(make(in_shape, classes, activation=lambda: ClippedMaxMin(*next(layers))))


def cropped(x: Tensor) -> Tensor:
    """Flipped, then cropped at random after padding by four black pixels on each side."""
    # Shifts drawn from [-4.5, 4.5] and rounded are the nine whole ones, all equally probable.
    return RandomAffine(0, 4.5 / x.shape[-1])(random_flip(x))


def _published(
    name: str,
    summary: str,
    iterations: int,
    spans: tuple[int, int, int],
    last_rate: float,
    masked: Sequence[str] | None = None,
    **settings: Any,
) -> Recipe:
    """What all recipes of Local-Lip share.

    Args:
        name: Of the recipe.
        summary: Of the recipe.
        iterations: Power iterations a step.
        spans: Epochs in all, of the warm-up and of the ramp.
        last_rate: Learning rate of the last epoch.
        masked: Layers with norms for each sample, if not all.
        settings: Further fields of the recipe.
    """
    epochs, warmup, ramp = spans
    usual: dict[str, Any] = {"loss": losses.bcp, "batch_size": 256, "learning_rate": 1e-3}
    settings = usual | settings
    if settings["loss"] is losses.bcp:
        settings["loss_schedules"] = {"kappa": EpochRamp(1.0, 0.0, ramp, epochs, warmup)}
    return Recipe(
        name=name,
        summary=summary,
        bound=local_product(settings["eps"], iterations, masked),
        eps_schedule=EpochRamp(0.0, 1.0, ramp, epochs, warmup),
        epochs=epochs,
        optimiser=adam,
        learning_rate_schedule=Exponential(
            1.0, last_rate / settings["learning_rate"], begin=(epochs / 2 + 25) / epochs
        ),
        after_step=project_thresholds,
        seed=2019,
        **settings,
    )


def local_lip_mnist() -> Recipe:
    """The MNIST experiment of Local-Lip: clipped ReLU and the loss after GloRo's."""
    return _published(
        name="local-lip-mnist-c4f3_bcp",
        summary="Local-Lip as published on MNIST: 4C3F with clipped ReLU, eps = 1.75, 300 epochs",
        iterations=5,
        spans=(300, 0, 150),
        last_rate=5e-6,
        data=MNIST,
        model=partial(_clipped_relu_net, make=models.c4f3_bcp),
        loss=losses.local_lip,
        eps=1.75,
        radii=RADII,
        published=(
            Published("clean accuracy", 0.963, _PAPER, RECALLED),
            Published("accuracy under attack (PGD) at 1.58", 0.782, _PAPER, RECALLED),
            Published("CRA at 1.58", 0.558, _PAPER, RECALLED),
        ),
    )


def _cifar10(name: str, summary: str, model: Callable[..., nn.Module], **settings: Any) -> Recipe:
    return _published(
        name=name,
        summary=f"Local-Lip as published on CIFAR-10: {summary}, eps = 0.1551, 800 epochs",
        iterations=2,
        spans=(800, 20, 400),
        last_rate=1e-6,
        data=CIFAR10,
        model=model,
        eps=0.1551,
        augment=cropped,
        radii=SMALL_RADII,
        **settings,
    )


def local_lip_cifar10_c4f3() -> Recipe:
    """The smaller net on CIFAR-10."""
    return _cifar10(
        "local-lip-cifar10-c4f3_bcp",
        "4C3F with clipped ReLU",
        partial(_clipped_relu_net, make=models.c4f3_bcp),
    )


def local_lip_cifar10() -> Recipe:
    """The CIFAR-10 experiment of Local-Lip with clipped ReLU."""
    return _cifar10(
        "local-lip-cifar10-c6f2_bcp",
        "6C2F with clipped ReLU",
        partial(_clipped_relu_net, make=models.c6f2_bcp, threshold=2.0),
        published=(
            Published("clean accuracy", 0.707, _PAPER, RECALLED),
            Published("accuracy under attack (PGD) at 36/255", 0.648, _PAPER, RECALLED),
            Published("CRA at 36/255", 0.543, _PAPER, RECALLED),
        ),
    )


def local_lip_cifar10_max_min() -> Recipe:
    """The CIFAR-10 experiment of Local-Lip with clipped MaxMin."""
    return _cifar10(
        "local-lip-cifar10-c6f2_bcp-maxmin",
        "6C2F with clipped MaxMin",
        partial(_clipped_max_min_net, make=models.c6f2_bcp, thresholds=_MAX_MIN_C6F2),
        published=(
            Published("clean accuracy", 0.774, _PAPER, RECALLED),
            Published("accuracy under attack (PGD) at 36/255", 0.704, _PAPER, RECALLED),
            Published("CRA at 36/255", 0.607, _PAPER, RECALLED),
        ),
    )


def _tiny(name: str, summary: str, model: Callable[..., nn.Module], **settings: Any) -> Recipe:
    return _published(
        name=name,
        summary=f"Local-Lip as published on Tiny-ImageNet: {summary}, eps = 0.16, 250 epochs",
        spans=(250, 0, 125),
        last_rate=5e-7,
        masked=_TINY_LOCAL,
        # lambda = 0.01 within the share 1 - kappa of the robust loss
        regularise=losses.Sparsity(EpochRamp(0.0, 0.01, 125, 250)),
        data=TINY_IMAGENET,
        model=model,
        eps=0.16,
        batch_size=128,
        augment=cropped,
        radii=SMALL_RADII,
        **settings,
    )


def local_lip_tiny() -> Recipe:
    """The Tiny-ImageNet experiment of Local-Lip with clipped ReLU; five layers count by sample."""
    return _tiny(
        "local-lip-tiny-c8f2_bcp",
        "8C2F with clipped ReLU",
        partial(_clipped_relu_net, make=models.c8f2_bcp),
        iterations=1,
        learning_rate=2.5e-4,
        published=(
            Published("clean accuracy", 0.308, _PAPER, RECALLED),
            Published("accuracy under attack (PGD) at 36/255", 0.284, _PAPER, RECALLED),
            Published("CRA at 36/255", 0.207, _PAPER, RECALLED),
        ),
    )


def local_lip_tiny_max_min() -> Recipe:
    """The Tiny-ImageNet experiment of Local-Lip with clipped MaxMin."""
    quoted = "read there, which does not name the activation; that it is MaxMin is recalled"
    return _tiny(
        "local-lip-tiny-c8f2_bcp-maxmin",
        "8C2F with clipped MaxMin",
        partial(_clipped_max_min_net, make=models.c8f2_bcp, thresholds=_MAX_MIN_C8F2),
        iterations=3,
        learning_rate=1e-4,
        published=(
            Published("clean accuracy", 0.369, _POSTER, quoted),
            Published("accuracy under attack (PGD) at 36/255", 0.333, _PAPER, RECALLED),
            Published("CRA at 36/255", 0.234, _POSTER, quoted),
            Published("CRA at 72/255", 0.127, _POSTER, quoted),
            Published("CRA at 108/255", 0.061, _POSTER, quoted),
        ),
    )


def _dense_net(in_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Three hidden layers of 256 units with clipped MaxMin, orthogonal at the start."""
    net = models.mlp(in_shape, classes, widths=(256, 256, 256), activation=ClippedMaxMin)
    models.initialise_orthogonally(net)
    return net


def local_lip_digits() -> Recipe:
    """Local-Lip on the digits, in settings of ours.

    MaxMin certified more of the held-out part than clipped ReLU, with a global bound as much at
    36/255 as with the local one.
    """
    eps = 1.5 * 36 / 255
    return Recipe(
        name="local-lip-digits",
        summary="Local-Lip on the embedded digits: an MLP with clipped MaxMin",
        data=DIGITS,
        model=_dense_net,
        bound=local_product(eps, 2),
        loss=losses.bcp,
        loss_schedules={"kappa": Linear(1.0, 0.0, until=0.5)},
        eps=eps,
        eps_schedule=Linear(0.0, 1.0, until=0.5),
        epochs=60,
        batch_size=64,
        optimiser=adam,
        learning_rate=2e-3,
        learning_rate_schedule=Cosine(1.0, 0.0),
        radii=("36/255", "72/255", "108/255", "0.5"),
    )


def _with_local_bound(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the local product bound in place of its own."""
    return dataclasses.replace(
        recipe,
        name=name,
        summary=f"{recipe.name} with the bound of Local-Lip",
        bound=local_product(recipe.eps, 2),
    )


def lmt_local_digits() -> Recipe:
    """`lmt-digits` with a local bound and nothing else changed."""
    return _with_local_bound(lmt_digits(), "lmt-local-digits")


def crm_local_digits() -> Recipe:
    """`crm-digits` with a local bound and nothing else changed.

    Its constants hold up to `eps`, which is as far as the loss penalises radii.
    """
    return _with_local_bound(crm_digits(), "crm-local-digits")
