"""What bounds in balls say holds for every point of them; smaller balls, better bounds."""

import math

import pytest
import torch
from torch import nn

import lipcert as lc
from balls import EVERY, SATURATING, built, followed, margin_violations, points, violations
from oracles import jacobians
from test_api import jaxtyping_off

INF = math.inf
FEW = ["mlp", "conv", "resnet", "branches", "clipped", "clipped pairs", "residual"]
MAKE = {
    "product": lambda graph, region: lc.Product(graph, norm=lc.Exact(), region=region),
    "bcp": lambda graph, region: lc.Product(graph, norm=lc.Exact(), region=region, masked=()),
    "liplt": lambda graph, region: lc.LipLT(graph, norm=lc.Exact(), region=region),
}
LOCAL = pytest.mark.parametrize("kind", ["product", "liplt"])


def traced(name, seed=0, trained=False):
    return lc.trace(built(name, seed, trained), EVERY[name].shape)


def inputs(graph, count=2, spread=1.0):
    return spread * torch.randn(count, *graph.input_shape)


def pairs(bound, x, eps=None):
    return bound(x, eps).dense()


def drops(K):
    return torch.stack([K.drop(torch.full((K.batch,), i)) for i in range(K.classes)], 1)


def off_diagonal(K):
    return K.masked_fill(torch.eye(K.shape[-1]).bool(), 0)


