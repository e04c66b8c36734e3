"""Regularisers of the weights, which certified training is compared with; any recipe takes them.

They look at layers one by one, at kernels flattened to matrices (outputs against the rest), and
promise nothing about the network's Lipschitz constant.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.layers import ConvexSum
from lipcert.linear_kinds import Dense
from lipcert.spectral import PowerIteration

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class SpectralNormPenalty(nn.Module):
    """strength / 2 * sum over layers of sigma^2, sigma the norm of the flattened kernel.

    One power-iteration step a call improves each layer's vector, which is kept as a buffer, so that
    a checkpoint has it. The gradient in a kernel is strength * sigma * u v^T at the vectors found,
    which is the method's; the network is read anew at each call and is not registered.

    Args:
        net: Its dense and convolutional layers are penalised, the last one too.
        strength: The method's lambda, >= 0.

    Raises:
        LipcertError: The strength is negative, or the network has no such layer.

    Reference: arXiv 1705.10941, Algorithm 1 (spectral norm regularisation).
    """

    def __init__(self, net: nn.Module, strength: float):
        super().__init__()
        if not strength >= 0:
            raise LipcertError(f"SpectralNormPenalty(strength={strength}): needs a number >= 0.")
        self.strength = strength
        self._layers = tuple(_layers(net).values())  # in a tuple, a module is not registered
        self._norm = PowerIteration(1)
        for place, layer in enumerate(self._layers):
            with torch.no_grad():
                matrix = _matrix(layer)
                start = self._norm.start(matrix.in_shape, matrix.like.detach())
                self.register_buffer(f"vector_{place}", start)

    def forward(self) -> Float[Tensor, ""]:
        """The penalty with the weights as they are now."""
        norms = []
        for place, layer in enumerate(self._layers):
            name = f"vector_{place}"
            norm, better = self._norm.refine(_matrix(layer), getattr(self, name))
            setattr(self, name, better)
            norms.append(norm.value)
        return self.strength / 2 * torch.stack(norms).square().sum()


class LastLayerDecay(nn.Module):
    """strength / 2 * the sum of squares of weights and bias of the last dense layer.

    Its gradient is weight decay of that layer alone.

    Args:
        net: The network; it is read anew at each call and not registered.
        strength: The decay, >= 0.

    Raises:
        LipcertError: The strength is negative, or the network has no dense layer.
    """

    def __init__(self, net: nn.Module, strength: float):
        super().__init__()
        if not strength >= 0:
            raise LipcertError(f"LastLayerDecay(strength={strength}): needs a number >= 0.")
        dense = [layer for layer in _layers(net).values() if isinstance(layer, nn.Linear)]
        if not dense:
            raise LipcertError(f"{type(net).__name__} has no dense layer that could decay.")
        self.strength = strength
        self._layer = (dense[-1],)  # in a tuple, a module is not registered

    def forward(self) -> Float[Tensor, ""]:
        """The penalty with the weights as they are now."""
        squares = [p.square().sum() for p in self._layer[0].parameters()]
        return self.strength / 2 * torch.stack(squares).sum()


@dataclass(frozen=True)
class Parseval:
    """One step of W <- (1 + beta) W - beta W W^T W on every layer but the last dense one.

    Each singular value moves by beta * (s - s^3) towards 1: flattened kernels tend to orthonormal
    rows (columns, if those are fewer). The shares of every `ConvexSum` are projected. To be called
    without gradients, after the optimiser's step.

    Attributes:
        beta: Size of the step, > 0. A singular value above sqrt(1 + 2 / beta) would grow.

    Reference: arXiv 1704.08847, section 4.3.
    """

    beta: float

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise LipcertError(f"Parseval(beta={self.beta}): needs a positive number.")

    def __call__(self, net: nn.Module) -> None:
        """Changes the weights in place.

        Raises:
            LipcertError: A weight is computed from others (parametrised), or there is no layer.
        """
        layers = _layers(net)
        dense = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        for name, layer in layers.items():
            if name in dense[-1:]:
                continue
            if not isinstance(layer.weight, nn.Parameter):
                raise LipcertError(
                    f"Parseval: the weight of layer {name!r} is computed from other parameters, so "
                    "a step on it would be lost; remove its parametrisation."
                )
            w = layer.weight.flatten(1)
            step = (1 + self.beta) * w - self.beta * torch.linalg.multi_dot([w, w.mT, w])
            layer.weight.copy_(step.view_as(layer.weight))
        for module in net.modules():
            if isinstance(module, ConvexSum):
                module.project()


def _layers(net: nn.Module) -> dict[str, Layer]:
    """The dense and convolutional layers by name, in the order of their registration."""
    layers = {name: m for name, m in net.named_modules() if isinstance(m, Layer)}
    if not layers:
        raise LipcertError(
            f"{type(net).__name__} has no dense or convolutional layer whose kernel could be "
            "regularised; leave the regulariser out."
        )
    return layers


def _matrix(layer: Layer) -> Dense:
    """The flattened kernel as a map."""
    weight = layer.weight.flatten(1)
    return Dense((weight.shape[1],), (weight.shape[0],), weight)
