"""The calibrated losses and the decay of constants: laws, extremes, errors."""

import math
from decimal import Decimal, getcontext
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lipcert as lc
from lipcert.losses import Offset, calibration, cll, cll_per_logit
from test_api import jaxtyping_off

BOTH = pytest.mark.parametrize("loss", [cll, cll_per_logit])
CENTRES = {Offset.TWO_SIDED: 2, Offset.ONE_SIDED: 1, Offset.NONE: 0}


@pytest.fixture
def batch():
    """Logits with right and wrong samples, labels, and a row of constants for each sample."""
    logits = 3 * torch.randn(12, 5)
    labels = torch.randint(5, (12,))
    labels[:6] = logits[:6].argmax(dim=1)
    return logits, labels, torch.rand(12, 5) + 0.1


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("slack", [1e-300, 1e-20, 1e-9, 0.01, 0.3, 0.7, 1 - 1e-12, 1 - 2**-53])
def test_calibration_has_all_digits(slack):
    getcontext().prec = 60
    p = Decimal(slack)
    exact = float(((2 - p) / p).ln() / Decimal("0.15"))
    assert calibration(0.15, slack).constant == pytest.approx(exact, rel=1e-14, abs=0)


def test_slack_is_the_mass_beyond_the_radius_in_both_tails():
    eps, slack = 0.4, 0.2
    scale = torch.tensor(eps / calibration(eps, slack).sigma)
    assert torch.sigmoid(-scale) + 1 - torch.sigmoid(scale) == pytest.approx(slack)


def test_more_slack_is_a_wider_logistic():
    widths = [calibration(0.3, slack).sigma for slack in (1e-12, 1e-3, 0.1, 0.5, 0.9, 0.999)]
    assert all(a < b for a, b in pairwise(widths))
    found = calibration(0.3, 0.1)
    assert found.constant == pytest.approx(1 / found.sigma)
    assert calibration(0.6, 0.1).sigma == pytest.approx(2 * found.sigma)


@pytest.mark.parametrize("eps", [0.0, -0.1, math.nan, math.inf])
def test_calibration_needs_a_radius(eps):
    with pytest.raises(lc.LipcertError, match=r"eps > 0.*eps_schedule"):
        calibration(eps, 0.3)


@pytest.mark.parametrize("slack", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_calibration_needs_slack_inside_its_range(slack):
    with pytest.raises(lc.LipcertError, match="0 < slack < 1"):
        calibration(0.1, slack)


# ---------------------------------------------------------------- the loss is what it says


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("offset", Offset)
def test_cll_is_a_soft_hinge_on_signed_radii(offset, scale, batch):
    logits, labels, K = batch
    eps, slack = 0.5, 0.1
    sigma = eps / math.log((2 - slack) / slack)
    total = 0.0
    for z, y, row in zip(logits.tolist(), labels.tolist(), K.tolist(), strict=True):
        radii = [(z[y] - z[j]) / row[j] for j in range(5) if j != y]
        total += math.log1p(
            sum(math.exp((CENTRES[offset] * eps - r / scale) / sigma) for r in radii)
        )
    for given in (offset, str(offset)):
        value = cll(logits, labels, K, eps, slack, given, scale)
        assert value.item() == pytest.approx(total / 12, rel=1e-12)


@pytest.mark.parametrize("offset", Offset)
def test_the_compact_form_is_the_cross_entropy_of_calibrated_logits(offset, batch):
    logits, labels, K = batch
    eps, sigma = 0.5, 0.2
    own = nn.functional.one_hot(labels, 5).bool()
    u = (logits - logits.gather(1, labels[:, None])) / (sigma * K)
    up = {Offset.TWO_SIDED: eps, Offset.ONE_SIDED: eps, Offset.NONE: 0.0}[offset] / sigma
    down = {Offset.TWO_SIDED: -eps, Offset.ONE_SIDED: 0.0, Offset.NONE: 0.0}[offset] / sigma
    expected = cross_entropy(u + torch.where(own, down, up), labels)
    value = cll(logits, labels, K, eps, margin_offset=offset, sigma=sigma)
    torch.testing.assert_close(value, expected)

    v = logits / (0.3 * sigma * K)
    expected = cross_entropy(v + torch.where(own, down, up), labels)
    value = cll_per_logit(logits, labels, K, eps, margin_offset=offset, sigma=sigma, scale=0.3)
    torch.testing.assert_close(value, expected)


@BOTH
def test_defaults(loss, batch):
    sigma = calibration(0.5, 0.3).sigma
    spelt = loss(*batch, 0.5, margin_offset="two_sided", scale=1.0, detach=True, sigma=sigma)
    torch.testing.assert_close(loss(*batch, 0.5), spelt)
    assert loss(*batch, 0.5, slack=0.2) != spelt


@BOTH
def test_logits_and_constants_may_be_scaled_together(loss, batch):
    logits, labels, K = batch
    torch.testing.assert_close(loss(7 * logits, labels, 7 * K, 0.5), loss(logits, labels, K, 0.5))


def test_only_the_pairwise_form_ignores_shifts_of_a_sample(batch):
    logits, labels, K = batch
    shifted = logits + torch.randn(12, 1)
    torch.testing.assert_close(cll(shifted, labels, K, 0.5), cll(logits, labels, K, 0.5))
    forms = [cll_per_logit(z, labels, K, 0.5) for z in (shifted, logits)]
    assert not torch.isclose(*forms)


@BOTH
def test_a_farther_centre_and_larger_constants_cost_more(loss, batch):
    logits, labels, K = batch
    none, one, two = (
        loss(*batch, 0.5, margin_offset=o) for o in ("none", "one_sided", "two_sided")
    )
    assert none < one < two
    if loss is cll:
        right = logits.argmax(1) == labels
        part = logits[right], labels[right]
        assert cll(*part, K[right], 0.5) < cll(*part, 2 * K[right], 0.5)


def test_what_they_protect(batch):
    logits, labels, K = batch
    assert torch.equal(cll.protects(logits, labels), labels)
    assert cll_per_logit.protects(logits, labels) is None
    spoilt = K.scatter(1, labels[:, None], torch.nan).requires_grad_()
    value = cll(logits.requires_grad_(), labels, spoilt, 0.5, detach=False)
    assert value == cll(logits, labels, K, 0.5)
    for gradient in torch.autograd.grad(value, (logits, spoilt)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(5,), (1, 5), (12, 5)])
