from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lipcert import losses
from lipcert.errors import LipcertError
from lipcert.losses import (
    boosted_cross_entropy,
    ce,
    crm,
    crm_max,
    emma,
    gloro,
    gloro_trades,
    lmt,
)

ALL = [ce, lmt, gloro, gloro_trades, emma, crm, crm_max]
CRM = [crm, crm_max]
PROTECT_LABEL = [ce, lmt, emma]

# The provenance of these numbers is written in the file, under "provenance".
GOLDEN = np.load(Path(__file__).parent / "golden" / "lmt_losses.npz")


@pytest.fixture
def batch():
    """Logits with right and wrong samples, labels, and a table K[i, j] of pairwise constants."""
    logits = 3 * torch.randn(12, 5)
    labels = torch.randint(5, (12,))
    labels[:6] = logits[:6].argmax(dim=1)
    K = torch.rand(5, 5) + 0.1
    return logits, labels, K + K.T


def row(loss, logits, labels, K):
    return K[loss.protects(logits, labels)]


# ---------------------------------------------------------------- reference numbers for LMT


@pytest.mark.parametrize("c", ["0.1", "1", "0.01"])
@pytest.mark.parametrize("form", ["prop1", "prop2"])
def test_lmt_gives_the_published_algorithm_and_its_gradients(form, c):
    key, eps = f"{form}_c{c}", float(c)
    W = torch.tensor(GOLDEN["W"], requires_grad=True)
    logits = torch.tensor(GOLDEN["x"], requires_grad=True)
    labels = torch.tensor(GOLDEN["t"]).long()
    scale = torch.linalg.matrix_norm(W.detach(), 2) if form == "prop1" else 1.0
    constant = (eps * GOLDEN[f"c{c}_L_sub"] * scale * torch.ones(1)).requires_grad_()
    if form == "prop1":
        K_row = (2**0.5 * constant / eps).expand(8, 5)
    else:
        K_row = constant / eps * (W[labels][:, None] - W[None]).norm(dim=2)

    loss = lmt(logits, labels, K_row, eps)
    plain = lmt(logits, labels, K_row, eps, stabilise=False)
    loss.backward()

    def close(value, name):
        np.testing.assert_allclose(
            value.detach().numpy(), GOLDEN[f"{key}_{name}"], rtol=1e-10, atol=1e-10
        )

    close(loss, "loss")
    close(plain, "loss_unstabilised")
    close(logits.grad, "gx")
    close(constant.grad, "gl")
    if form == "prop2":
        close(W.grad, "gW")


# ---------------------------------------------------------------- transcriptions in NumPy


def mean_cross_entropy(z, labels):
    total = 0.0
    for scores, y in zip(z, labels, strict=True):
        total += np.log(sum(np.exp(s - scores[y]) for s in scores))
    return total / len(labels)


def bottom_logits(z, K, eps):
    out = []
    for scores in z:
        p = int(np.argmax(scores))
        out.append(max(scores[j] + eps * K[p, j] for j in range(len(scores)) if j != p))
    return np.array(out)


def test_gloro_is_cross_entropy_with_a_bottom_class(batch):
    logits, labels, K = batch
    z, bottom = logits.numpy(), bottom_logits(logits.numpy(), K.numpy(), 0.7)
    expected = mean_cross_entropy(np.column_stack([z, bottom]), labels.numpy())
    value = gloro(logits, labels, row(gloro, *batch), 0.7)
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_gloro_trades_is_the_divergence_written_out(batch, weight):
    logits, labels, K = batch
    z, bottom = logits.numpy(), bottom_logits(logits.numpy(), K.numpy(), 0.7)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    q = np.exp(z) / (np.exp(z).sum(axis=1) + np.exp(bottom))[:, None]
    divergence = (p * np.log(p / q)).sum(axis=1).mean()
    expected = mean_cross_entropy(z, labels.numpy()) + weight * divergence
    value = gloro_trades(logits, labels, row(gloro_trades, *batch), 0.7, weight=weight)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def emma_logits(z, labels, K, eps):
    shifted = z - z[np.arange(len(z)), labels][:, None]
    out = np.zeros_like(z)
    for b, y in enumerate(labels):
        for j in range(z.shape[1]):
            if j != y:
                share = np.clip(-shifted[b, j] / (eps * K[y, j]), 0.01, 1)
                out[b, j] = shifted[b, j] + share * eps * K[y, j]
    return out


