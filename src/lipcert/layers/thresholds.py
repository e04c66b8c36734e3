"""Activations with learned thresholds, above (or below) which they are constant."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.layers.activations import MaxMin


class _Thresholds(nn.Module):
    """Holds parameters that take their shape from the first input or from a saved state.

    Until then they are empty. They stay the same objects, so that an optimiser may have them
    before.
    """

    def _shape(self, sample: torch.Size) -> torch.Size:
        """The shape of the parameters for samples of a shape."""
        return sample

    def _fit(self, x: Tensor) -> None:
        """Gives empty parameters their shape.

        Raises:
            LipcertError: They have the shape of other samples.
        """
        shape = self._shape(x.shape[1:])
        for name, parameter in self.named_parameters():
            if parameter.shape == (0,):
                parameter.data = parameter.new_full(shape, getattr(self, f"initial_{name}"))
            if parameter.shape != shape:
                raise LipcertError(
                    f"{type(self).__name__} has a threshold for each unit, {tuple(parameter.shape)}"
                    f" of them, but its input has the shape {tuple(x.shape)}, which needs "
                    f"{tuple(shape)}; use inputs of the size it was made for, or a new layer"
                )

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name, parameter in self.named_parameters():
            saved = state_dict.get(prefix + name)
            if parameter.shape == (0,) and isinstance(saved, Tensor):
                parameter.data = parameter.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ClippedReLU(_Thresholds):
    """max(0, min(z, theta)), with a learned threshold theta for each unit.

    The map is constant below 0 and from theta on, so units that stay there in a whole ball do not
    count in a local bound. For theta < 0 it is 0 everywhere. It is 1-Lipschitz for every theta.

    The thresholds take their shape, that of one sample, from the first input: a network with this
    layer works at one resolution.

    Args:
        threshold: theta at the start, >= 0.

    Attributes:
        threshold: The thresholds theta, a parameter of the shape of one sample.

    Raises:
        LipcertError: The threshold is negative or not finite; in ``forward``, the input has another
            shape than the thresholds.

    Reference: arXiv 2111.01395 (ReLU-theta).
    """

    def __init__(self, threshold: float = 1.0):
        super().__init__()
        if not 0 <= threshold < math.inf:
            raise LipcertError(f"ClippedReLU(threshold={threshold}): needs a finite number >= 0")
        self.initial_threshold = threshold
        self.threshold = nn.Parameter(torch.empty(0))

    def forward(self, x: Float[Tensor, "b *sample"]) -> Float[Tensor, "b *sample"]:
        """Applies the activation."""
        self._fit(x)
        return _Held.apply(x, x.new_zeros(()), self.threshold.to(x))

    def extra_repr(self) -> str:
        """What the thresholds were at the start, for ``print(model)``."""
        return f"threshold={self.initial_threshold}"


class ClippedMaxMin(_Thresholds):
    """MaxMin with learned thresholds: the maxima are held below, the minima above one.

    With a and b the two halves of the channels the output is
    cat(min(max(a, b), t_max), max(min(a, b), t_min)). Sorting is 1-Lipschitz and so is holding, for
    every t_max and t_min, crossed ones too.

    The thresholds take their shape from the first input, as those of `ClippedReLU`.

    Args:
        upper: t_max at the start.
        lower: t_min at the start, <= upper.

    Attributes:
        upper: The thresholds t_max, a parameter of the shape of half a sample, (channels / 2, ...).
        lower: The thresholds t_min, of the same shape.

    Raises:
        LipcertError: The thresholds are not finite or in the wrong order; in ``forward``, the input
            has an odd number of channels or another shape than the thresholds.

    Reference: arXiv 2111.01395 (MaxMin-theta).
    """

    def __init__(self, upper: float = 1.0, lower: float = -1.0):
        super().__init__()
        if not -math.inf < lower <= upper < math.inf:
            raise LipcertError(
                f"ClippedMaxMin(upper={upper}, lower={lower}): needs finite numbers, lower <= upper"
            )
        self.initial_upper, self.initial_lower = upper, lower
        self.sort = MaxMin()
        self.upper = nn.Parameter(torch.empty(0))
        self.lower = nn.Parameter(torch.empty(0))

    def _shape(self, sample: torch.Size) -> torch.Size:
        return torch.Size((sample[0] // 2, *sample[1:]))

    def forward(self, x: Float[Tensor, "b channels *rest"]) -> Float[Tensor, "b channels *rest"]:
        """Applies the activation."""
        return self.clip(self.sort(x))

    def clip(self, x: Float[Tensor, "b channels *rest"]) -> Float[Tensor, "b channels *rest"]:
        """The second step alone: pairs (max, min), each half held at its threshold."""
        self._fit(x)
        never = torch.full_like(self.upper, math.inf)
        lower, upper = torch.cat([-never, self.lower]), torch.cat([self.upper, never])
        return _Held.apply(x, lower.to(x), upper.to(x))

    def extra_repr(self) -> str:
        """What the thresholds were at the start, for ``print(model)``."""
        return f"upper={self.initial_upper}, lower={self.initial_lower}"


class _Held(torch.autograd.Function):
    """max(low, min(x, high)) with ends that broadcast to x.

    Beyond an end the gradient goes to the end, also to `high` where it equals `low`: a threshold of
    0, where projections leave some, can come back. (torch's own clamps with tensors as ends take
    several times as long, on a map that every step meets many times.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(x, high), low)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        x, low, high = inputs
        ctx.save_for_backward(x > low, x < high)
        ctx.ends = low.shape, high.shape

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        above, below = ctx.saved_tensors
        to_upper = gradient * above
        to_x = to_upper * below
        (low, high), (_, wants_low, wants_high) = ctx.ends, ctx.needs_input_grad
        to_low = (gradient - to_upper).sum_to_size(low) if wants_low else None
        to_high = to_upper.sub_(to_x).sum_to_size(high) if wants_high else None
        return to_x, to_low, to_high


@torch.no_grad()
def project_thresholds(net: nn.Module) -> None:
    """Replaces negative thresholds of every `ClippedReLU` of a network by 0.

    Below 0 the threshold of a unit has no gradient and would never return. To follow each step of
    an optimiser. Thresholds of `ClippedMaxMin` are left as they are.

    Reference: arXiv 2111.01395; the authors' code.
    """
    for module in net.modules():
        if isinstance(module, ClippedReLU):
            module.threshold.clamp_(min=0)
