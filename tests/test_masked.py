"""Norms of masked maps against the singular values of the masked dense matrix."""

import math
from dataclasses import replace

import pytest
import torch

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_kinds import Dense, Separable, identity
from lipcert.simplify import simplify
from lipcert.spectral import (
    LOBPCG,
    Auto,
    ColumnSum,
    Count,
    Exact,
    Fourier,
    Gram,
    Lanczos,
    PowerBound,
    PowerIteration,
    RowSum,
    masked_norms,
)
from lipcert.spectral.exact import closed_form
from lipcert.spectral.lanczos import gram_product, largest_ritz, random_starts
from maps import HARD, MAPS, cases, chain, close, conv, dense_of, detached, each, live, scale, svd

ALL = MAPS | HARD
OTHERS = [Fourier(), Gram(2), Count(), PowerBound(4, 10), RowSum(), ColumnSum()]
# Shares of zeros among the columns and the rows of a sample.
SHARES = [(0.1, 0.1), (0.7, 0.6), (0, 0.5), (0.5, 0), (0.9, 0.1), (0.1, 0.9)]


def masks(a, shares=SHARES):
    """Weights for the columns and rows of some samples."""

    def draw(shape, chances):
        return torch.stack([(torch.rand(shape) >= chance).double() for chance in chances])

    columns, rows = zip(*shares, strict=True)
    return draw(a.in_shape, columns), draw(a.out_shape, rows)


def samples(a):
    """Masks of all sorts, fractional weights, all ones, no columns, no rows: in this order."""
    columns, rows = masks(a, [*SHARES, (0, 0), (0, 0), (1, 0), (0, 1)])
    columns[len(SHARES)] *= torch.rand(a.in_shape)
    rows[len(SHARES)] *= torch.rand(a.out_shape)
    return columns, rows


def matrices(a, columns, rows):
    """The masked dense matrices, live."""
    columns = torch.ones(1, a.in_size) if columns is None else columns.flatten(1)
    rows = torch.ones(1, a.out_size) if rows is None else rows.flatten(1)
    return rows[:, :, None] * a.dense() * columns[:, None, :]


def truth(a, columns, rows):
    return torch.linalg.svdvals(matrices(a, columns, rows))[:, 0]


def norms(norm, a, columns, rows):
    return masked_norms(norm, a, columns, rows, Exact()(a))


# ---------------------------------------------------------------- against the dense matrix


@cases(ALL)
def test_exact_is_the_largest_singular_value(build):
    a = build()
    columns, rows = samples(a)
    for ends in ((columns, rows), (columns, None), (None, rows)):
        found = norms(Exact(), a, *ends)
        assert (found.kind, found.failure) == (Kind.UPPER, 0)
        assert found.value.dtype == torch.float64
        close(found.value, truth(a, *ends), 1e-10)


@cases(ALL)
def test_auto_is_exact_or_the_whole(build):
    a = build()
    columns, rows = samples(a)
    found = norms(Auto(), a, columns, rows)
    assert found.kind is Kind.UPPER
    expected = truth(a, columns, rows)
    if closed_form(simplify(a)) is None:
        close(found.value, expected, 1e-10)
    else:
        left = columns.flatten(1).any(1) & rows.flatten(1).any(1)
        close(found.value, svd(a) * left)


@cases(ALL)
@pytest.mark.parametrize("steps", [2, 4])
def test_lanczos_holds(build, steps):
    a = build()
    columns, rows = samples(a)
    found = norms(Lanczos(1e-9, steps), a, columns, rows)
    assert (found.value >= truth(a, columns, rows) * (1 - 1e-12)).all()
    assert (found.value <= svd(a) * (1 + 1e-12)).all()
    assert found.value.dtype == torch.float64


