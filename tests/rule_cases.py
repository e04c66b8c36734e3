"""One row for every way in which a rule is reached; tests/test_rules.py says what must hold."""

import torch
import torch.nn.functional as F
from torch import nn

from lipcert.layers import (
    AOLConv2d,
    AOLLinear,
    BatchCentering,
    BjorckConv2d,
    BjorckLinear,
    CholeskyLinear,
    ClippedMaxMin,
    ClippedReLU,
    CPLConv2d,
    CPLLinear,
    FitChannels,
    GroupSort,
    Householder,
    Householder2,
    L2Pool2d,
    LastLayerNormalized,
    LinearResidualConv2d,
    MaxMin,
    Normalize,
    RecordingBatchNorm2d,
    SLLConv2d,
    SLLLinear,
    SOCConv2d,
)
from lipcert.normalized import LipLTNormalized
from nets import Net


class Fn(nn.Module):
    """A function of (module, x) as a network; named tensors are its parameters."""

    def __init__(self, f, **tensors):
        super().__init__()
        self.f = f
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))

    def forward(self, x):
        return self.f(self, x)


def calls(*ways, **tensors):
    """Networks that apply a function, call a method (by name) or are a module."""
    for way in ways:
        if isinstance(way, nn.Module):
            yield way
        elif isinstance(way, str):
            yield Fn(lambda s, x, way=way: getattr(x, way)())
        else:
            yield Fn(lambda s, x, way=way: way(x), **tensors)


def net(f, *shape, **tensors):
    """A row: a function of (module, x), with tensors of these shapes as parameters."""
    sizes = {k: (v,) if isinstance(v, int) else v for k, v in tensors.items()}
    return Net(lambda: Fn(f, **{k: torch.randn(size) / 2 for k, size in sizes.items()}), shape)


def layer(make, *shape):
    """A row: a module."""
    return Net(lambda: nn.Sequential(make()), shape)


