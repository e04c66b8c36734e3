"""Rules of functions of whole vectors: softmax, sorting, norms, running sums."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.graph import Affine, Box, Lipschitz, Node, node
from lipcert.linear_kinds import Separable
from lipcert.rules.one_lipschitz import monotone
from lipcert.rules.registry import rule
from lipcert.rules.structural import BATCH, fixed


def _axis(x: Node, dim: int) -> int:
    """A dimension as an axis of the batch, never the batch axis itself."""
    rank = len(x.shape) + 1
    if not -rank <= dim < rank:
        raise LipcertError(f"dim={dim} of an input with {rank} axes, the batch included")
    if dim % rank == 0:
        raise LipcertError("over the batch axis it mixes the samples of the batch")
    return dim % rank


def _along(x: Node, dim: int | None) -> tuple[int, int]:
    """The axis and the number of elements along it."""
    if dim is None:
        raise LipcertError("without dim it mixes the samples of the batch; give dim=")
    axis = _axis(x, dim)
    return axis, x.shape[axis - 1]


def _lipschitz(
    x: Node,
    fn: Callable[[Tensor], Tensor],
    constant: float,
    image: Callable[[Tensor, Tensor], Box] | None = None,
) -> Lipschitz:
    shape = tuple(fn(torch.zeros(BATCH, *x.shape)).shape[1:])
    return Lipschitz(fn, shape, lambda: constant, image or monotone(fn))


def _between(fn: Callable[[Tensor], Tensor], low: float, high: float):
    """An image that only knows the overall range of values."""

    def image(lower: Tensor, upper: Tensor) -> Box:
        value = fn(torch.zeros_like(lower))
        return torch.full_like(value, low), torch.full_like(value, high)

    return image


@rule(F.softmax, torch.softmax, "softmax")
def _softmax(x: Node, dim: int | None = None, *rest, **named) -> Lipschitz:
    """J = diag(p) - p p^T has row sums 2 p_i (1 - p_i) <= 1/2 in size (arXiv 2510.23012)."""
    axis, n = _along(x, dim)

    def fn(t: Tensor) -> Tensor:
        return t.softmax(axis)

    return _lipschitz(x, fn, 0.5 if n > 1 else 0.0, _between(fn, 0.0, 1.0))


@rule(nn.Softmax)
def _softmax_module(module: nn.Softmax, x: Node) -> Lipschitz:
    return _softmax(x, module.dim)


@rule(F.log_softmax, torch.log_softmax, "log_softmax")
def _log_softmax(x: Node, dim: int | None = None, *rest, **named) -> Lipschitz:
    """J = I - 1 p^T is a projector of norm sqrt(n) |p|, and |p| <= 1 (never attained)."""
    axis, n = _along(x, dim)

    def fn(t: Tensor) -> Tensor:
        return t.log_softmax(axis)

    return _lipschitz(x, fn, math.sqrt(n) if n > 1 else 0.0, _between(fn, -math.inf, 0.0))


@rule(nn.LogSoftmax)
def _log_softmax_module(module: nn.LogSoftmax, x: Node) -> Lipschitz:
    return _log_softmax(x, module.dim)


def _reduction(x: Node, dim: int | Sequence[int], keepdim: bool, fn: Callable) -> Lipschitz:
    """A 1-Lipschitz reduction that rises with every input: its gradient is a weighting."""
    dims = [_axis(x, d) for d in ((dim,) if isinstance(dim, int) else dim)]
    return _lipschitz(x, lambda t: fn(t, dims, keepdim), 1.0)


@rule(torch.logsumexp, "logsumexp")
def _logsumexp(x: Node, dim: int | Sequence[int], keepdim: bool = False) -> Lipschitz:
    return _reduction(x, dim, keepdim, torch.logsumexp)


@rule(torch.amax, "amax")
def _amax(x: Node, dim: int | Sequence[int], keepdim: bool = False) -> Lipschitz:
    return _reduction(x, dim, keepdim, torch.amax)


@rule(torch.amin, "amin")
def _amin(x: Node, dim: int | Sequence[int], keepdim: bool = False) -> Lipschitz:
    return _reduction(x, dim, keepdim, torch.amin)


def _order_statistics(x: Node, fn: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple:
    """Values of a sort or of a part of it; the indices stay without a rule.

    Sorting two vectors alike never increases their distance, and values rise with every input.
    """
    return node(_lipschitz(x, lambda t: fn(t)[0], 1.0), x), None


@rule(torch.sort, "sort")
def _sort(x: Node, dim: int = -1, descending: bool = False, *, stable: bool = False) -> tuple:
    axis = _axis(x, dim)
    return _order_statistics(x, lambda t: torch.sort(t, axis, descending))


@rule(torch.topk, "topk")
def _topk(x: Node, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple:
    if not sorted:
        raise LipcertError("the order of its values is not defined; use sorted=True")
    axis = _axis(x, dim)
    return _order_statistics(x, lambda t: torch.topk(t, k, axis, largest))


@rule(torch.kthvalue, "kthvalue")
def _kthvalue(x: Node, k: int, dim: int = -1, keepdim: bool = False) -> tuple:
    axis = _axis(x, dim)
    return _order_statistics(x, lambda t: torch.kthvalue(t, k, axis, keepdim))


@rule(torch.median, "median")
def _median(x: Node, dim: int | None = None, keepdim: bool = False) -> tuple:
    axis, _ = _along(x, dim)
    return _order_statistics(x, lambda t: torch.median(t, axis, keepdim))


@rule(torch.linalg.vector_norm)
def _vector_norm(x: Node, ord: float = 2, dim=None, keepdim: bool = False) -> Lipschitz:
    """| |x|_p - |y|_p | <= |x - y|_p <= n^max(0, 1/p - 1/2) |x - y|_2, for p >= 1."""
    if dim is None:
        raise LipcertError("without dim it mixes the samples of the batch; give dim=")
    if ord < 1:
        raise LipcertError(f"the {ord}-norm is no norm: it is not Lipschitz; use ord >= 1")
    dims = [_axis(x, d) for d in ((dim,) if isinstance(dim, int) else dim)]
    n = math.prod(x.shape[axis - 1] for axis in dims)

    def fn(t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t, ord, dims, keepdim)

    def image(lower: Tensor, upper: Tensor) -> Box:
        largest = torch.maximum(lower.abs(), upper.abs())
        least = torch.maximum(lower, -upper).clamp(min=0)
        return fn(least), fn(largest)

    return _lipschitz(x, fn, n ** max(0.0, 1 / ord - 0.5), image)


@rule(torch.norm, "norm")
def _norm(
    x: Node,
    p: float | str = 2,
    dim=None,
    keepdim: bool = False,
    out: None = None,
    dtype: None = None,
) -> Lipschitz:
    return _vector_norm(x, 2 if p == "fro" else float(p), dim, keepdim)


@rule(torch.std, "std")
def _std(x: Node, dim=None, unbiased: bool = True, keepdim: bool = False, **named) -> Lipschitz:
    """The norm of the centred vector over sqrt(n) or sqrt(n - 1); centring is a projection."""
    if "correction" in named:
        raise LipcertError("std with correction= has no rule; use unbiased=")
    if not isinstance(dim, int):
        raise LipcertError("std has a rule over one axis: give dim=")
    axis, n = _along(x, dim)
    if n <= unbiased:
        raise LipcertError("the standard deviation of a single element is NaN")

    def fn(t: Tensor) -> Tensor:
        return t.std(axis, unbiased, keepdim)

    return _lipschitz(x, fn, 1 / math.sqrt(n - unbiased), _between(fn, 0.0, math.inf))


def _one_axis(x: Node, axis: int, matrix: Tensor) -> Affine:
    matrices = tuple(matrix if a == axis else None for a in range(1, len(x.shape) + 1))
    ends = tuple(n if m is None else len(m) for n, m in zip(x.shape, matrices, strict=True))
    return fixed(Separable(x.shape, ends, matrices))


@rule(torch.cumsum, "cumsum")
def _cumsum(x: Node, dim: int) -> Affine:
    axis, n = _along(x, dim)
    return _one_axis(x, axis, torch.ones(n, n, dtype=torch.float64).tril())


@rule(torch.diff, "diff")
def _diff(x: Node, n: int = 1, dim: int = -1) -> Affine:
    axis, size = _along(x, dim)
    return _one_axis(x, axis, torch.eye(size, dtype=torch.float64).diff(n, 0))
