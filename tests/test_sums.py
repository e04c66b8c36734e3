"""l-infinity and l1 bounds: the sums of the matrices, and never below what is seen."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.graph import Concat, Lipschitz
from lipcert.linear_kinds import Dense
from lipcert.spectral import sums
from maps import HARD, MAPS, cases
from nets import NETS
from oracles import jacobians
from rule_cases import Fn

SUMS = [lc.RowSum(), lc.ColumnSum()]
UP = 1 + 1e-9  # float64 rounding of the sums
BOUNDS = pytest.mark.parametrize("kind", [lc.Product, lc.LipLT])
norms = pytest.mark.parametrize("norm", SUMS, ids=str)
OPAQUE = {
    name: [n.name for n in lc.trace(net.build(), net.shape) if isinstance(n.op, Lipschitz)]
    for name, net in NETS.items()
}
OPEN = [name for name in NETS if not OPAQUE[name]]


def dual(p):
    return {math.inf: 1.0, 1.0: math.inf}[p]


def of_matrix(matrix, p):
    """The operator norm of a matrix from l_p to l_p, p 1 or infinite."""
    return torch.linalg.matrix_norm(matrix, p)


def graph_of(name):
    return lc.trace(NETS[name].build(), NETS[name].shape)


def mlp(*widths, slope=0.0):
    torch.manual_seed(2)
    layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.LeakyReLU(slope))]
    return nn.Sequential(*layers[:-1])


# ---------------------------------------------------------------- norms of maps


@norms
@cases(MAPS | HARD)
def test_the_sums_are_those_of_the_matrix(build, norm):
    map = build()
    expected = of_matrix(map.dense(), norm.p)
    found = norm(map)
    assert found.kind is lc.Kind.UPPER
    torch.testing.assert_close(found.value, expected, rtol=1e-12, atol=1e-12)
    weights = [t for t in map.tensors() if t.requires_grad]
    if weights and expected > 0:
        actual = torch.autograd.grad(found.value, weights, allow_unused=True)
        wanted = torch.autograd.grad(expected, weights, allow_unused=True)
        for one, other, weight in zip(actual, wanted, weights, strict=True):
            missing = torch.zeros_like(weight)
            moved = [missing if g is None else (g * weight).sum() for g in (one, other)]
            torch.testing.assert_close(*moved, rtol=1e-10, atol=1e-10)


@norms
def test_gradients_against_differences(norm):
    """Of a map whose matrix has to be built, and of one whose sums are read from its parts."""
    generator = torch.Generator().manual_seed(0)
    for build in (MAPS["composition"], MAPS["conv 2d, leftover row"]):
        map = build()
        slopes = torch.autograd.grad(norm(map).value, weights := map.tensors())
        for weight, slope in zip(weights, slopes, strict=True):
            direction = torch.randn(weight.shape, generator=generator)
            values = []
            for step in (1e-7, -2e-7):
                with torch.no_grad():
                    weight.add_(step * direction)
                values.append(norm(map).value.detach())
            measured = (values[0] - values[1]) / 2e-7
            torch.testing.assert_close((slope * direction).sum(), measured, rtol=1e-5, atol=1e-6)


@norms
def test_large_maps_go_in_parts(norm, monkeypatch):
    map = MAPS["sum"]()
    expected = norm(map).value
    monkeypatch.setattr(sums, "_CHUNK_BYTES", 200)
    torch.testing.assert_close(norm(map).value, expected, rtol=1e-14, atol=0)


@norms
def test_float32_weights_are_summed_in_float64(norm):
    weight = torch.full((20, 20), 0.1, dtype=torch.float32, requires_grad=True)
    value = norm(Dense((20,), (20,), weight)).value
    assert value.dtype == torch.float64
    assert float(value.detach()) == pytest.approx(20 * float(weight.detach()[0, 0]), rel=1e-14)
    value.backward()
    assert weight.grad.dtype == torch.float32


# ---------------------------------------------------------------- soundness


@pytest.fixture(scope="module")
def seen():
    """Jacobians of each net, and pairs of inputs far apart and close by."""
    torch.set_default_dtype(torch.float64)
    found = {}
    for name in OPEN:
        net, shape = NETS[name].build(), NETS[name].shape
        x = torch.randn(300, *shape)
        length = 10 ** torch.empty(300, *(1,) * len(shape)).uniform_(-2, 1)
        signs = torch.randn(300, *shape).sign()
        single = torch.zeros(300, math.prod(shape))
        single[torch.arange(300), torch.randint(single.shape[1], (300,))] = 1
        steps = signs.where(torch.rand(300, *(1,) * len(shape)) < 0.5, single.reshape(x.shape))
        pairs = x, x + length * steps
        found[name] = jacobians(net, x), pairs
    return found


@norms
@BOUNDS
@pytest.mark.parametrize("name", OPEN)
def test_no_pair_and_no_jacobian_is_above_the_bound(name, kind, norm, seen):
    bound, p = kind(graph_of(name), norm), norm.p
    J, (x, y) = seen[name]
    total, per_output, constants = bound.lipschitz(), bound.per_output().value, bound()
    assert bound.p == constants.p == p
    assert total.kind is constants.kind is lc.Kind.UPPER
    K = constants.dense()[0]
    assert of_matrix(J, p).max() <= UP * total.value
    assert (J.norm(dual(p), dim=2).amax(0) <= UP * per_output).all()
    assert ((J[:, :, None] - J[:, None]).norm(dual(p), dim=3).amax(0) <= UP * K + 1e-12).all()
    net = bound.graph.model
    distance = (x - y).flatten(1).norm(p, dim=1)
    change = net(x) - net(y)
    assert (change.norm(p, dim=1) <= UP * total.value * distance).all()
    assert (change.abs() <= UP * per_output * distance[:, None]).all()
    margins = (change[:, :, None] - change[:, None]).abs()
    assert (margins <= UP * K * distance[:, None, None] + 1e-12).all()
    at_x, at_y = bound.graph.values(x), bound.graph.values(y)
    for n in bound.graph:
        moved = (at_x[n] - at_y[n]).flatten(1).norm(p, dim=1)
        assert (moved <= UP * bound.prefix(n).value * distance + 1e-12).all(), n.name


@norms
@BOUNDS
@pytest.mark.parametrize("name", ["linear", "deep linear"])
def test_linear_networks_have_their_own_constants(name, kind, norm, seen):
    bound, matrix = kind(graph_of(name), norm), seen[name][0][0]
    torch.testing.assert_close(bound.lipschitz().value, of_matrix(matrix, norm.p))
    torch.testing.assert_close(bound.per_output().value, matrix.norm(dual(norm.p), dim=1))
    K = (matrix[:, None] - matrix).norm(dual(norm.p), dim=2)
    torch.testing.assert_close(bound().dense()[0], K)
    labels = torch.tensor([2, 0])
    torch.testing.assert_close(bound().row(labels), K[labels])  # fewer labels than classes


@norms
def test_liplt_is_never_above_the_product(norm):
    """Where nothing is concatenated and all slopes of a layer are equal."""
    compared = 0
    for name in OPEN:
        graph = graph_of(name)
        uneven = any(isinstance(m, nn.PReLU) for m in graph.model.modules())
        if not uneven and not any(isinstance(n.op, Concat) for n in graph):
            product, liplt = lc.Product(graph, norm), lc.LipLT(graph, norm)
            assert liplt.lipschitz().value <= UP * product.lipschitz().value, name
            assert (liplt().dense() <= UP * product().dense()).all(), name
            compared += 1
    assert compared >= 5


@norms
@pytest.mark.parametrize("slope", [0.0, 0.3, -0.5])
def test_the_recursion_by_hand(norm, slope):
    net, p = mlp(5, 7, 6, 8, 4, slope=slope), norm.p
    c, d = (1 + slope) / 2, (1 - slope) / 2
    first, *rest = (m.weight.detach() for m in net[::2])
    maps, radii = [first], [torch.ones(())]
    for weight in rest:
        radii.append(sum(of_matrix(A, p) * r for A, r in zip(maps, radii, strict=True)))
        maps = [c * weight @ A for A in maps] + [d * weight]
    total = sum(of_matrix(A, p) * r for A, r in zip(maps, radii, strict=True))
    bound = lc.LipLT(lc.trace(net, (5,)), norm)
    torch.testing.assert_close(bound.lipschitz().value, total)
    K = sum((A[:, None] - A).norm(dual(p), dim=2) * r for A, r in zip(maps, radii, strict=True))
    torch.testing.assert_close(bound().dense()[0], K)
    per_output = sum(A.norm(dual(p), dim=1) * r for A, r in zip(maps, radii, strict=True))
    torch.testing.assert_close(bound.per_output().value, per_output)


@norms
@BOUNDS
def test_concatenations_and_sums_by_hand(kind, norm):
    def bound(forward):
        return float(kind(lc.trace(Fn(forward), (3,)), norm).lipschitz())

    assert bound(lambda s, x: (3 * x).tanh() + (4 * x).tanh()) == pytest.approx(7)
    both = bound(lambda s, x: torch.cat([(3 * x).tanh(), (4 * x).tanh()], 1))
    # LipLT, l-infinity: 2 from the input, 3 / 2 and 4 / 2 from the rests of the activations.
    largest = 4 if kind is lc.Product else 2 + 1.5 + 2
    assert both == pytest.approx(largest if norm.p == math.inf else 7)


@norms
@BOUNDS
def test_an_activation_at_the_end(kind, norm):
    """Its logits are no rows of an affine map; f_i - f_j of two units changes by 2 or by 1."""
    bound = kind(lc.trace(nn.Sequential(nn.Identity(), nn.Tanh()), (3,)), norm)
    off = bound().dense()[0][~torch.eye(3, dtype=torch.bool)]
    torch.testing.assert_close(off, torch.full((6,), 2.0 if norm.p == math.inf else 1.0))
    torch.testing.assert_close(bound.per_output().value, torch.ones(3))


@norms
@BOUNDS
@pytest.mark.parametrize("name", ["mlp", "conv", "resnet"])
def test_gradients_in_the_weights(name, kind, norm):
    bound = kind(graph_of(name), norm)
    weights = list(bound.graph.model.parameters())
    slopes = torch.autograd.grad(bound().dense()[0, 0, 1:].sum(), weights, allow_unused=True)
    directions = [torch.randn_like(w) for w in weights]
    predicted = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True) if s is not None)

    def moved(step):
        with torch.no_grad():
            for w, d in zip(weights, directions, strict=True):
                w.add_(step * d)
            value = bound().dense()[0, 0, 1:].sum()
            for w, d in zip(weights, directions, strict=True):
                w.sub_(step * d)
        return value

    measured = (moved(1e-6) - moved(-1e-6)) / 2e-6
    torch.testing.assert_close(predicted, measured, rtol=1e-4, atol=1e-7)


@norms
@BOUNDS
def test_equal_classes_cannot_be_confused(kind, norm):
    net = mlp(5, 7, 4)
    with torch.no_grad():
        net[2].weight[1] = net[2].weight[0]
    K = kind(lc.trace(net, (5,)), norm)().dense()[0]
    assert K[0, 1] == K[1, 0] == 0
    K.sum().backward()
    assert all(m.weight.grad.isfinite().all() for m in (net[0], net[2]))


# ---------------------------------------------------------------- certificates


@norms
@BOUNDS
def test_no_perturbation_within_the_radius_flips_a_prediction(kind, norm):
    net, p = mlp(6, 8, 4), norm.p
    x = torch.randn(100, 6)
    certificate = lc.certify(net, x, bound=kind(lc.trace(net, (6,)), norm), batch_size=33)
    assert certificate.p == p
    assert (certificate.radius > 0).all()
    radius = certificate.radius[:, None] * (1 - 1e-9)
    labels = certificate.prediction

    def unit(direction):
        """The step of l_p norm 1 that goes furthest along a direction."""
        if p == math.inf:
            return direction.sign()
        place = torch.nn.functional.one_hot(direction.abs().argmax(-1), 6)
        return place * direction.sign()

    for _ in range(50):
        assert (net(x + radius * unit(torch.randn_like(x))).argmax(1) == labels).all()
    for steps in (1, 5):
        for target in range(4):
            y = x.clone()
            for _ in range(steps):
                y.requires_grad_()
                logits = net(y)
                fall = logits[:, target] - logits.gather(1, labels[:, None])[:, 0]
                (slope,) = torch.autograd.grad(fall.sum(), y)
                y = (y + radius / steps * unit(slope)).detach()
                assert ((y - x).norm(p, dim=1) <= UP * radius[:, 0]).all()
                assert (net(y).argmax(1) == labels).all()


@norms
@BOUNDS
def test_the_radius_of_a_linear_classifier_is_the_true_one(kind, norm):
    """Just beyond it the best step flips the prediction."""
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    W = net[1].weight.detach() @ net[0].weight.detach()
    x = torch.randn(60, 6)
    certificate = lc.certify(net, x, bound=kind(lc.trace(net, (6,)), norm))
    logits, labels = net(x).detach(), certificate.prediction
    falls = W[labels, None] - W  # (n, classes, 6)
    margins = logits.gather(1, labels[:, None]) - logits
    sizes = falls.norm(dual(norm.p), dim=2)
    if kind is lc.Product:
        # It multiplies the norm of the first layer instead of folding the two, so it is below.
        folded = lc.certify(net, x, bound=lc.LipLT(lc.trace(net, (6,)), norm))
        assert (certificate.radius <= UP * folded.radius).all()
    ratio = (margins / sizes).masked_fill(sizes == 0, math.inf).amin(1)
    if kind is lc.LipLT:
        torch.testing.assert_close(certificate.radius, ratio)
    assert (certificate.radius <= UP * ratio).all()


def test_the_norm_goes_with_the_results():
    graph = lc.trace(mlp(5, 7, 4), (5,))
    x = torch.randn(3, 5)
    expected = ((None, 2.0), (lc.Exact(), 2.0), (lc.RowSum(), math.inf), (lc.ColumnSum(), 1.0))
    for norm, p in expected:
        product, liplt = lc.Product(graph, norm), lc.LipLT(graph, norm)
        both = lc.tightest(product, liplt)
        for bound in (product, liplt, both):
            assert bound.p == bound().p == lc.certify(graph.model, x, bound=bound).p == p
        assert (both().dense() == torch.minimum(product().dense(), liplt().dense())).all()


# ---------------------------------------------------------------- errors


@norms
@BOUNDS
@pytest.mark.parametrize("name", [name for name in NETS if OPAQUE[name]])
def test_functions_known_for_l2_only_are_refused(name, kind, norm):
    with pytest.raises(lc.LipcertError, match="known for L2 only.*norm=lc.Auto") as caught:
        kind(graph_of(name), norm)
    assert f"l_{norm.p:g} bounds" in str(caught.value)
    assert ", ".join(OPAQUE[name]) in str(caught.value)


def test_bounds_for_different_norms_do_not_mix():
    graph = lc.trace(mlp(5, 7, 4), (5,))
    for norm in SUMS:
        with pytest.raises(lc.LipcertError, match="one norm of the input"):
            lc.tightest(lc.Product(graph), lc.Product(graph, norm))
    with pytest.raises(lc.LipcertError, match="one norm of the input"):
        lc.tightest(*(lc.LipLT(graph, norm) for norm in SUMS))


@norms
def test_joint_is_for_l2(norm):
    with pytest.raises(lc.LipcertError, match=r"joint=True.*L2.*lc.Auto\(\)"):
        lc.LipLT(lc.trace(mlp(5, 7, 4), (5,)), norm, joint=True)
