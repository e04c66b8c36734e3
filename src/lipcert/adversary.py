"""Attacks from below: points that change the prediction, and sampled slopes of a function.

Both are the other side of a certificate. An attack inside a certified ball must fail, and a
Lipschitz constant seen at any point must not exceed its bound.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lipcert.errors import LipcertError


@dataclass(frozen=True)
class PGDResult:
    """What an attack found, per sample.

    Attributes:
        found: Whether the predicted class at ``adversarial`` differs from the label.
        adversarial: The misclassified point, or where none was found the point of the largest
            margin loss among those visited. Inside the ball and the box.
        distance: Its L2 distance to the input in float64; never above the radius.
    """

    found: Bool[Tensor, "b"]
    adversarial: Float[Tensor, "b *shape"]
    distance: Float[Tensor, "b"]


def pgd(
    net: nn.Module,
    x: Float[Tensor, "b *shape"],
    labels: Int[Tensor, "b"],
    radius: float | Float[Tensor, "b"],
    steps: int = 50,
    restarts: int = 1,
    clip: tuple[float, float] | None = (0.0, 1.0),
    step_size: float = 0.5,
    generator: torch.Generator | None = None,
) -> PGDResult:
    """Searches each L2 ball for a misclassified point by projected gradient ascent.

    From a point drawn uniformly in the ball, step k of K moves by radius * step_size * (1 - k/K)
    along the normalised gradient of max_{j != y} z_j - z_y, which does not vanish where
    cross-entropy saturates (a random direction replaces a zero gradient), then back into the ball
    and the box. That ascent can climb towards a rival that is near in logits but out of reach, so
    restart r > 1 aims at one class only: the (r-1)-th best rival at the clean input, in turn.

    A sample counts as found at the first point whose argmax is not its label, and is then left
    alone; one that is misclassified already is found at distance 0. The net runs in eval mode and
    its training flags are restored; no parameter gradient is accumulated.

    Args:
        net: Classifier, (b, *shape) -> logits (b, classes).
        x: Inputs, inside ``clip``.
        labels: The classes to be left: true labels, or predictions to attack a certificate.
        radius: L2 radius in units of the input, one for all or one per sample. Infinity stands for
            the diagonal of the box.
        steps: Gradient steps per restart.
        restarts: Random starts for the samples not found so far.
        clip: Range of every entry of a valid input; None for no limits.
        step_size: First step as a share of the radius.
        generator: Source of all random numbers, for reproducible attacks.

    Raises:
        LipcertError: a negative or NaN radius, an infinite one without ``clip``, inputs outside
            ``clip``, or no steps.

    Reference: arXiv 1706.06083 (projected gradient descent), 1608.04644 (margin loss), 1910.09338
    (one target class per restart).
    """
    if steps < 1 or restarts < 1:
        raise LipcertError(
            f"an attack needs steps >= 1 and restarts >= 1, got {steps} and {restarts}"
        )
    radii = _radii(x, radius, clip)
    x, labels = x.detach(), labels.long()
    with evaluating(net), torch.enable_grad():
        logits = net(x).detach()
        rivals = torch.ones_like(logits, dtype=torch.bool).scatter(1, labels[:, None], False)
        ranking = logits.masked_fill(~rivals, -math.inf).argsort(dim=1, descending=True)
        found = logits.argmax(dim=1) != labels
        adversarial, highest = x.clone(), _height(logits, labels, rivals)
        for restart in range(restarts):
            aims = rivals
            if restart > 0:
                rank = (restart - 1) % (logits.shape[1] - 1)
                aims = torch.zeros_like(rivals).scatter(1, ranking[:, rank, None], True)
            live = (~found & (radii > 0)).nonzero().squeeze(1)
            offset = _in_unit_ball(x[live], generator) * _per_sample(radii[live], x)
            for step in range(steps + 1):
                if len(live) == 0:
                    break
                point = _inside(x[live], offset, radii[live], clip).requires_grad_()
                scores = net(point)
                height = _height(scores.detach(), labels[live], rivals[live])
                hit = scores.argmax(dim=1) != labels[live]
                better = hit | (height > highest[live])
                adversarial[live[better]] = point.detach()[better]
                highest[live[better]] = height[better]
                found[live] = hit
                if step == steps:
                    break
                # The zero term ties nets that ignore their input to it.
                climb = _height(scores, labels[live], aims[live]).sum() + 0 * point.sum()
                (slope,) = torch.autograd.grad(climb, point)
                offset = (point.detach().double() - x[live].double())[~hit]
                live = live[~hit]
                length = radii[live] * (step_size * (1 - step / steps))
                offset += _unit(slope[~hit].double(), generator) * _per_sample(length, x)
    return PGDResult(found, adversarial, _norms(adversarial.double() - x.double()))


def lower_bound(
    f: Callable[[Tensor], Tensor],
    x: Float[Tensor, "b *shape"],
    steps: int = 10,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b"]:
    """The largest slope of f seen at each point: a lower bound of its Lipschitz constant (L2).

    Power iteration on J^T J, with J the Jacobian of f at one sample, from a random direction v;
    the result is ||J v|| / ||v||. Where f is differentiable no Lipschitz constant of f on any
    neighbourhood of the point is smaller (up to the rounding of one product), whatever the number
    of steps, and the value tends to the spectral norm of J.

    Args:
        f: Maps (b, *shape) to (b, ...), each sample on its own. A module runs in eval mode and its
            training flags are restored.
        x: Points.
        steps: Iterations; 0 gives the slope in a random direction.
        generator: Source of the random directions.

    Returns:
        One number per sample, in units of the output per unit of the input, float64.
    """
    x = x.detach().requires_grad_()
    with evaluating(f), torch.enable_grad():
        # The zero term ties functions that ignore their input to it.
        y = f(x) + 0 * x.sum()
        # J^T c is linear in c, and its adjoint is J: no forward-mode rules are needed.
        c = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, c, create_graph=True)
        direction = _unit(_normal(x, generator), generator).to(x.dtype)
        for _ in range(steps):
            (image,) = torch.autograd.grad(pulled, c, direction, retain_graph=True)
            (back,) = torch.autograd.grad(y, x, image, retain_graph=True)
            direction = _unit(back.double(), generator).to(x.dtype)
        (image,) = torch.autograd.grad(pulled, c, direction)
    return _norms(image.double()) / _norms(direction.double())


@contextmanager
def evaluating(f: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Eval mode for every module inside f, and each one's own flag again afterwards."""
    modules = list(f.modules()) if isinstance(f, nn.Module) else []
    flags = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


