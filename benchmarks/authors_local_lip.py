"""BCP and Local-Lip as their authors' public code computes them, to compare values and time with.

Reference: arXiv 2111.01395, github.com/yjhuangcd/local-lipschitz, commit 483069d (Local-Lip);
github.com/sungyoon-lee/bcp, commit 85defee (BCP). These are their methods in our own words,
checked against numbers that their code gave (tests/test_authors_local_lip.py).

What comes out is an estimate, no certificate: power iteration approaches every norm from below,
and boxes, masks and radii are built on these norms.

More of theirs that is kept:

- Iteration stops where no vector moves by more than 1e-3 (samples) or 1e-4 (whole layers; BCP
  1e-5), which may be far from the limit if the two largest singular values are close.
- The gradient runs through every iteration of a call, so memory grows with the iterations.
- The adjoint of a convolution tries an output padding of 0 and of 1; else RuntimeError.
- The translations of all K x K pairs of classes are computed, though a loss reads K - 1 of them.

Not kept: theirs turns a translation that is NaN into 0, that is into a certificate; here it stays
NaN. There is no second forward pass for the clean logits, and no array of vectors for a data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.layers import ClippedMaxMin, ClippedReLU, project_thresholds

Weighted = nn.Conv2d | nn.Linear
Steps = tuple[int, float, float]  # iterations, stopping change, added to lengths


@dataclass(frozen=True)
class Region:
    """What the activations at one place may be on the balls around a batch.

    Attributes:
        lb: Lower ends of the box, (B, *shape).
        ub: Upper ends.
        centre: Activations of the inputs themselves.
        radius: Of the ball around `centre`, (B,), by the norms of whole layers.
        varying: 0 where an activation is constant on the ball, else 1; None but for activations.
    """

    lb: Tensor
    ub: Tensor
    centre: Tensor
    radius: Tensor
    varying: Tensor | None = None


@dataclass(frozen=True)
class Pass:
    """One pass over a batch; the norms are of the L - 1 layers with weights before the last one.

    Attributes:
        regions: Ahead of the first module, then after every module but the last one.
        global_norms: Norms of whole layers, (L - 1,).
        local_norms: Norms of the masked layers of each sample, (L - 1, B).
        radius: Of the ball that the last layer sees, (B,).
        logits: Of the inputs themselves, (B, K).
        translations: Largest change (B, K, K) of logit i - logit j over the box and the ball.
    """

    regions: list[Region]
    global_norms: Tensor
    local_norms: Tensor
    radius: Tensor
    logits: Tensor
    translations: Tensor


@dataclass(eq=False)
class AuthorsLocalLip:
    """Local-Lip; `nn.ReLU`, `ClippedReLU` or `ClippedMaxMin` after each layer but the last.

    Attributes:
        net: Flattening comes after an activation. ValueError for what theirs would misread.
        eps: Radius of the balls, L2.
        sniter: Power iterations, at least one.
        opt_iter: Largest number of steps of `ball_box`.
        u_global: A start vector per layer but the last: (1, *input shape) of a convolution,
            (1, outputs) of a dense layer; standard normal where absent. Replaced in every call, as
        u_local: (B, *input shape) per layer but the last; the caller sets those of another batch.
    """

    net: nn.Sequential
    eps: float
    sniter: int
    opt_iter: int
    u_global: list[Tensor] = field(default_factory=list)
    u_local: list[Tensor] = field(default_factory=list)
    tolerance, tiny = 1e-4, 1e-12  # of the power iteration on whole layers

    def __post_init__(self) -> None:
        _check(self.net)
        self.inner = [i for i, m in enumerate(self.net) if isinstance(m, Weighted)][:-1]

    def __call__(
        self, x: Tensor, global_norms: Tensor | None = None, local_norms: Tensor | None = None
    ) -> Pass:
        """For the balls around `x` (B, *shape); norms that are given replace the iterated ones."""
        regions, whole = self._regions(x, global_norms)
        masked = self._local_norms(regions, whole) if local_norms is None else local_norms
        radius = self.eps * masked.prod(0)
        weight, logits = self.net[-1].weight, self.net[-1](regions[-1].centre)
        translations = ball_box(weight[:, None] - weight, regions[-1], radius, self.opt_iter)
        return Pass(regions, whole, masked, radius, logits, translations)

    def _regions(self, x: Tensor, given: Tensor | None) -> tuple[list[Region], Tensor]:
        norms: list[Tensor] = []
        regions = [Region(x - self.eps, x + self.eps, x, x.new_full((len(x),), self.eps))]
        for module in self.net[:-1]:
            before, k = regions[-1], len(norms)
            if isinstance(module, Weighted):
                norms.append(self._global_norm(k, module, before) if given is None else given[k])
                regions.append(_weighted(module, before, norms[k]))
            elif isinstance(module, nn.Flatten):
                ends = (module(t) for t in (before.lb, before.ub, before.centre))
                regions.append(Region(*ends, before.radius, module(before.varying)))
            else:
                regions.append(_activated(module, before))
        return regions, torch.stack(norms)

    def _global_norm(self, k: int, layer: Weighted, before: Region) -> Tensor:
        dense = isinstance(layer, nn.Linear)
        weight, tiny = (layer.weight.T, 0.0) if dense else (layer.weight, self.tiny)
        if k == len(self.u_global):
            shape = (1, len(layer.weight)) if dense else (1, *before.centre.shape[1:])
            self.u_global.append(weight.new_empty(shape).normal_())
        steps = self.sniter, self.tolerance, tiny
        norm, self.u_global[k] = _iterate(layer, weight, self.u_global[k], steps)
        return norm[0]

    def _local_norms(self, regions: list[Region], global_norms: Tensor) -> Tensor:
        if not self.u_local:
            self.u_local = [torch.randn_like(regions[i].centre) for i in self.inner]
        norms = []
        for k, i in enumerate(self.inner):
            columns = 1 if regions[i].varying is None else regions[i].varying
            # An output of MaxMin mixes two units: that it is constant frees no row.
            rows = 1 if isinstance(self.net[i + 1], ClippedMaxMin) else regions[i + 2].varying
            layer, u, steps = self.net[i], self.u_local[k], (self.sniter, 1e-3, 1e-12)
            norm, self.u_local[k] = _iterate(layer, layer.weight, u, steps, (rows, columns))
            norms.append(norm)
        return torch.stack(norms)


class AuthorsBCP(AuthorsLocalLip):
    """BCP: the same boxes, and on the last ball the norms of whole layers for every sample."""

    tolerance, tiny = 1e-5, 1e-24

    def _local_norms(self, regions: list[Region], global_norms: Tensor) -> Tensor:
        return global_norms[:, None].expand(-1, len(regions[0].radius))


def ball_box(rows: Tensor, region: Region, radius: Tensor, steps: int) -> Tensor:
    """Largest row . d, (B, K, K), of `rows` (K, K, n) over |d| <= `radius` (B,) and the box.

    Any number of steps gives an upper bound, up to rounding; 0 steps: the ball alone (LMT).
    """
    low = (region.lb - region.centre).clamp(max=0)[:, None, None]
    high = (region.ub - region.centre).clamp(min=0)[:, None, None]
    r = radius[:, None, None, None]
    d = r * (rows / (rows.norm(dim=2, keepdim=True) + 1e-12))  # rows of i = j are 0
    for _ in range(steps):
        if not ((d < low) | (d > high)).any():
            break
        under, over = d <= low, d >= high
        corner = torch.where(under, low, torch.where(over, high, 0))
        cut = torch.where(under | over, d, 0)
        wanted, there = (r**2 - torch.stack([corner, cut]).square().sum(4, True)).clamp(min=0)
        d = corner + (d - cut) * (wanted + 1e-12).sqrt() / (there + 1e-12).sqrt()
    return (rows * d).sum(3)


def worst_logits(done: Pass, y: Tensor) -> Tensor:
    """Logits (B, K), each but the label's raised by its translation against the label."""
    return done.logits + done.translations[torch.arange(len(y)), :, y]