def test_emma_raises_every_class_by_its_own_share(batch):
    logits, labels, K = batch
    z = emma_logits(logits.numpy(), labels.numpy(), K.numpy(), 0.7)
    value = emma(logits, labels, row(emma, *batch), 0.7)
    assert value.item() == pytest.approx(mean_cross_entropy(z, labels.numpy()), rel=1e-12)


def test_emma_keeps_its_shares_constant_in_the_gradient(batch):
    logits, labels, K = batch
    K_row = K[labels].requires_grad_()
    logits.requires_grad_()
    emma(logits, labels, K_row, 0.7).backward()
    with torch.no_grad():
        margins = logits.gather(1, labels[:, None]) - logits
        share = (margins / (0.7 * K_row)).clamp(0.01, 1).scatter(1, labels[:, None], 0.0)
    assert ((share > 0.01) & (share < 1)).any()  # the case in which it matters occurs
    weights = torch.softmax(logits.detach() + share * 0.7 * K_row.detach(), dim=1) / 12
    torch.testing.assert_close(K_row.grad, weights * share * 0.7)
    onehot = nn.functional.one_hot(labels, 5) / 12
    torch.testing.assert_close(logits.grad, weights - onehot)


def radii_of(z, K):
    """Each sample's radii to the other classes, the predicted one protected."""
    out = []
    for scores in z:
        p = int(np.argmax(scores))
        out.append([(scores[p] - scores[j]) / K[p, j] for j in range(len(scores)) if j != p])
    return np.array(out)


@pytest.mark.parametrize("misclassified", [False, True])
@pytest.mark.parametrize("loss", CRM)
def test_crm_penalises_the_small_radii(loss, misclassified, batch):
    logits, labels, K = batch
    eps, t, weight = 1.5, 2.0, 0.7
    z, total = logits.numpy(), 0.0
    right = z.argmax(1) == labels.numpy()
    inside = 0
    for radii, kept in zip(radii_of(z, K.numpy()), right, strict=True):
        if (kept or misclassified) and min(radii) < eps:
            inside += 1
            if loss is crm:
                total += np.log(np.exp(-t * radii).sum()) / t
            else:
                total += np.exp(-t * min(radii)) / t
    assert 0 < inside < (12 if misclassified else right.sum())
    expected = mean_cross_entropy(z, labels.numpy()) + weight * total / 12
    options = {"t": t, "weight": weight, "misclassified": misclassified}
    value = loss(logits, labels, row(loss, *batch), eps, **options)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_boosted_cross_entropy_adds_the_strongest_wrong_class(batch):
    logits, labels, _ = batch
    p = np.exp(logits.numpy())
    p /= p.sum(1, keepdims=True)
    total = 0.0
    for scores, y in zip(p, labels.numpy(), strict=True):
        total -= np.log(scores[y]) + np.log(1 - np.delete(scores, y).max())
    assert boosted_cross_entropy(logits, labels).item() == pytest.approx(total / 12, rel=1e-12)


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize(
    ("loss", "options"),
    [(loss, {}) for loss in (ce, lmt, emma, *CRM)] + [(loss, {"continuous": True}) for loss in CRM],
)
def test_radius_zero_gives_cross_entropy(loss, options, batch):
    logits, labels, _ = batch
    torch.testing.assert_close(
        loss(logits, labels, row(loss, *batch), 0.0, **options), cross_entropy(logits, labels)
    )


def test_radius_zero_leaves_the_runner_up_as_bottom_class(batch):
    logits, labels, _ = batch
    runner_up = logits.topk(2, dim=1).values[:, 1:]
    expected = cross_entropy(torch.cat([logits, runner_up], dim=1), labels)
    K_row = row(gloro, *batch)
    torch.testing.assert_close(gloro(logits, labels, K_row, 0.0), expected)
    plain = cross_entropy(logits, labels)
    assert gloro_trades(logits, labels, K_row, 0.0) > plain
    torch.testing.assert_close(gloro_trades(logits, labels, K_row, 0.0, weight=0.0), plain)


