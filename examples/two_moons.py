"""Train four nets on two moons and draw their decision regions and certified balls.

    python examples/two_moons.py --out moons.png

Light is where a net is certified within eps of the point, dark where it is not; the circles are
certified balls. The same net and training, but for the loss: CLL with three slacks, and GloRo's.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from slack_sweep import trained

import lipcert as lc
from lipcert import recipes
from lipcert.accuracy import certified_accuracy, clean_accuracy
from lipcert.data import Split, load
from lipcert.recipe import Recipe

SPAN = (-1.5, 2.5, -1.0, 1.5)
BALLS = 80


def draw(axes: Axes, net: torch.nn.Module, title: str, eps: float) -> str:
    """Draws one net; gives a line of its results."""
    test = load("moons", Split.EVALUATION)
    bound = lc.Product(lc.trace(net, (2,)))
    certificate = lc.certify(net, test.pixels(), bound=bound)
    left, right, low, high = SPAN
    y, x = torch.meshgrid(
        torch.linspace(low, high, 500), torch.linspace(left, right, 800), indexing="ij"
    )
    plane = lc.certify(net, torch.stack([x, y], -1).reshape(-1, 2), bound=bound)
    signed = plane.radius * (1 - 2.0 * plane.prediction)
    signed = signed.reshape(x.shape).numpy()
    levels = [-99.0, -eps, 0.0, eps, 99.0]
    axes.contourf(x, y, signed, levels, colors=["#fbe3d0", "#f2a96f", "#7ea9d8", "#d9e7f6"])
    axes.contour(x, y, signed, [0.0], colors="black", linewidths=1)
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(1))[:BALLS]
    circles = [
        Circle(tuple(point), radius)
        for point, radius in zip(
            test.pixels(some).tolist(), certificate.radius[some].tolist(), strict=True
        )
    ]
    axes.add_collection(PatchCollection(circles, facecolor="none", edgecolor="#00000066", lw=0.5))
    points = test.pixels(slice(None, None, 10)).numpy()
    labels = test.labels[::10].numpy()
    for label, colour in ((0, "#1f4e85"), (1, "#a04a08")):
        axes.plot(*points[labels == label].T, ",", color=colour)
    clean = clean_accuracy(certificate, test.labels)
    certified = certified_accuracy(certificate, test.labels, eps)
    line = (
        f"{title}: clean {clean:.1%}, certified {certified:.1%}, K = {float(bound.lipschitz()):.0f}"
    )
    axes.set(xlim=SPAN[:2], ylim=SPAN[2:], aspect="equal", xticks=[], yticks=[])
    axes.set_title(f"{title}\ncertified {certified:.1%}", fontsize=10)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("moons.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    calibrated = recipes.get("cll-moons")
    nets: dict[str, Recipe] = {"GloRo": recipes.get("gloro-moons")}
    for slack in (0.75, 0.25, 1e-4):
        options = {**calibrated.loss_options, "slack": slack}
        nets[f"CLL, slack {slack:g}"] = dataclasses.replace(calibrated, loss_options=options)
    figure = Figure(figsize=(10, 2.2), dpi=150, layout="constrained")
    every = figure.subplots(1, len(nets))
    with tempfile.TemporaryDirectory() as folder:
        for place, (title, recipe) in enumerate(nets.items()):
            one = dataclasses.replace(recipe, epochs=arguments.epochs)
            net = trained(one, Path(folder) / str(place), title)
            print(draw(every[place], net, title, one.eps), flush=True)
    figure.savefig(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
