"""Random changes of the training pictures that keep their labels.

Each works on a whole batch of pixels and draws from torch's global generator on the CPU, so that
the same seed gives the same pictures on every device.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lipcert.errors import LipcertError


def random_flip(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Each picture, with probability 1/2 mirrored left to right."""
    mirrored = (torch.rand(len(x)) < 0.5).to(x.device)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


@dataclass(frozen=True)
class RandomAffine:
    """Each picture turned about its centre, then moved by whole pixels; the nearest pixel is taken.

    The angle is uniform in [-degrees, degrees]. The two shifts are uniform in [-translate,
    translate] times the width or height, rounded to whole pixels.

    Attributes:
        degrees: Largest angle, >= 0.
        translate: Largest shift as a share of the picture's side, in [0, 1].
        fill: Value of the pixels that come from outside.
    """

    degrees: float
    translate: float
    fill: float = 0.0

    def __post_init__(self) -> None:
        if not (self.degrees >= 0 and 0 <= self.translate <= 1):
            raise LipcertError(f"{self}: needs degrees >= 0 and translate between 0 and 1.")

    def __call__(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The changed pictures.

        Args:
            x: Pictures, of any floating-point type.
        """
        b, _, h, w = x.shape
        draws = 2 * torch.rand(3, b, dtype=torch.float64) - 1
        angle = draws[0] * math.radians(self.degrees)
        right = (draws[1] * self.translate * w).round()
        down = (draws[2] * self.translate * h).round()
        # Where a pixel of the result comes from, in coordinates of [-1, 1] along either side: first
        # moved back, then turned back.
        turn = torch.stack(
            [angle.cos(), angle.sin() * h / w, -angle.sin() * w / h, angle.cos()], dim=1
        ).view(b, 2, 2)
        back = -torch.stack([2 * right / w, 2 * down / h], dim=1)
        theta = torch.cat([turn, turn @ back[:, :, None]], dim=2).to(x)
        grid = F.affine_grid(theta, [b, 1, h, w], align_corners=False)
        inside = _nearest(torch.ones_like(x[:, :1]), grid)
        return torch.where(inside > 0, _nearest(x, grid), self.fill)


def _nearest(
    x: Float[Tensor, "b c h w"], grid: Float[Tensor, "b h w 2"]
) -> Float[Tensor, "b c h w"]:
    """The pixels at these places, zero outside."""
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)
