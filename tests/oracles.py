"""What bounds are compared with: numbers that no true bound may fall below."""

import torch
from torch import Tensor, nn


def jacobians(f: nn.Module, x: Tensor) -> Tensor:
    """d f_i / d x at each sample, `(n, outputs, inputs)`."""
    x = x.detach().requires_grad_()
    outputs = f(x).reshape(len(x), -1)
    rows = [torch.autograd.grad(o.sum(), x, retain_graph=True)[0] for o in outputs.unbind(1)]
    return torch.stack(rows, 1).flatten(2).detach()


def best_quotients(f: nn.Module, shape: tuple[int, ...], pairs: int = 1000, steps: int = 12):
    """(f(x) - f(y)) / |x - y| of many pairs improved by gradient ascent, `(n, outputs)`.

    Half of the pairs look for a large change of the output vector, half for one of a difference of
    two outputs. Every pair on the way is returned.
    """
    x = torch.randn(pairs, *shape)
    length = 10 ** torch.empty(pairs).uniform_(-3, 1)
    y = x + _times(length, _unit(torch.randn(pairs, *shape)))
    found = []
    for _ in range(steps):
        x.requires_grad_()
        y.requires_grad_()
        quotients = (f(x) - f(y)).reshape(pairs, -1) / (x - y).flatten(1).norm(dim=1, keepdim=True)
        found.append(quotients.detach())
        classes = quotients.shape[1]
        aim = torch.nn.functional.one_hot(torch.arange(pairs) % classes, classes).to(x.dtype)
        aim = aim - aim.roll(1, 1)
        target = quotients.norm(dim=1).where(torch.arange(pairs) % 2 == 0, (quotients * aim).sum(1))
        towards = torch.autograd.grad(target.sum() + 0 * (x.sum() + y.sum()), (x, y))
        x, y = (
            (end + _times(0.3 * length, _unit(slope))).detach()
            for end, slope in zip((x, y), towards, strict=True)
        )
    return torch.cat(found)


def _times(numbers: Tensor, batch: Tensor) -> Tensor:
    return numbers.reshape(-1, *(1,) * (batch.ndim - 1)) * batch


def _unit(batch: Tensor) -> Tensor:
    return _times(1 / batch.flatten(1).norm(dim=1).clamp(min=1e-300), batch)


def differences(vectors: Tensor) -> Tensor:
    """|v_i - v_j| for the rows or entries v of the last but one or last axis; largest over n.

    Args:
        vectors: Jacobians `(n, outputs, inputs)` or quotients `(n, outputs)`.
    """
    if vectors.ndim == 2:
        vectors = vectors[..., None]
    return (vectors[:, :, None] - vectors[:, None]).norm(dim=-1).amax(0)
