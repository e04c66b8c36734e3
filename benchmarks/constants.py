"""Time from weights to certified constants: tracing 6C2F (BCP's), and all pairs of its classes.

python benchmarks/constants.py
"""

import statistics
import time

import torch
from common import save

import lipcert as lc


def main() -> None:
    torch.manual_seed(0)
    shape = (3, 32, 32)
    net = lc.models.c6f2_bcp(in_shape=shape, classes=10)
    lc.trace(net, shape)  # first use imports torch.fx
    traces = []
    for _ in range(5):
        begin = time.perf_counter()
        graph = lc.trace(net, shape)
        traces.append(time.perf_counter() - begin)
    seconds, largest, kinds = {}, {}, {}
    for norm in (lc.Auto(), lc.Gram(6), lc.Lanczos(1e-9)):
        begin = time.perf_counter()
        with torch.no_grad():
            constants = lc.Product(graph, norm=norm)()
            largest[repr(norm)] = float(constants.dense().max())
        seconds[repr(norm)] = round(time.perf_counter() - begin, 2)
        kinds[repr(norm)] = str(constants.kind)
    save(
        "constants",
        {
            "what": "c6f2_bcp, default initialisation: constants of all 90 ordered pairs",
            "trace_seconds_median": round(statistics.median(traces), 4),
            "seconds": seconds,
            "largest_constant": largest,
            "kind": kinds,
        },
    )


if __name__ == "__main__":
    main()
