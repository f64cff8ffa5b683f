"""Outputs of a teacher are kept: the same to the bit, asked for once, and safe in a file."""

import os
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn

from spikedistill import cache as cache_module
from spikedistill import own
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


@dataclass
class Settings:
    by: float


def scaled(k):
    return lambda x: k * x


class Holder(nn.Module):
    """Keeps what it computes with where neither a repr nor a state dict shows it."""

    def __init__(self, **held):
        super().__init__()
        vars(self).update(held)

    def forward(self, x):
        return x.flatten(1)[:, :3]


UNSEEN = {
    "a tensor": ({"mean": torch.tensor(0.0)}, {"mean": torch.tensor(0.5)}),
    "tensors in a list": ({"means": [torch.zeros(2)]}, {"means": [torch.ones(2)]}),
    "a private number": ({"_by": 1.0}, {"_by": 2.0}),
    "an object": ({"how": Settings(1.0)}, {"how": Settings(2.0)}),
    "a function": ({"act": torch.relu}, {"act": torch.tanh}),
    "a function of ours": ({"act": images}, {"act": same}),
    "what a partial holds": ({"act": partial(torch.add, other=1)}, {"act": partial(torch.add, other=2)}),
    "what a function holds": ({"act": scaled(1)}, {"act": scaled(2)}),
    "code of one name": ({"act": lambda x: x + 1}, {"act": lambda x: x - 1}),
    "a module in a list": ({"nets": [nn.ReLU()]}, {"nets": [nn.Tanh()]}),
    "an array": ({"mean": torch.zeros(2000).numpy()}, {"mean": torch.arange(2000).eq(1000).float().numpy()}),
}


@pytest.mark.parametrize("held", UNSEEN.values(), ids=UNSEEN)
def test_what_a_module_holds_unregistered_tells_models_apart(tmp_path, held):
    x = images()
    for one in held:
        cache = Cache(tmp_path)
        cache.infer(Holder(**one), x)
        assert cache.hits == 0
        again = Cache(tmp_path)
        again.infer(Holder(**one), x)
        assert again.hits == len(x)


def test_an_unregistered_tensor_that_is_exchanged_or_written_to_is_noticed():
    model, cache, x = Holder(mean=torch.tensor(0.0)), Cache(), images()
    for number in range(3):
        if number == 1:
            model.mean = torch.tensor(0.5)
        elif number == 2:
            model.mean += 1
        cache.infer(model, x)
    assert cache.hits == 0
    cache.infer(model, x)
    assert cache.hits == len(x)


class Stateful(nn.Module):
    """A neuron in the manner of other libraries: it begins anew with every call, and its last potential stays in it."""

    def forward(self, x):
        self.v = x.flatten(1)[:, :3] / 2
        return self.v


def test_what_a_model_wrote_while_it_ran_is_no_other_model():
    model, cache = Stateful(), Cache()
    for _ in range(2):
        for seed in (0, 1):
            cache.infer(model, images(seed=seed))
    assert cache.hits == 40


TEACHER = """
from torch import nn

class Teacher(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] * {by}

def teacher():
    return Teacher()
"""


def test_other_code_is_another_teacher_wherever_its_file_is(tmp_path, monkeypatch):
    x, files, hits = images(), [tmp_path / name / "mine.py" for name in ("here", "there", "other", "other")], []
    for file, by in zip(files, (1, 1, 2, 3)):
        file.parent.mkdir(exist_ok=True)
        file.write_text(TEACHER.format(by=by))
        os.utime(file, (by, by))  # edited at another time
        model, cache = own.imported(f"{file}:teacher")(), Cache(tmp_path / "kept")
        model.spec = {"model": f"{file}:teacher", "settings": {}}
        assert torch.equal(cache.infer(model, x).logits, infer(model, x).logits)
        hits.append(cache.hits)
    assert hits == [0, len(x), 0, 0]
    monkeypatch.setattr(cache_module, "__version__", "0.0.1")  # whose forward pass may be another
    other = Cache(tmp_path / "kept")
    other.infer(model, x)
    assert other.hits == 0


def test_code_is_told_apart_without_a_file():
    """As in a notebook."""
    prints = []
    for by in (1, 2, 2):
        space = {"__name__": "notebook"}
        exec(TEACHER.format(by=by), space)
        prints.append(Cache().fingerprint(space["teacher"]()))
    assert prints[0] != prints[1] == prints[2]


def test_files_are_read_once_and_those_of_torch_never(monkeypatch):
    read = []
    monkeypatch.setattr(cache_module.Path, "read_bytes", lambda path: read.append(str(path)) or b"")
    cache_module._print.cache_clear()
    for seed in range(3):
        Cache().fingerprint(net(seed))
    cache_module._print.cache_clear()
    assert len(read) == len({*read}) > 1 and not any(file.startswith(os.path.dirname(torch.__file__)) for file in read)


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


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_seconds_are_of_what_other_runs_are_spared(place):
    """Outputs in memory, and those that a full folder does not take, are computed by every run."""
    model, cache = net(), Cache(place, limit=1000)
    cache.infer(model, images(16))
    first = cache.counters
    assert (first["seconds"] == first["computed_seconds"] > 0 and first["cpu_seconds"] > 0) == bool(place)
    assert first["computed_seconds"] > 0 and not first["full"]
    with pytest.warns(UserWarning, match="has reached its limit"):
        cache.infer(model, images(16, seed=1))
    now = cache.counters
    assert [now[k] for k in ("seconds", "cpu_seconds")] == [first[k] for k in ("seconds", "cpu_seconds")]
    assert now["computed_seconds"] > first["computed_seconds"] and now["full"] and now["computed"] == 32


def test_a_run_that_goes_on_counts_on():
    model, before, after = net(), Cache(), Cache()
    before.infer(model, images(16))
    after.counters = before.counters
    after.infer(model, images(16))
    assert after.counters["asked"] == after.counters["computed"] == 32 and (after.calls, after.ran) == (1, 2)
    assert after.counters["computed_seconds"] > before.counters["computed_seconds"]


def test_an_interrupted_stage_counts_what_its_checkpoint_has_spent(tmp_path, monkeypatch):
    def train(cache):
        student, teacher = toy_student(), toy_teacher()
        passes = {"student": Pass(student, grad=True), "teacher": Pass(teacher, cache=cache)}
        data = replace(Tensors(images(40), torch.arange(40) % 3), batch_size=16)
        loss = {
            "kd": (1.0, lambda step: (step["student"].logits.mean(0) - step["teacher"].logits.mean(0)).square().mean())
        }
        return fit(Stage(data, passes, loss, epochs=3), tmp_path / "run", progress=False)

    def replace_and_stop(source, target, move=os.replace):
        move(source, target)
        if str(target).endswith("checkpoint.pt"):
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "replace", replace_and_stop)
        train(first := Cache(tmp_path / "kept"))
    train(second := Cache(tmp_path / "kept"))
    assert second.asked == 120 and second.seconds == first.seconds > 0


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
