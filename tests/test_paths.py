"""Paths, the joint norm and LipLT on them, against dense matrices made in slow, plain ways."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.bounds.joint import joint_norm
from lipcert.bounds.paths import Paths, is_source, rows_at_sources
from lipcert.bounds.slopes import everywhere
from lipcert.graph import Affine, Concat, Input, Lipschitz, Node, Slope
from lipcert.layers import MaxMin
from lipcert.linear_kinds import Dense
from nets import NETS, Net
from rule_cases import Fn


def norm(matrix):
    return torch.linalg.matrix_norm(matrix, 2)


def opaque_branches():
    """Branches that share no end, so that their ends come back in another order."""
    net = Fn(lambda s, x: s.last(torch.cat([s.sort(s.a(x)), s.sort(s.b(x))], 1)))
    net.a, net.b, net.last, net.sort = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(8, 3), MaxMin()
    return net


GRAPHS = NETS | {"opaque branches": Net(opaque_branches, (4,))}


@pytest.fixture(params=GRAPHS)
def graph(request):
    net = GRAPHS[request.param]
    return lc.trace(net.build(), net.shape)


@pytest.fixture
def paths(graph):
    return Paths(graph, ends(graph))


def matrices(graph, end):
    """The matrix from each source of one node: the derivative of the network's linear part."""
    changes = {n: torch.zeros(n.shape, requires_grad=True) for n in graph if is_source(n)}
    values = {}
    for n in graph:
        inputs = [values[i] for i in n.inputs]
        if isinstance(n.op, Input | Lipschitz):
            values[n] = changes[n]
        elif isinstance(n.op, Affine):
            values[n] = n.op.map().apply(inputs[0][None])[0]
        elif isinstance(n.op, Slope):
            low, high = everywhere(n)
            values[n] = (low + high) / 2 * inputs[0] + (high - low) / 2 * changes[n]
        elif isinstance(n.op, Concat):
            values[n] = torch.cat([i.flatten() for i in inputs])
        else:
            values[n] = sum(inputs)
    rows = [
        torch.autograd.grad(v, changes.values(), retain_graph=True, allow_unused=True)
        for v in values[end].flatten()
    ]
    columns = zip(changes, zip(*rows, strict=True), strict=True)
    return {n: torch.stack([r.flatten() for r in c]) for n, c in columns if c[0] is not None}


def ends(graph):
    """The inputs of what changes spread through, and the output."""
    found = {n.inputs[0] for n in graph if isinstance(n.op, Slope | Lipschitz)}
    return [n for n in graph if n in found | {graph.output}]


def recursion(graph, norms):
    """What reaches each end, with `norms(end, source, matrix)`."""
    reached = {}
    for end in ends(graph):
        total = 0.0
        for s, matrix in matrices(graph, end).items():
            radius = 1.0 if isinstance(s.op, Input) else reached[s.inputs[0]]
            if isinstance(s.op, Lipschitz):
                radius = radius * s.op.constant()
            total = total + norms(end, s, matrix) * radius
        reached[end] = total
    return reached


# ---------------------------------------------------------------- moving vectors


def started(paths):
    """Random vectors for each source."""
    return {s: torch.randn(len(paths.ends_after[s]), *s.shape) for s in paths.starts()}


def test_maps_are_the_derivatives(graph, paths):
    for end, maps in paths.maps(paths.steps()).items():
        expected = matrices(graph, end)
        assert list(maps) == list(paths.sources[end]) == list(expected)
        for s, map in maps.items():
            assert (map.in_shape, map.out_shape) == (s.shape, end.shape)
            torch.testing.assert_close(map.dense(), expected[s])


def test_vectors_move_along_every_map_at_once(paths):
    steps, vectors = paths.steps(torch.empty(0)), started(paths)
    images = paths.push(steps, vectors)
    maps = paths.maps(paths.steps())
    assert list(images) == list(maps) == list(paths.ends)
    for end in paths.ends:
        assert images[end].shape == (len(maps[end]), *end.shape)
        for s, image in zip(paths.sources[end], images[end], strict=True):
            v = vectors[s][paths.ends_after[s].index(end)]
            torch.testing.assert_close(image, maps[end][s].apply(v[None])[0])


