"""Models of others in our clothes. timm itself is replaced by a module with its documented interface."""

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from spikedistill import models
from spikedistill.core.taps import call
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


@pytest.fixture
def timm(monkeypatch):
    fake: Any = types.ModuleType("timm")
    made = []
    fake.__spec__ = importlib.machinery.ModuleSpec("timm", None)

    def create_model(model_name, pretrained=False, **kwargs):
        made.append((model_name, pretrained, kwargs))
        return Net(**kwargs)

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
