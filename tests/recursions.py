"""Other ways to compute what the bounds on chains prove: published recursions, and the LMI."""

import itertools

import torch
from torch import Tensor, nn

from lipcert.bounds.extent import Extent, through_map, through_slopes
from lipcert.graph import Affine


def relu_net(widths, seed=0):
    """Dense layers with ReLUs between them."""
    torch.manual_seed(seed)
    layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def he_net(width, depth, seed=0):
    """A net with weights as they are at the start of training."""
    net = relu_net([width, *[width] * depth, 5], seed)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    return net


def weights(net) -> list[Tensor]:
    return [m.weight.detach() for m in net if isinstance(m, nn.Linear)]


def eclipse_fast(weights: list[Tensor]) -> Tensor:
    """ECLipsE-Fast for ReLUs (m = 1/2) as published: X_k = l I - l^2 m^2 W X^-1 W^T."""
    x = torch.eye(weights[0].shape[1])
    for w in weights[:-1]:
        inner = w @ torch.linalg.solve(x, w.mT) / 4
        number = 1 / (2 * torch.linalg.eigvalsh(inner)[-1])
        x = number * torch.eye(len(w)) - number**2 * inner
    return torch.linalg.eigvalsh(weights[-1] @ torch.linalg.solve(x, weights[-1].mT))[-1].sqrt()


def multipliers_and_bound(facts, nodes, gains, rows):
    """G of each function of a chain, and the square of what they prove of some rows."""
    at, found = Extent(facts.one), []
    for n in nodes:
        if isinstance(n.op, Affine):
            at = through_map(at, facts.maps[n])
            continue

        def keep(moving, n=n, at=at):
            found.append(gains(n)(moving) * at.scale**2)
            return found[-1] / at.scale**2

        at = through_slopes(at, *facts.slopes[n], facts.reading.of(n), keep)
    matrix = at.scale**2 * rows @ at.matrix @ rows.mT
    return found, torch.linalg.eigvalsh(matrix)[-1]


def least_eigenvalue(facts, nodes, found, rows, rho) -> Tensor:
    """Of the matrix of LipSDP for affine maps and functions in turns: negative if rho is no bound.

    In units of each function's own diagonal.
    """
    pairs = list(zip(nodes[::2], nodes[1::2], strict=True))
    count = facts.maps[nodes[0]].in_size
    sizes = [count, *(facts.maps[n].out_size for n, _ in pairs)]
    begins = [sum(sizes[:k]) for k in range(len(sizes))]
    where = [slice(b, b + s) for b, s in zip(begins, sizes, strict=True)]
    whole = torch.zeros(sum(sizes), sum(sizes))
    whole[where[0], where[0]] = torch.eye(count)
    for k, (affine, n) in enumerate(pairs, 1):
        a, (low, high) = facts.maps[affine].dense(), facts.slopes[n]
        c, r = (low + high) / 2, (high - low) / 2
        t = 1 / (found[k - 1] * r**2)
        whole[where[k], where[k]] += torch.diag(t)
        whole[where[k], where[k - 1]] = -(c * t)[:, None] * a
        whole[where[k - 1], where[k]] = whole[where[k], where[k - 1]].mT
        whole[where[k - 1], where[k - 1]] += a.mT @ ((c**2 - r**2) * t)[:, None].mul(a)
    whole[where[-1], where[-1]] -= rows.mT @ rows / rho
    unit = torch.cat([torch.ones(count), *((g.square() / g).sqrt() for g in found)])
    return torch.linalg.eigvalsh(unit[:, None] * whole * unit)[0]