def test_and_back_by_the_adjoints(paths):
    steps, vectors = paths.steps(torch.empty(0)), started(paths)
    images = paths.push(steps, vectors)
    targets = {end: torch.randn_like(image) for end, image in images.items()}
    back = paths.pull(steps, targets)
    assert {s: v.shape for s, v in back.items()} == {s: v.shape for s, v in vectors.items()}
    for end in paths.ends:
        for place, s in enumerate(paths.sources[end]):
            row = paths.ends_after[s].index(end)
            there = (images[end][place] * targets[end][place]).sum()
            torch.testing.assert_close((vectors[s][row] * back[s][row]).sum(), there)


def test_rows_go_back_to_the_sources_of_one_node(graph):
    paths = Paths(graph, [graph.output])
    found = rows_at_sources(graph, graph.output, torch.eye(3), paths.steps(torch.empty(0)))
    expected = matrices(graph, graph.output)
    assert found.keys() == expected.keys()
    for s, rows in found.items():
        torch.testing.assert_close(rows.flatten(1), expected[s])


# ---------------------------------------------------------------- LipLT by hand


def test_liplt_is_its_recursion_on_dense_matrices(graph):
    expected = recursion(graph, lambda end, s, matrix: norm(matrix))
    bound = lc.LipLT(graph, lc.Exact())
    found = bound.prefixes()
    assert list(found) == list(expected)
    for end, constant in found.items():
        torch.testing.assert_close(constant.value, expected[end], rtol=1e-10, atol=1e-12)
    last = matrices(graph, graph.output)
    radii = {s: 1.0 if isinstance(s.op, Input) else expected[s.inputs[0]] for s in last}
    radii |= {s: r * s.op.constant() for s, r in radii.items() if isinstance(s.op, Lipschitz)}
    pairs = sum((m[:, None] - m).norm(dim=2) * radii[s] for s, m in last.items())
    single = sum(m.norm(dim=1) * radii[s] for s, m in last.items())
    torch.testing.assert_close(bound().dense()[0], pairs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bound.per_output().value, single, rtol=1e-10, atol=1e-12)


def test_power_iteration_moves_each_map_alone(graph):
    bound = lc.LipLT(graph, lc.PowerIteration(3))
    state, nodes, better = bound.state_dict(), list(graph), {}

    def iterated(end, s, matrix):
        after = [e for e in ends(graph) if s in matrices(graph, e)]
        key = f"vectors_{nodes.index(s)}"
        assert state[key].shape == (len(after), 1, *s.shape)
        v = state[key][after.index(end)].flatten()
        torch.testing.assert_close(v.norm(), torch.ones(()))
        for _ in range(3):
            w = matrix.T @ (matrix @ v)
            v = w / w.norm() if w.norm() > 0 else v
        better.setdefault(key, []).append(v)
        return (matrix @ v).norm()

    expected = recursion(graph, iterated)
    for end, constant in bound.prefixes().items():
        torch.testing.assert_close(constant.value, expected[end], rtol=1e-9, atol=1e-12)
        assert constant.kind is lc.Kind.ESTIMATE
    assert bound.state_dict().keys() == better.keys()
    for key, rows in bound.state_dict().items():
        torch.testing.assert_close(rows.flatten(1), torch.stack(better[key]), rtol=0, atol=1e-9)


def diagonals(low, high):
    return torch.diag(high + low) / 2, torch.diag(high - low) / 2


def test_feed_forward_with_slopes_of_single_neurons():
    """m_k = |W_k C_k ... C_1 W_0| + sum_j |W_k C_k ... C_j+1 W_j D_j| m_j-1."""
    widths = (5, 7, 6, 8, 3)
    layers = [nn.Linear(i, o) for i, o in pairwise(widths)]
    slopes = [nn.PReLU(n) for n in widths[1:-1]]
    for activation in slopes:
        nn.init.uniform_(activation.weight, -2, 2)
    W = [layer.weight.detach() for layer in layers]
    halves = [None]
    for activation in slopes:
        a = activation.weight.detach()
        halves.append(diagonals(a.clamp(max=1), a.clamp(min=1)))
    m = []
    for k in range(len(W)):
        product, total = W[k], 0.0
        for j in range(k, 0, -1):
            C, D = halves[j]
            total = total + norm(product @ D) * m[j - 1]
            product = product @ C @ W[j - 1]
        m.append(norm(product) + total)
    modules = [x for pair in zip(layers, slopes, strict=False) for x in pair]
    bound = lc.LipLT(lc.trace(nn.Sequential(*modules, layers[-1]), (5,)), lc.Exact())
    found = torch.stack([c.value for c in bound.prefixes().values()])
    torch.testing.assert_close(found, torch.stack(m), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("a", "activation"), [(0.0, nn.ReLU()), (-0.5, nn.LeakyReLU(-0.5))])
