"""CLL beside GloRo Nets' loss and cross-entropy with an offset (LMT) on CIFAR-10, a short budget.

Same network (4C3F of CLL), augmentation, optimiser, epochs and seed; the losses differ, and what
belongs to them (CLL's decay of the constant, GloRo's schedule of the radius). All nets are
certified with the same bound. A few epochs instead of the published 801, so the figures compare
beginnings. Resumes where it was stopped.

    python benchmarks/cll_cifar10.py --data DIR --out DIR [--epochs 8]
"""

import argparse
import dataclasses
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import RESULTS, save

import lipcert as lc
from lipcert import recipes
from lipcert.data import Split
from lipcert.run import Run
from lipcert.train import train

RADII = {"36/255": 36 / 255, "72/255": 72 / 255, "108/255": 108 / 255, "0.15": 0.15, "0.5": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    training = lc.data.load(options.data, Split.TRAIN)
    test = lc.data.load(options.data, Split.EVALUATION)
    gloro = recipes.get("gloro-cifar10-c4f3_cll")
    candidates = {
        "CLL": recipes.get("cll-cifar10-c4f3_cll"),
        "GloRo": gloro,
        "cross-entropy + offset (LMT)": dataclasses.replace(gloro, loss=lc.losses.lmt),
    }
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)
    rows = {}
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for place, (name, recipe) in enumerate(candidates.items()):
        run = Run(options.out / str(place), dataclasses.replace(recipe, epochs=options.epochs))
        run.folder.mkdir(parents=True, exist_ok=True)
        net = train(run, training, on_epoch=lambda epoch, at=name: print(at, epoch, flush=True))
        epochs = run.path("metrics.jsonl").read_text().splitlines()
        bound = lc.Product(lc.trace(net, tuple(test.images.shape[1:])))
        cert = lc.certify(net, test.pixels(), bound=bound)
        curve = lc.accuracy.curve(cert, test.labels, grid)
        rows[name] = {
            "epochs": options.epochs,
            "seconds of training": round(sum(json.loads(e)["seconds"] for e in epochs)),
            "clean": lc.clean_accuracy(cert, test.labels),
            "CRA": {k: lc.certified_accuracy(cert, test.labels, r) for k, r in RADII.items()},
            "ACR": round(lc.average_certified_radius(cert, test.labels), 4),
            "Lipschitz constant": float(bound.lipschitz()),
            "curve, radius 0 to 1 in steps of 0.05": [round(float(c), 4) for c in curve[::10]],
        }
        print(name, rows[name], flush=True)
        axes.plot(grid, 100 * curve, label=name)
    save("cll_cifar10", {"runs": rows})
    axes.set(xlabel="L2 radius, pixels in [0, 1]", ylabel="certified accuracy, %", xlim=(0, 1))
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(RESULTS / "cll_cifar10.png", dpi=150)


if __name__ == "__main__":
    main()
