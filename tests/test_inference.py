"""Answers step by step are those of the whole sequence."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spikedistill import transforms
from spikedistill.core.taps import infer
from spikedistill.export import fold, plain
from spikedistill.inference import Stream, prepare, stepwise, whole
from spikedistill.models import build
from spikedistill.models.layers import Conv2d, sequence
from spikedistill.neurons import LIF
from spikedistill.spec import SpecError
from tests.export.wake import awake

MODELS = ["small(widths=(3, 4, 5))", "small(widths=(3, 4), neuron=plif(v_reset=None, tau=3.0))",
          "sew_resnet18(width=3)", "resnet19(width=3, stem_width=3)"]  # fmt: skip


def student(text, **given):
    torch.manual_seed(0)
    return awake(build(text, classes=3, steps=4, channels=2, **given), torch.rand(6, 2, 8, 8))


@pytest.mark.parametrize("text", MODELS)
def test_a_stream_of_frames_answers_as_the_whole_sequence(text):
    model, x = student(text), torch.rand(5, 6, 2, 8, 8)
    stream, want = Stream(model), infer(model, x).logits
    assert want.std(0).max() > 0  # the steps differ: the potentials matter
    for _ in range(2):
        got = torch.stack([stream(frame) for frame in x])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        stream.reset()
    stateless = torch.stack([infer(model, frame[None]).logits[0] for frame in x])
    assert not torch.allclose(stateless[1:], want[1:], atol=1e-3)


EVERY = [*MODELS, "ms_resnet18(width=4)", "spikformer(depth=1, dim=16, heads=2)", "qkformer(dim=16, heads=2)",
         "spike_driven(depth=1, dim=16)", "vggsnn(size=8, widths=((3,), (4,)))", "small(widths=(3, 4), neuron=relu)",
         "ann_resnet18(width=4)"]  # fmt: skip


def rewritten(neuron, *texts):
    torch.manual_seed(0)
    model = build(f"small(widths=(3, 8, 9), neuron={neuron})", classes=3, steps=4, channels=2)
    for text in texts:
        transforms.apply(model, text)
    return awake(model, torch.rand(6, 2, 8, 8))


def test_a_network_converted_from_an_ann_streams_from_half_its_threshold_and_is_written_so():
    model, x = rewritten("relu", "hsd_quantise(levels=4, ceiling=2.0)", "hsd_convert"), torch.rand(5, 6, 2, 8, 8)
    stream, want = Stream(model), infer(model, x).logits
    torch.testing.assert_close(torch.stack([stream(frame) for frame in x]), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(infer(plain(model, x), x).logits, want, atol=1e-5, rtol=1e-5)


def test_layers_that_change_after_half_of_the_steps_are_folded_and_do_not_stream():
    model, x = rewritten("lif", "tt_snn(rank=2, mode=half)"), torch.rand(6, 2, 8, 8)
    want = infer(model, x).logits
    for merged in (False, True):
        if merged:
            transforms.merge(model)
        assert model.stage3[1].conv.late.shape == (9, 8, 1, 1) if merged else True
        torch.testing.assert_close(infer(prepare(model, (2, 8, 8), bf16=False), x).logits, want, atol=1e-4, rtol=1e-4)
        with pytest.raises(SpecError, match="change after half of its steps"):
            Stream(model)


@pytest.mark.parametrize("text", EVERY)
def test_a_prepared_model_is_the_model_up_to_rounding(text):
    model, x = student(text), torch.rand(6, 2, 8, 8)
    want, state = infer(model, x).logits, {k: v.clone() for k, v in model.state_dict().items()}
    exact, rounded = prepare(model, (2, 8, 8), bf16=False), prepare(model, (2, 8, 8), bf16=True)
    torch.testing.assert_close(infer(exact, x).logits, want, atol=1e-4, rtol=1e-4)
    got = infer(rounded, x).logits
    assert got.dtype == torch.float32 and not torch.equal(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        usual = infer(model, x).logits.float()
    assert (got - want).norm() < 2 * (usual - want).norm() + 0.1 * want.norm()  # untrained: rounding spreads far
    assert not any(p.requires_grad for net in (exact, rounded) for p in net.parameters())
    assert (
        all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and next(model.parameters()).requires_grad
    )
    again = deepcopy(rounded)  # as a Stream does
    torch.testing.assert_close(infer(again, x).logits, got)
    assert dict(model.named_children()).keys() == dict(rounded.named_children()).keys()


def test_stream_with_part_of_the_batch_and_a_wrong_one():
    model, x = student(MODELS[0]), torch.rand(4, 6, 2, 8, 8)
    stream = Stream(model)
    stream(x[0])
    with pytest.raises(ValueError, match="a stream of 6 sequences was fed 2: reset"):
        stream(x[0, :2])
    stream.keep(torch.tensor([1, 4]))
    torch.testing.assert_close(stream(x[1, [1, 4]]), infer(model, x[:2]).logits[1][[1, 4]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", [False, True])
def test_stepwise_is_whole_and_stops_each_sample_when_sure(frames):
    model = student(MODELS[0])
    x = torch.rand(4, 6, 2, 8, 8) if frames else torch.rand(6, 2, 8, 8)
    a, b = whole(model, x, 4), stepwise(Stream(model), x, 4)
    assert torch.equal(a.label, b.label) and torch.equal(a.steps, b.steps) and a.steps.unique().tolist() == [4]
    torch.testing.assert_close(a.confidence, b.confidence)
    logits = infer(model, x).logits.cumsum(0) / torch.arange(1, 5).view(-1, 1, 1)
    sure = logits.softmax(-1).amax(-1)  # [T, B]
    limit = float(sure.flatten().median())
    early = stepwise(Stream(model), x, 4, limit)
    for i in range(6):
        t = next((t for t in range(4) if sure[t, i] >= limit), 3)
        assert early.steps[i] == t + 1 and early.label[i] == logits[t, i].argmax()
        torch.testing.assert_close(early.confidence[i], sure[t, i])
    assert early.steps.min() >= 1 and early.steps.float().mean() < 4


def test_rounded_weights_are_not_exported():
    rounded = prepare(student(MODELS[0]), bf16=True)
    with pytest.raises(ValueError, match=r"load\(run, fast=False\)"):
        fold(rounded, torch.rand(1, 2, 8, 8))


class Tokens(nn.Module):
    """Pixels as tokens of a transformer, whose attention reads the weight of its last layer without calling it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 8)
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.blocks(self.embed(x.flatten(2).mT)).mean(1)
        return F.linear(tokens, self.head.weight)


