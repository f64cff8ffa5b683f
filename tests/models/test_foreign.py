"""Models of others in our clothes. timm itself is replaced by a module with its documented interface."""

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from spikedistill import models
from spikedistill.core.taps import TapError, call, infer, published
from spikedistill.models import Foreign, check, foreign
from spikedistill.spec import SpecError

build: Any = models.build
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Net(nn.Module):
    """As timm's: pretrained_cfg, feature_info, and a classifier that follows num_classes."""

    def __init__(self, num_classes=1000, in_chans=3, width=4):
        super().__init__()
        self.layer1 = nn.Conv2d(in_chans, width, 3, 2, 1)
        self.layer2 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.fc = nn.Linear(2 * width, num_classes)
        self.pretrained_cfg = {"input_size": (3, 24, 24), "mean": MEAN, "std": STD, "interpolation": "bicubic"}
        self.feature_info = [
            dict(num_chs=width, reduction=2, module="layer1"),
            dict(num_chs=2 * width, reduction=4, module="layer2"),
            dict(num_chs=99, reduction=8, module="gone"),
        ]
        self.seen = None

    def forward(self, x):
        self.seen = x
        return self.fc(self.layer2(self.layer1(x).relu()).mean((-2, -1)))


class Patches(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, width, 4, 4), nn.Identity()

    def forward(self, x):
        return self.norm(self.proj(x).flatten(2).mT)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.attn_drop = nn.Identity(), nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)  # of two heads: maps, to look at
        return self.proj((self.attn_drop((self.q_norm(q) @ k.mT).softmax(-1)) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """As timm's VisionTransformer, in its modules and shapes."""

    def __init__(self, num_classes=1000, width=8, depth=2, pool="token", distilled=False):
        super().__init__()
        self.patch_embed, self.pos_drop, self.patch_drop = Patches(width), nn.Dropout(0.1), nn.Identity()
        self.cls_token, self.norm_pre = nn.Parameter(torch.randn(1, 1, width)), nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        last, self.pool, self.num_prefix_tokens, self.num_features = nn.LayerNorm(width), pool, 1, width
        self.norm, self.fc_norm = (last, nn.Identity()) if pool == "token" else (nn.Identity(), last)
        self.head_drop, self.head = nn.Dropout(0.1), nn.Linear(width, num_classes)
        self.head_dist = nn.Linear(width, num_classes) if distilled else None
        self.pretrained_cfg = {"input_size": (3, 12, 12), "mean": MEAN, "std": STD}
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=width, reduction=4) for i in range(depth)]

    def get_classifier(self):
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def forward(self, x):
        x = self.patch_embed(x)
        x = self.patch_drop(self.pos_drop(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)))
        x = self.norm(self.blocks(self.norm_pre(x)))
        y = self.head_drop(self.fc_norm(x[:, 0] if self.pool == "token" else x[:, 1:].mean(1)))
        return self.head(y) if self.head_dist is None else (self.head(y) + self.head_dist(x[:, 1])) / 2


@pytest.fixture
def timm(monkeypatch):
    fake: Any = types.ModuleType("timm")
    made = []
    fake.__spec__ = importlib.machinery.ModuleSpec("timm", None)

    def create_model(model_name, pretrained=False, **kwargs):
        made.append((model_name, pretrained, kwargs))
        return ViT(**kwargs) if model_name.startswith("vit") else Net(**kwargs)

    fake.create_model, fake.made = create_model, made
    fake.is_model = lambda name: name.split(".")[0] in fake.list_models()
    fake.list_models = lambda: ["resnet18", "resnet34", "vit_tiny_patch16_224"]
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