@each(OTHERS)
def test_others_say_the_norm_of_the_whole(norm):
    a = conv((2, 4, 4), 3, 3, padding=1)
    whole = norm(a)
    found = masked_norms(norm, a, *samples(a), whole)
    assert (found.kind, found.failure) == (whole.kind, whole.failure)
    close(found.value, torch.cat([whole.value.expand(8), torch.zeros(2)]))


@pytest.mark.parametrize("shape", [(50, 120), (120, 50), (60, 60)])
@pytest.mark.parametrize("shares", [(0.02, 0.0), (0.02, 0.05), (0.5, 0.5), (0.97, 0.2)])
def test_matrices_of_some_size(shape, shares):
    """Columns taken out, columns summed, the smaller side on either side."""
    a = dense_of(torch.randn(shape))
    columns, rows = masks(a, [shares] * 5)
    close(norms(Exact(), a, columns, rows).value, truth(a, columns, rows), 1e-11)
    columns *= torch.rand(columns.shape).where(torch.rand(columns.shape) < 0.1, 1)
    rows *= torch.rand(rows.shape)
    close(norms(Exact(), a, columns, rows).value, truth(a, columns, rows), 1e-11)


def test_what_is_taken_out_may_be_all_but_rounding():
    weight = torch.randn(20, 60)
    weight[:, 3] *= 1e9
    a = dense_of(weight)
    columns = torch.ones(2, 60)
    columns[0, 3] = 0
    columns[1, 5] = 0
    close(norms(Exact(), a, columns, None).value, truth(a, columns, None), 1e-11)


def test_small_pieces(monkeypatch):
    a = dense_of(torch.randn(20, 33))
    ends = samples(a)
    expected = [norms(norm, a, *ends).value for norm in (Exact(), Lanczos(0.5, 3))]
    monkeypatch.setattr("lipcert.spectral.masked._CHUNK_BYTES", 1)
    monkeypatch.setattr("lipcert.spectral.masked._LANCZOS_BYTES", 1)
    monkeypatch.setattr("lipcert.spectral.masked._COLUMNS", 4)
    close(norms(Exact(), a, *ends).value, expected[0])
    assert (norms(Lanczos(0.5, 3), a, *ends).value[:-2] > 0).all()


# ---------------------------------------------------------------- laws


@cases(MAPS)
def test_smaller_weights_have_smaller_norms(build):
    a = build()
    columns, rows = samples(a)
    fewer = columns * (torch.rand(columns.shape) < 0.8), rows * torch.rand(rows.shape)
    less, more = (norms(Exact(), a, *ends).value for ends in (fewer, (columns, rows)))
    assert (less <= more + 1e-12).all()
    assert (more <= svd(a) * (1 + 1e-12)).all()


def test_weights_count_like_a_scale_on_either_side():
    a = dense_of(torch.randn(5, 7))
    columns, rows = torch.rand(3, 7), torch.rand(3, 5)
    found = norms(Exact(), a, columns, rows).value
    for value, c, r in zip(found, columns, rows, strict=True):
        before, after = replace(scale((7,), 7), diagonal=c), replace(scale((5,), 5), diagonal=r)
        close(value, svd(chain(before, a, after)))


@each([Exact(), Auto(), Lanczos(1e-9, 3), Gram(2)])
def test_no_weights_are_touched_for_the_whole(norm):
    """All weights 1: `whole` itself, whatever it says."""
    a = dense_of(torch.randn(5, 7))
    whole = Constant(torch.tensor(123.0), Kind.PROBABILISTIC, 0.25)
    found = masked_norms(norm, a, torch.ones(2, 7), torch.ones(2, 5), whole)
    assert found.value.tolist() == [123, 123]
    assert (found.kind, found.failure) == (whole.kind, whole.failure)


