"""Augmentation: what a batch of pictures becomes, pixel by pixel."""

import math

import pytest
import torch

from lipcert.augment import RandomAffine, random_flip
from lipcert.errors import LipcertError


def shifted(picture, right, down):
    """The picture moved by whole pixels, zeros from outside."""
    _, h, w = picture.shape
    out = torch.zeros_like(picture)
    rows, columns = slice(max(0, down), h + min(0, down)), slice(max(0, right), w + min(0, right))
    source = picture.roll((down, right), (1, 2))
    out[:, rows, columns] = source[:, rows, columns]
    return out


def draw(monkeypatch, angle=0.0, right=0.0, down=0.0):
    """Makes the next draw, of one picture, as given: shares of the largest change in [-1, 1]."""
    values = (torch.tensor([[angle], [right], [down]]) + 1) / 2
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype: values.to(dtype))


def test_each_picture_is_flipped_or_not_and_nothing_else():
    x = torch.rand(400, 2, 3, 5)
    y = random_flip(x)
    same = (y == x).flatten(1).all(1)
    mirrored = (y == x[..., [4, 3, 2, 1, 0]]).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (32, 32), (28, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_turn_and_shift_nothing_changes(size, dtype):
    x = torch.rand(5, 3, *size, dtype=dtype)
    assert torch.equal(RandomAffine(0, 0)(x), x)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (17, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shifts_are_by_whole_pixels_in_either_direction(size, dtype):
    h, w = size
    x = 0.1 + torch.rand(300, 2, h, w, dtype=dtype)
    y = RandomAffine(0, 0.25)(x)
    across, along = round(0.25 * w), round(0.25 * h)
    seen = set()
    for before, after in zip(x, y, strict=True):
        fits = [
            (right, down)
            for right in range(-across, across + 1)
            for down in range(-along, along + 1)
            if torch.equal(after, shifted(before, right, down))
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert {right for right, _ in seen} == set(range(-across, across + 1))
    assert {down for _, down in seen} == set(range(-along, along + 1))
    assert len({abs(right) == abs(down) for right, down in seen}) == 2  # drawn apart


def test_shifts_go_right_and_down(monkeypatch):
    x = 0.1 + torch.rand(1, 1, 10, 10)
    draw(monkeypatch, right=1.0, down=-0.5)
    assert torch.equal(RandomAffine(0, 0.2)(x)[0], shifted(x[0], 2, -1))


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize(("share", "quarters"), [(1.0, -1), (-1.0, 1)])
def test_a_quarter_turn_is_exact(monkeypatch, size, share, quarters):
    x = torch.rand(1, 2, size, size)
    draw(monkeypatch, angle=share)
    assert torch.equal(RandomAffine(90, 0)(x), x.rot90(quarters, (2, 3)))


def test_a_half_turn_is_exact_on_a_picture_that_is_not_square(monkeypatch):
    x = torch.rand(1, 1, 5, 8)
    draw(monkeypatch, angle=1.0)
    assert torch.equal(RandomAffine(180, 0)(x), x.flip(2, 3))


@pytest.mark.parametrize("size", [(21, 21), (15, 31)])
def test_turning_takes_the_nearest_pixel_and_shifting_comes_after(monkeypatch, size):
    """Pixel by pixel, with the angle and the shift written out."""
    h, w = size
    x, degrees, right, down = 0.1 + torch.rand(1, 1, h, w), 25.0, 2, 1
    draw(monkeypatch, angle=1.0, right=(right + 0.3) / (0.2 * w), down=(down - 0.4) / (0.2 * h))
    y = RandomAffine(degrees, 0.2, fill=0.5)(x)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for row in range(h):
        for column in range(w):
            u, v = column - (w - 1) / 2 - right, row - (h - 1) / 2 - down
            from_column = round(cos * u + sin * v + (w - 1) / 2)
            from_row = round(-sin * u + cos * v + (h - 1) / 2)
            inside = 0 <= from_column < w and 0 <= from_row < h
            expected = x[0, 0, from_row, from_column] if inside else 0.5
            assert y[0, 0, row, column] == expected
    assert (y == 0.5).any()


def test_the_angles_fill_their_range_and_differ_by_picture():
    """The direction in which a line through the centre points."""
    x = torch.zeros(300, 1, 41, 41)
    x[:, :, 20, 20:] = 1.0
    y = RandomAffine(20, 0)(x)
    place = torch.arange(41) - 20.0
    degrees = torch.atan2((y * place[:, None]).sum((1, 2, 3)), (y * place).sum((1, 2, 3))).rad2deg()
    assert degrees.abs().max() < 21
    assert degrees.max() > 18
    assert degrees.min() < -18
    assert degrees.mean().abs() < 2


def test_only_pixels_from_outside_are_filled():
    x = torch.zeros(50, 3, 16, 16)
    y = RandomAffine(0, 0.25, fill=0.5)(x)
    assert set(y.unique().tolist()) == {0.0, 0.5}
    assert (y == y[:, :1]).all()


def test_the_global_generator_decides():
    x = torch.rand(8, 3, 12, 12)

    def made(seed):
        torch.manual_seed(seed)
        return RandomAffine(10, 0.1)(random_flip(x))

    assert torch.equal(made(3), made(3))
    assert not torch.equal(made(3), made(4))


@pytest.mark.parametrize(("degrees", "translate"), [(-1, 0), (math.nan, 0), (0, -0.1), (0, 1.5)])
def test_senseless_ranges_are_refused(degrees, translate):
    with pytest.raises(LipcertError, match="degrees="):
        RandomAffine(degrees, translate)