def test_a_timm_model_brings_its_size_and_normalisation(timm):
    teacher: Any = foreign.timm("resnet18.a1_in1k", pretrained=True, classes=5)
    assert timm.made == [("resnet18.a1_in1k", True, {"num_classes": 5})]
    x = torch.rand(2, 3, 24, 24)
    assert teacher(x).shape == (2, 5)
    torch.testing.assert_close(
        teacher.net.seen, (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    )
    teacher(torch.rand(2, 3, 32, 20))
    assert teacher.net.seen.shape == (2, 3, 24, 24)
    assert teacher(x, steps=4).shape == (2, 5)


def test_own_settings_come_first(timm):
    teacher: Any = foreign.timm("resnet18", size=40, mean=(0.5,) * 3, std=(0.5,) * 3)
    teacher(torch.ones(1, 3, 8, 8))
    assert teacher.net.seen.shape[-2:] == (40, 40)
    torch.testing.assert_close(teacher.net.seen, torch.ones(1, 3, 40, 40))
    assert teacher(torch.rand(1, 3, 8, 8)).shape == (1, 1000)
    grey: Any = foreign.timm("resnet18", in_chans=1)  # no statistics of its own for one channel
    grey(x := torch.rand(1, 1, 24, 24))
    assert torch.equal(grey.net.seen, x)


def test_grey_images_are_repeated_and_others_refused(timm):
    teacher: Any = foreign.timm("resnet18", mean=(0, 0, 0), std=(1, 1, 1))
    x = torch.rand(2, 1, 24, 24)
    teacher(x)
    assert torch.equal(teacher.net.seen, x.expand(2, 3, 24, 24))
    with pytest.raises(ValueError, match="Net takes 3 channels, got 2"):
        teacher(torch.rand(2, 2, 24, 24))


def test_resizing_stays_in_range():
    x = (torch.rand(2, 1, 8, 8) > 0.5).float()
    net = foreign.module(nn.Identity(), size=19)
    assert net(x).min() >= 0 and net(x).max() <= 1
    assert net(x).shape == (2, 1, 19, 19)
    coarse, smooth = (foreign.module(nn.Identity(), size=3, antialias=a)(x) for a in (False, True))
    assert not torch.equal(coarse, smooth)


def test_taps_have_timms_names_under_net(timm):
    teacher: Any = foreign.timm("resnet18")
    assert teacher.dims == {"net.layer1": 4, "net.layer2": 8}
    out = call(teacher, torch.rand(2, 3, 24, 24), taps=[*teacher.dims])
    assert out.logits.shape == (1, 2, 1000)
    assert [tuple(t.shape) for t in out.taps.values()] == [(1, 2, 4, 12, 12), (1, 2, 8, 6, 6)]


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_transformer_of_timm_has_its_tokens_and_what_its_head_takes_as_taps(timm, pool):
    teacher: Any = build(f"timm:vit_tiny_patch16_224(pretrained=True, pool={pool})", classes=5).eval()
    assert [*teacher.dims.items()] == [("net.blocks.0", 8), ("net.blocks.1", 8), ("net.head.input", 8)]
    assert published(teacher, "", "teacher") == ("net.blocks.1", 8)
    assert published(teacher, "", "teacher", vector=True) == ("net.head.input", 8)
    out = call(teacher, torch.rand(2, 3, 12, 12), taps=[*teacher.dims, "net.norm"])
    tokens, vector = out.taps["net.norm"], out.taps["net.head.input"]
    assert out.taps["net.blocks.1"].shape == tokens.shape == (1, 2, 10, 8) and vector.shape == (1, 2, 8)
    want = tokens[:, :, 0] if pool == "token" else teacher.net.fc_norm(tokens[:, :, 1:].mean(2))
    assert torch.equal(vector, want) and torch.equal(teacher.net.head(vector), out.logits)


def test_of_two_heads_that_of_the_class_token_is_tapped(timm):
    teacher: Any = foreign.timm("vit_tiny_patch16_224", distilled=True)
    assert [*teacher.dims][-1] == "net.head.input"


def test_what_a_module_takes_is_a_tap():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.input, self.body, self.unseen = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Identity()
            self.dims = {"input": 4, "body": 6}

        def forward(self, x):
            return self.body(input=self.input(x)).mean((-2, -1))

    model, x = Named(), torch.rand(2, 3, 5, 5)
    assert torch.equal(call(model, x, taps=["input"]).taps["input"][0], model.input(x))
    assert torch.equal(call(model, x, taps=["input.input"]).taps["input.input"][0], x)
    assert published(model, "", "it", vector=True) == ("body", 6)
    for tap, what in {
        "body.input": "fired 0 times",
        "unseen.input": "fired 0 times",
        "bodi.input": "no tap",
        ".input": "no tap",
    }.items():
        with pytest.raises(TapError, match=what):
            call(model, x, taps=[tap])


def test_build_takes_the_classes_of_the_data_and_the_statistics_of_timm(timm):
    data = dict(classes=6, channels=1, steps=4, mean=(0.1,), std=(0.3,))
    teacher = build("timm:resnet18(pretrained=True, width=6, mean=(0.5, 0.5, 0.5), std=(1, 1, 1))", **data)
    assert timm.made[-1] == ("resnet18", True, {"num_classes": 6, "width": 6})
    assert teacher.normalize.mean.flatten().tolist() == [0.5] * 3
    again = build(teacher.spec["model"], **teacher.spec["settings"])
    assert timm.made[-1] == timm.made[-2]
    assert again.normalize.mean.flatten().tolist() == [0.5] * 3
    own = build("timm:resnet18", **data)
    assert own.spec == {"model": "timm:resnet18", "settings": {"classes": 6}}
    torch.testing.assert_close(own.normalize.mean.flatten(), torch.tensor(MEAN))


def test_mistakes_in_timm_models(timm):
    assert check("timm:resnet18(pretrained=True, drop_rate=0.1)") == []
    assert "timm:resnet18.size: 0 will not do" in check("timm:resnet18(size=0)")[0]
    with pytest.raises(SpecError, match=r"no model 'resnet81': did you mean 'resnet18'\?"):
        build("timm:resnet81")


def test_the_extra_is_named_where_timm_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'spikedistill[vision]'" in check("timm:resnet18")[0]
    with pytest.raises(SpecError, match="spikedistill\\[vision\\]"):
        foreign.timm("resnet18")


def test_a_module_of_yours():
    torch.manual_seed(0)
    net = Net(4)
    teacher = models.module(net, MEAN, STD, size=12, channels=3, dims={"layer2": 8})
    assert isinstance(teacher, Foreign)
    assert teacher(torch.rand(2, 1, 9, 9)).shape == (2, 4)
    assert teacher.dims == {"net.layer2": 8}
    plain = models.module(net)
    x = torch.rand(2, 3, 9, 9)
    assert torch.equal(plain(x), net(x))
    assert not hasattr(plain, "dims")
    assert models.module(models.MODELS["ann_resnet18"](width=4)).dims["net.stage1"] == 4
    with pytest.raises(SpecError, match="give both"):
        models.module(net, mean=MEAN)


def test_frames_are_seen_each_or_on_average():
    torch.manual_seed(0)
    net, x = Net(4), torch.rand(5, 2, 3, 9, 9)
    each = models.module(net, frames="each", dims={"layer2": 8})
    assert torch.allclose(each(x), torch.stack([net(frame) for frame in x]), atol=1e-6)
    assert call(each, x, taps=["net.layer2"]).taps["net.layer2"].shape == (5, 2, 8, 3, 3)
    mean = models.module(net, frames="mean", dims={"layer2": 8})
    assert torch.equal(mean(x), net(x.mean(0)))
    assert call(mean, x, taps=["net.layer2"]).taps["net.layer2"].shape == (1, 2, 8, 3, 3)
    assert torch.equal(each(x[0]), net(x[0]))
    with pytest.raises(ValueError, match="frames='each' or frames='mean'"):
        models.module(net)(x)


# taps of networks that publish none


class Yours(nn.Module):
    """Torch's own transformer layers on a map, and a map made of them again where there is something after them."""

    def __init__(self, depth=2, stem=None, after=None):
        super().__init__()
        self.stem, self.after = stem or nn.Conv2d(3, 8, 4, 4), after
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(depth))
        self.end = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5))

    def forward(self, x):
        x = self.stem(x)
        tokens = x.flatten(2).mT
        for layer in self.layers:
            tokens = layer(tokens)
        last = self.after(tokens.mT.unflatten(-1, x.shape[-2:])).flatten(2).mT if self.after else tokens
        return self.end(last.mean(1))


