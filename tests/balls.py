"""Balls around samples from the inside: points in them, and what they must not contradict."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.bounds.local_liplt import LocalLipLT
from lipcert.graph import Affine, Graph, Node, Slope
from lipcert.layers import ClippedMaxMin, ClippedReLU, MaxMin
from nets import NETS, Net


class Residual(nn.Module):
    """Saturating activations of several kinds on branches that meet again."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(16, 3)
        self.clip, self.pairs = ClippedReLU(0.3), ClippedMaxMin(0.4, -0.3)

    def forward(self, x):
        x = self.clip(self.first(x))
        y = x + self.pairs(self.second(x))
        return self.head(torch.cat([F.relu(y), y.clamp(-0.1, 0.5)], 1))


# Networks whose units often saturate; the others of `NETS` are of every kind of op.
SATURATING = {
    "clipped": Net(
        lambda: nn.Sequential(
            *(nn.Linear(6, 12), ClippedReLU(0.5), nn.Linear(12, 8), ClippedReLU(0.2)),
            nn.Linear(8, 3),
        ),
        (6,),
    ),
    "clipped pairs": Net(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), ClippedMaxMin(0.3, -0.3), nn.Flatten()),
            *(nn.Linear(64, 8), ClippedMaxMin(0.2, -0.2), nn.Linear(8, 3)),
        ),
        (1, 4, 4),
    ),
    "pairs then relu": Net(
        lambda: nn.Sequential(
            nn.Linear(5, 8), MaxMin(), nn.ReLU(), nn.Linear(8, 6), nn.Hardtanh(), nn.Linear(6, 3)
        ),
        (5,),
    ),
    "residual": Net(Residual, (6,)),
}
EVERY = NETS | SATURATING


def built(name: str, seed: int = 0, trained: bool = False) -> nn.Module:
    """A network of `EVERY`, fresh or after a few steps on random samples."""
    net = EVERY[name].build(seed)
    x = torch.randn(24, *EVERY[name].shape)
    net(x)  # gives thresholds their shape
    parameters = [p for p in net.parameters() if p.requires_grad]
    for _ in range(8 * trained):
        loss = F.cross_entropy(net(x), torch.arange(24) % 3)
        slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
        size = sum(s.square().sum() for s in slopes if s is not None).sqrt()
        with torch.no_grad():
            for p, s in zip(parameters, slopes, strict=True):
                if s is not None:
                    p -= 0.3 * s / size.clamp(min=1e-9)
    return net


def followed(bound, x: Tensor, eps=None):
    """The bound of one batch with its parts: `around`, and what has `reached` each node."""
    return bound._around(x, eps)


def slopes_of(graph: Graph) -> list[Node]:
    """The elementwise activations, in order."""
    return [n for n in graph if isinstance(n.op, Slope)]


def affine_of(graph: Graph) -> list[Node]:
    """The affine pieces, in order."""
    return [n for n in graph if isinstance(n.op, Affine)]


