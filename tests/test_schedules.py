import math

import pytest

from lipcert.errors import LipcertError
from lipcert.schedules import (
    Constant,
    Cosine,
    EpochRamp,
    Exponential,
    Linear,
    Piecewise,
    Polynomial,
    Steps,
    Switch,
)

RAMPS = [
    Linear(1e-3, 1e-5),
    Linear(0.7, 0.1),
    Cosine(0.3, 0.1),
    Exponential(0.3, 0.1),
    Linear(0.0, 1.58, until=0.5),
]


def test_constant():
    assert [Constant(0.25)(t) for t in (0.0, 0.4, 1.0)] == [0.25] * 3


def test_linear_is_held_outside_its_span():
    ramp = Linear(1.0, 3.0, begin=0.2, until=0.6)
    assert [ramp(t) for t in (0.0, 0.2, 0.6, 1.0)] == [1.0, 1.0, 3.0, 3.0]
    assert ramp(0.3) == pytest.approx(1.5)


def test_cosine_starts_and_ends_flat():
    fall = Cosine(2.0, 0.0, begin=0.5)
    assert [fall(t) for t in (0.0, 0.5, 1.0)] == [2.0, 2.0, 0.0]
    assert fall(0.75) == pytest.approx(1.0)
    assert fall(0.5 + 0.5 / 3) == pytest.approx(2 * (1 + math.cos(math.pi / 3)) / 2)
    assert fall(0.51) > 2 - 0.01 and fall(0.99) < 0.01  # noqa: PT018


def test_steps_change_at_the_given_progress():
    rate = Steps(0.1, 0.5, at=(0.5, 0.75))
    assert [rate(t) for t in (0.0, 0.49, 0.5, 0.75, 1.0)] == [0.1, 0.1, 0.05, 0.025, 0.025]


def test_exponential_falls_by_equal_factors():
    rate = Exponential(1e-3, 1e-6, begin=0.4)
    assert [rate(t) for t in (0.0, 0.4, 1.0)] == [1e-3, 1e-3, 1e-6]
    assert rate(0.6) == pytest.approx(1e-4)
    assert rate(0.8) == pytest.approx(1e-5)


# Rate at the end of an epoch by the code of CRM's authors (github.com/o4lc/CRM-LipLT, commit
# aadf1fa): flat before the first decay, then one factor an epoch down to the last rate.
CRM_RATES = [
    (400, 25, 1e-3, 1e-6, {24: 1e-3, 25: 0.0009817479430199844, 200: 3.9084089579239934e-05}),
    (400, 200, 1e-3, 1e-6, {199: 1e-3, 250: 0.00017179083871575853, 299: 3.162277660168369e-05}),
    (300, 100, 1e-4, 1e-7, {99: 1e-4, 150: 1.7179083871575862e-05, 299: 1e-07}),
]


@pytest.mark.parametrize(("epochs", "begin", "start", "end", "rates"), CRM_RATES)
def test_exponential_meets_the_rates_of_crm_at_the_end_of_each_epoch(
    epochs, begin, start, end, rates
):
    rate = Exponential(1.0, end / start, begin=begin / epochs)
    for epoch, expected in rates.items():
        assert start * rate((epoch + 1) / epochs) == pytest.approx(expected, rel=1e-10)


def begun(epochs, epoch, steps=500):
    """The progress at the first step of an epoch, as the training loop counts it."""
    return epoch * steps / (epochs * steps - 1)


def test_an_epoch_ramp_begins_its_epochs_at_equal_steps_and_rises_inside():
    ramp = EpochRamp(0.5, 1.5, ramp=5, epochs=20, warmup=3)
    begins = [ramp(begun(20, epoch)) for epoch in range(20)]
    assert begins == pytest.approx([0.5] * 3 + [0.5, 0.75, 1.0, 1.25, 1.5] + [1.5] * 12, abs=1e-3)
    assert ramp(2.99 / 20) == 0.5
    for share in (0.25, 0.5, 0.999):
        assert ramp((4 + share) / 20) == pytest.approx(0.75 + share / 5)
        assert ramp((7 + share) / 20) == 1.5  # the last epoch of the ramp begins at its end
        assert ramp((19 + share) / 20) == 1.5
    assert ramp(1.0) == 1.5


