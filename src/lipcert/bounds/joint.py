"""One norm for a sum of terms: at most the sum of their norms."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lipcert.graph import Node
from lipcert.kinds import Constant
from lipcert.linear_kinds import Scale
from lipcert.linear_map import LinearMap, Stack
from lipcert.spectral import LOBPCG, Strategy

_UPDATES = 3
_TOP = LOBPCG(5)


def joint_norm(
    maps: Mapping[Node, LinearMap],
    radii: Mapping[Node, Tensor],
    norms: Mapping[Node, Constant],
    strategy: Strategy,
) -> Constant:
    """A bound of |sum_s A_s t_s| over all |t_s| <= r_s.

    For weights theta_s > 0 with sum 1, Cauchy-Schwarz gives the square root of the largest
    eigenvalue of sum_s A_s A_s^T r_s^2 / theta_s: the norm of the maps A_s^T r_s / sqrt(theta_s)
    stacked. Every choice of theta is valid. theta_s ~ ||A_s|| r_s gives at most the sum of the
    norms; the top eigenvector u then suggests theta_s ~ |A_s^T u| r_s, a few times.

    Args:
        maps: A_s from each source to one node.
        radii: r_s.
        norms: ||A_s||.
        strategy: How the norm of the stacked maps is computed.
    """
    maps = {s: map.to(torch.float64) for s, map in maps.items()}
    with torch.no_grad():
        sizes = torch.stack([norms[s].value * radii[s] for s in maps])
        theta = _weights(sizes)
        for _ in range(_UPDATES):
            stack = _stack(maps, radii, theta)
            generator = torch.Generator().manual_seed(0)
            shape = _TOP.kept, *stack.in_shape
            start = torch.randn(shape, generator=generator, dtype=torch.float64).to(stack.like)
            top = _TOP.refine(stack, start)[1][:1]
            pulled = [map.adjoint(top).norm() for map in maps.values()]
            theta = _weights(torch.stack(pulled) * torch.stack([radii[s] for s in maps]))
    return strategy(_stack(maps, radii, theta))


def _weights(sizes: Tensor) -> Tensor:
    """Positive numbers in proportion to the sizes, with sum 1."""
    floor = sizes.amax() * 1e-9
    sizes = sizes.clamp(min=floor.clamp(min=torch.finfo(sizes.dtype).tiny))
    return sizes / sizes.sum()


def _stack(maps: Mapping[Node, LinearMap], radii: Mapping[Node, Tensor], theta: Tensor) -> Stack:
    parts = []
    for (s, map), share in zip(maps.items(), theta, strict=True):
        factor = Scale(map.in_shape, map.in_shape, radii[s].to(torch.float64) / share.sqrt())
        parts.append(factor @ map.T)
    some = next(iter(maps.values()))
    return Stack(some.out_shape, (sum(p.out_size for p in parts),), tuple(parts))