def test_single_logits_may_have_one_row_for_all(shape, batch):
    logits, labels, _ = batch
    K = torch.rand(5) + 0.1
    value = cll_per_logit(logits, labels, K.expand(shape), 0.5)
    torch.testing.assert_close(value, cll_per_logit(logits, labels, K.expand(12, 5), 0.5))


# ---------------------------------------------------------------- gradients


@BOTH
def test_gradients(loss, batch):
    logits, labels, K = batch
    inputs = (logits.requires_grad_(), K.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda z, k: loss(z, labels, k, 0.5, scale=0.7, detach=False), inputs
    )


@BOTH
def test_constants_are_detached_unless_told_otherwise(loss, batch):
    logits, labels, K = batch
    logits.requires_grad_()
    K.requires_grad_()
    loss(logits, labels, K, 0.5).backward()
    assert K.grad is None
    loss(logits, labels, K, 0.5, detach=False).backward()
    assert K.grad.any()


def test_undetached_constants_of_wrong_pairs_are_pushed_up(batch):
    logits, labels, K = batch
    K.requires_grad_()
    cll(logits, labels, K, 0.5, detach=False).backward()
    ahead = (logits > logits.gather(1, labels[:, None])) & (K.grad != 0)
    assert ahead.any()
    assert (K.grad[ahead] < 0).all()
    assert (K.grad[~ahead] >= 0).all()


@pytest.mark.parametrize("K", [1e-30, 1e30])
@pytest.mark.parametrize("margin", [1e10, -1e10, 1.0, -1.0, 0.0])
def test_extremes_have_the_true_gradient(K, margin):
    z = torch.tensor([[margin, 0.0]], requires_grad=True)
    value = cll(z, torch.tensor([0]), torch.full((1, 2), K), 0.1, sigma=1.0)
    value.backward()
    radius = margin / K
    expected = max(0.0, 0.2 - radius) + math.log1p(math.exp(-abs(0.2 - radius)))
    assert value.item() == pytest.approx(expected)
    share = (1 + math.tanh((0.2 - radius) / 2)) / 2
    torch.testing.assert_close(z.grad, torch.tensor([[-share / K, share / K]]))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("K", [0.0, 1e-300, 1e-30, 1e-8, 1e30])
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e4])
def test_loss_and_gradients_are_finite_whatever_the_sizes(loss, dtype, K, size):
    z = torch.tensor([[1.0, -1.0, 0.5], [-1.0, 1.0, 0.5], [1.0, 1.0, 1.0]], dtype=dtype)
    z = (size * z).requires_grad_()
    row = torch.full((3, 3), K, dtype=torch.float32 if dtype == torch.float16 else dtype)
    row.requires_grad_()
    value = loss(z, torch.zeros(3, dtype=torch.long), row, 0.1, detach=False)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    value.backward()
    assert value.isfinite()
    assert row.grad.isfinite().all()
    if dtype != torch.float16:  # which ends at 65504, whatever the loss does
        assert z.grad.isfinite().all()


