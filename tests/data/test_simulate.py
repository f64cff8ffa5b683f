"""The simulated event camera: what must be so of any, a loop over pixels, and N-MNIST's files written and read."""

import math

import numpy as np
import pytest
import torch

from spikedistill.data import DataError, check, images, load, simulate
from spikedistill.data.events import frames
from spikedistill.data.simulate import Camera

QUIET = Camera(noise=0)
EXACT = Camera(noise=0, mismatch=0)


def pictures(n=3, high=28, wide=28, seed=0):
    return torch.rand(n, high, wide, generator=torch.Generator().manual_seed(seed)).pow(2)


def total(x):
    return x.float().sum().item()


def test_a_picture_that_does_not_move_gives_noise_only():
    assert total(simulate.frames(pictures(), 6, Camera(noise=0, reach=0))) == 0
    assert (
        total(simulate.frames(torch.full((3, 34, 34), 0.5), 6, Camera(noise=0, wall=0.5))) == 0
    )  # nor does an empty one
    n, camera = 40, Camera(noise=2.0, reach=0)
    noise = simulate.frames(pictures(n), 6, camera)
    mean = n * 2.0 * 34 * 34 * 0.3
    assert abs(total(noise) - mean) < 4 * math.sqrt(mean)
    assert np.allclose(noise.float().sum((0, 3, 4)) / total(noise), 1 / 12, atol=0.01)  # any time, both polarities


def test_polarities_swap_when_black_and_white_do():
    squares = (pictures(4) > 0.4).float()
    one = simulate.frames(squares, 6, EXACT)
    other = simulate.frames(1 - squares, 6, Camera(noise=0, mismatch=0, wall=1.0))
    assert total(one) > 1000 and torch.equal(one, other.flip(2))


def test_a_higher_threshold_gives_fewer_events():
    counts = [total(simulate.frames(pictures(), 6, Camera(noise=0, threshold=0.2 * 2**k))) for k in range(4)]
    assert counts[0] > 2 * counts[1] > 4 * counts[2] > 8 * counts[3] > 0


def test_the_seed_decides():
    x = pictures()
    for make in (
        lambda s: simulate.frames(x, 6, seed=s),
        lambda s: torch.tensor([len(e) for e in simulate.events(x, seed=s)]),
    ):
        assert torch.equal(make(1), make(1)) and not torch.equal(make(1), make(2))
    assert torch.equal(simulate.frames(x, 6, QUIET, 1), simulate.frames(x, 6, QUIET, 2))
    assert not torch.equal(simulate.frames(x, 6, QUIET), simulate.frames(x, 6, Camera(noise=0, seed=1)))  # other pixels
    state = torch.get_rng_state()
    simulate.events(x)
    assert torch.equal(state, torch.get_rng_state())


def test_chunks_change_nothing(monkeypatch):
    x = pictures(7)
    whole = simulate.frames(x, 4), simulate.events(x)
    monkeypatch.setattr(simulate, "CHUNK", 3)
    assert torch.equal(simulate.frames(x, 4), whole[0])
    assert all(np.array_equal(a, b) for a, b in zip(simulate.events(x), whole[1], strict=True))


@pytest.mark.parametrize("steps", [1, 5, 6, 7])
def test_frames_count_the_events(steps):
    x, camera = pictures(), Camera(threshold=0.15)
    ticks = steps * round(simulate.TICKS / steps)
    every = simulate.events(x, camera, 3, ticks)
    span = (0, camera.duration)
    counted = torch.stack([frames(e, camera.sensor, steps, "time", span=span) for e in every])
    assert torch.equal(counted, simulate.frames(x, steps, camera, 3).float())
    for e in every:
        assert (np.diff(e["t"]) >= 0).all() and e["t"].min() >= 0 and e["t"].max() < 300_000
        assert len(np.unique(e["t"])) > 2000  # between ticks, too


