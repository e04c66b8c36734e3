"""Draws how the ellipsoid bound goes through one layer of two neurons: docs/ellipsoid.png.

    python benchmarks/ellipse_picture.py [--out docs/ellipsoid.png]

Left the changes before the activation, in the middle after it, right after the next matrix; the
product bound has a ball at each place.
"""

import argparse
import math

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lipcert.bounds.extent import Extent, balanced, through_map, through_slopes
from lipcert.linear_kinds import Dense

FIRST = torch.tensor([[1.5, 0.45], [0.65, -0.55]], dtype=torch.float64)
SECOND = torch.tensor([[0.9, -0.75], [0.35, 0.8]], dtype=torch.float64)
PAIR = torch.tensor([1.0, -1.0], dtype=torch.float64)  # logit 1 minus logit 2
POINTS = 1400
ELLIPSOID, PRODUCT, CHANGES = "#1f5fa8", "#c8502d", "#9a9a9a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="docs/ellipsoid.png")
    out = parser.parse_args().out

    ball = Extent(torch.ones((), dtype=torch.float64))
    before = through_map(ball, dense(FIRST))
    none, one = torch.zeros(2).to(FIRST), torch.ones(2).to(FIRST)
    after = through_slopes(before, none, one, SECOND, balanced)
    logits = through_map(after, dense(SECOND))

    generator = torch.Generator().manual_seed(0)
    x = turned(torch.rand(POINTS, generator=generator) * 2 * math.pi)
    x = x * torch.rand(POINTS, 1, generator=generator).sqrt()  # anywhere in the unit ball
    slopes = torch.rand(POINTS, 2, generator=generator)
    slopes[::2] = slopes[::2].round()  # every other one at its ends
    z = x @ FIRST.mT
    y = slopes * z
    longest = [norm(FIRST), norm(SECOND) * norm(FIRST)]

    figure = Figure(figsize=(9, 3.3))
    left, middle, right = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.2, top=0.92, wspace=0.14)
    scatter(left, z)
    circle(left, 1.0, "black", "unit ball of the input")
    ellipse(left, before, "ellipsoid $S = A A^T$")
    left.set_title("before: changes of $z = A x$", fontsize=10)

    scatter(middle, y)
    ellipse(middle, after, "ellipsoid $P$")
    circle(middle, longest[0], PRODUCT, "product: ball of $|A|$")
    middle.set_title("after: slopes 0 to 1 on every entry", fontsize=10)

    scatter(right, y @ SECOND.mT)
    ellipse(right, logits, "ellipsoid $S = B P B^T$")
    circle(right, longest[1], PRODUCT, "product: $|B| |A|$")
    widths(right, logits, longest[1])
    right.set_title("the logits $B$ times these, a pair $w$", fontsize=10)
    for axes, reach in ((left, 1.9), (middle, 1.9), (right, 2.3)):
        axes.set_aspect("equal")
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
        axes.set_xticks(range(-2, 3) if reach > 2 else range(-1, 2))
        axes.set_yticks(axes.get_xticks())
        axes.tick_params(labelsize=7)
        axes.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.07), frameon=False, ncols=2
        )
    figure.savefig(out, dpi=150)


def dense(weight: Tensor) -> Dense:
    return Dense((2,), (2,), weight)


def norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight, 2))


def turned(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], 1).double()


def scatter(axes: Axes, points: Tensor) -> None:
    axes.plot(*points.T, ".", color=CHANGES, markersize=1.5, markeredgewidth=0)


def circle(axes: Axes, radius: float, colour: str, label: str) -> None:
    rim = radius * turned(torch.linspace(0, 2 * math.pi, 200))
    axes.plot(*rim.T, "--", color=colour, linewidth=1, label=label)


def ellipse(axes: Axes, extent: Extent, label: str) -> None:
    assert extent.root is not None
    factor = extent.root.mT
    rim = extent.scale * turned(torch.linspace(0, 2 * math.pi, 200)) @ factor.mT
    axes.plot(*rim.T, color=ELLIPSOID, linewidth=1.5, label=label)


def widths(axes: Axes, extent: Extent, radius: float) -> None:
    """How far the pair's margin moves: the support of both sets in the direction of w."""
    assert extent.root is not None
    factor = extent.root.mT
    length = PAIR.norm()
    w, along = PAIR / length, torch.stack([PAIR[1], -PAIR[0]]).neg() / length
    inside = float(extent.scale * (w @ factor).norm())
    for width, colour, label in (
        (inside, ELLIPSOID, r"$\sqrt{w^T S w}$"),
        (radius, PRODUCT, r"$|w| |B| |A|$"),
    ):
        tangent = torch.stack([width * w - 0.8 * along, width * w + 0.8 * along])
        value = f"{label} = {float(width * length):.2f}"
        axes.plot(*tangent.T, ":", color=colour, linewidth=1.5, label=value)
    axes.annotate("", (radius * w).tolist(), (0, 0), arrowprops={"arrowstyle": "->", "lw": 0.8})
    axes.text(*(0.8 * radius * w + 0.15 * along).tolist(), "$w$", fontsize=10)


if __name__ == "__main__":
    main()
