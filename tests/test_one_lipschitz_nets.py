"""Networks of layers that are 1-Lipschitz by construction: sizes, bounds, training, attacks."""

import dataclasses
import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert import losses, models
from lipcert.adversary import pgd
from lipcert.errors import LipcertError
from lipcert.layers import LastLayerNormalized, Normalize, SOCConv2d, soc
from lipcert.layers import orthogonal as orthogonal_layers
from lipcert.spectral import Exact
from oracles import best_quotients, differences, jacobians

SIZE = models.PotentialSize(depth=2, channels=4, dense=2, width=6)
IMAGE = (3, 8, 8)


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny member of a family, and whether all but its last layer is 1-Lipschitz."""

    make: Callable[[int], nn.Sequential]
    shape: tuple[int, ...] = IMAGE
    by_construction: bool = True


CASES = {
    "sll": Case(lambda classes: models.sll_net(IMAGE, classes, SIZE)),
    "cpl": Case(lambda classes: models.cpl_net(IMAGE, classes, SIZE)),
    "lipconvnet": Case(
        lambda classes: models.lipconvnet(IMAGE, classes, blocks=2, channels=4, stages=2)
    ),
    "lipconvnet-lln": Case(
        lambda classes: models.lipconvnet(
            IMAGE, classes, channels=4, stages=3, head=LastLayerNormalized
        )
    ),
    "liresnet": Case(
        lambda classes: models.liresnet(IMAGE, classes, depth=2, width=4, dense=1),
        by_construction=False,
    ),
    "aol": Case(lambda classes: models.aol_mlp((5, 2), classes, depth=2, width=8), (5, 2)),
}
each_net = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def built(case, classes=3):
    torch.manual_seed(0)
    return case.make(classes)


def blobs(shape, n=48, classes=3):
    """Pictures near one of three fixed ones."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.rand(classes, *shape, generator=generator)
    labels = torch.arange(n) % classes
    x = centres[labels] + 0.15 * torch.randn(n, *shape, generator=generator)
    return x.clamp(0, 1), labels


@cache
def trained(case, steps=20):
    """A net after steps of CLL with the bound of the recipes; all losses were finite."""
    net = built(case)
    x, labels = blobs(case.shape)
    bound = lc.Product(lc.trace(net, case.shape), norm=lc.PowerIteration(1))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    decay = losses.ConstantDecay(1e-4)
    values = []
    net.train()
    for _ in range(steps):
        constants = bound(x)
        loss = losses.cll(net(x), labels, constants.within(labels, 0.1), 0.1, slack=0.3)
        loss = loss + decay(constants, 0.0)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
        optimiser.step()
        values.append(loss.item())
    assert all(map(math.isfinite, values))
    return net.eval(), x, values


def largest_slope(net, shape):
    return torch.linalg.matrix_norm(jacobians(net, torch.randn(6, *shape)), 2).max().item()


@each_net
def test_the_product_bound_holds(case):
    net = built(case).eval()
    bound = lc.Product(lc.trace(net, case.shape))
    constant = bound.lipschitz()
    assert constant.kind is lc.Kind.UPPER
    slopes = jacobians(net, torch.cat([blobs(case.shape)[0][:3], torch.randn(4, *case.shape)]))
    assert torch.linalg.matrix_norm(slopes, 2).max() <= float(constant) * (1 + 1e-9)
    found = best_quotients(net, case.shape, 20, 4)
    assert found.norm(dim=1).max() <= float(constant) * (1 + 1e-9)
    pairs = bound().dense()[0]
    apart = ~torch.eye(3, dtype=torch.bool)
    for seen in (differences(slopes), differences(found)):
        assert (seen <= pairs * (1 + 1e-9))[apart].all()
    # The bound is of use: not far above what is seen.
    assert float(constant) < 50 * torch.linalg.matrix_norm(slopes, 2).max()


@each_net
@pytest.mark.parametrize("steps", [0, 20])
def test_the_backbone_is_1_lipschitz_if_it_is_so_by_construction(case, steps):
    net = trained(case, steps)[0].eval() if steps else built(case).eval()
    backbone = net[:-1]
    constant = float(lc.Product(lc.trace(backbone, case.shape)).lipschitz())
    assert largest_slope(backbone, case.shape) <= constant * (1 + 1e-9)
    if case.by_construction:
        assert 0.5 < constant <= 1 + 1e-6
    else:  # the stem and the residual layers are as they come
        assert abs(constant - 1) > 0.01


