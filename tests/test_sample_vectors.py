"""Vectors of single samples: what was kept for a number comes back for it, and for no other."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lipcert as lc
from balls import built
from lipcert.layers import MaxMin
from test_api import jaxtyping_off

SHAPES = {"a": (2, 3), "b": (4,)}
WHERE = pytest.mark.parametrize("where", ["memory", "device", "folder"])


def kept(where, folder: Path, samples=6, **more):
    """Room for the vectors of `SHAPES`, in each of the places they may lie."""
    places = {"memory": None, "device": torch.device("cpu"), "folder": folder / "new" / "vectors"}
    vectors = lc.SampleVectors(samples, where=places[where], **{"dtype": torch.float64} | more)
    vectors.prepare(SHAPES)
    return vectors


def numbers(*places):
    return torch.tensor(places, dtype=torch.long)


# ---------------------------------------------------------------- by number


@WHERE
def test_rows_come_back_by_number(where, tmp_path):
    vectors = kept(where, tmp_path)
    rows = {name: torch.randn(3, *shape) for name, shape in SHAPES.items()}
    for name in SHAPES:
        vectors.store(name, numbers(4, 0, 5), rows[name])
    for name, shape in SHAPES.items():
        start = torch.randn(5, *shape)
        found = vectors.load(name, numbers(0, 3, 5, 4, 1), start)
        expected = torch.stack([rows[name][1], start[1], rows[name][2], rows[name][0], start[4]])
        assert torch.equal(found, expected)


@WHERE
def test_numbers_without_vectors_get_the_start(where, tmp_path):
    vectors = kept(where, tmp_path)
    vectors.store("a", numbers(1), torch.ones(1, 2, 3))
    start = torch.randn(2, 2, 3)
    assert torch.equal(vectors.load("a", numbers(0, 2), start), start)
    assert torch.equal(vectors.load("b", numbers(1), torch.full((1, 4), 7.0))[0], torch.ones(4) * 7)
    assert vectors.load("a", numbers(), start[:0]).shape == (0, 2, 3)
    vectors.store("a", numbers(), start[:0])


def test_the_start_is_left_alone_and_may_be_a_view(tmp_path):
    """The bound gives one row expanded to all samples: writing to it would be to write to all."""
    vectors = kept("memory", tmp_path)
    vectors.store("b", numbers(2), torch.arange(4.0)[None])
    row = torch.full((4,), 9.0)
    found = vectors.load("b", numbers(2, 3), row.expand(2, 4))
    assert found.tolist() == [[0, 1, 2, 3], [9, 9, 9, 9]]
    assert row.tolist() == [9, 9, 9, 9]


def test_the_last_of_two_counts_and_is_a_copy(tmp_path):
    vectors = kept("memory", tmp_path)
    rows = torch.zeros(1, 4)
    vectors.store("b", numbers(0), rows)
    rows += 1
    vectors.store("b", numbers(0), rows)
    rows += 1
    found = vectors.load("b", numbers(0), torch.zeros(1, 4))
    assert found.tolist() == [[1, 1, 1, 1]]
    found += 5
    assert vectors.load("b", numbers(0), torch.zeros(1, 4)).tolist() == [[1, 1, 1, 1]]


def test_precisions(tmp_path):
    """Kept in half precision by default, given in that of the start."""
    half = lc.SampleVectors(3)
    half.prepare(SHAPES)
    assert half.dtype is torch.float16
    rows = torch.nn.functional.normalize(torch.randn(2, 4), dim=1)
    half.store("b", numbers(0, 2), rows)
    for dtype in (torch.float32, torch.float64):
        found = half.load("b", numbers(0, 2), torch.zeros(2, 4, dtype=dtype))
        assert found.dtype is dtype
        assert torch.equal(found, rows.half().to(dtype))
    exact = kept("memory", tmp_path)
    exact.store("b", numbers(0, 2), rows)
    assert torch.equal(exact.load("b", numbers(0, 2), torch.zeros(2, 4)), rows)


# ---------------------------------------------------------------- room


@WHERE
@pytest.mark.parametrize(("limit", "capacity"), [(4 * 80 + 79, 4), (80, 1), (10**9, 6)])
def test_the_limit_is_of_all_vectors_together(where, tmp_path, limit, capacity):
    """A sample takes 2 * 3 + 4 numbers of 8 bytes."""
    vectors = kept(where, tmp_path, limit=limit)
    assert vectors.capacity == capacity
    rows, start = torch.randn(6, 4), torch.randn(6, 4)
    vectors.store("b", torch.arange(6), rows)
    found = vectors.load("b", torch.arange(6), start)
    assert torch.equal(found[:capacity], rows[:capacity])
    assert torch.equal(found[capacity:], start[capacity:])
    if where == "folder":
        files = sorted((tmp_path / "new" / "vectors").iterdir())
        assert [f.name for f in files] == ["a.bin", "b.bin"]
        assert sum(f.stat().st_size for f in files) == 80 * capacity <= limit


@pytest.mark.parametrize(("dtype", "capacity"), [(torch.float16, 5), (torch.float32, 2)])
def test_smaller_precisions_leave_room_for_more(tmp_path, dtype, capacity):
    assert kept("memory", tmp_path, limit=100, dtype=dtype).capacity == capacity


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_no_room_at_all_keeps_nothing(where, tmp_path):
    vectors = kept(where, tmp_path, limit=79)
    start = torch.randn(2, 4)
    vectors.store("b", numbers(0, 1), start + 1)
    assert torch.equal(vectors.load("b", numbers(0, 1), start), start)


def test_vectors_of_an_earlier_run_in_a_folder_are_not_taken(tmp_path):
    """They are of other weights; only what was stored here is known."""
    first = kept("folder", tmp_path)
    first.store("b", numbers(1), torch.ones(1, 4))
    again, start = kept("folder", tmp_path), torch.zeros(1, 4)
    assert torch.equal(again.load("b", numbers(1), start), start)


# ---------------------------------------------------------------- in a bound


def clipped(starts=None, norm=None):
    graph = lc.trace(built("clipped", trained=True), (6,))
    norm = lc.PowerIteration(1) if norm is None else norm
    torch.manual_seed(5)  # of the bound's own vectors
    return lc.Product(graph, norm=norm, region=lc.L2Ball(0.1), starts=starts)


def pairs(bound, x, index=None):
    K = bound(x, index=index).dense()
    return K.masked_fill(torch.eye(3).bool(), 0).detach()


@pytest.mark.parametrize("norm", [lc.PowerIteration(2), lc.LOBPCG(1)], ids=str)
def test_passes_add_up_for_the_same_numbers_only(norm):
    bound = clipped(lc.SampleVectors(9, dtype=torch.float64), norm)
    x = torch.randn(4, 6)
    exact = pairs(lc.Product(bound.graph, norm=lc.Exact(), region=bound.region), x)
    with torch.no_grad(), bound.held():  # the vectors of the whole maps stay as they are
        first = pairs(bound, x)
        assert torch.equal(pairs(bound, x), first)  # without numbers nothing is kept
        for _ in range(16):
            last = pairs(bound, x, numbers(7, 2, 8, 0))
        assert torch.equal(pairs(bound, x, numbers(1, 3, 4, 5)), first)
        # In another order and among samples that are new.
        found = pairs(bound, x[[2, 0, 0]], numbers(8, 7, 6))
    assert (first < exact * (1 - 1e-3)).any()
    assert (last <= exact * (1 + 1e-9)).all()
    torch.testing.assert_close(last, exact, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(found[:2], last[[2, 0]], rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(found[2], first[0], rtol=1e-12, atol=1e-12)


def test_numbers_are_ignored_where_nothing_is_kept():
    bound, x = clipped(), torch.randn(2, 6)
    with bound.held():
        assert torch.equal(pairs(bound, x, numbers(0, 1)), pairs(bound, x))


def test_they_are_no_state():
    starts = lc.SampleVectors(3)
    bound, x = clipped(starts), torch.randn(3, 6)
    plain = clipped()
    assert bound.state_dict().keys() == plain.state_dict().keys()
    for _ in range(2):
        bound(x, index=torch.arange(3))
    assert {k: v.shape for k, v in bound.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    resumed = clipped(lc.SampleVectors(3))
    resumed.load_state_dict(bound.state_dict())
    plain.load_state_dict(bound.state_dict())
    assert torch.equal(pairs(resumed, x, torch.arange(3)), pairs(plain, x))


def test_steps_of_training_have_finite_gradients_and_keep_none():
    bound = clipped(lc.SampleVectors(3))
    x, parameters = torch.randn(3, 6), list(bound.graph.model.parameters())
    for _ in range(3):
        K = bound(x, index=torch.arange(3))
        total = K.row(numbers(0, 1, 2))[:, 1:].sum() + K.drop(numbers(0, 1, 2))[:, 1:].sum()
        slopes = torch.autograd.grad(total, parameters, allow_unused=True)
        assert all(s is None or s.isfinite().all() for s in slopes)
        assert slopes[0].abs().sum() > 0


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("sizes", [(0, 100), (-1, 100), (4, 0), (4, -5)])
def test_sizes_below_one(sizes):
    with pytest.raises(lc.LipcertError, match="needs both >= 1"):
        lc.SampleVectors(*sizes)


def test_numbers_beyond_the_samples_are_not_kept(tmp_path):
    vectors, start = kept("memory", tmp_path), torch.zeros(2, 4)
    vectors.store("b", numbers(6, 1000), torch.ones(2, 4))
    assert torch.equal(vectors.load("b", numbers(6, 1000), start), start)


def test_negative_numbers_are_no_other_samples(tmp_path):
    """-1 must not be the last sample."""
    vectors, start = kept("memory", tmp_path), torch.zeros(1, 4)
    with jaxtyping_off(), pytest.raises(lc.LipcertError, match="index"):
        vectors.store("b", numbers(-1), torch.ones(1, 4))
    with jaxtyping_off(), pytest.raises(lc.LipcertError, match="index"):
        vectors.load("b", numbers(-1), start)


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_numbers_as_samples(count):
    bound = clipped(lc.SampleVectors(4))
    with jaxtyping_off(), pytest.raises(lc.LipcertError, match="index"):
        bound(torch.randn(2, 6), index=torch.arange(count))


def test_networks_without_affine_maps_have_nothing_to_keep():
    graph = lc.trace(nn.Sequential(MaxMin()), (4,))
    bound = lc.Product(
        graph, norm=lc.PowerIteration(1), region=lc.L2Ball(0.1), starts=lc.SampleVectors(4)
    )
    K = bound(torch.randn(2, 4), index=torch.arange(2)).row(numbers(0, 1))
    assert K[0, 1].item() == pytest.approx(math.sqrt(2))
