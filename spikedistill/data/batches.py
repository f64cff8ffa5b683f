"""Batches of one split: `Tensors` holds it in memory, `Files` decodes it as it goes.

Nothing here keeps state. The order of an epoch is a pure function of (seed, epoch) and every random draw of
(seed, epoch, batch number) or (seed, epoch, sample), so a run resumed at epoch e, batch k reads to the bit what
the uninterrupted run would have read.

A batch is `{"x": float32 [B,C,H,W] in [0,1], "y": int64 [B], "index": int64 [B]}`; x of samples with time is
[T,B,C,H,W], and where it counts events it is not in [0,1] but the counts. x is not normalised by mean and std: models
do that. `index` is the position in the original training set, a stable key for caches.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

Batch = dict[str, Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]  # float [B,C,H,W], CPU generator -> the same shape


class DataError(ValueError):
    """Something is wrong with the data, or with how it was asked for. The message says what to change."""


class MissingData(DataError, FileNotFoundError):
    """The files of a data set are not there. The message says where they were looked for and how to get them."""


def mix(*keys: object) -> int:
    """A 63-bit seed out of any keys, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "big") >> 1


def generator(*keys: object) -> torch.Generator:
    return torch.Generator().manual_seed(mix(*keys))


@contextmanager
def seeded(*keys: object) -> Iterator[None]:
    """The global CPU generators of torch, random and numpy, seeded from keys inside and as they were afterwards."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seed = mix(*keys)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU too
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def scaled(x: Tensor, counts: bool = False) -> Tensor:
    """uint8 0..255 -> float32 in [0,1]; counts and other types -> float32 as they are. 4-D comes out channels_last."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    floats = x.to(torch.float32, memory_format=layout)
    if x.dtype == torch.uint8 and not counts:
        return floats.div_(255)
    return floats.contiguous(memory_format=layout)


def time_first(x: Tensor) -> Tensor:
    """Frames [B,T,C,H,W] -> [T,B,C,H,W], a view; images as they are."""
    return x.transpose(0, 1) if x.dim() == 5 else x


