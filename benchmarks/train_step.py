"""What bounds add to a training step: 6C2F (BCP's), batch 256.

The plain step and the step with the bound take turns, so that a drifting machine hits both; the
figure is the median of the pairwise ratios. A bound that is computed at every k-th step only is
timed over k steps.

    python benchmarks/train_step.py [--pairs 15]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import save

import lipcert as lc

BATCH = 256
BOUNDS = {
    "Product(PowerIteration(1))": (lambda graph: lc.Product(graph, norm=lc.PowerIteration(1)), 1),
    "LipLT(LOBPCG(1))": (lambda graph: lc.LipLT(graph, norm=lc.LOBPCG(1)), 1),
    "Ellipsoid(every=1)": (lambda graph: lc.Ellipsoid(graph, every=1), 1),
    "Ellipsoid(every=2)": (lambda graph: lc.Ellipsoid(graph, every=2), 2),
    "Ellipsoid(every=4)": (lambda graph: lc.Ellipsoid(graph, every=4), 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    found = {name: measured(*how, pairs) for name, how in BOUNDS.items()}
    save("train_step", {"net": "c6f2_bcp", "batch": BATCH, "loss": "lmt", "pairs": pairs, **found})


def measured(make: Callable, every: int, pairs: int) -> dict:
    """Seconds of a step with and without a bound, and their ratio."""
    torch.manual_seed(0)
    net = lc.models.c6f2_bcp(in_shape=(3, 32, 32), classes=10)
    bound = make(lc.trace(net, (3, 32, 32)))
    optimiser = torch.optim.Adam(net.parameters(), 1e-4)
    x, y = torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))

    def step(with_bound: bool) -> float:
        begin = time.perf_counter()
        for _ in range(every):
            logits = net(x)
            if with_bound:
                row = bound().row(lc.losses.lmt.protects(logits, y))
                loss = lc.losses.lmt(logits, y, row, eps=36 / 255)
            else:
                loss = F.cross_entropy(logits, y)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        return (time.perf_counter() - begin) / every

    for with_bound in (False, True):
        step(with_bound)
    plain, bounded = zip(*((step(False), step(True)) for _ in range(pairs)), strict=True)
    ratios = [b / p for p, b in zip(plain, bounded, strict=True)]
    return {
        "plain_seconds_median": round(statistics.median(plain), 4),
        "bounded_seconds_median": round(statistics.median(bounded), 4),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


if __name__ == "__main__":
    main()
