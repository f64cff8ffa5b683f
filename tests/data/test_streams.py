"""Pairs of events and images: the classes agree, only training images are used, resume and ranks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from spikedistill.data import (
    DataError,
    Pairs,
    check,
    from_dataset,
    from_events,
    from_tensors,
    images_of,
    load,
    streams,
)

NAMES = ("cat", "dog", "fox")


def clip(label):
    """Frames that tell their class."""
    return torch.full((3, 2, 8, 10), label + 1)


def events(n=40, names=NAMES, **how):
    source = [(clip(i % len(names)), i % len(names)) for i in range(n)]
    return from_events(source, source[:12], names, (8, 10), steps=3, batch_size=6, **how)


def images(n=60, names=NAMES, channels=3, augment="none", shift=0):
    """Pictures whose colours tell class (first channel) and row (second); those of other splits are told apart."""
    x = torch.zeros(n, channels, 12, 12, dtype=torch.uint8)
    y = torch.arange(n) % len(names)
    x[:, 0] = (10 * y + 10 + shift).view(-1, 1, 1)
    x[:, -1] = torch.arange(n).view(-1, 1, 1)
    test = torch.full((9, channels, 12, 12), 255, dtype=torch.uint8)
    return from_tensors(x, y, test, torch.arange(9) % len(names), classes=names, augment=augment)


class Listed:
    def __init__(self, data, targets=True):
        self.x, self.y = data.train.images, data.train.labels
        if targets:
            self.targets = self.y.tolist()

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


def same(a, b):
    return len(a) == len(b) and all(torch.equal(p[k], q[k]) for p, q in zip(a, b, strict=True) for k in q)


def test_batch():
    batch = next(iter(Pairs(events(), images())))
    assert list(batch) == ["x", "y", "index", "rgb", "source"]
    assert batch["x"].shape == (3, 6, 2, 8, 10) and batch["source"].shape == (6, 2, 8, 10)
    assert batch["rgb"].shape == (6, 3, 12, 12) and batch["rgb"].is_contiguous(memory_format=torch.channels_last)
    for key in ("source", "rgb"):
        assert batch[key].dtype == torch.float32 and batch[key].min() >= 0 and batch[key].max() <= 1


def test_classes_agree_and_only_training_images_are_used():
    data = images()
    pairs, allowed, used = Pairs(events(), data), set(data.train.index.tolist()), set()
    for epoch in range(40):
        for batch in pairs.epoch(epoch):
            assert torch.equal((batch["rgb"][:, 0, 0, 0] * 255).round(), 10.0 * batch["y"] + 10)
            assert torch.equal(batch["x"][0, :, 0, 0, 0], batch["y"] + 1.0)
            used |= set((batch["rgb"][:, 2, 0, 0] * 255).round().long().tolist())
    assert used == allowed and not used & set(data.valid.index.tolist())  # every one of them, and no other


def test_drawn_evenly_and_anew():
    data, rows = images(n=18), []
    pairs = Pairs(events(), data)
    for epoch in range(80):
        rows += [(b["rgb"][:, 2, 0, 0] * 255).round().long() for b in pairs.epoch(epoch)]
    counts = torch.cat(rows).bincount(minlength=18)[data.train.index].double()
    for label in range(3):
        of = counts[data.train.labels == label]
        assert len(of) == 5 and (of - of.mean()).abs().max() < 4 * of.mean().sqrt()
    one, two = (torch.cat([b["rgb"][:, 2, 0, 0] for b in pairs.epoch(e)]) for e in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("start", [0, 2, 9])
@pytest.mark.parametrize("files", [False, True])
def test_resume_in_mid_epoch_is_the_same_to_the_bit(start, files):
    data = images(augment="flip|shift(2)|jitter(0.2)")
    if files:
        data = from_dataset(Listed(data), Listed(data), NAMES, (3, 12, 12), augment="flip|shift(2)", workers=2)
    pairs = Pairs(events(augment="flip|noise(0.1)"), data, seed=3)
    whole = list(pairs.epoch(2))
    assert len(whole) == len(pairs) == pairs.batches() == 6 and pairs.samples == 37
    torch.rand(3)
    assert same(list(pairs.epoch(2, start)), whole[start:])
    assert not same(list(pairs.epoch(3)), whole) and not same(list(replace(pairs, seed=4).epoch(2)), whole)
    for batch in whole:
        assert torch.equal((batch["rgb"].amax((1, 2, 3)) > 0).long(), torch.ones(len(batch["y"]), dtype=torch.int64))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_the_single_process_batch(world):
    pairs = Pairs(events(augment="flip|noise(0.1)"), images(augment="flip|shift(2)"))
    whole = list(pairs.epoch(1, 1))
    ranks = [list(pairs.epoch(1, 1, rank, world)) for rank in range(world)]
    for number, batch in enumerate(whole):
        for rank in range(world):
            part = ranks[rank][number]
            assert torch.equal(part["x"], batch["x"][:, rank::world])
            assert all(torch.equal(part[k], batch[k][rank::world]) for k in ("source", "rgb", "y", "index"))


def test_source():
    red = torch.zeros(2, 3, 6, 6)
    red[:, 0] = 1
    assert torch.equal(streams.as_source(red, (2, 6, 6)), torch.ones(2, 2, 6, 6))  # V of HSV
    grey = torch.rand(2, 1, 6, 6)
    source = streams.as_source(grey, (2, 6, 6))
    assert torch.equal(source, grey.expand(-1, 2, -1, -1)) and source.is_contiguous()
    for size in (3, 12):
        source = streams.as_source(grey, (2, size, size))
        assert source.shape == (2, 2, size, size) and torch.equal(source[:, 0], source[:, 1])
        assert torch.allclose(source.mean(), grey.mean(), atol=0.05)
    stripes = torch.zeros(1, 3, 6, 6)  # of red and green: resized to brown first, where V of them is white
    stripes[:, 0, :, ::2] = stripes[:, 1, :, 1::2] = 1
    source = streams.as_source(stripes, (2, 6, 2))
    wanted = F.interpolate(stripes, (6, 2), mode="bilinear", antialias=True).amax(1, keepdim=True)
    assert torch.equal(source, wanted.expand(-1, 2, -1, -1)) and source.max() < 0.8


def test_a_class_in_one_modality_only():
    with pytest.raises(DataError) as error:
        Pairs(events(names=("cat", "dog", "wolf")), images())
    assert "only events has 'wolf'" in str(error.value) and "only tensors has 'fox'" in str(error.value)
    assert "classes='common'" in str(error.value)
    with pytest.raises(DataError, match=r"only events has 'Cat' \(there is 'cat'\)"):
        Pairs(events(names=("Cat", "dog", "fox")), images())
    with pytest.raises(DataError, match="same classes in another order"):
        Pairs(events(names=("dog", "cat", "fox")), images())
    with pytest.raises(DataError, match="no class in common"):
        Pairs(events(names=("a", "b")), images(), classes="common")


@pytest.mark.parametrize("files", [False, True])
def test_common_classes(files):
    data = images(names=("ant", "fox", "cat"))
    if files:
        data = from_dataset(Listed(data), Listed(data), data.classes, (3, 12, 12))
    pairs = Pairs(events(), data, classes="common")
    assert pairs.events.classes == pairs.images.classes == ("cat", "fox")
    for batch in pairs.epoch(0):
        assert torch.equal(batch["x"][0, :, 0, 0, 0], batch["y"] * 2 + 1.0)  # cat is 1, fox was 3
        colour = (batch["rgb"][:, 0, 0, 0] * 255).round()
        assert torch.equal(
            colour, torch.tensor([30.0, 20.0])[batch["y"]]
        )  # cat was the third class there, fox the second
    for split in (pairs.events.valid, pairs.events.test):
        batch = next(iter(split))
        assert torch.equal(batch["x"][0, :, 0, 0, 0], batch["y"] * 2 + 1.0)
    assert same(list(replace(pairs, seed=0).epoch(1)), list(pairs.epoch(1)))
    with pytest.raises(DataError, match=r"no class 'fux': did you mean 'fox'\?"):
        streams.only(data, ["fux"])


def test_errors():
    with pytest.raises(DataError, match="classes is 'all' or 'common', not 'some'"):
        Pairs(events(), images(), classes="some")
    with pytest.raises(DataError, match="first data set of Pairs is of events"):
        Pairs(images(), images())
    with pytest.raises(DataError, match="second data set of Pairs is of images"):
        Pairs(events(), events())
    few = images()
    few = replace(few, train=streams._rows(few.train, (few.train.labels != 1).nonzero()[:, 0]))
    with pytest.raises(DataError, match="tensors has no training image of 'dog'"):
        Pairs(events(), few)
    silent = images()
    silent = from_dataset(Listed(silent, targets=False), Listed(silent), NAMES, (3, 12, 12), valid=0)
    with pytest.raises(DataError, match="labels of a Listed are not known"):
        Pairs(events(), silent)


def test_a_share_of_the_training_samples_is_of_every_class_and_always_the_same():
    every, few = load("fashion-mini"), load("fashion-mini", train_share=0.1, seed=5)
    assert few.train.samples == 720 and few.train.labels.bincount().tolist() == [72] * 10
    assert set(few.train.index.tolist()) < set(every.train.index.tolist()) and few.test.samples == every.test.samples
    assert torch.equal(few.train.index.sort().values, load("fashion-mini", train_share=0.1).train.index.sort().values)
    assert few.valid.samples == every.valid.samples and few.mean == every.mean
    clips = load("fashion-events", steps=2, pair="fashion-mini", train_share=0.1, seed=5)
    assert clips.train.seed == 5
    assert clips.train.samples == 720 and images_of(clips).train.samples == 7200
    assert next(iter(load("fashion-mini", train_share=0.1, encode="poisson", steps=3).train))["x"].ndim == 5
    for wrong in (0.0, 1.5):
        assert "above 0 and at most 1" in check("fashion-mini", train_share=wrong)[0]


def test_a_share_leaves_every_class_a_sample():
    x, y = torch.zeros(24, 1, 4, 4), torch.tensor([0] * 20 + [1] + [2] * 3)
    few = streams.fewer(from_tensors(x, y, x, y, valid=0), 0.1)
    assert few.train.labels.bincount().tolist() == [2, 1, 1] and few.train.index[2] == 20
