"""Activations that sort: which channels meet, what they keep, which inputs an output needs."""

import copy
import math
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.layers import ClippedMaxMin, GroupSort, Householder, Householder2, MaxMin
from oracles import best_quotients, jacobians

GOLDEN = np.load(Path(__file__).parent / "golden" / "cll_layers_orthogonal.npz")  # says whence
SORTS = {
    "halves": MaxMin,
    "neighbours": lambda: MaxMin(adjacent=True),
    "pairs": lambda: GroupSort(2),
    "triples": lambda: GroupSort(3),
    "all": lambda: GroupSort(6),
}
each_sort = pytest.mark.parametrize("make", SORTS.values(), ids=SORTS)


def test_reference_values_of_neighbours():
    x, out = (torch.from_numpy(GOLDEN[f"maxmin/{k}"]) for k in ("x", "out"))
    assert torch.equal(MaxMin(adjacent=True)(x), out)
    assert not torch.equal(MaxMin()(x), out)


def test_which_channels_are_paired():
    x = torch.tensor([[1.0, 5.0, 4.0, 2.0]])
    assert MaxMin()(x).tolist() == [[4, 5, 1, 2]]
    assert MaxMin(adjacent=True)(x).tolist() == [[5, 4, 1, 2]]
    assert GroupSort(2)(x).tolist() == [[1, 5, 2, 4]]
    assert GroupSort(4)(x).tolist() == [[1, 2, 4, 5]]
    assert torch.equal(GroupSort(1)(x), x)


@pytest.mark.parametrize("rest", [(), (3,), (2, 2)])
def test_every_position_is_sorted_by_itself(rest):
    x = torch.randn(2, 6, *rest)
    for make in SORTS.values():
        y = make()(x)
        single = make()(x.movedim(1, -1).reshape(-1, 6))
        assert torch.equal(y.movedim(1, -1).reshape(-1, 6), single)
    triples = GroupSort(3)(x).unflatten(1, (2, 3))
    assert (triples.diff(dim=2) >= 0).all()


@each_sort
def test_jacobians_are_permutations(make):
    slopes = jacobians(make(), torch.randn(20, 6))
    assert torch.equal(slopes.sum(1), torch.ones(20, 6))
    assert torch.equal(slopes.square().sum(2), torch.ones(20, 6))


@each_sort
def test_an_output_needs_just_the_inputs_that_can_reach_it(make):
    op = lc.trace(make(), (6, 2)).output.op
    slopes = jacobians(op.fn, torch.randn(300, 6, 2)).abs().amax(0) > 0
    for output in range(12):
        outputs = torch.zeros(12)
        outputs[output] = 1
        needed = op.needs(outputs.reshape(1, 6, 2)).flatten()
        assert torch.equal(needed > 0, slopes[output])


@each_sort
def test_nets_are_bounded_locally_by_what_matters(make):
    net = nn.Sequential(nn.Linear(4, 6), make(), nn.ReLU(), nn.Linear(6, 3)).eval()
    graph = lc.trace(net, (4,))
    x = torch.randn(20, 4)
    constants = lc.Product(graph, region=lc.L2Ball(0.2))(x).dense()
    assert (constants < lc.Product(graph)().dense() - 1e-3).any()
    rows = jacobians(net, x + 0.2 * torch.nn.functional.normalize(torch.randn(20, 4)))
    differences = (rows[:, :, None] - rows[:, None]).norm(dim=3)
    assert (constants >= differences - 1e-9).all()
    assert float(lc.lipschitz(make(), (6,))) == 1


def test_clipped_pairs_are_still_halves():
    x = torch.tensor([[1.0, 5.0, 4.0, 2.0]])
    assert ClippedMaxMin(10.0, -10.0)(x).tolist() == [[4, 5, 1, 2]]


def test_a_bound_notices_when_other_channels_are_paired():
    net = nn.Sequential(nn.Linear(4, 6), MaxMin(), nn.Linear(6, 2))
    bound = lc.Product(lc.trace(net, (4,)))
    net[1].adjacent = True
    with pytest.raises(lc.LipcertError, match="changed after it was traced, at: 1"):
        lc.certify(net, torch.randn(2, 4), bound=bound)


