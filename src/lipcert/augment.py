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


@dataclass(frozen=True)
class ReflectedCrop:
    """Each picture shifted by whole pixels; what comes in is its own border, mirrored.

    Attributes:
        most: Largest shift along either axis, in pixels; all shifts are equally probable.
    """

    most: int

    def __post_init__(self) -> None:
        if self.most < 0 or self.most != int(self.most):
            raise LipcertError(f"{self}: needs a whole number of pixels >= 0.")

    def __call__(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The shifted pictures.

        Raises:
            LipcertError: A side of the pictures is not longer than the largest shift.
        """
        b, _, h, w = x.shape
        if self.most >= min(h, w):
            raise LipcertError(f"{self}: pictures of {h} x {w} have no borders as wide as that.")
        wide = F.pad(x, (self.most,) * 4, mode="reflect")
        down, right = torch.randint(2 * self.most + 1, (2, b, 1)).to(x.device)
        rows = (down + torch.arange(h, device=x.device))[:, None, :, None]
        columns = (right + torch.arange(w, device=x.device))[:, None, None, :]
        samples = torch.arange(b, device=x.device)[:, None, None, None]
        channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        return wide[samples, channels, rows, columns]


@dataclass(frozen=True)
class ColourJitter:
    """Each picture brighter or darker, with more or less contrast and colour, in random order.

    A picture x becomes clip(f x + (1 - f) y) with y black, the mean grey of the picture, or its
    grey version, and f uniform in [1 - a, 1 + a] or the range given. The order is drawn once a
    batch.

    Attributes:
        brightness: a, or the range of f, where y is black.
        contrast: The same where y is the mean grey.
        saturation: The same where y is the grey version.
    """

    brightness: float | tuple[float, float] = 0.0
    contrast: float | tuple[float, float] = 0.0
    saturation: float | tuple[float, float] = 0.0

    def __post_init__(self) -> None:
        for strength in (self.brightness, self.contrast, self.saturation):
            low, high = strength if isinstance(strength, tuple) else (1 - strength, 1 + strength)
            if not 0 <= low <= high:
                raise LipcertError(f"{self}: needs numbers of [0, 1], or ranges (low, high) >= 0.")

    def __call__(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The changed pictures, pixels in [0, 1].

        Args:
            x: Pictures of three channels.
        """
        for step in torch.randperm(3).tolist():
            strength = (self.brightness, self.contrast, self.saturation)[step]
            low, high = strength if isinstance(strength, tuple) else (1 - strength, 1 + strength)
            factor = (low + (high - low) * torch.rand(len(x), 1, 1, 1)).to(x)
            grey = torch.einsum("bchw,c->bhw", x, x.new_tensor(_GREY))[:, None]
            other = (torch.zeros_like(grey), grey.mean((2, 3), keepdim=True), grey)[step]
            x = (factor * x + (1 - factor) * other).clamp(0, 1)
        return x


_GREY = (0.299, 0.587, 0.114)  # how bright red, green and blue are


def _nearest(
    x: Float[Tensor, "b c h w"], grid: Float[Tensor, "b h w 2"]
) -> Float[Tensor, "b c h w"]:
    """The pixels at these places, zero outside."""
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)
