"""CRM trained with LipLT against CRM trained with the product bound, on MNIST.

Same network, loss, epochs, seeds; only the bound of the training differs. All nets are certified
with the tightest of both bounds, so the figures compare trainings and not certificates. Resumes
where it was stopped.

    python benchmarks/crm_mnist.py --data DIR --out DIR [--seeds 2]
"""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import RESULTS, save

import lipcert as lc
from lipcert import recipes
from lipcert.data import Split
from lipcert.recipe import Recipe
from lipcert.run import Run
from lipcert.schedules import Exponential, Switch
from lipcert.train import train

NETS = {  # with the epochs that fit into a quarter of an hour on one core
    "MLP 4x100": (partial(lc.models.mlp, widths=(100,) * 4), 300),
    "LMT's small net": (lc.models.lmt_mnist, 100),
}
BOUNDS = {"LipLT": lc.LipLT, "product": lc.Product}
RADII = (0.1, 0.3, 0.5, 1.0, 1.58)


def recipe_of(net: str, bound: str, seed: int) -> Recipe:
    """CRM's MNIST recipe with another network, bound and length."""
    model, epochs = NETS[net]
    return dataclasses.replace(
        recipes.get("crm-mnist-c4f3_bcp"),
        model=model,
        bound=partial(BOUNDS[bound], norm=lc.LOBPCG(1)),
        epochs=epochs,
        eps_schedule=Switch(0.0, 1.0, at=0.1),
        learning_rate_schedule=Exponential(1.0, 1e-3, begin=0.3),
        seed=seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    training = lc.data.load(options.data, Split.TRAIN)
    test = lc.data.load(options.data, Split.EVALUATION)
    rows, curves = [], {}
    grid = torch.linspace(0, 3, 301, dtype=torch.float64)
    for net_name in NETS:
        for seed in range(options.seeds):
            for bound_name in BOUNDS:
                place = f"{net_name}-{bound_name}-{seed}".replace(" ", "_")
                run = Run(options.out / place, recipe_of(net_name, bound_name, seed))
                run.folder.mkdir(parents=True, exist_ok=True)
                net = train(
                    run, training, on_epoch=lambda epoch, at=place: print(at, epoch, flush=True)
                )
                epochs = run.path("metrics.jsonl").read_text().splitlines()
                seconds = sum(json.loads(epoch)["seconds"] for epoch in epochs)
                graph = lc.trace(net, tuple(test.images.shape[1:]))
                liplt, product = lc.LipLT(graph), lc.Product(graph)
                tightest = lc.tightest(liplt, product)
                cert = lc.certify(net, test.pixels(), bound=tightest)
                rows.append(
                    {
                        "net": net_name,
                        "trained with": bound_name,
                        "seed": seed,
                        "epochs": run.recipe.epochs,
                        "seconds of training": round(seconds),
                        "clean": lc.clean_accuracy(cert, test.labels),
                        **{
                            f"CRA {eps}": lc.certified_accuracy(cert, test.labels, eps)
                            for eps in RADII
                        },
                        "ACR": round(lc.average_certified_radius(cert, test.labels), 4),
                        "Lipschitz constant, LipLT": float(liplt.lipschitz()),
                        "Lipschitz constant, product": float(product.lipschitz()),
                    }
                )
                curve = lc.accuracy.curve(cert, test.labels, grid)
                curves.setdefault((net_name, bound_name), []).append(curve)
    save("crm_mnist", {"runs": rows})
    _plot(grid, curves)


def _plot(grid: torch.Tensor, curves: dict[tuple[str, str], list[torch.Tensor]]) -> None:
    figure, axes = plt.subplots(1, len(NETS), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, net in zip(axes, NETS, strict=True):
        for bound, colour in zip(BOUNDS, ("tab:blue", "tab:orange"), strict=True):
            for seed, curve in enumerate(curves[net, bound]):
                label = f"trained with {bound}" if seed == 0 else None
                axis.plot(grid, 100 * curve, color=colour, label=label, alpha=0.8)
        axis.set(title=net, xlabel="L2 radius, pixels in [0, 1]", xlim=(0, 3), ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("certified accuracy, %")
    axes[0].legend(frameon=False)
    figure.savefig(RESULTS / "crm_mnist.png", dpi=150)


if __name__ == "__main__":
    main()
