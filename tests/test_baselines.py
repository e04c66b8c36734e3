"""Regularisers to compare with: their gradients, their fixed points, their state."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lipcert as lc
from lipcert import recipes
from lipcert.errors import LipcertError
from lipcert.layers import ConvexSum, ScaledConv2d
from lipcert.losses import ce
from lipcert.losses.penalties import LastLayerDecay, Parseval, SpectralNormPenalty
from lipcert.models import lmt_mnist
from lipcert.recipes.parts import adam, attacked, nesterov


def network():
    """A wide and a tall kernel, a grouped convolution, a 1-d one, and a last dense layer."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 6, 2, groups=2), nn.Flatten(),
        nn.Linear(24, 7), nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 3),
    )  # fmt: skip


def matrices(net):
    return {
        n: p.flatten(1) for n, p in net.named_parameters() if n.endswith("weight") and p.ndim > 1
    }


def norms(net):
    return torch.stack([torch.linalg.matrix_norm(w, 2) for w in matrices(net).values()])


# ---------------------------------------------------------------- spectral norm regularisation


def test_the_penalty_and_its_gradient_become_exact():
    net, strength = network(), 0.3
    penalty = SpectralNormPenalty(net, strength)
    for _ in range(1500):
        value = penalty()
    value.backward()
    expected = strength / 2 * norms(net).square().sum()
    torch.testing.assert_close(value, expected)
    for name, w in matrices(net).items():
        u, s, vh = torch.linalg.svd(w.detach(), full_matrices=False)
        exact = strength * s[0] * torch.outer(u[:, 0], vh[0])
        torch.testing.assert_close(net.get_parameter(name).grad.flatten(1), exact)


def test_the_penalty_never_exceeds_the_exact_one_and_one_step_a_call_improves_it():
    net = network()
    penalty = SpectralNormPenalty(net, 2.0)
    values = torch.stack([penalty().detach() for _ in range(30)])
    assert (values.diff() >= -1e-12).all()
    assert values[0] < values[-1] <= norms(net).square().sum()


def test_the_penalty_follows_the_weights_and_registers_none():
    net = network()
    penalty = SpectralNormPenalty(net, 0.1)
    assert list(penalty.parameters()) == []
    assert set(penalty.state_dict()) == {f"vector_{i}" for i in range(5)}
    assert penalty.vector_1.shape == (1, 2 * 2)  # of the flattened kernel, whatever the image
    before = penalty()
    with torch.no_grad():
        for w in net.parameters():
            w.mul_(10)
    assert penalty() > 50 * before


def test_the_saved_vectors_are_all_the_state():
    net = network()
    first, second = SpectralNormPenalty(net, 0.1), SpectralNormPenalty(net, 0.1)
    for _ in range(5):
        first()
    assert first() != second()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(), second())


def test_kernels_of_zeros_give_no_nan_and_recover():
    net = network()
    penalty = SpectralNormPenalty(net, 0.1)
    with torch.no_grad():
        net[0].weight.zero_()
    penalty().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad():
        net[0].weight.normal_()
    for _ in range(1000):
        value = penalty()
    torch.testing.assert_close(value, 0.05 * norms(net).square().sum())


def test_descent_on_the_penalty_shrinks_the_norms():
    net = network()
    before = norms(net)
    penalty = SpectralNormPenalty(net, 0.5)
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(100):
        optimiser.zero_grad()
        penalty().backward()
        optimiser.step()
    assert (norms(net) < 0.6 * before).all()


def test_penalties_that_make_no_sense_are_refused():
    with pytest.raises(LipcertError, match="strength=-1"):
        SpectralNormPenalty(network(), -1)
    with pytest.raises(LipcertError, match="Sequential has no dense or convolutional layer"):
        SpectralNormPenalty(nn.Sequential(nn.ReLU()), 0.1)


# ---------------------------------------------------------------- Parseval


def repeat(step, net, times):
    with torch.no_grad():
        for _ in range(times):
            step(net)


