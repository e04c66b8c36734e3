"""The ellipsoid bound around samples: against points of balls, a slow oracle and linear algebra."""

import itertools
import math

import pytest
import torch
from torch import nn

import lipcert as lc
from balls import EVERY, Residual, built, points
from lipcert.bounds import local_ellipsoid
from lipcert.bounds.affine_norm import affine_norm
from lipcert.bounds.local_ellipsoid import LocalEllipsoid
from lipcert.bounds.local_ends import EllipsoidEnd, local_margins
from lipcert.bounds.local_extent import LocalExtent, stacked, through_slopes, together
from lipcert.graph import Affine, Concat, Lipschitz, Slope, Sum
from lipcert.kinds import Constant, Kind
from oracles import jacobians
from test_ellipsoid import almost_equal_neurons

# A chain of all kinds of slopes, and all kinds of nodes; the rest of EVERY has no other paths.
FEW = [
    "mlp",
    "conv",
    "own conv",
    "pools",
    "resnet",
    "densenet",
    "branches",
    "hand-made",
    "residual",
]
# Chains of affine maps and elementwise functions.
CHAINS = ["mlp", "conv", "own conv", "hand-made", "conv 3d", "clipped"]
both = pytest.mark.parametrize("anchored", [True, False], ids=["anchored", "pairwise"])


def around(graph, x, radii, largest=1024, clip=None, norm=None):
    radii = torch.as_tensor(radii).expand(len(x)).clone()
    ball = lc.L2Ball(1.0, clip=clip)
    return LocalEllipsoid(
        *(graph, x, ball, radii, norm or (lambda n: affine_norm(n.op, lc.Exact()))), largest
    )


def margins_of(local, anchored=True):
    graph = local.around.graph
    classes = graph.output.shape[0]
    return local_margins(classes, local.ends(anchored), local.boxed(), local.around)


def mlp(*sizes, act=nn.ReLU, seed=0, bias=1.0):
    torch.manual_seed(seed)
    layers = []
    for m, n in itertools.pairwise(sizes):
        layers += [nn.Linear(m, n), act()]
        nn.init.normal_(layers[-2].weight, std=(2 / m) ** 0.5)
        nn.init.normal_(layers[-2].bias, std=bias)
    return nn.Sequential(*layers[:-1])


# ---------------------------------------------------------------- never below the truth


@pytest.mark.parametrize("name", EVERY)
def test_nothing_in_the_ball_moves_further(name):
    """Boxes, entries, nodes, pairs of classes and falls: of changes from the sample."""
    net = built(name, trained=True)
    graph = lc.trace(net, EVERY[name].shape)
    x = torch.randn(3, *graph.input_shape)
    radii = torch.tensor([0.02, 0.3, 1.5])
    largest = 20 if name in ("conv", "resnet") else 1024
    local = around(graph, x, radii, largest)
    found = points(net, x, radii, 80)
    with torch.no_grad():
        centres = graph.values(x)
        values = {n: v.unflatten(0, (3, 80)) for n, v in graph.values(found.flatten(0, 1)).items()}
        moved = (found - x[:, None]).flatten(2).norm(dim=2)
        for n in graph:
            v, c = values[n].flatten(2), centres[n].flatten(1)[:, None]
            slack = 1e-10 * (1 + v.abs().max())
            lower, upper = (end.flatten(1)[:, None] for end in local.around.box(n))
            assert (v >= lower - slack).all()
            assert (v <= upper + slack).all()
            entries = local.per_entry(n, True).value.flatten(1)[:, None]
            assert ((v - c).abs() <= entries * moved[..., None] + slack).all()
            reached = local.constants(n, True).value[:, None]
            assert ((v - c).norm(dim=2) <= reached * moved + slack).all()
            if isinstance(n.op, Slope):
                low, high = (s.expand_as(centres[n]).flatten(1) for s in local.around.anchored(n))
                z = values[n.inputs[0]].flatten(2) - centres[n.inputs[0]].flatten(1)[:, None]
                ends = torch.stack([low[:, None] * z, high[:, None] * z])
                assert (v - c >= ends.amin(0) - slack).all()
                assert (v - c <= ends.amax(0) + slack).all()
        margins = margins_of(local)
        assert margins.kind == Kind.UPPER
        out, start = values[graph.output], centres[graph.output]
        for i in range(start.shape[1]):
            wanted = torch.full((3,), i)
            falls = (start[:, i, None] - start)[:, None] - (out[:, :, i, None] - out)
            assert (falls <= margins.row(wanted)[:, None] * moved[..., None] + slack).all()
            assert (falls <= margins.drop(wanted)[:, None] + slack).all()
        change = (out - start[:, None]).abs()
        assert (change <= margins.alone()[:, None] * moved[..., None] + slack).all()


