"""Pairs of event clips and static images of the same class, for learning across modalities.

No image belongs to an event clip: for every clip of a batch an image of its class is drawn, anew in every step (He et
al. 2024, An Efficient Knowledge Transfer Strategy for Spiking Neural Networks from Static to Event Domain; Ye et al.
2025, CKD). Classes are matched by name, and images come from the training split alone. `paired` is what
`load(pair=...)` gives: data of events whose training batches are those of `Pairs`.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Batch, DataError, Files, Tensors, generator, mix
from .splits import Data, Split, hold_out


def as_source(images: Tensor, shape: Sequence[int]) -> Tensor:
    """Images [B,C,H,W] as an event network reads them, [B,c,h,w] for shape (c,h,w): resized, then the brightest colour
    of a pixel (V of HSV; a grey value is itself), the same in every channel. Of the range of the images.
    """
    channels, *size = shape
    if list(images.shape[-2:]) != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images.amax(1, keepdim=True).expand(-1, channels, -1, -1).contiguous()


def labels_of(split: Split) -> Tensor:
    """The labels of a split's samples, [N]. DataError where a data set read from files does not publish them."""
    if isinstance(split, Tensors):
        return split.labels
    every = getattr(split.dataset, "targets", getattr(split.dataset, "labels", None))
    if every is None:
        kind = type(split.dataset).__name__
        raise DataError(f"the labels of a {kind} are not known before it is read: give it an attribute `targets`")
    return torch.as_tensor(every).long()[split.index]


@dataclass(frozen=True)
class _Relabelled:
    """A map-style data set whose label l is new[l]."""

    dataset: Any
    targets: Tensor
    new: Tensor

    @property
    def samples(self) -> Any:
        return self.dataset.samples  # of files alone, others have none, and nor has this

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image, label = self.dataset[i]
        return image, int(self.new[label])


