"""Losses of networks that are 1-Lipschitz by construction: formulas written out, and laws."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lipcert.errors import LipcertError
from lipcert.losses import ce, certificate_regularisation, emma, hkr, label, logit_annealing

FIXED = [certificate_regularisation, hkr, logit_annealing]


@pytest.fixture
def batch():
    """Logits with right and wrong samples, labels, and a row of constants for each sample."""
    logits = 3 * torch.randn(12, 5)
    labels = torch.randint(5, (12,))
    labels[:6] = logits[:6].argmax(dim=1)
    return logits, labels, torch.rand(12, 5) + 0.1


# ---------------------------------------------------------------- cross-entropy with a margin


def test_temperature_and_offset_of_cross_entropy(batch):
    logits, labels, K = batch
    lowered = logits.clone()
    for sample, y in enumerate(labels):
        lowered[sample, y] -= 1.5
    expected = 0.25 * cross_entropy(lowered / 0.25, labels)
    value = ce(logits, labels, K, 0.5, temperature=0.25, offset=1.5)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(ce(logits, labels, K, 0.5), cross_entropy(logits, labels))


def test_a_cold_cross_entropy_is_a_hinge(batch):
    logits, labels, K = batch
    margins = logits.gather(1, labels[:, None]) - logits
    nearest = margins.scatter(1, labels[:, None], torch.inf).amin(1)
    hinge = (1.5 - nearest).clamp(min=0).mean()
    value = ce(logits, labels, K, 0.5, temperature=1e-4, offset=1.5)
    assert value.item() == pytest.approx(hinge.item(), abs=1e-3)
    assert hinge > 1


# ---------------------------------------------------------------- certificate regularisation


def radii(logits, labels, K):
    z, K = logits.numpy(), K.detach().numpy()
    return np.array(
        [
            min((z[b, y] - z[b, j]) / K[b, j] for j in range(z.shape[1]) if j != y)
            for b, y in enumerate(labels.tolist())
        ]
    )


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_certificate_regularisation_rewards_radii_of_right_samples(batch, weight):
    logits, labels, K = batch
    found = radii(*batch)
    assert 0 < (found > 0).sum() < 12
    expected = cross_entropy(logits, labels).item() - weight * np.maximum(found, 0).mean()
    value = certificate_regularisation(logits, labels, K, 0.5, weight=weight)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert value == certificate_regularisation(logits, labels, K, 0.0, weight=weight)


def test_classes_out_of_reach_are_rewarded_by_nothing():
    z, y = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True), torch.tensor([0])
    K = torch.tensor([[torch.nan, 0.0, 4.0]], requires_grad=True)
    value = certificate_regularisation(z, y, K, 0.1, weight=1.0)
    assert value.item() == pytest.approx(cross_entropy(z, y).item() - 0.5)
    value.backward()
    assert z.grad.isfinite().all()
    assert torch.equal(K.grad, torch.tensor([[0.0, 0.0, 1 / 8]]))
    nothing = certificate_regularisation(z, y, torch.zeros(1, 3), 0.1, weight=1.0)
    assert nothing == cross_entropy(z, y)
    wrong = torch.tensor([1])  # class 0 is ahead, out of reach; class 2 alone would leave a radius
    behind = certificate_regularisation(z, wrong, torch.tensor([[0.0, 1.0, 4.0]]), 0.1)
    assert behind == cross_entropy(z, wrong)


# ---------------------------------------------------------------- logit annealing


@pytest.mark.parametrize("power", [1.0, 5.0])
def test_logit_annealing_is_the_formula(batch, power):
    logits, labels, K = batch
    total = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        z[y] -= 2.0
        p = math.exp(z[y] / 0.75) / sum(math.exp(s / 0.75) for s in z)
        total += 0.75 * (1 - p) ** power * -math.log(p)
    value = logit_annealing(logits, labels, K, 0.5, power=power)
    assert value.item() == pytest.approx(total / 12, rel=1e-10)
    if power == 5.0:
        assert value == logit_annealing(logits, labels, K, 0.5)


def test_logit_annealing_after_emma(batch):
    logits, labels, K = batch
    options = {"temperature": 0.5, "offset": 1.0}
    value = logit_annealing(logits, labels, K, 0.5, raise_rivals=True, **options)
    # emma's own raised logits, read off by the cross-entropy they give
    own = torch.nn.functional.one_hot(labels, 5).bool()
    margins = logits.gather(1, labels[:, None]) - logits
    share = (margins / (0.5 * K)).clamp(0.01, 1).masked_fill(own, 0.0)
    lifted = logits + share * 0.5 * K
    torch.testing.assert_close(cross_entropy(lifted, labels), emma(logits, labels, K, 0.5))
    torch.testing.assert_close(value, logit_annealing(lifted, labels, K, 0.5, **options))


def test_annealing_forgets_samples_that_have_their_margin():
    def slope(margin, loss, **options):
        z = torch.tensor([[margin, 0.0]], requires_grad=True)
        loss(z, torch.tensor([0]), torch.ones(1, 2), 0.0, **options).backward()
        return -z.grad[0, 0].item()

    shape = {"temperature": 0.75, "offset": 2.0}
    ratios = [slope(m, logit_annealing, **shape) / slope(m, ce, **shape) for m in (-5, 2, 3, 6)]
    assert ratios[0] == pytest.approx(1, abs=0.01)
    assert ratios[0] > ratios[1] > ratios[2] > 1e3 * ratios[3]


# ---------------------------------------------------------------- hKR


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_hkr_is_the_formula(batch, alpha):
    logits, labels, K = batch
    labels = labels.clamp(max=3)  # no sample of class 4
    assert set(labels.tolist()) == {0, 1, 2, 3}
    z, y = logits.numpy(), labels.numpy()
    hinge = separation = 0.0
    for i in range(5):
        inside, outside = z[y == i, i], z[y != i, i]
        hinge += 4 * np.maximum(0, 0.5 - inside).sum() + np.maximum(0, 0.5 + outside).sum()
        separation += (inside.mean() if len(inside) else 0.0) - outside.mean()
    expected = alpha * hinge / 60 - (1 - alpha) * separation / 5
    value = hkr(logits, labels, K, 0.5, alpha=alpha)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_separation_is_at_most_the_distance_of_the_classes():
    """With 1-Lipschitz logits: two points at a distance of d, the best functions reach d."""
    x, labels = torch.tensor([0.0, 3.0]), torch.tensor([1, 0])
    best = hkr(torch.stack([x, -x], 1), labels, torch.ones(2, 2), 0.0, alpha=0.0)
    assert best.item() == pytest.approx(-3.0)


def test_the_hinge_wants_half_the_margin_on_either_side():
    z, y = torch.tensor([[1.0, -1.0, -1.0]]), torch.tensor([0])
    K = torch.ones(1, 3)
    assert hkr(z, y, K, 0.0, alpha=1.0, margin=2.0) == 0
    own = hkr(z, y, K, 0.0, alpha=1.0, margin=2.2).item()
    assert own == pytest.approx((2 * 0.1 + 2 * 0.1) / 3)


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("loss", [ce, *FIXED])
def test_laws(loss, batch):
    logits, labels, K = batch
    assert loss.protects is label
    order = torch.randperm(5)
    renamed = loss(logits[:, order], order.argsort()[labels], K[:, order], 0.5)
    value = loss(logits, labels, K, 0.5)
    torch.testing.assert_close(renamed, value)
    spoilt = K.scatter(1, labels[:, None], torch.nan)
    assert loss(logits, labels, spoilt, 0.5) == value
    assert loss(logits.half(), labels, K.half(), 0.5).dtype == torch.float32
    assert torch.autograd.gradcheck(
        lambda z, k: loss(z, labels, k, 0.5), (logits.requires_grad_(), K.requires_grad_())
    )
    with torch.no_grad():
        logits[0, 0] = torch.nan
    assert loss(logits, labels, K, 0.5).isnan()


@pytest.mark.parametrize("loss", [ce, *FIXED])
def test_gradients_are_finite_at_the_ends(loss):
    z = torch.tensor([[1e4, -1e4], [1e4, -1e4], [0.0, 0.0]], requires_grad=True)
    value = loss(z, torch.tensor([0, 1, 0]), torch.ones(3, 2), 0.1)
    value.backward()
    assert value.isfinite()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "options", "match"),
    [
        (ce, {"temperature": 0.0}, "temperature=0"),
        (logit_annealing, {"temperature": -1.0}, "temperature=-1"),
        (logit_annealing, {"power": 0.5}, "power=0.5"),
        (logit_annealing, {"power": math.nan}, "power=nan"),
        (certificate_regularisation, {"weight": -0.1}, "weight"),
        (hkr, {"alpha": 1.1}, "alpha=1.1"),
        (hkr, {"margin": 0.0}, "margin=0"),
    ],
)
def test_options_out_of_range(loss, options, match, batch):
    with pytest.raises(LipcertError, match=match):
        loss(*batch, 0.5, **options)