def test_without_stabiliser_lmt_bounds_the_cross_entropy_in_the_ball():
    W, b, eps = torch.randn(4, 6), torch.randn(4), 0.3
    x, labels = torch.randn(20, 6), torch.randint(4, (20,))
    K = (W[:, None] - W[None]).norm(dim=2)
    worst = torch.stack(
        [
            lmt(x[i : i + 1] @ W.T + b, labels[i : i + 1], K[labels[i : i + 1]], eps, False)
            for i in range(20)
        ]
    )

    delta = torch.randn(20, 6)
    for _ in range(100):  # ascend the cross-entropy on the sphere, where its maximum lies
        delta = (eps * delta / delta.norm(dim=1, keepdim=True)).requires_grad_()
        attacked = cross_entropy((x + delta) @ W.T + b, labels, reduction="none")
        (slope,) = torch.autograd.grad(attacked.sum(), delta)
        assert (attacked <= worst).all()
        delta = delta.detach() + eps * slope / slope.norm(dim=1, keepdim=True)
    assert (attacked > 0.5 * worst).all()  # the bound is not vacuous


def test_without_stabiliser_lmt_is_attained_by_two_linear_classes():
    W, eps = torch.randn(2, 6), 0.3
    x, labels = torch.randn(1, 6), torch.tensor([1])
    normal = (W[0] - W[1]) / (W[0] - W[1]).norm()
    K_row = (W[1] - W).norm(dim=1)[None]
    torch.testing.assert_close(
        lmt(x @ W.T, labels, K_row, eps, stabilise=False),
        cross_entropy((x + eps * normal) @ W.T, labels),
    )


def test_stabilised_lmt_never_asks_for_more_than_the_margin(batch):
    logits, labels, K = batch
    wrong = logits.argmax(dim=1) != labels
    torch.testing.assert_close(
        lmt(logits[wrong], labels[wrong], K[labels[wrong]], 5.0),
        cross_entropy(logits[wrong], labels[wrong]),
    )
    # However large the radius, a correct sample is pushed to its decision boundary at most.
    far = lmt(logits[~wrong], labels[~wrong], K[labels[~wrong]], 1e3)
    assert cross_entropy(logits[~wrong], labels[~wrong]) < far <= np.log(5)


@pytest.mark.parametrize("loss", ALL)
def test_permuting_the_classes_changes_nothing(loss, batch):
    logits, labels, K = batch
    order = torch.randperm(5)
    place = order.argsort()
    renamed = (logits[:, order], place[labels], K[order][:, order])
    torch.testing.assert_close(
        loss(logits, labels, row(loss, *batch), 0.7),
        loss(renamed[0], renamed[1], row(loss, *renamed), 0.7),
    )


@pytest.mark.parametrize("loss", ALL)
def test_every_loss_protects_the_right_class_and_never_reads_its_own_entry(loss, batch):
    logits, labels, K = batch
    classes = loss.protects(logits, labels)
    expected = labels if loss in PROTECT_LABEL else logits.argmax(dim=1)
    assert torch.equal(classes, expected)
    assert (labels != logits.argmax(dim=1)).any()  # else the two could not be told apart

    clean = K[classes].requires_grad_()
    spoilt = K[classes].scatter(1, classes[:, None], torch.nan).requires_grad_()
    value = loss(logits, labels, spoilt, 0.7)
    assert value == loss(logits, labels, clean, 0.7)
    if loss is not ce:
        value.backward()
        assert spoilt.grad.isfinite().all()
        assert (spoilt.grad.gather(1, classes[:, None]) == 0).all()
        assert (spoilt.grad >= 0).all()
        assert (spoilt.grad > 0).any()


def right_batch():
    """Samples so far from their boundaries that no clip is at work."""
    logits, labels = torch.randn(6, 4), torch.randint(4, (6,))
    return logits.scatter_add(1, labels[:, None], torch.full((6, 1), 9.0)), labels


@pytest.mark.parametrize("loss", ALL)
def test_gradients(loss):
    logits, labels = right_batch()
    K_row = torch.rand(6, 4) + 0.1
    inputs = (logits.requires_grad_(), K_row.requires_grad_())
    assert torch.autograd.gradcheck(lambda z, K: loss(z, labels, K, 0.5), inputs)


def test_gradients_without_stabiliser(batch):
    logits, labels, K = batch
    inputs = (logits.requires_grad_(), K[labels].requires_grad_())
    assert torch.autograd.gradcheck(lambda z, K: lmt(z, labels, K, 0.5, False), inputs)


# ---------------------------------------------------------------- CRM's radii

CONTINUOUS = pytest.mark.parametrize("continuous", [False, True])