def stem():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 2, 2))


def wrapped(net, **how):
    return models.module(net, MEAN, STD, **how)


@pytest.mark.parametrize(
    ("net", "taps"),
    [
        (ViT(5), {"blocks.0": 8, "blocks.1": 8, "head.input": 8}),
        (ViT(5, pool="avg", depth=3), {"blocks.0": 8, "blocks.1": 8, "blocks.2": 8, "head.input": 8}),
        (ViT(8), {"blocks.0": 8, "blocks.1": 8, "head.input": 8}),  # as many classes as channels
        (ViT(5, depth=1), {"blocks": 8, "head.input": 8}),
        (Yours(), {"layers.0": 8, "layers.1": 8, "end.1.input": 8}),
        (Yours(1), {"layers.0": 8, "end.1.input": 8}),
        (Yours(2, stem()), {"layers.0": 8, "layers.1": 8, "end.1.input": 8}),
    ],
)  # fmt: skip
def test_of_a_transformer_its_blocks_and_what_its_last_layer_takes_are_measured(net, taps):
    x = torch.rand(3, 3, 12, 12)
    assert [*models.measure_dims(net, x).items()] == [*taps.items()]
    for model, batch in ((wrapped(net), x), (wrapped(net, frames="each"), x.expand(4, *x.shape))):
        assert [*models.measure_dims(model, batch).items()] == [(f"net.{tap}", width) for tap, width in taps.items()]
    out = infer(net, x, taps=[*taps])
    vector = out.taps[[*taps][-1]]
    assert vector.shape == (1, 3, 8)
    last = net.head if isinstance(net, ViT) else net.end[1]
    torch.testing.assert_close(last(vector), out.logits)