# Elementwise functions, by their name in tests/golden/activation_constants.json, with their forms.
ELEMENTWISE = {
    "relu": (nn.ReLU(), F.relu, torch.relu, torch.relu_, "relu", "relu_"),
    "leaky_relu(0.01)": (nn.LeakyReLU(), F.leaky_relu, F.leaky_relu_),
    "leaky_relu(1.5)": (nn.LeakyReLU(1.5), nn.RReLU(1, 2), nn.PReLU(1, 1.5)),
    "leaky_relu(-2)": (nn.LeakyReLU(-2), nn.RReLU(-3, -1), nn.PReLU(1, -2)),
    "elu(1)": (nn.ELU(), F.elu, F.elu_),
    "elu(2.5)": (nn.ELU(2.5), lambda x: F.elu(x, alpha=2.5)),
    "selu": (nn.SELU(), F.selu),
    "celu(1)": (nn.CELU(), F.celu),
    "celu(3)": (nn.CELU(3), lambda x: F.celu(x, 3)),
    "gelu(none)": (nn.GELU(), F.gelu),
    "gelu(tanh)": (nn.GELU("tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (nn.SiLU(), F.silu),
    "mish": (nn.Mish(), F.mish),
    "softplus(1)": (nn.Softplus(), F.softplus),
    "softplus(beta=5)": (nn.Softplus(5), lambda x: F.softplus(x, beta=5)),
    "logsigmoid": (nn.LogSigmoid(), F.logsigmoid),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"),
    "tanh": (nn.Tanh(), torch.tanh, F.tanh, "tanh", "tanh_"),
    "hardtanh": (nn.Hardtanh(), F.hardtanh, F.hardtanh_, lambda x: x.clamp_(-1, 1)),
    "relu6": (nn.ReLU6(), F.relu6, lambda x: torch.clip(x, 0, max=6), lambda x: x.clip_(0, 6)),
    "hardswish": (nn.Hardswish(), F.hardswish),
    "hardsigmoid": (nn.Hardsigmoid(), F.hardsigmoid),
    "softsign": (nn.Softsign(), F.softsign),
    "tanhshrink": (nn.Tanhshrink(), F.tanhshrink),
    "softshrink": (nn.Softshrink(), F.softshrink),
    "abs": (torch.abs, "abs", "abs_"),
    "sin": (torch.sin, "sin"),
    "cos": (torch.cos, "cos"),
    "atan": (torch.atan, "atan"),
    "erf": (torch.erf, "erf"),
    "asinh": (torch.asinh, "asinh"),
    "clamp(-.3,.7)": (
        nn.Hardtanh(-0.3, 0.7),
        lambda x: torch.clamp(x, -0.3, 0.7),
        lambda x: x.clamp(min=-0.3, max=0.7),
        lambda x: x.clip(-0.3, 0.7),
    ),
}
# Others, without a reference number: the function and its largest slope.
MORE_ELEMENTWISE = {
    "prelu function": (Fn(lambda s, x: F.prelu(x, s.w), w=torch.tensor([-1.5])), 1.5),
    "softshrink(2)": (nn.Softshrink(2.0), 1.0),
    "celu(0.2)": (nn.CELU(0.2), 1.0),
    "elu(-2)": (nn.ELU(-2.0), 2.0),
    "relu from 1": (Fn(lambda s, x: torch.clamp_min(x, 1)), 1.0),
    "below 1": (Fn(lambda s, x: torch.clamp_max(x, 1)), 1.0),
    "clamp_min": (Fn(lambda s, x: x.clamp_min(-2)), 1.0),
    "clamp_max": (Fn(lambda s, x: x.clamp_max(-2)), 1.0),
    "clamp_min_": (Fn(lambda s, x: x.clamp_min_(0.5)), 1.0),
    "clamp_max_": (Fn(lambda s, x: x.clamp_max_(0.5)), 1.0),
    "one-sided clamp": (Fn(lambda s, x: x.clamp(max=2)), 1.0),
    "constant clamp": (Fn(lambda s, x: x.clamp(2, 2)), 0.0),
}


# Linear functions with a bias: the whole network is one matrix.
AFFINE = {
    "Linear": layer(lambda: nn.Linear(5, 4), 5),
    "Linear on the last axis": layer(lambda: nn.Linear(5, 4, bias=False), 3, 2, 5),
    "LipLTNormalized": layer(lambda: LipLTNormalized(nn.Linear(5, 4), 2.0), 5),
    "F.linear": net(lambda s, x: F.linear(x, s.w, s.b), 3, 5, w=(4, 5), b=4),
    "F.linear without bias": net(lambda s, x: F.linear(x, weight=s.w), 5, w=(4, 5)),
    "x @ W": net(lambda s, x: x @ s.w, 3, 5, w=(5, 4)),
    "torch.matmul": net(lambda s, x: torch.matmul(x, s.w.t()), 5, w=(4, 5)),
    "x.matmul": net(lambda s, x: x.matmul(s.w), 5, w=(5, 4)),
    "Conv1d": layer(lambda: nn.Conv1d(2, 3, 4, 3, 2), 2, 7),
    "Conv2d": layer(lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0)), 2, 5, 4),
    "Conv2d grouped": layer(lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), 4, 3, 4),
    "Conv2d dilated": layer(lambda: nn.Conv2d(1, 2, 2, dilation=(2, 3), padding="valid"), 1, 4, 5),
    "Conv2d same": layer(lambda: nn.Conv2d(2, 2, (4, 3), padding="same"), 2, 5, 4),
    "Conv2d same circular": layer(
        lambda: nn.Conv2d(2, 2, 4, padding="same", padding_mode="circular"), 2, 5, 5
    ),
    "Conv2d circulant": layer(
        lambda: nn.Conv2d(2, 3, 3, (2, 1), 1, padding_mode="circular"), 2, 4, 5
    ),
    "Conv2d not circulant": layer(
        lambda: nn.Conv2d(1, 2, 3, 2, 2, padding_mode="circular"), 1, 5, 5
    ),
    "Conv2d circular with a remainder": layer(
        lambda: nn.Conv2d(2, 1, 3, 2, 1, padding_mode="circular"), 2, 5, 4
    ),
    "Conv1d circular and longer": layer(
        lambda: nn.Conv1d(1, 2, 3, padding=2, padding_mode="circular"), 1, 4
    ),
    "Conv2d reflect": layer(
        lambda: nn.Conv2d(1, 2, 3, padding=(1, 2), padding_mode="reflect"), 1, 4, 5
    ),
    "Conv1d replicate": layer(
        lambda: nn.Conv1d(2, 2, 3, padding=2, padding_mode="replicate"), 2, 4
    ),
    "Conv3d": layer(lambda: nn.Conv3d(1, 2, 2, padding=1), 1, 2, 3, 2),
    "F.conv1d": net(lambda s, x: F.conv1d(x, s.w, s.b, 2, padding=1), 2, 5, w=(3, 2, 3), b=3),
    "F.conv2d": net(lambda s, x: F.conv2d(x, s.w, padding="same"), 2, 3, 4, w=(3, 2, 2, 3)),
    "F.conv2d with a list": net(lambda s, x: F.conv2d(x, s.w, None, [2]), 1, 5, 4, w=(2, 1, 2, 3)),
    "F.conv3d": net(lambda s, x: F.conv3d(x, s.w, groups=2), 2, 2, 3, 2, w=(2, 1, 2, 2, 2)),
    "ConvTranspose1d": layer(lambda: nn.ConvTranspose1d(2, 3, 4, 3, 1, 2), 2, 4),
    "ConvTranspose2d": layer(
        lambda: nn.ConvTranspose2d(4, 2, 3, 2, 1, 1, groups=2, dilation=2), 4, 3, 2
    ),
    "ConvTranspose3d": layer(lambda: nn.ConvTranspose3d(1, 2, 2, bias=False), 1, 2, 2, 3),
    "F.conv_transpose1d": net(
        lambda s, x: F.conv_transpose1d(x, s.w, s.b, 2), 2, 3, w=(2, 3, 3), b=3
    ),
    "F.conv_transpose2d": net(
        lambda s, x: F.conv_transpose2d(x, s.w, stride=(1, 2), output_padding=(0, 1)),
        *(2, 3, 2),
        w=(2, 1, 3, 2),
    ),
    "F.conv_transpose3d": net(
        lambda s, x: F.conv_transpose3d(x, s.w), *(1, 2, 2, 2), w=(1, 2, 2, 1, 2)
    ),
    "BatchNorm1d": layer(lambda: nn.BatchNorm1d(4), 4),
    "BatchNorm1d on sequences": layer(lambda: nn.BatchNorm1d(4, affine=False), 4, 3),
    "BatchNorm2d": layer(lambda: nn.BatchNorm2d(4, eps=0.1), 4, 3, 2),
    "BatchNorm3d": layer(lambda: nn.BatchNorm3d(2), 2, 1, 3, 2),
    "RecordingBatchNorm2d": layer(lambda: RecordingBatchNorm2d(4, eps=0.1), 4, 3, 2),
    "F.batch_norm": net(
        lambda s, x: F.batch_norm(
            x, s.m.detach(), s.v.detach().square(), s.w, training=s.training, eps=0.01
        ),
        *(3, 2),
        m=3,
        v=3,
        w=3,
    ),
    "Normalize": layer(lambda: Normalize([0.5, 0.1], [0.25, 2]), 2, 3, 2),
    "AOLLinear": layer(lambda: AOLLinear(5, 4), 5),
    "AOLLinear on the last axis": layer(lambda: AOLLinear(3, 5, bias=False), 2, 3),
    "AOLConv2d": layer(lambda: AOLConv2d(2, 3, 3, stride=2, padding=1), 2, 5, 4),
    "AOLConv2d without a bias": layer(lambda: AOLConv2d(2, 3, 2, bias=False), 2, 3, 4),
    "BjorckLinear": layer(lambda: BjorckLinear(5, 4), 5),
    "BjorckLinear on the last axis": layer(lambda: BjorckLinear(3, 5, bias=False), 2, 3),
    "BjorckConv2d": layer(lambda: BjorckConv2d(2, 3, 3, stride=2, padding=1), 2, 5, 4),
    "BjorckConv2d without a bias": layer(lambda: BjorckConv2d(2, 3, 2, bias=False), 2, 3, 4),
    "CholeskyLinear": layer(lambda: CholeskyLinear(5, 4), 5),
    "SOCConv2d": layer(lambda: SOCConv2d(2, 8, 1, stride=2), 2, 4, 6),
    "SOCConv2d without a bias": layer(lambda: SOCConv2d(3, 3, 1, bias=False), 3, 2, 3),
    "LastLayerNormalized": layer(lambda: LastLayerNormalized(5, 4), 5),
    "LinearResidualConv2d": layer(lambda: LinearResidualConv2d(2, 4), 2, 4, 3),
    "LinearResidualConv2d of size 1": layer(
        lambda: LinearResidualConv2d(3, 2, 1, bias=False), 3, 2, 2
    ),
    "BatchCentering": layer(lambda: BatchCentering(3), 3, 2),
    "FitChannels more": layer(lambda: FitChannels(4), 3, 2, 2),
    "FitChannels fewer": layer(lambda: FitChannels(2), 5),
    "AvgPool1d": layer(lambda: nn.AvgPool1d(3, 2, 1), 2, 6),
    "AvgPool2d": layer(lambda: nn.AvgPool2d((2, 3), padding=(1, 0)), 2, 4, 5),
    "AvgPool2d without channels": layer(lambda: nn.AvgPool2d(3, 1, 1), 4, 4),
    "AvgPool2d ceil": layer(lambda: nn.AvgPool2d(2, ceil_mode=True), 1, 5, 3),
    "AvgPool2d own count": layer(
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), 1, 6, 5
    ),
    "AvgPool2d divisor": layer(lambda: nn.AvgPool2d(2, 1, divisor_override=3), 1, 3, 4),
    "AvgPool3d": layer(lambda: nn.AvgPool3d(2, 1, divisor_override=5), 2, 2, 3, 4),
    "F.avg_pool1d": net(lambda s, x: F.avg_pool1d(x, 2), 2, 5),
    "F.avg_pool2d": net(lambda s, x: F.avg_pool2d(x, 3, padding=1, ceil_mode=True), 1, 5, 6),
    "F.avg_pool3d": net(lambda s, x: F.avg_pool3d(x, (1, 2, 2), stride=(1, 2, 1)), 1, 2, 4, 3),
    "AdaptiveAvgPool1d": layer(lambda: nn.AdaptiveAvgPool1d(3), 2, 7),
    "AdaptiveAvgPool2d": layer(lambda: nn.AdaptiveAvgPool2d((None, 2)), 2, 3, 5),
    "AdaptiveAvgPool3d": layer(lambda: nn.AdaptiveAvgPool3d(2), 1, 3, 2, 5),
    "F.adaptive_avg_pool1d": net(lambda s, x: F.adaptive_avg_pool1d(x, 1), 2, 4),
    "F.adaptive_avg_pool2d": net(lambda s, x: F.adaptive_avg_pool2d(x, (2, 2)), 1, 5, 4),
    "F.adaptive_avg_pool3d": net(lambda s, x: F.adaptive_avg_pool3d(x, (1, None, 2)), 1, 2, 3, 3),
    "nearest": net(lambda s, x: F.interpolate(x, scale_factor=2), 2, 3, 2),
    "nearest-exact": net(lambda s, x: F.interpolate(x, size=5, mode="nearest-exact"), 2, 3),
    "linear": net(lambda s, x: F.interpolate(x, 7, mode="linear", align_corners=True), 2, 3),
    "bilinear": net(lambda s, x: F.interpolate(x, (3, 7), mode="bilinear"), 1, 5, 4),
    "bilinear by a fraction": net(
        lambda s, x: F.interpolate(
            x, scale_factor=(1.7, 0.6), mode="bilinear", recompute_scale_factor=True
        ),
        *(1, 5, 4),
    ),
    "bilinear antialiased": net(
        lambda s, x: F.interpolate(x, (2, 3), mode="bilinear", antialias=True), 1, 5, 4
    ),
    "bicubic": net(lambda s, x: F.interpolate(x, scale_factor=2, mode="bicubic"), 1, 4, 3),
    "trilinear": net(
        lambda s, x: F.interpolate(x, (3, 2, 5), mode="trilinear", align_corners=True), 1, 2, 3, 3
    ),
    "area": net(lambda s, x: F.interpolate(x, (3, 2), mode="area"), 1, 5, 4),
    "Upsample": layer(lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"), 1, 4, 3),
    "Upsample recomputed": layer(
        lambda: nn.Upsample(scale_factor=1.5, mode="linear", recompute_scale_factor=True), 1, 3
    ),
    "UpsamplingNearest2d": layer(lambda: nn.UpsamplingNearest2d(5), 1, 2, 3),
    "UpsamplingBilinear2d": layer(lambda: nn.UpsamplingBilinear2d(scale_factor=2), 1, 2, 3),
    "torch.mean": net(lambda s, x: torch.mean(x, (2, 3)), 2, 3, 2),
    "x.mean": net(lambda s, x: x.mean(dim=-1, keepdim=True), 2, 3, 2),
    "torch.sum": net(lambda s, x: torch.sum(x, 1), 2, 3),
    "x.sum": net(lambda s, x: x.sum([1, -1]), 2, 3, 2),
    "F.pad": net(lambda s, x: F.pad(x, (1, 2, 0, 1)), 2, 3, 2),
    "F.pad with a value": net(lambda s, x: F.pad(x, (1, 0), value=2.5), 2, 3),
    "F.pad as a crop": net(lambda s, x: F.pad(x, (-1, 1)), 2, 3),
    "F.pad reflect": net(lambda s, x: F.pad(x, (2, 1), mode="reflect"), 2, 3),
    "F.pad circular": net(lambda s, x: F.pad(x, (2, 1), "circular"), 2, 3),
    **{
        f"{kind}Pad{n}d": layer(
            lambda kind=kind, n=n: getattr(nn, f"{kind}Pad{n}d")(1), *(2, 2, 3, 2)[: n + 1]
        )
        for kind in ("Zero", "Reflection", "Replication", "Circular")
        for n in (1, 2, 3)
    },
    "Flatten": layer(nn.Flatten, 2, 3),
    "Unflatten": layer(lambda: nn.Unflatten(1, (2, 3)), 6),
    "PixelShuffle": layer(lambda: nn.PixelShuffle(2), 4, 2, 3),
    "PixelUnshuffle": layer(lambda: nn.PixelUnshuffle(2), 1, 4, 2),
    "ChannelShuffle": layer(lambda: nn.ChannelShuffle(2), 4, 2, 2),
    "Unfold": layer(lambda: nn.Unfold(2, padding=1), 2, 3, 2),
    "F.unfold": net(lambda s, x: F.unfold(x, (2, 1)), 2, 3, 2),
    "Fold": layer(lambda: nn.Fold((4, 5), (2, 3), padding=(1, 0), stride=(2, 1)), 12, 9),
    "Fold of one size": layer(lambda: nn.Fold(5, 3, stride=2), 9, 4),
    "F.fold": net(lambda s, x: F.fold(x, (5, 4), 2, dilation=(2, 1)), 8, 9),
    "F.pixel_shuffle": net(lambda s, x: F.pixel_shuffle(x, 2), 4, 2, 1),
    "F.pixel_unshuffle": net(lambda s, x: F.pixel_unshuffle(x, 2), 1, 2, 4),
    "torch.channel_shuffle": net(lambda s, x: torch.channel_shuffle(x, 3), 6, 1, 2),
    "torch.flatten": net(lambda s, x: torch.flatten(x, 1), 2, 3, 2),
    "x.flatten": net(lambda s, x: x.flatten(start_dim=2), 2, 3, 2),
    "torch.reshape": net(lambda s, x: torch.reshape(x, (len(x), -1)), 2, 3),
    "x.reshape": net(lambda s, x: x.reshape(x.shape[0], 3, 2), 2, 3),
    "x.view": net(lambda s, x: x.view(x.size(0), -1), 2, 3),
    "torch.permute": net(lambda s, x: torch.permute(x, (0, 2, 1)), 2, 3),
    "x.permute": net(lambda s, x: x.permute(0, 3, 1, 2), 2, 3, 2),
    "torch.transpose": net(lambda s, x: torch.transpose(x, 1, 2), 2, 3),
    "x.transpose": net(lambda s, x: x.transpose(-1, -2), 2, 3),
    "x.mT": net(lambda s, x: x.mT, 2, 3),
    "torch.movedim": net(lambda s, x: torch.movedim(x, 3, 1), 2, 3, 2),
    "x.movedim": net(lambda s, x: x.movedim(1, -1), 2, 3, 2),
    "torch.squeeze": net(lambda s, x: torch.squeeze(x, 2), 2, 1, 3),
    "x.squeeze": net(lambda s, x: x.squeeze(-1), 2, 3, 1),
    "torch.unsqueeze": net(lambda s, x: torch.unsqueeze(x, 1), 2, 3),
    "x.unsqueeze": net(lambda s, x: x.unsqueeze(-1), 2, 3),
    "torch.roll": net(lambda s, x: torch.roll(x, 1, 2), 2, 3),
    "x.roll": net(lambda s, x: x.roll((1, 2), (1, 2)), 2, 3),
    "torch.flip": net(lambda s, x: torch.flip(x, (1,)), 2, 3),
    "x.flip": net(lambda s, x: x.flip(1, 2), 2, 3),
    "torch.narrow": net(lambda s, x: torch.narrow(x, 1, 1, 2), 4, 2),
    "x.narrow": net(lambda s, x: x.narrow(2, 0, 1), 2, 3),
    "torch.select": net(lambda s, x: torch.select(x, 1, 1), 2, 3),
    "x.select": net(lambda s, x: x.select(2, -1), 2, 3),
    "x.expand": net(lambda s, x: x.expand(-1, 3, -1), 1, 2),
    "x.repeat": net(lambda s, x: x.repeat(1, 2, 1), 2, 3),
    "torch.repeat_interleave": net(lambda s, x: torch.repeat_interleave(x, 2, dim=1), 2, 3),
    "x.repeat_interleave": net(lambda s, x: x.repeat_interleave(3, 2), 2, 3),
    "torch.unflatten": net(lambda s, x: torch.unflatten(x, 1, (3, 2)), 6),
    "x.unflatten": net(lambda s, x: x.unflatten(2, (2, -1)), 2, 4),
    "x[...]": net(lambda s, x: x[:, 1:, ..., None, ::2], 3, 2, 5),
    "torch.chunk": net(lambda s, x: torch.cat(torch.chunk(x, 2, dim=1)[::-1], 1), 5),
    "x.chunk": net(lambda s, x: x.chunk(2, -1)[1], 2, 4),
    "torch.split": net(lambda s, x: torch.split(x, [1, 4], 1)[1], 5),
    "x.split": net(lambda s, x: x.split(2, dim=2)[0], 2, 5),
    "torch.unbind": net(lambda s, x: torch.unbind(x, 1)[1], 2, 3),
    "x.unbind": net(lambda s, x: x.unbind(-1)[0], 2, 3),
    "torch.tensor_split": net(lambda s, x: torch.tensor_split(x, 3, dim=1)[0], 5),
    "x.tensor_split": net(lambda s, x: x.tensor_split((1, 2), 1)[2], 5),
    "torch.cat": net(lambda s, x: torch.cat([x, 2 * x[:, :1]], 1), 2, 3),
    "torch.concat": net(lambda s, x: torch.concat((x, x.flip(1)), dim=-1), 2, 3),
    "torch.concatenate": net(lambda s, x: torch.concatenate([x, x], 2), 2, 3),
    "torch.stack": net(lambda s, x: torch.stack([x, -x], dim=1), 2, 3),
    "x + w": net(lambda s, x: x + s.w, 2, 3, w=3),
    "w + x": net(lambda s, x: s.w + x, 2, 3, w=(2, 1)),
    "x += 1": net(lambda s, x: _augmented(x * 1, s.w), 3, w=3),
    "torch.add": net(lambda s, x: torch.add(x, s.w, alpha=3), 3, w=(1, 3)),
    "x.add": net(lambda s, x: x.add(x, alpha=2), 3),
    "x.add_": net(lambda s, x: (2 * x).add_(1), 3),
    "x - w": net(lambda s, x: x - s.w, 3, w=3),
    "1 - x": net(lambda s, x: 1 - x, 3),
    "torch.sub": net(lambda s, x: torch.sub(2 * x, x.flip(1), alpha=0.5), 3),
    "x.sub": net(lambda s, x: x.sub(s.w, alpha=2), 3, w=3),
    "x.sub_": net(lambda s, x: (2 * x).sub_(s.w), 3, w=3),
    "torch.rsub": net(lambda s, x: torch.rsub(x, s.w), 3, w=3),
    "-x": net(lambda s, x: -x, 3),
    "torch.neg": net(lambda s, x: torch.neg(x), 3),
    "x.neg": net(lambda s, x: x.neg(), 3),
    "x * w": net(lambda s, x: x * s.w, 2, 3, w=(2, 1)),
    "2 * x": net(lambda s, x: 2 * x, 3),
    "torch.mul": net(lambda s, x: torch.mul(s.w, x), 2, 3, w=(1, 2, 3)),
    "x.mul": net(lambda s, x: x.mul(s.w), 3, w=3),
    "x.mul_": net(lambda s, x: (x + 0).mul_(s.w.exp()), 3, w=3),
    "x / w": net(lambda s, x: x / (1 + s.w.square()), 3, w=3),
    "torch.div": net(lambda s, x: torch.div(x, 3), 3),
    "x.div": net(lambda s, x: x.div(4), 3),
    "x.div_": net(lambda s, x: (x + 1).div_(4), 3),
    "torch.where of two": net(lambda s, x: torch.where(s.w > 0, x, 2 * x.flip(1)), 3, 2, w=(3, 2)),
    "torch.where of a number": net(lambda s, x: torch.where(s.w > 0, x, 2.5), 2, 3, w=3),
    "torch.where of a constant": net(
        lambda s, x: torch.where(s.w > 0, s.w, x), *(2, 3), w=(1, 2, 1)
    ),
    "torch.where of two shapes": net(
        lambda s, x: torch.where(s.w > 0, x[:, :, :1], -x), *(2, 3), w=(2, 3)
    ),
    "torch.masked_fill": net(lambda s, x: torch.masked_fill(x, s.w > 0, 2.0), *(2, 3), w=(2, 3)),
    "x.masked_fill": net(lambda s, x: x.masked_fill(s.w > 0, 0.5), 2, 3, w=3),
    "torch.tril": net(lambda s, x: torch.tril(x, 1), 2, 3, 4),
    "x.tril": net(lambda s, x: x.tril(), 3, 3),
    "torch.triu": net(lambda s, x: torch.triu(x), 3, 4),
    "x.triu": net(lambda s, x: x.triu(-1), 3, 3),
    "torch.index_select": net(
        lambda s, x: torch.index_select(x, 1, (s.w > 0).long().cumsum(0)), *(4, 2), w=3
    ),
    "x.index_select": net(lambda s, x: x.index_select(2, s.w.argsort()), 2, 3, w=3),
    "x.where": net(lambda s, x: x.where(s.w < 0, s.w), 3, w=3),
    "torch.cumsum": net(lambda s, x: torch.cumsum(x, 1), 5),
    "x.cumsum": net(lambda s, x: x.cumsum(dim=-2), 3, 2),
    "torch.diff": net(lambda s, x: torch.diff(x), 2, 4),
    "x.diff": net(lambda s, x: x.diff(2, dim=1), 4),
    "two shapes": net(lambda s, x: x[:, :1] + x, 2, 3),
    "Identity": layer(nn.Identity, 3),
    "Dropout": layer(nn.Dropout, 3),
    "Dropout1d": layer(nn.Dropout1d, 2, 3),
    "Dropout2d": layer(nn.Dropout2d, 2, 3, 2),
    "Dropout3d": layer(nn.Dropout3d, 1, 2, 3, 2),
    "AlphaDropout": layer(nn.AlphaDropout, 3),
    "F.dropout": net(lambda s, x: F.dropout(x, 0.5, s.training), 3),
    "F.dropout2d": net(lambda s, x: F.dropout2d(x, training=s.training), 2, 3, 2),
    "F.dropout3d": net(lambda s, x: F.dropout3d(x, training=False), 1, 2, 3, 2),
    "F.alpha_dropout": net(lambda s, x: F.alpha_dropout(x, training=False), 3),
    "torch.clone": net(lambda s, x: torch.clone(x), 3),
    "x.clone": net(lambda s, x: x.clone(), 3),
    "x.contiguous": net(lambda s, x: x.contiguous(), 3),
    "x.detach": net(lambda s, x: 2 * x + x.detach() * 0, 3),
    "x.requires_grad_": net(lambda s, x: (2 * x).requires_grad_(), 3),
}  # fmt: skip


