"""Certified radii of nets that were trained for nothing but accuracy, by bounds around samples.

Two dense ReLU nets with plain cross-entropy, on the embedded digits and on MNIST. For the first
test images that are classified correctly: the largest radius that each bound proves (by bisection
where it is local), and the smallest radius at which an attack succeeds.

    python benchmarks/anchored.py --data DIR [--samples 100]
"""

import argparse
import time

import torch
import torch.nn.functional as F
from common import save

import lipcert as lc
from lipcert.adversary import pgd
from lipcert.data import Dataset, Split

WIDTHS = {"digits": (100, 100, 100), "MNIST": (100, 100, 100, 100)}
FIRST = {"digits": 0.3, "MNIST": 0.2}  # radius that bisection starts from
BISECTIONS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sources = {"digits": "digits", "MNIST": options.data}
    found = {name: measured(name, source, options.samples) for name, source in sources.items()}
    save("anchored", {"bisections": BISECTIONS, "loss": "cross-entropy", **found})


def measured(name: str, source: str, samples: int) -> dict:
    """Mean and median radii of one net."""
    data, test = (lc.data.load(source, split) for split in (Split.TRAIN, Split.EVALUATION))
    net = trained(data, WIDTHS[name])
    x, labels = test.pixels()[: 2 * samples], test.labels[: 2 * samples]
    kept = (net(x).argmax(1) == labels).nonzero()[:samples, 0]
    x, labels = x[kept], labels[kept]
    graph, ball = lc.trace(net, tuple(x.shape[1:])), lc.L2Ball(FIRST[name])
    product, liplt, ellipsoid = lc.Product(graph), lc.LipLT(graph), lc.Ellipsoid(graph)
    bounds = {
        "product": product,
        "LipLT": liplt,
        "ellipsoid": ellipsoid,
        "product around samples": lc.tightest(product, lc.Product(graph, region=ball)),
        "LipLT around samples": lc.tightest(liplt, lc.LipLT(graph, region=ball)),
        "ellipsoid about samples": lc.tightest(ellipsoid, lc.Ellipsoid(graph, region=ball)),
    }
    rows = {}
    for key, bound in bounds.items():
        begin = time.process_time()
        steps = BISECTIONS if bound.local else 0
        radius = lc.certify(net, x, bound=bound, bisections=steps, batch_size=20).radius
        seconds = time.process_time() - begin
        rows[key] = summary(radius) | {"CPU ms a sample": round(1e3 * seconds / len(x), 1)}
        print(name, key, rows[key], flush=True)
    rows["attack"] = summary(attacked(net, x, labels))
    means = {key: row["mean"] for key, row in rows.items()}
    return {
        "net": "-".join(map(str, (x[0].numel(), *WIDTHS[name], 10))),
        "samples": len(x),
        "clean accuracy": accuracy(net, test),
        "radii": rows,
        "about samples / product": round(means["ellipsoid about samples"] / means["product"], 2),
        "attack / about samples": round(means["attack"] / means["ellipsoid about samples"], 2),
    }


def trained(data: Dataset, widths: tuple[int, ...]) -> torch.nn.Module:
    """A dense net after ten epochs of Adam on MNIST, a hundred on the digits."""
    torch.manual_seed(0)
    shape = tuple(data.images.shape[1:])
    net = lc.models.mlp(shape, 10, widths=widths, activation=torch.nn.ReLU)
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(10 if len(data) > 10_000 else 100):
        for index in torch.randperm(len(data)).split(128):
            loss = F.cross_entropy(net(data.pixels(index)), data.labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: torch.nn.Module, data: Dataset) -> float:
    """Of the predictions."""
    return round(float((net(data.pixels()).argmax(1) == data.labels).double().mean()), 4)


def attacked(net: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The least distance at which bisection over radii found a misclassified point."""
    low, best = torch.zeros(len(x)), torch.full((len(x),), torch.inf)
    high = torch.full((len(x),), 2.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(BISECTIONS + 1):
        radius = high if step == 0 else (low + high) / 2
        result = pgd(net, x, labels, radius, restarts=3, clip=None, generator=generator)
        best = torch.where(result.found, torch.minimum(best, result.distance.float()), best)
        high = torch.where(result.found, torch.minimum(radius, result.distance.float()), high)
        low = torch.where(result.found, low, radius)
    return best


def summary(radii: torch.Tensor) -> dict[str, float]:
    """Mean and median."""
    radii = radii.double()
    return {"mean": round(float(radii.mean()), 4), "median": round(float(radii.median()), 4)}


if __name__ == "__main__":
    main()
