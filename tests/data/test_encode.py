"""Rate codes: their means, one draw for all, and that resuming and evaluation repeat it."""

from dataclasses import replace

import pytest
import torch

from spikedistill.data import DataError, Tensors, check, encoded, from_dataset, from_tensors, load
from spikedistill.data.encode import spikes
from tests.data.test_streams import Listed, events


def grey(augment="none", **how):
    x = torch.linspace(0, 1, 40).view(40, 1, 1, 1).expand(40, 1, 6, 6).contiguous()
    return from_tensors(x, torch.arange(40) % 2, x[:10], torch.arange(10) % 2, augment=augment, batch_size=8, **how)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(p[k], q[k]) for p, q in zip(a, b, strict=True) for k in q)


@pytest.mark.parametrize("kind", ["bernoulli", "poisson"])
def test_mean_and_variance(kind):
    x = torch.tensor([0.0, 0.2, 0.7, 1.0]).view(1, 1, 1, 4).expand(50, 1, 20, 4)
    z = spikes(x, 8, kind, torch.Generator().manual_seed(0))
    assert z.shape == (8, *x.shape) and z.dtype == torch.float32 and torch.equal(z, z.floor())
    mean, rates = z.mean((0, 1, 2, 3)), x[0, 0, 0]
    variance = rates * (1 - rates) if kind == "bernoulli" else rates
    assert torch.allclose(mean, rates, atol=0.03)
    assert torch.allclose(z.var((0, 1, 2, 3)), variance, atol=0.05)
    if kind == "bernoulli":
        assert z.max() == 1 and (z[..., 0] == 0).all() and (z[..., 3] == 1).all()
    # steps are independent: the product of two has the mean of two
    assert torch.allclose((z[0] * z[1]).mean((0, 1, 2)), rates**2, atol=0.05)


def test_batches_are_a_function_of_seed_epoch_and_number():
    data = encoded(grey("flip|shift(1)"), "bernoulli", 5)
    assert data.steps == 5 and data.mean == (0.0,) and data.std == (1.0,) and data.augment.endswith("|bernoulli")
    whole = list(data.train.epoch(1))
    assert whole[0]["x"].shape == (5, 8, 1, 6, 6) and set(whole[0]["x"].unique().tolist()) <= {0.0, 1.0}
    assert same(list(data.train.epoch(1, 2)), whole[2:]) and not same(list(data.train.epoch(2)), whole)
    assert not same(list(replace(data.train, seed=3).epoch(1)), whole)
    assert same(list(data.test), list(data.test)) and same(list(data.valid), list(data.valid))
    for rank in range(2):
        part = list(data.train.epoch(1, 0, rank, 2))
        assert all(torch.equal(p["x"], b["x"][:, rank::2]) for p, b in zip(part, whole, strict=True))


def test_files_are_encoded_as_they_are_read():
    plain = grey(valid=0)
    listed = from_dataset(Listed(plain), Listed(plain), plain.classes, plain.shape, batch_size=8)
    batch = next(iter(encoded(listed, "poisson", 3).train))
    assert batch["x"].shape == (3, 8, 1, 6, 6) and torch.equal(batch["x"], batch["x"].round())


def test_errors_and_names():
    assert encoded(plain := grey(), "direct", 4) is plain
    with pytest.raises(DataError, match="no encoding 'rate'; valid: direct, bernoulli, poisson"):
        encoded(grey(), "rate", 4)
    with pytest.raises(DataError, match="events has frames over time already"):
        encoded(events(), "poisson", 4)
    assert "fashion-events has frames of events already; encode is for images" in check(
        "fashion-events", encode="poisson"
    )
    data = load("fashion-mini", encode="poisson", steps=2, batch_size=4)
    assert isinstance(data.train, Tensors) and next(iter(data.train))["x"].shape == (2, 4, 1, 28, 28)
