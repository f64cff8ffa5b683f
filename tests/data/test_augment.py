"""Augmentations against loops, their statistics, and the language they are written in."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedistill.data import DataError, augment
from spikedistill.data.augment import (
    cutout,
    drop_area,
    drop_events,
    drop_time,
    flip,
    jitter,
    noise,
    parse,
    roll,
    rotate,
    shift,
    suits,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=64, channels=3, high=9, wide=7):
    return torch.rand(n, channels, high, wide, generator=rng(9)) * 0.9 + 0.1


ALL = [
    flip(),
    shift(2),
    roll(2),
    cutout(3),
    drop_area(0.5),
    rotate(30),
    jitter(0.4),
    parse("flip|shift(2)|jitter(0.1)"),
]


@pytest.mark.parametrize("change", ALL, ids=repr)
def test_pure_and_well_behaved(change):
    x = batch()
    kept = x.clone()
    y = change(x, rng())
    assert torch.equal(x, kept) and y.shape == x.shape and y.dtype == x.dtype
    assert torch.equal(y, change(x, rng())) and not torch.equal(y, change(x, rng(1)))
    assert y.min() >= 0 and y.max() <= 1
    torch.manual_seed(0)
    state = torch.get_rng_state()
    change(x, rng())
    assert torch.equal(state, torch.get_rng_state())
    movie = x[:, None].expand(-1, 2, -1, -1, -1)  # [B,T,C,H,W]: every step changes alike
    moved = change(movie, rng())
    assert torch.equal(moved[:, 0], moved[:, 1])


@pytest.mark.parametrize("change", ALL, ids=repr)
def test_layout_does_not_matter(change):
    x = batch()
    assert torch.allclose(change(x, rng()), change(x.contiguous(memory_format=torch.channels_last), rng()), atol=1e-6)


def test_flip():
    x = batch(400)
    y = flip()(x, rng())
    flipped = torch.tensor([torch.equal(b, a.flip(-1)) for a, b in zip(x, y, strict=True)])
    kept = torch.tensor([torch.equal(b, a) for a, b in zip(x, y, strict=True)])
    assert (flipped ^ kept).all() and 160 < flipped.sum() < 240
    assert torch.equal(flip(1.0)(x, rng()), x.flip(-1)) and torch.equal(flip(0)(x, rng()), x)


def moved(image, down, right):  # in loops
    out = torch.zeros_like(image)
    _, high, wide = image.shape
    for i in range(high):
        for j in range(wide):
            if 0 <= i - down < high and 0 <= j - right < wide:
                out[:, i, j] = image[:, i - down, j - right]
    return out


def test_shift_equals_loops():
    x = batch(200)
    y = shift(2)(x, rng())
    options = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    found = []
    for a, b in zip(x, y, strict=True):
        match = [o for o in options if torch.equal(moved(a, *o), b)]
        assert len(match) == 1
        found += match
    assert set(found) == set(options)  # both ends, both directions
    assert torch.equal(shift(0)(x, rng()), x)


def test_roll_equals_torch():
    x = batch(200)
    found = set()
    for a, b in zip(x, roll(2)(x, rng()), strict=True):
        by = [(i, j) for i in range(-2, 3) for j in range(-2, 3) if torch.equal(a.roll((i, j), (-2, -1)), b)]
        assert len(by) == 1
        found.add(by[0])
    assert len(found) == 25 and torch.equal(roll(0)(x, rng()), x)


def test_drop_area_is_a_rectangle_of_any_size():
    x = batch(800, high=12, wide=20)
    shares = []
    for a, b in zip(x, drop_area(0.5)(x, rng()), strict=True):
        hole = (b == 0).all(0)
        assert torch.equal(hole, (b == 0).any(0)) and torch.equal(b[:, ~hole], a[:, ~hole])
        high, wide = int(hole.any(1).sum()), int(hole.any(0).sum())
        assert hole.sum() == high * wide and abs(wide / 20 - high / 12) < 0.09
        shares.append(hole.float().mean())
    shares = torch.stack(shares)
    assert shares.max() < 0.55 and abs(shares.mean() - 0.25) < 0.02 and shares.min() < 0.02
    assert torch.equal(drop_area(0)(x, rng()), x)


def movie(n=300, steps=6):
    return torch.randint(1, 5, (n, steps, 2, 7, 9), generator=rng(9)).float()


@pytest.mark.parametrize(
    "change", [drop_time(), drop_events(), noise(0.5), parse("flip|roll(2)|drop_time|noise")], ids=repr
)
def test_words_for_events(change):
    x = movie(20)
    kept = x.clone()
    y = change(x, rng())
    assert torch.equal(x, kept) and y.shape == x.shape and y.dtype == x.dtype
    assert torch.equal(y, change(x, rng())) and not torch.equal(y, change(x, rng(1)))
    assert torch.equal(y, y.round()) and y.min() >= 0
    with pytest.raises(DataError, match=r"is for frames of events \[B,T,C,H,W\], not for \[64, 3, 9, 7\]"):
        change(batch(), rng())


@pytest.mark.parametrize("change", [flip(), shift(2), roll(2), cutout(3), drop_area(0.4)], ids=repr)
def test_counts_stay_counts_and_all_steps_change_alike(change):
    x = movie(50)
    y = change(x, rng())
    assert torch.equal(y, y.round()) and not torch.equal(x, y)
    for t in range(6):
        assert torch.equal(change(x[:, t], rng()), y[:, t])


def test_drop_time_empties_frames_in_a_row():
    x = movie(900)
    y = drop_time(0.5)(x, rng())
    gone = (y == 0).all((2, 3, 4))
    assert torch.equal(y[~gone], x[~gone]) and torch.equal(gone, (y == 0).any((2, 3, 4)))
    assert set(gone.sum(1).tolist()) == {0, 1, 2, 3} and (gone.float().mean(0) > 0.1).all()
    for row in gone:
        at = row.nonzero()[:, 0].tolist()
        assert at == list(range(at[0], at[0] + len(at))) if at else True
    assert (drop_time(1.0)(x, rng()) == 0).all((1, 2, 3, 4)).any() and torch.equal(drop_time(0)(x, rng()), x)


def test_drop_events_is_a_share_of_each_sample():
    x = movie(400)
    y = drop_events(0.6)(x, rng())
    gone = y == 0
    assert torch.equal(y[~gone], x[~gone])
    shares = gone.float().mean((1, 2, 3, 4))
    assert shares.min() < 0.03 and 0.55 < shares.max() < 0.67 and abs(shares.mean() - 0.3) < 0.03


def test_noise_is_poisson():
    added = noise(0.3)(movie(200), rng()) - movie(200)
    assert torch.equal(added, added.round()) and added.min() == 0
    assert abs(added.mean() - 0.3) < 0.01 and abs(added.var() - 0.3) < 0.01


def test_what_an_augmentation_is_for():
    suits(parse("flip|noise"), events=True), suits(parse("flip|jitter(0.1)"), events=False), suits(None, events=True)
    suits(lambda x, generator: x, events=True)
    with pytest.raises(DataError, match=r"noise is for events: these data are images"):
        suits(parse("flip|noise"), events=False)
    with pytest.raises(DataError, match=r"jitter\(0\.1\) is for images: these data are events"):
        suits(parse("jitter(0.1)"), events=True)


def test_cutout_is_one_square_anywhere():
    x = batch(600)
    y = cutout(3)(x, rng())
    hole = (y == 0).all(1)
    assert torch.equal(hole, (y == 0).any(1)) and torch.equal(y[:, 0][~hole], x[:, 0][~hole])
    for one in hole:
        rows, cols = one.any(1).nonzero(), one.any(0).nonzero()
        assert one.sum() == len(rows) * len(cols) and 2 <= len(rows) <= 3 and 2 <= len(cols) <= 3
    assert hole.any(0).all()


def test_rotate_against_known_turns():
    x = batch(1, high=8, wide=8)

    def by(degrees):
        word = rotate(180)
        draw = (degrees / 180 + 1) / 2
        real, torch.rand = torch.rand, lambda n, generator: torch.full((n,), draw)
        try:
            return word(x, rng())
        finally:
            torch.rand = real

    assert torch.allclose(by(0), x, atol=1e-5)
    assert torch.allclose(by(90), torch.rot90(x, -1, (-2, -1)), atol=1e-4) or torch.allclose(
        by(90), torch.rot90(x, 1, (-2, -1)), atol=1e-4
    )
    assert torch.allclose(by(180), x.flip(-1, -2), atol=1e-4)


def test_rotate_keeps_angles_in_images_that_are_not_square():
    grid_y, grid_x = torch.meshgrid(torch.arange(21) - 10.0, torch.arange(41) - 20.0, indexing="ij")
    disc = ((grid_x**2 + grid_y**2) < 64).float()[None, None]
    turned = rotate(180)(disc.expand(8, -1, -1, -1), rng())
    assert (turned - disc).abs().mean() < 0.02  # a disc stays a disc, not an ellipse


def test_jitter():
    x = batch(300) * 0.4 + 0.2
    y = jitter(0.2)(x, rng())
    for a, b in zip(x, y, strict=True):  # brightness * (mean + contrast * (a - mean)): affine, both within 20 %
        bright, contrast = b.mean() / a.mean(), b.std() / a.std() / (b.mean() / a.mean())
        assert 0.79 < bright < 1.21 and 0.79 < contrast < 1.21
        assert torch.allclose(b, bright * (a.mean() + contrast * (a - a.mean())), atol=1e-4)
    assert math.isclose((y.mean((1, 2, 3)) / x.mean((1, 2, 3))).mean(), 1, abs_tol=0.03)


def test_parse():
    x = batch()
    both = parse(" flip | shift( 2 ) ")
    assert repr(both) == "flip|shift(2)"
    g = rng()
    assert torch.equal(both(x, rng()), shift(2)(flip()(x, g), g))
    assert parse("none") is None and parse("shift(pixels=2)") == shift(2) and parse("flip()") == flip()


numbers = st.floats(0, 1, allow_nan=False)
words = st.one_of(
    st.builds(flip, numbers),
    st.builds(shift, st.integers(0, 64)),
    st.builds(jitter, numbers),
    st.builds(rotate, numbers),
    st.builds(roll, st.integers(0, 64)),
    st.builds(drop_area, numbers),
    st.builds(drop_time, numbers),
    st.builds(drop_events, numbers),
    st.builds(noise, numbers),
)


@given(st.lists(words, min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_repr_round_trips(parts):
    change = parts[0] if len(parts) == 1 else augment.chain(tuple(parts))
    assert parse(repr(change)) == change


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("flip|shft(2)", r"unknown augmentation 'shft' .* did you mean 'shift'\? Valid: flip\(p\), shift\(pixels\)"),
        ("qqq", "unknown augmentation 'qqq'.*Valid: flip"),
        ("flip|none", "unknown augmentation 'none'"),
        ("shift", r"wrong arguments of shift .* shift\(pixels\), where pixels is a whole number from 0 to 64"),
        ("shift(a)", "wrong arguments of shift"),
        ("shift(2, 3)", "wrong arguments of shift"),
        ("shift(wide=3)", "wrong arguments of shift"),
        ("shift(**{'pixels': 2})", "wrong arguments of shift"),
        ("shift(1.5)", "whole number from 0 to 64, not 1.5"),
        ("shift(True)", "not True"),
        ("shift(-1)", "not -1"),
        ("flip(2)", "p is a number from 0 to 1, not 2"),
        ("jitter('a')", "not 'a'"),
        ("flip|", "cannot read the augmentation"),
        ("", "cannot read"),
        ("flip+shift(2)", "cannot read"),
        ("__import__('os').system('ls')", "cannot read"),
        ("3", "cannot read"),
    ],
)
def test_parse_errors(text, says):
    with pytest.raises(DataError, match=says):
        parse(text)


@pytest.mark.parametrize("change", [shift(7), cutout(8)], ids=repr)
def test_too_large_for_the_image(change):
    with pytest.raises(DataError, match="too large for images of 9x7"):
        change(batch(), rng())
