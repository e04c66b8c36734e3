"""Certificates: what they prove holds, what they cannot prove they do not claim."""

import copy
import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.accuracy import curve, per_class
from lipcert.bounds import Bound, MarginConstants
from lipcert.certificate import Certificate, Claim, from_logits
from lipcert.layers import MaxMin, Normalize
from nets import NETS
from test_api import jaxtyping_off

INF = math.inf


def constants(K, **more):
    """Constants from a table `(classes, classes)`."""
    K = torch.as_tensor(K, dtype=torch.float64)
    return MarginConstants(lambda labels: K[labels], len(K), lc.Kind.UPPER, **more)


def assert_same(certificate, other, **tolerance):
    for name, value in vars(other).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(certificate, name), value, **tolerance)
        elif name == "claims":
            for claim, expected in zip(certificate.claims, value, strict=True):
                assert_same(claim, expected, **tolerance)
        else:
            assert getattr(certificate, name) == value


def product(net, shape, norm=None):
    return lc.Product(lc.trace(net, shape), norm)


@pytest.fixture
def mlp():
    net = NETS["mlp"].build()
    return net, product(net, (6,))


# ---------------------------------------------------------------- the radius


def test_two_classes_by_hand():
    """f(x) = (3 x1 + 4 x2, 0): the boundary is 3 x1 + 4 x2 = 0, K = 5, the radius the distance."""
    net = nn.Linear(2, 2, bias=False)
    net.weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    x = torch.tensor([[1.0, 0.5], [-1.0, -0.5], [0.0, 0.0], [4.0, -3.0], [0.3, 0.4]])
    certificate = lc.certify(net, x, bound=product(net, (2,)))
    assert certificate.prediction.tolist() == [0, 1, 0, 0, 0]
    assert certificate.radius.tolist() == pytest.approx([1, 1, 0, 0, 0.5])
    assert certificate.margins[0].tolist() == pytest.approx([INF, 5])
    assert certificate.claims[0].constants[1].tolist() == pytest.approx([5, 0])
    assert certificate.kind is lc.Kind.UPPER
    assert certificate.failure == 0
    assert certificate.claims[0].valid_radius.tolist() == [INF] * 5
    assert len(certificate) == 5
    assert certificate.robust_at(0.4).tolist() == [True, True, False, False, True]
    assert certificate.robust_at(0.6).tolist() == [True, True, False, False, False]


def test_the_nearest_class_counts_not_the_second_best():
    logits = torch.tensor([[5.0, 4.0, 1.0]])
    K = [[0, 0.5, 8], [0.5, 0, 1], [8, 1, 0]]
    certificate = from_logits(logits, constants(K))
    assert float(certificate.radius) == pytest.approx(0.5)
    assert certificate.margins.tolist() == [[INF, pytest.approx(1), pytest.approx(4)]]
    assert certificate.claims[0].constants.tolist() == [[0, 0.5, 8]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_radius_is_rounded_down(dtype):
    scale = 10.0 ** torch.randint(-12, 12, (400, 1))
    logits = (torch.randn(400, 4) * scale).to(dtype)
    K = torch.rand(4, 4, dtype=torch.float64) * 10.0 ** torch.randint(-8, 8, (4, 4))
    certificate = from_logits(logits, constants(K))
    for i, p in enumerate(certificate.prediction.tolist()):
        row = [Fraction(v) for v in logits[i].tolist()]
        ratios = [(row[p] - row[j]) / Fraction(K[p, j].item()) for j in range(4) if j != p]
        radius = Fraction(certificate.radius[i].item())
        assert radius < min(ratios) * (1 - Fraction(0))
        assert radius >= min(ratios) * (1 - Fraction(1, 2**49))


def test_tiny_margins_keep_a_radius_of_zero():
    """Where the quotient underflows, rounding down must not leave the range of radii."""
    certificate = from_logits(torch.tensor([[1e-200, 0.0]]), constants(1e200 * torch.ones(2, 2)))
    assert certificate.radius.tolist() == [0]
    assert certificate.margins[0, 1] > 0


def test_constants_of_zero_give_an_infinite_radius_where_the_margin_is_positive():
    logits = torch.tensor([[2.0, 1.0], [1.0, 1.0], [5e-324, 0.0]])
    certificate = from_logits(logits, constants(torch.zeros(2, 2)))
    assert certificate.radius.tolist() == [INF, 0, 0]  # nothing is left of the least margin
    assert certificate.robust_at(1e9).tolist() == [True, False, False]


@pytest.mark.parametrize(
    "logits",
    [
        [1.0, 1.0, 0.0],
        [2.0, math.nan, 1.0],
        [math.nan, math.nan, math.nan],
        [INF, 0.0, 0.0],
        [1.0, -INF, -INF],
        [INF, INF, 0.0],
        [-INF, -INF, -INF],
    ],
)
@pytest.mark.parametrize("size", [0.0, 1e-300, 1.0])
def test_ties_and_broken_logits_prove_nothing(logits, size):
    certificate = from_logits(torch.tensor([logits]), constants(size * torch.ones(3, 3)))
    assert certificate.radius.tolist() == [0]
    for eps in (1e-300, 1e-6, 1.0):
        assert certificate.robust_at(eps).tolist() == [False]


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_broken_constants_prove_nothing(bad):
    K = torch.ones(3, 3)
    K[0, 2] = bad
    logits = torch.tensor([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0]])
    certificate = from_logits(logits, constants(K))
    assert certificate.radius.tolist() == [0, pytest.approx(1)]
    assert certificate.robust_at(1e-6).tolist() == [False, True]