def gloro_logits(done: Pass, y: Tensor) -> Tensor:
    """The logits and the greatest wrong one of `worst_logits`, (B, K + 1)."""
    wrong = worst_logits(done, y).scatter(1, y[:, None], -torch.inf)
    return torch.cat([done.logits, wrong.amax(1, keepdim=True)], dim=1)


def bcp_loss(done: Pass, y: Tensor, kappa: float = 0.0) -> Tensor:
    """kappa cross entropy of the logits + (1 - kappa) cross entropy of the worst logits."""
    worst = F.cross_entropy(worst_logits(done, y), y)
    return kappa * F.cross_entropy(done.logits, y) + (1 - kappa) * worst


def gloro_loss(done: Pass, y: Tensor) -> Tensor:
    """Cross entropy of `gloro_logits`."""
    return F.cross_entropy(gloro_logits(done, y), y)


def partly_local(done: Pass, local: Tensor) -> Tensor:
    """The radius (B,) with local norms only where `local` (L - 1,) is true (for Tiny-ImageNet)."""
    norms = torch.where(local[:, None], done.local_norms, done.global_norms[:, None])
    return done.regions[0].radius * norms.prod(0)


def sparsity(net: nn.Sequential, done: Pass, weight: float = 0.1) -> Tensor:
    """How far the units of a clipped net are from constant (their code for Tiny-ImageNet)."""
    total = done.radius.new_zeros(())
    for module, before, after in zip(net, done.regions, done.regions[1:], strict=False):
        if isinstance(module, ClippedReLU):
            total = total + before.ub.relu().mean()
            total = total + weight * (module.threshold - before.lb).relu().mean()
        elif isinstance(module, ClippedMaxMin):
            total = total + (module.upper - after.lb.chunk(2, 1)[0]).relu().mean()
            total = total + (after.ub.chunk(2, 1)[1] - module.lower).relu().mean()
    return total


