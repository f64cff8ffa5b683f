"""Rates and operations, counted in loops."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spikedistill.core.taps import infer
from spikedistill.data.batches import Files, Tensors
from spikedistill.data.encode import Encode
from spikedistill.data.splits import SomeFrames
from spikedistill.models.foreign import Spiking
from spikedistill.models.small import small
from spikedistill.neurons import LIF
from spikedistill.report.activity import activity, spikes_averaged, spread
from spikedistill.transforms.tt_snn import TTConv2d
from spikedistill.transforms.unstructured_pruning import Gated, Mask


def operations_in_loops(conv: nn.Conv2d, x: torch.Tensor) -> float:
    """Every input of value k goes to as many outputs as the kernel reaches from it, k times. x: [N, C, H, W]."""
    kh, kw = conv.kernel_size
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    height, width = x.shape[-2:]
    out_h = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    out_w = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    total = 0.0
    for i in range(out_h):
        for j in range(out_w):
            for a in range(kh):
                for b in range(kw):
                    h, w = i * sh - ph + a * dh, j * sw - pw + b * dw
                    if 0 <= h < height and 0 <= w < width:
                        total += x[:, :, h, w].sum().item()
    return total * conv.out_channels / conv.groups


@pytest.mark.parametrize("how", [dict(stride=2, padding=1), dict(padding=2, dilation=2), dict(groups=2, bias=False)])
def test_a_convolution_counts_what_it_adds(how):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (3, 2), **how)
    model = nn.Sequential(conv, nn.Flatten(1), nn.LazyLinear(3))
    x = (torch.rand(5, 4, 7, 6) < 0.3).float() * torch.randint(1, 3, (5, 4, 7, 6))
    model(x)
    counted = activity(model, [{"x": x}])
    linear = model[2]
    inner = conv(x)
    assert counted["operations"]["ac"] == pytest.approx(operations_in_loops(conv, x) / 5)
    nonzero = (inner != 0).sum().item() * 3
    assert counted["operations"]["mac"] == pytest.approx(nonzero / 5)
    dense = inner.numel() * 4 // conv.groups * 6 + 5 * linear.in_features * 3
    assert counted["operations"]["dense"] == pytest.approx(dense / 5) and counted["rate"] is None


def test_late_steps_of_a_halved_layer_count_by_their_kernel():
    torch.manual_seed(0)
    layer = TTConv2d(nn.Conv2d(4, 6, 3, padding=1), 2, "half", "stride", ()).merged()
    layer.weight.data[:, :, 0, 0] = 0.0
    model, x = Timed(layer), (torch.rand(3, 5, 4, 7, 6) < 0.4).float()
    counted = activity(model, [{"x": x}])
    early, late = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1)
    full = torch.zeros(4, 9).add_((layer.weight != 0).sum(0).flatten(1)).view(4, 3, 3)
    want = sum(
        x[t, :, c, i, j].sum().item() * full[c, u, v].item()
        for t in (0, 1) for c in range(4) for i in range(7) for j in range(6) for u in range(3) for v in range(3)
        if 0 <= i + 1 - u < 7 and 0 <= j + 1 - v < 6
    ) + x[2].sum().item() * 6  # fmt: skip
    assert counted["operations"]["ac"] == pytest.approx(want / 5)
    assert counted["operations"]["dense"] == 7 * 6 * 4 * 6 * (2 * 9 + 1)
    assert counted["synapses"]["layer"]["once"] == counted["operations"]["dense"] / 3
    assert counted["synapses"]["layer"]["weights"] == sum(p.numel() for p in (early.weight, late.weight, early.bias))


class Timed(nn.Module):
    """A layer of frames, and its mean over space as logits."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).mean((-2, -1))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv3d(4, 6, 2, dilation=2, padding="same"),
        nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)),
        nn.ConvTranspose3d(4, 6, 2, stride=2),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode="reflect", stride=2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate", groups=2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("pruned", [False, True])