def close(value, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- nothing is violated


def together(graph, region):
    """All local bounds and a global one, which are checked each for itself."""
    return lc.tightest(lc.Product(graph), *(make(graph, region) for make in MAKE.values()))


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", EVERY)
def test_every_point_of_every_ball(name, trained):
    graph = traced(name, seed=3, trained=trained)
    x = inputs(graph)
    for eps in (0.02, 1.0) if trained else (0.2,):
        region = lc.L2Ball(eps, progressive=trained)
        found = points(graph.model, x, torch.full((2,), eps), 240)
        for kind in ("product", "liplt"):
            worst = violations(MAKE[kind](graph, region), x, None, found)
            assert max(worst.values()) <= 0, (kind, eps, worst)
        assert margin_violations(together(graph, region), x, None, found) <= 0


@pytest.mark.parametrize("name", ["mlp", "clipped pairs", "residual", "densenet"])
def test_every_point_of_clipped_balls(name):
    graph = traced(name, trained=True)
    x = torch.rand(3, *graph.input_shape).round(decimals=1)
    for eps in (0.1, 1.5):
        found = points(graph.model, x, torch.full((3,), eps), 240, clip=(0.0, 1.0))
        assert found.min() >= 0
        assert found.max() <= 1
        region = lc.L2Ball(eps, clip=(0.0, 1.0))
        for kind in ("product", "liplt"):
            worst = violations(MAKE[kind](graph, region), x, None, found)
            assert max(worst.values()) <= 0, (kind, eps, worst)
        assert margin_violations(together(graph, region), x, None, found) <= 0


@pytest.mark.parametrize("factor", [0.9, 0.99])
def test_points_are_good_enough_to_find_bounds_that_are_too_low(factor):
    """A linear network's bound is attained, so that a little less is contradicted."""
    graph = traced("linear")
    x = inputs(graph)
    bound = MAKE["product"](graph, lc.L2Ball(0.5))
    found = points(graph.model, x, torch.full((2,), 0.5), 400)
    K, row = bound(x), bound(x).dense() * factor
    bound.forward = lambda x, eps=None: lc.MarginConstants(
        lambda wanted: row[torch.arange(2), wanted], 3, K.kind, 0.0, 2, K.valid_radius
    )
    assert margin_violations(bound, x, None, found) > 0


@pytest.mark.parametrize("name", FEW)
def test_jacobians_in_the_ball(name):
    graph = traced(name, seed=1, trained=True)
    x, eps = inputs(graph, 1), 0.2
    J = jacobians(graph.model, points(graph.model, x, torch.tensor([eps]), 60)[0])
    slopes = (J[:, :, None] - J[:, None]).norm(dim=-1).amax(0)
    largest = torch.linalg.matrix_norm(J, 2).max()
    for kind in ("product", "liplt"):
        bound = MAKE[kind](graph, lc.L2Ball(eps))
        with torch.no_grad(), bound.held():
            K = bound(x).dense()[0]
            assert (slopes <= K * (1 + 1e-9) + 1e-12).all()
            assert largest <= bound.lipschitz(x).value * (1 + 1e-9) + 1e-12
            single = bound.per_output(x).value[0]
            assert (J.norm(dim=2).amax(0) <= single * (1 + 1e-9) + 1e-12).all()


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("name", EVERY)
def test_local_product_is_never_above_global(name):
    graph = traced(name, seed=2, trained=True)
    x = inputs(graph)
    everywhere = lc.Product(graph, norm=lc.Exact())
    whole = off_diagonal(everywhere().dense())
    for eps, progressive in ((0.01, False), (0.3, True), (20.0, True)):
        with torch.no_grad():
            region = lc.L2Ball(eps, progressive=progressive)
            local, bcp = MAKE["product"](graph, region), MAKE["bcp"](graph, region)
            K, outer = local(x), bcp(x)
            assert (off_diagonal(K.dense()) <= off_diagonal(outer.dense()) * (1 + 1e-9)).all()
            assert (off_diagonal(outer.dense()) <= whole * (1 + 1e-9) + 1e-12).all()
            for i in range(3):
                wanted = torch.full((2,), i)
                ball = K.row(wanted).scatter(1, wanted[:, None], 0) * eps
                assert (K.drop(wanted) <= outer.drop(wanted) * (1 + 1e-9) + 1e-12).all()
                if name in SATURATING:  # slopes of 0 and 1 only
                    fall = K.drop(wanted).scatter(1, wanted[:, None], 0)
                    assert (fall <= ball * (1 + 1e-9) + 1e-12).all()
            assert (local.lipschitz(x).value <= everywhere.lipschitz().value * (1 + 1e-9)).all()
            each, every = local.per_output(x).value, everywhere.per_output().value
            assert (each <= every * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("name", FEW)
def test_the_product_grows_with_the_ball(name):
    graph = traced(name, seed=4, trained=True)
    x = inputs(graph)
    for progressive in (True, False):
        region = lc.L2Ball(1.0, progressive=progressive)
        bound = MAKE["product"](graph, region)
        before = None
        for eps in (1e-4, 0.05, 0.3, 3.0):
            local = followed(bound, x, eps)
            boxes = [local.around.box(n) for n in graph]
            weights = [local.around.weights(n) for n in graph]
            K = bound(x, eps)
            now = boxes, weights, off_diagonal(K.dense()), off_diagonal(drops(K))
            if before is not None:
                for (low, up), (inner_low, inner_up) in zip(boxes, before[0], strict=True):
                    slack = 1e-12 * (1 + inner_low.abs())
                    assert (low <= inner_low + slack).all()
                    assert (up >= inner_up - slack).all()
                for w, less in zip(weights, before[1], strict=True):
                    if w is not None:
                        assert ((w > 0) >= (less > 0)).all()
                assert (now[2] >= before[2] * (1 - 1e-9)).all()
                assert (now[3] >= before[3] * (1 - 1e-9)).all()
            before = now


@LOCAL
@pytest.mark.parametrize("name", FEW)
def test_progressive_boxes_are_never_wider(name, kind):
    graph = traced(name, trained=True)
    x = inputs(graph)
    for eps in (0.05, 0.4):
        near = followed(MAKE[kind](graph, lc.L2Ball(eps)), x).around
        far = followed(MAKE[kind](graph, lc.L2Ball(eps, progressive=False)), x).around
        for n in graph:
            (low, up), (outer_low, outer_up) = near.box(n), far.box(n)
            slack = 1e-12 * (1 + outer_low.abs())
            assert (low >= outer_low - slack).all()
            assert (up <= outer_up + slack).all()


@pytest.mark.parametrize("name", FEW)
def test_clipping_narrows(name):
    graph = traced(name, trained=True)
    x = torch.rand(3, *graph.input_shape)
    for make in (MAKE["product"], MAKE["bcp"]):
        open_, held = (make(graph, lc.L2Ball(3.0, clip=clip)) for clip in (None, (0.0, 1.0)))
        K, outer = held(x), open_(x)
        assert (off_diagonal(K.dense()) <= off_diagonal(outer.dense()) * (1 + 1e-12)).all()
        assert (off_diagonal(drops(K)) <= off_diagonal(drops(outer)) * (1 + 1e-12)).all()
        assert (off_diagonal(drops(K)) < off_diagonal(drops(outer))).any()
    wide = MAKE["product"](graph, lc.L2Ball(0.4, clip=(-9.0, 9.0)))
    same = MAKE["product"](graph, lc.L2Ball(0.4))
    close(off_diagonal(wide(x).dense()), off_diagonal(same(x).dense()))


@pytest.mark.parametrize("name", ["mlp", "conv", "clipped pairs", "residual", "hand-made"])
def test_tightest_is_never_worse_than_any_member(name):
    graph = traced(name, seed=5, trained=True)
    x = inputs(graph, 4)
    region = lc.L2Ball(0.2)
    members = [lc.Product(graph), lc.LipLT(graph), *(make(graph, region) for make in MAKE.values())]
    best = lc.tightest(*members)
    radii = torch.stack([lc.certify(graph.model, x, bound=m).radius for m in members])
    found = lc.certify(graph.model, x, bound=best)
    assert (found.radius >= radii.amax(0)).all()
    wanted = torch.tensor([0, 1, 2, 0])
    for eps in (0.05, 0.2, 0.3):
        row = best(x).within(wanted, eps)
        for member in members:
            K = member(x)
            assert (row <= K.within(wanted, eps) * (1 + 1e-12) + 1e-12).all()
        robust = [lc.certify(graph.model, x, bound=m).robust_at(eps) for m in members]
        assert (found.robust_at(eps) >= torch.stack(robust).any(0)).all()
    least = torch.stack([torch.as_tensor(m.lipschitz(x).value).expand(4) for m in members])
    close(best.lipschitz(x).value, least.amin(0))


# ---------------------------------------------------------------- limits


def gradient_norms(graph, x):
    J = jacobians(graph.model, x)
    return (J[:, :, None] - J[:, None]).norm(dim=-1)


@pytest.mark.parametrize("name", ["mlp", "clipped", "conv", "residual", "hand-made"])
def test_tiny_balls_give_liplt_the_gradients(name):
    graph = traced(name, trained=True)
    x = inputs(graph, 3)
    K = MAKE["liplt"](graph, lc.L2Ball(1e-9))(x).dense()
    if any(n.op.__class__.__name__ == "Lipschitz" for n in graph):
        assert (gradient_norms(graph, x) * (1 - 1e-6) <= K).all()
    else:
        close(off_diagonal(K), gradient_norms(graph, x), rtol=1e-6, atol=1e-9)


def test_tiny_balls_leave_the_product_what_is_on():
    """The product of the norms of what is neither off nor saturated at the sample."""
    graph = traced("clipped", trained=True)
    net, x = graph.model, inputs(graph, 3)
    K = MAKE["product"](graph, lc.L2Ball(1e-9))(x).dense()
    with torch.no_grad():
        first, second = net[0](x), net[2](net[1](net[0](x)))
        on = ((first > 0) & (first < net[1].threshold)).double()
        later = ((second > 0) & (second < net[3].threshold)).double()
        for i in range(3):
            a = torch.linalg.matrix_norm(on[i][:, None] * net[0].weight, 2)
            b = torch.linalg.matrix_norm(later[i][:, None] * net[2].weight * on[i], 2)
            rows = net[4].weight * later[i]
            expected = a * b * (rows[:, None] - rows).norm(dim=2)
            close(K[i].detach(), expected)
    assert (on.mean(1) < 1).all()


@pytest.mark.parametrize("name", FEW)
def test_huge_balls_are_everywhere(name):
    """Saturation and slopes of single neurons help there too, in some of the networks."""
    graph = traced(name)
    x = inputs(graph)
    for kind, everywhere in (
        ("product", lc.Product(graph, norm=lc.Exact())),
        ("bcp", lc.Product(graph, norm=lc.Exact())),
        ("liplt", lc.LipLT(graph, norm=lc.Exact())),
    ):
        K = MAKE[kind](graph, lc.L2Ball(1e9))(x)
        whole = off_diagonal(everywhere().dense())
        if name in ("mlp", "resnet", "clipped"):
            close(off_diagonal(K.dense()), whole.expand(2, -1, -1), rtol=1e-6)
        elif kind != "liplt":  # of which a part of the slopes can make maps larger
            assert (off_diagonal(K.dense()) <= whole * (1 + 1e-9)).all()


@LOCAL
def test_networks_without_activations(kind):
    for name in ("linear", "deep linear"):
        graph = traced(name)
        x = inputs(graph)
        K = MAKE[kind](graph, lc.L2Ball(0.3))(x)
        everywhere = lc.Product(graph, norm=lc.Exact())
        close(off_diagonal(K.dense()), off_diagonal(everywhere().dense()).expand(2, -1, -1))
        certificate = lc.certify(graph.model, x, bound=MAKE[kind](graph, lc.L2Ball(1e6)))
        close(certificate.radius, lc.certify(graph.model, x, bound=everywhere).radius)


@pytest.mark.parametrize("size", [1e-20, 1e20, 1e-60, 1e-90])
def test_sizes_of_layers_do_not_change_radii(size):
    """There are no biases; at the last size the ball's squared radius is no longer a number."""

    def radii(size):
        torch.manual_seed(1)
        layers = nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU()
        net = nn.Sequential(*layers, nn.Linear(8, 3, bias=False))
        for place in (0, 2):
            net[place].weight.data *= size
        bound = MAKE["product"](lc.trace(net, (4,)), lc.L2Ball(0.3))
        return lc.certify(net, x, bound=bound).radius

    x = torch.randn(5, 4)
    close(radii(size), radii(1.0), rtol=1e-6)


# ---------------------------------------------------------------- samples apart


@pytest.mark.parametrize("kind", MAKE)
def test_a_radius_for_each_sample(kind):
    for name in ("mlp", "clipped pairs", "residual"):
        graph = traced(name, trained=True)
        x, eps = inputs(graph, 3), torch.tensor([0.02, 0.3, 1.1])
        bound = MAKE[kind](graph, lc.L2Ball(5.0))
        K = bound(x, eps)
        assert K.batch == 3
        assert torch.equal(torch.as_tensor(K.valid_radius), eps)
        for i in range(3):
            for one in (
                bound(x[i : i + 1], eps[i].item()),
                bound(x[i : i + 1], eps[i : i + 1]),
                MAKE[kind](graph, lc.L2Ball(eps[i].item()))(x[i : i + 1]),
            ):
                close(K.dense()[i], one.dense()[0])
                close(drops(K)[i], drops(one)[0])
        close(bound.lipschitz(x, eps).value[1], bound.lipschitz(x[1:2], 0.3).value[0])
        close(bound.per_output(x, eps).value[1], bound.per_output(x[1:2], 0.3).value[0])


@pytest.mark.parametrize("kind", MAKE)
def test_no_samples(kind):
    for name in ("mlp", "clipped pairs"):
        graph = traced(name)
        K = MAKE[kind](graph, lc.L2Ball(0.1))(inputs(graph, 0))
        assert K.batch == 0
        wanted = torch.zeros(0, dtype=torch.long)
        assert K.row(wanted).shape == K.drop(wanted).shape == (0, 3)


@pytest.mark.parametrize("kind", MAKE)
def test_held_changes_nothing(kind):
    for name in ("mlp", "clipped pairs"):
        graph = traced(name, trained=True)
        x, y = inputs(graph), inputs(graph)
        bound = MAKE[kind](graph, lc.L2Ball(0.2))
        best = lc.tightest(bound, lc.LipLT(graph))
        for b in (bound, best):
            free = [b(x).within(torch.tensor([0, 1]), 0.2), b(y, 0.7).dense(), b.lipschitz(y).value]
            with b.held():
                for _ in range(2):
                    held = [
                        b(x).within(torch.tensor([0, 1]), 0.2),
                        b(y, 0.7).dense(),
                        b.lipschitz(y).value,
                    ]
                    for one, other in zip(held, free, strict=True):
                        assert torch.equal(one, other)
        with torch.no_grad():
            for p in graph.model.parameters():
                p *= 1.5
        changed = bound(x).dense()
        assert not torch.allclose(changed, off_diagonal(changed) * 0 + free[1][:2])


@pytest.mark.parametrize("name", FEW)
def test_iterated_norms_come_from_below(name):
    graph = traced(name, trained=True)
    x = inputs(graph, 3)
    region = lc.L2Ball(0.3)
    exact = MAKE["product"](graph, region)(x)
    for norm in (lc.LOBPCG(60), lc.PowerIteration(600)):
        K = lc.Product(graph, norm=norm, region=region)(x)
        assert K.kind is lc.Kind.ESTIMATE
        ratio = K.dense().detach() / exact.dense().detach().clamp(min=1e-300)
        ratio = ratio.masked_fill(torch.eye(3).bool(), 1)
        assert ratio.max() <= 1 + 1e-9
        assert ratio.min() >= 1 - 1e-4


def test_kinds_and_failures():
    graph = traced("clipped")
    x, region = inputs(graph, 5), lc.L2Ball(0.3)
    K = lc.Product(graph, region=region)(x)
    assert (K.kind, K.failure) == (lc.Kind.UPPER, 0)
    assert lc.LipLT(graph, lc.LOBPCG(1), region=region)(x).kind is lc.Kind.ESTIMATE
    wide = nn.Sequential(
        nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 3)
    )
    graph = lc.trace(wide, (40,))
    K = lc.Product(graph, norm=lc.Lanczos(1e-9, steps=20), region=region)(inputs(graph, 5))
    assert K.kind is lc.Kind.PROBABILISTIC
    # Two layers, of all samples each, and those of the whole maps that cap or start them.
    assert 1e-9 <= K.failure <= 2 * 5e-9 + 4e-9
    exact = lc.Product(graph, norm=lc.Exact(), region=region)
    x = inputs(graph, 5)
    fall = lc.Product(graph, norm=lc.Lanczos(1e-9, steps=20), region=region)(x).dense()
    assert (off_diagonal(fall) >= off_diagonal(exact(x).dense()) * (1 - 1e-12)).all()


@LOCAL
def test_weights_get_gradients(kind):
    """Of rows and drops, by differences, in a network whose masks do not change nearby."""
    graph = traced("clipped", trained=True)
    net, x = graph.model, inputs(graph)
    bound = MAKE[kind](graph, lc.L2Ball(0.2))
    wanted = torch.tensor([0, 2])

    def value():
        K = bound(x)
        return (K.row(wanted)[:, 1] + K.drop(wanted)[:, 1]).sum()

    parameters = list(net.parameters())
    slopes = torch.autograd.grad(value(), parameters, allow_unused=True)
    torch.manual_seed(7)
    direction = [torch.randn_like(p) for p in parameters]
    expected = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True) if s is not None)
    found = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
            found.append(value())
            for p, d in zip(parameters, direction, strict=True):
                p -= step * d
    close((found[0] - found[1]) / 2e-6, expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- certificates


@pytest.mark.parametrize("name", ["mlp", "clipped", "clipped pairs", "residual", "densenet"])
def test_attacks_inside_certified_balls_fail(name):
    graph = traced(name, seed=6, trained=True)
    net, x = graph.model, inputs(graph, 12)
    best = lc.tightest(lc.Product(graph), *(make(graph, lc.L2Ball(0.3)) for make in MAKE.values()))
    for bisections in (0, 4):
        certificate = lc.certify(net, x, bound=best, bisections=bisections)
        assert (certificate.radius > 0).all()
        inside = lc.pgd(net, x, certificate.prediction, certificate.radius, 30, 3, clip=None)
        assert not inside.found.any()


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", ["mlp", "clipped pairs", "residual"])
def test_radii_bisections_and_robustness_agree(name, kind):
    graph = traced(name, seed=7, trained=True)
    net, x = graph.model, inputs(graph, 6)
    bound = MAKE[kind](graph, lc.L2Ball(0.1))
    before = None
    for bisections in (0, 1, 8):
        certificate = lc.certify(net, x, bound=bound, bisections=bisections, batch_size=4)
        radius = certificate.radius
        for i, r in enumerate(radius.tolist()):
            if r > 0:
                assert certificate.robust_at(r * (1 - 1e-12))[i]
                assert certificate.robust_at(r / 3)[i]
            assert not certificate.robust_at(r * (1 + 1e-9) + 1e-300)[i]
        if before is not None:
            assert (radius >= before).all()
        before = radius
    # The last radius is proved in its own ball, and no ball a little larger proves it.
    again = lc.certify(net, x, bound=bound, bisections=24, batch_size=4).radius
    assert (again >= before).all()
    if kind == "product":
        for i in range(6):
            one = MAKE[kind](graph, lc.L2Ball(again[i].item() * 1.001))
            assert not lc.certify(net, x[i : i + 1], bound=one).robust_at(again[i].item() * 1.001)


# ---------------------------------------------------------------- what is refused


@LOCAL
@pytest.mark.parametrize("eps", [-0.1, -INF, INF, math.nan])
def test_radii_that_are_none(kind, eps):
    with pytest.raises(lc.LipcertError, match="L2Ball"):
        lc.L2Ball(eps)
    graph = traced("mlp")
    bound = MAKE[kind](graph, lc.L2Ball(0.1))
    for wrong in (eps, torch.tensor([0.1, eps]), torch.tensor(eps)):
        with jaxtyping_off(), pytest.raises(lc.LipcertError, match="radii must be finite"):
            bound(inputs(graph), wrong)


@LOCAL
def test_samples_and_radii_that_do_not_fit(kind):
    graph = traced("mlp")
    bound = MAKE[kind](graph, lc.L2Ball(0.1))
    x = inputs(graph)
    with pytest.raises(lc.LipcertError, match="needs a positive finite number"):
        lc.L2Ball(0)
    with jaxtyping_off():
        for wrong in (torch.ones(3), torch.ones(1, 2), torch.ones(1), []):
            with pytest.raises(lc.LipcertError, match="one radius, or one for each"):
                bound(x, torch.as_tensor(wrong))
        for ask in (bound, bound.lipschitz, bound.per_output):
            with pytest.raises(lc.LipcertError, match="give them"):
                ask()
        with pytest.raises(lc.LipcertError, match="give them"):
            bound.prefix(graph.output)
        for wrong in (x[0], x[:, :5], x[:, None]):
            with pytest.raises(lc.LipcertError, match=r"traced for \(n, 6\)"):
                bound(wrong)
        for dtype in (torch.float16, torch.bfloat16, torch.int64):
            with pytest.raises(lc.LipcertError, match="float32 or float64"):
                bound(x.to(dtype))


def test_zero_radii_are_points():
    graph = traced("clipped")
    x = inputs(graph)
    K = MAKE["product"](graph, lc.L2Ball(0.1))(x, 0.0)
    assert off_diagonal(drops(K)).abs().max() < 1e-15
    assert torch.as_tensor(K.valid_radius).eq(0).all()
    K = MAKE["product"](graph, lc.L2Ball(0.1))(x, torch.tensor([0.0, 0.1]))
    assert off_diagonal(drops(K))[1].max() > 0


@LOCAL
def test_samples_outside_of_clip(kind):
    graph = traced("mlp")
    bound = MAKE[kind](graph, lc.L2Ball(0.1, clip=(0.0, 1.0)))
    x = torch.rand(2, 6)
    bound(x)
    for bad in (-0.01, 1.01, math.nan):
        x[1, 3] = bad
        with pytest.raises(lc.LipcertError, match="outside the values"):
            bound(x)
    for clip in ((1.0, 0.0), (0.5, 0.5), (math.nan, 1.0)):
        with pytest.raises(lc.LipcertError, match="the least first"):
            lc.L2Ball(0.1, clip=clip)


def test_settings_that_do_not_fit():
    graph = traced("mlp")
    ball = lc.L2Ball(0.1)
    with jaxtyping_off():
        for region in (0.1, "ball", lc.L2Ball):
            for bound in (lc.Product, lc.LipLT):
                with pytest.raises(lc.LipcertError, match="is no region"):
                    bound(graph, region=region)
        for norm in (lc.RowSum(), lc.ColumnSum()):
            for bound in (lc.Product, lc.LipLT):
                with pytest.raises(lc.LipcertError, match="an L2Ball is of L2"):
                    bound(graph, norm=norm, region=ball)
    for masked in (("nothing",), ("0", "1")):  # no node; no affine node
        with pytest.raises(lc.LipcertError, match="masked names"):
            lc.Product(graph, region=ball, masked=masked)
    starts = lc.SampleVectors(4)
    for norm, region in ((lc.Auto(), ball), (lc.PowerIteration(1), None)):
        with pytest.raises(lc.LipcertError, match="starts keeps iterated vectors"):
            lc.Product(graph, norm=norm, region=region, starts=starts)


@LOCAL
def test_a_network_changed_after_tracing(kind):
    graph = traced("mlp")
    bound, x = MAKE[kind](graph, lc.L2Ball(0.1)), inputs(graph)
    bound(x)
    graph.model[1] = nn.Tanh()
    for ask in (bound, bound.lipschitz, bound.per_output, lambda x: bound.prefix("0", x)):
        with pytest.raises(lc.LipcertError, match="changed after it was traced"):
            ask(x)


@pytest.mark.parametrize("kind", MAKE)
def test_crossed_and_zero_thresholds(kind):
    """Where t_max is below t_min both are as they are: nothing contradicts the bound."""
    for name in ("clipped", "clipped pairs"):
        graph = traced(name)
        net, x = graph.model, inputs(graph)
        with torch.no_grad():
            for module in net:
                for parameter in module.parameters():
                    if type(module).__name__ == "ClippedReLU":
                        parameter[::2] = 0
                        parameter[1::4] = -0.3
                if type(module).__name__ == "ClippedMaxMin":
                    module.upper[::2], module.lower[::2] = -0.4, 0.4
        for eps in (0.05, 1.0):
            bound = MAKE[kind](graph, lc.L2Ball(eps))
            found = points(net, x, torch.full((2,), eps), 200)
            assert max(violations(bound, x, None, found).values()) <= 0
            assert margin_violations(bound, x, None, found) <= 0


def test_nan_samples_prove_nothing():
    graph = traced("clipped")
    x = inputs(graph)
    x[1, 2] = math.nan
    bound = MAKE["product"](graph, lc.L2Ball(0.1))
    try:
        certificate = lc.certify(graph.model, x, bound=bound)
    except lc.LipcertError:
        return
    assert certificate.radius[1] == 0


def test_what_saturates_is_found():
    """The laws above would hold for a bound that never finds a constant unit."""
    for name in SATURATING:
        graph = traced(name)
        x = inputs(graph)
        local = followed(MAKE["product"](graph, lc.L2Ball(0.01)), x).around
        constant = [
            float((w == 0).double().mean()) for n in graph if (w := local.weights(n)) is not None
        ]
        assert max(constant) > 0.2
