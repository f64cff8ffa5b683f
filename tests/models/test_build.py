"""Models from text: what is built, what is remembered, and what is said of a mistake."""

import json
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import nn

from spikedistill import models
from spikedistill.models import MODELS, check, measure_dims
from spikedistill.spec import SpecError

build: Any = models.build  # its modules have attributes that nn.Module does not declare

NETS = '''
"""Nets of a user."""
from torch import nn
import helper

def net(classes, width=4, channels=1):
    return helper.Net(channels, width, classes)

def bare():
    return nn.Flatten()

def anything(**kw):
    model = nn.Flatten()
    model.kw = kw
    return model

def wrong():
    return 3

def needs(secret):
    return nn.Flatten()

alias = net
'''
HELPER = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, channels, width, classes):
        super().__init__(nn.Conv2d(channels, width, 3), nn.ReLU(), nn.Conv2d(width, 2 * width, 3),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes))
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "helper.py").write_text(HELPER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *sys.path])
    yield tmp_path
    sys.modules.pop("helper", None)


IMAGE = dict(classes=7, channels=2, steps=3, mean=(0.5, 0.5), std=(0.2, 0.2))
SMALL_ONES = {
    "small": "small(widths=(4, 8))",
    "vggsnn": "vggsnn(size=16, widths=((4,), (4,), (4,), (4,)))",
    "plif_net": "plif_net(size=16, width=4, hidden=8)",
    "resnet19": "resnet19(width=4, stem_width=4)",
    "spikformer": "spikformer(dim=16, heads=2, depth=1)",
    "spike_driven": "spike_driven(dim=16, depth=1)",
    "qkformer": "qkformer(dim=16, heads=2)",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_spec_is_plain_data_that_builds_the_same_again(name):
    text = SMALL_ONES.get(name, f"{name}(width=4)")
    model = build(text, **IMAGE)
    spec = json.loads(json.dumps(model.spec))
    assert spec["model"] == name
    again = build(spec["model"], **spec["settings"])
    assert again.spec == model.spec
    again.load_state_dict(model.state_dict())
    x = torch.rand(2, 2, 16, 16)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert again(x).shape[1:] == (2, 7)
    assert again.steps == 3


@pytest.mark.parametrize("name", MODELS)
def test_every_builder_checks_its_settings_and_says_what_they_are(name):
    builder = MODELS[name]
    assert builder.__name__ == name and builder.__doc__
    assert check(name) == []
    (mistake,) = check(f"{name}(clases=3)")
    assert mistake == f"{name}.clases: no such setting; did you mean 'classes'?"
    assert "greater than or equal to 1" in check(f"{name}(steps=0)")[0]
    documented = builder.__doc__
    own = [p for p in models.settings(builder) if p not in models.GIVEN]
    assert all(f"{p}:" in documented or f"{p}=" in documented for p in own)


def test_text_comes_before_what_the_data_say():
    model = build("sew_resnet18(width=4, classes=3, steps=2)", **IMAGE)
    assert model.spec["settings"]["classes"] == 3
    assert model(torch.rand(1, 2, 8, 8)).shape == (2, 1, 3)


def test_given_settings_beside_those_of_the_data_are_settings():
    assert build("sew_resnet18", width=4, neuron="relu").dims["stage1"] == 4
    with pytest.raises(SpecError, match=r"sew_resnet18.widht: no such setting; did you mean 'width'"):
        build("sew_resnet18", widht=4)
    with pytest.raises(SpecError, match="plain values"):
        build("sew_resnet18(width=4)", neuron=nn.ReLU)


def test_a_module_is_returned_as_it_is():
    net = nn.Linear(2, 2)
    assert build(net, **IMAGE) is net


def test_every_mistake_is_found_at_once():
    mistakes = check("sew_resnet18(widht=3, connect='ad', steps=0, neuron=lif(tua=2))")
    assert len(mistakes) == 4
    assert "did you mean 'width'" in mistakes[0]
    assert "'add', 'and' or 'iand'" in mistakes[1]
    assert any("neuron" in m and "tua" in m for m in mistakes)
    with pytest.raises(SpecError) as error:
        build("sew_resnet18(widht=3, connect='ad', steps=0, neuron=lif(tua=2))")
    assert error.value.mistakes == mistakes


@pytest.mark.parametrize("neuron", ["if", "if(v_th=0.5)", "relu", "lif(decay_input=false)"])
@pytest.mark.parametrize("text", ["vggsnn(size=8, widths=((2,), (2,))", "resnet19(width=2", "ms_resnet18(width=2"])
def test_every_neuron_goes_into_families_that_have_settings_of_their_own(text, neuron):
    torch.manual_seed(0)
    model = build(f"{text}, neuron={neuron})", **IMAGE)
    again = build(model.spec["model"], **model.spec["settings"])
    again.load_state_dict(model.state_dict())
    x = torch.rand(2, IMAGE["channels"], 8, 8)
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sew_resnet81", ["'sew_resnet81' is unknown", "did you mean 'sew_resnet18'", "timm:NAME", "file.py:function"]),
        ("sew_resnet18(32)", ["by name", "sew_resnet18(key=value)"]),
        ("sew_resnet18(width=", ["cannot read"]),
        ("sew_resnet18(width=4)(3)", ["cannot read"]),
        ("small(neuron=lfi)", ["small.neuron: neuron 'lfi' is unknown; did you mean 'lif'"]),
        ("sew_resnet18(neuron=lif(surrogate=tan(2)))", ["surrogate 'tan' is unknown; did you mean 'atan'"]),
        ("absent.py:net", ["'absent.py' cannot be read: No such file"]),
        ("nets.py:nett", ["'nets.py' has no function 'nett'", "did you mean 'net'", "net, bare, anything"]),
        ("nets.py", ["nets.py:NAME", "it has net, bare"]),
        ("nets.py:", ["nets.py:NAME"]),
        ("nets.py:net(widht=3)", ["nets.py:net.widht: no such setting; it takes classes, width, channels"]),
        ("nets.py:net(3)", ["by name"]),
        ("nets.py:net(width=", ["cannot read"]),
        ("broken.py:net", ["'broken.py' is not Python"]),
        ("timm:", ["names no model"]),
    ],
)
def test_mistakes_are_said_with_the_nearest_that_is_right(text, words, nets):
    (nets / "broken.py").write_text("def net(:\n")
    said = "\n".join(check(text))
    for word in words:
        assert word in said
    with pytest.raises(SpecError):
        build(text, **IMAGE)