class Frames(nn.Module):
    """A network of frames alone, [T, B, C, H, W], with a norm for each of the first steps after one convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(2, 2, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(2))
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.conv, self.norms = nn.Conv2d(4, 4, 3), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        T, B, C, H, W = x.shape
        x = self.stem(x.permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4)
        x = self.first(x.reshape(T * B, C, H, W)).unflatten(0, (T, B))
        x = torch.stack([self.norms[min(t, 2)](self.conv(now)) for t, now in enumerate(x)])
        return self.head(x.relu().mean((-2, -1)))


class Three(nn.Module):
    """A network that takes three frames and nothing else."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(torch.cat([*x], 1))).relu().mean((-2, -1)))


@pytest.mark.parametrize("net", [Tokens, Frames, Three])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_networks_of_others_are_prepared_as_they_are_called(net):
    torch.manual_seed(0)
    model, x = net(), torch.rand(6, 2, 8, 8) if net is Tokens else torch.rand(3, 6, 2, 8, 8)
    awake(model, x)
    want, exact = infer(model, x).logits, prepare(model, (2, 8, 8), bf16=False)
    torch.testing.assert_close(infer(exact, x).logits, want, atol=1e-5, rtol=1e-5)
    rounded = prepare(model, (2, 8, 8), bf16=True)
    for made in (rounded, deepcopy(rounded)):
        got = infer(made, x).logits
        assert got.dtype == torch.float32 and not torch.equal(got, want)
        torch.testing.assert_close(got, want, atol=0.03, rtol=0.03)
    if net is Frames:
        assert isinstance(exact.first[1], nn.Identity) and isinstance(exact.norms[0], nn.BatchNorm2d)
    (copy := deepcopy(rounded)).head.weight.data.zero_()
    assert not torch.equal(infer(copy, x).logits, got)