def test_the_diagonal_is_never_read():
    K = torch.ones(3, 3).fill_diagonal_(math.nan)
    certificate = from_logits(torch.tensor([[3.0, 2.0, 1.0]]), constants(K))
    assert certificate.radius.tolist() == [pytest.approx(1)]
    assert certificate.robust_at(0.5).all()


def test_nothing_is_certified_beyond_the_radius_of_the_constants():
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [1.0, 0.0]])
    valid = torch.tensor([0.5, 10.0, 2.0])
    certificate = from_logits(logits, constants(torch.ones(2, 2), valid_radius=valid))
    assert certificate.radius.tolist() == pytest.approx([0.5, 3, 1])
    assert certificate.robust_at(0.5).tolist() == [True, True, True]
    assert certificate.robust_at(0.6).tolist() == [False, True, True]
    assert certificate.robust_at(2.5).tolist() == [False, True, False]


# ---------------------------------------------------------------- robust_at


def test_robust_at_is_strict():
    certificate = from_logits(torch.tensor([[1.0, 0.0]]), constants(torch.ones(2, 2)))
    assert not certificate.robust_at(1).any()
    assert not certificate.robust_at(1 - 1e-16).any()
    assert certificate.robust_at(1 - 1e-15).all()


def test_robust_at_asks_for_more_than_the_rounded_up_fall():
    up = math.nextafter(0.3 * 0.1, INF)
    for margin, robust in ((up, False), (math.nextafter(up, INF), True)):
        certificate = Certificate(
            prediction=torch.tensor([0]),
            radius=torch.tensor([0.0]),
            kind=lc.Kind.UPPER,
            failure=0.0,
            margins=torch.tensor([[INF, margin]]),
            claims=(
                Claim(torch.tensor([[0.0, 0.3]]), torch.full((1, 2), INF), torch.tensor([INF])),
            ),
        )
        assert certificate.robust_at(0.1).tolist() == [robust]


def test_robust_at_agrees_with_the_radius():
    certificate = from_logits(torch.randn(500, 6), constants(torch.rand(6, 6)))
    assert (certificate.radius > 0).all()
    for eps in certificate.radius.tolist():
        sure = certificate.radius >= eps * (1 + 1e-14)
        never = certificate.radius <= eps * (1 - 1e-14)
        robust = certificate.robust_at(eps)
        assert robust[sure].all()
        assert not robust[never].any()


def test_robust_at_is_true_in_exact_arithmetic():
    logits, K = torch.randn(300, 3), torch.rand(3, 3)
    certificate = from_logits(logits, constants(K))
    for i, p in enumerate(certificate.prediction.tolist()):
        row = [Fraction(v) for v in logits[i].tolist()]
        for eps in np.nextafter(certificate.radius[i].item(), [0, 0, INF, INF]):
            falls = [Fraction(K[p, j].item()) * Fraction(eps) for j in range(3) if j != p]
            kept = [row[p] - row[j] for j in range(3) if j != p]
            if certificate.robust_at(eps)[i]:
                assert all(k > f for k, f in zip(kept, falls, strict=True))


@pytest.mark.parametrize("eps", [0, -1.0, INF, math.nan, -INF])
def test_radii_that_are_none_are_refused(eps):
    certificate = from_logits(torch.tensor([[1.0, 0.0]]), constants(torch.ones(2, 2)))
    with pytest.raises(lc.LipcertError, match="must be a positive finite number, e.g. 36/255"):
        certificate.robust_at(eps)


# ---------------------------------------------------------------- refusals


