"""Spectral norms against the singular values of the dense matrix: tables MAPS x STRATEGIES."""

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipcert.convolution import convolution
from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind, weakest
from lipcert.linear_kinds import Dense, Index, Scale, Separable, identity
from lipcert.linear_map import Generic, Matrix
from lipcert.simplify import simplify
from lipcert.spectral import Auto, Exact, Fourier, Gram, Lanczos, PowerIteration
from lipcert.spectral.fourier import as_convolution
from lipcert.spectral.lanczos import relative_gap
from maps import (
    FOURIER,
    HARD,
    MAPS,
    cases,
    chain,
    close,
    conv,
    dense_of,
    detached,
    each,
    geometries,
    index,
    live,
    orthogonal,
    random_convolution,
    random_map,
    scale,
    stack,
    svd,
    total,
    zero_weights,
)

ALL = MAPS | HARD
UPPER = [Exact(), Auto(), Gram(1), Gram(2), Gram(6)]
EVERY = [Exact(), Auto(), Gram(3), PowerIteration(20), Lanczos(1e-9, 3)]


# ---------------------------------------------------------------- kinds


def test_the_weakest_kind_wins():
    upper, probabilistic, estimate = Kind.UPPER, Kind.PROBABILISTIC, Kind.ESTIMATE
    assert weakest([]) == upper
    assert weakest([upper, upper]) == upper
    assert weakest([upper, probabilistic, upper]) == probabilistic
    assert weakest([estimate, probabilistic]) == estimate


def test_a_constant_prints_what_it_claims():
    constant = Constant(torch.tensor(1.25, requires_grad=True), Kind.PROBABILISTIC, 1e-9)
    assert float(constant) == 1.25
    assert repr(constant) == "Constant(1.25, probabilistic, failure=1.0e-09)"
    assert repr(Constant(torch.tensor(2.0), Kind.UPPER)) == "Constant(2, upper)"


def test_strategies_say_what_they_claim():
    a = dense_of(torch.randn(6, 6))
    for norm in (Exact(), Auto(), Gram(2), Fourier()):
        assert norm.kind == Kind.UPPER
    assert Exact()(a).kind == Auto()(a).kind == Gram(2)(a).kind == Kind.UPPER
    assert PowerIteration()(a).kind == Kind.ESTIMATE
    probable = Lanczos(1e-3, 4)(a)
    assert (probable.kind, probable.failure) == (Kind.PROBABILISTIC, 1e-3)
    certain = Lanczos(1e-3, 6)(a)  # as many steps as dimensions
    assert (certain.kind, certain.failure) == (Kind.UPPER, 0)
    close(certain.value, svd(a))


# ---------------------------------------------------------------- the norm from above


@cases(ALL)
def test_exact_is_the_largest_singular_value(build):
    a = build()
    close(Exact()(a).value, svd(a), 1e-10)


@each(UPPER)
@cases(ALL)
def test_upper_bounds_hold(build, norm):
    a = build()
    assert norm(a).value >= svd(a) * (1 - 1e-12)


@cases(ALL)
def test_gram_falls_to_the_norm(build):
    a = build()
    side, truth = min(a.in_size, a.out_size), svd(a)
    values = [Gram(t)(a).value for t in range(1, 11)]
    for t, (value, after) in enumerate(zip(values, [*values[1:], truth], strict=True), start=1):
        assert after <= value * (1 + 1e-12)
        # The largest of n terms is at least their mean: what 2^t-fold powers leave of a factor n.
        assert value <= truth * side ** (0.5 ** (t + 1)) * (1 + 1e-12)


def test_gram_is_exact_at_once_for_equal_singular_values():
    close(Gram(1)(dense_of(orthogonal(30))).value, torch.ones(()))


def test_exact_and_gram_in_small_pieces(monkeypatch):
    a = stack(conv((2, 4, 4), 3, 3, padding=1), scale((2, 4, 4), 2, 4, 4))
    expected = Exact()(a).value, Gram(3)(a).value
    monkeypatch.setattr("lipcert.spectral.exact._CHUNK_BYTES", 4000)
    close((Exact()(a).value, Gram(3)(a).value), expected)


# ---------------------------------------------------------------- convolutions by frequency


@cases(FOURIER)
def test_fourier_holds_and_is_exact_where_it_says(build):
    a = build()
    c = as_convolution(a)
    value, truth = Fourier()(a).value, svd(a)
    assert Fourier()(a).kind == Kind.UPPER
    assert value >= truth * (1 - 1e-12)
    if c.circular or (set(c.kernel) == {1} and set(c.padding) == {(0, 0)}):
        close(value, truth)


