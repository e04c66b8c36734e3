"""What a local bound gains: each part against the same certificate made by hand."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.bound_names import LOCAL, BoundName
from lipcert.bound_table import bound_table, evaluated
from lipcert.certificate import Certificate, Claim, from_logits
from lipcert.errors import LipcertError
from lipcert.kinds import Kind
from lipcert.layers import MaxMin
from lipcert.locality import AtRadii, Part, certify_around, proved_by

RADII = {"0.2": 0.2, "0.4": 0.4}
METHOD = dict(zip(LOCAL, (lc.Product, lc.LipLT, lc.Ellipsoid), strict=True))


def network(seed=0):
    """A net whose margins are of the size that its constants can prove something about."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Flatten(), nn.Linear(9, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()),
        nn.Linear(16, 4),
    )
    with torch.no_grad():
        for layer in (net[1], net[3], net[5]):
            nn.init.orthogonal_(layer.weight)
            layer.bias.uniform_(-0.4, 0.2)
    return net


def samples(count=40):
    return torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(1))


def localised(name=BoundName.LOCAL_PRODUCT, net=None, radii=RADII, batch_size=16):
    net, x = net or network(), samples()
    graph = lc.trace(net, (1, 3, 3))
    options = {"name": name, "radii": radii, "batch_size": batch_size}
    return net, graph, x, certify_around(net, graph, x, **options)


@pytest.mark.parametrize("name", LOCAL)
def test_radii_are_those_of_all_bounds_together(name):
    net, graph, x, found = localised(name)
    around = [METHOD[name](graph, region=lc.L2Ball(eps)) for eps in RADII.values()]
    every = lc.tightest(lc.Product(graph), lc.LipLT(graph), lc.Ellipsoid(graph), *around)
    expected = lc.certify(net, x, bound=every)
    torch.testing.assert_close(found.certificate.radius, expected.radius)
    for eps in RADII.values():
        assert torch.equal(found.certificate.robust_at(eps), expected.robust_at(eps))
    everywhere = lc.tightest(lc.Product(graph), lc.LipLT(graph), lc.Ellipsoid(graph))
    auto = lc.certify(net, x, bound=everywhere)
    assert (found.certificate.radius >= auto.radius).all()
    assert (found.certificate.radius > auto.radius * 1.01).any()
    better = found.certificate.radius > auto.radius * (1 + 1e-9)
    # Not the other way round: of the class that is decisive then, a global bound may prove more.
    assert all(ok for by, ok in zip(found.proved_by, better.tolist(), strict=True) if "@" in by)
    reached = torch.tensor([float(by.partition("@")[2] or math.inf) for by in found.proved_by])
    assert (found.certificate.radius <= reached).all()


@pytest.mark.parametrize("name", LOCAL)
def test_every_part_is_the_certificate_without_the_rest(name):
    net, graph, x, found = localised(name)
    method, region, eps = METHOD[name], lc.L2Ball(0.2), 0.2
    local = method(graph, region=region)
    with torch.no_grad():
        alone = from_logits(net(x), dataclasses.replace(local(x), drop=None))
    expected = {
        Part.GLOBAL: lc.certify(net, x, bound=method(graph)),
        Part.BOXES: lc.certify(net, x, bound=lc.Product(graph, region=region, masked=())),
        Part.CONSTANTS: alone,
        Part.LOCAL: lc.certify(net, x, bound=local),
        Part.ALL: found.certificate,
    }
    for part, certificate in expected.items():
        assert torch.equal(found.rows.proved[part], certificate.robust_at(eps)), part
    counts = {part: int(proved.sum()) for part, proved in found.rows.proved.items()}
    assert len(set(counts.values())) > 2  # the parts are not the same thing
    for part in (Part.CONSTANTS, Part.BOXES):
        assert counts[part] <= counts[Part.LOCAL] <= counts[Part.ALL] < len(x)


@pytest.mark.parametrize("name", LOCAL)
def test_constants_are_of_the_decisive_margin(name):
    net, graph, x, found = localised(name)
    method, rows = METHOD[name], found.rows
    everywhere = lc.certify(net, x, bound=method(graph))
    K = everywhere.claims[0].constants
    ratios = (everywhere.margins / K).nan_to_num(nan=math.inf, posinf=math.inf)
    assert torch.equal(rows.rival, ratios.argmin(1))
    assert (rows.rival != everywhere.prediction).all()
    pairs = (torch.arange(len(x)), rows.rival)
    torch.testing.assert_close(rows.global_constant, K[pairs])
    here = method(graph, region=lc.L2Ball(0.2))(x).row(everywhere.prediction)
    torch.testing.assert_close(rows.local_constant, here[pairs].detach())
    if name is BoundName.LOCAL_PRODUCT:
        assert (rows.local_constant <= rows.global_constant).all()
        assert rows.local_constant.median() < 0.99 * rows.global_constant.median()


def test_constant_units_are_those_that_the_ball_cannot_switch_on():
    net, _, x, found = localised()
    reach = 0.2 * net[1].weight.norm(dim=1)
    off = net[1](x.flatten(1)) + reach <= 0
    assert [layer.name for layer in found.layers] == ["2", "4"]
    assert 0 < float(off.double().mean()) < 1
    assert found.layers[0].share == pytest.approx(float(off.double().mean()))
    hidden, seen = net[:5], []
    for _ in range(50):
        step = torch.randn(x.shape)
        seen.append(hidden(x + 0.2 * step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)))
    still = torch.stack(seen).amax(0) == 0
    assert 0 < found.layers[1].share <= float(still.double().mean())