def step(method: AuthorsLocalLip, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One training step on the GloRo form, with their projection; returns the loss before it."""
    loss = gloro_loss(method(x), y)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    project_thresholds(method.net)
    return loss.detach()


def _weighted(layer: Weighted, before: Region, norm: Tensor) -> Region:
    centre, middle = layer(before.centre), layer((before.lb + before.ub) / 2)
    half = _linear(layer, layer.weight.abs(), (before.ub - before.lb) / 2)
    # A filter's whole norm, also where the border of the image cuts it.
    rows = layer.weight.flatten(1).norm(dim=1).view(-1, *[1] * (centre.ndim - 2))
    reach = _over(before.radius, centre) * rows
    lb = torch.maximum(middle - half, centre - reach)
    ub = torch.minimum(middle + half, centre + reach)
    return Region(lb, ub, centre, before.radius * norm)


def _activated(phi: nn.Module, before: Region) -> Region:
    r = _over(before.radius, before.centre)
    lb = torch.maximum(phi(before.lb), phi(before.centre - r))
    ub = torch.minimum(phi(before.ub), phi(before.centre + r))
    if isinstance(phi, ClippedMaxMin):
        constant = torch.cat([lb.chunk(2, 1)[0] >= phi.upper, ub.chunk(2, 1)[1] <= phi.lower], 1)
    else:
        high = phi.threshold if isinstance(phi, ClippedReLU) else torch.inf
        constant = (before.ub <= 0) | (before.lb > high)
    return Region(lb, ub, phi(before.centre), before.radius, (~constant).to(lb))


def _linear(layer: Weighted, weight: Tensor, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return x @ weight.T
    return F.conv2d(x, weight, None, layer.stride, layer.padding)


def _adjoint(layer: Weighted, weight: Tensor, y: Tensor, shape: torch.Size) -> Tensor:
    if isinstance(layer, nn.Linear):
        return y @ weight
    x = F.conv_transpose2d(y, weight, None, layer.stride, layer.padding)
    if x.shape[1:] != shape[1:]:
        x = F.conv_transpose2d(y, weight, None, layer.stride, layer.padding, 1)
    return x


def _iterate(
    layer: Weighted, weight: Tensor, u: Tensor, steps: Steps, masks: Sequence[Tensor | int] = (1, 1)
) -> tuple[Tensor, Tensor]:
    """Norms (B,) of the layer with masks, and the vectors `u` (B, *shape) after the iteration."""
    (count, stop, tiny), (rows, columns) = steps, masks
    u = u.detach()
    for _ in range(count):
        old = u
        v = _unit(rows * _linear(layer, weight, columns * u), tiny)
        u = _unit(columns * _adjoint(layer, weight, v, u.shape), tiny)
        if (u - old).flatten(1).norm(dim=1).max() < stop:
            break
    return (v * rows * _linear(layer, weight, columns * u)).flatten(1).sum(1), u.detach()


def _over(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _unit(batch: Tensor, tiny: float) -> Tensor:
    return batch / (_over(batch.flatten(1).norm(dim=1), batch) + tiny)


def _check(net: nn.Sequential) -> None:
    for module in net:
        if not isinstance(module, Weighted | nn.Flatten | nn.ReLU | ClippedReLU | ClippedMaxMin):
            raise ValueError(f"only Conv2d, Linear, Flatten and the activations, not {module}")
        if isinstance(module, nn.Conv2d) and (
            (module.groups, module.dilation, module.padding_mode) != (1, (1, 1), "zeros")
            or isinstance(module.padding, str)
        ):
            raise ValueError(f"only a stride and a zero padding given in numbers, not {module}")
