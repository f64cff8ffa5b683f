"""Student files: what is not ours, damaged or of another model is refused with a sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import spikedistill
from spikedistill import models, runs
from spikedistill.spec import SpecError


@pytest.fixture
def folder(tmp_path):
    model = models.build("small(widths=(3, 4), neuron=plif)", classes=5, steps=3, mean=[0.3], std=[0.2])
    runs.save(model, tmp_path / "student.safetensors", classes=list("abcde"))
    return tmp_path, model


def test_a_student_comes_back_in_evaluation_mode_with_the_same_logits(folder):
    path, model = folder
    x = torch.rand(2, 1, 8, 8)
    loaded = spikedistill.load(path)
    assert torch.equal(loaded(x), model.eval()(x)) and not loaded.training and loaded.steps == 3
    assert torch.equal(spikedistill.load(path / "student.safetensors")(x), model(x))


def test_a_module_of_your_own_is_filled(tmp_path):
    net, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    runs.save(net, tmp_path / "student.safetensors")
    with pytest.raises(SpecError, match="model of your own code"):
        spikedistill.load(tmp_path)
    assert torch.equal(spikedistill.load(tmp_path, other).weight, net.weight)
    with pytest.raises(SpecError, match=r"weight is \[2, 3\], the model has \[2, 4\]"):
        spikedistill.load(tmp_path, torch.nn.Linear(4, 2))
    with pytest.raises(SpecError, match=r"missing tensor 0\.bias.*unexpected tensor bias"):
        spikedistill.load(tmp_path, torch.nn.Sequential(torch.nn.Linear(3, 2)))


def test_files_that_are_not_ours(folder, tmp_path_factory):
    path, _ = folder
    other = tmp_path_factory.mktemp("other")
    good = (path / "student.safetensors").read_bytes()
    for content, words in {
        b"": "is not a student file",
        good[: len(good) // 2]: "is not a student file|is damaged",
        b"\x80\x04\x95pickled": "is not a student file",
        b"{}" * 100: "is not a student file",
    }.items():
        (other / "student.safetensors").write_bytes(content)
        with pytest.raises(SpecError, match=words):
            spikedistill.load(other)
    save_file({"a": torch.zeros(1)}, other / "student.safetensors")
    with pytest.raises(SpecError, match="was not written by spikedistill"):
        spikedistill.load(other)
    save_file({"a": torch.zeros(1)}, other / "student.safetensors", {"spikedistill": json.dumps({"format": 99})})
    with pytest.raises(SpecError, match="newer format"):
        spikedistill.load(other)
    with pytest.raises(SpecError, match="does not exist"):
        spikedistill.load(other / "nothing")
    shutil.rmtree(other)


def test_a_run_that_is_not_finished(tmp_path):
    runs.open_run(tmp_path / "run", {"a": 1})
    with pytest.raises(SpecError, match="the run is not finished"):
        spikedistill.load(tmp_path / "run")
    assert runs.open_run(tmp_path / "run", {"a": 1, "out": "elsewhere"}) is None
    with pytest.raises(SpecError, match="a: 1 there, 2 now"):
        runs.open_run(tmp_path / "run", {"a": 2})


def test_a_full_disk_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(SpecError, match="is full"):
        runs.open_run(tmp_path / "run", {})