def test_every_convolution_counts_what_each_input_reaches(layer, pruned):
    torch.manual_seed(0)
    layer.bias = None
    layer.weight.data.fill_(1.0)
    if pruned:
        layer.weight.data *= torch.rand(layer.weight.shape) < 0.5
    x = (torch.rand(5, 4, *[6, 5, 4][: len(layer.kernel_size)]) < 0.4).float().requires_grad_()
    reach = torch.autograd.grad(layer(x).sum(), x)[0]
    counted = activity(nn.Sequential(layer, nn.Flatten(1)), [{"x": x.detach(), "y": torch.zeros(5)}])
    assert counted["operations"]["ac"] == (x * reach).sum().item() / 5 and counted["uncounted"] == []
    places, each = (x, 6) if layer.transposed else (layer(x), 4)
    assert counted["operations"]["dense"] == places.numel() // 5 * each // layer.groups * layer.weight[0, 0].numel()


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 1, groups=2), nn.Linear(4, 6)])
def test_weights_of_zero_are_skipped(layer):
    torch.manual_seed(0)
    x = (torch.rand(5, 4) < 0.5).float()
    layer.weight.data *= torch.rand(layer.weight.shape) < 0.5
    count = 0
    for sample in x.tolist():
        for o, weights in enumerate(layer.weight.flatten(1).tolist()):
            first = 2 * (o // 3) if isinstance(layer, nn.Conv2d) else 0
            count += sum(sample[first + i] != 0 and w != 0 for i, w in enumerate(weights))
    x = x[..., None, None] if isinstance(layer, nn.Conv2d) else x
    measured = activity(nn.Sequential(layer, nn.Flatten(1)), [{"x": x}])
    assert measured["operations"]["ac"] == pytest.approx(count / 5)


def test_rates_by_layer_and_over_all():
    torch.manual_seed(0)
    model, x = small(classes=3, widths=(4, 6), steps=5), torch.rand(7, 1, 8, 8)
    spikes = infer(model, x, taps=["stem.neuron", "stage2.1.neuron"]).taps
    counted = activity(model, [{"x": x[:4]}, {"x": x[4:]}])
    assert counted["samples"] == 7
    for name, s in spikes.items():
        layer = counted["layers"][name]
        assert layer["rate"] == pytest.approx(s.mean().item()) and layer["neurons"] == s[0, 0].numel()
    total = sum(s.sum().item() for s in spikes.values()) / sum(s.numel() for s in spikes.values())
    assert counted["rate"] == pytest.approx(total)


def test_a_static_image_is_convolved_once_and_samples_are_limited():
    model, x = small(classes=3, widths=(4, 6), steps=5), torch.rand(7, 1, 8, 8)
    one, five = (activity(model, [{"x": x}], steps)["operations"] for steps in (1, 5))
    stem = 7 * 4 * (8 * 8 * 9 - 2 * (3 * 8 * 2) + 4) / 7
    assert one["mac"] <= five["mac"] and stem <= one["mac"] <= stem + 5 * 6 * 3
    assert activity(model, [{"x": x}] * 3, samples=10)["samples"] == 10


def test_frames_over_time_are_counted_by_sample():
    """[T, B, ...] with T > B: the samples are B, and only as many as asked are run."""
    torch.manual_seed(0)
    model = small(classes=3, channels=2, widths=(4, 6))
    x, y = torch.rand(5, 3, 2, 8, 8), torch.zeros(3, dtype=torch.int64)
    whole = activity(model, [{"x": x, "y": y}])
    assert whole["samples"] == 3 and whole["steps"] == 5
    assert whole["operations"]["dense"] == pytest.approx(5 * (64 * 9 * 2 * 4 + 16 * 9 * 4 * 6 + 6 * 3))
    some = activity(model, [{"x": x, "y": y}], samples=2)
    alone = activity(model, [{"x": x[:, :2], "y": y[:2]}])
    assert some == alone and some["samples"] == 2


class Pooled(nn.Module):
    """Spikes, averaged over 2x2 windows, into a linear layer: what hardware sees are the spikes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 1)
        self.neuron = LIF()
        self.linear = nn.Linear(12, 5)

    def forward(self, x):
        s = self.neuron(self.first(x)[None] * 9)
        self.spikes = s
        return self.linear(nn.functional.avg_pool2d(s[0], 2).flatten(1))


def test_averages_of_spikes_count_the_spikes_and_pixels_do_not():
    torch.manual_seed(0)
    model, x = Pooled(), (torch.rand(6, 1, 4, 4) * 255).round() / 255
    counted = activity(model, [{"x": x}])
    assert counted["synapses"]["first"]["kind"] == "mac" and counted["synapses"]["linear"]["averaged"] == 4
    assert counted["operations"]["ac"] == pytest.approx(model.spikes.sum().item() * 5 / 6)
    model, x = small(classes=3, widths=(4, 6), steps=3), torch.rand(7, 1, 8, 8)  # its head reads a mean over 4x4
    spikes = infer(model, x, taps=["stage2.1.neuron"]).taps["stage2.1.neuron"]
    head = activity(model, [{"x": x}])["synapses"]["head"]
    assert head["kind"] == "ac" and head["operations"] == pytest.approx(spikes.sum().item() * 3 / 7)


@pytest.mark.parametrize("pooled", [False, True])
def test_scaled_spikes_count_as_spikes_while_their_scale_stays(pooled):
    """hsd's layers give u S: u is folded into the weights behind them."""

    class Scaled(Pooled):
        def forward(self, x):
            self.spikes = self.neuron(self.first(x)[None] * 9)
            s = self.spikes[0] * self.scale
            s = nn.functional.avg_pool2d(s, 2) if pooled else s[..., ::2, ::2]
            return self.linear(s.flatten(1))

    torch.manual_seed(5)
    model, model.scale = (m := Scaled()), 0.37
    batches = [{"x": torch.rand(6, 1, 4, 4)} for _ in range(3)]
    spikes = []
    for batch in batches:
        model(batch["x"])
        spikes.append((model.spikes if pooled else model.spikes[..., ::2, ::2]).sum().item())
    counted = activity(model, batches)
    assert counted["synapses"]["linear"]["kind"] == "ac" and sum(spikes) > 0
    assert counted["operations"]["ac"] == pytest.approx(sum(spikes) * 5 / 18)
    scales = iter((0.37, 0.41, 0.55))

    def drifts(module, args):
        module.scale = next(scales)

    m.register_forward_pre_hook(drifts)
    assert activity(model, batches)["synapses"]["linear"]["kind"] == "mac"


@pytest.mark.parametrize("k", [2, 4, 9, 49, 64, 1024])
def test_what_spikes_were_averaged_over_is_found(k):
    counts = torch.randint(0, k + 1, (50, 20), generator=torch.Generator().manual_seed(k)).float()
    found = spikes_averaged(counts / k)
    assert found and k % found == 0 and torch.allclose((counts / k * found), (counts / k * found).round(), atol=1e-3)
    assert spikes_averaged(torch.rand(50, 20)) == 0 and spikes_averaged(counts / k - 1) == 0


def test_one_step_of_every_layer_is_what_the_ann_does():
    twin = activity(small(classes=3, widths=(4, 6), neuron="relu"), [{"x": torch.rand(2, 1, 8, 8)}])
    for steps in (1, 2, 5):
        student = activity(small(classes=3, widths=(4, 6), steps=steps), [{"x": torch.rand(2, 1, 8, 8)}])
        for name, layer in student["synapses"].items():
            assert layer["once"] == twin["synapses"][name]["dense"]
            assert layer["dense"] == layer["once"] * (1 if name == "stem.conv" else steps)


def test_products_of_attention_are_counted():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            q = (x > 0.5).float()
            return ((q @ q.mT) @ self.inner(x)).mean(1)

    model, x = Attention(), torch.rand(3, 5, 4)
    counted = activity(model, [{"x": x, "y": torch.zeros(3)}])
    q = (x > 0.5).float()
    pairs = sum(float(q[b, i, d] * q[b, j, d]) for b in range(3) for i in range(5) for j in range(5) for d in range(4))
    attention = q @ q.mT
    assert counted["synapses"]["products"]["operations"] == pytest.approx((pairs + attention.sum().item() * 4) / 3)
    assert counted["synapses"]["products"]["dense"] == 5 * 5 * 4 + 5 * 4 * 5


def test_attention_in_one_call_is_its_two_products():
    class Fused(nn.Module):
        def forward(self, x):
            q, k, v = x[..., :4], x[..., 4:8], x[..., 8:]
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2))

    counted = activity(Fused(), [{"x": torch.rand(3, 2, 5, 14), "y": torch.zeros(3)}])["synapses"]["products"]
    assert counted["kind"] == "mac"
    assert counted["operations"] == counted["dense"] == counted["once"] == 2 * (5 * 5 * 4 + 5 * 5 * 6)


