"""The wide residual network of LMT, with its two streams."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lipcert.errors import LipcertError
from lipcert.layers import ConvexSum, ScaledConv2d

EPS = 2e-5
"""Added to every variance, as in the code of LMT's authors."""


class WideBlock(nn.Module):
    """One block on two streams, the raw sum h and the normalised b.

    It computes

        a = conv2(dropout(relu(norm1(conv1(b)))))
        h' = a + shortcut,  b' = relu(norm2(h'))

    The shortcut is h itself, or a 1 x 1 convolution of b where the shape changes.

    Args:
        inputs: Channels of both streams.
        outputs: Channels of both results.
        stride: Of the first convolution and of the shortcut.
        dropout: Probability, in training.
        average: Halve the shortcut by average pooling instead of a strided convolution.
        norm: Makes the normalisation of a number of channels.
        parseval: Scaled convolutions, and a convex sum in place of the plain one.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        dropout: float,
        average: bool,
        norm: Callable[[int], nn.Module],
        parseval: bool,
    ):
        super().__init__()
        convolution = ScaledConv2d if parseval else nn.Conv2d
        self.join = ConvexSum() if parseval else None
        self.conv1 = convolution(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = convolution(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut: nn.Module | None = None
        if inputs != outputs:
            pool = average and stride > 1
            narrow = convolution(inputs, outputs, 1, 1 if pool else stride, bias=False)
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride), narrow) if pool else narrow

    def forward(self, h, b):  # no annotations: tracing calls it with stand-ins for tensors
        """The next pair of streams, each `(n, outputs, height / stride, width / stride)`."""
        a = self.conv2(self.dropout(F.relu(self.norm1(self.conv1(b)))))
        kept = h if self.shortcut is None else self.shortcut(b)
        h = a + kept if self.join is None else self.join(a, kept)
        return h, F.relu(self.norm2(h))


class WideResNet(nn.Module):
    """WRN-16-4 in the form of LMT.

    A stem (convolution and norm, no ReLU), 3 groups of 2 blocks, average pool, dense layer. Widths
    64, 128, 256, strides 1, 2, 2; convolutions have no bias. 2 748 890 parameters for (3, 32, 32)
    and 10 classes.

    Args:
        in_shape: (channels, height, width); height and width multiples of 4.
        classes: Number of logits.
        widen: Factor on the widths 16, 32, 64.
        blocks: Blocks a group: 6 blocks + 4 layers in all.
        dropout: Probability, in training.
        average: The variant whose strided shortcuts are average pools and 1 x 1 convolutions.
        norm: The class of its normalisations.
        parseval: With the changes of Parseval networks: every convolution is divided by the root of
            its kernel's size, and residual sums are convex ones.

    Raises:
        LipcertError: The image is too small or does not halve twice.

    Reference: arXiv 1802.04034, experiments on SVHN; arXiv 1605.07146 (wide residual networks).
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        widen: int = 4,
        blocks: int = 2,
        dropout: float = 0.4,
        average: bool = False,
        norm: type[nn.BatchNorm2d] = nn.BatchNorm2d,
        parseval: bool = False,
    ):
        super().__init__()
        normalise = partial(norm, eps=EPS)
        channels, height, width = in_shape
        if height % 4 or width % 4:
            raise LipcertError(f"in_shape {in_shape}: height and width must be multiples of 4")
        self.stem = (ScaledConv2d if parseval else nn.Conv2d)(channels, 16, 3, 1, 1, bias=False)
        self.norm = normalise(16)
        layers, inputs = [], 16
        for outputs, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            for place in range(blocks):
                step = stride if place == 0 else 1
                layers.append(
                    WideBlock(inputs, outputs, step, dropout, average, normalise, parseval)
                )
                inputs = outputs
        self.blocks = nn.ModuleList(layers)
        self.pool = nn.AvgPool2d((height // 4, width // 4))
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x):  # as above
        """Logits `(n, classes)` of images `(n, *in_shape)`."""
        h = b = self.norm(self.stem(x))
        for block in self.blocks:
            h, b = block(h, b)
        return self.head(torch.flatten(self.pool(b), 1))