@pytest.mark.parametrize("name", FEW)
def test_no_two_points_of_the_ball_are_steeper(name):
    """Between points of the ball, and at points: the pairwise flavour."""
    net = built(name, trained=True)
    graph = lc.trace(net, EVERY[name].shape)
    x = torch.randn(3, *graph.input_shape)
    radii = torch.tensor([0.02, 0.3, 1.5])
    local = around(graph, x, radii)
    found = points(net, x, radii, 60)
    row = torch.stack([margins_of(local, False).row(torch.full((3,), i)) for i in range(3)], 1)
    whole = local.constants(graph.output, False).value
    j = jacobians(net, found.flatten(0, 1)).unflatten(0, (3, 60))
    assert (torch.linalg.matrix_norm(j, 2) <= whole[:, None] * (1 + 1e-9)).all()
    pairs = (j[:, :, :, None] - j[:, :, None]).norm(dim=4)
    assert (pairs <= row[:, None] * (1 + 1e-9) + 1e-12).all()
    with torch.no_grad():
        values = {n: v.unflatten(0, (3, 60)) for n, v in graph.values(found.flatten(0, 1)).items()}
        for shift in (1, 7, 20):
            gap = (found - found.roll(shift, 1)).flatten(2).norm(dim=2)
            for n in graph:
                step = (values[n] - values[n].roll(shift, 1)).flatten(2)
                slack = 1e-10 * (1 + values[n].abs().max())
                entries = local.per_entry(n, False).value.flatten(1)[:, None]
                assert (step.abs() <= entries * gap[..., None] + slack).all()
                most = local.constants(n, False).value[:, None]
                assert (step.norm(dim=2) <= most * gap + slack).all()


def test_a_clipped_ball_is_narrower():
    net = mlp(6, 12, 12, 3)
    graph, x = lc.trace(net, (6,)), torch.rand(4, 6)
    found = points(net, x, torch.full((4,), 0.7), 200, clip=(0, 1))
    local = around(graph, x, 0.7, clip=(0, 1))
    moved = (found - x[:, None]).norm(dim=2)
    change = (net(found) - net(x)[:, None]).norm(dim=2)
    reached = local.constants(graph.output, True).value
    assert (change <= reached[:, None] * moved + 1e-12).all()
    assert reached.mean() < around(graph, x, 0.7).constants(graph.output, True).value.mean()


# ---------------------------------------------------------------- a slow oracle


def one_sample(net, x, radius, anchored):
    """S of the last hidden layer and the boxes of a network of Linear and LeakyReLU, in loops."""
    linear = [m for m in net if isinstance(m, nn.Linear)]
    acts = [m for m in net if not isinstance(m, nn.Linear)]
    slope = [getattr(a, "negative_slope", 0.0) for a in acts]
    z = [x]
    for m in net:
        z.append(m(z[-1]))
    before = z[1::2]  # what activations read
    seen = torch.eye(len(linear[-1].weight))
    seen = seen - seen.mean(0)
    reads = []
    for k in reversed(range(len(acts))):
        seen = seen @ linear[k + 1].weight
        reads.insert(0, seen)
        at_point = torch.where(before[k] > 0, 1.0, slope[k])
        seen = seen * (at_point + (1 + slope[k]) / 2) / 2
    s, box, boxes = {True: torch.eye(len(x)), False: torch.eye(len(x))}, None, []
    for k in range(len(acts)):
        w, b = linear[k].weight, linear[k].bias
        s = {flavour: w @ p @ w.mT for flavour, p in s.items()}
        r = radius * s[True].diagonal().sqrt()
        low, up = before[k] - r, before[k] + r
        if box is not None:
            middle, half = w @ (box[0] + box[1]) / 2 + b, w.abs() @ (box[1] - box[0]) / 2
            low, up = torch.maximum(low, middle - half), torch.minimum(up, middle + half)
        boxes.append((low, up))
        act = acts[k]
        box = (act(low), act(up))
        for flavour in (True, False):
            least, most = torch.zeros(len(b)), torch.zeros(len(b))
            for i, c in enumerate(before[k]):
                quotients = []
                for t in (low[i], up[i]):
                    if flavour and low[i] < 0 < up[i]:
                        quotients.append((act(t) - act(c)) / (t - c))
                        quotients.append(torch.tensor(1.0 if c > 0 else slope[k]))
                    else:
                        quotients.append(torch.tensor(1.0 if t > 0 else slope[k]))
                least[i], most[i] = min(quotients), max(quotients)
            s[flavour] = stepped(s[flavour], least, most, reads[k])
    return s[anchored].detach(), boxes


