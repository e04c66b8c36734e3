"""Time from weights to certified constants: tracing, and all pairs of classes.

Of both 6C2F with every bound, and of dense networks of growing depth with the ellipsoid bound.

python benchmarks/constants.py
"""

import statistics
import time

import torch
from common import save

import lipcert as lc

SHAPE = (3, 32, 32)
BOUNDS = {
    "Product(Auto())": lambda graph: lc.Product(graph),
    "Product(Gram(6))": lambda graph: lc.Product(graph, lc.Gram(6)),
    "Product(Lanczos(1e-9))": lambda graph: lc.Product(graph, lc.Lanczos(1e-9)),
    "LipLT(Auto())": lambda graph: lc.LipLT(graph),
    "LipLT(Auto(), joint=True)": lambda graph: lc.LipLT(graph, joint=True),
    "LipLT(LOBPCG(40))": lambda graph: lc.LipLT(graph, lc.LOBPCG(40)),
    "Eclipse()": lambda graph: lc.Eclipse(graph),
    "Ellipsoid()": lambda graph: lc.Ellipsoid(graph),
}
DEPTHS = (2, 4, 8, 16)


def main() -> None:
    found = {}
    for name in ("c6f2_crm", "c6f2_bcp"):
        torch.manual_seed(0)
        net = getattr(lc.models, name)(in_shape=SHAPE, classes=10)
        lc.trace(net, SHAPE)  # first use imports torch.fx
        traces = []
        for _ in range(5):
            begin = time.perf_counter()
            graph = lc.trace(net, SHAPE)
            traces.append(time.perf_counter() - begin)
        found[name] = {"trace, seconds": round(statistics.median(traces), 4)}
        for text, make in BOUNDS.items():
            begin = time.perf_counter(), time.process_time()
            with torch.no_grad():
                constants = make(graph)()
                pairs = constants.dense()[0]
            seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
            found[name][text] = {
                "kind": str(constants.kind),
                "seconds": round(seconds[0], 2),
                "CPU seconds": round(seconds[1], 2),
                "mean of the pairs": float(pairs.sum() / 90),
                "largest pair": float(pairs.max()),
            }
            print(name, text, found[name][text], flush=True)
    dense = {f"784-{'-'.join(['512'] * depth)}-10": seconds_of(depth) for depth in DEPTHS}
    found["Ellipsoid() of dense networks, seconds"] = dense
    save("constants", {"what": "default initialisation, all 90 ordered pairs", **found})


def seconds_of(depth: int) -> float:
    """The median over five evaluations of all pairs."""
    torch.manual_seed(0)
    net = lc.models.mlp((784,), 10, widths=(512,) * depth, activation=torch.nn.ReLU)
    bound, seconds = lc.Ellipsoid(lc.trace(net, (784,))), []
    for _ in range(5):
        begin = time.perf_counter()
        with torch.no_grad():
            bound().dense()
        seconds.append(time.perf_counter() - begin)
    return round(statistics.median(seconds), 4)


if __name__ == "__main__":
    main()
