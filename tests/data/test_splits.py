"""Holding out, statistics, and data given as tensors or data sets."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedistill.data import DataError, Files, Tensors, from_dataset, from_tensors, hold_out, statistics


def arrays(n=60, classes=3, **how):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 1, 6, 6), generator=g, dtype=torch.uint8)
    return x, torch.arange(n) % classes


@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.floats(0.05, 0.9))
@settings(max_examples=60, deadline=None)
def test_hold_out(labels, share):
    labels = torch.tensor([*labels, labels[0]])  # at least one class of two
    kept, held = hold_out(labels, share)
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(labels)))
    assert kept.tolist() == sorted(kept.tolist()) and held.tolist() == sorted(held.tolist())
    for label in labels.unique():
        n, out = int((labels == label).sum()), int((labels[held] == label).sum())
        assert out == (0 if n == 1 else min(max(1, round(share * n)), n - 1))
    assert all(torch.equal(a, b) for a, b in zip((kept, held), hold_out(labels, share), strict=True))


def test_hold_out_never_changes():
    """Results and cached teachers depend on it: the same rows on every machine and in every version."""
    held = hold_out(torch.arange(1000) % 10, 0.1)[1]
    assert hashlib.sha256(held.numpy().tobytes()).hexdigest()[:16] == "cfe0b638afce173b"


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, math.nan])
def test_hold_out_errors(share):
    with pytest.raises(DataError, match="between 0 and 1"):
        hold_out(torch.arange(10) % 2, share)


def test_nothing_to_hold_out():
    with pytest.raises(DataError, match="nothing to hold out"):
        hold_out(torch.arange(10), 0.5)


def test_statistics():
    x = torch.randint(0, 256, (30, 3, 5, 4), dtype=torch.uint8)
    x[:, 2] = 51
    mean, std = statistics(x)
    exact = (x.double() / 255).transpose(0, 1).flatten(1)
    assert np.allclose(mean, exact.mean(1), atol=1e-6) and mean[2] == 0.2
    assert np.allclose(std[:2], exact[:2].std(1, correction=0), atol=1e-6) and std[2] == 1
    floats, movie = statistics(x / 255), statistics(x[:, None].expand(-1, 2, -1, -1, -1))
    assert np.allclose(floats, (mean, std), atol=1e-5) and movie == (mean, std)


def test_from_tensors():
    x, y = arrays()
    data = from_tensors(x, y, x[:9], y[:9], valid=0.2, batch_size=16, seed=5, augment="flip", licence="mine")
    assert isinstance(data.train, Tensors) and data.valid is not None
    assert (data.train.samples, data.valid.samples, data.test.samples) == (48, 12, 9)
    assert data.valid.labels.bincount().tolist() == [4, 4, 4]
    assert not set(data.train.index.tolist()) & set(data.valid.index.tolist())
    for split in (data.train, data.valid):  # index: the place in the training set as it was given
        assert torch.equal(x[split.index], split.images) and torch.equal(y[split.index], split.labels)
    assert data.train.shuffle and data.train.drop_last and repr(data.train.augment) == "flip"
    for split in (data.valid, data.test):
        assert not split.shuffle and not split.drop_last and split.augment is None and split.batch_size == 500
    assert data.classes == ("0", "1", "2") and data.shape == (1, 6, 6)
    assert (data.mean, data.std) == statistics(data.train.images)
    assert data.summary() == "tensors: 48 train, 12 valid, 9 test; 3 classes; 1x6x6; augment flip; mine"


def test_the_seed_moves_the_order_and_not_the_split():
    x, y = arrays()
    one, two = (from_tensors(x, y, x, y, seed=seed, batch_size=8) for seed in (0, 1))
    assert torch.equal(one.valid.index, two.valid.index)
    assert not torch.equal(next(iter(one.train))["index"], next(iter(two.train))["index"])


def test_without_validation_and_with_numpy_floats():
    x, y = arrays()
    data = from_tensors((x / 255).double().numpy(), y.numpy().astype(np.uint8), x / 255, y.tolist(), valid=0)
    assert data.valid is None and data.train.samples == 60 and data.augment == "none"
    assert torch.equal(data.train.index, torch.arange(60)) and "valid" not in data.summary()
    batch = next(iter(data.train))
    assert len(data.train) == 1 and len(batch["y"]) == 60  # fewer than a batch: kept
    assert torch.allclose(batch["x"], x[batch["index"]] / 255) and batch["y"].dtype == torch.int64


def test_larger_images_get_smaller_evaluation_batches():
    x = torch.zeros(4, 3, 224, 224, dtype=torch.uint8)
    data = from_tensors(x, torch.tensor([0, 0, 1, 1]), x, torch.tensor([0, 0, 1, 1]), batch_size=4)
    assert data.test.batch_size == 40


x, y = arrays()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_x": x[:, 0]}, r"train images are \[60, 6, 6\], not .*x\[:, None\]"),
        ({"train_x": torch.zeros(60, 6, 6, 3)}, r"look like \[N,H,W,C\]: permute"),
        ({"test_x": x.int()}, "test images are torch.int32: give uint8"),
        ({"test_x": x[..., 1:]}, r"train images are \[1, 6, 6\], test images \[1, 6, 5\]"),
        ({"train_x": x.float()}, r"train images go from 0 to 255: float images must be in \[0,1\]"),
        ({"train_x": x / 255 - 0.5}, r"go from -0.5 to 0.5"),
        ({"train_x": torch.full_like(x / 255, math.nan)}, "2160 values of the train images are NaN"),
        ({"train_x": x[:0], "train_y": y[:0]}, "train images are empty"),
        ({"train_y": y[:7]}, "60 train images, 7 train labels"),
        ({"train_y": y.float()}, "train labels are torch.float32"),
        ({"test_y": torch.eye(3)[y].long()}, r"test labels are torch.int64 \[60, 3\]"),
        ({"train_y": y - 1}, "train labels go from -1 to 1: they must go from 0"),
        ({"classes": ("a", "b")}, "train labels go from 0 to 2: they must go from 0 to 1.*test labels go"),
        ({"train_x": x.int(), "test_y": y[:7]}, "train images are torch.int32.*60 test images, 7 test labels"),
        ({"augment": "flop"}, "did you mean 'flip'"),
        ({"valid": 2}, "between 0 and 1"),
    ],
)
def test_from_tensors_errors(change, says):
    given = {"train_x": x, "train_y": y, "test_x": x, "test_y": y} | change
    with pytest.raises(DataError, match=says):
        from_tensors(**given)


class Pairs:
    def __init__(self, images, labels, **extra):
        self.images, self.classes_of = images, labels
        self.__dict__.update(extra)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], int(self.classes_of[i])


def test_from_dataset():
    train = Pairs(x, y, targets=y.tolist())
    plain = Pairs(255 - x, y)
    data = from_dataset(train, Pairs(x[:9], y[:9]), "abc", (1, 6, 6), plain=plain, batch_size=16, workers=0)
    assert isinstance(data.train, Files) and data.classes == ("a", "b", "c")
    memory = from_tensors(x, y, x[:9], y[:9], batch_size=16)
    assert torch.equal(data.train.index, memory.train.index) and torch.equal(data.valid.index, memory.valid.index)
    assert torch.equal(next(iter(data.train))["index"], next(iter(memory.train))["index"])
    held = next(iter(data.valid))
    assert torch.allclose(held["x"], 1 - x[held["index"]] / 255)  # from `plain`
    assert np.allclose(data.mean, memory.mean, atol=1e-5) and np.allclose(data.std, memory.std, atol=1e-5)


def test_from_dataset_errors():
    train = Pairs(x, y)
    with pytest.raises(DataError, match=r"train images are \[1, 6, 6\], not \[3, 6, 6\]"):
        from_dataset(train, train, "abc", (3, 6, 6))
    with pytest.raises(DataError, match="give the 60 training labels, or valid=0"):
        from_dataset(train, train, "abc", (1, 6, 6))
    with pytest.raises(DataError, match="labels go from 0 to 2: not 0 to 1"):
        from_dataset(train, train, "ab", (1, 6, 6), labels=y)
    clips = Pairs(x[:, None].expand(-1, 4, 2, 6, 6), y)
    with pytest.raises(
        DataError, match=r"test samples are frames \[4, 2, 6, 6\], not images .*: give them to from_events"
    ):
        from_dataset(Pairs(x.expand(-1, 2, 6, 6), y), clips, "abc", (2, 6, 6), valid=0)
    for images, says in ((x.float(), "251"), (x.long(), "251"), (x / 255.0 - 0.5, "-0.4")):
        wrong = Pairs(images, y)
        with pytest.raises(
            DataError, match=rf"values of test images go from .*{says}.*: give uint8, or float in \[0, 1\]"
        ):
            from_dataset(train, wrong, "abc", (1, 6, 6), valid=0)
    assert from_dataset(train, train, "abc", (1, 6, 6), valid=0).valid is None
    assert from_dataset(train, train, "abc", (1, 6, 6), labels=y).valid.samples == 6
