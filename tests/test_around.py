"""What `Around` says of each node in a ball: boxes, slopes, weights, and which entries count."""

import math

import pytest
import torch
from torch import nn

import lipcert as lc
from balls import EVERY, built, points
from lipcert.bounds.around import Around, _Intersection
from lipcert.graph import Affine, Concat, Lipschitz, Slope, Sum
from lipcert.layers import ClippedMaxMin, ClippedReLU, MaxMin
from lipcert.linear_kinds import Index
from lipcert.row_norms import row_norms

FEW = ["conv", "densenet", "branches", "clipped pairs", "residual"]
nets = pytest.mark.parametrize("name", FEW)
progressive = pytest.mark.parametrize("progressive", [True, False], ids=["progressive", "plain"])


def around(graph, x, eps, *, product=True, **more):
    """The facts of a ball as a local bound asks for them."""
    kind = lc.Product if product else lc.LipLT
    bound = kind(graph, norm=lc.Exact(), region=lc.L2Ball(1.0, **more))
    return bound._around(x, torch.as_tensor(eps).expand(len(x)))


def by_reach(graph, x, eps, reach, clip=None, progressive=True):
    """The same from a reach of one's own."""
    ball = lc.L2Ball(eps, clip, progressive)
    radii = torch.full((len(x),), eps)
    return Around(graph, x, ball, radii, lambda n: torch.as_tensor(float(reach)))


def traced(name, seed=0):
    return lc.trace(built(name, seed, trained=True), EVERY[name].shape)


def extremes(graph, n, x, eps, steps=12):
    """Points of the balls that climb to the ends of entries of a node, one entry and side a row."""
    size = math.prod(n.shape)
    chosen = torch.arange(0, size, max(1, size // 12))
    start = x[:, None, None].flatten(3)
    d = 1e-3 * eps * torch.randn(len(x), len(chosen), 2, start.shape[3])
    sign = torch.tensor([1.0, -1.0])
    for _ in range(steps):
        d.requires_grad_()
        values = graph.values((start + d).reshape(-1, *x.shape[1:]))[n].reshape(*d.shape[:3], -1)
        aim = values.gather(3, chosen[:, None, None].expand(len(x), -1, 2, 1))[..., 0] * sign
        (slope,) = torch.autograd.grad(aim.sum(), d)
        length = slope.norm(dim=3, keepdim=True)
        d = (d + 0.5 * eps * slope / length.where(length > 0, 1)).detach()
        d = d * (eps / d.norm(dim=3, keepdim=True).clamp(min=1e-300)).clamp(max=1)
    return (start + d).reshape(len(x), -1, *x.shape[1:])


def values(graph, found):
    """Of every node at points `(b, p, *shape)`: `(b, p, *shape of the node)`."""
    b, p = found.shape[:2]
    with torch.no_grad():
        return {n: v.unflatten(0, (b, p)) for n, v in graph.values(found.flatten(0, 1)).items()}


def assert_inside(box, v, rtol=1e-10):
    slack = rtol * (1 + v.abs().max())
    assert (box[0][:, None] <= v + slack).all()
    assert (box[1][:, None] >= v - slack).all()


# ---------------------------------------------------------------- boxes


@progressive
@nets
def test_the_ends_of_single_entries_stay_in_the_boxes(name, progressive):
    graph, eps = traced(name), 0.3
    x = torch.randn(2, *graph.input_shape)
    for product in (True, False):
        ball = around(graph, x, eps, product=product, progressive=progressive).around
        for n in list(graph)[1::3]:
            found = values(graph, extremes(graph, n, x, eps, steps=6))
            for m in graph:
                assert_inside(ball.box(m), found[m])


def test_climbing_finds_the_ends_of_boxes_of_a_first_layer():
    """So that the test above is one: there boxes are exact."""
    graph = traced("mlp")
    x = torch.randn(2, 6)
    first = next(n for n in graph if isinstance(n.op, Affine))
    lower, upper = around(graph, x, 0.3).around.box(first)
    found = values(graph, extremes(graph, first, x, 0.3))[first]
    torch.testing.assert_close(found.amin(1), lower.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.amax(1), upper.detach(), rtol=1e-3, atol=1e-3)
    row = graph.model[0].weight.norm(dim=1).detach()
    torch.testing.assert_close((upper - lower).detach(), 0.6 * row.expand(2, -1))


def test_boxes_of_a_first_layer_by_hand():
    """Of the ball alone; with clipping also of the box, which is the narrower one in a corner."""
    net = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2))
    net[0].weight.data, net[0].bias.data = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0])
    graph = lc.trace(net, (2,))
    first = graph.nodes[1]
    x = torch.zeros(1, 2)
    for clip, low, high in (
        (None, -5, 5),
        ((-9.0, 9.0), -5, 5),  # the cube |x_i| <= 1 gives 7
        ((0.0, 9.0), 0, 5),
        ((-0.5, 0.5), -3.5, 3.5),
        ((0.0, 0.25), 0, 1.75),
    ):
        box = around(graph, x, 1.0, clip=clip).around.box(first)
        assert [end.item() for end in box] == pytest.approx([1 + low, 1 + high])
    # A reach of 2 for the input is a ball of twice the size; the cube stays as it is.
    wide = by_reach(graph, x, 1.0, 2.0, progressive=False).box(first)
    assert [end.item() for end in wide] == pytest.approx([1 - 7, 1 + 7])


