"""Events (t, x, y, p) and the frames that networks read.

Events are anything with the fields t, x, y, p: a structured array, or a dict of arrays. t: time, in any unit, never
running backwards; x, y: column and row of the sensor; p: polarity, 0 where it got darker (OFF), 1 brighter (ON).
Frames are float [T,2,H,W], channel p holding the events of polarity p. `frames` makes them, in one of four kinds:

    number   T frames of equally many events (one more or less); each value counts events
    time     T frames of equal duration; each value counts events
    voxel    each event shared between the two nearest of T points in time; sums are numbers of events
             (Zhu et al. 2019, Unsupervised Event-based Learning of Optical Flow, Depth and Egomotion, sec. 3.1)
    surface  exp(-age / tau) of a pixel's last event, at the end of each of T equal durations, in [0,1]
             (Lagorce et al. 2017, HOTS)

`from_events` makes a `Data` of any data set that yields events. `named` reads the well-known ones from a folder: root
holds them as they are published; their frames are kept in root/frames, a file for each setting, so that later loads are
quick. Nothing is unpickled.
"""

import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import DataError, MissingData
from .splits import Data, build, hold_out

Root = str | Path | None
Size = tuple[int, int]  # height, width

KINDS = ("number", "time", "voxel", "surface")
EVENT = np.dtype([("t", np.int64), ("x", np.int16), ("y", np.int16), ("p", np.uint8)])


# --- events to frames --------------------------------------------------------------------------------------------


def checked(events: Any, sensor: Size, where: str = "events") -> tuple[np.ndarray, ...]:
    """t, x, y, p as arrays [N]. DataError, beginning with `where`, for events that cannot be of a sensor (H, W)."""
    names = events.keys() if isinstance(events, Mapping) else getattr(getattr(events, "dtype", None), "names", None)
    if names is None:
        raise DataError(f"{where}: events are a structured array or a dict with t, x, y, p, not {_kind(events)}")
    if missing := [name for name in "txyp" if name not in names]:
        raise DataError(f"{where}: events have no field {', '.join(missing)}; their fields are {', '.join(names)}")
    t, x, y, p = (np.asarray(events[name]) for name in "txyp")
    if not t.ndim == 1 or not t.shape == x.shape == y.shape == p.shape:
        raise DataError(f"{where}: t, x, y, p have shapes {t.shape}, {x.shape}, {y.shape}, {p.shape}: not all [N]")
    x, y, p = (_whole(name, values, where) for name, values in zip("xyp", (x, y, p), strict=True))
    t = t.astype(np.float64 if t.dtype.kind == "f" else np.int64)  # unsigned times would not show that they run back
    if not len(t):
        return t, x, y, p
    if p.min() < 0 or p.max() > 1:
        hint = ": write (p + 1) // 2" if set(np.unique(p)) <= {-1, 1} else ""
        raise DataError(f"{where}: polarities go from {p.min()} to {p.max()}, they must be 0 (OFF) or 1 (ON){hint}")
    for name, values, limit, side in (("x", x, sensor[1], "wide"), ("y", y, sensor[0], "high")):
        if values.min() < 0 or values.max() >= limit:
            raise DataError(
                f"{where}: {name} goes from {values.min()} to {values.max()}, outside a sensor {limit} pixels {side} "
                f"(height x width {sensor[0]}x{sensor[1]})"
            )
    if not np.isfinite(t).all():
        raise DataError(f"{where}: {int((~np.isfinite(t)).sum())} timestamps are NaN or infinite")
    if len(back := np.flatnonzero(t[1:] < t[:-1])):
        at = int(back[0]) + 1
        raise DataError(
            f"{where}: timestamps run backwards {len(back)} times, first at event {at} ({t[at - 1]} to {t[at]}): "
            f"the file is damaged, or must be sorted by t"
        )
    return t, x, y, p


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {list(shape)}"


def _whole(name: str, values: np.ndarray, where: str) -> np.ndarray:
    whole = values.astype(np.int64, copy=False) if values.dtype.kind in "iubf" else None
    if whole is None or (values.dtype.kind == "f" and not (whole == values).all()):
        raise DataError(f"{where}: {name} is {values.dtype}, it must hold whole numbers")
    return whole


