"""LOBPCG: a step costs about as much as one of power iteration, and far fewer are needed."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.spectral.iterative import Iterative, Rows, Sweep, norms

_TINY = 1e-30


@dataclass(frozen=True)
class LOBPCG(Iterative):
    """||A v|| for the best v near the last one: at most the norm of A.

    A step takes the best combination of the vector v, the residual r = A^T A v - |A v|^2 v, and
    the direction d in which v moved last, kept from call to call. Where the largest singular values
    are close, which is what training makes of them, this needs far fewer steps than power
    iteration.

    Attributes:
        steps: Steps a call.

    Reference: Knyazev 2001, SIAM J. Sci. Comput. 23, 517; with one vector and no preconditioner.
    """

    steps: int = 1
    kept: ClassVar[int] = 2

    def __post_init__(self):
        if self.steps < 1:
            raise LipcertError(f"LOBPCG(steps={self.steps}): at least one step.")

    def improve(self, apply: Sweep, adjoint: Sweep, state: Rows, order: Int[Tensor, " n"]) -> Rows:
        back = order.argsort()  # scalars of maps: from the order of the vectors to the images'
        v, d = ({key: rows[:, place] for key, rows in state.items()} for place in (0, 1))
        Av, Ad = apply(v), apply(d)
        for _ in range(self.steps):
            pulled = adjoint(Av)
            pulled = {key: pulled[key] for key in v}
            value = _dots(pulled, v)
            r, _ = _direction(_combine((pulled, 1), (v, -value)), value)
            Ar = apply(r)
            on_v, on_r = _dots(d, v), _dots(d, r)
            d, scale = _direction(_combine((d, 1), (v, -on_v), (r, -on_r)), torch.ones_like(on_v))
            shares = (scale, -scale * on_v, -scale * on_r)
            Ad = _combine(*zip((Ad, Av, Ar), (s[back] for s in shares), strict=True))
            images = Av, Ar, Ad
            gram = torch.stack([torch.stack([_dots(a, b) for b in images], 1) for a in images], 1)
            top = torch.linalg.eigh(gram.double().nan_to_num())[1][:, :, 2].to(gram)
            moved = torch.linalg.vector_norm(top[:, 1:], dim=1, keepdim=True).clamp(min=_TINY)
            weights = torch.cat([top[:, :1], moved, top[:, 1:] / moved], 1)
            a, m, b, c = weights.unbind(1)
            Ad = _combine((Ar, b), (Ad, c))
            Av = _combine((Av, a), (Ad, m))
            a, m, b, c = weights[order].unbind(1)
            d = _combine((r, b), (d, c))
            v, scale = _direction(_combine((v, a), (d, m)), 0 * a)  # rounding would add up
            Av = _combine((Av, scale[back]))
        return {
            key: torch.stack([_known(new[key], old[:, i]) for i, new in enumerate((v, d))], 1)
            for key, old in state.items()
        }


def _dots(x: Rows, y: Rows) -> Float[Tensor, " n"]:
    """The inner products of all rows, one after the other."""
    return torch.cat([(x[key] * y[key]).flatten(1).sum(1) for key in x])


def _combine(*terms: tuple[Rows, Tensor | float]) -> Rows:
    """The sum of rows, each times a number of its own."""
    sizes = [len(rows) for rows in terms[0][0].values()]
    total: Rows = {}
    for rows, factors in terms:
        parts = factors.split(sizes) if isinstance(factors, Tensor) else [factors] * len(sizes)
        for (key, x), factor in zip(rows.items(), parts, strict=True):
            if isinstance(factor, Tensor):
                factor = factor.reshape(-1, *(1,) * (x.ndim - 1))
            total[key] = total[key] + x * factor if key in total else x * factor
    return total


def _direction(rows: Rows, scale: Tensor) -> tuple[Rows, Tensor]:
    """The rows as unit vectors, zero where rounding is all there is; and their factors."""
    size = torch.cat([norms(x) for x in rows.values()])
    real = size > 1e4 * torch.finfo(size.dtype).eps * scale
    factors = torch.where(real, 1 / size, 0)
    return _combine((rows, factors)), factors


def _known(rows: Tensor, old: Tensor) -> Tensor:
    """The rows, or the old ones where a map gave nothing or what is no number."""
    ok = rows.flatten(1).isfinite().all(1) & (rows.flatten(1) != 0).any(1)
    return rows.where(ok.reshape(-1, *(1,) * (rows.ndim - 1)), old)