def points(
    net: nn.Module, x: Tensor, radii: Tensor, count: int, clip=None, steps: int = 5
) -> Tensor:
    """Points of each ball, `(b, count, *shape)`: on the sphere, inside, and by gradient ascent.

    A quarter climbs on differences of two logits, a quarter on the change of the whole output; of
    the rest half is on the sphere. One in eight is very near the sample.
    """
    b, shape = len(x), x.shape[1:]
    r = radii.reshape(b, 1, 1)
    start = x.reshape(b, 1, -1)

    def held(d: Tensor) -> Tensor:
        """Back into the ball, then into the box: neither step leaves the ball."""
        d = d * (r / d.norm(dim=2, keepdim=True).clamp(min=1e-300)).clamp(max=1)
        return d if clip is None else (start + d).clamp(*clip) - start

    d = torch.randn(b, count, start.shape[2])
    d = d / d.norm(dim=2, keepdim=True) * r
    inner = torch.rand(b, count, 1)
    inner[:, ::2] = 1
    inner[:, 3::8] *= 1e-3
    d = held(d * inner)
    climbing = torch.arange(count) % 4 < 2
    aims = d[:, climbing]
    centre = net(x).detach()[:, None]
    for _ in range(steps):
        aims.requires_grad_()
        out = net((start + aims).reshape(-1, *shape)).unflatten(0, (b, -1)) - centre
        first, second = out[:, ::2], out[:, 1::2]
        pick = torch.arange(first.shape[1])
        classes = out.shape[2]
        margins = (
            first[:, pick, pick % classes] - first[:, pick, (pick + 1 + pick // 3 % 2) % classes]
        )
        (slope,) = torch.autograd.grad(margins.sum() + second.norm(dim=2).sum(), aims)
        size = slope.norm(dim=2, keepdim=True)
        aims = held((aims + 0.7 * r * slope / size.where(size > 0, 1)).detach())
    d[:, climbing] = aims
    return (start + d).reshape(b, count, *shape)


def violations(bound, x: Tensor, eps, found: Tensor, clip=None) -> dict[str, float]:
    """By how much points `(b, p, *shape)` contradict each claim; at most 0 for a true bound.

    Relative to the size of what is claimed, less what rounding may do (1e-10).
    """
    graph, local = bound.graph, followed(bound, x, eps)
    b, p = found.shape[:2]
    with torch.no_grad():
        centres = graph.values(x)
        values = {n: v.unflatten(0, (b, p)) for n, v in graph.values(found.flatten(0, 1)).items()}
        radius = local.around.radii
        moved = (found - x[:, None]).flatten(2).norm(dim=2)
        assert (moved <= radius[:, None] * (1 + 1e-12)).all()
        worst = {"box": 0.0, "constant": 0.0, "secant": 0.0, "reach": 0.0, "pairs": 0.0}

        def note(what: str, excess: Tensor, scale: Tensor | float) -> None:
            worst[what] = max(worst[what], float((excess - 1e-10 * scale).max()))

        for n in graph:
            v, c = values[n].flatten(2), centres[n].flatten(1)[:, None]
            size = 1 + c.abs().max() + v.abs().max()
            lower, upper = (end.flatten(1)[:, None] for end in local.around.box(n))
            note("box", torch.maximum(lower - v, v - upper), size)
            weights, needed = local.around.weights(n), local.around.needed(n)
            w = torch.ones_like(c) if weights is None else weights.flatten(1)[:, None]
            assert ((w >= 0) & (w <= 1)).all()
            change = (v - c).abs()
            note("constant", change * (w == 0), size)
            counted = (w > 0) if needed is None else (w > 0) & (needed.flatten(1)[:, None] > 0)
            if isinstance(local, LocalLipLT):  # it speaks of the values themselves
                w, counted = torch.ones_like(w), torch.ones_like(counted)
            # Changes below the rounding of the network's own values say nothing.
            unit = (change - 1e-13 * size).clamp(min=0) * counted / w.where(w > 0, 1)
            reached = local.reached(n).value[:, None]
            note("reach", unit.norm(dim=2) - reached * moved, size)
            other = v.roll(1, 1)
            apart = (found - found.roll(1, 1)).flatten(2).norm(dim=2)
            # Between two points of the ball as well: it is convex.
            step = ((v - other).abs() - 1e-13 * size).clamp(min=0) * counted / w.where(w > 0, 1)
            note("pairs", step.norm(dim=2) - reached * apart, size)
            if isinstance(n.op, Slope):
                low, high = (
                    s.expand(b, *n.shape).flatten(1)[:, None] for s in local.around.slopes(n)
                )
                z = values[n.inputs[0]].flatten(2)
                for start, image in ((z.roll(1, 1), other), (_centre(n, centres), c)):
                    step, rise = z - start, v - image
                    ends = torch.stack([low * step, high * step])
                    note("secant", torch.maximum(ends.amin(0) - rise, rise - ends.amax(0)), size)
    return worst


def _centre(n: Node, centres: dict[Node, Tensor]) -> Tensor:
    return centres[n.inputs[0]].flatten(1)[:, None]


def margin_violations(bound, x: Tensor, eps, found: Tensor) -> float:
    """The same of the constants and the drops of every pair of classes."""
    with torch.no_grad():
        net, K = bound.graph.model, bound(x, eps)
        b, p = found.shape[:2]
        logits, out = net(x), net(found.flatten(0, 1)).unflatten(0, (b, p))
        moved = (found - x[:, None]).flatten(2).norm(dim=2)
        worst, size = 0.0, 1 + float(out.abs().max())
        for i in range(K.classes):
            wanted = torch.full((b,), i)
            fall = (logits[:, i, None] - logits)[:, None] - (out[:, :, i, None] - out)
            for member in K.members():
                claimed = member.row(wanted)[:, None] * moved[:, :, None]
                if member.drop is not None:
                    claimed = torch.minimum(claimed, member.drop(wanted)[:, None])
                valid = torch.as_tensor(member.valid_radius).expand(b)[:, None] * (1 + 1e-12)
                excess = (fall - claimed).masked_fill((moved > valid)[:, :, None], -1)
                worst = max(worst, float(excess.max()) - 1e-10 * size)
    return worst
