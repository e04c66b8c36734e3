"""Elementary modules: the MaxMin activation and the normalisation of inputs."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.errors import LipcertError


class MaxMin(nn.Module):
    """Sorts pairs of channels: unit c is paired with unit c + C/2 along dimension 1.

    With a and b the two halves of the channels the output is cat(max(a, b), min(a, b)).

    Every pair is either kept or exchanged, so wherever the order of the pairs is fixed the map is a
    permutation: its Jacobian has norm 1, and as the map is continuous it is 1-Lipschitz in L2. The
    norm of the input is preserved, and so is the norm of the gradient on the way back: a net of
    orthogonal maps and MaxMin does not lose its gradient with depth.

    Raises:
        LipcertError: in ``forward``, if the input has an odd number of channels.

    Reference: arXiv 1811.05381, section 4.2 (GroupSort with groups of two).
    """

    def forward(self, x: Float[Tensor, "b channels *rest"]) -> Float[Tensor, "b channels *rest"]:
        """Applies the activation."""
        if x.shape[1] % 2:
            raise LipcertError(
                f"MaxMin pairs channels, but its input of shape {tuple(x.shape)} has an odd number "
                f"of them ({x.shape[1]}): make the width of the layer before it even"
            )
        a, b = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


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
        """The numbers, for ``print(model)``."""
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"
