"""Elementary modules: 1-Lipschitz activations and the normalisation of inputs."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.errors import LipcertError


class MaxMin(nn.Module):
    """Sorts pairs of channels: unit c is paired with unit c + C/2 along dimension 1.

    With a and b the two halves of the channels the output is cat(max(a, b), min(a, b)). With
    `adjacent` it is the same for a and b the even and the odd channels: 2k is paired with 2k + 1,
    and the output still has all maxima first.

    Every pair is either kept or exchanged, so wherever the order of the pairs is fixed the map is a
    permutation: its Jacobian has norm 1, and as the map is continuous it is 1-Lipschitz in L2. The
    norm of the input is preserved, and so is the norm of the gradient on the way back: a net of
    orthogonal maps and MaxMin does not lose its gradient with depth.

    Args:
        adjacent: Whether neighbours are paired instead of halves.

    Raises:
        LipcertError: in ``forward``, if the input has an odd number of channels.

    Reference: arXiv 1811.05381, section 4.2 (GroupSort with groups of two).
    """

    def __init__(self, adjacent: bool = False):
        super().__init__()
        self.adjacent = adjacent

    def forward(self, x: Float[Tensor, "b channels *rest"]) -> Float[Tensor, "b channels *rest"]:
        """Applies the activation."""
        if x.shape[1] % 2:
            raise LipcertError(
                f"MaxMin pairs channels, but its input of shape {tuple(x.shape)} has an odd number "
                f"of them ({x.shape[1]}): make the width of the layer before it even"
            )
        a, b = (x[:, ::2], x[:, 1::2]) if self.adjacent else x.chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)

    def extra_repr(self) -> str:
        """What is paired, for ``print(model)``."""
        return "adjacent=True" if self.adjacent else ""


class GroupSort(nn.Module):
    """Sorts groups of neighbouring channels along dimension 1, the smallest first.

    Wherever the order is fixed the map is a permutation, and it is continuous: 1-Lipschitz in L2,
    and it keeps norms.

    Args:
        size: Channels in a group.

    Raises:
        LipcertError: The size is not positive; in ``forward``, the number of channels is no
            multiple of it.

    Reference: arXiv 1811.05381, section 4.2.
    """

    def __init__(self, size: int):
        super().__init__()
        if size < 1:
            raise LipcertError(f"GroupSort({size}): needs a positive size of the groups")
        self.size = size

    def forward(self, x: Float[Tensor, "b channels *rest"]) -> Float[Tensor, "b channels *rest"]:
        """Applies the activation."""
        if x.shape[1] % self.size:
            raise LipcertError(
                f"GroupSort({self.size}) sorts groups of {self.size} channels, but its input of "
                f"shape {tuple(x.shape)} has {x.shape[1]} of them, no multiple"
            )
        return x.unflatten(1, (-1, self.size)).sort(2).values.flatten(1, 2)

    def extra_repr(self) -> str:
        """The size of the groups, for ``print(model)``."""
        return f"{self.size}"


class Householder(nn.Module):
    """Reflects pairs of channels where they lie on one side of a learned line (HH, order 1).

    Unit c is paired with unit c + C/2 along dimension 1. With the pair (a, b), its angle t and
    v = (sin(t/2), -cos(t/2)) the pair becomes

        (a, b) - 2 max(0, v . (a, b)) v

    that is (a cos t + b sin t, a sin t - b cos t) where v . (a, b) > 0, and (a, b) elsewhere. Both
    pieces are isometries and they agree on the line, so the map is 1-Lipschitz in L2 for every
    angle, and its Jacobian is orthogonal: neither values nor gradients lose their norm. At the
    start, t = pi/2, each pair is sorted, the smaller one first.

    Args:
        channels: Number of channels C, even.

    Attributes:
        angle: The angles t in radians, a parameter of shape (channels / 2,).

    Raises:
        LipcertError: The number of channels is not positive and even; in ``forward``, the input
            has another one.

    Reference: arXiv 2108.04062 (Householder activations).
    """

    def __init__(self, channels: int):
        super().__init__()
        if channels < 2 or channels % 2:
            raise LipcertError(
                f"Householder pairs channels, so channels={channels} must be positive and even"
            )
        self.angle = nn.Parameter(torch.full((channels // 2,), math.pi / 2))

    def forward(self, x: Float[Tensor, "b channels *rest"]) -> Float[Tensor, "b channels *rest"]:
        """Applies the activation."""
        if x.shape[1] != 2 * len(self.angle):
            raise LipcertError(
                f"Householder was made for {2 * len(self.angle)} channels, "
                f"but its input has the shape {tuple(x.shape)}"
            )
        half = (self.angle / 2).view(-1, *(1,) * (x.ndim - 2)).to(x)
        sine, cosine = half.sin(), half.cos()
        a, b = x.chunk(2, dim=1)
        beyond = 2 * (a * sine - b * cosine).clamp(min=0)
        return torch.cat([a - beyond * sine, b + beyond * cosine], dim=1)

    def extra_repr(self) -> str:
        """The number of channels, for ``print(model)``."""
        return f"{2 * len(self.angle)}"


class Householder2(nn.Module):
    """Maps four learned sectors of each pair of channels by isometries (HH, order 2).

    Unit c is paired with unit c + C/2 along dimension 1. With angles s, t, u in [0, 2 pi] and p the
    angle of the pair (a, b) counted from s / 2, the pair is

    - kept for p in [0, t / 2),
    - reflected in the line at the angle (s + t) / 2 for p in [t / 2, (t + u) / 2),
    - turned by -u for p in [(t + u) / 2, pi + u / 2),
    - reflected in the line at the angle s / 2 for p in [pi + u / 2, 2 pi).

    Neighbouring pieces agree on the ray between them, so the map is continuous, and 1-Lipschitz in
    L2 for all angles; its Jacobian is orthogonal. With u = 0 it is `Householder` with the angle s.

    Args:
        channels: Number of channels C, even.

    Attributes:
        angles: s, t and u in radians, a parameter of shape (3, channels / 2), uniform in [0, pi) at
            the start. What leaves [0, 2 pi] counts as the nearer end.

    Raises:
        LipcertError: The number of channels is not positive and even; in ``forward``, the input
            has another one.

    Reference: arXiv 2108.04062 and the authors' code.
    """

    def __init__(self, channels: int):
        super().__init__()
        if channels < 2 or channels % 2:
            raise LipcertError(
                f"Householder2 pairs channels, so channels={channels} must be positive and even"
            )
        self.angles = nn.Parameter(math.pi * torch.rand(3, channels // 2))

    def pieces(self, like: Tensor) -> list[Float[Tensor, "2 2 pairs ..."]]:
        """The matrices of the four pieces, their entries in the shape of a pair of `like`."""
        s, t, u = self.angles.clamp(0, 2 * math.pi).to(like)
        zero, one = torch.zeros_like(s), torch.ones_like(s)
        identity, turn = (one, zero, zero, one), (u.cos(), u.sin(), -u.sin(), u.cos())
        mirrors = [(p.cos(), p.sin(), p.sin(), -p.cos()) for p in (s + t, s)]
        shape = (2, 2, -1, *(1,) * (like.ndim - 2))
        return [torch.stack(m).view(shape) for m in (identity, mirrors[0], turn, mirrors[1])]

    def forward(self, x: Float[Tensor, "b channels *rest"]) -> Float[Tensor, "b channels *rest"]:
        """Applies the activation."""
        if x.shape[1] != 2 * self.angles.shape[1]:
            raise LipcertError(
                f"Householder2 was made for {2 * self.angles.shape[1]} channels, "
                f"but its input has the shape {tuple(x.shape)}"
            )
        a, b = x.chunk(2, dim=1)
        column = (3, -1, *(1,) * (x.ndim - 2))
        s, t, u = self.angles.detach().clamp(0, 2 * math.pi).to(x).view(column)
        place = torch.remainder(torch.atan2(b, a).detach() - s / 2, 2 * math.pi)
        first, *others = self.pieces(x)
        matrix = first.unsqueeze(2)
        for begin, piece in zip((t / 2, (t + u) / 2, math.pi + u / 2), others, strict=True):
            matrix = torch.where(place >= begin, piece.unsqueeze(2), matrix)
        return torch.cat([p * a + q * b for p, q in matrix], dim=1)

    def extra_repr(self) -> str:
        """The number of channels, for ``print(model)``."""
        return f"{2 * self.angles.shape[1]}"


class Normalize(nn.Module):
    """Maps every channel to (x - mean) / std.

    It belongs inside the model, as its first layer: inputs stay pixels in [0, 1] and every bound
    counts the factor 1 / std, so that radii are in pixels.

    Args:
        mean: One number per channel, in units of the input; kept as a buffer of shape (channels,).
        std: One positive number per channel, in the same units; a buffer too.

    Raises:
        LipcertError: if the numbers do not fit each other; in ``forward``, if the input has
            another number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        if len(mean) != len(std) or not all(0 < s < float("inf") for s in std):
            raise LipcertError(
                "Normalize needs one mean and one positive std for each channel, "
                f"got mean={mean} and std={std}"
            )
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.get_default_dtype()))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.get_default_dtype()))

    def forward(self, x: Float[Tensor, "b channels *rest"]) -> Float[Tensor, "b channels *rest"]:
        """Normalises a batch."""
        if x.shape[1] != len(self.mean):
            raise LipcertError(
                f"Normalize was made for {len(self.mean)} channels, "
                f"but its input has the shape {tuple(x.shape)}"
            )
        shape = (-1,) + (1,) * (x.ndim - 2)
        return (x - self.mean.view(shape)) / self.std.view(shape)

    def extra_repr(self) -> str:
        """The number of channels, for ``print(model)``: the numbers are state, as weights are."""
        return f"{len(self.mean)}"