def test_products_in_other_words_count_the_same():
    class Products(nn.Module):
        def __init__(self, way):
            super().__init__()
            self.way = way

        def forward(self, x):
            a, b = x[..., :4], (x[..., 4:] > 0.5).float().mT
            return self.way(a, b).mean(1)

    ways = [
        torch.matmul,
        torch.bmm,
        lambda a, b: torch.einsum("bij,bjk->bik", a, b),
        lambda a, b: torch.einsum("...ij,...jk->...ik", [a, b]),
        lambda a, b: torch.baddbmm(torch.zeros(3, 5, 5), a, b),
        lambda a, b: torch.baddbmm(torch.zeros(3, 5, 5), batch1=a, batch2=b),
    ]
    x = {"x": torch.rand(3, 5, 8), "y": torch.zeros(3)}
    one, *others = (activity(Products(way), [x])["synapses"]["products"] for way in ways)
    assert (
        one["kind"] == "ac" and one["dense"] == 5 * 4 * 5 and one["operations"] == (x["x"][..., 4:] > 0.5).sum() * 5 / 3
    )
    assert one["operand"] == 5 * 4
    assert all(other == one for other in others)


def test_attention_of_torch_is_counted():
    def measured(layer, *args, **how):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, x):
                out = self.layer(*(x for _ in args), **{k: x for k in how})
                return (out[0] if isinstance(out, tuple) else out).mean(1)

        return activity(Model(), [{"x": torch.rand(3, 5, 8), "y": torch.zeros(3)}])

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    dense = 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8
    for counted in (measured(attention, *"qkv"), measured(attention, query=0, value=0, key=0)):
        assert counted["uncounted"] == [] and [*counted["synapses"]] == ["layer"]
        of = counted["synapses"]["layer"]
        assert of["kind"] == "mac" and of["dense"] == of["operations"] == of["once"] == dense
        assert of["weights"] == sum(p.numel() for p in attention.parameters())
    counted = measured(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "x")
    assert counted["uncounted"] == [] and counted["operations"]["dense"] == dense + 2 * 5 * 8 * 16


