"""Your own pictures: one folder a class, read with PIL."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .batches import DataError, MissingData
from .splits import Data, build, hold_out

MEMORY = 2_000_000_000  # bytes of decoded images up to which a folder is held in memory
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}


@dataclass(frozen=True)
class Scan:
    """What a folder holds: the pictures of its train, val and test subfolders (or all as train), in that order."""

    classes: tuple[str, ...]
    files: list[Path]
    labels: list[int]
    sizes: dict[str, int]  # "train", "val", "test" -> pictures


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _pictures(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS and not p.name.startswith("."))


def scan(path: Path) -> Scan:
    """List a folder of class folders. DataError: no such folder, no classes, classes with too few pictures."""
    if not path.is_dir():
        raise MissingData(f"no such folder: {path}")
    spelled = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}
    parts = {part: path / name for name, part in spelled.items() if (path / name).is_dir() and _folders(path / name)}
    parts = parts if "train" in parts else {"train": path}
    classes = tuple(p.name for p in _folders(parts["train"]))
    if not classes:
        raise DataError(f"{parts['train']} has no class folders: put the images into {parts['train']}/CLASS/")
    wrong, files, labels, sizes = [], [], [], {}
    for part, place in parts.items():
        sizes[part] = 0
        for folder in _folders(place):
            found = _pictures(folder)
            if folder.name not in classes:
                wrong.append(f"{folder}: class {folder.name!r} is not among the training classes")
            elif part == "train" and len(found) < 3:
                wrong.append(f"{folder}: {len(found)} images ({', '.join(sorted(ENDINGS))}); a class needs at least 3")
            else:
                files += found
                labels += [classes.index(folder.name)] * len(found)
                sizes[part] += len(found)
        if not sizes[part] and not wrong:
            wrong.append(f"{place}: no images")
    if wrong:
        raise DataError("; ".join(wrong))
    return Scan(classes, files, labels, sizes)


def _opened(path: Path, load: bool) -> Image.Image:
    try:
        with Image.open(path) as image:
            if load:
                image.load()
    except Exception as error:  # a damaged file makes the decoders raise anything
        raise DataError(f"{path}: cannot be read as an image ({error})") from error
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{path}: more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
    return image


def _survey(files: list[Path], size: int | None) -> tuple[int, int, int]:
    """C, H, W for all of them: from the headers only, and from no more of these than needed."""
    grey, sizes = True, set()
    for path in files:
        image = _opened(path, load=False)
        sizes.add((image.height, image.width))
        grey = grey and image.mode in ("1", "L", "LA")
        if not grey and (size or len(sizes) > 1):
            break
    high, wide = (size, size) if size else sizes.pop() if len(sizes) == 1 else (64, 64)
    return (1 if grey else 3), high, wide


@dataclass(frozen=True)
class Pictures:
    """Image files as a data set: `[i]` -> (uint8 [C,H,W], label). What is transparent becomes white."""

    files: list[Path]
    labels: list[int]
    shape: tuple[int, int, int]

    @property
    def samples(self) -> list[tuple[Path, int]]:
        return [*zip(self.files, self.labels)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        channels, high, wide = self.shape
        image = ImageOps.exif_transpose(_opened(self.files[i], load=True))
        if "A" in image.getbands() or "transparency" in image.info:  # on white, as a page shows it
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (wide, high):  # the shorter side resized, the longer one cropped at the centre
            image = ImageOps.fit(image, (wide, high), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image).reshape(high, wide, channels)).permute(2, 0, 1), self.labels[i]


def folder(path: Path, *, size: int | None = None, valid: float = 0.1, **how: Any) -> Data:
    """One folder a class; optionally path/train, path/val (valid, validation) and path/test above them.

    Without test pictures a tenth is held out for testing, the same every time. val is the test set if there is no
    test, else the validation set. size: side of the square images, by default their common size if they have one,
    else 64. index counts the pictures of train, val, test together, sorted by class and name. Augmented by flip and
    a shift of a fourteenth of the side unless told otherwise.
    """
    found = scan(path)
    pictures = Pictures(found.files, found.labels, _survey(found.files, size))
    labels = torch.tensor(found.labels)
    rows = dict(zip(found.sizes, torch.arange(len(labels)).split(list(found.sizes.values())), strict=True))
    train, val, test = (rows.get(part) for part in ("train", "val", "test"))
    if test is None:
        test, val = val, None
    assert train is not None
    if test is None:
        train, test = hold_out(labels, 0.1, train)
    if val is None and valid:
        train, val = hold_out(labels, valid, train)
    elif not valid:
        val = None
    source: Any = pictures
    if len(pictures) * math.prod(pictures.shape) <= MEMORY:
        source = torch.empty(len(pictures), *pictures.shape, dtype=torch.uint8)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for row, (image, _) in enumerate(pool.map(pictures.__getitem__, range(len(pictures)))):
                source[row] = image
    return build(
        f"folder:{path}",
        (source, labels, train),
        (source, labels, val) if val is not None else None,
        (source, labels, test),
        found.classes,
        pictures.shape,
        default=f"flip|shift({min(64, max(1, min(pictures.shape[1:]) // 14))})",
        **how,
    )
