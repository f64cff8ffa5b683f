"""Order, resume, ranks and randomness of `Tensors` and `Files`."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from spikedistill.data import DataError, Files, Tensors, parse


def tensors(n=23, **how):
    images = torch.randint(0, 256, (n, 3, 8, 6), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    settings = {"batch_size": 4, "shuffle": True, "augment": parse("flip|shift(2)|jitter(0.2)"), "seed": 3} | how
    return Tensors(images, torch.arange(n) % 5, torch.arange(n) * 10, **settings)


class Noisy:
    """A map-style data set whose transforms draw from all three global generators."""

    def __init__(self, n=11, kind="pil"):
        self.n, self.kind = n, kind

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        array = np.full((6, 5, 3), (7 * i) % 200, np.uint8)
        array = array + np.uint8(random.randrange(8)) + np.random.randint(0, 8, dtype=np.uint8)
        array = array + torch.randint(0, 8, (6, 5, 1), dtype=torch.uint8).numpy()
        return (Image.fromarray(array) if self.kind == "pil" else array), i % 3


def files(n=11, **how):
    return Files(Noisy(n), **({"batch_size": 4, "shuffle": True, "augment": parse("flip|shift(1)"), "seed": 3} | how))


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        torch.equal(p[k], q[k]) for p, q in zip(a, b, strict=True) for k in ("x", "y", "index")
    )


@pytest.fixture(params=[tensors, files])
def make(request):
    return request.param


def test_batch(make):
    batch = next(iter(make()))
    assert batch["x"].dtype == torch.float32 and batch["x"].shape[:2] == (4, 3)
    assert batch["x"].min() >= 0 and batch["x"].max() <= 1
    assert batch["x"].is_contiguous(memory_format=torch.channels_last)
    assert batch["y"].dtype == batch["index"].dtype == torch.int64


def test_values_labels_and_index_stay_together():
    split = tensors(augment=None)
    seen = torch.cat([b["index"] for b in split.epoch(5)])
    assert sorted(seen.tolist()) == list(range(0, 230, 10)) and seen.tolist() != sorted(seen.tolist())
    for batch in split.epoch(5):
        rows = batch["index"] // 10
        assert torch.equal(batch["x"], split.images[rows].float() / 255) and torch.equal(batch["y"], rows % 5)
    assert next(iter(replace(split, shuffle=False)))["index"].tolist() == [0, 10, 20, 30]


@pytest.mark.parametrize("start", [0, 1, 4, 99])
def test_resume_in_mid_epoch_is_the_same_to_the_bit(make, start):
    split = make()
    whole = list(split.epoch(2))
    torch.rand(3), random.random(), np.random.rand()  # global generators do not matter
    assert same(split.epoch(2, start), whole[start:])
    assert same(replace(split).epoch(2), whole)


def test_epochs_and_seeds_differ(make):
    split = make()
    assert not same(split.epoch(0), split.epoch(1))
    assert not same(split.epoch(0), replace(split, seed=4).epoch(0))
    orders = [torch.cat([b["index"] for b in split.epoch(epoch)]).tolist() for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert same(iter(split), split.epoch(0))


def test_every_batch_and_every_sample_has_its_own_draws():
    one = torch.rand(1, 9, 9)
    same_images = one.expand(12, 1, 9, 9)
    labels = torch.zeros(12, dtype=torch.int64)
    for split in (Tensors(same_images, labels, batch_size=4), Files([(one, 0)] * 12, batch_size=4)):
        x = torch.cat([batch["x"] for batch in replace(split, augment=parse("shift(8)"))])
        assert len({image.numpy().tobytes() for image in x}) > 9
        later = torch.cat([batch["x"] for batch in replace(split, augment=parse("shift(8)")).epoch(1)])
        assert sum(torch.equal(a, b) for a, b in zip(x, later, strict=True)) < 3


def test_augmentation_differs_between_epochs_for_the_same_order():
    split = tensors(shuffle=False)
    assert not any(torch.equal(a["x"], b["x"]) for a, b in zip(split.epoch(0), split.epoch(1), strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_the_single_process_batch(make, world):
    split = make()
    whole = list(split.epoch(1, 1))[: split.batches(world) - 1]
    ranks = [list(split.epoch(1, 1, rank, world)) for rank in range(world)]
    for number, batch in enumerate(whole):
        for key in ("x", "y", "index"):
            union = torch.empty_like(batch[key])
            for rank in range(world):
                union[rank::world] = ranks[rank][number][key]
            assert torch.equal(union, batch[key])
    assert all(len(rank) == len(whole) for rank in ranks)


def test_last_batch(make):
    split = make(n=9)  # 4 + 4 + 1
    assert len(split) == split.batches() == len(list(split)) == 3 and split.samples == 9
    assert split.batches(2) == len(list(split.epoch(0, 0, 1, 2))) == 2  # training: a rank would be empty
    evaluation = replace(split, shuffle=False)
    assert evaluation.batches(2) == 3
    last = list(evaluation.epoch(0, 0, 1, 2))[-1]
    assert last["x"].shape == (0, *next(iter(split))["x"].shape[1:]) and last["x"].dtype == torch.float32
    assert last["y"].shape == last["index"].shape == (0,) and last["y"].dtype == torch.int64
    assert len(replace(split, drop_last=True)) == len(list(replace(split, drop_last=True))) == 2


def test_time_and_float_images_pass_through():
    x = torch.rand(5, 2, 1, 4, 4)
    split = Tensors(x, torch.zeros(5, dtype=torch.int64), batch_size=3)
    assert torch.equal(torch.cat([b["x"] for b in split], 1), x.transpose(0, 1))  # time first
    array = Tensors((x * 255).byte().numpy(), torch.zeros(5, dtype=torch.int64), batch_size=3)  # say, a memory map
    assert torch.equal(next(iter(array))["x"], (x[:3] * 255).byte().transpose(0, 1) / 255)
    assert same(split.to("cpu"), split)
    assert same(Files([(image, 0) for image in x], batch_size=3), split)
    for kind in (split, Files([(image, 0) for image in x], batch_size=4)):
        last = list(kind.epoch(0, 1, 3, 4))
        assert last[0]["x"].shape == (2, 0, 1, 4, 4) and last[0]["y"].shape == (0,)


def test_counts_are_not_divided():
    x = torch.randint(0, 9, (6, 3, 2, 4, 4), dtype=torch.uint8)
    split = Tensors(x, torch.zeros(6, dtype=torch.int64), batch_size=6, counts=True)
    for change in (None, parse("shift(0)")):
        batch = next(iter(replace(split, augment=change)))
        assert batch["x"].dtype == torch.float32 and batch["x"].is_contiguous()
        assert torch.equal(batch["x"], x.transpose(0, 1).float())


def test_ranks_and_resume_with_time():
    x = torch.randint(0, 9, (10, 3, 2, 6, 6), dtype=torch.uint8)
    augment = parse("flip|roll(2)|drop_time|noise(0.1)")
    split = Tensors(x, torch.arange(10) % 2, batch_size=4, shuffle=True, augment=augment, counts=True)
    whole = list(split.epoch(3))
    assert same(split.epoch(3, 1), whole[1:])
    for rank in range(2):
        for part, batch in zip(split.epoch(3, 0, rank, 2), whole, strict=True):
            assert torch.equal(part["x"], batch["x"][:, rank::2]) and torch.equal(part["y"], batch["y"][rank::2])


def test_on_a_device():
    """The meta device has no values, but refuses to mix with the CPU as a GPU does."""
    split = tensors(augment=parse("flip|shift(2)|cutout(3)|rotate(10)|jitter(0.1)")).to("meta")
    assert all(value.device.type == "meta" for batch in split.epoch(0, 0, 1, 2) for value in batch.values())


def test_global_generators_are_left_alone(make):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    want = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    list(make().epoch(0))
    assert (torch.rand(1), random.random(), np.random.rand()) == want


def test_workers_change_nothing():
    split = files()
    assert same(split.epoch(1, 1), replace(split, workers=2).epoch(1, 1))


def test_a_sample_depends_on_seed_epoch_and_itself_only():
    by_index = [
        {int(i): x for b in split.epoch(2) for i, x in zip(b["index"], b["x"], strict=True)}
        for split in (files(), files(batch_size=3, shuffle=False), files(index=torch.arange(10, -1, -1)))
    ]
    assert all(torch.equal(by_index[0][i], other[i]) for other in by_index[1:] for i in range(11))


def test_images_of_any_kind():
    pil, array = (Files(Noisy(4, kind), batch_size=4) for kind in ("pil", "array"))
    assert same(pil, array)
    grey = [(Image.new("L", (5, 6), 51), 0), (np.full((6, 5), 51, np.uint8), 0), (torch.full((1, 6, 5), 0.2), 0)]
    for sample in grey:
        assert torch.allclose(next(iter(Files([sample])))["x"], torch.full((1, 1, 6, 5), 0.2))
    assert next(iter(Files([(Image.new("1", (5, 6), 1), 0)])))["x"].min() == 1


def test_files_errors():
    with pytest.raises(DataError, match=r"sample 0 .* dict"):
        next(iter(Files([{"image": 0}])))
    with pytest.raises(DataError, match=r"0 is \[1, 2, 2\], 1 is \[1, 2, 3\]"):
        next(iter(Files([(np.zeros((2, 2), np.uint8), 0), (np.zeros((2, 3), np.uint8), 0)])))


def test_errors():
    with pytest.raises(DataError, match="batch_size must be at least 1"):
        tensors(batch_size=0)
    with pytest.raises(DataError, match="23 images, 5 labels"):
        Tensors(torch.zeros(23, 1, 2, 2), torch.arange(5))
    with pytest.raises(DataError, match="make no batch of 24"):
        tensors(batch_size=24, drop_last=True)
    with pytest.raises(DataError, match="rank=2, world=2"):
        next(tensors().epoch(0, 0, 2, 2))
    with pytest.raises(DataError, match="too small for 5 ranks"):
        next(tensors().epoch(0, 0, 0, 5))
