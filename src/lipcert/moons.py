"""Two moons: points of the plane in two interleaved half circles, at a known distance."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

MOONS = "moons"
"""The source name of two moons, which are drawn anew, always alike: 2,000 + 20,000 points."""

NOISE = 0.1


def two_moons(n: int, seed: int) -> tuple[Float[Tensor, "n 2"], Int64[Tensor, " n"]]:
    """Points near two half circles of radius 1, and on which one (0 the outer, 1 the inner).

    (cos t, sin t) and (1 - cos t, 1/2 - sin t) with t evenly spaced in [0, pi], each point moved by
    a uniform draw from a disc of radius 0.1. The half circles are 0.5 apart, so the classes keep at
    least 0.3: a classifier can be right and robust within 0.15 everywhere.

    Args:
        n: How many, half of each.
        seed: Of the draws.

    Returns:
        Points and labels.

    Reference: arXiv 2309.06166, the illustration on two moons.
    """
    generator = torch.Generator().manual_seed(seed)
    each = torch.tensor([n - n // 2, n // 2])
    t = torch.cat([torch.linspace(0, math.pi, int(k), dtype=torch.float64) for k in each])
    labels = torch.arange(2).repeat_interleave(each)
    outer = torch.stack([t.cos(), t.sin()], 1)
    inner = torch.stack([1 - t.cos(), 0.5 - t.sin()], 1)
    draws = torch.rand(2, n, generator=generator, dtype=torch.float64)
    distance, angle = NOISE * draws[0].sqrt(), 2 * math.pi * draws[1]
    noise = distance[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.where(labels[:, None] == 0, outer, inner) + noise
    return points.float(), labels
