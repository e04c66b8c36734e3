"""The largest value of w . d over |d| <= r and l <= d <= u: a logit's rise in a ball and box.

For every t > 0 weak duality gives, with d = clip(t w, l, u),

    max w . d  <=  w . d + (r^2 - |d|^2) / (2 t),

with equality where |d| = r; where the box alone decides, t goes to infinity. So any t proves an
upper bound, and the best one is found by fixing the entries at their ends and solving for t, until
none is added.

Reference: BCP (NeurIPS 2020), whose iterates these are; the dual form makes each of them a proof.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.errors import LipcertError

_STEPS = 50  # a handful is needed; any number is sound


def ball_box(
    w: Float[Tensor, "b c n"],
    lower: Float[Tensor, "b n"],
    upper: Float[Tensor, "b n"],
    radius: Float[Tensor, " b"],
) -> Float[Tensor, "b c"]:
    """The largest w . d over |d|_2 <= radius and lower <= d <= upper, for every w of a sample.

    Differentiable in all arguments. Memory is that of a few copies of `w`.

    Args:
        w: Linear functions, c a sample.
        lower: Lower ends; those above 0 are taken as 0, as d = 0 is known to be possible.
        upper: Upper ends; those below 0 are taken as 0.
        radius: The radius, finite.

    Raises:
        LipcertError: An argument is NaN, or a radius infinite: nothing would be known.
    """
    # Scaled to functions and a ball of size 1, whose squares neither overflow nor vanish.
    size = w.detach().abs().amax(-1)
    size = size.where(size > 0, 1)
    unit = radius.detach().where(radius > 0, 1)
    w, radius = w / size[..., None], radius / unit
    lower, upper = lower / unit[:, None], upper / unit[:, None]
    lower, upper = lower.clamp(max=0)[:, None], upper.clamp(min=0)[:, None]
    r2 = radius.square()[:, None]
    with torch.no_grad():
        t, unbounded = _multiplier(w, lower, upper, r2)
    d = torch.minimum(torch.maximum(t[..., None] * w, lower), upper)
    d = d.where(~unbounded[..., None], torch.where(w > 0, upper, lower))
    slack = (r2 - d.square().sum(-1)) / (2 * t.where(t > 0, 1))
    value = (w * d).sum(-1) + slack.where(~unbounded, 0)
    if bool(value.isnan().any()) or not bool(radius.isfinite().all()):
        raise LipcertError(
            "The worst logits in a ball and box are NaN: the box, the radius or the last layer's "
            "weights are. Nothing can be proved; check the inputs and weights."
        )
    return value * size * unit[:, None]


def _multiplier(w: Tensor, lower: Tensor, upper: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
    """t, and where every entry of w that is not 0 is at its end: there the ball does not matter."""
    size = w.square().sum(-1)
    t = (r2 / size.where(size > 0, 1)).sqrt()
    count = torch.full_like(t, -1)
    for _ in range(_STEPS):
        moved = t[..., None] * w
        ends = torch.minimum(torch.maximum(moved, lower), upper)
        at_end = ends != moved
        free = w.square().masked_fill(at_end, 0).sum(-1)
        left = (r2 - ends.square().masked_fill(~at_end, 0).sum(-1)).clamp(min=0)
        better = torch.maximum(t, (left / free.where(free > 0, 1)).sqrt()).where(free > 0, t)
        found = at_end.sum(-1).to(t)
        if bool((found == count).all()):
            break
        t, count = better, found
    return t, (free == 0) | (size == 0)