def test_estimates_are_refused_or_labelled(mlp):
    net, exact = mlp
    bound = lc.Product(exact.graph, lc.PowerIteration(1))
    x = torch.rand(4, 6)
    with pytest.raises(lc.LipcertError, match=r"estimate.*lc.Ellipsoid\(graph\)"):
        lc.certify(net, x, bound=bound)
    certificate = lc.certify(net, x, bound=bound, allow_estimate=True)
    assert certificate.kind is lc.Kind.ESTIMATE
    assert lc.certify(net, x, bound=exact, allow_estimate=True).kind is lc.Kind.UPPER


def test_probabilistic_bounds_keep_their_label():
    net = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 3))
    bound = product(net, (30,), lc.Lanczos(1e-7, steps=10))
    certificate = lc.certify(net, torch.rand(9, 30), bound=bound, batch_size=2)
    assert certificate.kind is lc.Kind.PROBABILISTIC
    assert certificate.failure == pytest.approx(1e-7)  # computed once


def test_another_or_a_changed_network_is_refused(mlp):
    net, bound = mlp
    x = torch.rand(4, 6)
    with pytest.raises(lc.LipcertError, match=r"another network.*lc.trace\(net, input_shape\)"):
        lc.certify(copy.deepcopy(net), x, bound=bound)
    net[1] = nn.Tanh()
    with pytest.raises(lc.LipcertError, match=r"changed after it was traced, at: 1.*again"):
        lc.certify(net, x, bound=bound)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_broken_weights_are_refused(mlp, bad):
    net, bound = mlp
    net[2].weight.data[0, 0] = bad
    with pytest.raises(lc.LipcertError, match=r"NaN or infinite weights in: 2\.weight.*reload"):
        lc.certify(net, torch.rand(4, 6), bound=bound)


@pytest.mark.parametrize("shape", [(4, 5), (4, 6, 1), (4,), (6,)])
def test_wrong_shapes_are_refused(mlp, shape):
    net, bound = mlp
    with pytest.raises(lc.LipcertError, match=r"The inputs have shape.*traced for \(n, 6\)"):
        lc.certify(net, torch.rand(shape), bound=bound)


