"""How tight certificates are, sample by sample: four radii that cannot come in another order.

certified <= sampled_global <= sampled_local <= smallest_perturbation. The first is proved, the last
was found. Those between divide the margins by the largest slopes that were *seen*, which are lower
estimates of the true constants: they are no certificates, and tell only where tightness is lost.

Reference: arXiv 1802.04034, section 6.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lipcert.adversary import evaluating
from lipcert.smallest import attacks, smallest_perturbation

RADII = ("certified", "sampled_global", "sampled_local", "smallest_perturbation")
ABOUT = ("attacks", "steps", "restarts", "seed")
_ON_THE_WAY = 16  # points from a sample to the nearest misclassified point
_AROUND = 32  # points in the ball
_ENTRIES = 2**25  # of the Jacobians held at a time
_RELATIVE, _ABSOLUTE = 1e-4, 1e-6  # rounding in the network, which certificates do not cover


@dataclass(frozen=True, eq=False)
class Inequality:
    """The four radii of each sample: L2, in input units; 0 for a wrong prediction.

    Attributes:
        certified: Proved: no change up to here.
        sampled_global: Least margin over the largest slope seen at any point of any sample. No
            certificate.
        sampled_local: The same with slopes seen in this sample's ball only, the one that reaches to
            its nearest misclassified point. No certificate.
        smallest_perturbation: Distance of that point; infinite if none was found.
        found_by: The attack that found it, "" if none did.
        about: Which attacks, and how hard they tried: the names of `ABOUT`, as text.
    """

    certified: Float[np.ndarray, " n"]
    sampled_global: Float[np.ndarray, " n"]
    sampled_local: Float[np.ndarray, " n"]
    smallest_perturbation: Float[np.ndarray, " n"]
    found_by: tuple[str, ...]
    about: dict[str, str]

    def __len__(self) -> int:
        return len(self.certified)

    def medians(self) -> dict[str, float]:
        """The median of each radius over all samples."""
        return {name: float(np.median(getattr(self, name))) for name in RADII}

    def ratios(self) -> dict[str, float]:
        """Median ratio of each radius to the one before it, and of the last to the first.

        Over the samples whose four radii are positive and finite; nan if there are none.
        """
        rows = np.array([getattr(self, name) for name in RADII])
        rows = rows[:, (np.isfinite(rows) & (rows > 0)).all(axis=0)]
        pairs = [(1, 0), (2, 1), (3, 2), (3, 0)]
        return {
            f"{RADII[i]} / {RADII[j]}": float(np.median(rows[i] / rows[j]))
            if rows.size
            else math.nan
            for i, j in pairs
        }

    def refuted(self) -> Bool[np.ndarray, " n"]:
        """Where a certificate is above what was found or seen, by more than rounding."""
        least = np.minimum(self.sampled_global, self.smallest_perturbation)
        return least < self.certified * (1 - _RELATIVE) - _ABSOLUTE


def measure(
    net: nn.Module,
    x: Float[Tensor, "n *shape"],
    labels: Int[Tensor, " n"],
    certified: Float[Tensor, " n"],
    *,
    steps: int,
    restarts: int,
    batch_size: int,
    seed: int,
    on_batch: Callable[[int], object] = lambda done: None,
) -> Inequality:
    """Attacks samples, samples slopes around them, and sets the four radii side by side.

    Args:
        net: Classifier, pixels in [0, 1] -> logits.
        x: Samples in [0, 1].
        labels: True classes.
        certified: The certified radius of each sample, 0 where the prediction was wrong.
        steps: Steps of each attack.
        restarts: Random starts of PGD at each radius tried.
        batch_size: Samples at a time.
        seed: Of all random numbers.
        on_batch: Called with the number of samples done.
    """
    generator = torch.Generator(device=x.device).manual_seed(seed)
    margins, local, distance, found_by = [], [], [], []
    seen = torch.zeros(())
    for start in range(0, len(x), batch_size):
        batch, classes = x[start : start + batch_size], labels[start : start + batch_size]
        point, nearest, by = smallest_perturbation(net, batch, classes, steps, restarts, generator)
        reach = nearest.where(nearest.isfinite(), certified[start : start + batch_size].to(nearest))
        reach = reach.clamp(max=math.sqrt(batch[0].numel()))
        here = torch.zeros(())
        for points in _around(batch, point, reach, generator):
            slopes = pair_slopes(net, points)
            here = torch.maximum(here.to(slopes), slopes[torch.arange(len(batch)), classes])
            seen = torch.maximum(seen.to(slopes), slopes.amax(0))
        with evaluating(net), torch.no_grad():
            logits = net(batch).double()
        margins.append(logits.gather(1, classes[:, None]) - logits)
        local.append(here)
        distance.append(nearest)
        found_by += by
        on_batch(start + len(batch))
    gaps = torch.cat(margins)
    own = nn.functional.one_hot(labels, gaps.shape[1]).bool()
    return Inequality(
        certified.cpu().numpy(),
        _radii(gaps, seen[labels], own).cpu().numpy(),
        _radii(gaps, torch.cat(local), own).cpu().numpy(),
        torch.cat(distance).cpu().numpy(),
        tuple(found_by),
        dict(zip(ABOUT, (", ".join(attacks()), *map(str, (steps, restarts, seed))), strict=True)),
    )


def _radii(margins: Tensor, slopes: Tensor, own: Tensor) -> Float[Tensor, " n"]:
    """Least margin over slope among the rivals; 0 where a margin is not positive."""
    ratio = torch.where(slopes > 0, margins / slopes, math.inf).where(margins > 0, 0)
    return ratio.masked_fill(own, math.inf).amin(1)


def pair_slopes(net: nn.Module, x: Float[Tensor, "b *shape"]) -> Float[Tensor, "b c c"]:
    """||grad (f_i - f_j)|| at each point for all pairs of logits, float64.

    No Lipschitz constant of f_i - f_j around a point where the net is differentiable is smaller.
    """
    with evaluating(net), torch.no_grad():
        classes = net(x[:1]).shape[1]
    at_a_time = max(1, _ENTRIES // (classes * x[0].numel()))
    return torch.cat([_pair_slopes(net, part) for part in x.split(at_a_time)])


def _pair_slopes(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with evaluating(net), torch.enable_grad():
        # The zero term ties nets that ignore their input to it.
        sums = net(x).sum(0) + 0 * x.sum()
        rows = [torch.autograd.grad(s, x, retain_graph=True)[0].flatten(1).double() for s in sums]
    jacobian = torch.stack(rows, 1)
    gram = jacobian @ jacobian.mT
    squares = gram.diagonal(dim1=1, dim2=2)
    return (squares[:, :, None] + squares[:, None] - 2 * gram).clamp(min=0).sqrt()


def _around(
    x: Tensor, point: Tensor, reach: Tensor, generator: torch.Generator
) -> Iterator[Float[Tensor, "b *shape"]]:
    """Points of each sample's ball: itself, on the way to `point`, and in random directions.

    Between x and a point where the margin is gone, the slope is somewhere at least margin over
    distance: those on the way make sampled_local <= smallest_perturbation but for what lies between
    them.
    """
    for t in torch.linspace(0, 1, _ON_THE_WAY + 1).tolist():
        yield x + t * (point - x)
    for _ in range(_AROUND):
        offset = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        share = torch.rand(len(x), generator=generator, device=x.device, dtype=torch.float64)
        length = reach * share / offset.flatten(1).double().norm(dim=1)
        yield x + offset * length.to(x).view(-1, *[1] * (x.ndim - 1))
