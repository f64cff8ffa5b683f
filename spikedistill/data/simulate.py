"""Images to events, as N-MNIST was made: a camera looks at a picture and moves.

N-MNIST's camera made three saccades along the sides of a triangle, 100 ms each (Orchard et al. 2015, Converting Static
Image Datasets to Spiking Neuromorphic Datasets Using Saccades). Here the picture, on a dark wall, moves instead. What a
pixel sees is log(light + dark), interpolated between the picture's pixels; it remembers the level of its last event.
When it sees a threshold more than it remembers it sends an ON event, a threshold less an OFF event, as often as it
takes, and the memory moves along. Pixels differ a little in their thresholds, and send some events for no reason.

`events` gives the events of a batch of images, `frames` at once their counts by time, `write` N-MNIST's files.
Differs from a real camera: no refractory time, no lag of dark pixels, and the wall's refresh rate is not seen.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import images as sets
from .batches import DataError, generator, scaled
from .events import EVENT, assembled, compact, write_bin
from .splits import Data

CHUNK = 256  # images at a time: what fits a processor's cache
TICKS = 48  # moments at which the light is looked at: 6 ms apart, the picture having moved by less than 0.3 pixels


@dataclass(frozen=True)
class Camera:
    """sensor: height and width; threshold: of ON and OFF, in units of log light; mismatch: its standard deviation
    among pixels, as a share of it; noise: events without a reason, per pixel and second; reach: pixels from the middle
    to the triangle's corners, up and down and to the sides; saccade: microseconds; dark: light added to the picture's
    0 to 1, what the log sees in black; wall: the picture's surroundings, 0 to 1; seed: of the pixels' thresholds.
    """

    sensor: tuple[int, int] = (34, 34)
    threshold: float = 0.4
    mismatch: float = 0.05
    noise: float = 0.5
    reach: float = 2.0
    saccade: int = 100_000
    dark: float = 0.1
    wall: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"threshold": 1e-3, "mismatch": 0, "noise": 0, "reach": 0, "saccade": 1, "dark": 1e-6, "wall": 0}
        for name, low in limits.items():
            if not getattr(self, name) >= low:
                raise DataError(f"Camera: {name} must be at least {low}, not {getattr(self, name)}")

    @property
    def duration(self) -> int:
        """Of the three saccades, in microseconds."""
        return 3 * self.saccade

    def thresholds(self) -> Tensor:
        """Of OFF and ON, [2,H,W]."""
        draws = torch.randn(2, *self.sensor, generator=generator(self.seed, "thresholds"))
        return self.threshold * (1 + self.mismatch * draws).clamp(min=0.2)

    def path(self, ticks: int) -> Tensor:
        """Where the picture is at `ticks` + 1 moments, [ticks+1,2], in pixels down and right of the middle."""
        corners = torch.tensor([[-1.0, -1.0], [1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        at = torch.arange(ticks + 1, dtype=torch.float64) * 3 / ticks
        side = at.long().clamp(max=2)
        return (corners[side] + (corners[side + 1] - corners[side]) * (at - side)[:, None]) * self.reach


TIE = 1e-4  # of a threshold: light that goes back to an earlier level just reaches it, and rounding must not decide
STANDARD = Camera()


def _pictures(images: Tensor, camera: Camera) -> Tensor:  # [B,H,W], [B,1,H,W], uint8 or in [0,1] -> [B,h,w] in [0,1]
    grey = images[:, 0] if images.dim() == 4 and images.shape[1] == 1 else images
    if grey.dim() != 3:
        raise DataError(f"images must be grey, [B,H,W] or [B,1,H,W], not {list(images.shape)}")
    if grey.shape[1] > camera.sensor[0] or grey.shape[2] > camera.sensor[1]:
        size = f"{grey.shape[1]}x{grey.shape[2]}"
        raise DataError(f"images of {size} pixels do not fit a sensor of {camera.sensor[0]}x{camera.sensor[1]}")
    return scaled(grey)


def _hung(pictures: Tensor, camera: Camera) -> tuple[Tensor, int]:
    """The log light of pictures in the middle of a wall that is `margin` pixels larger than the sensor all around."""
    margin = int(camera.reach) + 1
    (high, wide), (h, w) = camera.sensor, pictures.shape[1:]
    top, left = margin + (high - h) // 2, margin + (wide - w) // 2
    edges = (left, wide + 2 * margin - w - left, top, high + 2 * margin - h - top)
    return F.pad(pictures, edges, value=camera.wall).add_(camera.dark).log_(), margin


def _seen(wall: Tensor, margin: int, at: Sequence[float], sensor: tuple[int, int]) -> Tensor:
    """What the sensor sees when the picture has moved by `at` (down, right)."""
    (down, right), (high, wide) = at, sensor
    y, x = int(margin - down // 1 - 1), int(margin - right // 1 - 1)  # the pixel above and left of where it looks
    fy, fx = 1 - down % 1, 1 - right % 1
    rows = wall[:, y : y + high] * (1 - fy) + wall[:, y + 1 : y + 1 + high] * fy
    return rows[..., x : x + wide] * (1 - fx) + rows[..., x + 1 : x + 1 + wide] * fx


def _ticks(pictures: Tensor, camera: Camera, ticks: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """At each tick: events [B,2,H,W] as whole floats, memory before them, light before, light now (each [B,H,W])."""
    (off, on), (wall, margin) = camera.thresholds(), _hung(pictures, camera)
    path = camera.path(ticks).tolist()
    light = memory = _seen(wall, margin, path[0], camera.sensor)
    for at in path[1:]:
        now = _seen(wall, margin, at, camera.sensor)
        change = now - memory
        count = torch.stack([-change / off, change / on], 1).add_(TIE).floor_().clamp_(0)
        yield count, memory, light, now
        memory = memory + count[:, 1] * on - count[:, 0] * off
        light = now


def _noise(n: int, camera: Camera, seed: int) -> np.ndarray:
    """Events without a reason, of all images: rows (image, t, x, y, p), sorted by image."""
    high, wide = camera.sensor
    draws = generator(seed, "noise")
    mean = camera.noise * high * wide * camera.duration / 1e6
    each = torch.poisson(torch.full((n,), mean), generator=draws).long()
    limits = (camera.duration, wide, high, 2)
    columns = [torch.randint(0, limit, (int(each.sum()),), generator=draws) for limit in limits]
    return torch.stack([torch.arange(n).repeat_interleave(each), *columns], 1).numpy()


def _of(noise: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The noise of images start to stop, counted from start."""
    low, high = np.searchsorted(noise[:, 0], (start, stop))
    return noise[low:high] - (start, 0, 0, 0, 0)