def test_no_samples_and_no_batch_size_are_refused(mlp):
    net, bound = mlp
    with pytest.raises(lc.LipcertError, match="no samples to certify"):
        lc.certify(net, torch.rand(0, 6), bound=bound)
    with pytest.raises(lc.LipcertError, match="batch_size=0"):
        lc.certify(net, torch.rand(1, 6), bound=bound, batch_size=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    net = NETS["mlp"].build().to(dtype)
    with pytest.raises(lc.LipcertError, match=r"float32 or float64 \(net.float\(\)\)"):
        lc.certify(net, torch.rand(4, 6, dtype=dtype), bound=product(net, (6,)))


def test_one_logit_is_refused():
    net = nn.Linear(3, 1)
    with pytest.raises(lc.LipcertError, match="one logit a class"):
        lc.certify(net, torch.rand(2, 3), bound=product(net, (3,)))


# ---------------------------------------------------------------- running


def test_batches_equal_one_batch_and_are_reported(mlp):
    net, bound = mlp
    x = torch.randn(23, 6)
    done = []
    whole = lc.certify(net, x, bound=bound)
    parts = lc.certify(net, x, bound=bound, batch_size=5, on_batch=done.append)
    assert done == [5, 10, 15, 20, 23]
    assert_same(parts, whole)
    assert (parts.prediction == net(x).argmax(1)).all()


def test_constants_evaluated_before_are_taken_as_they_are(mlp, monkeypatch):
    net, bound = mlp
    x = torch.randn(4, 6)
    expected, constants = lc.certify(net, x, bound=bound), bound()
    doubled = MarginConstants(lambda labels: 2 * constants.row(labels), 3, constants.kind)
    monkeypatch.setattr(type(bound), "forward", None)  # not evaluated again
    assert_same(lc.certify(net, x, bound=bound, constants=constants), expected)
    halved = lc.certify(net, x, bound=bound, constants=doubled)
    torch.testing.assert_close(halved.radius, expected.radius / 2)
    guess = MarginConstants(constants.row, 3, lc.Kind.ESTIMATE)
    with pytest.raises(lc.LipcertError, match="estimate"):
        lc.certify(net, x, bound=bound, constants=guess)
    other = NETS["mlp"].build(1)
    with pytest.raises(lc.LipcertError, match="traced"):
        lc.certify(other, x, bound=bound, constants=constants)


def test_the_network_runs_in_eval_mode_and_gets_its_mode_back():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    x = torch.randn(7, 6)
    bound = product(net.train(), (6,))
    net[2].eval()
    modes = [m.training for m in net.modules()]
    state = copy.deepcopy(net.state_dict())
    certificate = lc.certify(net, x, bound=bound)
    assert [m.training for m in net.modules()] == modes
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert_same(certificate, lc.certify(net.eval(), x, bound=bound))
    net.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        lc.certify(net, x, bound=bound, on_batch=lambda done: _raise("out of memory"))
    assert net.training


def _raise(message):
    raise RuntimeError(message)


def test_autocast_and_wrappers_change_nothing():
    net = NETS["conv"].build().float()
    x = torch.rand(5, *NETS["conv"].shape)
    bound = product(net, NETS["conv"].shape)
    plain = lc.certify(net, x, bound=bound)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = lc.certify(net, x, bound=bound)
    assert_same(mixed, plain, rtol=0, atol=0)
    wrapped = lc.certify(nn.DataParallel(net), x, bound=bound)
    assert_same(wrapped, plain, rtol=0, atol=0)
    assert plain.radius.dtype == plain.margins.dtype == torch.float64
    assert not plain.radius.requires_grad


def test_networks_without_parameters_have_a_precision_too():
    net = nn.Sequential(Normalize([0.5], [2.0]), nn.Flatten()).float()
    x = torch.rand(3, 1, 2)
    certificate = lc.certify(net, x, bound=product(net, (1, 2)))
    assert (certificate.radius > 0).all()


def test_float32_networks_get_nearly_the_radii_of_float64():
    net, x = NETS["resnet"].build(), torch.rand(20, *NETS["resnet"].shape)
    double = lc.certify(net, x, bound=product(net, NETS["resnet"].shape))
    single = lc.certify(net.float(), x, bound=product(net, NETS["resnet"].shape))
    torch.testing.assert_close(single.radius, double.radius, rtol=1e-3, atol=1e-6)


class Around(Bound):
    """A stand-in for a local bound: the constants of a sample are its first entry."""

    local = True

    def forward(self, x=None):
        assert x is not None
        rows = x[:, :1].expand(-1, self.classes)
        return MarginConstants(
            lambda labels: rows,
            self.classes,
            lc.Kind.PROBABILISTIC,
            failure=0.01,
            batch=len(x),
            valid_radius=x[:, 1],
        )


def test_local_bounds_get_their_batch(mlp):
    net, bound = mlp
    x = torch.rand(10, 6) + 0.1
    certificate = lc.certify(net, x, bound=Around(bound.graph), batch_size=4)
    torch.testing.assert_close(certificate.claims[0].constants.amax(1), x[:, 0])
    torch.testing.assert_close(certificate.claims[0].valid_radius, x[:, 1])
    assert certificate.failure == pytest.approx(0.03)  # three calls
    x[:, 1] = INF
    assert lc.certify(net, x, bound=Around(bound.graph), batch_size=4).failure > 0.025


def test_a_local_estimate_is_refused(mlp):
    class Guess(Around):
        def forward(self, x=None):
            made = super().forward(x)
            return MarginConstants(made.row, 3, lc.Kind.ESTIMATE, batch=len(x))

    net, bound = mlp
    with pytest.raises(lc.LipcertError, match="proves nothing"):
        lc.certify(net, torch.rand(3, 6), bound=Guess(bound.graph))


# ---------------------------------------------------------------- several claims


def several(n=60, classes=4, members=3, seed=0):
    """Logits, and constants of members with balls of different radii, some with drops."""
    torch.manual_seed(seed)
    logits = 2 * torch.randn(n, classes)
    made = []
    for member in range(members):
        K, fall = 0.2 + 3 * torch.rand(n, classes), 4 * torch.rand(n, classes)
        made.append(
            MarginConstants(
                lambda labels, K=K: K,
                *(classes, lc.Kind.UPPER),
                batch=n,
                valid_radius=10.0 ** torch.empty(n).uniform_(-1.5, 1),
                drop=(lambda labels, fall=fall: fall) if member else None,
            )
        )
    return logits, dataclasses.replace(made[0], others=tuple(made[1:])), made


def proved(margin, K, fall, valid):
    """Up to which radius one member proves one margin, before rounding."""
    if not margin > 0:
        return 0.0
    return valid if margin > fall else min(margin / K, valid)


def by_hand(logits, members):
    """The largest radius of the members for each class, and of those the least."""
    radii = []
    for i, row in enumerate(logits.tolist()):
        best = max(range(len(row)), key=row.__getitem__)
        against = []
        for j in range(len(row)):
            if j != best:
                each = []
                for m in members:
                    labels = torch.full((len(logits),), best)
                    fall = INF if m.drop is None else m.drop(labels)[i, j].item()
                    K, valid = m.row(labels)[i, j].item(), m.valid_radius[i].item()
                    each.append(proved(row[best] - row[j], K, fall, valid))
                against.append(max(each))
        radii.append(min(against))
    return radii


@pytest.mark.parametrize("members", [1, 2, 3])
def test_radii_of_several_claims_are_those_of_a_slow_computation(members):
    logits, constants, made = several(members=members)
    certificate = from_logits(logits, constants)
    assert len(certificate.claims) == members
    expected = by_hand(logits, made)
    np.testing.assert_allclose(certificate.radius, expected, rtol=1e-12)
    assert (certificate.radius.numpy() <= np.array(expected)).all()
    if members > 1:  # the members take turns, and no single one says as much for some samples
        alone = torch.stack([from_logits(logits, m).radius for m in made])
        assert (certificate.radius >= alone.amax(0)).all()
        assert (certificate.radius > alone.amax(0) * 1.01).any()
        assert len(set(alone.argmax(0).tolist())) == members


def test_robustness_of_several_claims_is_that_of_a_slow_computation():
    """For each class some member whose ball reaches that far, one for all classes or not."""
    logits, constants, made = several()
    certificate = from_logits(logits, constants)
    valid = torch.stack([m.valid_radius for m in made])
    tested = [0.03, 0.2, 1.0, 5.0, *valid[:, :8].flatten().tolist()]
    for eps in tested:
        kept = torch.zeros(3, 60, 4, dtype=torch.bool)
        for m, made_by in enumerate(made):
            K = made_by.row(certificate.prediction)
            fall = K * eps
            if made_by.drop is not None:
                fall = torch.minimum(fall, made_by.drop(certificate.prediction))
            inside = (eps <= made_by.valid_radius)[:, None]
            kept[m] = inside & (certificate.margins > fall)
            kept[m] |= inside & torch.nn.functional.one_hot(certificate.prediction, 4).bool()
        assert torch.equal(certificate.robust_at(eps), kept.any(0).all(1))


def test_just_below_and_above_the_ball_of_a_member():
    """The drop proves its whole ball, and not a bit more; then another member has to."""
    near = MarginConstants(
        lambda labels: torch.tensor([[0.0, 9.0], [0.0, 9.0]]),
        *(2, lc.Kind.UPPER),
        batch=2,
        valid_radius=torch.tensor([0.3, 0.3]),
        drop=lambda labels: torch.tensor([[0.0, 0.9], [0.0, 1.1]]),
    )
    far = MarginConstants(lambda labels: torch.full((2, 2), 2.5), 2, lc.Kind.UPPER)
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    below, above = math.nextafter(0.3, 0), math.nextafter(0.3, INF)
    certificate = from_logits(logits, near)
    assert certificate.radius.tolist() == [0.3, pytest.approx(1 / 9)]
    for eps, robust in ((below, True), (0.3, True), (above, False)):
        assert certificate.robust_at(eps).tolist() == [robust, False]
    together = from_logits(logits, dataclasses.replace(near, others=(far,)))
    assert together.radius.tolist() == pytest.approx([0.4, 0.4])
    assert together.robust_at(above).all()
    assert not together.robust_at(0.4001).any()


def test_a_drop_is_strict_and_rounded_up():
    """A margin that is its drop is no proof of the whole ball."""
    margin = math.nextafter(1.0, 0)  # what is left of 1 - 0 after rounding down
    for fall, whole in ((margin, False), (math.nextafter(margin, 0), False), (0.999, True)):
        constants = MarginConstants(
            lambda labels: torch.full((1, 2), 4.0),
            *(2, lc.Kind.UPPER),
            batch=1,
            valid_radius=torch.tensor([3.0]),
            drop=lambda labels, fall=fall: torch.full((1, 2), fall),
        )
        certificate = from_logits(torch.tensor([[1.0, 0.0]]), constants)
        assert certificate.radius.item() == pytest.approx(3 if whole else 0.25)
        assert certificate.robust_at(2.9).item() == whole


def with_broken_member(place, bad):
    """Radii, and robustness within 1e-9 and 0.2, where one of two samples has a broken member.

    The other sample's member proves a ball of 0.3. A first member that is whole proves 0.04.
    """
    given = {
        "row": torch.ones(2, 2),
        "drop": 0.5 * torch.ones(2, 2),
        "valid": torch.tensor([0.3, 0.3]),
        "logits": torch.tensor([[4.0, 0.0], [4.0, 0.0]]),
    }
    given[place][0] = torch.tensor([4.0, bad]) if place == "logits" else bad
    member = MarginConstants(
        lambda labels: given["row"],
        *(2, lc.Kind.UPPER),
        batch=2,
        valid_radius=given["valid"],
        drop=lambda labels: given["drop"],
    )
    weak = MarginConstants(lambda labels: 100 * torch.ones(2, 2), 2, lc.Kind.UPPER)
    for constants in (member, dataclasses.replace(weak, others=(member,))):
        certificate = from_logits(given["logits"], constants)
        robust = [certificate.robust_at(eps).tolist() for eps in (1e-9, 0.2)]
        assert certificate.radius[1] == pytest.approx(0.3)
        assert all(r[1] for r in robust)
        yield certificate.radius[0].item(), [r[0] for r in robust]


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_broken_constants_of_a_member_prove_nothing(bad):
    alone, beside = with_broken_member("row", bad)
    assert alone == (0, [False, False])
    assert beside == (pytest.approx(0.04), [True, False])


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_broken_logits_prove_nothing_with_any_member(bad):
    assert list(with_broken_member("logits", bad)) == [(0, [False, False])] * 2


def test_an_infinite_drop_leaves_the_constant():
    assert list(with_broken_member("drop", INF)) == [(pytest.approx(0.3), [True, True])] * 2


def test_radii_and_robustness_agree_on_drops_that_are_no_numbers():
    for radius, robust in with_broken_member("drop", math.nan):
        assert robust == [radius > 1e-9, radius > 0.2]


def test_balls_that_are_no_numbers_prove_nothing():
    alone, beside = with_broken_member("valid", math.nan)
    assert alone == (0, [False, False])
    assert beside == (pytest.approx(0.04), [True, False])


class Shrinking(Bound):
    """A stand-in whose constant grows with the ball: K = 1 + eps^2 around each sample."""

    local = True

    def __init__(self, graph, start):
        super().__init__(graph)
        self.start, self.asked = start, []

    def forward(self, x=None, eps=None, index=None):
        eps = torch.as_tensor(self.start if eps is None else eps).expand(len(x)).double()
        self.asked.append(eps)
        K = (1 + eps.square())[:, None].expand(-1, self.classes)
        return MarginConstants(
            lambda labels: K, self.classes, lc.Kind.UPPER, batch=len(x), valid_radius=eps
        )


@pytest.mark.parametrize("start", [1e-3, 0.1, 0.7, 30.0])
def test_bisections_find_the_largest_ball_that_proves_itself(start):
    """margin = (1 + r^2) r has one root r: below it a ball proves itself, above it does not."""
    net = nn.Linear(1, 2, bias=False)
    net.weight.data = torch.tensor([[1.0], [0.0]])
    x = torch.tensor([[0.01], [0.4], [2.0], [100.0], [0.0], [-3.0]])
    margin = x.abs().flatten().numpy()
    cubics = [np.roots([1, 0, 1, -m]) for m in margin]
    roots = np.array([c.real[np.abs(c.imag) < 1e-9].max() for c in cubics])
    before = None
    for bisections in (0, 1, 2, 5, 60):
        bound = Shrinking(lc.trace(net, (1,)), start)
        certificate = lc.certify(net, x, bound=bound, bisections=bisections)
        radius = certificate.radius.numpy()
        assert len(bound.asked) == bisections + 1
        assert (radius <= roots * (1 + 1e-12)).all()
        # What is claimed is what the ball of the claim proves, and within it.
        (claim,) = certificate.claims
        assert (radius <= claim.valid_radius.numpy()).all()
        K = 1 + claim.valid_radius.square()
        torch.testing.assert_close(claim.constants.amax(1), K)
        assert (radius * K.numpy() <= margin * (1 + 1e-15)).all()
        for r in radius[radius > 0]:
            assert certificate.robust_at(r * (1 - 1e-12))[torch.tensor(radius == r)].all()
            assert not certificate.robust_at(r * (1 + 1e-12))[torch.tensor(radius == r)].any()
        if before is not None:
            assert (radius >= before).all()
        before = radius
    np.testing.assert_allclose(radius, roots, rtol=1e-9, atol=1e-12)


def test_bisections_of_each_batch_count_their_failures():
    class Risky(Shrinking):
        def forward(self, x=None, eps=None, index=None):
            made = super().forward(x, eps)
            return dataclasses.replace(made, kind=lc.Kind.PROBABILISTIC, failure=1e-3)

    net = nn.Linear(1, 2, bias=False)
    bound = Risky(lc.trace(net, (1,)), 0.1)
    found = lc.certify(net, torch.rand(5, 1), bound=bound, bisections=4, batch_size=2)
    assert found.failure == pytest.approx(3 * 5 * 1e-3)
    assert found.kind is lc.Kind.PROBABILISTIC


def test_samples_of_other_precisions_and_no_samples_are_refused_by_local_bounds(mlp):
    net, bound = mlp
    near = lc.Product(bound.graph, region=lc.L2Ball(0.1))
    for local in (near, lc.LipLT(bound.graph, region=lc.L2Ball(0.1)), lc.tightest(near, bound)):
        with pytest.raises(lc.LipcertError, match=r"float32 or float64: x.float\(\)"):
            lc.certify(net, torch.rand(2, 6).half(), bound=local)
        with pytest.raises(lc.LipcertError, match="no samples to certify"):
            lc.certify(net, torch.rand(0, 6), bound=local)
        assert len(lc.certify(net, torch.rand(1, 6), bound=local)) == 1


def test_radii_are_in_the_units_of_the_input():
    """Scaling inside the network is part of the bound: the radius is a distance in pixels."""
    W, b = torch.randn(3, 4), torch.randn(3)
    net = nn.Sequential(Normalize([0.5, 0.4], [0.25, 0.1]), nn.Flatten(), nn.Linear(4, 3))
    net[2].weight.data, net[2].bias.data = W, b
    x = torch.rand(50, 2, 2)
    certificate = lc.certify(net, x, bound=product(net, (2, 2)))
    pixels = W / torch.tensor([0.25, 0.25, 0.1, 0.1])
    logits = net(x)
    for i, p in enumerate(certificate.prediction.tolist()):
        distances = [
            ((logits[i, p] - logits[i, j]) / (pixels[p] - pixels[j]).norm()).item()
            for j in range(3)
            if j != p
        ]
        assert certificate.radius[i].item() == pytest.approx(min(distances))


# ---------------------------------------------------------------- attacks


def trained(layers, shape):
    """A classifier of noisy prototypes in [0, 1], trained by LMT, with its samples and labels."""
    prototypes = torch.rand(3, *shape).round()
    labels = torch.arange(120) % 3
    x = (prototypes[labels] + 0.3 * torch.randn(120, *shape)).clamp(0, 1)
    net = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))
    net(x)
    bound = product(net, shape, lc.PowerIteration(1))
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(80):
        optimiser.zero_grad()
        lc.losses.lmt(net.train()(x), labels, bound().row(labels), 0.2).backward()
        optimiser.step()
    return net, x, labels