@each([Exact(), Auto(), Lanczos(1e-9, 3), Gram(2)])
def test_one_sample_and_no_sample(norm):
    a = dense_of(torch.randn(5, 7))
    columns, rows = (mask[:1] for mask in samples(a))
    many = norms(norm, a, columns.expand(4, -1), rows.expand(4, -1))
    assert many.value.shape == (4,)
    assert norms(norm, a, columns, rows).value.shape == (1,)
    if not isinstance(norm, Lanczos):
        close(norms(norm, a, columns, rows).value, many.value[:1])
    for ends in ((columns[:0], rows[:0]), (columns[:0], None)):
        nothing = norms(norm, a, *ends)
        assert nothing.value.shape == (0,)
        assert nothing.failure == 0


@each([Exact(), Auto(), Lanczos(1e-9, 3)])
def test_single_precision_maps_and_boolean_masks(norm):
    a = dense_of(torch.randn(6, 8)).to(torch.float32)
    columns, rows = masks(a)
    expected = truth(a, columns, rows)
    for ends in ((columns.float(), rows.float()), (columns.bool(), rows.bool())):
        value = norms(norm, a, *ends).value
        assert value.dtype == torch.float64
        assert (value >= expected * (1 - 1e-12)).all()
        if norm != Lanczos(1e-9, 3):
            close(value, expected, 1e-11)


@pytest.mark.parametrize("factor", [2.0**-800, 2.0**800])
def test_extreme_weights(factor):
    a = detached(dense_of(torch.randn(6, 9)))
    ends = samples(a)
    scaled = replace(a, weight=factor * a.weight)
    close(norms(Exact(), scaled, *ends).value / factor, norms(Exact(), a, *ends).value)


def test_a_bound_on_the_whole_is_never_exceeded_and_an_estimate_is_no_bound():
    a = dense_of(torch.randn(20, 30))
    columns, rows = masks(a, [(0.1, 0.1)] * 4)
    low = 0.5 * svd(a).detach()
    for norm in (Exact(), Lanczos(1e-9, 3)):
        capped = masked_norms(norm, a, columns, rows, Constant(low, Kind.UPPER))
        assert (capped.value <= low).all()
        for kind in (Kind.PROBABILISTIC, Kind.ESTIMATE):
            found = masked_norms(norm, a, columns, rows, Constant(low, kind, 0.1))
            assert (found.value > low).all()
            assert found.kind is norm.kind  # nothing of the whole is used
    rows[0] = columns[0] = 1
    found = masked_norms(Exact(), a, columns, rows, Constant(low, Kind.PROBABILISTIC, 0.1))
    assert (found.kind, found.failure) == (Kind.PROBABILISTIC, 0.1)


# ---------------------------------------------------------------- non-numbers


@each([Exact(), Auto(), Lanczos(1e-9, 3)])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["dense", "conv 2d, leftover row", "composition", "scale"])
def test_no_number_comes_of_weights_that_are_none(name, norm, poison):
    a = MAPS[name]()
    with torch.no_grad():
        a.tensors()[0].view(-1)[0] = poison
    columns, rows = masks(a, [(0.2, 0.2)] * 3)
    columns[:, 0] = rows[:, 0] = 0  # what is masked out is no number either
    columns[:, -1] = rows[:, -1] = 1
    known = Constant(torch.tensor(1e3), Kind.ESTIMATE)
    if not (isinstance(norm, Auto) and name == "scale"):  # which takes `whole` as it is
        assert not masked_norms(norm, a, columns, rows, known).value.isfinite().any()
    assert not norms(norm, a, columns, rows).value.isfinite().any()


@each([Exact(), Lanczos(1e-9, 3)])
def test_a_weight_that_is_no_number_spoils_its_own_sample_only(norm):
    a = dense_of(torch.randn(8, 9))
    columns, rows = masks(a, [(0.2, 0.2)] * 3)
    columns[1, 4] = math.nan
    for ends in (
        (columns, rows),
        (columns.clone().nan_to_num(1.0), rows.where(columns[:, :8] >= 0, math.nan)),
    ):
        value = norms(norm, a, *ends).value
        assert value.isnan().tolist() == [False, True, False]


# ---------------------------------------------------------------- Lanczos


