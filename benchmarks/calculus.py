"""What LMT's calculus gains, on its wide residual network with random weights.

The constant of all layers but the last, by `Product` and by the paper's recursion with other
constants of layers: norms of the real operators or bounds from the kernel matrix, each BatchNorm
merged with its convolution or on its own.

python benchmarks/calculus.py
"""

import time
from collections.abc import Callable

import torch
from common import save
from torch import nn

import lipcert as lc
from lipcert.spectral import Strategy
from lipcert.wide_resnet import WideResNet

SHAPE = (3, 32, 32)
Shape = tuple[int, ...]
Norm = Callable[[nn.Module, Shape], float]


def network(widen: int, blocks: int) -> WideResNet:
    """The network with random weights, gains and running statistics, in eval mode."""
    torch.manual_seed(0)
    net = WideResNet(SHAPE, widen=widen, blocks=blocks)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval()


def strategy(norm: Strategy) -> Norm:
    """The norm of an affine module on a shape."""
    return lambda module, shape: float(lc.spectral_norm(module, shape, norm))


def by_kernel_size(conv: nn.Conv2d, shape: Shape) -> float:
    """Prior work: ||W'|| sqrt(k_h k_w), whatever stride and image."""
    matrix = torch.linalg.matrix_norm(conv.weight.flatten(1).double(), 2)
    return float(matrix) * (conv.kernel_size[0] * conv.kernel_size[1]) ** 0.5


def gain(norm: nn.BatchNorm2d) -> float:
    """max |gamma| / sqrt(var + eps)."""
    return float((norm.weight.abs() / (norm.running_var + norm.eps).sqrt()).max())


def recursion(net: WideResNet, norm: Norm, merged: bool) -> float:
    """The paper's recursion over the two streams, up to and including the average pool."""

    def after(conv: nn.Conv2d, shape: Shape) -> Shape:
        return (conv.out_channels, *(side // conv.stride[0] for side in shape[1:]))

    def pair(conv: nn.Conv2d, bn: nn.BatchNorm2d, shape: Shape) -> float:
        return norm(nn.Sequential(conv, bn), shape) if merged else norm(conv, shape) * gain(bn)

    shape = SHAPE
    raw = normalised = pair(net.stem, net.norm, shape)
    shape = after(net.stem, shape)
    for block in net.blocks:
        inner = after(block.conv1, shape)
        branch = pair(block.conv1, block.norm1, shape) * norm(block.conv2, inner)
        if block.shortcut is not None:
            raw = normalised * norm(block.shortcut, shape)
        raw = normalised * branch + raw
        normalised = raw * gain(block.norm2)
        shape = inner
    return normalised * float(lc.spectral_norm(net.pool, shape))


def ours(net: WideResNet) -> tuple[float, float]:
    """The same constant by `Product`, with the seconds from the network to the constant."""
    begin = time.perf_counter()
    graph = lc.trace(net, SHAPE)
    bound = lc.Product(graph)
    last = graph.output.inputs[0]
    with torch.no_grad():
        value = bound.prefix(last)
    seconds = time.perf_counter() - begin
    if value.kind != lc.Kind.UPPER:
        raise RuntimeError(f"not a true bound: {value}")
    return float(value) * float(lc.spectral_norm(net.pool, last.shape)), seconds


def constants(widen: int, blocks: int) -> dict:
    """All constants, and their ratios to the paper's tight calculus (operators, BatchNorm merged).

    `Product` is below it because no ReLU follows the stem: `trace` joins the stem with the
    convolution after it, which the paper's recursion counts apart.
    """
    net = network(widen, blocks)
    exact, seconds = ours(net)
    auto, count = strategy(lc.Auto()), strategy(lc.Count())
    with torch.no_grad():
        found = {
            "Product(Auto())": exact,
            "merged, operators": recursion(net, auto, merged=True),
            "unmerged, operators": recursion(net, auto, merged=False),
            "merged, Count": recursion(net, count, merged=True),
            "unmerged, Count": recursion(net, count, merged=False),
            "unmerged, kernel size (prior work)": recursion(net, by_kernel_size, merged=False),
        }
    paper = found["merged, operators"]
    return {
        "L_sub": {name: float(f"{value:.5g}") for name, value in found.items()},
        "ratio": {name: float(f"{value / paper:.4g}") for name, value in found.items()},
        "seconds_trace_and_bound": round(seconds, 2),
    }


def main() -> None:
    save(
        "calculus",
        {
            "what": "WideResNet on (3, 32, 32), He-initialised, running variances uniform in "
            "[0.5, 2], gains in [0.5, 1.5], seed 0: Lipschitz constant of all but the last layer",
            "reference": "independent code, WRN-10-1, other random weights: operators 722 merged, "
            "2111 unmerged; Count 24478 merged, 65214 unmerged; prior work 136998",
            "wrn-10-1": constants(widen=1, blocks=1),
            "wrn-16-4": constants(widen=4, blocks=2),
        },
    )


if __name__ == "__main__":
    main()
