"""Convex-potential layers, and weights to test layers at: ordinary ones and the extremes."""

import pytest
import torch
from torch import nn

from lipcert.layers import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear

WEIGHTS = (
    *("random", "rank one", "zero", "some zero", "huge", "tiny", "tiniest", "repeated", "fresh"),
    "trained",
)

LAYERS = {
    "SLLLinear": (lambda: SLLLinear(4, 6), (4,)),
    "SLLLinear narrow": (lambda: SLLLinear(5, 3), (2, 5)),
    "SLLConv2d": (lambda: SLLConv2d(2, 3), (2, 5, 4)),
    "SLLConv2d, 4 taps": (lambda: SLLConv2d(2, 2, 4, 2), (2, 3, 4)),
    "CPLLinear": (lambda: CPLLinear(4, 6), (4,)),
    "CPLLinear narrow": (lambda: CPLLinear(5, 3), (2, 5)),
    "CPLConv2d": (lambda: CPLConv2d(2, (5, 4), 3), (2, 5, 4)),
    "CPLConv2d, 5 taps": (lambda: CPLConv2d(2, (3, 4), kernel_size=5), (2, 3, 4)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_cpl = pytest.mark.parametrize("name", [n for n in LAYERS if "CPL" in n])
each_weight = pytest.mark.parametrize("weights", WEIGHTS)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)


def filled(module, weights):
    """Fills the parameters of a layer in place; `weight` is the one that is special."""
    weight = module.weight.data
    rows = len(weight)
    if weights in ("fresh", "trained"):
        if weights == "trained":
            _train(module)
        return
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    random = torch.randn_like(weight)
    match weights:
        case "random":
            new = random
        case "rank one":
            new = random.flatten(1)[:1].repeat(rows, 1) * torch.randn(rows, 1).to(weight)
        case "zero":
            new = torch.zeros_like(weight)
        case "some zero":
            new = random
            new[0], new[:, 0] = 0, 0
        case "huge" | "tiny" | "tiniest":
            new = random * {"huge": 1e15, "tiny": 1e-15, "tiniest": 1e-30}[weights]
        case "repeated":
            new = nn.init.orthogonal_(torch.empty_like(weight.flatten(1)))
    module.weight.data = new.reshape(weight.shape)


def _train(module):
    """Some steps that make the output small, so that the weights grow where they can."""
    dtype = module.weight.dtype
    features = module.weight.shape[1]
    shape = (features,) if module.weight.ndim == 2 else (features, 5, 4)
    shape = tuple(getattr(module, "size", shape))
    module.train()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(30):
        optimiser.zero_grad()
        module(torch.randn(8, *shape).to(dtype)).square().mean().backward()
        optimiser.step()


def made(name, weights="random", dtype=torch.float64):
    make, shape = LAYERS[name]
    module = make().to(dtype)
    filled(module, weights)
    return module.eval(), shape