def test_channels_that_make_no_groups_are_refused():
    with pytest.raises(lc.LipcertError, match="an odd number of them"):
        MaxMin(adjacent=True)(torch.zeros(2, 5))
    with pytest.raises(lc.LipcertError, match="has 5 of them, no multiple"):
        GroupSort(3)(torch.zeros(2, 5))
    with pytest.raises(lc.LipcertError, match="positive size"):
        GroupSort(0)


# ---------------------------------------------------------------- Householder, order 2


def one_pair(angles):
    module = Householder2(2)
    module.angles.data = torch.tensor(angles)[:, None]
    return module


def by_complex_numbers(z, s, t, u):
    """The definition for one number z = a + i b."""
    place = (math.atan2(z.imag, z.real) - s / 2) % (2 * math.pi)
    unit = lambda angle: complex(math.cos(angle), math.sin(angle))  # noqa: E731
    if place < t / 2:
        return z
    if place < (t + u) / 2:
        return unit(s + t) * z.conjugate()
    return unit(-u) * z if place < math.pi + u / 2 else unit(s) * z.conjugate()


ANGLES = [(0.3, 1.1, 2.0), (2.5, 0.4, 0.0), (0.0, 3.0, 5.5), (6.0, 2 * math.pi, 1.0), (1.0, 0.0, 3)]


@pytest.mark.parametrize("angles", ANGLES)
def test_four_sectors_are_mapped_as_defined_and_distances_never_grow(angles):
    module = one_pair(angles)
    x = torch.randn(400, 2)
    expected = [by_complex_numbers(complex(a, b), *angles) for a, b in x.tolist()]
    torch.testing.assert_close(module(x), torch.tensor([(z.real, z.imag) for z in expected]))
    slopes = jacobians(module, x)
    torch.testing.assert_close(slopes.mT @ slopes, torch.eye(2).expand_as(slopes))
    assert best_quotients(module, (2,)).norm(dim=1).max() <= 1 + 1e-9
    turn = torch.linspace(0, 2 * math.pi, 10001)  # it does not jump where sectors meet
    circle = module(torch.stack([turn.cos(), turn.sin()], 1))
    assert circle.diff(dim=0).norm(dim=1).max() <= 2 * math.pi / 10000 + 1e-12


@pytest.mark.parametrize("angle", [0.0, 0.7, 2.2, 6.0])
def test_without_the_third_angle_it_is_of_order_one(angle):
    first = Householder(2)
    first.angle.data = torch.tensor([angle])
    x = torch.randn(100, 2)
    torch.testing.assert_close(one_pair((angle, 1.3, 0.0))(x), first(x))


def test_angles_beyond_a_turn_count_as_its_ends():
    x = torch.randn(100, 2)
    torch.testing.assert_close(one_pair((-1.0, 9.0, 2.0))(x), one_pair((0.0, 2 * math.pi, 2.0))(x))


@pytest.mark.parametrize("angles", ANGLES)
def test_images_of_order_two_contain_and_are_right_at_infinity(angles):
    module = one_pair(angles)
    op = lc.trace(module, (2,)).output.op
    inf = math.inf
    lower = torch.tensor([[-inf, -1.0], [0.5, -inf], [1.0, 1.0], [-2.0, 0.0]])
    upper = torch.tensor([[2.0, 3.0], [inf, inf], [1.0, 1.0], [-1.0, 0.5]])
    bottom, top = op.image(lower, upper)
    assert not (bottom.isnan() | top.isnan()).any()
    low, high = lower.clamp(min=-1e3)[:, None], upper.clamp(max=1e3)[:, None]
    value = module((low + (high - low) * torch.rand(4, 500, 2)).flatten(0, 1)).reshape(4, 500, 2)
    assert (bottom[:, None] <= value + 1e-9).all()
    assert (value <= top[:, None] + 1e-9).all()


def test_order_two_has_gradients_and_compiles(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks cannot be compiled
    module = Householder2(6)
    x = torch.randn(2, 6, 3, requires_grad=True)
    angles = module.angles.detach().clone().requires_grad_()

    def forward(x, angles):
        return torch.func.functional_call(module, {"angles": angles}, (x,))

    assert torch.autograd.gradcheck(forward, (x, angles))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    module(torch.zeros(1, 6)).sum().backward()
    assert not module.angles.grad.any()
    for channels in (0, 3):
        with pytest.raises(lc.LipcertError, match=f"channels={channels} must be"):
            Householder2(channels)
    with pytest.raises(lc.LipcertError, match="made for 6 channels"):
        module(torch.zeros(2, 4))
