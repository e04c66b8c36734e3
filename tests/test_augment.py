"""Augmentation: what a batch of pictures becomes, pixel by pixel."""

import itertools
import math

import pytest
import torch

from lipcert.augment import ColourJitter, RandomAffine, ReflectedCrop, random_flip
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


PICTURES = {"square": (5, 5), "wide": (4, 7), "tall": (6, 4)}


@pytest.mark.parametrize("size", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_reflected_crop_is_any_window_of_the_mirrored_picture(size, most):
    h, w = size
    shifts = (2 * most + 1) ** 2
    n = 200 * shifts
    picture = torch.rand(3, h, w)
    # Mirrored by hand: the border itself is not repeated.
    rows = [abs(i) if i < h else 2 * (h - 1) - i for i in range(-most, h + most)]
    columns = [abs(j) if j < w else 2 * (w - 1) - j for j in range(-most, w + most)]
    wide = picture[:, rows][:, :, columns]
    windows = torch.stack(
        [wide[:, i : i + h, j : j + w] for i in range(2 * most + 1) for j in range(2 * most + 1)]
    )
    crops = ReflectedCrop(most)(picture.expand(n, 3, h, w))
    same = (crops[:, None] == windows).flatten(2).all(2)
    assert (same.sum(1) == 1).all()
    counts = same.sum(0)
    # 200 of each are expected, with a deviation of 14.
    assert counts.min() > 130
    assert counts.max() < 270


def test_a_reflected_crop_shifts_each_picture_by_itself():
    x = torch.rand(64, 2, 6, 6)
    alike = x[:1].expand_as(x)
    moved = ReflectedCrop(2)(alike)
    assert len(moved.flatten(1).unique(dim=0)) > 10
    torch.manual_seed(5)
    first = ReflectedCrop(2)(x)
    torch.manual_seed(5)
    assert torch.equal(ReflectedCrop(2)(x), first)
    assert not torch.equal(ReflectedCrop(2)(x), first)
    # A picture comes of itself and of no other.
    own = torch.arange(64.0).reshape(-1, 1, 1, 1).expand(64, 2, 6, 6)
    assert torch.equal(ReflectedCrop(2)(own), own)


def grey_of(picture):
    """How bright each pixel is, one by one."""
    _, h, w = picture.shape
    out = torch.zeros(h, w)
    for i in range(h):
        for j in range(w):
            red, green, blue = picture[:, i, j].tolist()
            out[i, j] = 0.299 * red + 0.587 * green + 0.114 * blue
    return out


def blended(picture, other, factor):
    return (factor * picture + (1 - factor) * other).clamp(0, 1)


OTHERS = {
    "brightness": lambda p: torch.zeros(()),
    "contrast": lambda p: grey_of(p).mean(),
    "saturation": lambda p: grey_of(p),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
def test_each_change_of_colour_by_a_given_factor(name, factor):
    x = torch.rand(4, 3, 3, 5)
    found = ColourJitter(**{name: (factor, factor)})(x)
    expected = torch.stack([blended(p, OTHERS[name](p), factor) for p in x])
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, x) or factor == 1


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("strength", [0.25, 0.0, (0.3, 2.0)])
def test_factors_are_uniform_in_their_range(name, strength):
    """Dull colours around a dark grey, so that nothing is clipped and factors can be read off."""
    x = 0.3 + 0.05 * torch.rand(3, 3, 4)
    n = 3000
    found = ColourJitter(**{name: strength})(x.expand(n, 3, 3, 4))
    other = OTHERS[name](x)
    towards = (x - other).flatten()
    factors = ((found - other).flatten(1) @ towards) / (towards @ towards)
    torch.testing.assert_close(
        found, other + factors.view(-1, 1, 1, 1) * (x - other)
    )  # one factor a picture
    low, high = strength if isinstance(strength, tuple) else (1 - strength, 1 + strength)
    assert factors.min() >= low - 1e-9
    assert factors.max() <= high + 1e-9
    for share in (0.1, 0.5, 0.9):
        found_at = factors.quantile(share).item()
        assert found_at == pytest.approx(low + share * (high - low), abs=0.05 * (high - low) + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_colours_without_strength_stay(dtype):
    x = torch.rand(8, 3, 5, 5, dtype=dtype)
    found = ColourJitter()(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


def test_grey_pictures_have_no_colour_to_change():
    x = torch.rand(20, 1, 6, 6).expand(20, 3, 6, 6)
    torch.testing.assert_close(ColourJitter(saturation=(0.0, 3.0))(x), x)
    coloured = torch.rand(20, 3, 6, 6)
    assert not torch.allclose(ColourJitter(saturation=(0.0, 3.0))(coloured), coloured)


def test_colours_stay_pixels_and_come_of_the_seed():
    x = torch.rand(200, 3, 6, 6).round(decimals=1)
    change = ColourJitter((0.0, 3.0), (0.0, 3.0), (0.0, 3.0))
    torch.manual_seed(3)
    first = change(x)
    torch.manual_seed(3)
    assert torch.equal(change(x), first)
    assert not torch.equal(change(x), first)
    assert first.min() == 0
    assert first.max() == 1


def test_the_three_changes_come_in_every_order():
    """Constants in place of random factors; each order gives another picture."""
    x = torch.rand(1, 3, 4, 4)
    factors = {"brightness": 1.8, "contrast": 0.4, "saturation": 2.0}
    expected = []
    for order in itertools.permutations(factors):
        picture = x[0]
        for name in order:
            picture = blended(picture, OTHERS[name](picture), factors[name])
        expected.append(picture)
    change = ColourJitter(**{name: (f, f) for name, f in factors.items()})
    seen = [0] * len(expected)
    for _ in range(600):
        found = change(x)[0]
        gaps = [(found - one).abs().max() for one in expected]
        best = min(range(len(gaps)), key=lambda i: gaps[i])
        assert gaps[best] < 1e-9
        seen[best] += 1
    assert min(seen) > 60  # 100 on average
