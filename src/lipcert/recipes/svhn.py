"""Recipes for SVHN, cropped to one digit a picture."""

import dataclasses

from jaxtyping import Float, Int
from torch import Tensor, nn

from lipcert import losses
from lipcert.bounds import Bound, MarginConstants, Product
from lipcert.graph import Graph
from lipcert.kinds import Kind
from lipcert.layers import RecordingBatchNorm2d, last_batch_variances
from lipcert.recipe import Published, Recipe
from lipcert.recipes.parts import RECALLED, nesterov, product_by_power_iteration
from lipcert.schedules import Linear, Steps
from lipcert.spectral import PowerIteration
from lipcert.wide_resnet import WideResNet

SVHN = "ufldl-stanford/svhn:cropped_digits"
_SOURCE = "LMT, arXiv 1802.04034, section 6"


def _average(in_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The variant whose strided shortcuts average."""
    return WideResNet(in_shape, classes, average=True)


def _recording(in_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network whose normalisations record the variance of the batch."""
    return WideResNet(in_shape, classes, norm=RecordingBatchNorm2d)


class BatchProduct(Product):
    """The product bound of the function that a network in training mode is on its last batch.

    BatchNorm counts with the variance of that batch, through which gradients flow, dropout as the
    identity. It says nothing about the network in eval mode, so it is always an estimate. While
    the network is in eval mode, as `certify` has it, this is `Product`.
    """

    def forward(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
        index: Int[Tensor, " b"] | None = None,
    ) -> MarginConstants:
        """The constants of all pairs; the arguments are not looked at.

        Raises:
            LipcertError: In training mode, if no batch has gone through the network.
        """
        if not self.graph.model.training:
            return super().forward()
        with last_batch_variances(self.graph.model):
            constants = super().forward()
        return dataclasses.replace(constants, kind=Kind.ESTIMATE, failure=0.0)


def _batch_product(graph: Graph) -> Bound:
    """The bound with one warm power-iteration step a call."""
    return BatchProduct(graph, norm=PowerIteration(1))


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


def lmt_svhn_batch() -> Recipe:
    """The same with the authors' training constant: BatchNorm by the variance of the mini-batch.

    The other recipes train with the constant of the eval-mode function. Certificates are those of
    that function here, too.
    """
    return dataclasses.replace(
        lmt_svhn(),
        name="lmt-svhn-wrn16_4-batch",
        summary="As lmt-svhn-wrn16_4, its training constant by the variance of the mini-batch",
        model=_recording,
        bound=_batch_product,
    )