def test_residual_blocks(a, activation):
    """n_k = |W_k H_k-1 ... H_0| + d sum_j |W_k H_k-1 ... H_j+1 G_j| n_j, H_j = I + c G_j W_j."""
    width, hidden, depth, c, d = 5, 7, 3, (1 + a) / 2, (1 - a) / 2

    def forward(s, x):
        for j in range(depth):
            x = x + s.G[j](s.activation(s.W[j](x)))
        return s.W[depth](x)

    net = Fn(forward)
    net.activation = activation
    net.W = nn.ModuleList([nn.Linear(width, hidden) for _ in range(depth)])
    net.W.append(nn.Linear(width, 4))
    net.G = nn.ModuleList(nn.Linear(hidden, width) for _ in range(depth))
    W, G = ([layer.weight.detach() for layer in layers] for layers in (net.W, net.G))
    n = []
    for k in range(depth + 1):
        product, total = W[k], 0.0
        for j in range(k - 1, -1, -1):
            total = total + d * norm(product @ G[j]) * n[j]
            product = product @ (torch.eye(width) + c * G[j] @ W[j])
        n.append(norm(product) + total)
    bound = lc.LipLT(lc.trace(net, (width,)), lc.Exact())
    found = torch.stack([constant.value for constant in bound.prefixes().values()])
    torch.testing.assert_close(found, torch.stack(n), rtol=1e-12, atol=0)


# ---------------------------------------------------------------- the joint norm


@pytest.mark.parametrize("sizes", [(4, 6, 5), (3, 8), (7, 2, 2, 9)])
@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_the_joint_norm_is_nearly_the_best_of_its_kind(sizes, spread):
    A = [torch.randn(5, n) * spread ** torch.randn(()) for n in sizes]
    A[0] = A[0] * torch.tensor([3.0, 1.0, 0.1, 0.1, 0.1])[:, None]  # far from a common direction
    r = torch.rand(len(A)) + 0.3

    def value(theta):
        return norm(torch.cat([a * s / t.sqrt() for a, s, t in zip(A, r, theta, strict=True)], 1))

    sources = [Node(Input(), (), (n,)) for n in sizes]
    maps = {s: Dense((a.shape[1],), (5,), a) for s, a in zip(sources, A, strict=True)}
    radii = dict(zip(sources, r, strict=True))
    norms = {s: lc.Exact()(map) for s, map in maps.items()}
    found = float(joint_norm(maps, radii, norms, lc.Exact()).value)

    best = min(
        float(value(torch.distributions.Dirichlet(torch.full((len(A),), shape)).sample()))
        for shape in (1.0, 3.0)
        for _ in range(200)
    )
    logits = torch.stack([norm(a) * s for a, s in zip(A, r, strict=True)]).log().requires_grad_()
    optimiser = torch.optim.Adam([logits], 0.05)
    for _ in range(150):
        optimiser.zero_grad()
        loss = value(logits.softmax(0))
        loss.backward()
        optimiser.step()
        best = min(best, loss.item())
    reached = 0.0  # |sum A_s t_s| for the best t_s found with |t_s| = r_s
    for _ in range(20):
        u = torch.randn(5)
        for _ in range(50):
            t = [s * a.T @ u / (a.T @ u).norm() for a, s in zip(A, r, strict=True)]
            u = sum(a @ b for a, b in zip(A, t, strict=True))
        reached = max(reached, float(u.norm()))
    total = sum(float(norm(a) * s) for a, s in zip(A, r, strict=True))
    assert reached <= found * (1 + 1e-9)
    assert best <= found * (1 + 1e-3)
    assert found <= best * 1.01
    assert found <= total * (1 + 1e-9)
    assert reached < total * 0.99  # else the test says little
