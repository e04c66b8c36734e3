"""The smallest perturbation that attacks find: an upper bound of the distance to the boundary."""

import dataclasses
import math
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lipcert.adversary import PGDResult, evaluating, pgd
from lipcert.external_attacks import AttackName, carlini_wagner, deepfool, installed

_ROUNDS = 12  # bisections of the radius
_HALVINGS = 12  # bisections of the segment to a point found


def attacks() -> list[AttackName]:
    """The attacks that `smallest_perturbation` runs here: all whose package is installed."""
    others = [AttackName.DEEPFOOL, AttackName.CW] if installed("foolbox") else []
    return [AttackName.PGD, *others]


def smallest_perturbation(
    net: nn.Module,
    x: Float[Tensor, "b *shape"],
    labels: Int[Tensor, " b"],
    steps: int,
    restarts: int,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "b *shape"], Float[Tensor, " b"], list[str]]:
    """The nearest misclassified point among those that every attack at hand finds.

    Args:
        net: Classifier, pixels in [0, 1] -> logits.
        x: Samples in [0, 1].
        labels: The classes to be left.
        steps: Steps of each attack.
        restarts: Random starts of PGD at each radius tried.
        generator: Source of the random starts.

    Returns:
        The points (the sample itself where none was found); their L2 distances in float64, 0 for a
        wrong prediction, infinite where none was found; which attack found each, "" for none.
    """
    results = []
    for name in attacks():
        match name:
            case AttackName.DEEPFOOL:
                found = _pulled_back(net, x, labels, deepfool(net, x, labels, steps))
            case AttackName.CW:
                found = _pulled_back(net, x, labels, carlini_wagner(net, x, labels, steps))
            case _:
                found = _shrinking_pgd(net, x, labels, steps, restarts, generator)
        results.append(found)
    distances = torch.stack([r.distance.where(r.found, math.inf) for r in results])
    distance, which = distances.min(0)
    every = torch.stack([r.adversarial for r in results])
    points = every[which, torch.arange(len(x), device=x.device)]
    names = [
        str(attacks()[place]) if math.isfinite(d) else ""
        for place, d in zip(which.tolist(), distance.tolist(), strict=True)
    ]
    return torch.where(_per_sample(distance.isfinite(), x), points, x), distance, names


def _shrinking_pgd(
    net: nn.Module,
    x: Tensor,
    labels: Tensor,
    steps: int,
    restarts: int,
    generator: torch.Generator | None,
) -> PGDResult:
    """PGD in balls whose radius is bisected sample by sample, from the whole box down.

    A miss proves nothing, so the radii that were missed only steer where to look next.
    """
    attack = partial(pgd, net, x, labels, steps=steps, restarts=restarts, generator=generator)
    best = _pulled_back(net, x, labels, attack(radius=math.inf))
    low = torch.zeros_like(best.distance)
    for _ in range(_ROUNDS):
        high = best.distance.where(best.found, math.sqrt(x[0].numel()))
        low = low.where(low < high, 0.8 * high)  # nearer than a radius that was missed
        middle = (low + high) / 2
        now = _pulled_back(net, x, labels, attack(radius=middle))
        better = now.found & (~best.found | (now.distance < best.distance))
        best = PGDResult(
            best.found | now.found,
            torch.where(_per_sample(better, x), now.adversarial, best.adversarial),
            now.distance.where(better, best.distance),
        )
        low = low.where(now.found, middle)
    return best


def _pulled_back(net: nn.Module, x: Tensor, labels: Tensor, result: PGDResult) -> PGDResult:
    """The points found, moved straight towards x as far as they stay misclassified."""
    points = result.adversarial
    near = torch.zeros_like(result.distance)
    far = torch.ones_like(near)
    with evaluating(net), torch.no_grad():
        for _ in range(_HALVINGS):
            share = (near + far) / 2
            trial = x + _per_sample(share.to(x), x) * (result.adversarial - x)
            wrong = (net(trial).argmax(1) != labels) & result.found
            near, far = near.where(wrong, share), share.where(wrong, far)
            points = torch.where(_per_sample(wrong, x), trial, points)
    distance = (points.double() - x.double()).flatten(1).norm(dim=1)
    return dataclasses.replace(result, adversarial=points, distance=distance)


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Values of shape (b,) reshaped so as to meet a batch in the shape of x."""
    return values.view(-1, *[1] * (x.ndim - 1))