def test_a_function_of_a_file_gets_what_it_takes(nets):
    model = build("nets.py:net(width=3)", **IMAGE)
    assert model(torch.rand(2, 2, 9, 9)).shape == (2, 7)
    assert model.spec == {"model": "nets.py:net", "settings": {"classes": 7, "channels": 2, "width": 3}}
    again = build(model.spec["model"], **model.spec["settings"])
    again.load_state_dict(model.state_dict())
    assert isinstance(build("./nets.py:bare", **IMAGE), nn.Flatten)
    assert isinstance(build(f"{nets}/nets.py:bare"), nn.Flatten)
    assert build("nets.py:alias", classes=2)(torch.rand(1, 1, 9, 9)).shape == (1, 2)
    assert set(build("nets.py:anything", **IMAGE).kw) == set(IMAGE)


def test_check_does_not_run_the_file(nets):
    (nets / "loud.py").write_text("raise RuntimeError('imported')\ndef net(): pass\n")
    assert check("loud.py:net") == []
    with pytest.raises(SpecError, match=r"'loud\.py' cannot be imported: RuntimeError: imported"):
        build("loud.py:net")


def test_functions_that_will_not_do(nets):
    with pytest.raises(SpecError, match=r"nets.py:wrong returned a int: it must return a torch.nn.Module"):
        build("nets.py:wrong")
    with pytest.raises(SpecError, match=r"nets.py:needs cannot be called .* 'secret'"):
        build("nets.py:needs", **IMAGE)


def test_models_of_files_can_be_copied(nets):
    model = build("nets.py:net", classes=2)
    assert pickle.loads(pickle.dumps(model)).spec == model.spec


def test_measured_dims(nets):
    x = torch.rand(2, 1, 9, 9)
    model = build("nets.py:net", classes=2)
    assert measure_dims(model, x) == {"0": 4, "1": 4, "2": 8}
    assert measure_dims(nn.Sequential(model), x) == {"0.0": 4, "0.1": 4, "0.2": 8}
    snn = build("sew_resnet18(width=4, channels=1)")
    snn.train()
    assert [*measure_dims(snn, x).items()][-4:] == [*snn.dims.items()]
    assert snn.training and all(m.training for m in snn.modules())
    assert measure_dims(nn.Sequential(nn.Flatten(), nn.Linear(81, 2)), x) == {}


def test_parameters_are_counted_once():
    layer = nn.Linear(3, 2)
    assert models.parameters(nn.Sequential(layer, layer)) == 8
