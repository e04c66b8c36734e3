"""What LMT is compared with: its networks and schedules, trained without constants.

All use plain cross-entropy. `eps` stays the radius of the reports; only adversarial training uses
it in training, too.
"""

import dataclasses
from functools import partial
from typing import Any

from lipcert import losses
from lipcert.losses.penalties import LastLayerDecay, Parseval, SpectralNormPenalty
from lipcert.recipe import Published, Recipe
from lipcert.recipes.mnist import lmt_mnist
from lipcert.recipes.parts import RECALLED, adam, attacked
from lipcert.recipes.svhn import lmt_svhn
from lipcert.wide_resnet import WideResNet


def _baseline(variant: str, what: str, **changes: Any) -> Recipe:
    return dataclasses.replace(
        lmt_mnist(),
        name=f"baseline-mnist-{variant}",
        summary=f"LMT's MNIST net with {what}, to compare with",
        loss=losses.ce,
        **{"published": ()} | changes,
    )


def plain() -> Recipe:
    """No regulariser at all."""
    published = Published(
        "median certified radius", 0.012, "LMT, arXiv 1802.04034, section 6", RECALLED
    )
    return _baseline("plain", "plain cross-entropy", published=(published,))


def weight_decay() -> Recipe:
    """Weight decay of 5e-4 on all parameters."""
    return _baseline("weight_decay", "weight decay", optimiser=partial(adam, weight_decay=5e-4))


def parseval() -> Recipe:
    """Parseval steps of 1e-4 on all layers but the last, without changes of the network.

    The authors of LMT have a Parseval network on SVHN alone: `parseval_svhn`.
    """
    return _baseline("parseval", "Parseval steps", after_step=Parseval(1e-4))


def spectral_norm_regularisation() -> Recipe:
    """Spectral norm regularisation of 0.01, with the method's own gradient.

    The code of LMT's authors adds a gradient of size 0.01 sigma^2 instead of 0.01 sigma.
    """
    penalty = partial(SpectralNormPenalty, strength=0.01)
    return _baseline("snr", "spectral norm regularisation", penalties=(penalty,))


def adversarial() -> Recipe:
    """Training on attacked pictures alone, by ten steps of PGD within `eps`.

    The authors of LMT attack with 30 steps of the Carlini-Wagner attack, which has no radius.
    """
    return _baseline("adversarial", "adversarial training", perturb=attacked)


def parseval_svhn() -> Recipe:
    """A Parseval network on SVHN: scaled convolutions, convex sums, steps of 1e-4.

    The last layer decays by 5e-4 instead. Data and schedule are those of `lmt-svhn-wrn16_4`.
    """
    source = "LMT, arXiv 1802.04034, section 6"
    return dataclasses.replace(
        lmt_svhn(),
        name="baseline-svhn-parseval",
        summary="LMT's SVHN net as a Parseval network, to compare with",
        model=partial(WideResNet, parseval=True),
        loss=losses.ce,
        penalties=(partial(LastLayerDecay, strength=5e-4),),
        after_step=Parseval(1e-4),
        published=(
            Published("clean accuracy", 0.9830, source, RECALLED),
            Published("accuracy under attack (CW) at 0.2", 0.7135, source, RECALLED),
            Published("accuracy under attack (CW) at 0.5", 0.1792, source, RECALLED),
            Published("accuracy under attack (CW) at 1.0", 0.0094, source, RECALLED),
        ),
    )