def _augmented(y, w):
    y += w
    y *= 3
    y -= 1
    y /= w.exp()
    return y


# Functions with a Lipschitz constant, and the constant.
LIPSCHITZ = {
    "MaxMin": (layer(MaxMin, 4, 2), 1),
    "MaxMin of neighbours": (layer(lambda: MaxMin(adjacent=True), 4, 2), 1),
    "GroupSort": (layer(lambda: GroupSort(3), 6, 2), 1),
    "ClippedReLU": (layer(lambda: nn.Sequential(MaxMin(), ClippedReLU(0.7)), 4, 2), 1),
    "ClippedMaxMin": (layer(lambda: ClippedMaxMin(0.8, -0.6), 4, 2), 1),
    "torch.maximum": (net(lambda s, x: torch.maximum(x.sin(), -x.cos()), 3), 2**0.5),
    "x.maximum": (net(lambda s, x: x.tanh().maximum(x.erf()), 3), (1 + 4 / torch.pi) ** 0.5),
    "torch.minimum": (net(lambda s, x: torch.minimum(*x.chunk(2, 1)), 4), 1),
    "x.minimum": (net(lambda s, x: x[:, 0].minimum(x[:, 1]), 2, 3), 1),
    "torch.max": (net(lambda s, x: torch.max(x, x.flip(1)), 4), 2**0.5),
    "x.max": (net(lambda s, x: x.max(2 * x), 4), 5**0.5),
    "torch.min": (net(lambda s, x: torch.min(x, x.roll(1, 1)), 4), 2**0.5),
    "x.min": (net(lambda s, x: x.min(x.sin()), 4), 2**0.5),
    "MaxPool1d": (layer(lambda: nn.MaxPool1d(3, 1), 2, 6), 3**0.5),
    "MaxPool1d without channels": (layer(lambda: nn.MaxPool1d(2, 1, dilation=2), 6), 2**0.5),
    "MaxPool2d": (layer(lambda: nn.MaxPool2d((2, 3), (2, 1), (0, 1)), 2, 4, 4), 3**0.5),
    "MaxPool2d without channels": (layer(lambda: nn.MaxPool2d(3, 1, 1), 4, 4), 3),
    "MaxPool3d": (layer(lambda: nn.MaxPool3d(2, 1), 1, 3, 3, 3), 8**0.5),
    "F.max_pool1d": (net(lambda s, x: F.max_pool1d(x, 3, 2, ceil_mode=True), 1, 6), 2**0.5),
    "F.max_pool2d": (net(lambda s, x: F.max_pool2d(x, 2), 1, 4, 5), 1),
    "F.max_pool3d": (net(lambda s, x: F.max_pool3d(x, (1, 2, 2), 1), 1, 2, 3, 3), 2),
    "AdaptiveMaxPool1d": (layer(lambda: nn.AdaptiveMaxPool1d(3), 2, 4), 2**0.5),
    "AdaptiveMaxPool2d": (layer(lambda: nn.AdaptiveMaxPool2d((None, 1)), 1, 3, 4), 1),
    "AdaptiveMaxPool3d": (layer(lambda: nn.AdaptiveMaxPool3d(2), 1, 3, 2, 3), 2),
    "F.adaptive_max_pool1d": (net(lambda s, x: F.adaptive_max_pool1d(x, 2), 1, 5), 2**0.5),
    "F.adaptive_max_pool2d": (net(lambda s, x: F.adaptive_max_pool2d(x, (2, 3)), 1, 3, 5), 2),
    "F.adaptive_max_pool3d": (net(lambda s, x: F.adaptive_max_pool3d(x, 1), 1, 2, 2, 2), 1),
}  # fmt: skip


