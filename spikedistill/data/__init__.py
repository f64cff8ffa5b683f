"""Data sets: `load("fashion-mini")` is in the package, `load("folder:PATH")` is yours, `names()` lists them all.

A `Data` has splits train, valid, test; a split is a `Tensors` or a `Files`, both with
`epoch(epoch, start, rank, world)` giving batches `{"x", "y", "index"}`, x in [0,1].
"""

import difflib
from pathlib import Path
from typing import Any

from . import folders, images
from .augment import parse
from .batches import Batch, DataError, Files, MissingData, Tensors
from .splits import Data, Split, from_dataset, from_tensors, hold_out, statistics

__all__ = [
    "Batch",
    "Data",
    "DataError",
    "Files",
    "MissingData",
    "Split",
    "Tensors",
    "check",
    "from_dataset",
    "from_tensors",
    "hold_out",
    "load",
    "names",
    "parse",
    "statistics",
]

NAMES = {
    "fashion-mini": "8,000 + 2,000 images of clothes, grey 28x28, 10 classes; ships with the package (MIT)",
    "fashion": "Fashion-MNIST, 60,000 + 10,000, grey 28x28, 10 classes; idx files, or Debian's dataset-fashion-mnist",
    "mnist": "handwritten digits, 60,000 + 10,000, grey 28x28, 10 classes; idx files in root",
    "cifar10": "photographs, 50,000 + 10,000, RGB 32x32, 10 classes; torchvision's files in root, or download",
    "cifar100": "photographs, 50,000 + 10,000, RGB 32x32, 100 classes; torchvision's files in root, or download",
    "svhn": "house numbers, 73,257 + 26,032, RGB 32x32, 10 classes; torchvision's files in root, or download",
    "imagenet": "photographs, 1.28 million + 50,000, RGB 224x224, 1,000 classes; folders root/train and root/val",
    "folder:PATH": "your own images, one folder a class (png, jpg, bmp, gif, webp), grey or RGB, any size",
}


def names() -> dict[str, str]:
    """What `load` knows: name -> one line. Loads nothing."""
    return dict(NAMES)


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
) -> Data:
    """A data set by name.

    root: the folder its files are in; valid: the share of the training data held out, always the same samples, 0 for
    none; seed: of the order and the augmentation; augment: as `parse` reads it, "default" for what suits the data;
    size: side of the images of `folder:` and `imagenet`; workers: processes that decode, where the data are too many
    for memory; download: let torchvision fetch what is missing. Raises DataError (MissingData where files are missing).
    """
    _known(name)
    _size(name, size)
    how = {"valid": valid, "seed": seed, "batch_size": batch_size, "augment": augment, "workers": workers}
    if name.startswith("folder:"):
        return folders.folder(_folder(name, root), size=size, **how)
    if name == "imagenet":
        return images.imagenet(root, size=size, **how)
    return (images.vision if name in images.VISION else images.idx)(name, root, download=download, **how)


def check(
    name: str,
    *,
    root: str | Path | None = None,
    size: int | None = None,
    augment: Any = "default",
    download: bool = False,
) -> list[str]:
    """What `load` would complain of, as far as can be seen without reading the images. Empty: nothing."""

    def source() -> None:
        if name.startswith("folder:"):
            folders.scan(_folder(name, root))
        elif name in images.VISION:
            images.vision_ready(name, root, download)
        elif name in NAMES:
            images.idx_ready(name, root, download)

    errors = []
    for look in (
        lambda: _known(name),
        lambda: _size(name, size),
        lambda: parse(augment) if isinstance(augment, str) and augment != "default" else None,
        source,
    ):
        try:
            look()
        except DataError as error:
            errors.append(str(error))
    return errors


def _folder(name: str, root: str | Path | None) -> Path:
    return Path(root or ".").expanduser() / Path(name.removeprefix("folder:")).expanduser()


def _known(name: str) -> None:
    if name in NAMES or (name.startswith("folder:") and name != "folder:"):
        return
    near = difflib.get_close_matches(name, NAMES, 1, 0.5)
    hint = f"folder:{name}" if Path(name).is_dir() else near[0] if near else None
    raise DataError(
        f"unknown data set {name!r}: " + (f"did you mean {hint!r}? " if hint else "") + f"Valid: {', '.join(NAMES)}"
    )


def _size(name: str, size: int | None) -> None:
    if size is not None and not (name == "imagenet" or name.startswith("folder:")):
        raise DataError(f"{name} has images of one size; size is for folder:PATH and imagenet")
    if size is not None and size < 1:
        raise DataError(f"size must be at least 1 pixel, not {size}")