def frames(
    events: Any,
    sensor: Size,
    steps: int,
    kind: str = "time",
    *,
    size: Size | None = None,
    span: tuple[float, float] | None = None,
    tau: float | None = None,
    where: str = "events",
) -> Tensor:
    """Events of a sensor (H, W) -> float32 [steps, 2, h, w]; kind: see the top of the file.

    size: (h, w), smaller than the sensor: pixels are put together, so no event is lost and the values grow. span: from
    and to (exclusive) when, else from the first event to the last; events outside are an error. tau: of `surface`, in
    the unit of t, by default the duration of a frame. where: what errors begin with. No events make empty frames.
    """
    if kind not in KINDS:
        raise DataError(f"no frames of kind {kind!r}: {_near(kind, KINDS)}Valid: {', '.join(KINDS)}")
    if steps < 1:
        raise DataError(f"steps must be at least 1 frame, not {steps}")
    h, w = smaller(sensor, size)
    t, x, y, p = checked(events, sensor, where)
    out = np.zeros((steps, 2, h, w), np.float32)
    if not len(t):
        return torch.from_numpy(out)
    if span and (t[0] < span[0] or t[-1] >= span[1]):
        raise DataError(f"{where}: timestamps go from {t[0]} to {t[-1]}, outside {span[0]} to {span[1]}")
    pixel = (p * h + y * h // sensor[0]) * w + x * w // sensor[1]  # place in a frame [2,h,w]
    start, stop = span or (t[0], t[-1] + (t.dtype.kind != "f"))  # the last whole microsecond belongs to it
    stop = stop if stop > start else start + 1
    if kind == "voxel":
        point = (t - start) * ((steps - 1) / (stop - start))
        left = np.minimum(point.astype(np.int64), max(steps - 2, 0))
        right = point - left
        places = np.concatenate([left, np.minimum(left + 1, steps - 1)]) * (2 * h * w) + np.tile(pixel, 2)
        out = np.bincount(places, np.concatenate([1 - right, right]), out.size).astype(np.float32)
        return torch.from_numpy(out.reshape(steps, 2, h, w))
    if kind == "number":
        step = np.arange(len(t)) * steps // len(t)
    else:
        step = np.minimum((t - start) * steps // (stop - start), steps - 1).astype(np.int64)
    places = step * (2 * h * w) + pixel
    if kind != "surface":
        return torch.from_numpy(np.bincount(places, minlength=out.size).astype(np.float32).reshape(out.shape))
    last = np.full(out.size, -np.inf)
    last[places] = t  # times do not run back, so the last event of a place is what stays
    last = np.maximum.accumulate(last.reshape(out.shape))
    ends = start + (stop - start) * np.arange(1, steps + 1) / steps
    age = ends[:, None, None, None] - last
    return torch.from_numpy(np.exp(-age / (tau or (stop - start) / steps)).astype(np.float32))


def smaller(sensor: Size, size: Size | None) -> Size:
    """The size of frames (h, w). DataError where it is larger than the sensor."""
    h, w = size or sensor
    if not (1 <= h <= sensor[0] and 1 <= w <= sensor[1]):
        raise DataError(f"frames of {h}x{w} pixels do not fit a sensor of {sensor[0]}x{sensor[1]}")
    return h, w


def _near(word: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(valid), 1, 0.5)
    return f"did you mean {near[0]!r}? " if near else ""


# --- a data set of events to Data --------------------------------------------------------------------------------


def stacked(
    source: Any, sensor: Size, steps: int, kind: str = "time", size: Size | None = None, where: str = "events"
) -> tuple[Tensor, Tensor]:
    """All samples of a map-style data set: frames [N,T,2,h,w] in the smallest type that holds them, labels [N].

    `source[i]` -> (events, label), or (frames [T,C,H,W], label) taken as they are. Its attribute `files`, if it has
    one, names the samples in errors.
    """
    files = getattr(source, "files", None)
    first, labels = None, torch.empty(len(source), dtype=torch.int64)
    for i in range(len(source)):
        name = str(files[i]) if files is not None else f"{where}, sample {i}"
        sample = source[i]
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise DataError(f"{name}: a {type(sample).__name__}, not a pair (events, label)")
        one = _ready(sample[0], sensor, steps, size, name)
        if one is None:
            one = frames(sample[0], sensor, steps, kind, size=size, where=name)
        if first is None:
            first = torch.zeros(len(source), *one.shape, dtype=_fitting(one))
        if first.shape[1:] != one.shape:
            raise DataError(f"{name}: frames {list(one.shape)}, the first sample's are {list(first.shape[1:])}")
        if _fitting(one, first.dtype) != first.dtype:
            first = first.to(_fitting(one, first.dtype))
        first[i] = one
        labels[i] = int(sample[1])
    if first is None:
        raise DataError(f"{where}: there are no samples")
    return first, labels


def _ready(sample: Any, sensor: Size, steps: int, size: Size | None, name: str) -> Tensor | None:
    """Frames that came as frames [T,C,H,W]; None where they are still events."""
    if isinstance(sample, Mapping) or getattr(getattr(sample, "dtype", None), "names", None):
        return None
    if not isinstance(sample, Tensor | np.ndarray) or sample.ndim != 4:
        raise DataError(f"{name}: neither events with t, x, y, p nor frames [T,C,H,W], but {_kind(sample)}")
    tensor, want = torch.as_tensor(sample), (steps, *smaller(sensor, size))
    if (tensor.shape[0], *tensor.shape[-2:]) != want:
        raise DataError(
            f"{name}: frames {list(tensor.shape)} do not fit T = {steps} and a sensor of {want[1]}x{want[2]} pixels"
        )
    if not tensor.isfinite().all() or tensor.min() < 0:
        raise DataError(f"{name}: frames hold values that are negative, NaN or infinite: they count events")
    return tensor


def _fitting(values: Tensor, at_least: torch.dtype = torch.uint8) -> torch.dtype:
    """The smallest of uint8, int16, int32, float32 that holds values exactly."""
    types = [torch.uint8, torch.int16, torch.int32, torch.float32]
    if values.is_floating_point() and not bool((values == values.round()).all()):
        return torch.float32
    most = values.max()
    need = next((kind for kind in types[:3] if most <= torch.iinfo(kind).max), torch.float32)
    return max(need, at_least, key=types.index)


def compact(counts: Tensor) -> Tensor:
    """The same counts in the smallest type that holds them."""
    return counts.to(_fitting(counts))


def assembled(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: Sequence[str],
    *,
    valid: float = 0.1,
    **how: Any,
) -> Data:
    """Frames [N,T,C,H,W] with labels [N], for training and for testing -> Data. The rest is as in `splits.build`."""
    for part, labels in (("train", train[1]), ("test", test[1])):
        if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
            top = len(classes) - 1
            raise DataError(f"{name}: {part} labels go from {labels.min()} to {labels.max()}: not from 0 to {top}")
    kept, held = hold_out(train[1], valid) if valid else (None, None)
    steps, channels, high, wide = train[0].shape[1:]
    return build(
        name,
        (*train, kept),
        (*train, held) if held is not None else None,
        (*test, None),
        classes,
        (channels, high, wide),
        mean=[0.0] * channels,  # shifting the counts would let empty pixels speak
        std=[1.0] * channels,
        steps=steps,
        events=True,
        **how,
    )


def from_events(
    train: Any,
    test: Any,
    classes: Sequence[str],
    sensor: Size,
    *,
    steps: int = 10,
    frames: str = "time",
    size: int | Size | None = None,
    name: str = "events",
    **how: Any,
) -> Data:
    """Your own data sets of events, held in memory as frames.

    train, test: map-style, `dataset[i]` -> (events, label), the events with fields t, x, y, p; or ready frames
    [T,C,H,W]. sensor: its (height, width) in pixels; steps: T; frames: number, time, voxel or surface; size: of the
    frames, by default that of the sensor. The rest (valid, augment, batch_size, seed, licence) is as in `from_tensors`.
    Raises DataError that names the sample.
    """
    size = (size, size) if isinstance(size, int) else size
    learn, rest = (
        stacked(source, sensor, steps, frames, size, f"{name}: {part}")
        for source, part in ((train, "train"), (test, "test"))
    )
    return assembled(name, learn, rest, classes, **how)


# --- files of 40-bit events (N-MNIST, N-Caltech101) --------------------------------------------------------------

OVERFLOW = 240  # a row that is no event, but says that the camera's clock went round


def read_bin(path: Path, sensor: Size) -> np.ndarray:
    """A file of 40-bit events -> structured array, t in microseconds. DataError names the file.

    Bytes of an event: x, y, then (first bit) the polarity and 23 bits of time (Orchard et al. 2015, Converting Static
    Image Datasets to Spiking Neuromorphic Datasets Using Saccades). Where y is 240, later times are 2^13 more.
    """
    try:
        rows = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not len(rows):
        raise DataError(f"{path}: the file is empty: it was cut short")
    if len(rows) % 5:
        raise DataError(f"{path}: {len(rows)} bytes, not a whole number of events of 5 bytes: it was cut short")
    x, y, a, b, c = rows.reshape(-1, 5).T
    events = np.empty(len(x), EVENT)
    events["x"], events["y"], events["p"] = x, y, a >> 7
    events["t"] = (a & 127).astype(np.int64) << 16 | b.astype(np.int64) << 8 | c
    if (over := y == OVERFLOW).any():
        events["t"] += np.cumsum(over) << 13
        events = events[~over]
    checked(events, sensor, str(path))
    return events


def write_bin(path: Path, events: Any) -> None:
    """The reverse of `read_bin`, for times below 2^23 microseconds and coordinates below 240."""
    t, x, y, p = checked(events, (OVERFLOW, 256), str(path))
    if len(t) and (t[0] < 0 or t[-1] >= 1 << 23 or (t != t.astype(np.int64)).any()):
        raise DataError(f"{path}: timestamps go from {t[0]} to {t[-1]}: they must be whole, from 0 to 2^23 - 1")
    t = t.astype(np.int64)
    rows = np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1)
    path.write_bytes(rows.astype(np.uint8).tobytes())


@dataclass(frozen=True)
class Bins:
    """Files of 40-bit events as a data set."""

    files: list[Path]
    labels: list[int]
    sensor: Size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return read_bin(self.files[i], self.sensor), self.labels[i]

    def only(self, rows: Sequence[int]) -> "Bins":
        return Bins([self.files[i] for i in rows], [self.labels[i] for i in rows], self.sensor)


def _natural(path: Path) -> list[Any]:  # a_2 before a_10
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def bins(folder: Path, sensor: Size, classes: Sequence[str] | None = None) -> tuple[Bins, tuple[str, ...]]:
    """folder/CLASS/*.bin, sorted by class and number, and the names of the classes.

    classes: those of the training data, which all have to be there, and no others. Raises DataError naming the class.
    """
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    names = tuple(p.name for p in found) if classes is None else tuple(classes)
    files, labels = [], []
    if found and (lacking := [name for name in names if name not in {place.name for place in found}]):
        raise DataError(f"{folder}: class {lacking[0]!r}, which the training data have, is not there")
    for place in found:
        if place.name not in names:
            raise DataError(f"{place}: class {place.name!r} is not among the training classes")
        inside = sorted((p for p in place.iterdir() if p.suffix == ".bin" and p.name[0] != "."), key=_natural)
        if not inside:
            raise DataError(f"{place}: class {place.name!r} has no .bin files")
        files += inside
        labels += [names.index(place.name)] * len(inside)
    if not files:
        raise MissingData(f"{folder} has no class folders with .bin files")
    return Bins(files, labels, sensor), names


# --- the well-known sets -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A published set. get: what to do to have it, {root} being the folder; the rest are defaults of `load`."""

    sensor: Size
    steps: int
    frames: str
    size: int | None
    augment: str
    source: str
    get: str
    jelly: tuple[str, ...] = ()  # what is to be in root/download, where spikingjelly reads it


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
GESTURES = (
    "hand clapping",
    "right hand wave",
    "left hand wave",
    "right arm clockwise",
    "right arm counter-clockwise",
    "left arm clockwise",
    "left arm counter-clockwise",
    "arm roll",
    "air drums",
    "air guitar",
    "other gestures",
)

SETS = {
    "nmnist": Known(
        (34, 34),
        10,
        "time",
        None,
        "shift(2)",
        "Orchard et al. 2015, N-MNIST; the terms are on its page",
        "Download Train.zip and Test.zip from its authors' page (garrickorchard.com/datasets/n-mnist) and unpack them "
        "in {root}, so that it has the folders Train/0 ... Train/9 and Test/0 ... Test/9 of .bin files",
    ),
    "n-caltech101": Known(
        (180, 240),
        10,
        "time",
        48,
        "shift(4)",
        "Orchard et al. 2015, N-Caltech101; the terms are on its page",
        "Download Caltech101.zip from its authors' page (garrickorchard.com/datasets/n-caltech101) and unpack it in "
        "{root}, so that it has the folders Caltech101/CLASS of .bin files",
    ),
    "cifar10-dvs": Known(
        (128, 128),
        10,
        "number",
        48,
        "flip|roll(5)",
        "Li et al. 2017, CIFAR10-DVS; the terms are on its page",
        "Download airplane.zip ... truck.zip, ten files, from its authors' page on figshare and put them, packed, in "
        "{root}/download",
        tuple(f"{name}.zip" for name in CIFAR10),
    ),
    "dvs128-gesture": Known(
        (128, 128),
        16,
        "number",
        None,
        "shift(8)",
        "Amir et al. 2017, DVS128 Gesture; the terms are on its page",
        "Download DvsGesture.tar.gz, gesture_mapping.csv, LICENSE.txt and README.txt from IBM Research's page and put "
        "them, packed, in {root}/download",
        ("DvsGesture.tar.gz", "gesture_mapping.csv", "LICENSE.txt", "README.txt"),
    ),
}


def ready(name: str, root: Root) -> Path:
    """The folder of a set of `SETS`. DataError or MissingData says what is missing and how to get it."""
    if SETS[name].jelly and importlib.util.find_spec("spikingjelly") is None:
        raise DataError(f"{name} is read by spikingjelly: pip install 'spikedistill[events]'")
    get = SETS[name].get
    if root is None:
        raise MissingData(f"{name} is read from a folder: give it as root. {get.format(root='root')}")
    root = Path(root).expanduser()
    if SETS[name].jelly:  # it would try to download, and remove what it finds damaged
        if (root / "events_np.building").exists():
            again = f"remove {root / 'events_np'}, {root / 'extract'} and {root / 'events_np.building'} and load again"
            raise DataError(f"{name}: unpacking in {root} was interrupted: {again}")
        missing = [file for file in SETS[name].jelly if not (root / "download" / file).is_file()]
        if missing and not (root / "events_np").is_dir():
            raise MissingData(f"{name}: {', '.join(missing)} not in {root / 'download'}. {get.format(root=root)}")
    else:
        for part in ("Train", "Test") if name == "nmnist" else ("Caltech101",):
            _inside(name, root, part)
    return root


def _inside(name: str, root: Path, part: str) -> Path:
    for place in (root / part, root / part.lower()):
        if place.is_dir():
            return place
    packed = [p.name for p in root.glob("*.zip")] if root.is_dir() else []
    there = f" ({', '.join(packed)} must be unpacked)" if packed else ""
    raise MissingData(f"{name}: no folder {part} in {root}{there}. {SETS[name].get.format(root=root)}")


def named(
    name: str, root: Root, *, steps: int | None = None, frames: str | None = None, size: int | None = None, **how: Any
) -> Data:
    """nmnist, n-caltech101, cifar10-dvs or dvs128-gesture as frames in memory; None: the set's own default.

    Test samples: as published; of n-caltech101 and cifar10-dvs, which come without, the last tenth of each class in the
    order of their numbers.
    """
    known, place = SETS[name], ready(name, root)
    side = size or known.size
    grid = smaller(known.sensor, (side, side) if side else None)
    train, test, classes = _samples(name, place)
    setting = (steps or known.steps, frames or known.frames, grid)
    parts = [
        cached(
            place / "frames",
            f"{name}-{part}-{setting[1]}-T{setting[0]}-{grid[0]}x{grid[1]}",
            source.files,
            lambda source=source, part=part: stacked(source, known.sensor, *setting, where=f"{name}: {part}"),
        )
        for part, source in (("train", train), ("test", test))
    ]
    return assembled(name, parts[0], parts[1], classes, licence=known.source, default=known.augment, **how)


def _samples(name: str, root: Path) -> tuple[Any, Any, tuple[str, ...]]:
    """Data sets for training and testing, with the attribute `files`, and the names of the classes."""
    sensor = SETS[name].sensor
    if name == "nmnist":
        train, classes = bins(_inside(name, root, "Train"), sensor)
        return train, bins(_inside(name, root, "Test"), sensor, classes)[0], classes
    if name == "n-caltech101":
        every, classes = bins(_inside(name, root, "Caltech101"), sensor)
        train, test = map(every.only, last_tenth(every.labels))
        return train, test, classes
    if name == "cifar10-dvs":
        every = jelly("CIFAR10DVS", root, CIFAR10)
        train, test = map(every.only, last_tenth(every.labels))
        return train, test, CIFAR10
    codes = [str(i) for i in range(len(GESTURES))]  # spikingjelly numbers the gestures
    train, test = (jelly("DVS128Gesture", root, codes, train=part) for part in (True, False))
    return train, test, GESTURES


def last_tenth(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows without and with the last tenth of every class, rounded, at least one."""
    rows: tuple[list[int], list[int]] = ([], [])
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        cut = len(members) - max(1, round(len(members) / 10))
        rows[0].extend(members[:cut])
        rows[1].extend(members[cut:])
    return rows


@dataclass(frozen=True)
class Jelly:
    """Rows of a data set of spikingjelly, with their labels."""

    dataset: Any
    rows: list[int]
    labels: list[int]

    @property
    def files(self) -> list[Path]:
        return [Path(self.dataset.samples[i][0]) for i in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.dataset[self.rows[i]][0], self.labels[i]

    def only(self, rows: Sequence[int]) -> "Jelly":
        return Jelly(self.dataset, [self.rows[i] for i in rows], [self.labels[i] for i in rows])


def jelly(kind: str, root: Path, classes: Sequence[str], **how: Any) -> Jelly:
    """A data set of spikingjelly by the name of its class, sorted by class and number; its folders are `classes`."""
    try:
        module = importlib.import_module("spikingjelly.datasets")
    except Exception as error:  # it needs torchvision, which raises anything where it does not fit the installed torch
        raise DataError(f"{kind} is read by spikingjelly: pip install 'spikedistill[events]' ({error})") from error
    try:
        dataset = getattr(module, kind)(str(root), data_type="event", **how)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"{kind} in {root}: {error}") from error
    if odd := [name for name in dataset.classes if name not in classes]:
        raise DataError(f"{kind} in {root}: class {odd[0]!r} is not one of {', '.join(classes)}")
    found = [(classes.index(dataset.classes[label]), _natural(Path(path))) for path, label in dataset.samples]
    rows = sorted(range(len(found)), key=found.__getitem__)
    return Jelly(dataset, rows, [found[i][0] for i in rows])


# --- frames on disk ----------------------------------------------------------------------------------------------

VERSION = 1  # of the frames; a change of how they are made must change it


def cached(
    folder: Path, name: str, files: Sequence[Path], make: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """make(), or what it made before: kept in folder as NAME-KEY.npz, the key being of the files' names and sizes.

    A damaged file is made again. Where the folder cannot be written, nothing is kept.
    """
    key = hashlib.blake2b(str(VERSION).encode(), digest_size=6)
    for file in files:
        key.update(f"{file.parent.name}/{file.name} {file.stat().st_size}\n".encode())
    path = folder / f"{name}-{key.hexdigest()}.npz"
    # what is not there, or damaged, is made
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        with np.load(path, allow_pickle=False) as kept:
            frames, labels = kept["frames"], kept["labels"]
        if len(frames) == len(labels) == len(files):
            return torch.from_numpy(frames), torch.from_numpy(labels)
    frames, labels = make()
    part = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):  # a disk that is full, or a folder of others
        folder.mkdir(exist_ok=True)
        try:
            with open(part, "wb") as file:
                np.savez_compressed(file, frames=frames.numpy(), labels=labels.numpy())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return frames, labels
