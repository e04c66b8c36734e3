"""Small networks shared by the tests: three classes each, every op family of the rules in one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from lipcert.layers import MaxMin, Normalize


@dataclass(frozen=True)
class Net:
    """How to make a network, and the shape of one input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def build(self, seed: int = 0) -> nn.Module:
        """In eval mode, with weights, slopes and running statistics from the seed."""
        torch.manual_seed(seed)
        net = self.make()
        for module in net.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2)
                if module.affine:
                    nn.init.normal_(module.weight)
                    nn.init.normal_(module.bias)
            if isinstance(module, nn.PReLU):
                nn.init.uniform_(module.weight, -2, 2)
        return net.eval()


class ResNet(nn.Module):
    """Blocks with BatchNorm, functional calls, += and a strided shortcut."""

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.shortcut = None
            if stride != 1:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x):
            out = F.relu(self.bn1(self.conv1(x)), inplace=True)
            out = self.bn2(self.conv2(out))
            out += x if self.shortcut is None else self.shortcut(x)
            return out.relu_()

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.blocks = nn.ModuleList([self.Block(3, 3, 1), self.Block(3, 4, 2)])
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({f"conv{i}": nn.Conv2d(2 + i, 1, 3, padding=1) for i in (0, 1)})
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        features = [x]
        for layer in self.layers.values():
            features.append(layer(F.relu(torch.cat(features, 1))))
        x = F.avg_pool2d(self.norm(torch.cat(features, dim=1)), 2)
        return self.head(x.view(x.size(0), -1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv1d(2, 4, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose1d(4, 2, 4, stride=2, padding=1)
        self.smooth = nn.Upsample(scale_factor=2, mode="linear")
        self.head = nn.Conv1d(8, 3, 3, padding="same")

    def forward(self, x):
        low = F.silu(self.down(x))
        x = torch.cat([x, self.up(low), self.smooth(low)], 1)
        return self.head(F.softplus(x)).mean(-1)


class HandMade(nn.Module):
    """Parameters and buffers used directly, shapes unpacked, a module used twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(8))
        self.twice = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        b, c, h, w = x.shape
        x = self.scale * x.abs()
        x = x.permute(0, 2, 3, 1).reshape(b, h * w * c)[:, :8]
        x = F.linear(x, self.weight, self.shift).clamp(-1, 1)
        x = self.twice(torch.tanh(self.twice(self.drop(x)) - self.shift / 2))
        return self.head(x @ self.weight.t())


class MaxMinByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        a, b = self.first(x).chunk(2, dim=1)
        return self.last(torch.cat([torch.max(a, b), torch.min(a, b)], 1))


class Branches(nn.Module):
    """Branches that meet in a sum, a maximum and a residual; the tail is a sum of affine maps."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 4)
        self.mix = nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x):
        left, right = F.gelu(self.left(x)), torch.sigmoid(self.right(x))
        top = torch.maximum(left, right)
        top = top + 0.5 * self.mix(top)
        return self.heads[0](left) + self.heads[1](right) - 2 * self.heads[2](F.elu(top))


class OwnConv(nn.Conv2d):
    """A layer that calls its parent's weights in a forward of its own."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 2 * self.weight, self.bias)


NETS = {
    "linear": Net(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), (2, 3)),
    "deep linear": Net(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (2, 4, 4),
    ),
    "mlp": Net(
        lambda: nn.Sequential(
            nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3)
        ),
        (6,),
    ),
    "zero weights": Net(
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3).apply(lambda m: m.weight.data.zero_())
        ),
        (4,),
    ),
    "conv": Net(
        lambda: nn.Sequential(
            Normalize([0.4, 0.5], [0.25, 0.5]),
            nn.Conv2d(2, 4, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, groups=2, dilation=2, padding=2, padding_mode="circular"),
            nn.PReLU(4),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        (2, 6, 6),
    ),
    "own conv": Net(
        lambda: nn.Sequential(
            OwnConv(2, 3, 3), nn.Hardswish(), OwnConv(3, 2, 3), nn.Flatten(), nn.Linear(32, 3)
        ),
        (2, 4, 4),
    ),
    "conv 1d": Net(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 5, stride=2, padding=2),
            nn.BatchNorm1d(4),
            nn.GELU(approximate="tanh"),
            nn.MaxPool1d(3, 1),
            nn.Flatten(),
            nn.Linear(8, 3),
            nn.BatchNorm1d(3),
        ),
        (2, 8),
    ),
    "conv 3d": Net(
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2), nn.Mish(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(2, 3)
        ),
        (1, 3, 3, 3),
    ),
    "pools": Net(
        lambda: nn.Sequential(
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(1, 4, 3, padding=1, padding_mode="replicate"),
            MaxMin(),
            nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
            nn.AdaptiveMaxPool2d((2, 1)),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
        (1, 7, 7),
    ),
    "parametrized": Net(
        lambda: nn.Sequential(
            orthogonal(nn.Linear(6, 6)), MaxMin(), spectral_norm(nn.Linear(6, 3)), nn.SELU()
        ),
        (6,),
    ),
    "resnet": Net(ResNet, (2, 4, 4)),
    "densenet": Net(DenseNet, (2, 4, 4)),
    "unet": Net(UNet, (2, 8)),
    "hand-made": Net(HandMade, (4, 2, 1)),
    "maxmin by hand": Net(MaxMinByHand, (5,)),
    "branches": Net(Branches, (5,)),
}