@cases(FOURIER)
def test_gram_by_frequency_brackets_fourier(build):
    a = build()
    truth = Fourier()(a).value
    side = min(as_convolution(a).weight.shape[0], 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lipcert.spectral.gram.DENSE_SIDE", 0)
        values = [Gram(t)(a).value for t in (1, 3, 8)]
    for value, below in zip(values, [*values[1:], truth], strict=True):
        assert value >= below * (1 - 1e-12)
    assert values[2] <= truth * side ** (0.5**9) * (1 + 1e-12)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(geometries(), st.integers(0, 999))
def test_fourier_over_random_geometries(geometry, seed):
    c = random_convolution(geometry, seed)
    assert Fourier()(c).value >= svd(c) * (1 - 1e-12)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_fourier_is_exact_for_circular_padding(data):
    draw = data.draw
    axes, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    n, k, s, d, p = [], [], [], [], []
    for _ in range(axes):
        s.append(draw(st.integers(1, 3)))
        n.append(s[-1] * draw(st.integers(1, 3)))
        d.append(draw(st.integers(1, 2)))
        k.append(draw(st.integers(1, 1 + 2 * n[-1] // d[-1])))
        reach = d[-1] * (k[-1] - 1)
        before = draw(st.integers(max(0, reach - n[-1]), min(n[-1], reach)))
        p.append((before, reach - before))
    torch.manual_seed(draw(st.integers(0, 99)))
    width = draw(st.integers(1, 2))
    weight = torch.randn(groups * draw(st.integers(1, 2)), width, *k)
    shape = (groups * width, *n)
    c = convolution(weight, shape, tuple(s), tuple(p), tuple(d), groups, circular=True)
    close(Fourier()(c).value, svd(c))


def test_fourier_in_small_pieces(monkeypatch):
    c = conv((2, 6, 8), 3, 3, stride=2, padding=1)
    expected = Fourier()(c).value
    monkeypatch.setattr("lipcert.spectral.fourier._CHUNK_BYTES", 2000)
    close(Fourier()(c).value, expected)


def test_fourier_tightens_with_the_image():
    weight = torch.randn(2, 2, 3, 3)
    excess = []
    for n in (4, 8, 16):
        c = convolution(weight, (2, n, n), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
        excess.append(Fourier()(c).value / svd(c) - 1)
    assert excess[0] > excess[1] > excess[2]
    assert excess[2] < 0.02


@each([Exact(), Auto(), Fourier(), Gram(6)])
def test_double_precision_whatever_the_default(norm):
    torch.set_default_dtype(torch.float32)
    c = conv((2, 9, 9), 3, 3, stride=3, padding=1, circular=True)
    bound = norm(c).value
    assert bound.dtype == torch.float64
    assert bound >= svd(c) * (1 - 1e-12)
    if norm != Gram(6):
        close(bound, svd(c))


@each([Exact(), Auto()])
def test_double_precision_without_weights(norm):
    torch.set_default_dtype(torch.float32)
    a = total(identity((3,)), index((3,), [1, 1, 0]))
    generic = Generic((4,), (4,), lambda x: x.cumsum(-1))
    for map in (a, generic):
        value = norm(map).value
        assert value.dtype == torch.float64
        close(value, svd(map))


# ---------------------------------------------------------------- Auto


@pytest.fixture
def tiny(monkeypatch):
    """Auto with hardly any dense matrices."""
    monkeypatch.setattr("lipcert.spectral.auto.DENSE_SIDE", 3)


@cases(ALL)
def test_auto_by_parts(build, tiny):
    a = build()
    if isinstance(simplify(a), Generic):
        with pytest.raises(LipcertError, match="Lanczos"):
            Auto()(a)
    else:
        assert Auto()(a).value >= svd(a) * (1 - 1e-12)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6))
def test_auto_by_parts_over_random_maps(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    a = random_map(rng, rng.choice([(4,), (2, 3), (2, 3, 3)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lipcert.spectral.auto.DENSE_SIDE", 3)
        value = Auto()(a).value
    assert value >= svd(a) * (1 - 1e-12)


def test_auto_keeps_the_permutation_between_a_convolution_and_its_scale(tiny):
    """Shuffled channels meet other scales: 3 * 3, not 3 * 1."""
    mix = convolution(torch.tensor([3.0, 1.0]).diag()[..., None], (2, 8), (1,), ((0, 0),), (1,), 1)
    swap = index((2, 8), torch.arange(16).reshape(2, 8).flip(0))
    after = Scale((2, 8), (2, 8), torch.tensor([[1.0], [3.0]]))
    assert Auto()(chain(mix, swap, after)).value >= 9 * (1 - 1e-12)


def test_auto_joins_what_one_strategy_takes(tiny):
    c, bn = conv((2, 6, 6), 2, 3, padding=1), scale((2, 6, 6), 2, 1, 1)
    late = scale((2, 6, 6), 2, 6, 6)
    joint = Auto()(chain(c, bn, late)).value
    close(joint, Fourier()(chain(c, bn)).value * late.diagonal.abs().max())
    assert joint < Fourier()(c).value * bn.diagonal.abs().max() * late.diagonal.abs().max()


def test_auto_on_the_parts_of_sums_and_stacks(tiny):
    c, s = conv((2, 6, 6), 2, 3, padding=1), scale((2, 6, 6), 2, 6, 6)
    one, two = Fourier()(c).value, s.diagonal.abs().max()
    close(Auto()(total(c, s)).value, one + two)
    close(Auto()(stack(c, s)).value, torch.hypot(one, two))
    close(Auto()(stack(c, s).T).value, torch.hypot(one, two))


def test_auto_on_large_maps():
    """Too large for a dense matrix: closed forms and frequencies."""
    c = conv((4, 40, 40), 4, 3, padding=1, circular=True)
    close(Auto()(c).value, Fourier()(c).value)
    w = live(3, 4)
    a = Dense((2000, 4), (2000, 3), w)
    for norm in (Exact(), Auto(), Gram(12)):
        close(norm(a).value, torch.linalg.matrix_norm(w, 2), 1e-3)


# ---------------------------------------------------------------- from below


@cases(ALL)
def test_power_iteration_comes_from_below(build):
    a = build()
    truth = svd(a)
    few, many = PowerIteration(1)(a).value, PowerIteration(200)(a).value
    assert few <= truth * (1 + 1e-12)
    assert many <= truth * (1 + 1e-12)
    assert many >= 0.99 * truth


def test_power_iteration_improves_from_call_to_call():
    a, norm = dense_of(torch.randn(20, 12)), PowerIteration(1)
    vector = norm.start(a.in_shape, a.like)
    values = []
    for _ in range(200):
        constant, vector = norm.refine(a, vector)
        values.append(float(constant))
        close(torch.linalg.vector_norm(vector), torch.ones(()))
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(values))
    assert values[0] < 0.99 * values[-1]
    close(torch.tensor(values[-1]), svd(a), 1e-6)


def test_no_steps_read_the_vector_as_it_is():
    a, vector = dense_of([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    constant, kept = PowerIteration(0).refine(a, vector)
    assert (float(constant), kept.tolist()) == (3, [[1, 0]])


def test_power_iteration_survives_a_map_that_turns_zero():
    a, norm = dense_of(torch.randn(4, 3)), PowerIteration(50)
    vector = norm.refine(a, norm.start(a.in_shape, a.like))[1]
    nothing, kept = norm.refine(dense_of(torch.zeros(4, 3)), vector)
    assert float(nothing) == 0
    assert kept.equal(vector)
    close(norm.refine(a, kept)[0].value, svd(a), 1e-6)


def test_power_iteration_cannot_see_a_block_it_did_not_start_in():
    """Why it is an estimate; the others see the block."""
    a = dense_of(torch.block_diag(torch.eye(2), 5 * torch.eye(3)))
    blind = PowerIteration(100).refine(a, torch.tensor([[1.0, 0, 0, 0, 0]]))[0]
    assert (float(blind), blind.kind) == (1, Kind.ESTIMATE)
    for norm in (Exact(), Auto(), Gram(1), Lanczos(1e-9, 3)):
        assert norm(a).value >= 5 * (1 - 1e-12)


# ---------------------------------------------------------------- Lanczos


@cases(ALL)
def test_lanczos_holds(build):
    a = build()
    for steps in (2, 5):
        assert Lanczos(1e-9, steps)(a).value >= svd(a) * (1 - 1e-12)


def test_lanczos_closes_in_with_the_steps():
    a = Scale((400,), (400,), torch.linspace(0, 1, 400))
    values = [Lanczos(1e-6, steps)(a).value for steps in (10, 30, 90, 270)]
    assert values == sorted(values, reverse=True)
    assert 1 <= values[-1] < 1.002


def test_lanczos_gap_is_the_smallest_the_proof_allows():
    for n, steps, failure in ((3, 2, 0.5), (50, 4, 0.2), (10_000, 100, 1e-9), (10**6, 30, 1e-12)):
        overlap = failure * math.sqrt(math.pi / (2 * (n - 1)))

        def proved(e, overlap=overlap, steps=steps):
            x = (1 + e) / (1 - e)
            y = x + math.sqrt(x * x - 1)
            chebyshev = (y ** (steps - 1) + y ** (1 - steps)) / 2
            return (1 - e) * (1 - overlap**2) <= e * chebyshev**2 * overlap**2

        gap = relative_gap(n, steps, failure)
        assert proved(gap * (1 + 1e-9))
        assert not proved(gap * (1 - 1e-9))


@pytest.mark.parametrize("n", [3, 10, 200])
def test_lanczos_start_misses_the_top_vector_no_more_often_than_said(n):
    starts = torch.nn.functional.normalize(torch.randn(40_000, n), dim=1)[:, 0].abs()
    for failure in (0.02, 0.2, 0.5):
        missed = (starts < failure * math.sqrt(math.pi / (2 * (n - 1)))).double().mean()
        assert missed <= failure + 4 * math.sqrt(failure / 40_000)
        assert missed >= 0.7 * failure  # and the estimate of that chance is not idle


def test_lanczos_fails_no_more_often_than_it_says():
    """On the worst spectrum that a search over two clusters below the norm has found."""
    spectrum = torch.cat([torch.ones(1), torch.full((26,), 0.12), torch.zeros(13)])
    a, norm = dense_of(spectrum.sqrt().diag()), Lanczos(failure=0.2, steps=2)
    violated = sum(float(norm(a)) < 1 for _ in range(1500)) / 1500
    assert 0.05 < violated <= 0.2  # it does fail: the claim is not an idle one


def test_lanczos_takes_maps_of_which_nothing_is_known():
    """Large, without weights, without structure: only apply and its adjoint."""
    a = Generic((20_000,), (20_000,), lambda x: 2 * x.roll(1, -1) - x)
    bound = Lanczos(1e-9, 20)(a)
    assert bound.kind == Kind.PROBABILISTIC
    assert 3 <= bound.value < 4
    assert bound.value.dtype == torch.float64


# ---------------------------------------------------------------- scale, invariance, non-numbers

FEW = {
    "dense": lambda: dense_of(torch.randn(5, 7)),
    "conv": lambda: conv((2, 4, 4), 3, 3, 2, 1),
    "transposed conv": lambda: conv((2, 4, 4), 3, 3, 2, 1).T,
    "circular": lambda: conv((2, 4, 4), 2, 3, padding=1, circular=True),
    "matrix": lambda: Matrix((2, 3), (4,), live(4, 6)),
    "scale": lambda: scale((3, 2), 3, 1),
    "separable": lambda: Separable((2, 3), (4, 3), (live(4, 2), None)),
    "stack": lambda: stack(Dense((4,), (3,), live(3, 4)), Dense((4,), (2,), live(2, 4))),
    "sum": lambda: total(conv((2, 6), 2, 3, padding=1), scale((2, 6), 2, 6)),
}


@each([*EVERY, Fourier()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("factor", [1e-30, 1e30, 2.0**-90, 2.0**90, -8.0])
def test_norms_scale_with_the_weights(norm, dtype, factor):
    torch.set_default_dtype(dtype)
    for name, build in FEW.items():
        if norm == Fourier() and "conv" not in name and name != "circular":
            continue
        a = build()
        torch.manual_seed(1)
        one = norm(a).value.double()
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in a.tensors():
                weight *= factor
        scaled = norm(a).value.double()
        rounded = dtype == torch.float32 and abs(math.frexp(factor)[0]) != 0.5
        tolerance = 1e-6 if rounded else 1e-13
        close(scaled / abs(factor), one, tolerance)


@each([Exact(), Auto(), Gram(4), Fourier()])
def test_norms_of_extreme_weights(norm, monkeypatch):
    """Neither the squares of the Gram matrix nor those of a norm may leave the range."""
    monkeypatch.setattr("lipcert.spectral.gram.DENSE_SIDE", 25)
    for factor in (2.0**-800, 2.0**800):
        c = detached(conv((2, 4, 4), 3, 3, padding=1))
        assert norm(replace(c, weight=factor * c.weight)).value == factor * norm(c).value
        if norm != Fourier():
            a = detached(dense_of(torch.randn(4, 6)))
            assert norm(replace(a, weight=factor * a.weight)).value == factor * norm(a).value


@each([Exact(), Auto(), Gram(4)])
def test_norms_do_not_turn(norm):
    w = torch.randn(5, 7)
    left, right = orthogonal(5), orthogonal(7)
    for turned in (left @ w, w @ right, w[torch.randperm(5)], w[:, torch.randperm(7)], -w, w.mT):
        if norm == Gram(4):  # its row sums see the basis: only the bound is invariant
            assert norm(dense_of(turned)).value >= svd(dense_of(w)) * (1 - 1e-12)
        else:
            close(norm(dense_of(turned)).value, norm(dense_of(w)).value)
    c = conv((2, 4, 5), 3, 3, padding=1)
    for moved in (c.weight[[2, 0, 1]], c.weight[:, [1, 0]], -c.weight, c.weight.flip(2)):
        close(norm(replace(c, weight=moved)).value, norm(c).value)


def test_fourier_does_not_turn():
    c = conv((2, 4, 5), 3, 3, padding=1)
    for moved in (c.weight[[2, 0, 1]], c.weight[:, [1, 0]], -c.weight, c.weight.flip(2)):
        close(Fourier()(replace(c, weight=moved)).value, Fourier()(c).value)


def test_orthogonal_maps_have_norm_one():
    close(Exact()(dense_of(orthogonal(9))).value, torch.ones(()))
    shift = torch.zeros(1, 1, 3, 3)
    shift[0, 0, 0, 2] = 1
    c = convolution(shift, (1, 5, 4), (1, 1), ((1, 1), (1, 1)), (1, 1), 1, circular=True)
    close(Fourier()(c).value, torch.ones(()))


@each([*EVERY, Fourier()])
def test_weights_need_not_lie_in_order(norm):
    for a in (conv((2, 4, 4), 3, 3, padding=1), dense_of(torch.randn(5, 7))):
        if isinstance(a, Dense) and norm == Fourier():
            continue
        order = tuple(reversed(range(a.weight.ndim)))
        scattered = a.weight.detach().permute(order).contiguous().permute(order)
        assert not scattered.is_contiguous()
        torch.manual_seed(1)
        expected = norm(a).value
        torch.manual_seed(1)
        close(norm(replace(a, weight=scattered)).value, expected)


@each([*EVERY, Fourier()])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@cases(FEW)
def test_no_number_comes_of_weights_that_are_none(build, norm, poison):
    if norm == Fourier() and as_convolution(build()) is None:
        pytest.skip("not a convolution")
    for place in (0, -1):
        a = build()
        with torch.no_grad():
            a.tensors()[0].view(-1)[place] = poison
        assert not norm(a).value.isfinite()
        with torch.no_grad():
            assert not norm(a).value.isfinite()


# ---------------------------------------------------------------- what does not fit


def test_misfits_name_auto():
    unknown = Generic((17_000,), (17_000,), lambda x: x)
    for norm, a in (
        (Fourier(), dense_of(torch.randn(2, 3))),
        (Fourier(), scale((2, 3), 2, 3)),
        (Fourier(), conv((2, 4), 2, 3) @ scale((2, 4), 2, 4)),
        (Gram(), unknown),
        (Exact(), unknown),
    ):
        with pytest.raises(LipcertError, match=r"Auto\(\)"):
            norm(a)
    with pytest.raises(LipcertError, match="Lanczos"):
        Auto()(unknown)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gram(0),
        lambda: Lanczos(0.0),
        lambda: Lanczos(1.0),
        lambda: Lanczos(1e-9, 1),
        lambda: PowerIteration(-1),
    ],
)
def test_bad_settings_are_refused(build):
    with pytest.raises(LipcertError, match="steps|failure"):
        build()


# ---------------------------------------------------------------- mistakes seen in public code


def circular_1d(kernel, n, padding=None, **named):
    weight = torch.as_tensor(kernel, dtype=torch.float64).reshape(1, 1, -1)
    before = (weight.shape[-1] - 1) // 2
    sides = ((before, weight.shape[-1] - 1 - before),)
    return convolution(weight, (1, n), (1,), sides, (1,), 1, **named)


@each([Exact(), Auto(), Fourier(), Gram(8)])
def test_groups_count_by_the_largest_not_by_the_product(norm):
    weight = torch.tensor([0.7, 0.8]).reshape(2, 1, 1)
    c = convolution(weight, (2, 6), (1,), ((0, 0),), (1,), groups=2)
    value = norm(c).value
    assert value >= 0.8 * (1 - 1e-12)
    assert value < 1.0
    if norm != Gram(8):
        close(value, torch.tensor(0.8))


def test_a_kernel_beyond_the_image_wraps_and_is_not_cropped():
    """On one cell all taps add up; on two, those of even and of odd place."""
    close(Fourier()(circular_1d([1.0, 2.0, -4.0], 1, circular=True)).value, torch.tensor(1.0))
    close(Fourier()(circular_1d([1.0, 2.0, 4.0], 2, circular=True)).value, torch.tensor(7.0))
    close(Fourier()(circular_1d([1, -2, 4, -8, 16.0], 2, circular=True)).value, torch.tensor(31.0))
    for n in (1, 2, 3):
        flat = circular_1d([1, -2, 4, -8, 16.0], n)
        assert Fourier()(flat).value >= svd(flat) * (1 - 1e-12)


@each([*EVERY, Fourier()])
def test_a_kernel_of_zeros_has_norm_zero(norm):
    assert norm(zero_weights(conv((2, 6, 6), 3, 3, padding=1))).value == 0


@each([*EVERY, Fourier()])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_kernels_in_single_precision(norm, size):
    torch.set_default_dtype(torch.float32)
    c = conv((1, 4, 4), 1, 1)
    value = norm(replace(c, weight=torch.full((1, 1, 1, 1), size))).value.double() / size
    assert value > 1 - 1e-6
    if not isinstance(norm, Lanczos):  # whose few steps inflate it a thousandfold
        assert value < 1 + 1e-6


def test_gram_runs_all_its_iterations():
    a = dense_of(torch.randn(50, 50))
    truth = svd(a)
    values = [Gram(t)(a).value / truth for t in (1, 2, 4, 6)]
    assert values[0] > 1.3
    assert values[3] < 50 ** (0.5**7)
    assert all(later < earlier for earlier, later in pairwise(values))


@pytest.mark.parametrize("size", [1e-5, 1e-9, 1e-12, 1e-20])
def test_no_epsilon_is_added_to_the_norm(size):
    a = dense_of([[size]])
    for norm in (*EVERY, PowerIteration(1)):
        close(norm(a).value / size, torch.ones(()), 1e-13)


def test_the_adjoint_keeps_the_rows_that_a_stride_leaves_over():
    """A transposed convolution without an output size would lose the sixth row and column."""
    c = conv((3, 6, 6), 4, 3, stride=2, padding=1)
    cropped = convolution(c.weight, (3, 5, 5), c.stride, c.padding, c.dilation, 1)
    assert cropped.out_shape == c.out_shape
    assert c.adjoint(torch.randn(1, *c.out_shape))[0, :, -1].abs().min() > 0
    assert svd(cropped) < 0.999 * svd(c)
    for norm in (Exact(), PowerIteration(3000)):
        close(norm(c).value, svd(c), 1e-6)


def test_the_circular_norm_on_the_image_itself_is_no_bound_for_zero_padding():
    """-1 2 -1 on three cells: 3 if they close to a ring, 2 + sqrt 2 if they do not."""
    ring, line = (circular_1d([-1.0, 2.0, -1.0], 3, circular=c) for c in (True, False))
    close(Fourier()(ring).value, torch.tensor(3.0))
    close(svd(line), torch.tensor(2 + math.sqrt(2)))
    close(Fourier()(line).value, torch.tensor(4.0))  # the ring of four cells


@pytest.mark.parametrize("sides", [(1, 0), (0, 1)])
def test_the_ring_has_room_for_the_padding_on_either_side(sides):
    """1 -1 on three cells and one zero: 2 cos(pi / 7); on a ring of three cells sqrt 3."""
    weight = torch.tensor([[[1.0, -1.0]]])
    line = convolution(weight, (1, 3), (1,), (sides,), (1,), 1)
    close(svd(line), torch.tensor(2 * math.cos(math.pi / 7)))
    close(Fourier()(line).value, torch.tensor(2.0))  # the ring of four cells


def test_by_frequency_a_flattened_picture_of_one_cell_is_refused_properly():
    flattened = Index((3, 1, 1), (3,), torch.arange(3))
    with pytest.raises(LipcertError, match="Fourier"):
        Fourier()(Dense((3,), (2,), torch.randn(2, 3)) @ flattened)
    with pytest.raises(LipcertError, match="Fourier"):
        Fourier()(flattened)