def test_parseval_converges_to_orthonormal_rows_and_spares_the_last_dense_layer():
    net = network()
    last = net[7].weight.clone()
    repeat(Parseval(0.2), net, 300)
    assert torch.equal(net[7].weight, last)
    for name, w in matrices(net).items():
        if name == "7.weight":
            continue
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        torch.testing.assert_close(gram, torch.eye(len(gram)), msg=name)


def test_one_parseval_step_moves_singular_values_and_keeps_the_vectors():
    net, beta = lmt_mnist(in_shape=(1, 8, 8)), 0.01
    before = torch.linalg.svd(net[0].weight.detach().flatten(1), full_matrices=False)
    repeat(Parseval(beta), net, 1)
    u, s, vh = before
    expected = (u * (s + beta * (s - s**3))) @ vh
    torch.testing.assert_close(net[0].weight.detach().flatten(1), expected)


def test_the_last_convolution_of_a_net_without_dense_layers_is_not_spared():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten())
    before = net[0].weight.clone()
    repeat(Parseval(0.1), net, 1)
    assert not torch.equal(net[0].weight, before)


def test_parseval_refuses_what_it_cannot_change():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    with pytest.raises(LipcertError, match="'0' is computed from other parameters"):
        repeat(Parseval(0.1), net, 1)
    with pytest.raises(LipcertError, match="beta=0"):
        Parseval(0)
    with pytest.raises(LipcertError, match="no dense or convolutional layer"):
        repeat(Parseval(0.1), nn.ReLU(), 1)


def test_a_scaled_convolution_is_divided_and_has_norm_one_where_its_kernel_has():
    net = nn.Sequential(ScaledConv2d(2, 5, (3, 2), padding=1), nn.Flatten())
    plain = nn.Conv2d(2, 5, (3, 2), padding=1)
    plain.load_state_dict(net[0].state_dict())
    x = torch.rand(3, 2, 6, 6)
    torch.testing.assert_close(net[0](x), plain(x) / 6**0.5)
    before = lc.spectral_norm(plain, (2, 6, 6), lc.Exact())
    after = lc.spectral_norm(net, (2, 6, 6), lc.Exact())
    assert float(after) == pytest.approx(float(before) / 6**0.5)
    repeat(Parseval(0.2), net, 200)
    assert 0.5 < float(lc.spectral_norm(net, (2, 6, 6), lc.Exact())) <= 1 + 1e-9


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g, self.join = nn.Linear(3, 4), nn.Linear(3, 4), ConvexSum()

    def forward(self, x):
        return self.join(self.f(x).relu(), self.g(x).tanh())


def test_a_convex_sum_counts_each_branch_with_its_share():
    net = Residual()
    norms = [torch.linalg.matrix_norm(m.weight.detach(), 2) for m in (net.f, net.g)]
    graph = lc.trace(net, (3,))
    for shares in ([0.5, 0.5], [0.2, 0.8], [-0.3, 1.1]):
        net.join.shares.data = torch.tensor(shares)
        expected = sum(abs(s) * norm for s, norm in zip(shares, norms, strict=True))
        assert float(lc.Product(graph).lipschitz()) == pytest.approx(float(expected))


def test_a_parseval_step_projects_the_shares():
    net = Residual()
    whole = torch.linspace(0, 1, 2001)
    allowed = torch.stack([whole, 1 - whole], 1)
    for _ in range(20):
        given = torch.randn(2)
        net.join.shares.data = given.clone()
        repeat(Parseval(0.1), net, 1)
        nearest = allowed[(allowed - given).norm(dim=1).argmin()]
        torch.testing.assert_close(net.join.shares.data, nearest, atol=3e-4, rtol=0)
        assert net.join.shares.sum() == 1


def test_the_decay_of_the_last_layer_is_that_of_the_optimiser():
    net = network()
    penalty = LastLayerDecay(net, 0.3)
    assert list(penalty.parameters()) == []
    penalty().backward()
    for name, p in net.named_parameters():
        if name.startswith("7."):
            torch.testing.assert_close(p.grad, 0.3 * p.detach())
        else:
            assert p.grad is None
    with pytest.raises(LipcertError, match="strength=-1"):
        LastLayerDecay(net, -1)
    with pytest.raises(LipcertError, match="no dense layer that could decay"):
        LastLayerDecay(nn.Sequential(nn.Conv2d(1, 1, 1)), 1)


