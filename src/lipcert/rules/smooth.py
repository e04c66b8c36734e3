"""Rules of smooth activations: where their derivatives peak, and their limits."""

import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.graph import Node, Slope
from lipcert.rules.registry import refuse, rule
from lipcert.rules.slopes import everywhere, smooth

# Where the derivative of an activation peaks and where the activation itself turns (roots of f''
# and f', to double precision). A slip in the last digit would move the peak by its square.
SILU_PEAK, SILU_TURN = 2.3993572805154677, -1.2784645427610738
GELU_TURN = -0.7517915246935645
GELU_TANH_PEAK, GELU_TANH_TURN = 1.4185040087908284, -0.7524614220710163
MISH_PEAKS, MISH_TURN = (-2.2563763963607931, 1.4905711794854285), -1.1924312145154952


@rule(nn.Tanh, torch.tanh, "tanh", "tanh_")
def _tanh(*args) -> Slope:
    return smooth(torch.tanh, lambda t: 1 - t.tanh().square(), (0.0,), limits=(-1.0, 1.0))


@rule(nn.Sigmoid, torch.sigmoid, "sigmoid", "sigmoid_")
def _sigmoid(*args) -> Slope:
    def derivative(t: Tensor) -> Tensor:
        return t.sigmoid() * (-t).sigmoid()

    return smooth(torch.sigmoid, derivative, (0.0,), limits=(0.0, 1.0))


@rule(nn.Softplus)
def _softplus_module(module: nn.Softplus, x: Node) -> Slope:
    return _softplus_function(x, module.beta, module.threshold)


@rule(F.softplus)
def _softplus_function(x: Node, beta: float = 1.0, threshold: float = 20.0) -> Slope:
    if beta <= 0 or threshold < 20:
        raise LipcertError(
            f"softplus with beta = {beta} and threshold = {threshold} jumps where it becomes x; "
            "use beta > 0 and threshold >= 20"
        )
    # At a threshold of 20 torch jumps down by 2e-9 / beta: taken as rounding.
    return smooth(
        lambda t: F.softplus(t, beta, threshold),
        lambda t: (beta * t).sigmoid(),
        tails=(0.0, 1.0),
        limits=(0.0, math.inf),
    )


@rule(nn.LogSigmoid, F.logsigmoid)
def _log_sigmoid(*args) -> Slope:
    return smooth(F.logsigmoid, lambda t: (-t).sigmoid(), tails=(1.0, 0.0), limits=(-math.inf, 0.0))


@rule(nn.SiLU, F.silu)
def _silu(*args, inplace: bool = False) -> Slope:
    def derivative(t: Tensor) -> Tensor:
        gate = t.sigmoid()
        return gate * (1 + t * (-t).sigmoid())

    peaks = (-SILU_PEAK, SILU_PEAK)
    return smooth(F.silu, derivative, peaks, (0.0, 1.0), (SILU_TURN,), (0.0, math.inf))


@rule(nn.GELU)
def _gelu_module(module: nn.GELU, x: Node) -> Slope:
    return _gelu_function(x, module.approximate)


@rule(F.gelu)
def _gelu_function(x: Node, approximate: str = "none") -> Slope:
    scale = math.sqrt(2 / math.pi)

    def exact(t: Tensor) -> Tensor:
        density = (-t.square() / 2).exp() / math.sqrt(2 * math.pi)
        return (1 + torch.erf(t / math.sqrt(2))) / 2 + t * density

    def by_tanh(t: Tensor) -> Tensor:
        gate = (scale * (t + 0.044715 * t**3)).tanh()
        steepness = scale * (1 + 3 * 0.044715 * t.square())
        return (1 + gate) / 2 + t / 2 * (1 - gate.square()) * steepness

    if approximate == "tanh":
        derivative, peak, turn = by_tanh, GELU_TANH_PEAK, GELU_TANH_TURN
    else:
        derivative, peak, turn = exact, math.sqrt(2), GELU_TURN
    fn = lambda t: F.gelu(t, approximate=approximate)  # noqa: E731
    return smooth(fn, derivative, (-peak, peak), (0.0, 1.0), (turn,), (0.0, math.inf))


