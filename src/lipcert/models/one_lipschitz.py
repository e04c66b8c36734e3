"""Networks of layers that are 1-Lipschitz by construction, or nearly so, on pixels in [0, 1].

All take images of any size that their strides divide and are plain `nn.Sequential` models.
Parameter counts in the docstrings are for (3, 32, 32).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lipcert.errors import LipcertError
from lipcert.layers import (
    AOLLinear,
    BjorckConv2d,
    CholeskyLinear,
    CPLConv2d,
    CPLLinear,
    FitChannels,
    Householder,
    LastLayerNormalized,
    LinearResidualConv2d,
    MaxMin,
    SLLConv2d,
    SLLLinear,
    SOCConv2d,
)

Image = tuple[int, int, int]
Head = Callable[[int, int], nn.Module]
_POOL = 4


@dataclass(frozen=True)
class PotentialSize:
    """Size of a network of convex potential layers.

    Attributes:
        depth: Convolutional layers.
        channels: Of each of them.
        dense: Dense layers after the pooling.
        width: Hidden units of each of these.
    """

    depth: int
    channels: int
    dense: int
    width: int = 2048

    def __post_init__(self) -> None:
        if min(self.depth, self.channels, self.dense, self.width) < 1:
            raise LipcertError(f"{self}: all sizes must be >= 1")


SMALL = PotentialSize(20, 45, 7)
MEDIUM = PotentialSize(30, 60, 10)
LARGE = PotentialSize(50, 90, 10)
XLARGE = PotentialSize(70, 120, 15)


def sll_net(
    in_shape: Image, classes: int, size: PotentialSize = SMALL, head: Head = nn.Linear
) -> nn.Sequential:
    """The network of SLL: residual layers with closed-form weights, on zero-padded channels.

    Channels of zeros, `size.depth` convolutions (5x5, padding 1 before and after, as published),
    average pooling of 4 x 4 scaled to norm 1, `size.dense` dense layers, a dense last layer. For
    100 classes 42.6, 81.8, 128.7 and 262.0 million parameters for `SMALL` to `XLARGE`.

    Args:
        in_shape: (channels, height, width) of one input; the sides are multiples of 4.
        classes: Number of logits.
        size: `SMALL`, `MEDIUM`, `LARGE`, `XLARGE`, or another.
        head: Makes the last layer from the numbers of features and classes.

    Raises:
        LipcertError: A size does not fit.

    Reference: arXiv 2303.03169 (SLL).
    """
    features = _pooled(in_shape, classes, size.channels)
    return nn.Sequential(
        FitChannels(size.channels),
        *(SLLConv2d(size.channels, kernel_size=5) for _ in range(size.depth)),
        nn.AvgPool2d(_POOL, divisor_override=_POOL),
        nn.Flatten(),
        *(SLLLinear(features, size.width) for _ in range(size.dense)),
        head(features, classes),
    )


def cpl_net(
    in_shape: Image, classes: int, size: PotentialSize = SMALL, head: Head = nn.Linear
) -> nn.Sequential:
    """The network of CPL: as `sll_net`, each layer divided by an iterated norm.

    Of the published XL network the hidden width of the dense layers is 4096:
    `dataclasses.replace(XLARGE, width=4096)`.

    Args:
        in_shape: (channels, height, width) of one input; the sides are multiples of 4.
        classes: Number of logits.
        size: `SMALL`, `MEDIUM`, `LARGE`, `XLARGE`, or another.
        head: Makes the last layer from the numbers of features and classes.

    Raises:
        LipcertError: A size does not fit.

    Reference: arXiv 2110.12690 (CPL).
    """
    features, sides = _pooled(in_shape, classes, size.channels), in_shape[1:]
    return nn.Sequential(
        FitChannels(size.channels),
        *(CPLConv2d(size.channels, sides, kernel_size=5) for _ in range(size.depth)),
        nn.AvgPool2d(_POOL, divisor_override=_POOL),
        nn.Flatten(),
        *(CPLLinear(features, size.width) for _ in range(size.dense)),
        head(features, classes),
    )


def lipconvnet(
    in_shape: Image,
    classes: int,
    blocks: int = 1,
    channels: int = 32,
    stages: int = 5,
    head: Head = nn.Linear,
) -> nn.Sequential:
    """LipConvNet-(stages * blocks): orthogonal convolutions by exponentials, Householder pairs.

    Each stage has blocks - 1 convolutions that keep the width, then one with stride 2 that doubles
    it. Kernels are 3x3, in the last strided one 1x1. 16 722 948 parameters for 100 classes.

    Args:
        in_shape: (channels, height, width) of one input; the sides are multiples of 2^stages.
        classes: Number of logits.
        blocks: Convolutions a stage.
        channels: Width of the first stage.
        stages: How often the sides are halved.
        head: Makes the last layer from the numbers of features and classes.

    Raises:
        LipcertError: A size does not fit.

    Reference: arXiv 2105.11417 (SOC), arXiv 2108.04062 (Householder activations).
    """
    if min(blocks, channels, stages) < 1:
        raise LipcertError(
            f"lipconvnet: blocks={blocks}, channels={channels}, stages={stages}: all >= 1"
        )
    _check(in_shape, classes, 2**stages)
    layers: list[nn.Module] = []
    width = in_shape[0]
    for stage in range(stages):
        for _ in range(blocks - 1):
            layers += [SOCConv2d(width, channels), Householder(channels)]
            width = channels
        kernel = 1 if stage == stages - 1 else 3
        channels *= 2
        layers += [SOCConv2d(width, channels, kernel, stride=2), Householder(channels)]
        width = channels
    features = width * math.prod(side // 2**stages for side in in_shape[1:])
    return nn.Sequential(*layers, nn.Flatten(), head(features, classes))


def liresnet(
    in_shape: Image, classes: int, depth: int = 12, width: int = 128, dense: int = 2
) -> nn.Sequential:
    """LiResNet: linear residual convolutions with MaxMin, then orthogonal layers.

    A 5x5 stem with stride 2, `depth` linear residual convolutions (3x3), an orthogonal 4x4
    convolution with stride 4, `dense` orthogonal layers of 4 * width units, a last layer with rows
    of norm 1; 3 361 418 parameters for 10 classes. The published networks have a width of 512 and 8
    dense layers of 2048 units. The stem and the residual layers are not 1-Lipschitz: a bound
    measures them.

    Args:
        in_shape: (channels, height, width) of one input; the sides are multiples of 8.
        classes: Number of logits.
        depth: Residual layers.
        width: Channels of each.
        dense: Dense layers.

    Raises:
        LipcertError: A size does not fit.

    Reference: arXiv 2301.12549 (LiResNet).
    """
    _check(in_shape, classes, 8)
    layers: list[nn.Module] = [nn.Conv2d(in_shape[0], width, 5, stride=2, padding=2), MaxMin()]
    for _ in range(depth):
        layers += [LinearResidualConv2d(width, depth), MaxMin()]
    layers += [BjorckConv2d(width, width, 4, stride=4), MaxMin(), nn.Flatten()]
    features = width * math.prod(side // 8 for side in in_shape[1:])
    for _ in range(dense):
        layers += [CholeskyLinear(features, 4 * width), MaxMin()]
        features = 4 * width
    return nn.Sequential(*layers, LastLayerNormalized(features, classes))


def aol_mlp(
    in_shape: tuple[int, ...], classes: int, depth: int = 8, width: int = 1024
) -> nn.Sequential:
    """A dense network of almost orthogonal layers with MaxMin; the last layer is one of them.

    10 504 202 parameters for 10 classes.

    Args:
        in_shape: Shape of one input, of any length.
        classes: Number of logits.
        depth: Hidden layers.
        width: Units of each.

    Raises:
        LipcertError: A size is not positive.

    Reference: arXiv 2208.03160 (AOL); a dense one of 16 x 3072 in later work of the same group.
    """
    if min(classes - 1, depth, width, *in_shape) < 1:
        raise LipcertError(
            f"aol_mlp: {in_shape=}, {classes=}, {depth=}, {width=}: all must be positive"
        )
    features, layers = math.prod(in_shape), list[nn.Module]()
    for _ in range(depth):
        layers += [AOLLinear(features, width), MaxMin()]
        features = width
    return nn.Sequential(nn.Flatten(), *layers, AOLLinear(features, classes))


def first_features(features: int, classes: int) -> nn.Module:
    """A head without weights: the first features are the logits."""
    return FitChannels(classes)


def _pooled(in_shape: Image, classes: int, channels: int) -> int:
    """Features after the pooling of a potential net."""
    _check(in_shape, classes, _POOL)
    if channels < in_shape[0]:
        raise LipcertError(f"{channels} channels are fewer than the input's {in_shape[0]}")
    return channels * math.prod(side // _POOL for side in in_shape[1:])


def _check(in_shape: tuple[int, ...], classes: int, divisor: int) -> None:
    if len(in_shape) != 3 or min(in_shape) < 1 or any(side % divisor for side in in_shape[1:]):
        raise LipcertError(
            f"in_shape must be (channels, height, width) with sides that are multiples of "
            f"{divisor}, got {in_shape}"
        )
    if classes < 2:
        raise LipcertError(f"a classifier needs at least 2 classes, got {classes}")