def stepped(s, least, most, read):
    """The step of spec: noise, and what the change of the neurons with r > 0 bends."""
    c, r = (least + most) / 2, (most - least) / 2
    u = [i for i in range(len(c)) if r[i] > 1e-14]
    p = torch.diag(c) @ s @ torch.diag(c)
    if not u:
        return p
    inner = s[u][:, u]
    added = torch.stack([r[i] * read[:, i].norm() for i in u])
    stretched = torch.stack([(read @ (c * s[:, i])).norm() for i in u])
    ratio = stretched.clamp(min=1e-6 * stretched.max()) / added.clamp(min=1e-6 * added.max())
    g = torch.linalg.eigvalsh(inner)[-1] + ratio
    bent = torch.diag(c) @ s[:, u]
    p = p + bent @ torch.linalg.inv(torch.diag(g) - inner) @ bent.mT
    p[u, u] += g * r[u].square()
    return p


@both
def test_a_batch_is_many_samples_one_by_one(anchored):
    net = nn.Sequential(*mlp(5, 9, 8, 7, 4, bias=0.3), nn.Identity())[:-1]
    net[3] = nn.LeakyReLU(0.2)
    graph = lc.trace(net, (5,))
    x, radii = torch.randn(8, 5), torch.tensor([0.0, 1e-3, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0])
    local = around(graph, x, radii)
    source = graph.nodes[-2]
    ends = local.ends(anchored)
    assert isinstance(ends[0], EllipsoidEnd)
    row = margins_of(local, anchored).row(torch.zeros(8, dtype=torch.long))
    hidden = [n.inputs[0] for n in graph if isinstance(n.op, Slope)]
    mixed = 0
    for b in range(8):
        s, boxes = one_sample(net, x[b], float(radii[b]), anchored)
        root = torch.linalg.eigvalsh(s)[-1].sqrt()
        torch.testing.assert_close(local.constants(source, anchored).value[b], root)
        entries = local.per_entry(source, anchored).value[b]
        torch.testing.assert_close(entries, s.diagonal().sqrt())
        w = net[-1].weight - net[-1].weight[0]
        torch.testing.assert_close(row[b], (w @ s * w).sum(1).sqrt(), rtol=1e-6, atol=1e-7)
        for n, (low, up) in zip(hidden, boxes, strict=True):
            torch.testing.assert_close(local.around.box(n)[0][b], low)
            torch.testing.assert_close(local.around.box(n)[1][b], up)
            mixed += int(((low < 0) & (up > 0)).any() and not ((low < 0) & (up > 0)).all())
    assert mixed > 5


def test_any_multiplier_above_s_is_true():
    """The step itself: whatever is read, and for slopes of any sign."""
    torch.manual_seed(3)
    for trial in range(30):
        n = 6
        root = torch.randn(2, n, 1 + trial % n)
        root[1, trial % n] = 0
        low = torch.randn(2, n)
        high = low + torch.rand(2, n) * (torch.rand(2, n) < 0.6)
        read = None if trial % 3 == 0 else torch.randn(2, 3, n) * (torch.rand(n) < 0.5)
        scale = torch.tensor([1e-160, 1e160])
        after = through_slopes(LocalExtent(scale, root.mT), low, high, read, True)
        dz = torch.nn.functional.normalize(torch.randn(500, 2, root.shape[2]), dim=2)
        dz = (root @ dz[..., None])[..., 0]
        worst = torch.where(torch.rand(500, 2, n) < 0.5, low, high) * dz
        # dy dy^T <= S: the change is in the image of S, and dy^T S^+ dy <= 1.
        values, vectors = torch.linalg.eigh(after.root.mT @ after.root)
        ratio = (after.scale / scale).square()[:, None]
        along = (vectors.mT @ worst[..., None])[..., 0].square()
        assert (along / (ratio * values.clamp(min=1e-13))).sum(-1).max() <= 1 + 1e-6