def turned(module):
    """The activation with one angle in each half of the circle."""
    module.angle.data = torch.tensor([0.7, -2.2])
    return module


# Functions of vectors with their constants; first those that rise with every input.
RISING = {
    "torch.logsumexp": (net(lambda s, x: torch.logsumexp(x, 1), 4), 1),
    "x.logsumexp": (net(lambda s, x: x.logsumexp((1, 2), keepdim=True), 2, 3), 1),
    "torch.amax": (net(lambda s, x: torch.amax(x, -1), 2, 3), 1),
    "x.amax": (net(lambda s, x: x.amax((1, 2)), 2, 3), 1),
    "torch.amin": (net(lambda s, x: torch.amin(x, 1, True), 2, 3), 1),
    "x.amin": (net(lambda s, x: x.amin(dim=-1), 3), 1),
    "torch.sort": (net(lambda s, x: torch.sort(x, 1, descending=True)[0], 4, 2), 1),
    "x.sort": (net(lambda s, x: x.sort().values, 2, 4), 1),
    "torch.topk": (net(lambda s, x: torch.topk(x, 2)[0], 4), 1),
    "x.topk": (net(lambda s, x: x.topk(3, 1, largest=False).values, 4, 2), 1),
    "torch.kthvalue": (net(lambda s, x: torch.kthvalue(x, 2, 1).values, 4), 1),
    "x.kthvalue": (net(lambda s, x: x.kthvalue(1, keepdim=True)[0], 2, 3), 1),
    "torch.median": (net(lambda s, x: torch.median(x, 1)[0], 5), 1),
    "x.median": (net(lambda s, x: x.median(-1, keepdim=True).values, 2, 4), 1),
}
VECTOR = {
    "Householder": (layer(lambda: turned(Householder(4)), 4, 2), 1),
    "Householder2": (layer(lambda: Householder2(4), 4, 2), 1),
    "SLLLinear": (layer(lambda: SLLLinear(4, 6), 3, 4), 1),
    "SLLConv2d": (layer(lambda: SLLConv2d(2, 3), 2, 4, 3), 1),
    "CPLLinear": (layer(lambda: CPLLinear(4, 3), 4), 1),
    "CPLConv2d": (layer(lambda: CPLConv2d(2, (4, 3), 3, 2, 0), 2, 4, 3), 1),
    "L2Pool2d": (layer(lambda: L2Pool2d(2), 2, 4, 2), 1),
    "F.softmax": (net(lambda s, x: F.softmax(x, 1), 2), 0.5),
    "torch.softmax": (net(lambda s, x: torch.softmax(x, dim=-1), 3, 4), 0.5),
    "x.softmax": (net(lambda s, x: x.softmax(1), 4, 2), 0.5),
    "softmax of one": (net(lambda s, x: x.softmax(1), 1, 3), 0),
    "Softmax": (layer(lambda: nn.Softmax(1), 3), 0.5),
    "F.log_softmax": (net(lambda s, x: F.log_softmax(x, dim=1), 4), 2),
    "torch.log_softmax": (net(lambda s, x: torch.log_softmax(x, -1), 2, 3), 3**0.5),
    "x.log_softmax": (net(lambda s, x: x.log_softmax(1), 2), 2**0.5),
    "LogSoftmax": (layer(lambda: nn.LogSoftmax(1), 5), 5**0.5),
    "torch.linalg.vector_norm": (net(lambda s, x: torch.linalg.vector_norm(x, dim=1), 4), 1),
    "3-norm": (net(lambda s, x: torch.linalg.vector_norm(x, 3, (1, 2)), 3, 2), 1),
    "1.5-norm": (net(lambda s, x: torch.linalg.vector_norm(x, 1.5, 1), 4), 4 ** (1 / 6)),
    "torch.norm": (net(lambda s, x: torch.norm(x, dim=1, keepdim=True), 4), 1),
    "x.norm": (net(lambda s, x: x.norm(p=1, dim=-1), 2, 9), 3),
    "largest entry": (net(lambda s, x: x.norm(float("inf"), 1), 4), 1),
    "torch.std": (net(lambda s, x: torch.std(x, 1), 5), 0.5),
    "x.std": (net(lambda s, x: x.std(1, unbiased=False, keepdim=True), 4, 2), 0.5),
}