# ---------------------------------------------------------------- decay and attacked batches


@pytest.mark.parametrize("make", [adam, nesterov])
def test_decay_shrinks_weights_that_have_no_gradient(make):
    for decay in (0.0, 0.1):
        w = nn.Parameter(torch.ones(3))
        w.grad = torch.zeros(3)
        make([w], 0.01, weight_decay=decay).step()
        assert bool((w < 1).all()) == (decay > 0)


def test_nesterov_is_gradient_descent_with_a_look_ahead():
    w = nn.Parameter(torch.tensor([1.0]))
    optimiser = nesterov([w], 0.1)
    position, velocity = 1.0, 0.0
    for _ in range(5):
        w.grad = w.detach().clone()  # of w^2 / 2
        optimiser.step()
        velocity = 0.9 * velocity + position
        position -= 0.1 * (position + 0.9 * velocity)
        assert w.item() == pytest.approx(position)


def test_attacked_batches_stay_in_the_ball_and_are_harder():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    net.train()
    x, labels = torch.rand(40, 1, 4, 4), torch.arange(40) % 3
    moved = attacked(net, x, labels, 0.2)
    assert ((moved - x).flatten(1).norm(dim=1) <= 0.2).all()
    assert ((moved >= 0) & (moved <= 1)).all()
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    net.eval()
    row = torch.zeros(40, 3)
    assert ce(net(moved), labels, row, 0.0) > ce(net(x), labels, row, 0.0)


# ---------------------------------------------------------------- the recipes


BASELINES = [n for n in recipes.names() if n.startswith("baseline-mnist-")]


def test_each_baseline_differs_from_the_plain_one_in_one_part():
    plain = recipes.get("baseline-mnist-plain")
    parts = {
        "baseline-mnist-plain": set(),
        "baseline-mnist-weight_decay": {"optimiser"},
        "baseline-mnist-parseval": {"after_step"},
        "baseline-mnist-snr": {"penalties"},
        "baseline-mnist-adversarial": {"perturb"},
    }
    assert set(BASELINES) == parts.keys()
    told_apart_by = {"name", "summary", "published"}
    for name, expected in parts.items():
        recipe = recipes.get(name)
        fields = [f.name for f in dataclasses.fields(recipe)]
        differing = {f for f in fields if getattr(recipe, f) != getattr(plain, f)}
        assert differing - told_apart_by == expected


def test_the_plain_baseline_is_lmt_without_its_loss():
    plain, lmt = recipes.get("baseline-mnist-plain"), recipes.get("lmt-mnist")
    named = {"name": "", "summary": "", "published": (), "loss": ce}
    assert dataclasses.replace(plain, **named) == dataclasses.replace(lmt, **named)
    assert plain.loss is ce


def test_the_published_strengths():
    (make,) = recipes.get("baseline-mnist-snr").penalties
    assert make(network()).strength == 0.01
    assert recipes.get("baseline-mnist-parseval").after_step == Parseval(1e-4)
    optimiser = recipes.get("baseline-mnist-weight_decay").optimiser(
        [nn.Parameter(torch.ones(1))], 1
    )
    assert optimiser.param_groups[0]["weight_decay"] == 5e-4


def test_the_parseval_network_of_svhn():
    recipe, lmt = recipes.get("baseline-svhn-parseval"), recipes.get("lmt-svhn-wrn16_4")
    fields = [f.name for f in dataclasses.fields(lmt)]
    differing = {f for f in fields if getattr(recipe, f) != getattr(lmt, f)}
    parts = {"model", "loss", "penalties", "after_step"}
    assert differing == {"name", "summary", "published"} | parts
    assert recipe.after_step == Parseval(1e-4)
    net = recipe.model(in_shape=(3, 32, 32), classes=10)
    (decay,) = (make(net) for make in recipe.penalties)
    assert decay.strength == 5e-4
    assert decay._layer == (net.head,)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert {type(m) for m in convolutions} == {ScaledConv2d}
    assert sum(isinstance(m, ConvexSum) for m in net.modules()) == 6
