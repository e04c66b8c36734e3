"""Norms of real modules against reference numbers from dense matrices (provenance: in the file)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipcert as lc

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lmt_spectral_norms.json").read_text())
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def rows(section, name="id"):
    table = GOLDEN[section]
    return pytest.mark.parametrize("row", table, ids=[str(r.get(name, "")) for r in table])


def seeded(module, row):
    """The module in float64 with the weight of the row."""
    numbers = np.random.RandomState(row["seed"]).standard_normal(module.weight.shape)
    module.weight.data = torch.as_tensor(numbers)
    return module


def geometry(row):
    return {name: row[name] for name in ("stride", "padding", "dilation", "groups") if name in row}


def assert_norm(module, shape, sigma, relative=1e-10):
    exact = lc.spectral_norm(module, shape, norm=lc.Exact())
    assert exact.kind == lc.Kind.UPPER
    assert float(exact) == pytest.approx(sigma, rel=relative)
    assert float(lc.spectral_norm(module, shape)) >= sigma * (1 - relative)


def assert_fourier(module, shape, sigma):
    bound = float(lc.spectral_norm(module, shape, norm=lc.Fourier()))
    assert bound >= sigma * (1 - 1e-12)
    return bound


# ---------------------------------------------------------------- convolutions


@rows("conv")
def test_convolutions(row):
    make = CONV[row["nd"]]
    module = make(
        row["cin"], row["cout"], row["kernel"], padding_mode=row["padding_mode"], **geometry(row)
    )
    module, shape = seeded(module, row), (row["cin"], *(row["size"],) * row["nd"])
    assert_norm(module, shape, row["sigma"])
    reach = row["dilation"] * (row["kernel"] - 1)
    circulant = 2 * row["padding"] == reach and row["size"] % row["stride"] == 0
    if row["padding_mode"] == "zeros":
        assert assert_fourier(module, shape, row["sigma"]) < 1.4 * row["sigma"]
    elif row["padding_mode"] == "circular" and circulant:
        bound = assert_fourier(module, shape, row["sigma"])
        assert bound == pytest.approx(row["sigma"], rel=1e-12)
    else:  # a padding by copies, then a convolution: no longer one convolution
        with pytest.raises(lc.LipcertError, match=r"Auto\(\)"):
            lc.spectral_norm(module, shape, norm=lc.Fourier())


@rows("conv_transpose")
def test_transposed_convolutions(row):
    module = nn.ConvTranspose2d(
        row["cin"],
        row["cout"],
        row["kernel"],
        output_padding=row["output_padding"],
        **geometry(row),
    )
    module, shape = seeded(module, row), (row["cin"], row["size"], row["size"])
    assert module(torch.zeros(1, *shape)).shape[-1] == row["out_size"]
    assert_norm(module, shape, row["sigma"])
    assert_fourier(module, shape, row["sigma"])


@rows("conv_bn")
def test_convolution_and_batch_norm_are_one_operator(row):
    conv = nn.Conv2d(row["cin"], row["cout"], row["kernel"], **geometry(row))
    bn = nn.BatchNorm2d(row["cout"], eps=row["eps"])
    bn.weight.data, bn.bias.data = torch.tensor(row["gamma"]), torch.tensor(row["beta"])
    bn.running_mean, bn.running_var = torch.tensor(row["mean"]), torch.tensor(row["var"])
    net, shape = nn.Sequential(seeded(conv, row), bn), (row["cin"], row["size"], row["size"])
    assert_norm(net, shape, row["sigma"])
    assert_fourier(net, shape, row["sigma"])
    between = tuple(conv(torch.zeros(1, *shape)).shape[1:])
    product = float(lc.spectral_norm(conv, shape)) * float(lc.spectral_norm(bn, between))
    assert product == pytest.approx(row["sigma_product"], rel=1e-10)


# ---------------------------------------------------------------- pooling and resampling


@rows("avg_pool")
def test_average_pooling(row):
    module = nn.AvgPool2d(
        row["k"],
        row["s"],
        row["p"],
        row["ceil_mode"],
        row["count_include_pad"],
        row["divisor_override"],
    )
    assert_norm(module, (1, row["H"], row["H"]), row["sigma"], 1e-12)
    assert_norm(module, (2, row["H"], row["H"]), row["sigma"], 1e-12)


@rows("adaptive_avg_pool", "out")
def test_adaptive_pooling(row):
    shape = (2, *row["size"])
    assert_norm(nn.AdaptiveAvgPool2d(tuple(row["out"])), shape, row["sigma"], 1e-12)
    pooled = lc.lipschitz(nn.AdaptiveMaxPool2d(tuple(row["out"])), shape)
    assert float(pooled) == pytest.approx(row["max_pool"], rel=1e-12)


class Function(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


@rows("interpolate", "mode")
def test_interpolation(row):
    size, mode, corners = (row["out"],) * 2, row["mode"], row["align_corners"]
    shape = (1, row["H"], row["H"])
    assert_norm(nn.Upsample(size, mode=mode, align_corners=corners), shape, row["sigma"], 1e-12)

    def resize(x):
        return F.interpolate(x, size, mode=mode, align_corners=corners)

    assert_norm(Function(resize), shape, row["sigma"], 1e-12)


def ones_with_reflection():
    module = nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect")
    module.weight.data = torch.ones_like(module.weight)
    return module


MISC = {
    "pixel_shuffle r2": ((4, 3, 3), nn.PixelShuffle(2)),
    "pixel_unshuffle r2": ((1, 4, 4), nn.PixelUnshuffle(2)),
    "channel_shuffle": ((4, 2, 2), nn.ChannelShuffle(2)),
    "zero pad": ((2, 3, 3), nn.ZeroPad2d(1)),
    "reflect pad 1 H=4": ((1, 4, 4), nn.ReflectionPad2d(1)),
    "replicate pad 2 H=4": ((1, 4, 4), nn.ReplicationPad2d(2)),
    "circular pad 1 H=4": ((1, 4, 4), nn.CircularPad2d(1)),
    "unfold k3 s1 p1 H=5": ((1, 5, 5), nn.Unfold(3, padding=1)),
    "expand 3 copies": ((1, 2, 2), Function(lambda x: x.expand(-1, 3, -1, -1))),
    "flatten": ((2, 2, 2), nn.Flatten()),
    "roll": ((1, 3, 3), Function(lambda x: torch.roll(x, 1, 3))),
    "global mean HxW=16": ((2, 4, 4), Function(lambda x: x.mean((2, 3)))),
    "global sum 16": ((2, 4, 4), Function(lambda x: x.sum((2, 3)))),
    "diff n=6": ((1, 1, 6), Function(lambda x: x[..., 1:] - x[..., :-1])),
    **{f"conv1d ones(3) reflect pad1 H={n}": ((1, n), ones_with_reflection()) for n in (2, 3, 4)},
}


@rows("misc", "op")
def test_other_affine_ops(row):
    shape, module = MISC[row["op"]]
    assert_norm(module.double(), shape, row["sigma"], 1e-12)