@progressive
@nets
def test_boxes_are_the_narrower_of_two_sides(name, progressive):
    """Entry by entry from the box before, and row by row from what reaches the node before."""
    graph, eps = traced(name), 0.4
    x = torch.randn(2, *graph.input_shape)
    followed = around(graph, x, eps, progressive=progressive)
    ball, checked = followed.around, 0
    global_ = lc.Product(graph, norm=lc.Exact())
    for n in graph:
        if not isinstance(n.op, Affine) or isinstance(ball.map(n), Index):
            continue
        source, map = n.inputs[0], ball.map(n)
        bias = 0 if n.op.bias is None else n.op.bias()
        entrywise = [end + bias for end in map.interval(*ball.box(source))]
        reach = followed.reached(source) if progressive else global_.prefix(source)
        r = (reach.value * eps).expand(2).reshape(-1, *(1,) * len(n.shape)) * row_norms(map)
        rows = ball.centre(n) - r, ball.centre(n) + r
        lower, upper = ball.box(n)
        slack = 1e-12 * (1 + lower.abs().max())
        if progressive:
            assert (lower >= torch.maximum(rows[0], entrywise[0]) - slack).all()
            assert (upper <= torch.minimum(rows[1], entrywise[1]) + slack).all()
        else:
            assert (lower >= entrywise[0] - slack).all()
            assert (upper <= entrywise[1] + slack).all()
        assert (lower <= torch.maximum(rows[0], entrywise[0]) + slack).all()
        assert (upper >= torch.minimum(rows[1], entrywise[1]) - slack).all()
        assert (lower <= upper).all()
        checked += 1
    assert checked > 1


@nets
def test_other_nodes_have_the_images_of_the_boxes_before(name):
    """Sums add ends, concatenations stack them, activations map them; reshapes move them."""
    graph, eps = traced(name), 0.4
    x = torch.randn(2, *graph.input_shape)
    ball = around(graph, x, eps).around
    for n in graph:
        before = [ball.box(i) for i in n.inputs]
        match n.op:
            case Slope(image=image) | Lipschitz(image=image):
                expected = image(*before[0])
            case Sum():
                expected = [sum(box[side] for box in before) for side in (0, 1)]
            case Concat():
                expected = [torch.cat([b[side].flatten(1) for b in before], 1) for side in (0, 1)]
            case _:
                continue
        for end, other in zip(ball.box(n), expected, strict=True):
            torch.testing.assert_close(end, other)