TOYS = {
    "dense": (lambda: (nn.Linear(6, 16), MaxMin(), nn.Linear(16, 16), nn.ReLU()), (6,)),
    "convolutional": (
        lambda: (
            *(Normalize([0.5], [0.5]), nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)),
            *(nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.LeakyReLU(0.2)),
        ),
        (1, 6, 6),
    ),
}


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_no_attack_inside_a_certified_ball_succeeds(name, dtype):
    layers, shape = TOYS[name]
    net, x, labels = trained(layers(), shape)
    net, x = net.to(dtype), x.to(dtype)
    certificate = lc.certify(net, x, bound=product(net, shape))
    assert lc.clean_accuracy(certificate, labels) > 0.9
    assert (certificate.radius > 0).all()
    inside = lc.pgd(net, x, certificate.prediction, certificate.radius, 40, 3, clip=None)
    assert not inside.found.any()
    assert (inside.distance <= certificate.radius).all()
    assert (inside.distance > 0.5 * certificate.radius).double().mean() > 0.9
    further = lc.pgd(net, x, certificate.prediction, 20 * certificate.radius, 40, 1, clip=None)
    assert further.found.double().mean() > 0.5


# ---------------------------------------------------------------- tables


@pytest.fixture
def judged():
    """A certificate of random logits with ties and wrong predictions, and labels."""
    logits = torch.randn(101, 4)
    logits[::9] = logits[::9].round()
    labels = torch.where(torch.rand(101) < 0.7, logits.argmax(1), torch.randint(4, (101,)))
    return from_logits(logits, constants(1 + torch.rand(4, 4))), labels