def test_no_units_are_constant_where_no_activation_is_elementwise():
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), MaxMin(), nn.Linear(8, 4))
    assert localised(net=net)[3].layers == ()


def test_batches_change_nothing():
    first, second = (localised(batch_size=size)[3] for size in (7, 40))
    torch.testing.assert_close(first.certificate.radius, second.certificate.radius)
    torch.testing.assert_close(first.rows.local_constant, second.rows.local_constant)
    for a, b in zip(first.layers, second.layers, strict=True):
        assert a.share == pytest.approx(b.share)


def test_global_norms_are_computed_once(monkeypatch):
    calls, norm = [], lc.Auto.__call__
    monkeypatch.setattr(lc.Auto, "__call__", lambda self, map: calls.append(1) or norm(self, map))
    evaluated([BoundName.AUTO], lc.trace(network(), (1, 3, 3)))
    once = len(calls)
    assert once > 3
    calls.clear()
    localised(batch_size=5)
    assert len(calls) == once


def test_the_summary_counts_right_predictions_only():
    _, _, x, found = localised()
    prediction = found.certificate.prediction
    labels = prediction.where(torch.arange(len(x)) % 2 == 0, (prediction + 1) % 4)
    said = found.summary(BoundName.LOCAL_PRODUCT, "0.2", labels)
    assert (said.bound, said.eps, said.samples) == ("local-product", "0.2", len(x))
    for part, proved in found.rows.proved.items():
        assert said.cra[part] == float(proved[::2].sum()) / len(x)
    assert sum(said.proved_by.values()) == len(x)
    assert said.proved_by["auto"] == found.proved_by.count("auto")


def claim(constants, drops=math.inf, valid=math.inf):
    constants = torch.tensor(constants)
    return Claim(constants, torch.full_like(constants, drops), torch.full((3,), valid))


def test_the_bound_that_gives_a_radius_is_that_of_the_decisive_class():
    margins = torch.tensor([[math.inf, 1.0, 2.0], [math.inf, 1.0, 1.0], [math.inf, -1.0, 1.0]])
    first = claim([[0.0, 2.0, 1.0], [0.0, 2.0, 2.0], [0.0, 1.0, 1.0]])
    # Against class 1 of the first sample it proves more, against class 2 less: radius 0.8 < 2.
    second = claim([[0.0, 1.25, 4.0], [0.0, 2.0 * (1 - 1e-12), 2.0], [0.0, 1.0, 1.0]], valid=1.0)
    nothing = torch.zeros(3)
    certificate = Certificate(nothing.long(), nothing, Kind.UPPER, 0.0, margins, (first, second))
    assert proved_by(certificate, ["a", "b"]) == ["b", "a", ""]


def test_other_radii_can_be_asked_for():
    graph, x = lc.trace(network(), (1, 3, 3)), samples(3)
    around, seen = lc.Product(graph, region=lc.L2Ball(0.2)), []
    bound = AtRadii(lc.Product(graph)(), around, [0.2, 0.4], seen.append)
    members = bound(x).members()
    assert [m.batch for m in members] == [None, 3, 3]
    assert [float(torch.as_tensor(m.valid_radius).max()) for m in members[1:]] == [0.2, 0.4]
    assert float(bound(x, eps=0.3).members()[1].valid_radius[0]) == pytest.approx(0.3)
    assert len(seen) == 2


def test_only_local_bounds_and_networks_with_logits():
    with pytest.raises(LipcertError, match="auto is not local"):
        localised(BoundName.AUTO)
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 2))
    with pytest.raises(LipcertError, match="logits"):
        localised(net=net)


@pytest.mark.parametrize("name", LOCAL)
def test_the_table_has_medians_over_the_samples(name):
    graph, x = lc.trace(network(), (1, 3, 3)), samples(6)
    table = bound_table([name, BoundName.PRODUCT], graph, x, "1/4")
    row, product = table.bounds
    assert row.bound == f"{name}, median of 6 samples in balls of 1/4"
    assert (row.eps, product.eps) == (0.25, None)
    constants = METHOD[name](graph, region=lc.L2Ball(0.25)).lipschitz(x).value.detach()
    assert row.lipschitz == pytest.approx(float(constants.quantile(0.5)))
    assert row.ratio == pytest.approx(row.lipschitz / product.lipschitz)
    assert table.best is product
    assert product.ratio == 1
    pairs = METHOD[name](graph, region=lc.L2Ball(0.25))(x).dense().detach().quantile(0.5, dim=0)
    off = pairs[~torch.eye(4, dtype=torch.bool)]
    assert row.smallest_pair == pytest.approx(float(off.min()))
    assert row.largest_pair == pytest.approx(float(off.max()))
    alone = bound_table([name], graph, x, "1/4")
    assert alone.best.bound == row.bound
    assert alone.best.ratio == 1
    with pytest.raises(LipcertError, match="--eps"):
        bound_table([name], graph, x)