def only(data: Data, classes: Sequence[str]) -> Data:
    """The same data with these classes, in this order. DataError names a class that the data do not have."""
    for name in classes:
        if name not in data.classes:
            near = difflib.get_close_matches(name, data.classes, 1, 0.6)
            raise DataError(f"{data.name} has no class {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    if tuple(classes) == data.classes:
        return data
    new = torch.full((len(data.classes),), -1)
    new[[data.classes.index(name) for name in classes]] = torch.arange(len(classes))

    def part(split: Split) -> Split:
        rows = (new.to(labels_of(split).device)[labels_of(split)] >= 0).nonzero()[:, 0]
        if not len(rows):
            raise DataError(f"{data.name}: a split has no sample of {', '.join(classes)}")
        cut = _rows(split, rows, drop_last=split.drop_last and len(rows) >= split.batch_size)
        if isinstance(cut, Tensors):
            return replace(cut, labels=new.to(cut.labels.device)[cut.labels])
        every = torch.as_tensor(getattr(cut.dataset, "targets", getattr(cut.dataset, "labels", None))).long()
        return replace(cut, dataset=_Relabelled(cut.dataset, new[every], new))

    valid = None if data.valid is None else part(data.valid)
    return replace(data, train=part(data.train), valid=valid, test=part(data.test), classes=tuple(classes))


def fewer(data: Data, share: float) -> Data:
    """The same data with a share of the training samples, always the same: of every class, rounded, at least one."""
    labels = labels_of(data.train).cpu()
    single = (labels.bincount()[labels] == 1).nonzero()[:, 0]  # which `hold_out` never takes
    several = hold_out(labels, share)[1] if len(single) < len(labels) else single[:0]
    rows = torch.cat([several, single]).sort().values
    less = _rows(data.train, rows, drop_last=data.train.drop_last and len(rows) >= data.train.batch_size)
    return replace(data, train=less)


def _rows(split: Split, rows: Tensor, **how: Any) -> Split:
    """Some samples of a split, in this order."""
    if isinstance(split, Files):
        return replace(split, index=split.index[rows], **how)
    images = split.images[rows] if isinstance(split.images, Tensor) else split.images[rows.numpy()]
    return replace(split, images=images, labels=split.labels[rows], index=split.index[rows], **how)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Training batches of events, each sample with a training image of its class.

        x       [T,B,C,H,W]  event frames, augmented as `events.train` says
        source  [B,C,H,W]    the image as `as_source` makes it for the event network, in [0,1]
        rgb     [B,c,h,w]    the same image as a teacher of images sees it, augmented as `images.train` says (in the
                             papers it is not: load the images with augment="none")
        y, index             [B] of the event sample

    classes: "all" raises DataError for a class that is in one modality only; "common" drops it: then `self.events` and
    `self.images` are the data without it, to evaluate on and to train a teacher with. seed: of the order, the
    augmentations and the pairs; which image belongs to which sample is a function of it, the epoch and the number of
    the batch, so `epoch` resumes and splits over ranks as that of `Tensors` does.
    """

    events: Data
    images: Data
    classes: str = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.classes not in ("all", "common"):
            raise DataError(f"classes is 'all' or 'common', not {self.classes!r}")
        if self.events.steps is None:
            raise DataError(f"{self.events.name} has no frames: the first data set of Pairs is of events")
        if self.images.steps is not None:
            raise DataError(f"{self.images.name} has frames: the second data set of Pairs is of images")
        if self.classes == "common":
            both = [name for name in self.events.classes if name in self.images.classes]
            if not both:
                raise DataError(f"{self.events.name} and {self.images.name} have no class in common")
            object.__setattr__(self, "events", only(self.events, both))
            object.__setattr__(self, "images", only(self.images, both))
        wrong = []
        for one, other in ((self.events, self.images), (self.images, self.events)):
            if lone := [name for name in one.classes if name not in other.classes]:
                near = difflib.get_close_matches(lone[0], other.classes, 1, 0.6)
                hint = f" (there is {near[0]!r})" if near else ""
                wrong.append(f"only {one.name} has {', '.join(map(repr, lone))}{hint}")
        if wrong:
            raise DataError(
                f"classes in one modality only: {'; '.join(wrong)}. classes='common' (--pair-classes common) drops them"
            )
        if self.events.classes != self.images.classes:
            raise DataError(
                f"{self.events.name} and {self.images.name} have the same classes in another order, and so would a "
                f"teacher of the images: use streams.only(images, events.classes)"
            )
        count = labels_of(self.images.train).bincount(minlength=len(self.images.classes)).tolist()
        needed = labels_of(self.events.train).unique().tolist()
        if none := [self.images.classes[label] for label in needed if not count[label]]:
            raise DataError(f"{self.images.name} has no training image of {', '.join(map(repr, none))}")

    @property
    def samples(self) -> int:
        return self.events.train.samples

    @property
    def batch_size(self) -> int:
        return self.events.train.batch_size

    def batches(self, world: int = 1) -> int:
        return self.events.train.batches(world)

    def __len__(self) -> int:
        return self.batches()

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; of each, this rank's samples `rank::world`."""
        events = replace(self.events.train, seed=self.seed)
        images, of = self.images.train, labels_of(self.images.train).cpu()
        members = of.argsort(stable=True)  # rows of the images, class by class
        count = of.bincount(minlength=len(self.images.classes))
        first = count.cumsum(0) - count
        labels = labels_of(events).cpu()
        batches = zip(events.epoch(epoch, start, rank, world), events._plan(epoch, start, rank, world), strict=True)
        for batch, (number, rows) in batches:
            y = labels[rows]
            draw = torch.rand(len(y), generator=generator(self.seed, "pairs", epoch, number), dtype=torch.float64)
            chosen = members[first[y] + (draw * count[y]).long()]
            how = {"batch_size": len(y), "shuffle": False, "drop_last": False, "seed": mix(self.seed, "images", number)}
            if isinstance(images, Files):
                how["workers"] = 0  # starting them for a single batch takes longer than reading it
            rgb = next(_rows(images, chosen, **how).epoch(epoch, 0, rank, world))["x"]
            yield batch | {"rgb": rgb, "source": as_source(rgb, self.events.shape)}


def paired(events: Data, images: Data, classes: str = "all", seed: int = 0) -> Data:
    """The events, their training split a `Pairs`; validation and test are of events alone, as the student will be."""
    pairs: Any = Pairs(events, images, classes, seed)
    return replace(pairs.events, train=pairs)


def images_of(data: Data) -> Data | None:
    """The images that data of events are paired with, if they are: what a teacher of images is trained on and sees."""
    train: Any = data.train
    return train.images if isinstance(train, Pairs) else None