@each_net
def test_training_then_certificates_that_no_attack_breaks(case):
    net, x, values = trained(case)
    assert values[-1] < values[0]
    certificate = lc.certify(net, x, bound=lc.Product(lc.trace(net, case.shape)))
    assert certificate.kind is lc.Kind.UPPER
    sure = certificate.radius > 0
    assert sure.sum() >= len(x) // 2
    found = pgd(
        net,
        x[sure],
        certificate.prediction[sure],
        certificate.radius[sure],
        steps=8,
        clip=None,
        generator=torch.Generator().manual_seed(0),
    )
    assert not found.found.any()
    # The same attack does find points in larger balls.
    radius = 20 * certificate.radius[sure]
    far = pgd(net, x[sure], certificate.prediction[sure], radius, steps=5, clip=None)
    assert far.found.any()


# ---------------------------------------------------------------- sizes


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.fixture
def without_data(monkeypatch):
    """Weights without numbers, so that only their shapes are made."""
    monkeypatch.setattr(SOCConv2d, "_iterate", lambda *arguments: None)
    with torch.device("meta"):
        yield


POTENTIAL = {  # channels, depth, dense layers, width, millions as the docstring says
    "SMALL": (45, 20, 7, 2048, 42.6),
    "MEDIUM": (60, 30, 10, 2048, 81.8),
    "LARGE": (90, 50, 10, 2048, 128.7),
    "XLARGE": (120, 70, 15, 2048, 262.0),
}


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize("name", POTENTIAL)
def test_parameters_of_potential_nets(name):
    channels, depth, dense, width, millions = POTENTIAL[name]
    features = channels * 8 * 8
    convolution = channels * channels * 25 + channels  # and a bias
    layer = width * features + width
    expected = depth * convolution + dense * layer + 100 * (features + 1)
    size = getattr(models.one_lipschitz, name)
    cpl, sll = (make((3, 32, 32), 100, size) for make in (models.cpl_net, models.sll_net))
    assert parameters(cpl) == expected
    # SLL scales each unit by a further number.
    assert parameters(sll) == expected + depth * channels + dense * width
    assert round(parameters(sll) / 1e6, 1) == millions
    assert f"{millions}" in models.sll_net.__doc__


@pytest.mark.usefixtures("without_data")
def test_parameters_of_cpl_as_published():
    size = dataclasses.replace(models.XLARGE, width=4096)
    assert parameters(models.cpl_net((3, 32, 32), 100, size)) == 497_897_140


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize(
    ("make", "classes", "count"),
    [
        (models.lipconvnet, 100, 16_722_948),
        (models.liresnet, 10, 3_361_418),
        (models.aol_mlp, 10, 10_504_202),
        (models.c4f3_cll, 10, 2_431_018),
    ],
)
def test_parameters_in_the_docstrings(make, classes, count):
    assert parameters(make((3, 32, 32), classes)) == count
    assert f"{count:,}".replace(",", " ") in " ".join(make.__doc__.split())


def test_c4f3_of_cll_has_the_published_geometry():
    net = models.c4f3_cll((3, 32, 32), 10)
    convolutions = [m for m in net if isinstance(m, nn.Conv2d)]
    found = [(m.out_channels, m.kernel_size, m.stride, m.padding) for m in convolutions]
    expected = [(32, 1), (32, 2), (64, 1), (64, 2)]
    assert found == [(c, (3, 3), (s, s), (1, 1)) for c, s in expected]
    dense = [(m.in_features, m.out_features) for m in net if isinstance(m, nn.Linear)]
    assert dense == [(4096, 512), (512, 512), (512, 10)]


def test_the_published_strides_and_kernels_of_lipconvnet():
    net = models.lipconvnet((3, 16, 16), 5, blocks=2, channels=2, stages=4)
    layers = [m for m in net if isinstance(m, SOCConv2d)]
    assert [m.stride for m in layers] == [1, 2] * 4
    assert [m.weight.shape[-1] for m in layers] == [3] * 7 + [1]
    assert [m.out_channels for m in layers] == [2, 4, 4, 8, 8, 16, 16, 32]
    assert net[-1].in_features == 32


