"""The largest value of a linear function in a ball and box, against bisection and points."""

import math

import numpy as np
import pytest
import torch

import lipcert as lc
from lipcert.bounds.ball_box import ball_box
from test_api import jaxtyping_off

INF = math.inf


def by_bisection(w, lower, upper, radius):
    """The same for one w, all NumPy: d = clip(t w) with t as large as the ball allows."""
    lower, upper = np.minimum(lower, 0), np.maximum(upper, 0)
    corner = np.where(w > 0, upper, np.where(w < 0, lower, 0))
    if np.linalg.norm(corner) <= radius:
        return float(w @ corner)
    if radius == 0:
        return 0.0
    low, high = -200.0, 200.0  # of log10 t
    for _ in range(200):
        middle = (low + high) / 2
        d = np.clip(10**middle * w, lower, upper)
        low, high = (middle, high) if np.linalg.norm(d) <= radius else (low, middle)
    return float(w @ np.clip(10**low * w, lower, upper))


def problem(b=6, c=5, n=12, shrink=True):
    """Random functions, boxes of very different sides, and radii where both sides matter."""
    w = torch.randn(b, c, n)
    lower, upper = -(torch.rand(b, n) ** 3), torch.rand(b, n) ** 3
    w[:, 1, ::3] = 0
    lower[1, ::2] = 0
    upper[2, ::3] = 0
    lower[3, 1], upper[3, 1] = 0, 0
    radius = torch.logspace(-2, 0.5, b)
    return w, lower, upper, radius


def expected(w, lower, upper, radius):
    arrays = [a.detach().numpy() for a in (w, lower, upper, radius)]
    return torch.tensor(
        [
            [by_bisection(row, low, up, r) for row in rows]
            for rows, low, up, r in zip(*arrays, strict=True)
        ]
    )


@pytest.mark.parametrize("seed", range(5))
def test_values_of_bisection(seed):
    torch.manual_seed(seed)
    given = problem()
    torch.testing.assert_close(ball_box(*given), expected(*given), rtol=1e-9, atol=1e-12)


def test_ball_and_box_both_decide_in_these_problems():
    w, lower, upper, radius = problem()
    value = ball_box(w, lower, upper, radius)
    ball = w.norm(dim=2) * radius[:, None]
    box = torch.where(w > 0, w * upper[:, None], w * lower[:, None]).sum(2)
    assert (value <= torch.minimum(ball, box) * (1 + 1e-12)).all()
    both = value < 0.99 * torch.minimum(ball, box)
    assert both.double().mean() > 0.3
    assert (value > 0.999 * box).any()  # the ball does not matter


def test_nothing_in_ball_and_box_is_above():
    w, lower, upper, radius = problem()
    value = ball_box(w, lower, upper, radius)
    d = torch.randn(2000, 6, 12) * radius[:, None] * torch.rand(2000, 1, 1) * 4
    d[1::2] = (w[torch.arange(6), torch.randint(5, (1000, 6))] * torch.rand(1000, 6, 1) * 5) * (
        radius[:, None]
    )
    d = d.clamp(lower, upper)
    d = d * (radius / d.norm(dim=2)).clamp(max=1)[:, :, None]  # 0 is in the box: still inside it
    reached = torch.einsum("bcn,pbn->pbc", w, d)
    assert (reached <= value + 1e-12).all()
    assert (reached.amax(0) > 0.8 * value).double().mean() > 0.5


def test_it_grows_with_the_ball_and_the_box():
    w, lower, upper, radius = problem()
    value = ball_box(w, lower, upper, radius)
    for wider in (
        (w, lower, upper, 1.3 * radius),
        (w, 1.3 * lower, upper, radius),
        (w, lower, upper + 0.01, radius),
    ):
        assert (ball_box(*wider) >= value * (1 - 1e-12)).all()


@pytest.mark.parametrize("side", [3, 200])
def test_hard_orders_of_magnitude(side):
    """Ends are reached one after the other: many steps, none of which may fall below."""
    w = torch.logspace(0, -6, side)[None, None].expand(1, 1, -1)
    upper = torch.logspace(-8, 0, side)[None]
    radius = torch.tensor([0.5 * float(upper.norm())])
    given = w, -upper, upper, radius
    value, exact = ball_box(*given), expected(*given)
    assert (value >= exact * (1 - 1e-12)).all()
    torch.testing.assert_close(value, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("side", [1e-30, 1e-8, 1, 1e8, 1e20])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e8, 1e20])