def naive(certificate, labels):
    """Radius of every sample, -1 where the prediction is wrong; NumPy arrays."""
    right = certificate.prediction.numpy() == labels.numpy()
    return right, np.where(right, certificate.radius.numpy(), -1)


def test_accuracies_are_fractions_of_samples(judged):
    right, radius = naive(*judged)
    assert 0.5 < right.mean() < 1
    assert lc.clean_accuracy(*judged) == right.mean()
    for eps in (1e-9, 0.1, 0.37, 2.0):
        assert lc.certified_accuracy(*judged, eps) == (radius > eps).mean()
    assert lc.average_certified_radius(*judged) == pytest.approx(radius.clip(min=0).mean())


def test_the_curve_is_certified_accuracy_over_radii(judged):
    right, radius = naive(*judged)
    radii = torch.cat([torch.linspace(0, 1.5, 50), judged[0].radius[:20]])
    expected = [(radius >= r).mean() for r in radii.tolist()]
    values = curve(*judged, radii)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12)
    assert values[0] == right.mean()
    for eps in (0.1, 0.5):
        (value,) = curve(*judged, torch.tensor([eps]))
        assert value.item() == pytest.approx(lc.certified_accuracy(*judged, eps))


def test_the_table_of_classes(judged):
    right, radius = naive(*judged)
    labels = judged[1].numpy()
    rows = per_class(*judged, [0.1, 0.5])
    assert [row.label for row in rows] == [0, 1, 2, 3]
    assert sum(row.samples for row in rows) == 101
    for row in rows:
        of = labels == row.label
        assert row.samples == of.sum()
        assert row.clean_accuracy == pytest.approx(right[of].mean())
        for eps in (0.1, 0.5):
            assert row.certified_accuracy[eps] == pytest.approx((radius[of] > eps).mean())
        ordered = np.sort(radius[of].clip(min=0))
        assert row.median_radius == ordered[(len(ordered) - 1) // 2]  # the lower of two


def test_classes_without_samples_have_no_row():
    certificate = from_logits(torch.eye(3), constants(torch.ones(3, 3)))
    assert [row.label for row in per_class(certificate, torch.tensor([2, 2, 0]), [])] == [0, 2]


def test_unbounded_radii_are_counted():
    certificate = from_logits(torch.eye(2), constants(torch.zeros(2, 2)))
    labels = torch.tensor([0, 1])
    assert isinstance(certificate, Certificate)
    assert lc.certified_accuracy(certificate, labels, 1e6) == 1
    assert curve(certificate, labels, torch.tensor([0.0, 1e6])).tolist() == [1, 1]
    assert lc.average_certified_radius(certificate, labels) == INF


class Scaled(nn.Module):
    """Its divisor is in no module's settings."""

    def __init__(self):
        super().__init__()
        self.dense, self.divisor = nn.Linear(4, 3), 1.0

    def forward(self, x):
        return self.dense(x) / self.divisor + torch.relu(x[:, :3])


def test_a_network_that_changed_without_a_trace_is_refused():
    net, x = Scaled(), torch.rand(5, 4)
    bound = lc.Product(lc.trace(net, (4,)))
    lc.certify(net, x, bound=bound)
    net.divisor = 0.01
    with pytest.raises(lc.LipcertError, match="does not compute what was traced"):
        lc.certify(net, x, bound=bound)


def test_a_replaced_forward_is_refused():
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.rand(5, 4)
    plain = net[0].forward
    net[0].forward = lambda t: 10 * plain(t)
    with pytest.raises(lc.LipcertError, match="does not compute what was traced"):
        lc.certify(net, x, bound=lc.Product(lc.trace(net, (4,))))


class Lonely(nn.Module):
    """Another function for a sample alone."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(4, 3)

    def forward(self, x):
        return self.dense(x) * (1 if x.shape[0] > 1 else 100)


def test_a_network_that_looks_at_the_size_of_the_batch_is_refused():
    net = Lonely()
    with pytest.raises(lc.LipcertError, match=r"trace|batch"):
        lc.certify(net, torch.rand(5, 4), bound=lc.Product(lc.trace(net, (4,))))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"bisections": -1}, "bisections"),
        ({"bisections": 2.5}, "bisections"),
        ({"batch_size": 1.5}, "batch_size"),
    ],
)
def test_counts_that_are_none_are_refused(words, match):
    net = nn.Sequential(nn.Linear(4, 3))
    bound = lc.Product(lc.trace(net, (4,)))
    with jaxtyping_off(), pytest.raises(lc.LipcertError, match=match):
        lc.certify(net, torch.rand(5, 4), bound=bound, **words)
    with jaxtyping_off(), pytest.raises(lc.LipcertError, match="give a tensor"):
        lc.certify(net, torch.rand(5, 4).numpy(), bound=bound)
