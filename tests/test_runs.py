"""Student files: what is not ours, damaged or of another model is refused with a sentence."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import spikedistill
from spikedistill import models, runs
from spikedistill.spec import SpecError
from tests.export.wake import awake


@pytest.fixture
def folder(tmp_path):
    model = models.build("small(widths=(3, 4), neuron=plif)", classes=5, steps=3, mean=[0.3], std=[0.2])
    runs.save(model, tmp_path / "student.safetensors", classes=list("abcde"))
    return tmp_path, model


def test_a_student_comes_back_in_evaluation_mode_with_the_same_logits(folder):
    path, model = folder
    x = torch.rand(2, 1, 8, 8)
    loaded = spikedistill.load(path, fast=False)
    assert torch.equal(loaded(x), model.eval()(x)) and not loaded.training and loaded.steps == 3
    assert torch.equal(spikedistill.load(path / "student.safetensors", fast=False)(x), model(x))


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


def test_a_tensor_of_two_names_is_written_twice(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3))
    net.head, net.tied = net[0], torch.nn.Linear(3, 3)
    net.tied.weight = net[0].weight
    net.register_buffer("part", net[0].weight.detach()[0])
    runs.save(net, tmp_path / "student.safetensors")
    kept = load_file(tmp_path / "student.safetensors")
    assert set(kept) == set(net.state_dict()) and torch.equal(kept["part"], net[0].weight[0])
    assert torch.equal(spikedistill.load(tmp_path, net).tied.weight, kept["0.weight"])


def test_settings_given_as_tuples_are_the_same_settings(tmp_path):
    assert runs.open_run(tmp_path / "run", {"kdsnn": {"taps": ("a", "b")}}) is None
    assert runs.open_run(tmp_path / "run", {"kdsnn": {"taps": ("a", "b")}}) is None
    with pytest.raises(SpecError, match="other settings"):
        runs.open_run(tmp_path / "run", {"kdsnn": {"taps": ("a", "c")}})


def test_files_that_are_not_ours(folder, tmp_path_factory):
    path, _ = folder
    other = tmp_path_factory.mktemp("other")
    good = (path / "student.safetensors").read_bytes()
    for content, words in {
        b"": "is not a student file",
        good[: len(good) // 2]: "is not a student file|is damaged",
        b"\x80\x04\x95pickled": "is a pickle",
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


def test_where_data_and_teacher_lie_may_change_once_it_is_known_what_they_are(tmp_path):
    out, given = tmp_path / "run", {"root": "/a", "workers": 0, "teacher": "/a/teacher"}
    runs.open_run(out, given)
    assert runs.open_run(out, given | {"workers": 2, "download": True}) is None
    moved = {"root": "/b", "pair_root": "/b", "teacher": "/b/teacher"}
    with pytest.raises(SpecError, match=r"pair_root: None there.*root: '/a' there.*teacher: '/a/teacher' there"):
        runs.open_run(out, given | moved)
    runs.write_json(out / "origin.json", {"data": "0123", "teacher": "4567"})
    assert runs.open_run(out, given | moved) is None
    with pytest.raises(SpecError, match="teacher: '/a/teacher' there, None now"):
        runs.open_run(out, given | {"teacher": None})
    runs.write_json(out / "origin.json", {"data": "0123", "teacher": None})
    with pytest.raises(SpecError, match="teacher: '/a/teacher' there, '/b/teacher' now"):
        runs.open_run(out, given | moved)


def test_who_sees_a_config_sees_the_machine_too(tmp_path, monkeypatch):
    def fails(path, value):
        assert path.name != "config.json"
        write(path, value)

    write = runs.write_json
    monkeypatch.setattr(runs, "write_json", fails)
    with pytest.raises(AssertionError):
        runs.open_run(tmp_path, {"a": 1})
    monkeypatch.setattr(runs, "write_json", write)
    assert [p.name for p in tmp_path.iterdir()] == ["machine.json"]  # of a process killed there
    assert runs.open_run(tmp_path, {"a": 1}) is None
    assert {p.name for p in tmp_path.iterdir()} == {"machine.json", "config.json"}


def test_processes_that_write_one_file_do_not_meet(tmp_path, monkeypatch):
    names, replace = [], os.replace

    def replacing(source, target):
        names.append(source.name)
        if len(names) == 1:  # another machine, in the middle of it
            monkeypatch.setattr(runs.platform, "node", lambda: "another")
            runs.write_json(target, 2)
        replace(source, target)

    monkeypatch.setattr(runs.os, "replace", replacing)
    runs.write_json(tmp_path / "one.json", 1)
    assert len({*names}) == 2 and all(str(os.getpid()) in name for name in names)
    assert runs.read_json(tmp_path / "one.json") == 1 and len([*tmp_path.iterdir()]) == 1
    with pytest.raises(TypeError):
        runs.write_json(tmp_path / "two.json", object())
    assert len([*tmp_path.iterdir()]) == 1


def test_a_full_disk_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(SpecError, match="is full"):
        runs.open_run(tmp_path / "run", {})


def rewrite(path, change_tensors=lambda t: t, change_about=lambda a: a):
    """The same student file with other tensors, or another description."""
    file, info = path / "student.safetensors", runs.about(path)
    tensors, info = change_tensors(load_file(file)), change_about(info)
    save_file(tensors, file, {"spikedistill": json.dumps(info)})


@pytest.mark.parametrize(
    "tensors, words",
    [
        (lambda t: t | {"more": torch.zeros(1)}, "unexpected tensor more"),
        (lambda t: {k: v for k, v in t.items() if k != "head.bias"}, "missing tensor head.bias"),
        (lambda t: t | {"head.bias": torch.zeros(6)}, r"head.bias is \[6\], the model has \[5\]"),
        (lambda t: t | {"head.bias": torch.zeros(5).double()}, "head.bias is torch.float64"),
    ],
)
def test_other_tensors_are_refused(folder, tensors, words):
    rewrite(folder[0], tensors)
    with pytest.raises(SpecError, match=words):
        spikedistill.load(folder[0])


@pytest.mark.parametrize(
    "spec, words",
    [
        ({"model": "small"}, "does not say how to build"),
        ("small", "does not say how to build"),
        ({"model": "smal", "settings": {}}, "did you mean 'small'"),
        ({"model": "small", "settings": {"width": 3}}, "no such setting"),
        ({"model": "small", "settings": {"neuron": "lif(tau=__import__('os'))"}}, "does not describe a model"),
        ({"model": "evil.py:run", "settings": {}}, "is built by code, evil.py:run"),
        ({"model": "small", "settings": {"widths": [10**7, 10**7]}}, "does not fit its model"),  # and takes no memory
    ],
)
def test_a_file_that_describes_no_model_or_code_is_refused(folder, spec, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    rewrite(folder[0], change_about=lambda a: a | {"spec": spec})
    with pytest.raises(SpecError, match=words):
        spikedistill.load(folder[0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutilated_files_are_refused_or_load(folder, data):
    """Bytes cut off, changed or put in: a SpecError with a sentence, or a model with the right tensors. Nothing else."""
    good = GOOD.setdefault("bytes", (folder[0] / "student.safetensors").read_bytes())
    raw = bytearray(good)
    head = 8 + int.from_bytes(good[:8], "little")  # where the header ends and numbers begin
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(head + 16, len(raw) - 1)))
        kind = data.draw(st.sampled_from(("cut", "change", "insert", "drop")))
        if kind == "cut":
            raw = raw[: max(at, 1)]
        elif kind == "change":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            del raw[at : at + data.draw(st.integers(1, 8))]
        raw = raw or bytearray(b"x")
    (folder[0] / "student.safetensors").write_bytes(raw)
    try:
        loaded = spikedistill.load(folder[0], fast=False)
    except SpecError as error:
        assert "student.safetensors" in str(error)
    else:
        assert loaded.state_dict().keys() == folder[1].state_dict().keys()


GOOD: dict[str, bytes] = {}


def test_loaded_for_inference(folder, monkeypatch):
    path, model = folder
    awake(model, x := torch.rand(6, 1, 8, 8))
    for bf16 in (False, True):
        monkeypatch.setattr(runs, "bf16_is_fast", lambda bf16=bf16: bf16)
        for shape in (None, [1, 8, 8]):
            runs.save(model, path / "student.safetensors", shape=shape)
            loaded = spikedistill.load(path)
            assert any(isinstance(m, torch.nn.BatchNorm2d) for m in loaded.modules()) == (shape is None)
            assert loaded.head.weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
            assert not any(p.requires_grad for p in loaded.parameters()) and loaded.steps == 3
            near = dict(atol=0.2, rtol=0) if bf16 else dict(atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(loaded(x), model(x), **near)


@pytest.mark.parametrize("shape", [[3, 8, 8], [1, 2], [1, 8, 8, 8, 8, 8]])
def test_a_shape_that_is_not_the_models_is_refused(folder, shape):
    runs.save(folder[1], folder[0] / "student.safetensors", shape=shape)
    with pytest.raises(SpecError, match="does not run on the shape it names"):
        spikedistill.load(folder[0])


@pytest.mark.parametrize("shape", [[1, 60000, 60000], [0, 8, 8], "wide", [], [True, 8, 8]])
def test_a_shape_that_says_nothing_leaves_the_norms(folder, shape):
    runs.save(folder[1], folder[0] / "student.safetensors", shape=shape)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in spikedistill.load(folder[0]).modules())