def _radii(
    x: Tensor, radius: float | Tensor, clip: tuple[float, float] | None
) -> Float[Tensor, "b"]:
    """The radius of every sample in float64, infinity replaced by the diagonal of the box."""
    radii = torch.as_tensor(radius, dtype=torch.float64, device=x.device).expand(len(x))
    if not (radii >= 0).all():
        raise LipcertError("the radius of an attack must be >= 0 and not NaN for every sample")
    if clip is None:
        if radii.isinf().any():
            raise LipcertError("an infinite radius needs the limits of valid inputs: set clip")
        return radii
    low, high = clip
    if not ((x >= low) & (x <= high)).all():
        raise LipcertError(
            f"inputs must lie within clip={clip}, but some are outside: radii are in units of the "
            "input, so keep pixels and let the model normalise them, or set clip"
        )
    return radii.clamp(max=math.sqrt(math.prod(x.shape[1:])) * (high - low))


def _height(logits: Tensor, labels: Tensor, rivals: Tensor) -> Float[Tensor, "b"]:
    """The margin loss: the best logit among the rivals minus that of the label."""
    best = logits.masked_fill(~rivals, -math.inf).amax(dim=1)
    return best - logits.gather(1, labels[:, None]).squeeze(1)


def _inside(
    x: Tensor, offset: Tensor, radii: Tensor, clip: tuple[float, float] | None
) -> Float[Tensor, "b *shape"]:
    """A point near x + offset inside both the ball and the box, in the dtype of x.

    Clipping after scaling keeps the ball, because x is inside the box and so no entry moves away
    from it. Rounding is towards x for the same reason: entry by entry, the point is never further
    from x than the scaled offset, whose norm is below the radius by more than its own rounding.
    """
    norms = _norms(offset)
    scale = torch.where(norms > radii, radii * (1 - 1e-12) / norms, 1.0)
    offset = offset * _per_sample(scale, x)
    target = x.double() + offset
    if clip is not None:
        target = target.clamp(*clip)
    point = target.to(x.dtype)
    too_far = (point.double() - x.double()).abs() > offset.abs()
    return torch.where(too_far, torch.nextafter(point, x), point)


def _in_unit_ball(x: Tensor, generator: torch.Generator | None) -> Float[Tensor, "b *shape"]:
    """Points drawn uniformly in the unit ball, float64: radii follow U^(1/n) in n dimensions."""
    device = x.device if generator is None else generator.device
    uniform = torch.rand(len(x), dtype=torch.float64, device=device, generator=generator)
    radii = uniform.to(x.device) ** (1 / max(1, math.prod(x.shape[1:])))
    return _unit(_normal(x, generator), generator) * _per_sample(radii, x)


def _normal(x: Tensor, generator: torch.Generator | None) -> Float[Tensor, "b *shape"]:
    """Standard normal numbers in the shape of x, float64, drawn where the generator lives."""
    device = x.device if generator is None else generator.device
    draw = torch.randn(x.shape, dtype=torch.float64, device=device, generator=generator)
    return draw.to(x.device)


def _unit(
    direction: Float[Tensor, "b *shape"], generator: torch.Generator | None
) -> Float[Tensor, "b *shape"]:
    """Each sample scaled to norm 1; a random direction where there is none."""
    norms = _norms(direction)
    usable = (norms > 0) & norms.isfinite()
    if not usable.all():
        random = _normal(direction, generator)
        direction = torch.where(_per_sample(usable, direction), direction, random)
        norms = _norms(direction)
    return direction / _per_sample(norms, direction)


def _norms(x: Tensor) -> Float[Tensor, "b"]:
    """L2 norm of every sample."""
    return (x[:, None] if x.ndim == 1 else x.flatten(1)).norm(dim=1)


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Numbers of shape (b,) reshaped so as to multiply a batch in the shape of x."""
    return values.view(-1, *[1] * (x.ndim - 1))