def test_an_epoch_ramp_may_fall_and_have_one_epoch():
    kappa = EpochRamp(1.0, 0.0, ramp=4, epochs=4)
    assert [kappa(begun(4, e)) for e in range(4)] == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=2e-3)
    assert kappa(1.0) == 0
    one = EpochRamp(0.0, 1.0, ramp=1, epochs=2)
    assert (one(0.0), one(0.25), one(0.75)) == (0, 0.5, 1)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_every_step_counts_to_its_epoch(steps):
    epochs = 13
    ramp = EpochRamp(0.0, 12.0, ramp=13, epochs=epochs, legacy=True, towards=0.0)
    total = epochs * steps
    found = [ramp(step / (total - 1)) for step in range(total)]
    assert found == pytest.approx([step // steps for step in range(total)], abs=1e-12)


# By the code of the authors: epochs, warm-up, ramp, radius of training and of the test, and by how
# much the values of an epoch after the ramp go beyond the radius, and kappa beyond 0.
OVERSHOOT = [
    (800, 20, 400, 0.1551, 36 / 255, 0.00035, -0.0025),  # Local-Lip on CIFAR-10
    (300, 0, 150, 1.75, 1.58, 0.0105, -0.0067),  # on MNIST
    (250, 0, 125, 0.16, 0.141, 0.0011, -0.008),  # on Tiny-ImageNet
    (200, 10, 121, 36 / 255, 36 / 255, 0.0012, -0.0083),  # BCP on CIFAR-10
    (60, 1, 20, 1.58, 1.58, 0.079, -0.05),  # on MNIST
]


@pytest.mark.parametrize(("epochs", "warmup", "ramp", "eps", "test", "more", "below"), OVERSHOOT)
def test_the_authors_ramps_overshoot_in_every_later_epoch(
    epochs, warmup, ramp, eps, test, more, below
):
    spans = {"ramp": ramp, "epochs": epochs, "warmup": warmup}
    radius = EpochRamp(0.0, eps, **spans, legacy=True, towards=test)
    kappa = EpochRamp(1.0, 0.0, **spans, legacy=True)
    for epoch in (warmup + ramp, epochs - 1):
        begin, end = begun(epochs, epoch, 5000), (epoch + 1) / epochs - 1e-12
        assert radius(begin) == pytest.approx(eps, rel=1e-4)
        assert kappa(begin) == pytest.approx(0, abs=1e-4)
        assert radius(end) - eps == pytest.approx(more, rel=0.05)
        assert kappa(end) == pytest.approx(below, rel=0.02)
        assert EpochRamp(0.0, eps, **spans)(end) == eps
        assert EpochRamp(1.0, 0.0, **spans)(end) == 0
    inside = warmup + 3.5
    expected = eps * 3 / (ramp - 1) + 0.5 * test / ramp
    assert radius(inside / epochs) == pytest.approx(expected)


def test_switch_changes_at_once():
    factor = Switch(0.0, 1.0, at=0.25)
    assert [factor(t) for t in (0.0, 0.2499, 0.25, 1.0)] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("ramp", RAMPS, ids=repr)
def test_ends_are_exact_and_the_way_between_is_monotone(ramp):
    values = [ramp(i / 100) for i in range(101)]
    assert (values[0], values[-1]) == (ramp.start, ramp.end)
    assert values == sorted(values, reverse=ramp.end < ramp.start)


def test_a_schedule_prints_as_it_is_written():
    assert repr(Linear(0.0, 1.0, until=0.5)) == "Linear(start=0.0, end=1.0, begin=0.0, until=0.5)"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(0.0, 1.0, begin=0.5, until=0.5),
        lambda: Linear(0.0, 1.0, until=2.0),
        lambda: Cosine(0.0, 1.0, begin=-0.1),
        lambda: Exponential(1.0, 0.1, begin=1.0),
        lambda: Exponential(1.0, 0.0),
        lambda: Exponential(-1.0, 0.5),
        lambda: Steps(1.0, 0.1, at=(30.0,)),
        lambda: Switch(0.0, 1.0, at=10.0),
        lambda: EpochRamp(0.0, 1.0, ramp=0, epochs=5),
        lambda: EpochRamp(0.0, 1.0, ramp=3, epochs=5, warmup=3),
        lambda: EpochRamp(0.0, 1.0, ramp=3, epochs=5, warmup=-1),
        lambda: EpochRamp(0.0, 1.0, ramp=3, epochs=5, towards=2.0),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(LipcertError, match=r"start=|value=|before="):
        make()


def test_polynomial_moves_the_earlier_the_higher_its_power():
    late, early = Polynomial(2.0, 1.0, 0.5, begin=0.2, until=0.6), Polynomial(2.0, 1.0, 8)
    assert [late(t) for t in (0.0, 0.2, 0.3, 0.6, 1.0)] == [
        2,
        2,
        pytest.approx(1 + 0.75**0.5),
        1,
        1,
    ]
    assert early(0.5) == pytest.approx(1 + 0.5**8)
    assert Polynomial(2.0, 1.0, 1)(0.3) == pytest.approx(Linear(2.0, 1.0)(0.3))


def test_piecewise_goes_straight_from_point_to_point():
    rate = Piecewise(((0.2, 0.5), (0.4, 1.0), (1.0, 0.0)))
    assert [rate(t) for t in (0.0, 0.2, 0.4, 1.0)] == [0.5, 0.5, 1.0, 0.0]
    assert [rate(t) for t in (0.3, 0.7)] == [pytest.approx(0.75), pytest.approx(0.5)]
    assert Piecewise(((0.5, 3.0),))(0.9) == 3.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Polynomial(1.0, 0.0, 0),
        lambda: Polynomial(1.0, 0.0, 2, begin=0.5, until=0.5),
        lambda: Piecewise(()),
        lambda: Piecewise(((0.5, 1.0), (0.5, 0.0))),
        lambda: Piecewise(((-0.1, 1.0), (0.5, 0.0))),
        lambda: Piecewise(((0.0, 1.0), (1.5, 0.0))),
    ],
)
def test_shapes_that_make_no_sense_are_refused(make):
    with pytest.raises(LipcertError, match="Polynomial|Piecewise"):
        make()
