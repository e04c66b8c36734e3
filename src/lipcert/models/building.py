"""Sequential networks from a list of their layers, and their initialisation."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lipcert.errors import LipcertError

Convolution = tuple[int, int, int, int]
"""(output channels, kernel, stride, padding) of one convolution."""


def mlp(
    in_shape: tuple[int, ...],
    classes: int,
    widths: Sequence[int] = (128, 128),
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """A dense net on the flattened input: one layer per entry of ``widths``, then the logits.

    The activation follows every layer but the last; no widths at all gives a linear classifier.
    26 122 parameters for (1, 8, 8), 10 classes and the default widths.

    Args:
        in_shape: Shape of one input, of any length.
        classes: Number of logits.
        widths: Outputs of the hidden layers.
        activation: Called without arguments for every activation layer.

    Raises:
        LipcertError: a size is not positive, or the activation does not fit a layer.
    """
    _check(in_shape, classes, activation)
    return nn.Sequential(nn.Flatten(), *_dense(math.prod(in_shape), widths, classes, activation))


def initialise_orthogonally(net: nn.Module) -> None:
    """Sets every dense and convolutional weight of the net to a random orthogonal one, in place.

    A dense layer then has all its singular values equal to 1. A convolution has an orthogonal
    kernel matrix (output channels against the rest), so its norm is between 1 and the square root
    of the number of times that one input entry is read. Biases become 0.

    Reference: arXiv 1312.6120, section 3.
    """
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def convolutional(
    in_shape: tuple[int, int, int],
    classes: int,
    activation: Callable[[], nn.Module],
    convolutions: Sequence[Convolution],
    widths: Sequence[int],
) -> nn.Sequential:
    """Convolutions, a flatten and dense layers, the activation after each layer but the last.

    Args:
        in_shape: (channels, height, width) of one input.
        classes: Number of logits.
        activation: Called without arguments for every activation layer.
        convolutions: One entry a convolution.
        widths: Outputs of the hidden dense layers.

    Raises:
        LipcertError: the input is too small, or the activation does not fit a layer.
    """
    _check(in_shape, classes, activation)
    if len(in_shape) != 3:
        raise LipcertError(f"in_shape must be (channels, height, width), got {in_shape}")
    layers: list[nn.Module] = []
    shape: tuple[int, ...] = in_shape
    for i, (channels, kernel, stride, padding) in enumerate(convolutions, start=1):
        if min(shape[1:]) + 2 * padding < kernel:
            raise LipcertError(
                f"in_shape {in_shape} is too small: convolution {i} with a {kernel}x{kernel} "
                f"kernel gets maps of {shape[1]}x{shape[2]}; use larger images or another net"
            )
        layers += [nn.Conv2d(shape[0], channels, kernel, stride, padding), activation()]
        shape = _output_shape(layers[-2:], shape)
    layers.append(nn.Flatten())
    return nn.Sequential(*layers, *_dense(math.prod(shape), widths, classes, activation))


def _dense(
    features: int, widths: Sequence[int], classes: int, activation: Callable[[], nn.Module]
) -> list[nn.Module]:
    """Dense layers of the given widths, each followed by the activation, and the last layer."""
    if min(widths, default=1) < 1:
        raise LipcertError(f"every width of a dense layer must be >= 1, got {tuple(widths)}")
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(features, width), activation()]
        (features,) = _output_shape(layers[-2:], (features,))
    return [*layers, nn.Linear(features, classes)]


def _output_shape(layers: Sequence[nn.Module], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one output, found by running the layers, so that a misfit shows at construction."""
    with torch.no_grad():
        try:
            return tuple(nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1:])
        except LipcertError as error:
            raise LipcertError(f"{layers[-1]} cannot follow {layers[0]}: {error}") from error


def _check(in_shape: tuple[int, ...], classes: int, activation: Callable[[], nn.Module]) -> None:
    if min(in_shape, default=0) < 1:
        raise LipcertError(f"in_shape must hold positive sizes, got {in_shape}")
    if classes < 2:
        raise LipcertError(f"a classifier needs at least 2 classes, got {classes}")
    if isinstance(activation, nn.Module):
        raise LipcertError(
            f"activation must make a new layer at every call, got the layer {activation}: pass its "
            "class, or a function without arguments"
        )