def test_lanczos_closes_in_on_every_sample():
    a = dense_of(torch.randn(60, 50))
    columns, rows = samples(a)
    values = [
        masked_norms(Lanczos(1e-6, k), a, columns, rows, Constant(svd(a), Kind.ESTIMATE)).value
        for k in (5, 15, 45)
    ]
    expected = truth(a, columns, rows)
    for value in values:
        assert (value >= expected * (1 - 1e-12)).all()
    excess = torch.stack(values)[:, :7] / expected[:7] - 1
    assert (excess[1:] < excess[:-1]).all()
    assert (excess[-1] < 0.03).all()


def test_every_sample_may_fail():
    a = dense_of(torch.randn(20, 30))
    columns, rows = samples(a)  # 7 that are neither all ones nor nothing
    found = norms(Lanczos(1e-3, 4), a, columns, rows)
    assert found.kind is Kind.PROBABILISTIC
    assert found.failure == pytest.approx(7e-3)
    many = norms(Lanczos(0.3, 4), a, columns, rows)
    assert many.failure == 1
    spent = masked_norms(
        Lanczos(1e-3, 4), a, columns, rows, Constant(svd(a), Kind.PROBABILISTIC, 0.1)
    )
    assert spent.failure == pytest.approx(0.107)
    certain = norms(Lanczos(1e-3, 20), a, columns, rows)  # as many steps as dimensions
    assert (certain.kind, certain.failure) == (Kind.UPPER, 0)
    close(certain.value, truth(a, columns, rows), 1e-10)


def test_samples_start_apart():
    starts = random_starts(3, (4, 5), torch.zeros(()))
    assert starts.shape == (3, 4, 5)
    close(starts.flatten(1).norm(dim=1), torch.ones(3))
    assert torch.pdist(starts.flatten(1)).min() > 0.1


def test_a_sample_that_ends_early_leaves_the_others_alone():
    n = 40
    spectra = torch.stack(
        [
            torch.ones(n),
            torch.linspace(0, 2, n),
            torch.full((n,), math.nan),
            torch.zeros(n),
            torch.linspace(0, 3, n).floor(),
        ]
    )
    starts = random_starts(5, (n,), spectra)
    ritz, vectors = largest_ritz(lambda x: x * spectra, starts, n)
    known = [0, 1, 3, 4]
    close(ritz[known], torch.tensor([1.0, 2.0, 0.0, 3.0]), 1e-9)
    assert ritz[2].isnan()
    close(vectors[known].norm(dim=1), torch.ones(4))
    close((vectors * spectra)[known], (vectors * ritz[:, None])[known], 1e-5)
    for k in (0, 1, 3, 4):  # each as if it were alone
        alone = largest_ritz(lambda x, k=k: x * spectra[k], starts[k : k + 1], n)
        close(alone[0][0], ritz[k], 1e-9)


@cases(MAPS)
def test_the_product_is_that_of_the_masked_gram_matrix(build):
    a = build()
    columns, rows = samples(a)
    product, shape = gram_product(a, columns, rows)
    x = torch.randn(len(rows), *shape)
    masked = matrices(a, columns, rows)
    on_input = a.in_size <= a.out_size
    gram = masked.mT @ masked if on_input else masked @ masked.mT
    close(product(x).flatten(1), (gram @ x.flatten(1)[:, :, None])[:, :, 0])


# ---------------------------------------------------------------- gradients


@each([Exact(), Auto(), Lanczos(1e-9, 60)])
@cases({name: build for name, build in MAPS.items() if build().tensors()})
def test_gradient_is_that_of_the_singular_value(build, norm):
    a = build()
    columns, rows = samples(a)
    expected = truth(a, columns, rows)
    some = expected.detach() > 1e-6  # no gradient where nothing is left
    if norm == Auto() and closed_form(simplify(a)) is not None:
        pytest.skip("takes the norm of the whole map")
    factors = torch.rand(len(rows)) * some
    wanted = torch.autograd.grad((expected * factors).where(some, 0).sum(), a.tensors())
    value = norms(norm, a, columns, rows).value
    found = torch.autograd.grad((value * factors).sum(), a.tensors())
    for gradient, slope in zip(found, wanted, strict=True):
        close(gradient, slope, 1e-6)