@pytest.mark.parametrize(
    ("net", "taps"),
    [
        (Yours(1, stem()), ["stem.0", "stem.1", "stem.2"]),  # attention pools what it sees
        (Yours(2, stem(), nn.Conv2d(8, 8, 2)), ["stem", "after"]),
        (nn.Sequential(*stem(), nn.Flatten(2), nn.Sequential(nn.Linear(9, 4)), nn.Flatten(), nn.Linear(32, 5)), ["0", "1", "2"]),
    ],
)  # fmt: skip
def test_of_a_convolutional_network_with_tokens_the_maps_are_measured(net, taps):
    x = torch.rand(2, 3, 12, 12)
    assert [*models.measure_dims(net, x).items()] == [(tap, 8) for tap in taps]
    assert [*models.measure_dims(nn.Sequential(net), x)] == [f"0.{tap}" for tap in taps]


def test_of_tokens_without_maps_the_shallowest_are_measured():
    net = nn.Sequential(
        nn.Flatten(2), nn.Linear(16, 8), *Yours().layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 5)
    )
    want = {"0": 16, "1": 8, "2": 8, "3": 8, "4": 1, "6.input": 3}
    assert [*models.measure_dims(net, torch.rand(2, 3, 4, 4)).items()] == [*want.items()]


# models of Hugging Face, built here and saved to a folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8, num_labels=5
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    text = '{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"height": 16, "width": 16}, "do_normalize": true}'
    (folder / "preprocessor_config.json").write_text(text)
    return folder, model


def test_a_hugging_face_model_brings_its_size_normalisation_and_weights(vit):
    folder, model = vit
    teacher = build(f"hf:{folder}(pretrained=True)").eval()
    x = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    want = model(pixel_values=(x - mean) / std).logits
    torch.testing.assert_close(teacher(x), want)
    assert teacher(torch.rand(2, 1, 28, 28)).shape == (2, 5) and teacher.size == (16, 16)
    half = build(f"hf:{folder}(pretrained=True, bf16=True)").eval()
    assert half(x).dtype == torch.float32 and not torch.equal(half(x), want)
    torch.testing.assert_close(half(x), want, atol=0.05, rtol=0.05)
    data = dict(classes=3, channels=1, steps=4, mean=(0.1,), std=(0.3,))
    head = build(f"hf:{folder}(pretrained=True)", **data)
    assert head(x).shape == (2, 3) and head.spec["settings"] == {"classes": 3}
    assert torch.equal(head.net.model.vit.embeddings.cls_token, model.vit.embeddings.cls_token)


def test_of_a_hugging_face_transformer_blocks_and_the_class_token_are_measured(vit):
    folder, model = vit
    teacher = build(f"hf:{folder}(pretrained=True)").eval()
    x = torch.rand(2, 3, 16, 16)
    *blocks, vector = models.measure_dims(teacher, x)
    assert len(blocks) == 2 and vector == "net.model.classifier.input"
    hidden = model.vit(pixel_values=teacher.prepare(x)).last_hidden_state
    torch.testing.assert_close(infer(teacher, x, taps=[vector]).taps[vector][0], hidden[:, 0])