def as_image(image: Any) -> Tensor:
    """A sample as a tensor [C,H,W]: a tensor is taken as it is, a PIL image or array is [H,W] or [H,W,C]."""
    if isinstance(image, Tensor):
        return image
    array = np.array(image)
    array = array.astype(np.uint8) * 255 if array.dtype == bool else array
    return torch.from_numpy(array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Epochs:
    """What both splits share: the order of an epoch, cut into batches.

    `batch_size` counts the samples of all ranks together. `shuffle` means training: with several ranks a last batch
    that would leave a rank empty is then dropped (in evaluation the rank gets an empty batch).
    """

    batch_size: int = 128
    shuffle: bool = False
    drop_last: bool = False
    augment: Augment | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.drop_last and 0 < self.samples < self.batch_size:
            raise DataError(f"{self.samples} samples make no batch of {self.batch_size} when the last one is dropped")

    @property
    def samples(self) -> int:
        return len(self.index)  # type: ignore[attr-defined]

    def batches(self, world: int = 1) -> int:
        """Batches in an epoch on `world` ranks: one less than `len` where the last is too small for them."""
        full, rest = divmod(self.samples, self.batch_size)
        short = self.drop_last or (self.shuffle and rest < world)  # training: every rank needs a sample
        return full + bool(rest and not short)

    def __len__(self) -> int:
        return self.batches()

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; of each, this rank's samples `rank::world`."""
        raise NotImplementedError

    def _plan(self, epoch: int, start: int, rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
        """The number of each global batch from `start` on, and its rows in the split."""
        if start < 0 or not 0 <= rank < world:
            raise DataError(f"no such slice of an epoch: start={start}, rank={rank}, world={world}")
        if self.shuffle and self.batch_size < world:
            raise DataError(f"batch_size {self.batch_size} (over all ranks) is too small for {world} ranks")
        n, size = self.samples, self.batch_size
        order = torch.randperm(n, generator=generator(self.seed, "order", epoch)) if self.shuffle else torch.arange(n)
        for number in range(start, self.batches(world)):
            yield number, order[number * size : (number + 1) * size]


@dataclass(frozen=True, eq=False)
class Tensors(_Epochs):
    """A split in memory.

    images: uint8 (divided by 255 on the way out, unless they are counts) or float, [N,C,H,W] or [N,T,C,H,W] (time
    comes first on the way out); labels: int64 [N]; index: int64 [N], by default 0 .. N-1; counts: the values are
    numbers of events and come out as they are. A batch is augmented whole ([B,T,C,H,W] where it has time) and then
    sliced, so the ranks together see the single-process batch.
    """

    images: Any = field(repr=False)
    labels: Tensor = field(repr=False)
    index: Tensor = field(repr=False, default=None)  # type: ignore[assignment]
    counts: bool = False

    def __post_init__(self) -> None:
        if self.index is None:
            object.__setattr__(self, "index", torch.arange(len(self.images)))
        if not len(self.images) == len(self.labels) == len(self.index):
            raise DataError(f"{len(self.images)} images, {len(self.labels)} labels, {len(self.index)} index entries")
        super().__post_init__()

    def to(self, device: torch.device | str) -> "Tensors":
        """The same split held on a device: batches are made there, from the same draws."""
        images = torch.as_tensor(self.images).to(device)
        return replace(self, images=images, labels=self.labels.to(device), index=self.index.to(device))

    def epoch(self, epoch: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        for number, rows in self._plan(epoch, start, rank, world):
            mine = rows[rank::world]
            if self.augment is None:
                x = scaled(time_first(self._images(mine)), self.counts)
            else:
                x = scaled(self._images(rows), self.counts)
                x = self.augment(x, generator(self.seed, "augment", epoch, number))
                x = scaled(time_first(x[rank::world]))
            yield {"x": x, "y": self.labels[mine], "index": self.index[mine]}

    def _images(self, rows: Tensor) -> Tensor:
        return self.images[rows] if isinstance(self.images, Tensor) else torch.as_tensor(self.images[rows.numpy()])


@dataclass(frozen=True, eq=False)
class Files(_Epochs):
    """A split decoded as it is read, by `workers` processes (0: here).

    dataset: map-style, `dataset[i]` -> (image, label), the image as `as_image` takes it; index: int64 [N], the samples
    that make up the split, by default all. Random transforms inside the data set may draw from the global generators
    of torch, random and numpy: these are seeded from (seed, epoch, sample), so the workers change nothing. (A transform
    that carries a generator of its own is out of reach.) `augment` is applied to each sample by itself, in the worker,
    seeded the same way; so no rank decodes another's samples. The rest is as in `Tensors`.
    """

    dataset: Any = field(repr=False)
    index: Tensor = field(repr=False, default=None)  # type: ignore[assignment]
    workers: int = 0

    def __post_init__(self) -> None:
        if self.index is None:
            object.__setattr__(self, "index", torch.arange(len(self.dataset)))
        super().__post_init__()

    def epoch(self, epoch: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        rows = [rows[rank::world].tolist() for _, rows in self._plan(epoch, start, rank, world)]
        samples = _Epoch(self.dataset, self.index, self.augment, self.seed, epoch)
        own = torch.Generator()  # else the loader would draw from the global one
        yield from DataLoader(
            samples,  # type: ignore[arg-type]
            batch_sampler=rows,
            num_workers=self.workers if rows else 0,
            collate_fn=samples.collate,
            generator=own,
        )


@dataclass(frozen=True)
class _Epoch:
    """One epoch of a `Files`, as a data set: what the workers hold."""

    dataset: Any
    index: Tensor
    augment: Augment | None
    seed: int
    epoch: int

    def __getitem__(self, row: int) -> tuple[Tensor, int, int]:
        at = int(self.index[row])
        with seeded(self.seed, "sample", self.epoch, at):
            sample = self.dataset[at]
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise DataError(f"sample {at} of the data set is a {type(sample).__name__}, not a pair (image, label)")
        x = as_image(sample[0])[None]
        if self.augment is not None:
            x = self.augment(scaled(x), generator(self.seed, "augment", self.epoch, at))
        return x[0], int(sample[1]), at

    def collate(self, samples: list[tuple[Tensor, int, int]]) -> Batch:
        if not samples:  # a rank left empty by the last batch of an evaluation
            return {k: v[:, :0] if v.dim() == 5 else v[:0] for k, v in self.collate([self[0]]).items()}
        images, labels, index = zip(*samples, strict=True)
        if len({x.shape for x in images}) > 1:
            odd = next(i for i, x in enumerate(images) if x.shape != images[0].shape)
            raise DataError(
                f"samples of different shapes: {index[0]} is {list(images[0].shape)}, {index[odd]} is "
                f"{list(images[odd].shape)}; resize them in the data set"
            )
        return {"x": scaled(time_first(torch.stack(images))), "y": torch.tensor(labels), "index": torch.tensor(index)}