@each([Exact(), Lanczos(1e-6, 12)])
@pytest.mark.parametrize("shape", [(15, 30), (30, 15)])
@pytest.mark.parametrize("share", [0.03, 0.4])
def test_gradients_against_differences(shape, share, norm):
    weight = torch.randn(shape)
    weight[0] *= 20  # a gap: Lanczos finds the vector
    a = dense_of(weight)
    columns, rows = masks(a, [(share, share), (0.8, 0.1), (0.1, 0.8)])
    rows[:, 0], rows[:, 1] = 1, 0
    whole = Constant(torch.tensor(1e3), Kind.UPPER)
    value = masked_norms(norm, a, columns, rows, whole).value
    factors = torch.rand(3)
    (gradient,) = torch.autograd.grad((value * factors).sum(), a.weight)
    direction, h = torch.randn(shape), 1e-6
    ends = [truth(dense_of(weight + s * direction), columns, rows) for s in (h, -h)]
    measured = ((ends[0] - ends[1]) * factors).sum() / (2 * h)
    close((gradient * direction).sum(), measured.detach(), 1e-5)


@each([Exact(), Auto(), Lanczos(1e-9, 3)])
def test_gradient_at_zero_is_finite(norm):
    a = dense_of(torch.zeros(6, 8))
    value = norms(norm, a, *samples(a)).value
    assert not value.any()
    assert torch.autograd.grad(value.sum(), a.weight)[0].isfinite().all()


@each([Exact(), Auto(), Lanczos(1e-9, 3)])
def test_weights_are_constants(norm):
    a = dense_of(torch.randn(6, 8))
    columns, rows = (mask.requires_grad_() for mask in samples(a))
    value = norms(norm, a, columns, rows).value
    assert all(
        g is None for g in torch.autograd.grad(value.sum(), (columns, rows), allow_unused=True)
    )
    with torch.no_grad():
        assert not norms(norm, a, columns, rows).value.requires_grad


# ---------------------------------------------------------------- what does not fit


@each([PowerIteration(), LOBPCG()])
def test_iterated_vectors_belong_to_a_bound(norm):
    a = dense_of(torch.randn(3, 4))
    with pytest.raises(LipcertError, match=r"kept by the bound.*Auto\(\)"):
        masked_norms(norm, a, *samples(a), norm(a))


def test_no_weights_at_all():
    a = dense_of(torch.randn(3, 4))
    with pytest.raises(LipcertError, match="columns, rows or both"):
        masked_norms(Exact(), a, None, None, Exact()(a))


def test_large_maps(monkeypatch):
    """Neither a matrix for a scale, nor for Auto; Exact says what to do."""
    wide = scale((70_000,), 70_000)
    rows = torch.ones(2, 70_000)
    rows[0, : 70_000 - 5] = 0
    close(norms(Exact(), wide, None, rows).value[0], wide.diagonal[-5:].abs().max())
    copies = identity((70_000,))
    close(norms(Exact(), copies, None, rows).value, torch.ones(2))
    pooling = Separable((70_000, 2), (70_000, 1), (None, live(1, 2)))
    rows = torch.ones(1, 70_000, 1)
    rows[0, 0] = 0
    with pytest.raises(LipcertError, match=r"140000 matrix.*Auto\(\)"):
        norms(Exact(), pooling, None, rows)
    close(norms(Auto(), pooling, None, rows).value[0], Exact()(pooling).value)
    monkeypatch.setattr("lipcert.spectral.masked.AUTO_SIDE", 2)
    a = Dense((4,), (3,), live(3, 4))
    close(norms(Auto(), a, *masks(a)).value[:1], svd(a)[None])