def test_mistakes_in_hugging_face_models(vit, tmp_path, monkeypatch):
    assert "sise: no such setting; did you mean 'size'" in check(f"hf:{vit[0]}(sise=3)")[0]
    with pytest.raises(SpecError, match="no image classifier"):
        build(f"hf:{tmp_path}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "spikedistill[text]" in check("hf:a/b")[0]


def test_real_timm_models():
    real = pytest.importorskip("timm")
    try:
        teacher = foreign.timm("resnet18", classes=4, size=32, bf16=True)
    except SpecError:
        pytest.skip(f"timm {real.__version__} does not run here")
    x = torch.rand(2, 1, 28, 28)
    out = call(teacher.eval(), x, taps=["net.layer4"])
    assert out.logits.shape == (1, 2, 4) and out.logits.dtype == torch.float32
    assert out.taps["net.layer4"].shape == (1, 2, 512, 1, 1) and teacher.dims["net.layer4"] == 512
    torch.testing.assert_close(teacher.normalize.mean.flatten(), torch.tensor(MEAN))
    vit = foreign.timm("vit_tiny_patch16_224", classes=4, img_size=32, depth=2)
    assert [*vit.dims] == ["net.blocks.0", "net.blocks.1", "net.head.input"]
    assert models.measure_dims(vit, x) == vit.dims == {tap: 192 for tap in vit.dims}
    out = infer(vit, x, taps=["net.norm", "net.head.input"])
    assert torch.equal(out.taps["net.head.input"], out.taps["net.norm"][:, :, 0])


# spiking networks of others


class Leaky(nn.Module):
    """One step a call, as in snnTorch: a hidden state, and a tuple returned."""

    mem = None

    def reset_mem(self):
        self.mem = None

    def forward(self, x):
        self.mem = x if self.mem is None else 0.5 * self.mem + x
        spk = (self.mem > 0.3).float()
        self.mem = self.mem * (1 - spk)
        return spk, self.mem


class Steps(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.block = nn.ModuleDict({"conv": nn.Conv2d(1, 4, 3, padding=1), "lif": Leaky()})
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        spk, mem = self.block["lif"](self.block["conv"](x))
        return self.head(spk.mean((-2, -1))), mem


def test_a_network_of_single_steps_is_reset_run_and_tapped():
    torch.manual_seed(0)
    net, x = Steps(), torch.rand(2, 1, 6, 6)
    student = models.Spiking(net, 3, mode="step", mean=[0.5], std=[0.25])
    a = student(x)
    assert a.shape == (3, 2, 3) and torch.equal(a, student(x)) and student(x, steps=5).shape == (5, 2, 3)
    assert torch.equal(student(x, steps=5)[:3], a)
    net.block["lif"].reset_mem()
    want = torch.stack([net((x - 0.5) / 0.25)[0] for _ in range(3)])
    assert torch.equal(a, want)
    assert models.measure_dims(student, x) == {"taps.block.conv": 4, "taps.block.lif": 4}
    taps = call(student, x, taps=["taps.block.lif", "taps.head"]).taps
    assert taps["taps.block.lif"].shape == (3, 2, 4, 6, 6) and torch.equal(taps["taps.head"], a)
    taps["taps.head"].sum().backward()
    assert net.block["conv"].weight.grad is None and net.head.weight.grad is not None  # Leaky here has no surrogate
    assert (
        not student.state_dict().keys() - {f"net.{k}" for k in net.state_dict()} - {"normalize.mean", "normalize.std"}
    )


def test_a_network_of_sequences_is_reset_and_frames_pass_as_they_are():
    class Whole(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def reset(self):
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.head(x.flatten(2)) * self.calls

    student = models.Spiking(Whole(), 3, dims={"head": 3})
    x = torch.rand(5, 2, 1, 2, 2)
    assert student(x).shape == (5, 2, 3) and torch.equal(student(x), student(x)) and student.dims == {"net.head": 3}
    assert student(x[0]).shape == (3, 2, 3)
    asked = []
    models.Spiking(nn.Flatten(2), reset=asked.append)(x)
    assert len(asked) == 1
    with pytest.raises(SpecError, match="valid: sequence, step"):
        models.Spiking(Whole(), mode="steps")
