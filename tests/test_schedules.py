import math

import pytest

from lipcert.errors import LipcertError
from lipcert.schedules import Constant, Cosine, Exponential, Linear, Steps

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
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(LipcertError, match=r"start=|value="):
        make()