@pytest.mark.parametrize(
    ("make", "shape", "options", "says"),
    [
        (models.sll_net, (3, 10, 8), {"size": SIZE}, "multiples of 4"),
        (models.cpl_net, (3, 8, 9), {"size": SIZE}, "multiples of 4"),
        (models.sll_net, (5, 8, 8), {"size": SIZE}, "4 channels"),
        (models.lipconvnet, (3, 48, 48), {}, "multiples of 32"),
        (models.lipconvnet, (3, 28, 32), {"stages": 3}, "multiples of 8"),
        (models.liresnet, (3, 12, 16), {"width": 4}, "multiples of 8"),
        (models.liresnet, (0, 8, 8), {"width": 4}, "in_shape"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, shape, options, says):
    with pytest.raises(LipcertError, match=says):
        make(shape, 3, **options)


@pytest.mark.parametrize("make", [models.sll_net, models.cpl_net, models.lipconvnet])
def test_one_class_is_refused(make):
    with pytest.raises(LipcertError, match="2 classes"):
        make((3, 32, 32), 1)


# ---------------------------------------------------------------- norms that layers know


def known_parts():
    return nn.Sequential(
        Normalize((0.5,) * 3, (0.5,) * 3),
        *models.lipconvnet(IMAGE, 3, channels=4, stages=2),
    )


def counted(monkeypatch):
    """Counts of exact norms: those of orthogonal layers, of SOC, and of the strategy Exact."""
    calls = []

    def refuse(name):
        def raises(*arguments):
            calls.append(name)
            raise AssertionError(f"{name} was asked for eigenvalues")

        return raises

    monkeypatch.setattr(orthogonal_layers, "exact_norm", refuse("orthogonal"))
    monkeypatch.setattr(soc, "exact_norm", refuse("soc"))
    monkeypatch.setattr(Exact, "__call__", refuse("Exact"))
    return calls


@pytest.mark.parametrize("name", ["lipconvnet", "lipconvnet-lln", "liresnet", "aol", "behind"])
def test_training_asks_no_layer_for_eigenvalues(name, monkeypatch):
    case = Case(lambda classes: known_parts()) if name == "behind" else CASES[name]
    net = built(case)
    graph = lc.trace(net, case.shape)
    x, labels = blobs(case.shape)
    calls = counted(monkeypatch)
    bound = lc.Product(graph, norm=lc.PowerIteration(1))
    constants = bound(x)
    assert constants.kind is lc.Kind.ESTIMATE
    losses.cll(net(x), labels, constants.within(labels, 0.1), 0.1).backward()
    assert bound.lipschitz().kind is lc.Kind.ESTIMATE
    assert not calls
    exact = lc.Product(graph)
    with pytest.raises(AssertionError, match="asked for eigenvalues"):  # the patch does catch it
        exact.lipschitz()
    monkeypatch.undo()
    certificate = lc.certify(net.eval(), x, bound=exact)
    assert certificate.kind is lc.Kind.UPPER
    slopes = torch.linalg.matrix_norm(jacobians(net, x[:4]), 2).max()
    assert slopes <= float(exact.lipschitz()) * (1 + 1e-9)


def test_the_training_bound_of_layers_that_know_their_norm():
    """About 1 for each layer, 1 / std for the normalisation, iterated for the last."""
    net = known_parts().eval()
    graph = lc.trace(net, IMAGE)
    bound = lc.Product(graph, norm=lc.PowerIteration(300))
    last = torch.linalg.matrix_norm(net[-1].weight, 2).item()
    assert float(bound.lipschitz()) == pytest.approx(2 * last, rel=1e-4)
    proved = lc.Product(graph).lipschitz()
    assert proved.kind is lc.Kind.UPPER
    assert float(proved) == pytest.approx(2 * last, rel=1e-4)


def test_the_parameters_of_the_last_layer_and_no_others_move_the_training_bound():
    net = known_parts()
    bound = lc.Product(lc.trace(net, IMAGE), norm=lc.PowerIteration(1))
    bound().dense().sum().backward()
    moved = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {f"{len(net) - 1}.weight"}