JUMPS, STEEP, DIVIDES = "it jumps", "its slope has no bound", "divides by the sample's own size"
RECURRENT, ATTENTION = "gated recurrence", "attention is not Lipschitz"
PRODUCT = "product of two functions of the input"
BATCH_MIXED = "mixes the samples"

# Ops that are refused, and what the message says.
REFUSED = [
    (layer(lambda: nn.Threshold(0.1, 20), 3), JUMPS),
    (net(lambda s, x: F.threshold(x, 0.1, 20), 3), JUMPS),
    (layer(nn.Hardshrink, 3), JUMPS),
    (net(lambda s, x: F.hardshrink(x), 3), JUMPS),
    *((net(lambda s, x, f=f: f(x), 3), JUMPS) for f in (torch.sign, torch.round, torch.floor)),
    *((Net(lambda n=n: next(calls(n)), (3,)), JUMPS) for n in ("sign", "round", "floor")),
    *(
        (Net(lambda n=n: next(calls(n)), (3,)), STEEP)
        for name in ("exp", "square", "sqrt", "log", "reciprocal", "rsqrt")
        for n in (name, getattr(torch, name))
    ),
    (net(lambda s, x: torch.pow(x, 2), 3), STEEP),
    (net(lambda s, x: x.pow(3), 3), STEEP),
    (net(lambda s, x: x**2, 3), STEEP),
    (layer(nn.GLU, 4), PRODUCT),
    (net(lambda s, x: F.glu(x, 1), 4), PRODUCT),
    (net(lambda s, x: x * x.sigmoid(), 3), PRODUCT),
    (net(lambda s, x: x @ x.mT, 3, 3), PRODUCT),
    (net(lambda s, x: x / x.abs(), 3), "division by a function of the input"),
    (net(lambda s, x: 1 / x, 3), "division by a function of the input"),
    (layer(lambda: nn.LayerNorm(3), 3), DIVIDES),
    (net(lambda s, x: F.layer_norm(x, (3,)), 3), DIVIDES),
    (layer(lambda: nn.GroupNorm(2, 4), 4, 2), DIVIDES),
    (net(lambda s, x: F.group_norm(x, 2), 4, 2), DIVIDES),
    (layer(lambda: nn.InstanceNorm1d(2), 2, 3), DIVIDES),
    (layer(lambda: nn.InstanceNorm2d(2), 2, 3, 2), DIVIDES),
    (layer(lambda: nn.InstanceNorm3d(2), 2, 3, 2, 2), DIVIDES),
    (layer(lambda: nn.RMSNorm(3), 3), DIVIDES),
    (net(lambda s, x: F.rms_norm(x, (3,)), 3), DIVIDES),
    (net(lambda s, x: F.normalize(x), 3), DIVIDES),
    (layer(lambda: nn.LocalResponseNorm(2), 4, 2), DIVIDES),
    (net(lambda s, x: F.scaled_dot_product_attention(x, x, x), 3, 4), ATTENTION),
    (layer(lambda: nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 3, 4), ATTENTION),
    (layer(lambda: nn.LSTM(3, 2), 4, 3), RECURRENT),
    (layer(lambda: nn.GRU(3, 2), 4, 3), RECURRENT),
    (layer(lambda: nn.RNN(3, 2), 4, 3), RECURRENT),
    (layer(lambda: nn.LSTMCell(3, 2), 3), RECURRENT),
    (layer(lambda: nn.GRUCell(3, 2), 3), RECURRENT),
    (layer(lambda: nn.RNNCell(3, 2), 3), RECURRENT),
    (net(lambda s, x: F.embedding(x.long(), s.w), 3, w=(2, 2)), "its input is an integer"),
    (net(lambda s, x: x.__setitem__((..., 0), 1) or x, 3), "writing into a part"),
    (layer(lambda: nn.CELU(-1), 3), "grows exponentially"),
    (layer(lambda: nn.Softplus(threshold=2), 3), "jumps"),
    (net(lambda s, x: F.softplus(x, beta=-1), 3), "beta = -1"),
    (net(lambda s, x: x.clamp(1, -1), 3), "clamp from 1 to -1"),
    (net(lambda s, x: x.clamp(x.sin(), 2 + x), 3), "use maximum and minimum"),
    (net(lambda s, x: x.clamp(max=s.w), 3, w=3), "use numbers"),
    (net(lambda s, x: torch.where(x > 0, x, 0.1 * x), 3), "use a constant mask (a buffer), or"),
    (net(lambda s, x: x.where(x < s.w, 0), 3, w=3), "use a constant mask (a buffer), or"),
    (net(lambda s, x: torch.where(s.w > 0, x, 0), 3, w=(2, 3)), "differs between the samples"),
    (net(lambda s, x: torch.where(s.w > 0, x, 0), 1, w=3), "expand it first"),
    (net(lambda s, x: torch.maximum(x, s.w), 3, w=3), "with a constant: use clamp"),
    (net(lambda s, x: torch.maximum(x, x[:, :1]), 3), "expand one of them first"),
    (net(lambda s, x: x.max(1).values, 3), "max over an axis has no rule; use torch.amax"),
    (net(lambda s, x: torch.min(x, dim=1)[0], 3), "min over an axis has no rule; use torch.amin"),
    (net(lambda s, x: x.amax(0, keepdim=True) + x, 3), BATCH_MIXED),
    (net(lambda s, x: x.softmax(0), 3), BATCH_MIXED),
    (net(lambda s, x: x.median() + x, 3), BATCH_MIXED),
    (net(lambda s, x: x / x.norm(), 3), BATCH_MIXED),
    (net(lambda s, x: x.norm(p=0.5, dim=1), 3), "not Lipschitz; use ord >= 1"),
    (net(lambda s, x: x.topk(2, sorted=False)[0], 3), "use sorted=True"),
    (net(lambda s, x: x.sort(1).indices * x, 3), "the attribute .indices has no rule"),
    (net(lambda s, x: x.std(), 3), "give dim="),
    (net(lambda s, x: x.std(1, correction=2), 3), "use unbiased="),
    (net(lambda s, x: F.max_pool1d(x, 2, return_indices=True)[0], 1, 4), "positions of maxima"),
    (layer(lambda: nn.AdaptiveMaxPool1d(2, return_indices=True), 1, 4), "positions of maxima"),
    (net(lambda s, x: s.w @ x, 3, 2, w=(4, 3)), "only x @ W"),
    (net(lambda s, x: F.linear(s.w, x), 3, w=(2, 3)), "in a way its rule does not know"),
    (net(lambda s, x: F.linear(x, s.w), 3, w=3), "its rule gives the shape"),
    (net(lambda s, x: torch.cat([x, s.w.expand(2, 3)], 1), 3, w=3), "joining with a constant"),
    (net(lambda s, x: torch.cat([x, x]), 3), "mixes the samples"),
    (net(lambda s, x: torch.stack([x, x]), 3), "mixes the samples"),
    (net(lambda s, x: x.mean(), 3), BATCH_MIXED),
    (net(lambda s, x: x.sum((0, 1)), 3), BATCH_MIXED),
    (net(lambda s, x: x - x.mean(0, keepdim=True), 3), BATCH_MIXED),
    (net(lambda s, x: x.flip(0), 3), BATCH_MIXED),
    (net(lambda s, x: x.t(), 3), "Tensor.t"),
    (net(lambda s, x: x.transpose(0, 1), 2), BATCH_MIXED),
    (net(lambda s, x: x.reshape(1, -1), 3), BATCH_MIXED),
    (net(lambda s, x: x.roll(1), 3), BATCH_MIXED),
    (net(lambda s, x: x[1:], 3), BATCH_MIXED),
    (net(lambda s, x: x[0], 2, 2), BATCH_MIXED),
    (net(lambda s, x: F.pad(x, (0, 0, 1, 0)), 3), BATCH_MIXED),
    (layer(lambda: nn.BatchNorm1d(3, track_running_stats=False), 3), "other samples of the batch"),
    (
        net(lambda s, x: F.batch_norm(x, s.w.detach(), s.w.detach(), training=True), 3, w=3),
        "other samples of the batch",
    ),
    (net(lambda s, x: F.dropout(x), 3), "random whatever the mode"),
    (net(lambda s, x: x + s.w, 3, w=(2, 3)), "differs between the samples"),
    (net(lambda s, x: x * s.w, 3, w=(2, 3)), "differs between the samples"),
    (net(lambda s, x: x * s.w, 1, w=3), "expand"),
    (net(lambda s, x: x + s.w, 1, w=3), "expand"),
    (net(lambda s, x: x[:, 0] + x, 2, 2), "operands of different rank"),
    (net(lambda s, x: F.conv1d(x, s.w), 4, w=(1, 2, 1)), "1-d convolution of an input of shape"),
    (layer(lambda: nn.ConvTranspose1d(1, 1, 2, output_padding=1, dilation=2), 1, 3), "not below"),
    (net(lambda s, x: x.data, 3), "the attribute .data has no rule"),
    (net(lambda s, x: torch.special.expit(x), 3), "write one with @lipcert.rule"),
]


class _Attention(nn.Module):
    def __init__(self, attention, *inputs):
        super().__init__()
        self.attention, self.inputs = attention, inputs

    def forward(self, x):
        out = self.attention(*[x] * len(self.inputs))
        return out[0] if isinstance(out, tuple) else out


REFUSED += [
    (Net(lambda: _Attention(nn.MultiheadAttention(4, 2), 1, 2, 3), (3, 4)), ATTENTION),
    (
        Net(
            lambda: _Attention(nn.TransformerDecoderLayer(4, 2, 4, batch_first=True), 1, 2), (3, 4)
        ),
        ATTENTION,
    ),
    (
        Net(lambda: _Attention(nn.Transformer(4, 2, 1, 1, 4, batch_first=True), 1, 2), (3, 4)),
        ATTENTION,
    ),
]


class _Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2, 2)

    def forward(self, x):
        return self.table(x.long())


REFUSED.append((Net(_Embedding, (3,)), "its input is an integer"))
