import math

import pytest

from lipcert.errors import LipcertError
from lipcert.schedules import Constant, Cosine, Exponential, Linear, Steps, Switch

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
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(LipcertError, match=r"start=|value=|before="):
        make()