def test_a_linear_layer_counts_however_its_weight_is_used():
    """BEiT and Swin call F.linear with the weight of a layer and a bias of their own."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.tied, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
            self.tied.weight = self.qkv.weight

        def forward(self, x):
            return self.head(F.linear(x, self.qkv.weight) + self.qkv(x) + self.tied(x))

    x = (torch.rand(5, 4) < 0.5).float()
    counted = activity(Model(), [{"x": x}] * 2)
    assert counted["uncounted"] == [] and counted["operations"]["dense"] == 3 * 4 * 6 + 6 * 3
    assert counted["operations"]["ac"] == 3 * 6 * x.sum().item() / 5


def test_weights_that_are_used_in_other_ways_are_named():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.place = nn.Parameter(torch.rand(6, 4)), nn.Parameter(torch.rand(1, 5, 4))
            self.norm, self.unused = nn.LayerNorm([5, 4]), nn.Bilinear(2, 2, 2)

        def forward(self, x):
            return F.linear(self.norm(x + self.place), self.weight)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.memory, self.head = Own(), nn.LSTM(6, 3, batch_first=True), nn.Linear(3, 2)
            self.words = nn.Embedding(9, 3)

        def forward(self, x):
            y = self.head(self.memory(self.own(x))[0] + self.words(torch.zeros(5, dtype=torch.int64)))
            return torch.einsum("bic,bjc,bkc->bc", y, y, y)

    counted = activity(Model(), [{"x": torch.rand(3, 5, 4), "y": torch.zeros(3)}])
    assert counted["uncounted"] == ["own", "memory", "einsum"] and [*counted["synapses"]] == ["head"]


def test_layers_that_run_step_by_step_are_once_one_step():
    class Steps(nn.Module):
        def __init__(self, together):
            super().__init__()
            self.conv, self.neuron, self.head, self.together = nn.Conv2d(2, 3, 3), LIF(), nn.Linear(3, 2), together

        def each(self, layer, x):
            if self.together:
                return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return torch.stack([layer(now) for now in x])

        def forward(self, x):
            s = self.neuron(self.each(self.conv, x))
            both = self.each(lambda s: s.flatten(2) @ s.flatten(2).mT, s)
            return self.each(self.head, both.mean(-1)) + self.each(self.head, both.mean(-2))

    torch.manual_seed(0)
    x = {"x": torch.rand(4, 5, 2, 7, 7), "y": torch.zeros(5)}
    torch.manual_seed(1)
    whole = activity(Steps(True), [x])
    torch.manual_seed(1)
    steps = activity(Steps(False), [x])
    assert whole == steps and whole["frames"] == whole["steps"] == 4
    assert steps["synapses"]["conv"]["once"] == 5 * 5 * 3 * 2 * 9 == steps["synapses"]["conv"]["dense"] / 4
    assert steps["synapses"]["products"]["operand"] == 3 * 25
    net = nn.Sequential(nn.Flatten(), nn.Linear(98, 6), nn.ReLU(), nn.Linear(6, 2))
    foreign = activity(Spiking(net, steps=3, mode="step", reset=lambda net: None), [{"x": x["x"][0], "y": x["y"]}])
    assert foreign["synapses"]["net.1"]["once"] == 98 * 6 and foreign["frames"] == 1


def test_neurons_that_run_twice_are_two_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron, self.head = LIF(), nn.Linear(9, 2)

        def forward(self, x):
            self.first = self.neuron(x * 3)
            self.second = self.neuron(F.avg_pool2d(self.first.flatten(0, 1), 2).unflatten(0, x.shape[:2]) * 3)
            return self.head(self.second.flatten(2))

    model, x = Twice(), torch.rand(4, 5, 1, 6, 6)
    halves = [{"x": x[:, rows], "y": torch.zeros(2)} for rows in (slice(2), slice(2, 4))]
    counted = activity(model, halves, neurons=True)
    model(x[:, :4])
    layers = counted["layers"]
    assert [*layers] == ["neuron", "neuron#2"] and [of["neurons"] for of in layers.values()] == [36, 9]
    for of, spikes in zip(layers.values(), (model.first, model.second)):
        assert of["rate"] == pytest.approx(spikes.mean().item())
        assert of["rates"] == pytest.approx(spikes.flatten(2).mean((0, 1)).tolist())
    total = model.first.sum() + model.second.sum()
    assert counted["rate"] == pytest.approx(total.item() / (model.first.numel() + model.second.numel()))


def test_neurons_behind_closed_gates_are_told():
    model = small(classes=3, widths=(4, 6), steps=2)
    mask = (torch.rand(6, 4, 4) < 0.5).float()
    spiking = model.stage2[1]
    spiking.neuron = Gated(spiking.neuron, Mask(mask))
    layers = activity(model, [{"x": torch.rand(3, 1, 8, 8)}])["layers"]
    assert layers["stage2.1.neuron"]["open"] == mask.sum() and layers["stage2.1.neuron"]["neurons"] == 96
    assert "open" not in layers["stem.neuron"]


class Pairs:
    """A map-style data set of frames of its number."""

    def __len__(self):
        return 23

    def __getitem__(self, i):
        return torch.full((2, 1, 8, 8), i / 23), i // 8


@pytest.mark.parametrize("kind", ["tensors", "array", "files", "frames"])
def test_a_split_that_is_sorted_is_measured_all_over(kind):
    x = torch.stack([Pairs()[i][0] for i in range(23)])
    split = Files(Pairs(), batch_size=4) if kind == "files" else Tensors(
        images=x.numpy() if kind == "array" else x, labels=torch.arange(23) // 8, batch_size=4
    )  # fmt: skip
    split = SomeFrames(split, (1,)) if kind == "frames" else split
    batches = [*spread(split, 6)]
    assert [len(b["y"]) for b in batches] == [4, 2]
    rows = torch.cat([b["index"] for b in batches])
    assert rows.tolist() == [0, 3, 7, 11, 15, 19] and torch.cat([b["y"] for b in batches]).tolist() == [
        0,
        0,
        0,
        1,
        1,
        2,
    ]
    seen = torch.cat([b["x"] for b in batches], 1)
    assert torch.equal(seen, x[rows].transpose(0, 1)[-len(seen) :]) and len(seen) == (1 if kind == "frames" else 2)
    model = small(classes=3, widths=(4, 6))
    every = [{"x": seen, "y": torch.zeros(6)}]
    assert activity(model, split, samples=6)["operations"] == pytest.approx(activity(model, every)["operations"])
    assert [b["index"].tolist() for b in spread(split, 23)] == [b["index"].tolist() for b in split]
    own = [*split]
    assert spread(own, 6) is own and activity(model, own, samples=6)["samples"] == 6


def test_a_training_split_of_encoded_images_is_spread_too():
    images, labels = np.random.default_rng(0).random((23, 1, 8, 8), np.float32), torch.zeros(23, dtype=torch.int64)
    how = dict(batch_size=8, shuffle=True, drop_last=True, augment=Encode(3, "bernoulli"))
    split = Tensors(images=images, labels=labels, **how)
    (batch,) = spread(split, 6)
    assert batch["x"].shape == (3, 6, 1, 8, 8) and sorted(batch["index"].tolist()) == [0, 3, 7, 11, 15, 19]


def test_plain_layers_agree_with_spikingjelly():
    """Binary inputs to plain layers; by hand where spikingjelly is not installed."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.Linear(20, 7, bias=False),
    ]
    inputs = [(torch.rand(2, *shape) < 0.3).float() for shape in ((3, 9, 9), (4, 6, 6), (20,))]
    images = [torch.rand_like(x) + 0.1 for x in inputs]
    by_hand = [
        operations_in_loops(layers[0], inputs[0]),
        operations_in_loops(layers[1], inputs[1]),
        inputs[2].sum().item() * 7,
    ]
    macs = [2 * 4 * 25 * 27, 2 * 6 * 16 * 2 * 9, 2 * 20 * 7]
    for layer, x, image, ac, mac in zip(layers, inputs, images, by_hand, macs):
        model = nn.Sequential(layer, nn.Flatten(1))
        spiking, dense = activity(model, [{"x": x}]), activity(model, [{"x": image}])
        assert spiking["operations"]["ac"] == pytest.approx(ac / 2) and spiking["operations"]["mac"] == 0
        assert dense["operations"]["dense"] == pytest.approx(mac / 2) and dense["operations"]["ac"] == 0
    counters = pytest.importorskip("spikingjelly.activation_based.op_counter", reason="spikingjelly is not installed")
    for layer, x, image, ac, mac in zip(layers, inputs, images, by_hand, macs):
        synops, counter = counters.SynOpCounter(), counters.MACCounter()
        with torch.no_grad(), counters.DispatchCounterMode([synops]):
            layer(x)
        with torch.no_grad(), counters.DispatchCounterMode([counter]):
            layer(image)
        assert synops.get_total() == pytest.approx(ac) and counter.get_total() == mac