def frames(images: Tensor, steps: int, camera: Camera = STANDARD, seed: int = 0) -> Tensor:
    """The events of images [N,H,W] or [N,1,H,W] (uint8, or float in [0,1]) counted by time: [N,steps,2,H,W].

    What `frames(events, ..., kind="time", span=(0, camera.duration))` of data/events.py makes of each image's `events`
    at as many ticks: the multiple of `steps` nearest to TICKS. In the smallest type that holds the counts. seed: of the
    noise.
    """
    if steps < 1:
        raise DataError(f"steps must be at least 1 frame, not {steps}")
    pictures, (high, wide) = _pictures(images, camera), camera.sensor
    noise, ticks = _noise(len(pictures), camera, seed), steps * max(1, round(TICKS / steps))
    out = []
    for start in range(0, len(pictures), CHUNK):
        chunk = pictures[start : start + CHUNK]
        shape = (len(chunk), steps, 2, high, wide)
        i, t, x, y, p = _of(noise, start, start + CHUNK).T
        place = np.ravel_multi_index((i, t * steps // camera.duration, p, y, x), shape)
        counts = torch.from_numpy(np.bincount(place, minlength=math.prod(shape))).float().view(shape)
        for tick, (count, *_) in enumerate(_ticks(chunk, camera, ticks)):
            counts[:, tick * steps // ticks] += count
        out.append(compact(counts))
    return torch.cat(out)


def events(images: Tensor, camera: Camera = STANDARD, seed: int = 0, ticks: int = TICKS) -> list[np.ndarray]:
    """The events of images [N,H,W] or [N,1,H,W] (uint8, or float in [0,1]), sorted by time: fields t, x, y, p each.

    t is in microseconds, from 0 to `camera.duration` (exclusive); between two ticks the light changes evenly.
    """
    pictures, out = _pictures(images, camera), []
    noise = _noise(len(pictures), camera, seed)
    for start in range(0, len(pictures), CHUNK):
        chunk = pictures[start : start + CHUNK]
        parts = [torch.from_numpy(_of(noise, start, start + CHUNK))]
        parts += [_timed(tick, ticks, camera, *seen) for tick, seen in enumerate(_ticks(chunk, camera, ticks))]
        rows = torch.cat(parts)
        rows = rows[(rows[:, 0] * camera.duration + rows[:, 1]).argsort(stable=True)]
        for one in rows.split(rows[:, 0].bincount(minlength=len(chunk)).tolist()):
            made = np.empty(len(one), EVENT)
            for column, name in enumerate("txyp", 1):
                made[name] = one[:, column].numpy()
            out.append(made)
    return out


def _timed(tick: int, ticks: int, camera: Camera, count: Tensor, memory: Tensor, light: Tensor, now: Tensor) -> Tensor:
    """The events of one tick, each when the light crossed its level: rows (image, t, x, y, p)."""
    i, p, y, x = count.nonzero().T
    each = count[i, p, y, x].long()
    nth = torch.arange(int(each.sum())) - (each.cumsum(0) - each).repeat_interleave(each)  # 0, 1, .. at each pixel
    i, p, y, x = (place.repeat_interleave(each) for place in (i, p, y, x))
    level = memory[i, y, x] + (2 * p - 1) * (nth + 1) * camera.thresholds()[p, y, x]
    share = ((level - light[i, y, x]) / (now - light)[i, y, x]).nan_to_num(0).clamp(0, 1)
    first, after = (-(-k * camera.duration // ticks) for k in (tick, tick + 1))  # what belongs to the tick, in whole us
    t = ((tick + share.double()) * camera.duration / ticks).long().clamp(first, max(first, after - 1))
    return torch.stack([i, t, x, y, p], 1)


def write(
    root: str | Path,
    images: Tensor,
    labels: Tensor,
    part: str = "Train",
    camera: Camera = STANDARD,
    seed: int = 0,
) -> None:
    """Images as files of N-MNIST's layout, root/PART/LABEL/00001.bin, numbered from 1: `load("nmnist", root=root)`."""
    if part not in ("Train", "Test"):
        raise DataError(f"part is Train or Test, not {part!r}")
    for number, (one, label) in enumerate(zip(events(images, camera, seed), labels.tolist(), strict=True), 1):
        folder = Path(root) / part / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        write_bin(folder / f"{number:05}.bin", one)


def fashion_events(*, steps: int | None = None, kind: str | None = None, **how: Any) -> Data:
    """The embedded images of clothes as events: T frames (by default 6) of 2x34x34, each counting what two channels,
    OFF and ON, sent in 1/T of 300 ms. Made anew at each load, always the same, test samples from test images alone.
    """
    if kind not in (None, "time"):
        raise DataError(f"fashion-events has frames by time only, not {kind!r}")
    name = "fashion-mini"
    read = zip(sets.idx_files(name, None), (3, 1, 3, 1), strict=True)
    train_x, train_y, test_x, test_y = (sets.read_idx(path, dims) for path, dims in read)
    train, test = (frames(x, steps or 6, seed=seed) for seed, x in enumerate((train_x, test_x)))
    return assembled(
        "fashion-events",
        (train, train_y.long()),
        (test, test_y.long()),
        sets.CLOTHES,
        licence=f"{sets.LICENCES[name]} (the images)",
        default="shift(2)",
        **how,
    )
