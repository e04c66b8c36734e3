"""The best of several bounds: the least of each pair, claiming no more than its members."""

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.bounds import Bound, MarginConstants
from lipcert.bounds.tightest import least, tightest_pairs
from lipcert.kinds import Constant, Kind
from nets import NETS
from oracles import best_quotients, differences, jacobians
from test_api import jaxtyping_off


def traced(name="mlp", seed=0):
    return lc.trace(NETS[name].build(seed), NETS[name].shape)


def uneven():
    """x -> (x1, x2 where x2 < 0 and 0 elsewhere): every slope is 1 or 0, but not all at once.

    Neuron 1 keeps everything (slopes 1 and 1), neuron 2 cuts what is negative to 0 (0 and 1).
    LipLT splits both neurons about slopes of their own: 1 + 1/2; the product sees the largest: 1.
    """
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.PReLU(2), nn.Linear(2, 2, bias=False))
    for layer in (net[0], net[2]):
        layer.weight.data = torch.eye(2)
    net[1].weight.data = torch.tensor([1.0, 0.0])
    return lc.trace(net, (2,))


class Told(Bound):
    """A bound that says what it is told to."""

    def __init__(self, graph, K, kind=Kind.UPPER, failure=0.0):
        super().__init__(graph)
        self.K, self.said = torch.as_tensor(K), (kind, failure)

    def forward(self, x=None):
        return MarginConstants(lambda labels: self.K[labels], len(self.K), *self.said)

    def lipschitz(self):
        return Constant(self.K.max(), *self.said)

    def per_output(self):
        return Constant(self.K[0], *self.said)

    def prefix(self, upto):
        return Constant(self.K[0, 1], *self.said)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("name", ["mlp", "conv", "resnet", "densenet", "branches"])
