"""Attacks of other packages, behind the optional extra `attacks`: DeepFool, C&W, AutoAttack.

Each is run in the box of pixels [0, 1] and then judged here: a point counts as found only if the
network's own argmax says so.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lipcert.adversary import PGDResult, evaluating
from lipcert.errors import LipcertError


class AttackName(StrEnum):
    """Attacks by the name typed on the command line; all but PGD need the extra."""

    PGD = "pgd"
    DEEPFOOL = "deepfool"
    CW = "cw"
    AUTOATTACK = "autoattack"


def installed(package: str) -> bool:
    """Whether a package of the extra is there."""
    return find_spec(package) is not None


def deepfool(
    net: nn.Module,
    x: Float[Tensor, "b *shape"],
    labels: Int[Tensor, "b"],
    steps: int = 50,
) -> PGDResult:
    """The nearest boundary by repeated linearisation (foolbox), without a limit on the distance.

    Args:
        net: Classifier, (b, *shape) -> logits (b, classes).
        x: Inputs in [0, 1].
        labels: The classes to be left.
        steps: Linearisations at most.

    Raises:
        LipcertError: The extra is missing, or inputs are outside [0, 1].

    Reference: arXiv 1511.04599.
    """
    foolbox = _extra("foolbox")
    return _with_foolbox(net, x, labels, foolbox.attacks.L2DeepFoolAttack(steps=steps))


def carlini_wagner(
    net: nn.Module,
    x: Float[Tensor, "b *shape"],
    labels: Int[Tensor, "b"],
    steps: int = 100,
) -> PGDResult:
    """A small perturbation by descent on distance plus margin (foolbox), 9 weights of the margin.

    Args:
        net: Classifier, (b, *shape) -> logits (b, classes).
        x: Inputs in [0, 1].
        labels: The classes to be left.
        steps: Descent steps for each weight.

    Raises:
        LipcertError: The extra is missing, or inputs are outside [0, 1].

    Reference: arXiv 1608.04644.
    """
    foolbox = _extra("foolbox")
    return _with_foolbox(net, x, labels, foolbox.attacks.L2CarliniWagnerAttack(steps=steps))


def autoattack(
    net: nn.Module,
    x: Float[Tensor, "b *shape"],
    labels: Int[Tensor, "b"],
    eps: float,
    steps: int = 100,
    seed: int = 0,
) -> PGDResult:
    """The gradient attacks of AutoAttack (pyautoattack) in the L2 ball.

    APGD on cross-entropy, then on a targeted loss of four logits, or FAB where there are fewer. The
    random numbers of the caller are left as they were. It computes in float32 and takes torch's
    default dtype to be that.

    Args:
        net: Classifier, (b, *shape) -> logits (b, classes).
        x: Inputs in [0, 1].
        labels: The classes to be left.
        eps: Radius of the balls, in units of the input.
        steps: Iterations of each attack.
        seed: Of the random starts.

    Raises:
        LipcertError: The extra is missing, inputs are outside [0, 1], or eps is not positive and
            finite.

    Reference: arXiv 2003.01690.
    """
    package = _extra("pyautoattack")
    _check_box(x)
    if not 0 < eps < math.inf:
        raise LipcertError(f"eps = {eps}: AutoAttack needs a positive finite radius.")

    def logits(point: Tensor) -> Tensor:
        return net(point.to(x.dtype)).float()

    with _frozen(net), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        with torch.no_grad():
            classes = logits(x[:1]).shape[1]
        attacks = ["apgd-ce", "apgd-t" if classes >= 4 else "fab"]
        options = {"norm": "L2", "version": "custom", "seed": seed, "device": x.device}
        suite = package.AutoAttack(logits, attacks=attacks, eps=eps, **options)
        suite.apgd.n_restarts = suite.fab.n_restarts = 1
        suite.apgd.n_iter = suite.apgd_targeted.n_iter = suite.fab.n_iter = steps
        suite.apgd_targeted.n_target_classes = min(9, classes - 1)
        points, _ = suite.run_standard_evaluation(x.float(), labels.long(), batch_size=len(x))
    offset = points.double() - x.double()
    size = offset.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    inside = (eps * (1 - 1e-6) / size).clamp(max=1)  # its own projection may end just outside
    offset *= inside.view(-1, *[1] * (x.ndim - 1))
    return _judged(net, x, labels, (x.double() + offset).to(x.dtype))


def _extra(package: str) -> ModuleType:
    """A package of the extra, imported when it is needed."""
    try:
        with warnings.catch_warnings():
            # What it warns of at import is for its authors, not for the caller.
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(package)
    except ImportError as error:
        raise LipcertError(
            f"This attack needs the package {package} ({error}). Install the extra: "
            "pip install -e '.[attacks]'"
        ) from None


def _with_foolbox(
    net: nn.Module, x: Tensor, labels: Tensor, attack: Callable[..., Any]
) -> PGDResult:
    _check_box(x)
    with _frozen(net):
        model = _extra("foolbox").PyTorchModel(net, bounds=(0.0, 1.0), device=x.device)
        _, points, _ = attack(model, x.detach(), labels.long(), epsilons=None)
    return _judged(net, x, labels, points.detach())


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients left in the parameters."""
    flags = [p.requires_grad for p in net.parameters()]
    try:
        net.requires_grad_(False)
        with evaluating(net):
            yield
    finally:
        for parameter, flag in zip(net.parameters(), flags, strict=True):
            parameter.requires_grad = flag


def _check_box(x: Tensor) -> None:
    if not ((x >= 0) & (x <= 1)).all():
        raise LipcertError(
            "This attack works on inputs in [0, 1], but some are outside: keep pixels and let the "
            "model normalise them."
        )


def _judged(net: nn.Module, x: Tensor, labels: Tensor, points: Tensor) -> PGDResult:
    """What the network says of the points; where the input itself is misclassified, of that."""
    with evaluating(net), torch.no_grad():
        wrong = net(x).argmax(1) != labels
        points = torch.where(wrong.view(-1, *[1] * (x.ndim - 1)), x, points.clamp(0, 1))
        found = net(points).argmax(1) != labels
    return PGDResult(found, points, (points.double() - x.double()).flatten(1).norm(dim=1))