def test_one_pixel_by_loops():
    """An edge passes by: light by position, crossings counted one after the other."""
    camera = Camera(sensor=(9, 9), noise=0, mismatch=0, threshold=0.07, reach=1.5)
    edge = torch.zeros(1, 9, 9)
    edge[:, :, 5:] = 0.8
    made = simulate.frames(edge, 3, camera)[0, :, :, 4]  # one row: nothing happens up and down
    for column in (4, 5):
        memory, counts = None, torch.zeros(3, 2)
        for tick in range(49):
            corners = [(-1, -1), (1, 0), (-1, 1), (-1, -1)]
            side = min(tick // 16, 2)
            share = tick / 16 - side
            right = 1.5 * ((1 - share) * corners[side][1] + share * corners[side + 1][1])
            place = column - right
            left = math.floor(place)
            log = [math.log(0.1 + (0.8 if 5 <= c < 9 else 0)) for c in (left, left + 1)]
            light = log[0] + (place - left) * (log[1] - log[0])
            memory = light if memory is None else memory
            while light - memory >= 0.07 - 1e-5:
                memory, counts[(tick - 1) // 16, 1] = memory + 0.07, counts[(tick - 1) // 16, 1] + 1
            while memory - light >= 0.07 - 1e-5:
                memory, counts[(tick - 1) // 16, 0] = memory - 0.07, counts[(tick - 1) // 16, 0] + 1
        assert counts.sum() > 10 and torch.equal(made[:, :, column].float(), counts)


def test_the_path_is_a_triangle():
    path = Camera(reach=2).path(48)
    assert path[[0, 16, 32, 48]].tolist() == [[-2, -2], [2, 0], [-2, 2], [-2, -2]]
    lengths = (path[1:] - path[:-1]).norm(dim=1).view(3, 16)
    assert torch.allclose(lengths, lengths[:, :1].expand(-1, 16))
    assert lengths[0, 0] == lengths[1, 0]  # isosceles


@pytest.mark.parametrize("reach", [0.0, 0.5, 1.0, 2.0, 2.7])
def test_the_picture_moves_as_the_path_says(reach):
    camera = Camera(sensor=(12, 10), reach=reach, wall=0.3)
    picture = torch.rand(1, 8, 6) * 0.9
    wall, margin = simulate._hung(picture, camera)
    for down, right in camera.path(6).tolist():
        seen = simulate._seen(wall, margin, (down, right), camera.sensor)[0]
        log = torch.full((30, 30), math.log(0.4), dtype=torch.float64)
        log[12:20, 12:18] = (picture[0].double() + 0.1).log()
        for y in (0, 3, 7, 11):
            for x in (0, 4, 9):
                a, b = y - down + 10, x - right + 10  # the picture is 2 from the sensor's edge and 12 from that of log
                i, j = math.floor(a), math.floor(b)
                rows = log[i : i + 2, j : j + 2] * torch.tensor([[1 - a + i], [a - i]], dtype=torch.float64)
                want = (rows * torch.tensor([1 - b + j, b - j], dtype=torch.float64)).sum()
                assert math.isclose(seen[y, x], want, abs_tol=1e-5)


def test_images_of_any_kind():
    x = (pictures() * 255).byte()
    assert torch.equal(simulate.frames(x, 3, QUIET), simulate.frames(x[:, None].float() / 255, 3, QUIET))
    assert simulate.frames(pictures(2, 20, 10), 3, Camera(sensor=(20, 11))).shape == (2, 3, 2, 20, 11)


def test_errors():
    with pytest.raises(DataError, match=r"grey, \[B,H,W\] or \[B,1,H,W\], not \[2, 3, 8, 8\]"):
        simulate.frames(torch.zeros(2, 3, 8, 8), 2)
    with pytest.raises(DataError, match="images of 35x20 pixels do not fit a sensor of 34x34"):
        simulate.events(torch.zeros(1, 35, 20))
    with pytest.raises(DataError, match=r"threshold must be at least 0\.001, not 0"):
        Camera(threshold=0)
    with pytest.raises(DataError, match="steps must be at least 1"):
        simulate.frames(pictures(), 0)
    with pytest.raises(DataError, match="part is Train or Test, not 'train'"):
        simulate.write("/nowhere", pictures(), torch.zeros(3), "train")


def test_written_and_read_by_the_real_loader(tmp_path):
    x, y = pictures(12), torch.arange(12) % 2
    for seed, part in enumerate(("Train", "Test")):
        simulate.write(tmp_path, x, y, part, seed=seed)
    assert (tmp_path / "Train" / "1" / "00012.bin").is_file()
    data = load("nmnist", root=tmp_path, steps=5)
    order = y.argsort(stable=True)  # class by class
    every = simulate.events(x, seed=1)
    assert torch.equal(data.test.labels, y[order])
    for image, i in zip(data.test.images, order, strict=True):
        assert torch.equal(image.float(), frames(every[i], (34, 34), 5, "time"))


@pytest.fixture
def few(tmp_path, monkeypatch):
    """The embedded images, 60 and 20 of them."""
    for path in images.idx_files("fashion-mini", None):
        array = images.read_idx(path, 3 if "idx3" in path.name else 1)[: 60 if "train" in path.name else 20]
        head = bytes((0, 0, 8, array.dim())) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (tmp_path / path.stem).write_bytes(head + array.numpy().tobytes())
    monkeypatch.setattr(images, "EMBEDDED", tmp_path)


def test_fashion_events(few):
    data = load("fashion-events", batch_size=8)
    assert data.shape == (2, 34, 34) and data.steps == 6 and data.classes == images.CLOTHES
    assert data.train.samples + data.valid.samples == 60 and data.test.samples == 20 and "MIT" in data.licence
    batch = next(iter(data.train))
    assert batch["x"].shape == (6, 8, 2, 34, 34) and batch["x"].max() > 1 and batch["x"].sum() / 8 > 1000
    raw = images.read_idx(images.idx_files("fashion-mini", None)[2], 3)
    assert torch.equal(data.test.images, simulate.frames(raw, 6, seed=1))  # of the test images, and of no others
    again = load("fashion-events", batch_size=8, seed=5)
    assert torch.equal(again.train.images, data.train.images)  # the seed moves the order alone
    assert load("fashion-events", steps=2).steps == 2
    with pytest.raises(DataError, match="by time only"):
        load("fashion-events", frames="voxel")
    assert check("fashion-events", steps=4, augment="flip|drop_time(0.3)") == []
    assert len(check("fashion-events", steps=0, size=28, augment="jitter(0.1)")) == 3