def test_the_least_of_everything(name):
    graph = traced(name)
    members = lc.Product(graph), lc.LipLT(graph)
    best = lc.tightest(*members)
    K = torch.stack([member().dense() for member in members])
    assert torch.equal(best().dense(), K.amin(0))
    assert (best().kind, best().failure, best().classes) == (Kind.UPPER, 0, 3)
    for ask in (
        lambda bound: bound.lipschitz(),
        lambda bound: bound.per_output(),
        lambda bound: bound.prefix(graph.nodes[len(graph.nodes) // 2]),
    ):
        values = torch.stack([ask(member).value for member in members])
        assert torch.equal(ask(best).value, values.amin(0))
        assert ask(best).kind == Kind.UPPER


def test_neither_bound_is_always_the_better_one():
    graph = uneven()
    product, liplt = lc.Product(graph), lc.LipLT(graph)
    assert float(product.lipschitz()) == pytest.approx(1)
    assert float(liplt.lipschitz()) == pytest.approx(1.5)
    assert float(lc.tightest(liplt, product).lipschitz()) == pytest.approx(1)
    graph = traced()
    product, liplt = lc.Product(graph), lc.LipLT(graph)
    assert float(liplt.lipschitz()) < 0.9 * float(product.lipschitz())
    assert float(lc.tightest(product, liplt).lipschitz()) == float(liplt.lipschitz())


def test_pair_by_pair_from_different_members():
    graph = traced()
    first = torch.tensor([[0.0, 1.0, 5.0], [2.0, 0.0, 6.0], [3.0, 4.0, 0.0]])
    best = lc.tightest(Told(graph, first), Told(graph, first.mT))
    assert best().dense()[0].tolist() == [[0, 1, 3], [1, 0, 4], [3, 4, 0]]
    assert best().row(torch.tensor([2, 0])).tolist() == [[3, 4, 0], [0, 1, 3]]
    assert best.prefix("0").value == 1


def test_nothing_seen_is_above_it():
    net = NETS["resnet"].build()
    best = lc.tightest(lc.Product(graph := lc.trace(net, NETS["resnet"].shape)), lc.LipLT(graph))
    x = torch.randn(20, *NETS["resnet"].shape)
    K = best().dense()[0] * (1 + 1e-9)
    assert (differences(jacobians(net, x)) <= K).all()
    assert (differences(best_quotients(net, NETS["resnet"].shape, 60, 4)) <= K).all()
    slopes = torch.linalg.matrix_norm(jacobians(net, x), 2)
    assert float(best.lipschitz()) * (1 + 1e-9) >= slopes.max()


def test_one_member_is_itself_and_a_tightest_can_be_a_member():
    graph = traced()
    liplt = lc.LipLT(graph)
    assert torch.equal(lc.tightest(liplt)().dense(), liplt().dense())
    nested = lc.tightest(lc.tightest(lc.Product(graph)), liplt)
    flat = lc.tightest(lc.Product(graph), liplt)
    assert torch.equal(nested().dense(), flat().dense())


# ---------------------------------------------------------------- claims


def test_the_kind_is_the_weakest_and_failures_add():
    graph, K = traced(), torch.ones(3, 3)
    upper = Told(graph, K)
    first = Told(graph, 2 * K, Kind.PROBABILISTIC, 1e-6)
    second = Told(graph, 3 * K, Kind.PROBABILISTIC, 2e-6)
    guess = Told(graph, 9 * K, Kind.ESTIMATE)
    for best, kind, failure in (
        (lc.tightest(upper), Kind.UPPER, 0),
        (lc.tightest(upper, first), Kind.PROBABILISTIC, 1e-6),
        (lc.tightest(first, second, upper), Kind.PROBABILISTIC, 3e-6),
        (lc.tightest(upper, first, guess), Kind.ESTIMATE, 1e-6),
    ):
        said = [best(), best.lipschitz(), best.per_output(), best.prefix("0")]
        assert {part.kind for part in said} == {kind}
        assert [part.failure for part in said] == pytest.approx([failure] * 4)
    sure = Told(graph, K, Kind.PROBABILISTIC, 0.7)
    assert lc.tightest(sure, sure)().failure == 1
    assert lc.tightest(sure, sure).lipschitz().failure == 1


def test_an_estimate_among_the_members_is_not_certified():
    graph = traced()
    best = lc.tightest(lc.Product(graph), lc.LipLT(graph, lc.PowerIteration(1)))
    with pytest.raises(lc.LipcertError, match="estimate"):
        lc.certify(graph.model, torch.randn(2, 6), bound=best)


def test_constants_that_are_no_numbers_stay_none():
    graph = traced()
    bad = torch.ones(3, 3)
    bad[0, 1] = torch.nan
    K = lc.tightest(Told(graph, torch.ones(3, 3)), Told(graph, bad))().dense()
    assert K[0, 0, 1].isnan()
    assert K[0, 1, 0] == 1


def test_numbers_of_two_precisions():
    half, whole = torch.tensor(1.0, dtype=torch.float32), torch.tensor(2.0, dtype=torch.float64)
    assert least([Constant(half, Kind.UPPER), Constant(whole, Kind.UPPER)]).value == 1
    pairs = [
        MarginConstants(lambda labels, K=K: K.expand(2, 2)[labels], 2, Kind.UPPER)
        for K in (half, whole)
    ]
    assert tightest_pairs(pairs).row(torch.tensor([0])).tolist() == [[1, 1]]


def test_radii_are_the_largest_of_the_members():
    """In a net with both a mixed and a plain part, the members take turns."""
    graph = traced("branches")
    net, x = graph.model, torch.randn(50, *NETS["branches"].shape)
    members = lc.Product(graph), lc.LipLT(graph)
    radii = torch.stack([lc.certify(net, x, bound=member).radius for member in members])
    found = lc.certify(net, x, bound=lc.tightest(*members)).radius
    # Each pair counts, and the nearest class may be another one: never less than either.
    assert (found >= radii.amax(0)).all()
    for graph in (uneven(), traced()):
        shape = graph.input_shape
        x = torch.randn(50, *shape)
        members = lc.Product(graph), lc.LipLT(graph)
        radii = torch.stack([lc.certify(graph.model, x, bound=m).radius for m in members])
        found = lc.certify(graph.model, x, bound=lc.tightest(*members)).radius
        assert torch.equal(found, radii.amax(0))
        assert (radii[0] != radii[1]).any()


# ---------------------------------------------------------------- balls of different radii


def around(graph, *radii):
    """A global bound and local ones, each in a ball of its own."""
    kinds = lc.Product, lc.LipLT
    local = [kinds[i % 2](graph, region=lc.L2Ball(r)) for i, r in enumerate(radii)]
    return [lc.LipLT(graph), *local]


@pytest.mark.parametrize("name", ["mlp", "branches"])
def test_each_member_counts_in_its_own_ball(name):
    graph = traced(name)
    x, wanted = torch.randn(4, *graph.input_shape), torch.tensor([0, 1, 2, 0])
    members = around(graph, 0.03, 0.3, 1.0)
    best = lc.tightest(*members)
    made, said = best(x), [m(x) for m in members]
    assert [torch.as_tensor(m.valid_radius).amax().item() for m in made.members()] == [
        float("inf"), 0.03, 0.3, 1.0,
    ]  # fmt: skip
    for eps in (0.01, 0.03, 0.031, 0.3, 0.31, 1.0, 1.1):
        rows = [said[0].row(wanted).expand(4, -1)]
        for member, constants in zip(members[1:], said[1:], strict=True):
            if member.region.eps >= eps:
                rows.append(torch.minimum(constants.row(wanted), constants.drop(wanted) / eps))
        torch.testing.assert_close(made.within(wanted, eps), torch.stack(rows).amin(0))


@pytest.mark.parametrize("name", ["mlp", "branches"])
def test_radii_are_the_largest_for_each_class_then_the_least(name):
    graph = traced(name)
    net, x = graph.model, torch.randn(12, *graph.input_shape)
    members = around(graph, 0.02, 0.1, 0.6)
    certificate = lc.certify(net, x, bound=lc.tightest(*members))
    alone = [lc.certify(net, x, bound=m) for m in members]
    each = torch.stack([c.claims[0].radii(c.margins) for c in alone])
    for claim, radius in zip(alone, (float("inf"), 0.02, 0.1, 0.6), strict=True):
        assert (claim.radius <= radius).all()
    torch.testing.assert_close(certificate.radius, each.amax(0).amin(1), rtol=1e-12, atol=0)
    for eps in (0.0199, 0.02, 0.0201, 0.1, 0.1001, 0.6, 0.6001):
        kept = torch.stack([c.claims[0].kept_at(c.margins, eps) for c in alone])
        assert torch.equal(certificate.robust_at(eps), kept.any(0).all(1))


def test_other_radii_are_those_of_all_local_members():
    graph = traced()
    x, eps = torch.randn(3, 6), torch.tensor([0.05, 0.5, 2.0])
    best = lc.tightest(*around(graph, 0.02, 0.1))
    first, *others = best(x, eps).members()
    assert first.valid_radius == float("inf")
    for member in others:
        assert torch.equal(member.valid_radius, eps)
    values = [m.lipschitz(x, eps).value for m in around(graph, 0.02, 0.1)[1:]]
    whole = lc.LipLT(graph).lipschitz().value.expand(3)
    torch.testing.assert_close(
        best.lipschitz(x, eps).value, torch.stack([whole, *values]).amin(0), rtol=1e-9, atol=0
    )


def test_members_that_are_all_local():
    """The first has no ball beyond its own either."""
    graph = traced()
    net, x = graph.model, torch.randn(6, 6)
    best = lc.tightest(*around(graph, 0.02, 0.1)[1:])
    certificate = lc.certify(net, x, bound=best)
    assert (certificate.radius <= 0.1).all()
    assert not certificate.robust_at(0.1001).any()
    assert best(x).within(torch.zeros(6, dtype=torch.long), 0.11).isinf().all()
    assert best(x).batch == 6
    with pytest.raises(lc.LipcertError, match="give them"):
        best()
    wider = lc.certify(net, x, bound=best, bisections=6)
    assert (wider.radius >= certificate.radius).all()
    assert (wider.radius > 0.1).any()


# ---------------------------------------------------------------- the module


def test_its_state_is_that_of_its_members():
    graph = traced("conv")
    product = lc.Product(graph, lc.PowerIteration(1))
    liplt = lc.LipLT(graph, lc.LOBPCG(1))
    best = lc.tightest(product, liplt)
    names = {f"members.{i}.{k}" for i, m in enumerate((product, liplt)) for k in m.state_dict()}
    assert best.state_dict().keys() == names
    assert len(names) == len(product.state_dict()) + len(liplt.state_dict()) > 2
    assert not list(best.parameters())
    for _ in range(3):
        best()
    value = best().dense()
    other = lc.tightest(lc.Product(graph, lc.PowerIteration(1)), lc.LipLT(graph, lc.LOBPCG(1)))
    assert not torch.equal(other.state_dict()["members.1.vectors_0"], liplt.vectors_0)
    other.load_state_dict(best.state_dict())
    assert torch.equal(other().dense(), best().dense())
    assert (best().dense() >= value * (1 - 1e-3)).all()  # the vectors moved on


def test_the_gradient_is_that_of_the_member_that_is_least():
    graph = uneven()
    weight = graph.model[0].weight
    best = lc.tightest(lc.LipLT(graph), lc.Product(graph))
    (found,) = torch.autograd.grad(best().row(torch.tensor([0]))[0, 1], weight)
    (expected,) = torch.autograd.grad(lc.Product(graph)().row(torch.tensor([0]))[0, 1], weight)
    assert expected.any()
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- what is refused


def test_what_is_no_bound_is_refused():
    graph = traced()
    for members in ((), (graph,), (lc.Product(graph), 3.0), (lc.Product,), ([lc.Product(graph)],)):
        with jaxtyping_off(), pytest.raises(lc.LipcertError, match="takes bounds"):
            lc.tightest(*members)


def test_bounds_of_two_networks_are_refused():
    with pytest.raises(lc.LipcertError, match="one network"):
        lc.tightest(lc.Product(traced()), lc.LipLT(traced()))
    graph = traced()
    again = lc.trace(graph.model, graph.input_shape)
    assert lc.tightest(lc.Product(graph), lc.LipLT(again))().classes == 3


def test_a_member_traced_before_a_change_is_refused():
    """Only the graph of the first member would be looked at by certify()."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    before = lc.trace(net, (4,))
    net[1] = nn.LeakyReLU(10.0)
    product, liplt = lc.Product(lc.trace(net, (4,))), lc.LipLT(before)
    with pytest.raises(lc.LipcertError, match="network"):
        lc.certify(net, torch.randn(2, 4), bound=lc.tightest(product, liplt))