# ---------------------------------------------------------------- where the truth is known


@both
@pytest.mark.parametrize("name", CHAINS)
def test_a_ball_of_radius_0_has_the_slope_at_the_sample(name, anchored):
    net = built(name, trained=True)
    graph = lc.trace(net, EVERY[name].shape)
    x = torch.randn(4, *graph.input_shape)
    local = around(graph, x, 0.0)
    j = jacobians(net, x)
    torch.testing.assert_close(
        local.constants(graph.output, anchored).value, torch.linalg.matrix_norm(j, 2)
    )
    entries = local.per_entry(graph.output, anchored).value
    torch.testing.assert_close(entries, j.norm(dim=2))
    row = margins_of(local, anchored).row(torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(row, (j - j[:, 1:2]).norm(dim=2))


def test_at_a_tie_both_slopes_count():
    net, x = mlp(3, 4, 2), torch.ones(1, 3)
    net[0].bias.data = -(net[0].weight @ x[0]).detach()
    graph = lc.trace(net, (3,))
    assert (graph.values(x)[graph.nodes[1]] == 0).all()
    local = around(graph, x, 0.0)
    low, high = local.around.anchored(graph.nodes[2])
    assert (low == 0).all()
    assert (high == 1).all()
    near = points(net, x, torch.full((1,), 1e-3), 200)
    quotients = (net(near) - net(x)[:, None]).norm(dim=2) / (near - x[:, None]).norm(dim=2)
    assert quotients.max() <= local.constants(graph.output, True).value


@both
def test_where_no_neuron_bends_it_is_linear_algebra(anchored):
    net = mlp(5, 7, 9, 8, 4, bias=8.0)
    graph, x = lc.trace(net, (5,)), torch.randn(6, 5)
    local = around(graph, x, 0.05)
    straight = [n for n in graph if isinstance(n.op, Slope)]
    linear = torch.stack([torch.eq(*local.around.slopes(n)).all(1) for n in straight]).all(0)
    assert linear.sum() >= 3
    j = jacobians(net, x)
    value = local.constants(graph.output, anchored).value
    norms = torch.linalg.matrix_norm(j, 2)
    torch.testing.assert_close(value[linear], norms[linear])
    row = margins_of(local, anchored).row(torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(row[linear], (j - j[:, :1]).norm(dim=2)[linear])


@both
def test_of_a_linear_network_it_is_the_norm(anchored):
    for name in ("linear", "deep linear"):
        graph = lc.trace(EVERY[name].build(), EVERY[name].shape)
        x = torch.randn(2, *graph.input_shape)
        whole = torch.linalg.matrix_norm(jacobians(graph.model, x), 2)
        for radius in (0.0, 1.0, 1e6):
            value = around(graph, x, radius).constants(graph.output, anchored).value
            torch.testing.assert_close(value, whole)


def test_logits_that_almost_agree_have_a_constant_of_their_own():
    """Rows of the last layer whose difference is far below their size."""
    net = mlp(5, 7, 3, bias=9.0)
    weight = net[2].weight.data
    weight[1] = weight[0] + 1e-11 * torch.randn(7)
    graph, x = lc.trace(net, (5,)), torch.randn(3, 5)
    margins = margins_of(around(graph, x, 1e-3))
    hidden = jacobians(net[:2], x)
    expected = ((weight[1] - weight[0]) @ hidden).norm(dim=1)
    found = margins.row(torch.zeros(3, dtype=torch.long))[:, 1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert (found >= expected * (1 - 1e-12)).all()


def test_scaling_layers_scales_the_bound():
    net = mlp(5, 7, 6, 3)
    graph, x = lc.trace(net, (5,)), torch.randn(3, 5)
    value = {a: around(graph, x, 0.3).constants(graph.output, a).value for a in (True, False)}
    for first, last in ((2.0**600, 2.0**-600), (2.0**-600, 2.0**600), (1.0, 2.0**30)):
        other = mlp(5, 7, 6, 3)
        for p in other[0].parameters():
            p.data *= first
        other[2].bias.data *= first
        other[4].weight.data *= last
        traced = lc.trace(other, (5,))
        for anchored in (True, False):
            found = around(traced, x, 0.3).constants(traced.output, anchored).value
            torch.testing.assert_close(found, value[anchored] * (first * last), rtol=1e-9, atol=0)


def test_anchored_is_mostly_below_pairwise_and_the_global_bound():
    """Not a law for every sample; the middle of many."""
    net = mlp(10, 30, 30, 30, 4, bias=0.1)
    graph, x = lc.trace(net, (10,)), torch.randn(20, 10)
    local = around(graph, x, 0.3)
    anchored, pairwise = (local.constants(graph.output, a).value for a in (True, False))
    assert (anchored < pairwise).float().mean() > 0.9
    whole = lc.Product(graph, norm=lc.Exact(), region=lc.L2Ball(0.3)).lipschitz(x).value
    assert (pairwise < whole).all()
    slopes = jacobians(net, x)
    assert (anchored >= torch.linalg.matrix_norm(slopes, 2)).all()
    assert anchored.mean() < 2 * torch.linalg.matrix_norm(slopes, 2).mean()


# ---------------------------------------------------------------- parts, balls, claims


@both
@pytest.mark.parametrize("name", ["mlp", "residual", "pools"])
def test_samples_do_not_know_of_each_other(name, anchored, monkeypatch):
    net = built(name, trained=True)
    graph = lc.trace(net, EVERY[name].shape)
    x, radii = torch.randn(5, *graph.input_shape), torch.tensor([0.0, 0.1, 0.5, 2.0, 0.01])

    def facts(x, radii):
        local = around(graph, x, radii)
        margins = margins_of(local, anchored)
        wanted = torch.arange(len(x)) % 3
        found = [margins.row(wanted), margins.drop(wanted), margins.alone()]
        for n in graph.nodes[1::3]:
            found += [local.constants(n, anchored).value, local.per_entry(n, anchored).value]
            found += local.around.box(n)
        return found

    whole = facts(x, radii)
    monkeypatch.setattr(local_ellipsoid, "_ENTRIES", 1)
    torch.testing.assert_close(facts(x, radii), whole)
    one = facts(x[:1], radii[:1])
    for some, all_ in zip(one, whole, strict=True):
        torch.testing.assert_close(some, all_[:1])
    assert all(len(f) == 0 for f in facts(x[:0], radii[:0]))


def test_large_nodes_are_balls():
    """With all nodes large it is a product of norms and steepest slopes."""
    net = mlp(5, 8, 7, 3)
    graph, x = lc.trace(net, (5,)), torch.randn(4, 5)
    for anchored in (True, False):
        value = around(graph, x, 3.0, largest=1).constants(graph.output, anchored).value
        norms = [torch.linalg.matrix_norm(net[k].weight, 2) for k in (0, 2, 4)]
        torch.testing.assert_close(value, math.prod(norms).expand(4))
        some = around(graph, x, 3.0, largest=7).constants(graph.output, anchored).value
        fine = around(graph, x, 3.0).constants(graph.output, anchored).value
        assert (fine < some).all()
        assert (some < value).all()
        steep = nn.Sequential(net[0], nn.LeakyReLU(-3.0), nn.Linear(8, 3))
        traced = lc.trace(steep, (5,))
        value = around(traced, x, 3.0, largest=1).constants(traced.output, anchored).value
        norms = [torch.linalg.matrix_norm(steep[k].weight, 2) for k in (0, 2)]
        torch.testing.assert_close(value, (3 * math.prod(norms)).expand(4))


def test_sums_and_stacks_of_balls_and_ellipsoids():
    net = Residual().eval()
    net(torch.zeros(1, 6))
    graph, x = lc.trace(net, (6,)), torch.randn(3, 6)
    kinds = {type(n.op) for n in graph}
    assert {Sum, Concat, Lipschitz, Slope, Affine} <= kinds
    for largest in (1024, 12, 8, 1):  # the concatenation has 16 values, the others 8 or fewer
        local = around(graph, x, 0.2, largest)
        found = points(net, x, torch.full((3,), 0.2), 100)
        change = (net(found.flatten(0, 1)).unflatten(0, (3, 100)) - net(x)[:, None]).norm(dim=2)
        moved = (found - x[:, None]).norm(dim=2)
        value = local.constants(graph.output, True).value
        assert (change <= value[:, None] * moved + 1e-12).all()


def test_what_adds_and_stacks_holds_the_worst_that_can_be():
    """Maps of one input, equal ones too, with sizes that differ: A + B and A above B."""
    scales = torch.tensor([[3.0, 1e-3], [4.0, 2.0]])
    a, b = torch.randn(2, 2, 5, 6)
    turn = torch.linalg.qr(torch.randn(2, 6, 6))[0][:, :5]
    for first, second in ((a, b), (a, a), (a, turn), (turn, b)):
        parts, whole = [], []
        for s, m in zip(scales, (first, second), strict=True):
            parts.append(LocalExtent(s, None if m is turn else m.mT))
            whole.append(s[:, None, None] * m)
        for extent, m in (
            (together(parts), whole[0] + whole[1]),
            (stacked(parts, [5, 5], True), torch.cat(whole, 1)),
        ):
            gap = extent.scale.square()[:, None, None] * (extent.root.mT @ extent.root) - m @ m.mT
            least = torch.linalg.eigvalsh(gap)[:, 0]
            assert (least >= -1e-12 * extent.radius().square()).all()
            assert (extent.radius() >= torch.linalg.matrix_norm(m, 2) * (1 - 1e-12)).all()
        if first is second:  # which lie in one direction, as shares suppose
            exact = torch.linalg.matrix_norm(whole[0] + whole[1], 2)
            torch.testing.assert_close(together(parts).radius(), exact)
        found = stacked(parts, [5, 5], False).radius()
        radii = torch.stack([part.radius() for part in parts])
        torch.testing.assert_close(found, radii.norm(dim=0))
    balls = [LocalExtent(s) for s in scales]
    torch.testing.assert_close(together(balls).radius(), scales.sum(0))
    torch.testing.assert_close(stacked(balls, [5, 5], True).radius(), scales.norm(dim=0))


def test_norms_say_what_is_claimed():
    net = mlp(5, 8, 7, 3)
    graph, x = lc.trace(net, (5,)), torch.randn(4, 5)

    def norm(n):
        return Constant(affine_norm(n.op, lc.Exact()).value, Kind.PROBABILISTIC, 0.25)

    local = around(graph, x, 0.5, largest=7, norm=norm)
    margins = margins_of(local)
    assert (margins.kind, margins.failure) == (Kind.PROBABILISTIC, 0.25)
    assert local.constants(graph.output, True).failure == 0.25
    assert margins_of(around(graph, x, 0.5)).failure == 0


def test_weights_that_are_nan_or_far_too_large_prove_nothing():
    for value in (math.nan, math.inf, 1e300):
        net = mlp(5, 8, 7, 3)
        graph, x = lc.trace(net, (5,)), torch.randn(2, 5)
        net[2].weight.data[3, 4] = value
        found = around(graph, x, 0.5).constants(graph.output, True).value
        assert not (found < 1e290).any()


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("d", [0.0, 1e-14, 1e-11, 1e-8, 1e-4])
def test_what_cancels_keeps_its_digits(d, wide):
    """The two kinks of the net lie in the ball: the difference of the neurons is all that is read.

    The squares of entries that cancel have half of their digits.
    """
    for a, b in ((2.6, 1.7), (1.0, 1.0), (0.3, 7.1)):
        net = almost_equal_neurons(a, b, d, wide)
        bound = lc.Ellipsoid(lc.trace(net, (1,)), region=lc.L2Ball(1.5 / a))
        kink = torch.tensor([[-1 / a]])  # from here on the first neuron moves, the second does not
        with torch.no_grad():
            found = float(bound(kink).row(torch.tensor([0]))[0, 1])
            whole = float(bound.lipschitz(torch.zeros(1, 1)).value)
        assert found >= 2 * a * b * (1 - 1e-12)
        assert whole >= 2**0.5 * a * b * (1 - 1e-12)


def test_zero_weights_give_zero():
    for at in (0, 2, 4):
        net = mlp(5, 8, 7, 3)
        graph, x = lc.trace(net, (5,)), torch.randn(2, 5)
        net[at].weight.data.zero_()
        for anchored in (True, False):
            local = around(graph, x, 0.5)
            assert (local.constants(graph.output, anchored).value == 0).all()
            assert (margins_of(local, anchored).row(torch.zeros(2, dtype=torch.long)) == 0).all()
