"""Networks on which Local-Lip's and BCP's authors ran their code, and the numbers that it gave.

What each number is, and where it is from, is written in the files `golden/local_lip*`.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lipcert.layers import ClippedMaxMin, ClippedReLU
from lipcert.models import c4f3_bcp

FOLDER = Path(__file__).parent / "golden"
NAMES = [
    f"{body}_{activation}"
    for body in ("mlp", "conv")
    for activation in ("standrelu", "relux", "clmaxmin")
]
WEIGHTED = (nn.Conv2d, nn.Linear)
ACTIVATIONS = (nn.ReLU, ClippedReLU, ClippedMaxMin)
KINDS = {kind.__name__: kind for kind in (*WEIGHTED, *ACTIVATIONS, nn.Flatten)}


@dataclass(frozen=True)
class Case:
    """A small network with three inputs, in float64.

    Attributes:
        name: Of `NAMES`.
        net: With ReLU, ClippedReLU or ClippedMaxMin.
        x: Inputs, (3, *shape).
        y: Labels, (3,).
        eps: Radius of the balls.
        numbers: "few" (2 power iterations, 1 step in the last layer), "conv" (their iteration to
            its end), "exact" (singular values of explicit matrices), "layers", "logits".
        arrays: As stored, the pieces of one kind in a row; the methods part them.
    """

    name: str
    net: nn.Sequential
    x: Tensor
    y: Tensor
    eps: float
    numbers: dict
    arrays: dict[str, Tensor]

    def boxes(self, tag: str) -> dict[int, tuple[Tensor, Tensor]]:
        """Ends (lb, ub), each (3, *shape), after all modules but flattenings and the last.

        The keys are the modules' places. "conv" has them for every network, "few" if it is dense.
        """
        shapes = {
            i: shape
            for i, shape in enumerate(self._shapes()[1:-1])
            if not isinstance(self.net[i], nn.Flatten)
        }
        ends = (self._parted(f"{tag}.{end}", list(shapes.values())) for end in ("lb", "ub"))
        return dict(zip(shapes, zip(*ends, strict=True), strict=True))

    def masks(self, tag: str) -> dict[int, Tensor]:
        """Which units vary, bool (3, *shape), after the activation at each place."""
        places = [i for i, module in enumerate(self.net) if isinstance(module, ACTIVATIONS)]
        shapes = self._shapes()
        parts = self._parted(f"{tag}.mask", [shapes[i + 1] for i in places])
        return dict(zip(places, parts, strict=True))

    def u_global(self, key: str = "u_global") -> list[Tensor]:
        """Start vectors of whole layers: (1, *inputs) of convolutions, (1, outputs) if dense."""
        shapes = self._shapes()
        sides = [i + isinstance(self.net[i], nn.Linear) for i in self.inner]
        return self._parted(key, [(1, *shapes[side][1:]) for side in sides])

    def u_local(self, key: str = "u_local") -> list[Tensor]:
        """Start vectors of the samples, (3, *inputs) per layer."""
        shapes = self._shapes()
        return self._parted(key, [shapes[i] for i in self.inner])

    def gradients(self, tag: str, form: str) -> list[Tensor]:
        """Of the mean loss "bcp" or "gloro" in the parameters, in the order of `parameters`."""
        return self._parted(f"{tag}.grad_{form}", [p.shape for p in self.net.parameters()])

    @property
    def inner(self) -> list[int]:
        """Places of the layers with weights but the last."""
        return [i for i, module in enumerate(self.net) if isinstance(module, WEIGHTED)][:-1]

    def _shapes(self) -> list[torch.Size]:
        """Of the inputs and after every module, with the batch."""
        x, shapes = self.x, [self.x.shape]
        for module in self.net:
            x = module(x).detach()
            shapes.append(x.shape)
        return shapes

    def _parted(self, key: str, shapes: list) -> list[Tensor]:
        parts = self.arrays[key].split([int(np.prod(shape)) for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@dataclass(frozen=True)
class MNISTCase:
    """4C3F with seeded random weights and four digits; float32 numbers in float64.

    Attributes:
        net: With ClippedReLU.
        x: (4, 1, 28, 28) in [0, 1].
        y: Labels, (4,).
        numbers: "logits", and "runs" at several radii "eps": their norms, those by Lanczos, shares
            of masked units by the place of the layer, radii and losses.
    """

    net: nn.Sequential
    x: Tensor
    y: Tensor
    numbers: dict


def cases() -> list[Case]:
    """All six networks, made anew."""
    return [case(name) for name in NAMES]


def case(name: str) -> Case:
    """One of the networks, made anew."""
    numbers = _numbers("local_lip.json")["nets"][name]
    with np.load(FOLDER / f"local_lip_{name}.npz") as file:
        arrays = {key: torch.tensor(file[key]) for key in file.files if key != "provenance"}
    x, modules = arrays["x"], []
    with torch.no_grad():
        for kind, *sizes in numbers["layers"]:
            modules.append(KINDS[kind](*sizes).double())
            x = modules[-1](x)  # gives thresholds their shape
        net = nn.Sequential(*modules)
        parameters = list(net.parameters())
        stored = arrays["param"].split([p.numel() for p in parameters])
        for p, values in zip(parameters, stored, strict=True):
            p.copy_(values.view_as(p))
    return Case(name, net, arrays["x"], arrays["y"].long(), numbers["eps"], numbers, arrays)


def mnist_4c3f() -> MNISTCase:
    """4C3F on MNIST digits. The weights are those of their runs, drawn again from the seed."""
    net = c4f3_bcp((1, 28, 28), 10, ClippedReLU).double()
    with np.load(FOLDER / "local_lip_mnist_4c3f.npz") as file:
        # Division in float32, as the pixels that the code was given.
        x = torch.tensor(file["x"].astype(np.float32) / np.float32(255)).double()
        y = torch.tensor(file["y"]).long()
    net(x)
    rng = np.random.default_rng(2021)

    def draw(parameter, values):
        parameter.data = torch.tensor(values.astype(np.float32)).double()

    for module in net:
        if isinstance(module, nn.Conv2d):
            out, _, k, _ = module.weight.shape
            draw(module.weight, rng.normal(0, (2 / (k * k * out)) ** 0.5, module.weight.shape))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            reach = 1 / module.in_features**0.5
            draw(module.weight, rng.uniform(-reach, reach, module.weight.shape))
            draw(module.bias, rng.uniform(-reach, reach, module.bias.shape))
        elif isinstance(module, ClippedReLU):
            draw(module.threshold, rng.uniform(0.05, 0.35, module.threshold.shape))
    return MNISTCase(net, x, y, _numbers("local_lip_mnist_4c3f.json"))


@cache
def _numbers(name: str) -> dict:
    return json.loads((FOLDER / name).read_text())