@rule(nn.Mish, F.mish)
def _mish(*args, inplace: bool = False) -> Slope:
    def derivative(t: Tensor) -> Tensor:
        gate = F.softplus(t).tanh()
        return gate + t * (1 - gate.square()) * t.sigmoid()

    return smooth(F.mish, derivative, MISH_PEAKS, (0.0, 1.0), (MISH_TURN,), (0.0, math.inf))


@rule(nn.Hardswish, F.hardswish)
def _hardswish(*args, inplace: bool = False) -> Slope:
    def derivative(t: Tensor) -> Tensor:
        middle = (2 * t + 3) / 6
        return torch.where(t < -3, 0, torch.where(t > 3, 1, middle))

    return smooth(F.hardswish, derivative, (-3.0, 3.0), (0.0, 1.0), (-1.5,), (0.0, math.inf))


def _elu(fn: Callable[[Tensor], Tensor], alpha: float, gain: float, width: float) -> Slope:
    """The function gain x above zero, gain alpha (exp(x / width) - 1) below."""

    def derivative(t: Tensor) -> Tensor:
        below = gain * alpha / width * (t.clamp(max=0) / width).exp()
        return torch.where(t > 0, gain, below)

    limits = (-gain * alpha, math.inf)
    return smooth(fn, derivative, (0.0,), (0.0, gain), (0.0,), limits)


@rule(nn.ELU)
def _elu_module(module: nn.ELU, x: Node) -> Slope:
    return _elu_function(x, module.alpha)


@rule(F.elu, F.elu_)
def _elu_function(x: Node, alpha: float = 1.0, inplace: bool = False) -> Slope:
    return _elu(lambda t: F.elu(t, alpha), alpha, 1.0, 1.0)


@rule(nn.SELU, F.selu)
def _selu(*args, inplace: bool = False) -> Slope:
    return _elu(F.selu, 1.6732632423543772, 1.0507009873554805, 1.0)


@rule(nn.CELU)
def _celu_module(module: nn.CELU, x: Node) -> Slope:
    return _celu_function(x, module.alpha)


@rule(F.celu)
def _celu_function(x: Node, alpha: float = 1.0, inplace: bool = False) -> Slope:
    if alpha <= 0:
        raise LipcertError(f"CELU with alpha = {alpha} grows exponentially; use alpha > 0")
    return _elu(lambda t: F.celu(t, alpha), alpha, 1.0, alpha)


@rule(nn.Softsign, F.softsign)
def _softsign(*args) -> Slope:
    return smooth(F.softsign, lambda t: (1 + t.abs()) ** -2, (0.0,), limits=(-1.0, 1.0))


@rule(nn.Tanhshrink, F.tanhshrink)
def _tanhshrink(*args) -> Slope:
    return smooth(F.tanhshrink, lambda t: t.tanh().square(), (0.0,), (1.0, 1.0))


@rule(torch.atan, "atan")
def _atan(x: Node) -> Slope:
    limits = (-math.pi / 2, math.pi / 2)
    return smooth(torch.atan, lambda t: 1 / (1 + t.square()), (0.0,), limits=limits)


@rule(torch.erf, "erf")
def _erf(x: Node) -> Slope:
    peak = 2 / math.sqrt(math.pi)
    return smooth(torch.erf, lambda t: peak * (-t.square()).exp(), (0.0,), limits=(-1.0, 1.0))


@rule(torch.asinh, "asinh")
def _asinh(x: Node) -> Slope:
    return smooth(torch.asinh, lambda t: (1 + t.square()).rsqrt(), (0.0,))


@rule(torch.sin, "sin")
def _sin(x: Node) -> Slope:
    return everywhere(torch.sin, (-1.0, 1.0), (-1.0, 1.0))


@rule(torch.cos, "cos")
def _cos(x: Node) -> Slope:
    return everywhere(torch.cos, (-1.0, 1.0), (-1.0, 1.0))


refuse(
    *(torch.exp, "exp", torch.square, "square", torch.sqrt, "sqrt"),
    *(torch.pow, "pow", operator.pow),
    *(torch.log, "log", torch.reciprocal, "reciprocal", torch.rsqrt, "rsqrt"),
    because="its slope has no bound; clamp its input and write a rule for both together",
)
refuse(nn.GLU, F.glu, because="a product of two functions of the input is not Lipschitz")