def test_scales_of_everything(size, side):
    w, lower, upper, radius = problem()
    value = ball_box(w, lower, upper, radius)
    scaled = ball_box(size * w, side * lower, side * upper, side * radius)
    torch.testing.assert_close(scaled / (size * side), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "radius"),
    [(1e160, 1.0), (1e20, 1e-160), (1.0, 1e-170), (1e160, 1e-160), (1e-170, 1.0)],
)
def test_squares_out_of_range_do_not_lower_the_value(size, radius):
    w = torch.tensor([[[size, 0.0]]])
    wide = torch.full((1, 2), 1e3)
    value = ball_box(w, -wide, wide, torch.tensor([radius]))
    assert float(value) >= size * radius * (1 - 1e-12)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_float32(size):
    w, lower, upper, radius = problem()
    value = ball_box(w, lower, upper, radius)
    single = ball_box(*(a.float() for a in (size * w, lower, upper, radius)))
    assert single.dtype == torch.float32
    assert (single.double() >= size * value * (1 - 1e-5)).all()
    if size == 1:
        torch.testing.assert_close(single.double(), value, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- edges


def test_zero_functions_radii_and_boxes():
    w, lower, upper, radius = problem()
    zero = torch.zeros_like
    assert ball_box(zero(w), lower, upper, radius).eq(0).all()
    assert ball_box(w, lower, upper, zero(radius)).eq(0).all()
    assert ball_box(w, zero(lower), zero(upper), radius).eq(0).all()
    assert ball_box(zero(w), zero(lower), zero(upper), zero(radius)).eq(0).all()
    one = ball_box(w[:, :, :1], lower[:, :1], upper[:, :1], radius)
    ends = torch.where(w[:, :, 0] > 0, upper[:, :1].clamp(max=radius[:, None]),
                       lower[:, :1].clamp(min=-radius[:, None]))  # fmt: skip
    torch.testing.assert_close(one, w[:, :, 0] * ends)


def test_huge_radii_leave_the_box_and_huge_boxes_the_ball():
    w, lower, upper, radius = problem()
    box = torch.where(w > 0, w * upper[:, None], w * lower[:, None]).sum(2)
    for huge in (1e3, 1e20, 1e150):
        torch.testing.assert_close(ball_box(w, lower, upper, huge * radius), box)
    ball = w.norm(dim=2) * radius[:, None]
    for huge in (1e3, 1e20, 1e150):
        far = torch.full_like(lower, huge)
        torch.testing.assert_close(ball_box(w, -far, far, radius), ball)


def test_boxes_beside_zero_are_taken_to_hold_it():
    w, lower, upper, radius = problem()
    beside = ball_box(w, lower + upper + 1, upper + 2, radius)
    torch.testing.assert_close(beside, ball_box(w, torch.zeros_like(lower), upper + 2, radius))


def test_no_functions_and_no_samples():
    w, lower, upper, radius = problem()
    assert ball_box(w[:, :0], lower, upper, radius).shape == (6, 0)
    assert ball_box(w[:0], lower[:0], upper[:0], radius[:0]).shape == (0, 5)


@pytest.mark.parametrize("box", [1.0, 1e-3, 1e3], ids=["both", "box", "ball"])
@pytest.mark.parametrize("place", range(4), ids=["w", "lower", "upper", "radius"])
def test_nan_is_refused(place, box):
    """Whatever would decide: the box alone is no proof of anything if the radius is NaN."""
    w, lower, upper, radius = problem()
    given = [w, box * lower - 1e-6, box * upper + 1e-6, radius]
    for all_of_it in (True, False):
        bad = [g.clone() for g in given]
        bad[place].flatten()[: None if all_of_it else 1] = torch.nan
        with jaxtyping_off(), pytest.raises(lc.LipcertError, match="NaN"):
            ball_box(*bad)


# ---------------------------------------------------------------- gradients


def test_gradients():
    given = tuple(a.requires_grad_() for a in _smooth())
    assert torch.autograd.gradcheck(ball_box, given, eps=1e-7, atol=1e-5)


def _smooth():
    """Away from kinks: no entry of w or of the box at 0."""
    w = torch.randn(4, 3, 6)
    w = w + 0.1 * w.sign()
    return w, -0.1 - torch.rand(4, 6), 0.1 + torch.rand(4, 6), torch.tensor([0.1, 0.7, 1.2, 9.0])


def test_gradients_in_the_function_are_the_point_itself():
    w, lower, upper, radius = _smooth()
    w.requires_grad_()
    value = ball_box(w, lower, upper, radius)
    (d,) = torch.autograd.grad(value.sum(), w)
    torch.testing.assert_close((w * d).sum(2), value)
    assert (d.norm(dim=2) <= radius[:, None] * (1 + 1e-9)).all()
    assert (d <= upper[:, None] + 1e-12).all()
    assert (d >= lower[:, None] - 1e-12).all()


def test_gradients_are_finite_where_nothing_moves():
    w, lower, upper, radius = (a.clone() for a in problem())
    w[0], radius[1], lower[2], upper[2] = 0, 0, 0, 0
    given = [a.requires_grad_() for a in (w, lower, upper, radius)]
    for g in torch.autograd.grad(ball_box(*given).sum(), given):
        assert g.isfinite().all()
