"""Constants are of the weights as they are stored: a float32 network gives those of its copy.

The copy holds the same numbers in float64, so whatever differs was rounded on the way. Parametrized
weights are left out: the network itself computes them in its own precision.
"""

import copy

import pytest
import torch

import lipcert as lc
from nets import NETS

BOUNDS = {
    "product": lambda graph: lc.Product(graph, norm=lc.Exact()),
    "liplt": lambda graph: lc.LipLT(graph, norm=lc.Exact()),
    "ellipsoid": lc.Ellipsoid,
    "local": lambda graph: lc.Ellipsoid(graph, region=lc.L2Ball(0.05)),
    "local-liplt": lambda graph: lc.LipLT(graph, norm=lc.Exact(), region=lc.L2Ball(0.05)),
}


def constants(net, shape, bound, dtype):
    made = bound(lc.trace(net, shape))
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with torch.no_grad():
        return (made(x.to(dtype)) if made.local else made()).dense()


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", [name for name in NETS if name != "parametrized"])
def test_a_float32_network_has_the_constants_of_its_float64_copy(name, bound):
    net = NETS[name].build().float()
    double = copy.deepcopy(net).double()
    single = constants(net, NETS[name].shape, BOUNDS[bound], torch.float32)
    exact = constants(double, NETS[name].shape, BOUNDS[bound], torch.float64)
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, exact, rtol=1e-12, atol=0)