def test_an_infinite_reach_leaves_the_entries_and_no_reach_the_point():
    graph = traced("mlp")
    x = torch.randn(2, 6)
    second = [n for n in graph if isinstance(n.op, Affine)][1]
    ball = by_reach(graph, x, 0.3, math.inf, progressive=False)
    entrywise = ball.map(second).interval(*ball.box(second.inputs[0]))
    for end, other in zip(ball.box(second), entrywise, strict=True):
        torch.testing.assert_close(end, other + second.op.bias())
    still = by_reach(graph, x, 0.3, 0.0)
    for end in still.box(second):
        torch.testing.assert_close(end, still.centre(second), rtol=1e-12, atol=1e-12)


@nets
def test_values_at_the_samples_are_those_of_the_network(name):
    graph = traced(name)
    x = torch.randn(3, *graph.input_shape)
    ball = around(graph, x, 0.1).around
    expected = graph.values(x)
    for n in graph:
        torch.testing.assert_close(ball.centre(n), expected[n])


def test_points_of_clipped_balls_stay_inside_and_the_input_box_is_exact():
    graph, eps = traced("conv"), 0.7
    x = torch.rand(2, *graph.input_shape)
    ball = around(graph, x, eps, clip=(0.0, 1.0)).around
    lower, upper = ball.box(graph.nodes[0])
    torch.testing.assert_close(lower, (x - eps).clamp(min=0))
    torch.testing.assert_close(upper, (x + eps).clamp(max=1))
    found = values(graph, points(graph.model, x, torch.full((2,), eps), 200, clip=(0.0, 1.0)))
    for n in graph:
        assert_inside(ball.box(n), found[n])


@nets
def test_a_radius_for_each_sample(name):
    graph = traced(name)
    x, eps = torch.randn(3, *graph.input_shape), torch.tensor([1e-3, 0.2, 1.5])
    ball = around(graph, x, eps).around
    for i in range(3):
        one = around(graph, x[i : i + 1], eps[i]).around
        for n in graph:
            for end, alone in zip(ball.box(n), one.box(n), strict=True):
                torch.testing.assert_close(end[i], alone[0], rtol=1e-9, atol=1e-12)
            w, single = ball.weights(n), one.weights(n)
            assert (w is None) == (single is None)
            if w is not None:
                torch.testing.assert_close(w[i], single[0], rtol=1e-9, atol=1e-12)
            if isinstance(n.op, Slope):
                torch.testing.assert_close(ball.gain(n)[i], one.gain(n)[0])


@pytest.mark.parametrize("name", ["branches", "residual"])
def test_boxes_and_slopes_grow_with_the_radius(name):
    graph = traced(name)
    x = torch.randn(2, *graph.input_shape)
    for progressive in (True, False):
        inner = None
        for eps in (1e-4, 0.1, 2.0):
            ball = around(graph, x, eps, progressive=progressive).around
            if inner is not None:
                for n in graph:
                    (low, up), (near_low, near_up) = ball.box(n), inner.box(n)
                    slack = 1e-12 * (1 + near_low.abs())
                    assert (low <= near_low + slack).all()
                    assert (up >= near_up - slack).all()
                    if isinstance(n.op, Slope):
                        (low, up), (near_low, near_up) = ball.slopes(n), inner.slopes(n)
                        assert (low <= near_low + 1e-9).all()
                        assert (up >= near_up - 1e-9).all()
                        assert (ball.gain(n) >= inner.gain(n) - 1e-9).all()
            inner = ball


# ---------------------------------------------------------------- weights and needs


def net_of(*activations):
    torch.manual_seed(2)
    layers = [nn.Linear(5, 8), activations[0], nn.Linear(8, 8), *activations[1:], nn.Linear(8, 3)]
    net = nn.Sequential(*layers)
    net(torch.zeros(1, 5))
    return net


