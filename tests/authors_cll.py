"""The Lipschitz constant of the code of CLL, restated for tests: what it computes, not how to."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GOLDEN = np.load(Path(__file__).parent / "golden" / "cll_nets.npz")  # provenance: inside
NUMBERS = json.loads(str(GOLDEN["numbers"]))
NETS = list(NUMBERS)
STRIDED = {"conv_k3s2p1_8x8": (2, 1), "conv_k4s2p0_9x9": (2, 0)}  # stride, padding of conv2


class AdjacentMaxMin(nn.Module):
    """Sorts the channels 2k and 2k + 1: all maxima, then all minima."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, ::2], x[:, 1::2]
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


def array(net: str, name: str) -> Tensor:
    return torch.tensor(GOLDEN[f"{net}/{name}"])


def layers(net: str) -> list[str]:
    """The names of the layers in order; the last one gives the logits."""
    found = [n.split("/")[1] for n in GOLDEN.files if n.startswith(net) and n.endswith(".weight")]
    return [n.removesuffix(".weight") for n in found]


def network(net: str) -> nn.Sequential:
    modules: dict[str, nn.Module] = {}
    for name in layers(net):
        weight = array(net, f"{name}.weight")
        if weight.ndim == 4:
            stride, padding = (1, 1) if name == "conv1" else STRIDED[net]
            out, into, size, _ = weight.shape
            modules[name] = nn.Conv2d(into, out, size, stride, padding)
        else:
            if "conv2" in modules and "flat" not in modules:
                modules["flat"] = nn.Flatten()
            modules[name] = nn.Linear(*reversed(weight.shape))
        with torch.no_grad():
            modules[name].weight.copy_(weight)
            modules[name].bias.copy_(array(net, f"{name}.bias"))
        if name != "fc":
            modules[f"act_{name}"] = AdjacentMaxMin()
    return nn.Sequential(OrderedDict(modules))


def five_iterations(net: str, module: nn.Sequential) -> Tensor:
    """The constant by five power iterations from the stored vectors, gradients through all."""
    total = torch.ones(())
    for name in layers(net)[:-1]:
        layer, x = module.get_submodule(name), array(net, f"{name}.start")
        for _ in range(5):
            x = _back(layer, _forth(layer, x))
            x = x / x.norm()
        squared = _forth(layer, x).square().sum() / (x.square().sum() + 1e-9)
        total = total * squared.sqrt()
    return total * largest_distance(module.fc.weight)


def converged(net: str, module: nn.Sequential) -> Tensor:
    """The constant that more iterations tend to.

    A strided convolution whose input leaves a row over is taken on an input without that row.
    """
    total = torch.ones(())
    for name in layers(net)[:-1]:
        layer, x = module.get_submodule(name), array(net, f"{name}.start")
        x = _back(layer, _forth(layer, x)).detach()
        units = torch.eye(x.numel()).reshape(-1, *x.shape[1:])
        total = total * torch.linalg.matrix_norm(_forth(layer, units).flatten(1), 2)
    return total * largest_distance(module.fc.weight)


def largest_distance(rows: Tensor) -> Tensor:
    i, j = torch.triu_indices(len(rows), len(rows), 1)
    return (rows[i] - rows[j]).norm(dim=1).max()


def _forth(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return x @ layer.weight.T
    return F.conv2d(x, layer.weight, stride=layer.stride, padding=layer.padding)


def _back(layer: nn.Module, y: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return y @ layer.weight
    return F.conv_transpose2d(y, layer.weight, stride=layer.stride, padding=layer.padding)
