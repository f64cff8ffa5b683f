"""Computing stages again: the same numbers to the bit, statistics counted once, less memory."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from spikedistill import models
from spikedistill.core.taps import call
from spikedistill.models.layers import Conv2d

MODELS = {
    "small": "small(widths=(4, 6, 8), depth=2)",
    "sew_resnet18": "sew_resnet18(width=4)",
    "plif_net, dropout": "plif_net(width=4, hidden=20, size=12)",
    "spikformer": "spikformer(dim=16, depth=2, heads=2)",
    "twin": "small(widths=(4, 6), neuron=relu)",
}
every = pytest.mark.parametrize("text", MODELS.values(), ids=MODELS.keys())


def pair(text, channels=3):
    torch.manual_seed(0)
    model = models.build(text, channels=channels, steps=3)
    return model, models.recompute(copy.deepcopy(model))


def trained(model, x, taps=()):
    """Logits, gradients and buffers of one step with the same dropout."""
    torch.manual_seed(1)
    output = call(model.train(), x, taps=taps)
    (output.logits.square().sum() + sum(v.square().sum() for v in output.taps.values())).backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    return output.logits, grads, dict(model.named_buffers())


def same(a, b):
    assert torch.equal(a[0], b[0])
    for x, y in zip(a[1:], b[1:]):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x if x[k] is not None)


@every
@pytest.mark.parametrize("frames", [False, True], ids=["images", "frames"])
def test_the_same_to_the_bit(text, frames):
    x = torch.rand(*(3, 2) if frames else (2,), 3, 12, 12)
    plain, thrifty = pair(text)
    for _ in range(2):
        same(trained(thrifty, x), trained(plain, x))
    assert all(v.item() == 2 for k, v in thrifty.named_buffers() if "num_batches" in k)
    assert torch.equal(thrifty.eval()(x), plain.eval()(x))
    assert thrifty.state_dict().keys() == plain.state_dict().keys()


def test_with_taps_on_and_within_a_stage():
    x, (plain, thrifty) = torch.rand(2, 3, 12, 12), pair("sew_resnet18(width=4)")
    taps = ("stage1", "stage2.0.branch.0.neuron.v", "stem.conv")
    same(trained(thrifty, x, taps), trained(plain, x, taps))


def test_frozen_norms_and_a_mode_that_changes_before_the_backward_pass():
    x, (plain, thrifty) = torch.rand(2, 3, 12, 12), pair("small(widths=(4, 6))")
    grads = []
    for model in (plain, thrifty):
        before = copy.deepcopy(dict(model.named_buffers()))
        loss = model.eval()(x).square().sum()
        model.train()
        loss.backward()
        assert all(m.training for m in model.modules())
        assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_copy_runs_its_own_stages():
    _, thrifty = pair("small(widths=(4, 6))")
    other, x = copy.deepcopy(thrifty), torch.rand(2, 3, 12, 12)
    for p in thrifty.parameters():
        nn.init.zeros_(p)
    other.train()(x).square().sum().backward()
    assert all(p.grad is None for p in thrifty.parameters())
    assert all(p.grad is not None and p.grad.any() for k, p in other.named_parameters() if "conv" in k)


def test_currents_are_not_kept(monkeypatch):
    """Of the outputs of convolutions, which a norm and a neuron keep, none is left after the forward pass."""
    seen, convolve = [], Conv2d.forward

    def watched(self, *args):
        y = convolve(self, *args)
        seen.append(StorageWeakRef(y.untyped_storage()))
        return y

    monkeypatch.setattr(Conv2d, "forward", watched)
    x = torch.rand(2, 3, 12, 12)
    for model, kept, runs in zip(pair("sew_resnet18(width=4)"), (20, 0), (20, 40)):
        seen.clear()
        loss = model(x).square().sum()
        assert len(seen) == 20 and sum(not s.expired() for s in seen) == kept
        loss.backward()
        assert len(seen) == runs


def test_a_model_in_one_piece():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    model = models.recompute(nn.Sequential(body, nn.Flatten(), nn.Linear(5 * 8 * 8, 2)))
    assert "forward" in vars(body[0]) and "forward" not in vars(body)
    model(torch.rand(2, 3, 12, 12)).sum().backward()
    with pytest.raises(ValueError, match="Linear has no parts with convolutions"):
        models.recompute(nn.Linear(3, 4))