def three_classes(radius, K=None):
    """One sample predicted and labelled 0 with the given radii to the classes 1 and 2."""
    K_row = torch.tensor([[1.0, 0.5, 2.0]]) if K is None else K
    margins = torch.tensor([0.0, radius, 2 * radius]) * K_row[0]
    return 4.0 - margins[None], torch.tensor([0]), K_row


@CONTINUOUS
@pytest.mark.parametrize("loss", CRM)
def test_gradients_of_the_penalty(loss, continuous, batch):
    logits, labels, _ = batch
    inputs = (logits.requires_grad_(), row(loss, *batch).requires_grad_())
    options = {"continuous": continuous, "misclassified": True}
    assert torch.autograd.gradcheck(lambda z, K: loss(z, labels, K, 1.5, **options), inputs)


@pytest.mark.parametrize("loss", CRM)
def test_only_the_continuous_form_has_no_jump_at_its_edge(loss):
    eps, t, step = 0.3, 4.0, 1e-9
    # The softmin of r and 2r is eps, or r is, where the penalty ends.
    edge = eps + np.log((1 + np.sqrt(1 + 4 * np.exp(-t * eps))) / 2) / t if loss is crm else eps

    def jump(at, **options):
        below, above = (
            loss(*three_classes(at + s), eps, t=t, weight=10.0, **options) for s in (-step, step)
        )
        return abs(below - above).item()

    if loss is crm:
        logits, _, K_row = three_classes(edge)
        radii = (4.0 - logits[0, 1:]) / K_row[0, 1:]
        assert -torch.logsumexp(-t * radii, 0) / t == pytest.approx(eps)
    assert jump(eps) > 0.1
    assert jump(edge, continuous=True) < 1e-6
    assert jump(eps, continuous=True) < 1e-6


@pytest.mark.parametrize("loss", CRM)
def test_the_continuous_form_has_the_same_gradient_on_small_radii(loss, batch):
    logits, labels, K = batch
    eps, gradients = 0.7, []
    nearest = torch.tensor(radii_of(logits.numpy(), K.numpy())).amin(1)
    small = nearest < eps
    small &= logits.argmax(1) == labels
    assert small.any()
    for continuous in (False, True):
        z = logits.clone().requires_grad_()
        loss(z, labels, row(loss, *batch), eps, continuous=continuous).backward()
        gradients.append(z.grad[small])
    torch.testing.assert_close(*gradients)


@CONTINUOUS
@pytest.mark.parametrize("loss", CRM)
def test_large_radii_and_wrong_predictions_are_left_alone(loss, continuous):
    logits, labels, K_row = three_classes(1.0)
    plain = cross_entropy(logits, labels)
    assert loss(logits, labels, K_row, 0.5, continuous=continuous) == plain
    assert loss(logits, labels, K_row, 1.5, continuous=continuous) != plain
    wrong = torch.tensor([1])
    assert loss(logits, wrong, K_row, 1.5, continuous=continuous) == cross_entropy(logits, wrong)


@CONTINUOUS
@pytest.mark.parametrize("loss", CRM)
def test_nothing_is_penalised_at_radius_zero(loss, continuous):
    logits, labels, K_row = three_classes(0.01)  # with a softmin below zero
    assert loss(logits, labels, K_row, 0.0, continuous=continuous) == cross_entropy(logits, labels)


@CONTINUOUS
@pytest.mark.parametrize("loss", CRM)
def test_the_sum_is_divided_by_the_whole_batch(loss, continuous):
    logits, labels, K_row = three_classes(1.0)
    far = torch.tensor([[50.0, 0.0, 0.0]])

    def penalty(z, y, K):
        value = loss(z, y, K, 1.5, continuous=continuous)
        return value - loss(z, y, K, 0.0)

    alone = penalty(logits, labels, K_row)
    three = torch.cat([logits, far, far])
    beside = penalty(three, labels.expand(3), K_row.expand(3, 3))
    torch.testing.assert_close(beside, alone / 3)


@pytest.mark.parametrize("loss", CRM)
def test_a_class_that_never_comes_nearer_does_not_count(loss):
    """K = 0 against class 2: the penalty of the two classes left, however blunt the softmin."""
    logits, labels, K_row = three_classes(0.4)
    K_row[0, 2] = 0.0

    def penalty(classes):
        z, K = logits[:, :classes], K_row[:, :classes]
        return loss(z, labels, K, 1.0, t=0.01) - loss(z, labels, K, 0.0)

    torch.testing.assert_close(penalty(3), penalty(2))