class Mine(nn.Module):
    """A student of yours: no attribute `steps`, a neuron that may fire twice, under one name or under two."""

    def __init__(self, twice=""):
        super().__init__()
        self.conv, self.neuron, self.head = Conv2d(2, 4, 3, padding=1), LIF(), nn.Linear(4, 3)
        self.twice = twice
        if twice == "names":
            self.again = self.neuron

    def forward(self, x, steps=None):
        x = self.conv(sequence(x) * 3)
        x = self.neuron(x, len(x) if len(x) > 1 else steps or 3)
        if self.twice:
            x = getattr(self, "again", self.neuron)(x + x.roll(1, -1))
        return self.head(x.mean((-2, -1)))


class Bare(Mine):
    """The same, and its forward takes no `steps`."""

    def forward(self, x):
        return super().forward(x)


class Still(Mine):
    """Images alone, and as many steps as it wants."""

    def forward(self, x):
        return super().forward(x[None].expand(3, *x.shape))


def test_images_are_shown_as_often_as_a_student_of_yours_shows_them():
    torch.manual_seed(0)
    x = torch.rand(6, 2, 8, 8)
    for model in (Mine(), Bare()):
        want = infer(model, x).logits
        assert len(want) == 3 and want.std(0).max() > 0
        got = whole(model, x)
        assert got.steps.unique().tolist() == [3]
        torch.testing.assert_close(got.confidence, want.mean(0).softmax(-1).amax(-1))
    assert whole(Mine(), x, 2).steps.unique().tolist() == [2]
    assert whole(Bare(), x, 2).steps.unique().tolist() == [3]  # and the answer says so


@pytest.mark.parametrize("twice", ["call", "names"])
def test_a_neuron_that_fires_twice_a_step_does_not_stream(twice):
    torch.manual_seed(0)
    stream = Stream(Mine(twice))
    with pytest.raises(SpecError, match="'neuron' of this student fires more than once a step"):
        stream(torch.rand(6, 2, 8, 8))
    model, x = Mine(), torch.rand(4, 6, 2, 8, 8)
    stream = Stream(model)
    torch.testing.assert_close(torch.stack([stream(frame) for frame in x]), infer(model, x).logits)


def test_a_student_that_takes_its_own_steps_does_not_stream():
    torch.manual_seed(0)
    for model, why in ((Bare(), "takes 3 time steps for a frame"), (Still(), "takes no single frame")):
        with pytest.raises(SpecError, match=why):
            Stream(model)(torch.rand(6, 2, 8, 8))


def test_a_network_without_neurons_sees_an_image_once():
    ann = student("small(widths=(3, 4), neuron=relu)")
    found, want = stepwise(Stream(ann), torch.rand(6, 2, 8, 8), 4, 1.0), whole(ann, torch.rand(6, 2, 8, 8))
    assert found.steps.tolist() == want.steps.tolist() == [1] * 6
    assert stepwise(Stream(ann), torch.rand(4, 6, 2, 8, 8), 4).steps.tolist() == [4] * 6


def test_answers_are_where_the_input_is():
    model, x = student(MODELS[0]).to("meta"), torch.rand(6, 2, 8, 8, device="meta")
    assert all(answer.is_meta for answer in vars(stepwise(Stream(model), x, 2)).values())
