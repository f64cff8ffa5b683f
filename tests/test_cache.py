"""Outputs of a teacher are kept: the same to the bit, asked for once, and safe in a file."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from spikedistill.cache import Cache
from spikedistill.core.fit import Stage, Trainee, fit
from spikedistill.core.step import Pass
from spikedistill.core.taps import infer
from spikedistill.data import Tensors
from spikedistill.methods import bkd
from spikedistill.models.foreign import Foreign
from spikedistill.models.layers import Conv2d
from spikedistill.models.small import small
from spikedistill.neurons.kernels import sparse
from tests.methods.toy import toy_student, toy_teacher

PLACES = ["memory", "folder"]


@pytest.fixture
def place(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "cache"


def net(seed=0, **how):
    torch.manual_seed(seed)
    return small(classes=3, channels=2, widths=(4, 6), steps=2, **how).eval()


def images(count=20, seed=0):
    return torch.rand(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    pairs = [(a.logits, b.logits), *((a.taps[k], b.taps[k]) for k in a.taps)]
    # a size of 1 may have any stride
    strides = [[s for s, n in zip(x.stride(), x.shape) if n > 1] for pair in pairs for x in pair]
    return a.taps.keys() == b.taps.keys() and all(map(torch.equal, *zip(*pairs))) and strides[::2] == strides[1::2]


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("neuron", ["lif", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_those_of_the_model_and_are_asked_for_once(place, neuron, dtype):
    model, x, calls = net(neuron=neuron).to(memory_format=torch.channels_last), images(), []
    taps = ["stage2", "stage1"]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        want = infer(model, x, None, taps)
        model.register_forward_hook(lambda _m, _i, out: calls.append(out.shape[1]))
        cache = Cache(place)
        for _ in range(3):
            assert same(cache.infer(model, x, None, taps), want)
        assert calls == [20, 8]  # the batch, and eight of it alone: does a sample depend on its batch?
        mixed = torch.cat([images(3, seed=1), x[5:18].flip(0)])
        assert same(cache.infer(model, mixed, None, taps), infer(model, mixed, None, taps))
        assert calls[2] == 8 and (cache.asked, cache.hits) == (76, 53)  # three that are new, in eights
        if place:
            again = Cache(place)
            assert same(again.infer(model, x, None, taps), want) and again.hits == 20


def test_frames_have_their_batch_second():
    model, x, cache = net(), torch.rand(2, 20, 2, 8, 8), Cache()
    want = infer(model, x, None, ["stage1"])
    assert same(cache.infer(model, x, None, ["stage1"]), want) and same(cache.infer(model, x, None, ["stage1"]), want)
    assert cache.hits == 20
    cache.infer(model, x.flip(0), None, ["stage1"])  # the other way round in time
    assert cache.hits == 20


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_another_pass_is_not_found(place):
    cache, model, x = Cache(place), net(), images()
    cache.infer(model, x)
    others = [
        (net(1), x, None, ()),
        (net(neuron="lif(v_th=0.5)"), x, None, ()),
        (model, x, 3, ()),
        (model, x, None, ("stage1",)),
        (model, x.double().float() + 1e-3, None, ()),
        (model, images()[:, :, :6, :6], None, ()),
    ]
    for other, *how in others:
        assert torch.equal(cache.infer(other, *how).logits, infer(other, *how).logits)
    with torch.autocast("cpu", torch.bfloat16):
        cache.infer(model, x)
    assert cache.hits == 0
    with torch.no_grad():
        model.head.weight += 1  # in place: the same model, other weights
    assert torch.equal(cache.infer(model, x).logits, infer(model, x).logits) and cache.hits == 0
    with torch.no_grad():
        model.head.weight -= 1


def test_settings_that_a_repr_does_not_show_tell_models_apart(tmp_path):
    class Scaled(nn.Module):
        def __init__(self, by, at=("a", 1)):
            super().__init__()
            self.net_of, self.by, self.at = net(), by, at

        def forward(self, x):
            return self.net_of(x) * self.by

    x = images()
    for model in (Scaled(1), Scaled(2), Scaled(1, ("a", 2)), Foreign(net(), size=6), Foreign(net(), size=12)):
        cache = Cache(tmp_path)
        assert torch.equal(cache.infer(model, x).logits, infer(model, x).logits) and cache.hits == 0
    again = Cache(tmp_path)
    again.infer(Scaled(2), x)
    assert again.hits == len(x)


@pytest.mark.parametrize("damage", ["cut", "cut in the head", "head", "middle", "gone"])
def test_a_damaged_file_is_noticed_and_made_good(tmp_path, damage):
    model, x = net(), images()
    Cache(tmp_path).infer(model, x)
    (file,) = tmp_path.glob("*.outputs")
    data = whole = file.read_bytes()
    start = whole.index(b"\n") + 1
    lost = 20
    if damage == "cut":
        data, lost = whole[:-5], 1
    elif damage == "cut in the head":
        data = whole[: start - 1]
    elif damage == "head":
        data = b"\xff" * start + whole[start:]
    elif damage == "middle":
        data, lost = whole[: start + 25] + b"?" + whole[start + 26 :], 1
    file.unlink() if damage == "gone" else file.write_bytes(data)
    for hits in (20 - lost, 20):
        cache = Cache(tmp_path)
        assert torch.equal(cache.infer(model, x).logits, infer(model, x).logits) and cache.hits == hits


def test_two_at_once_share_a_file(tmp_path):
    one, two, model, x = Cache(tmp_path), Cache(tmp_path), net(), images(64)
    for i in range(0, 64, 16):
        for cache, at in ((one, i), (two, 48 - i)):
            assert torch.equal(cache.infer(model, x[at : at + 16]).logits, infer(model, x[at : at + 16]).logits)
    assert one.hits + two.hits == 64
    (file,) = tmp_path.glob("*.outputs")
    record = 20 + 2 * 3 * 4
    assert (file.stat().st_size - file.read_bytes().index(b"\n") - 1) == 64 * record


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_at_the_limit_it_says_so_and_stores_no_more(place):
    model, cache = net(), Cache(place, limit=1000)
    cache.infer(model, images(16))
    with pytest.warns(UserWarning, match="has reached its limit of .* GiB: it is read, but stores no more"):
        cache.infer(model, images(16, seed=1))
    for seed, hits in ((0, 16), (1, 16)):
        assert torch.equal(cache.infer(model, images(16, seed)).logits, infer(model, images(16, seed)).logits)
        assert cache.hits == hits


class Batchy(nn.Module):
    """Gives a sample something else in every batch."""

    def forward(self, x):
        return x.flatten(1)[:, :3] + len(x) * x.mean()


def test_a_model_whose_samples_depend_on_the_batch_sees_whole_batches():
    calls, model, cache, x = [], Batchy(), Cache(), images(16)
    cache.infer(model, x)
    model.register_forward_hook(lambda _m, _i, out: calls.append(len(out)))
    cache.infer(model, torch.cat([x[:13], images(3, seed=1)]))
    assert calls == [16]


def test_what_a_sample_gives_does_not_hang_on_how_many_spikes_the_others_have(monkeypatch):
    model, cache = nn.Sequential(Conv2d(16, 16, 3, padding=1), nn.Flatten(2)).eval(), Cache()
    few = torch.rand(1, 20, 6, 6, 16).lt(0.05).float().movedim(-1, 2)
    many = torch.cat([few[:, :2], torch.rand(1, 18, 6, 6, 16).movedim(-1, 2)], 1)
    monkeypatch.setattr(sparse.Convolution, "apply", lambda *_: pytest.fail("a convolution by spikes"))
    for x in (few, many):
        cache.infer(model, x)
    assert cache.hits == 2


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_training_is_the_same_to_the_bit(place):
    def train(cache):
        student, teacher = toy_student(), toy_teacher()
        torch.manual_seed(5)
        plan = bkd(student, teacher, blur=0.4, weight=1e-2)
        passes = {k: p if p.grad else replace(p, cache=cache) for k, p in plan.passes.items()}
        data = Tensors(torch.rand(40, 2, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3)
        data = replace(data, batch_size=16, shuffle=True)
        return fit(Stage(data, **vars(plan) | {"passes": passes}, epochs=3), progress=False)["epochs"]

    timing = ("seconds", "images_per_second", "waited_for_data")
    cache = Cache(place)
    plain, kept = ([{k: v for k, v in e.items() if k not in timing} for e in train(c)] for c in (None, cache))
    assert plain == kept
    assert (cache.asked, cache.hits) == (120, 80)


def test_a_trained_pass_has_no_cache():
    model = toy_student()
    with pytest.raises(ValueError, match="pass 'student' has a cache, but its model is trained"):
        Trainee(Stage([], {"student": Pass(model, grad=True, cache=Cache())}, {}))