ACTIVATIONS = {
    "relu": lambda: (nn.ReLU(), nn.ReLU()),
    "clipped": lambda: (ClippedReLU(0.4), ClippedReLU(0.1)),
    "clipped pairs": lambda: (ClippedMaxMin(0.2, -0.2), ClippedMaxMin(0.1, -0.1)),
    "leaky": lambda: (nn.LeakyReLU(-0.5), nn.Hardtanh(-0.1, 0.2)),
    "one after the other": lambda: (nn.ReLU(), nn.Hardtanh(-0.3, 0.3), nn.ReLU()),
    "pairs of clipped": lambda: (nn.ReLU(), nn.Hardtanh(-0.3, 0.3), MaxMin(), nn.ReLU()),
    "steep": lambda: (nn.PReLU(8), nn.Softplus()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_entries_called_constant_do_not_change(name):
    net = net_of(*ACTIVATIONS[name]())
    for p in net.modules():
        if isinstance(p, nn.PReLU):
            nn.init.uniform_(p.weight, -3, 0.5)
    graph, eps = lc.trace(net, (5,)), 0.25
    x = torch.randn(6, 5)
    ball = around(graph, x, eps).around
    found = values(graph, points(net, x, torch.full((6,), eps), 200))
    constant = 0
    for n in graph:
        w = ball.weights(n)
        if w is None:
            continue
        assert w.shape == (6, *n.shape)
        assert ((w >= 0) & (w <= 1)).all()
        change = (found[n] - ball.centre(n)[:, None]).abs().amax(1)
        assert (change[w == 0] <= 1e-12).all()
        constant += int((w == 0).sum())
        if isinstance(n.op, Slope):
            # Changes are at most weight times gain times those of the input.
            source = n.inputs[0]
            before = (found[source] - ball.centre(source)[:, None]).abs()
            after = (found[n] - ball.centre(n)[:, None]).abs()
            own = w / (1 if ball.weights(source) is None else ball.weights(source))
            most = (own.nan_to_num(1) * ball.gain(n)[:, None])[:, None] * before
            assert (after <= most + 1e-12).all()
    assert constant > 0 or name == "steep"


def test_gains_and_weights_by_hand():
    """Slopes in [-2, -2], [0, 1], [0, 0] and [-2, 1] in units of the steepest."""
    net = nn.Sequential(nn.PReLU(4), nn.Linear(4, 2))
    net[0].weight.data = torch.tensor([-2.0, 0.0, 0.0, -2.0])
    graph = lc.trace(net, (4,))
    x = torch.tensor([[-5.0, 0.1, -5.0, 0.1], [5.0, 5.0, 5.0, 5.0], [-5.0, -5.0, -5.0, 5.0]])
    slope = graph.nodes[1]
    followed = around(graph, x, 0.5)
    ball = followed.around
    assert ball.gain(slope).tolist() == followed.reached(slope).value.tolist() == [2, 1, 2]
    assert ball.weights(slope).tolist() == [[1, 0.5, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0.5]]
    flat = nn.Sequential(nn.ReLU(), nn.Linear(4, 2))
    graph = lc.trace(flat, (4,))
    ball = around(graph, -5 * torch.ones(1, 4), 0.5).around
    assert ball.gain(graph.nodes[1]).tolist() == [0]  # and no division by it
    assert ball.weights(graph.nodes[1]).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_entries_not_needed_do_not_change_the_output(name):
    """Moved to anywhere in their box, they leave everything that can be seen as it is."""
    net = net_of(*ACTIVATIONS[name]())
    graph, eps = lc.trace(net, (5,)), 0.25
    x = torch.randn(6, 5)
    ball = around(graph, x, eps).around
    left_out = 0
    for n in graph:
        needed = ball.needed(n)
        if needed is None:
            continue
        assert set(needed.unique().tolist()) <= {0.0, 1.0}
        lower, upper = ball.box(n)
        for share in (0.0, 0.3, 1.0):
            moved = (lower + share * (upper - lower)).where(needed == 0, ball.centre(n))
            torch.testing.assert_close(after(graph, n, moved), net(x), rtol=1e-12, atol=1e-12)
        left_out += int((needed == 0).sum())
    assert left_out > 0 or name == "steep"


def after(graph, place, value):
    """The output of a chain of nodes with the value of one of them set."""
    found = {place: value}
    for n in graph.nodes[graph.nodes.index(place) + 1 :]:
        (source,) = n.inputs
        match n.op:
            case Affine(map=map, bias=bias):
                found[n] = map().apply(found[source]) + (0 if bias is None else bias())
            case Slope(fn=fn) | Lipschitz(fn=fn):
                found[n] = fn(found[source])
    return found[graph.output]


def test_pairs_are_needed_while_one_of_the_two_is():
    """Maxima above and minima below their thresholds are constant; a pair counts if one is not."""
    net = nn.Sequential(ClippedMaxMin(1.0, -1.0), nn.Linear(4, 2))
    net(torch.zeros(1, 4))
    graph = lc.trace(net, (4,))
    sort, clip = graph.nodes[1], graph.nodes[2]
    assert isinstance(sort.op, Lipschitz)
    # Pairs (x0, x2) and (x1, x3).
    x = torch.tensor([[5.0, 5.0, -5.0, 0.0], [0.0, 5.0, 0.5, 4.0], [5.0, -5.0, -5.0, 5.0]])
    ball = around(graph, x, 0.1).around
    assert ball.weights(clip).tolist() == [[0, 0, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0]]
    assert ball.needed(sort).tolist() == [[0, 0, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0]]
    assert ball.needed(graph.nodes[0]).tolist() == [[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert ball.needed(graph.output) is None or ball.needed(graph.output).all()


class Forked(nn.Module):
    """One activation is read by two; a sum and a concatenation follow."""

    def __init__(self):
        super().__init__()
        self.first, self.heads = nn.Linear(4, 6), nn.Linear(12, 3)
        self.low, self.high = nn.Hardtanh(-0.2, 0.0), nn.Hardtanh(0.0, 0.2)
        self.plain = nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x)
        low, high = self.low(x), self.high(x)
        both = low + high
        return self.heads(torch.cat([both, self.plain(high)], 1))


def test_what_two_need_is_needed_by_either():
    torch.manual_seed(1)
    net = Forked()
    graph, x, eps = lc.trace(net, (4,)), torch.randn(20, 4), 0.05
    ball = around(graph, x, eps).around
    low, high = (graph.node(name) for name in ("low", "high"))
    first = low.inputs[0]
    either = (ball.weights(low) > 0) | (ball.weights(high) > 0)
    assert torch.equal(ball.needed(first) > 0, either)
    assert either.any()
    assert (~either).any()
    assert ((ball.weights(low) > 0) != (ball.weights(high) > 0)).any()
    total = next(n for n in graph if isinstance(n.op, Sum))
    assert torch.equal(ball.weights(total) > 0, either)
    assert (ball.weights(total) >= ball.weights(low)).all()
    joined = next(n for n in graph if isinstance(n.op, Concat))
    w = ball.weights(joined)
    assert torch.equal(w[:, :6], ball.weights(total))
    assert (w[:, 6:] == 1).all()  # after an affine map nothing is known to be constant
    found = values(graph, points(net, x, torch.full((20,), eps), 100))
    for n in graph:
        if (w := ball.weights(n)) is not None:
            change = (found[n] - ball.centre(n)[:, None]).abs().amax(1)
            assert (change[w == 0] <= 1e-12).all()


class Kept(nn.Module):
    """What an activation holds still moves past it."""

    def __init__(self):
        super().__init__()
        self.first, self.low, self.last = nn.Linear(4, 4), nn.Hardtanh(-0.1, 0.1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.relu(x + self.low(x)))


def test_a_sum_with_what_moves_anywhere_is_nowhere_constant():
    graph = lc.trace(Kept(), (4,))
    ball = around(graph, 5 * torch.randn(8, 4), 0.01).around
    total = next(n for n in graph if isinstance(n.op, Sum))
    assert (ball.weights(graph.node("low")) == 0).any()
    assert ball.weights(total) is None


def test_slopes_hold_between_any_two_points():
    for name in ("mlp", "branches", "residual", "own conv"):
        graph, eps = traced(name), 0.3
        x = torch.randn(2, *graph.input_shape)
        ball = around(graph, x, eps).around
        found = values(graph, points(graph.model, x, torch.full((2,), eps), 200))
        for n in graph:
            if isinstance(n.op, Slope):
                low, high = (s.expand(2, *n.shape)[:, None] for s in ball.slopes(n))
                z, y = found[n.inputs[0]], found[n]
                run, rise = z - z.roll(1, 1), y - y.roll(1, 1)
                ends = torch.stack([low * run, high * run])
                assert (rise >= ends.amin(0) - 1e-10).all()
                assert (rise <= ends.amax(0) + 1e-10).all()
                steepest = torch.maximum(low.abs(), high.abs()).flatten(1).amax(1)
                torch.testing.assert_close(ball.gain(n), steepest)


# ---------------------------------------------------------------- gradients


@progressive
@nets
def test_gradients_of_boxes_are_finite_and_those_of_differences(name, progressive):
    graph = traced(name)
    x = torch.randn(2, *graph.input_shape)
    parameters = [p for p in graph.model.parameters() if p.requires_grad]
    torch.manual_seed(8)
    direction = [torch.randn_like(p) for p in parameters]

    def total():
        ball = around(graph, x, 0.2, progressive=progressive).around
        boxes = [ball.box(n) for n in graph.nodes[1:]]
        return sum(up.tanh().sum() - 0.3 * low.tanh().sum() for low, up in boxes)

    slopes = torch.autograd.grad(total(), parameters, allow_unused=True)
    assert all(s is None or s.isfinite().all() for s in slopes)
    expected = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True) if s is not None)
    found = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
            found.append(total())
        for p, d in zip(parameters, direction, strict=True):
            p += 1e-6 * d
    torch.testing.assert_close((found[0] - found[1]) / 2e-6, expected, rtol=1e-4, atol=1e-4)


def test_gradients_at_equal_ends_go_one_way():
    """Both sides give the same end: their shares add up to one, not to none or two."""
    for radius, centre in ((0.0, 1.0), (0.5, 1.0)):
        weight = torch.full((1, 1), 2.0, requires_grad=True)
        net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2))
        net[0].weight = nn.Parameter(weight.detach())
        graph = lc.trace(net, (1,))
        x = torch.full((1, 1), centre)
        lower, upper = around(graph, x, radius, progressive=False).around.box(graph.nodes[1])
        (down,) = torch.autograd.grad(lower.sum(), net[0].weight, retain_graph=True)
        (up,) = torch.autograd.grad(upper.sum(), net[0].weight)
        assert down.item() == pytest.approx(centre - radius)
        assert up.item() == pytest.approx(centre + radius)


