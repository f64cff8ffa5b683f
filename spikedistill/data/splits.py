"""`Data`: a data set in its three splits, made from tensors, from any map-style data set, or by `load`.

Validation is held out of the training data, the same share of every class, by a seed that never changes: a teacher
and a student trained with different seeds must not see each other's validation samples. The seed of `load` and its
like is that of the order and of the augmentation.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import augment as augments
from .batches import Augment, Batch, DataError, Files, Tensors

Split = Tensors | Files
Part = tuple[Any, Tensor | None, Tensor | None]  # images or data set, labels, rows (None: all of them)

SPLIT_SEED = 0
EVALUATION = 500  # samples of 64x64 RGB in a batch of evaluation; fewer of larger ones, never fewer than in training


@dataclass(frozen=True, eq=False)
class Data:
    """A data set. shape: (C,H,W) of an image or frame; mean, std: per channel, of the training images in [0,1] (of
    events: 0 and 1, their counts are taken as they are); augment: as `parse` reads it; licence: under which terms the
    images came; steps: frames of a sample, None for images.
    """

    name: str
    train: Split
    valid: Split | None
    test: Split
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str = ""
    augment: str = "none"
    steps: int | None = None

    def summary(self) -> str:
        """One line: name, samples, classes, shape, augmentation, licence."""
        sizes = [(self.train, "train"), (self.valid, "valid"), (self.test, "test")]
        samples = ", ".join(f"{split.samples:,} {name}" for split, name in sizes if split is not None)
        shape = f"{self.steps} frames of " * (self.steps is not None) + "x".join(map(str, self.shape))
        text = f"{self.name}: {samples}; {len(self.classes)} classes; {shape}; augment {self.augment}"
        return f"{text}; {self.licence}" if self.licence else text


@dataclass(frozen=True)
class SomeFrames:
    """A split whose recordings, x [T,B,C,H,W], have only some of their frames, by number and in this order."""

    split: Any
    frames: tuple[int, ...]

    @property
    def samples(self) -> int:
        return self.split.samples

    @property
    def batch_size(self) -> int:
        return self.split.batch_size

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch()

    def epoch(self, epoch: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        for batch in self.split.epoch(epoch, start, rank, world):
            yield batch | {"x": batch["x"][list(self.frames)]}


def at_frames(data: Data, frames: Sequence[int] | None) -> Data:
    """The data, evaluated on some frames of every recording: those that a student sees. None: on all, as they are.

    Raises DataError for a frame that the recordings do not have.
    """
    if frames is None or data.steps is None:
        return data
    if not isinstance(frames, list | tuple) or not frames or not all(type(i) is int and i >= 0 for i in frames):
        raise DataError(f"frames are told by their numbers from 0 on, not by {frames!r}")
    if max(frames) >= data.steps:
        raise DataError(f"the student sees frame {max(frames)} of a recording, but {data.name} has {data.steps} frames")
    valid: Any = None if data.valid is None else SomeFrames(data.valid, tuple(frames))
    test: Any = SomeFrames(data.test, tuple(frames))
    return replace(data, valid=valid, test=test)


def hold_out(labels: Tensor, share: float, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows kept and rows held out, both in order: `share` of every class, rounded, at least one if it has two.

    labels: int64 [N]; rows: the ones to choose from, by default all. The choice depends on the labels alone.
    """
    if not 0 < share < 1:
        raise DataError(f"the share to hold out must be between 0 and 1, not {share!r}")
    rows = torch.arange(len(labels)) if rows is None else rows
    draws = torch.Generator().manual_seed(SPLIT_SEED)
    held = torch.zeros(len(rows), dtype=torch.bool)
    of = labels[rows]
    for members in of.argsort(stable=True).split(of.bincount().tolist()):
        size = min(max(1, round(share * len(members))), max(0, len(members) - 1))
        held[members[torch.randperm(len(members), generator=draws)[:size]]] = True
    if not held.any():
        raise DataError("every class has a single sample: there is nothing to hold out for validation")
    return rows[~held], rows[held]


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 or float images [N,(T,)C,H,W], on the scale [0,1]."""
    pairs = []
    for channel in range(images.shape[-3]):
        values = images.select(-3, channel).reshape(-1)
        if values.dtype == torch.uint8:  # exact: from the histogram
            share = values.bincount(minlength=256).double() / len(values)
            levels = torch.arange(256, dtype=torch.float64) / 255
            mean = (share * levels).sum()
            std = (share * (levels - mean).square()).sum().sqrt()
        else:
            std, mean = torch.std_mean(values.float(), correction=0)
        pairs.append((round(float(mean), 6), round(float(std), 6) or 1.0))  # a constant channel: nothing to divide by
    return tuple(mean for mean, _ in pairs), tuple(std for _, std in pairs)


def build(
    name: str,
    train: Part,
    valid: Part | None,
    test: Part,
    classes: Sequence[str],
    shape: Sequence[int],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    licence: str = "",
    seed: int = 0,
    batch_size: int = 128,
    augment: str | Augment | None = "default",
    default: str = "none",
    workers: int = 0,
    steps: int | None = None,
    events: bool = False,
) -> Data:
    """Parts -> Data: how training and evaluation read them is decided here, once.

    augment: a callable, or text for `parse`; "default" means the text in `default`; steps: frames of a sample, None
    for images; events: the frames count events. Training shuffles, augments and drops an incomplete last batch (unless
    it is the only one); evaluation does none of it.
    """

    def split(part: Part, size: int, **how: Any) -> Split:
        source, labels, rows = part
        if not isinstance(source, Tensor):
            return Files(source, rows, batch_size=size, seed=seed, workers=workers, **how)  # type: ignore[arg-type]
        assert labels is not None
        how |= {"batch_size": size, "seed": seed, "counts": events}
        return Tensors(source, labels, **how) if rows is None else Tensors(source[rows], labels[rows], rows, **how)

    augment = default if augment == "default" else augment
    change = augments.parse(augment) if isinstance(augment, str) else augment
    augments.suits(change, events)
    samples = len(train[0]) if train[2] is None else len(train[2])
    learn = split(train, batch_size, shuffle=True, drop_last=samples >= batch_size, augment=change)
    pixels = math.prod(shape) * (steps or 1)
    larger = max(batch_size, min(EVALUATION, EVALUATION * 3 * 64 * 64 // pixels))
    if mean is None or std is None:
        mean, std = statistics(learn.images if isinstance(learn, Tensors) else _some(learn))
    return Data(
        name,
        learn,
        split(valid, larger) if valid else None,
        split(test, larger),
        tuple(classes),
        tuple(shape),
        tuple(mean),
        tuple(std),
        licence,
        "none" if change is None else repr(change),
        steps,
    )


def _some(split: Files, most: int = 256) -> Tensor:  # evenly spaced samples, enough for mean and std
    every = split.index[:: max(1, len(split.index) // most)][:most]
    return next(iter(Files(split.dataset, every, batch_size=most)))["x"]


def from_tensors(
    train_x: Any,
    train_y: Any,
    test_x: Any,
    test_y: Any,
    *,
    classes: Sequence[str] | None = None,
    valid: float = 0.1,
    name: str = "tensors",
    **how: Any,
) -> Data:
    """Your own data, in memory.

    train_x, test_x: tensors or arrays [N,C,H,W] (or [N,T,C,H,W]), uint8 or float in [0,1]; train_y, test_y: whole
    numbers [N] from 0 to classes - 1; classes: their names, by default "0", "1", ...; valid: the share of the training
    data held out, 0 for none. The rest (augment, batch_size, seed, mean, std, licence) is as in `build`. Raises
    DataError with everything that is wrong.
    """
    x = {"train": _tensor(train_x), "test": _tensor(test_x)}
    y = {"train": _tensor(train_y), "test": _tensor(test_y)}
    wrong = [text for part in x for text in _wrong(part, x[part], y[part], len(classes) if classes else None)]
    if not wrong and x["train"].shape[1:] != x["test"].shape[1:]:
        wrong = [f"train images are {list(x['train'].shape[1:])}, test images {list(x['test'].shape[1:])}"]
    if wrong:
        raise DataError(f"{name}: " + "; ".join(wrong))
    y = {part: labels.long() for part, labels in y.items()}
    classes = classes or [str(i) for i in range(int(max(labels.max() for labels in y.values())) + 1)]
    kept, held = hold_out(y["train"], valid) if valid else (None, None)
    return build(
        name,
        (x["train"], y["train"], kept),
        (x["train"], y["train"], held) if held is not None else None,
        (x["test"], y["test"], None),
        classes,
        x["train"].shape[-3:],
        steps=x["train"].shape[1] if x["train"].dim() == 5 else None,
        **how,
    )


def _tensor(values: Any) -> Tensor:
    tensor = torch.as_tensor(values)
    return tensor.float() if tensor.is_floating_point() else tensor


def _wrong(part: str, x: Tensor, y: Tensor, classes: int | None) -> list[str]:
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    wrong = []
    if x.dim() not in (4, 5):
        hint = " (grey images: x[:, None])" if x.dim() == 3 else ""
        wrong.append(f"{part} images are {list(x.shape)}, not [N,C,H,W] or [N,T,C,H,W]{hint}")
    elif x.dim() == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        wrong.append(f"{part} images {list(x.shape)} look like [N,H,W,C]: permute(0, 3, 1, 2)")
    elif not x.numel():
        wrong.append(f"{part} images are empty: {list(x.shape)}")
    elif x.is_floating_point():
        if not x.isfinite().all():
            wrong.append(f"{int((~x.isfinite()).sum())} values of the {part} images are NaN or infinite")
        elif x.min() < 0 or x.max() > 1:
            wrong.append(f"{part} images go from {x.min():.4g} to {x.max():.4g}: float images must be in [0,1]")
    elif x.dtype != torch.uint8:
        wrong.append(f"{part} images are {x.dtype}: give uint8 from 0 to 255, or float in [0,1]")
    if y.dim() != 1 or not whole:
        wrong.append(f"{part} labels are {y.dtype} {list(y.shape)}, not whole numbers [N]")
    elif len(x) != len(y):
        wrong.append(f"{len(x)} {part} images, {len(y)} {part} labels")
    elif len(y) and (int(y.min()) < 0 or (classes and int(y.max()) >= classes)):
        top = f" to {classes - 1}" if classes else ""
        wrong.append(f"{part} labels go from {int(y.min())} to {int(y.max())}: they must go from 0{top}")
    return wrong


def from_dataset(
    train: Any,
    test: Any,
    classes: Sequence[str],
    shape: Sequence[int],
    *,
    labels: Any = None,
    plain: Any = None,
    valid: float = 0.1,
    name: str = "dataset",
    **how: Any,
) -> Data:
    """Your own map-style data sets, decoded as they are read: `dataset[i]` -> (image, label).

    image: PIL, array [H,W] or [H,W,C], or tensor [C,H,W]; uint8 or float in [0,1]; the same shape (C,H,W) throughout.
    labels: those of `train`, [N], needed to hold out validation; by default its `.targets` or `.labels`. plain: the
    training samples without their random transforms, to validate on; by default `train`. The rest (augment, batch_size,
    seed, workers, mean, std, licence) is as in `build`; mean and std come from 256 samples where not given.
    """
    for part, source in (("train", train), ("test", test)):
        seen = _some(Files(source, torch.tensor([0])))
        if seen.dim() == 5:  # as images, counts of events would be divided by 255
            frames = [seen.shape[0], *seen.shape[2:]]
            raise DataError(f"{name}: {part} samples are frames {frames}, not images [C,H,W]: give them to from_events")
        if list(seen.shape[-3:]) != list(shape):
            raise DataError(f"{name}: {part} images are {list(seen.shape[-3:])}, not {list(shape)}")
        low, high = seen.min().item(), seen.max().item()
        if not (low >= 0 and high <= 1):
            hint = "give uint8, or float in [0, 1] that is not normalised, which models do themselves"
            raise DataError(f"{name}: values of {part} images go from {low:g} to {high:g}: {hint}")
    kept = held = None
    if valid:
        labels = getattr(train, "targets", getattr(train, "labels", None)) if labels is None else labels
        if labels is None or len(labels) != len(train):
            raise DataError(f"{name}: to hold out validation, give the {len(train)} training labels, or valid=0")
        labels = torch.as_tensor(labels).long()
        if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
            raise DataError(f"{name}: labels go from {labels.min()} to {labels.max()}: not 0 to {len(classes) - 1}")
        kept, held = hold_out(labels, valid)
    return build(
        name,
        (train, None, kept),
        (train if plain is None else plain, None, held) if held is not None else None,
        (test, None, None),
        classes,
        shape,
        **how,
    )