@CONTINUOUS
@pytest.mark.parametrize("loss", CRM)
def test_an_infinite_constant_means_radius_zero(loss, continuous):
    logits, labels, K_row = three_classes(0.4)
    logits.requires_grad_()
    K_row = K_row.clone().fill_(torch.inf).requires_grad_()
    value = loss(logits, labels, K_row, 1.0, continuous=continuous)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    assert (K_row.grad == 0).all()


@CONTINUOUS
@pytest.mark.parametrize("loss", CRM)
def test_a_broken_constant_shows_in_the_loss(loss, continuous):
    logits, labels, K_row = three_classes(0.4)
    K_row[0, 2] = torch.nan
    assert loss(logits, labels, K_row, 1.0, continuous=continuous).isnan()


@pytest.mark.parametrize("t", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("loss", CRM)
def test_a_sharpness_that_is_not_positive_is_refused(loss, t):
    with pytest.raises(LipcertError, match="sharpness"):
        loss(*three_classes(0.4), 1.0, t=t)


# ---------------------------------------------------------------- hard input


def hard_cases():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    ones = torch.ones(4, 3)
    equal = torch.zeros(4, 3)
    wrong = nn.functional.one_hot((labels + 1) % 3, 3) * 5.0
    single = torch.float32
    return {
        "duplicate classes": (logits, labels, 0 * ones),
        "duplicate classes, equal logits": (equal, labels, 0 * ones),
        "equal logits": (equal, labels, ones),
        "all misclassified": (wrong, labels, ones),
        "huge logits": (1e30 * logits.to(single), labels, ones.to(single)),
        "huge constants": (logits, labels, 1e30 * ones),
        "tiny constants": (logits, labels, 1e-300 * ones),
        "subnormal constants, equal logits": (equal, labels, 1e-310 * ones),
        "huge radii": (1e20 * logits.to(single), labels, 1e-18 * ones.to(single)),
        "one huge radius": (logits, labels, ones.scatter(1, (labels[:, None] + 1) % 3, 1e-150)),
    }


OPTIONS = [(loss, {}) for loss in ALL] + [
    (lmt, {"stabilise": False}),
    *((loss, {"continuous": True}) for loss in CRM),
    *((loss, {"misclassified": True}) for loss in CRM),
    *((loss, {"misclassified": True, "continuous": True}) for loss in CRM),
    (crm, {"classification": boosted_cross_entropy}),
]


@pytest.mark.parametrize("case", hard_cases())
@pytest.mark.parametrize(("loss", "options"), OPTIONS)
def test_values_and_gradients_stay_finite(loss, options, case):
    logits, labels, K_row = (t.clone() for t in hard_cases()[case])
    logits.requires_grad_()
    K_row.requires_grad_()
    value = loss(logits, labels, K_row, 0.5, **options)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    assert K_row.grad is None or K_row.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ALL)
def test_half_precision_logits_are_widened_first(loss, dtype, batch):
    logits, labels, K = batch
    half = logits.to(dtype)
    K_row = row(loss, half, labels, K).float()
    value = loss(half, labels, K_row, 0.7)
    assert value.dtype is torch.float32
    assert value == loss(half.float(), labels, K_row, 0.7)
    with torch.autocast("cpu", dtype=dtype):
        assert loss(half, labels, K_row, 0.7) == value


@pytest.mark.parametrize("eps", [-0.1, float("nan")])
@pytest.mark.parametrize("loss", [lmt, gloro, gloro_trades, emma, *CRM])
def test_a_negative_radius_is_refused(loss, eps, batch):
    logits, labels, _ = batch
    with pytest.raises(LipcertError, match="eps"):
        loss(logits, labels, row(loss, *batch), eps)


def test_a_loss_of_ones_own_says_what_it_protects():
    @losses.protects(losses.prediction)
    def mine(logits, labels, K_row, eps):
        return logits.sum()

    assert mine.protects(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0])).tolist() == [1]


@pytest.mark.parametrize("loss", ALL)
def test_a_label_that_is_no_class_is_an_error(loss):
    z, K_row = torch.randn(4, 3), torch.rand(4, 3)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        loss(z, torch.tensor([0, 1, 2, 3]), K_row, eps=0.5)