@BOTH
@pytest.mark.parametrize("size", [1e10, 1e30])
def test_quotients_that_overflow(loss, size):
    z = torch.tensor([[size, 0.0], [-size, 0.0]], dtype=torch.float32, requires_grad=True)
    K = torch.full((2, 2), 1e-15, dtype=torch.float32, requires_grad=True)
    value = loss(z, torch.tensor([0, 0]), K, 0.1, detach=False)
    assert value.isfinite()
    for gradient in torch.autograd.grad(value, (z, K)):
        assert gradient.isfinite().all()


def test_equal_rows_of_the_last_layer():
    """Class 1 has the row of class 0, so that only biases tell the two apart."""
    K = torch.tensor([[1.0, 0.0, 2.0]])

    def loss(z, y=0):
        z = torch.tensor([z], requires_grad=True)
        value = cll(z, torch.tensor([y]), K, 0.5)
        value.backward()
        return value, z.grad

    ahead, gradient = loss([2.0, 1.0, 0.5])  # nothing within reach
    alone = cll(torch.tensor([[2.0, 0.5]]), torch.tensor([0]), K[:, ::2], 0.5)
    torch.testing.assert_close(ahead, alone)
    assert gradient[0, 1] == 0

    behind, gradient = loss([1.0, 2.0, 0.5])  # always within reach: the margin stands for itself
    as_if = cll(torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([0]), K.clamp(min=1.0), 0.5)
    torch.testing.assert_close(behind, as_if)
    assert behind > ahead
    assert gradient[0, 0] < 0 < gradient[0, 1]

    tied, gradient = loss([1.0, 1.0, 0.5])
    assert tied > ahead
    assert gradient[0, 1] > 0


def test_a_network_that_starts_at_zero_learns():
    net, y = nn.Linear(3, 2), torch.tensor([0, 1, 1, 1])
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    bound = lc.Product(lc.trace(net, (3,)))
    loss = cll(net(torch.rand(4, 3)), y, bound().row(y), 0.1)
    loss.backward()
    assert net.weight.grad.isfinite().all()
    assert net.weight.grad.any()


@BOTH
def test_two_classes_and_one_sample(loss):
    z, y, K = torch.tensor([[0.3, -0.2]]), torch.tensor([1]), torch.tensor([[2.0, 3.0]])
    u = -0.5 / 2 if loss is cll else -0.2 / 3 - 0.3 / 2
    assert loss(z, y, K, 0.1, sigma=1.0).item() == pytest.approx(math.log1p(math.exp(0.2 - u)))


@BOTH
def test_broken_numbers_show(loss, batch):
    logits, labels, K = batch
    other = (labels[0] + 1) % 5
    for place in (0, 1):
        broken = [logits.clone(), K.clone()]
        broken[place][0, other] = torch.nan
        assert loss(broken[0], labels, broken[1], 0.5).isnan()
    logits[0, other] = torch.inf
    assert not loss(logits, labels, K, 0.5).isfinite()


@BOTH
def test_half_precision_is_widened(loss, batch):
    logits, labels, K = batch
    value = loss(logits.half(), labels, K.half(), 0.5)
    assert value.dtype == torch.float32
    expected = loss(logits.half().float(), labels, K.half().float(), 0.5)
    torch.testing.assert_close(value, expected)


# ---------------------------------------------------------------- errors


@BOTH
@pytest.mark.parametrize(
    ("eps", "options", "match"),
    [
        (0.0, {}, "eps > 0"),
        (-1.0, {}, "eps > 0"),
        (math.nan, {}, "eps > 0"),
        (-1.0, {"sigma": 0.1}, "eps"),
        (0.1, {"slack": 0.0}, "0 < slack < 1"),
        (0.1, {"slack": 1.0}, "0 < slack < 1"),
        (0.1, {"scale": 0.0}, "scale"),
        (0.1, {"sigma": 0.0}, "sigma"),
        (0.1, {"sigma": math.nan}, "sigma"),
        (0.1, {"margin_offset": "three"}, "'three' is none of 'two_sided', 'one_sided', 'none'"),
    ],
)
def test_options_out_of_range(loss, eps, options, match, batch):
    with pytest.raises(lc.LipcertError, match=match):
        loss(*batch, eps, **options)


@BOTH
def test_radius_zero_needs_a_width(loss, batch):
    logits, labels, K = batch
    value = loss(logits, labels, K, 0.0, sigma=0.3)
    torch.testing.assert_close(value, loss(logits, labels, K, 1.0, margin_offset="none", sigma=0.3))


def test_a_row_is_wanted_for_every_sample(batch):
    logits, labels, K = batch
    with jaxtyping_off(), pytest.raises(lc.LipcertError, match=r"shape \(1, 5\)"):
        cll(logits, labels, K[:1], 0.5)