# ---------------------------------------------------------------- what cannot be


def test_crossed_sides_keep_a_box():
    """Rounding may let the ends of two sides cross; both ends are the lower one then."""
    low_a, up_a = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])
    low_b, up_b = torch.tensor([0.5, -1.0]), torch.tensor([3.0, 0.9])
    lower, upper = _Intersection.apply(low_a, up_a, low_b, up_b)
    assert lower.tolist() == [0.5, 1.0]
    assert upper.tolist() == [1.0, 1.0]  # and not 0.9


def test_networks_with_nothing_to_narrow():
    """Purely affine, or sorting only: no slope, no weight, no need, and boxes as ever."""
    for net in (
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)),
        nn.Sequential(nn.Linear(6, 6), MaxMin(), nn.Linear(6, 4), MaxMin()),
    ):
        graph = lc.trace(net, (6,))
        x, eps = torch.randn(2, 6), 0.5
        followed = around(graph, x, eps)
        found = values(graph, points(net, x, torch.full((2,), eps), 100))
        for n in graph:
            assert followed.around.weights(n) is None
            assert followed.around.needed(n) is None
            assert_inside(followed.around.box(n), found[n])
        whole = lc.Product(graph, norm=lc.Exact()).lipschitz().value
        torch.testing.assert_close(followed.reached(graph.output).value, whole.expand(2))


def test_no_sample_and_one():
    for name in FEW:
        graph = traced(name)
        for count in (0, 1):
            followed = around(graph, torch.randn(count, *graph.input_shape), 0.1)
            ball = followed.around
            for n in graph:
                assert all(end.shape == (count, *n.shape) for end in ball.box(n))
                assert followed.reached(n).value.shape == (count,)
