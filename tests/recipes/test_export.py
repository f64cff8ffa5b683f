"""`spikedistill export` through the command line, on a student of tiny images."""

from pathlib import Path

import nir
import pytest
import torch

from spikedistill import cli, runs, transforms
from spikedistill.data import load
from spikedistill.export import to_nir
from spikedistill.models import build
from tests.export.wake import awake
from tests.recipes.test_distill import mistakes_of
from tests.recipes.test_predict import ok, pictures, student  # fixtures

__all__ = ["pictures", "student"]


def untrained(pictures, run, neuron, *rewrites):
    torch.manual_seed(0)
    data = load(f"folder:{pictures}")
    text = f"small(widths=(3, 4), neuron={neuron})"
    model = build(text, classes=3, channels=1, steps=3, mean=data.mean, std=data.std)
    for rewrite in rewrites:
        transforms.apply(model, rewrite)
    awake(model, next(iter(data.train))["x"])
    run.mkdir()
    runs.save(model, run / "student.safetensors", classes=list(data.classes), shape=list(data.shape))
    runs.write_json(
        run / "config.json", {"data": f"folder:{pictures}", "batch": 16, "steps": 3, "precision": "32-true"}
    )
    return run


@pytest.fixture
def soft(pictures, tmp_path):
    return untrained(pictures, tmp_path / "soft", "lif(v_reset=None, decay_input=False)")


def test_what_if_means_in_nir_is_said(pictures, tmp_path, capsys):
    run = untrained(pictures, tmp_path / "if", "if(v_reset=0.2)")
    for how, said in (((), True), (("--if-as-lif", "--overwrite"), False)):
        ok("export", str(run), "--to", "nir", *how)
        assert ("IF adds its whole current at a step, whatever dt (r = 1)" in capsys.readouterr().out) == said


def test_neurons_that_start_elsewhere_are_refused_without_advice_that_fails(pictures, tmp_path, capsys):
    run = untrained(pictures, tmp_path / "hsd", "relu", "hsd_quantise", "hsd_convert")
    for how in ((), ("--retrain-for", "nir")):
        text = mistakes_of(capsys, "export", str(run), "--to", "nir", *how)
        assert "stem.neuron.neuron, stage2.1.neuron.neuron: its potential does not start where it resets to" in text
        assert "--retrain-for nir fine-tunes" not in text
    ok("export", str(run), "--to", "torch")


def test_a_nir_file_is_written_checked_and_not_overwritten(student, tmp_path, capsys):
    run, _, _ = student
    out = tmp_path / "s.nir"
    ok("export", str(run), "--to", "nir", "--out", str(out))
    text = capsys.readouterr().out
    for part in (
        "own reader: 6 samples",
        "100.0000% equal",
        "every spike equal: 6 of 6",
        "accuracy",
        "written and checked",
    ):
        assert part in text
    assert "fires at the threshold, NIR above it" in text and nir.read(out).nodes["stem.neuron"].tau.shape == (
        3,
        12,
        12,
    )
    before = out.read_bytes()
    assert "or --overwrite to lose it" in mistakes_of(capsys, "export", str(run), "--to", "nir", "--out", str(out))
    assert out.read_bytes() == before
    ok("export", str(run), "--to", "nir", "--out", str(out), "--overwrite", "--steps", "2")
    assert [p.name for p in tmp_path.iterdir()] == ["s.nir"]


def test_a_mismatch_fails_and_leaves_no_file(student, tmp_path, capsys, monkeypatch):
    run, _, _ = student
    graph = to_nir.graph

    def forgets_a_bias(*args):
        made = graph(*args)
        made.nodes["stage2.1.conv"].bias[:] = 0
        return made

    monkeypatch.setattr(to_nir, "graph", forgets_a_bias)
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(run), "--to", "nir", "--out", str(tmp_path / "s.nir")])
    assert stop.value.code == 1 and not list(tmp_path.iterdir())
    assert "does not compute what the student does: it begins in layer stage2.1.neuron" in capsys.readouterr().err


def test_a_soft_reset_is_told_and_retrained(soft, tmp_path, capsys):
    text = mistakes_of(capsys, "export", str(soft), "--to", "nir")
    assert (
        "2 of its layers reset softly (stem.neuron, stage2.1.neuron)" in text and "% of the spikes would change" in text
    )
    assert "0.00% of" not in text and not (soft / "student.nir").exists()
    before = (soft / "student.safetensors").read_bytes()
    out = tmp_path / "made.nir"
    ok("export", str(soft), "--to", "nir", "--retrain-for", "nir", "--epochs", "1", "--out", str(out))
    text = capsys.readouterr().out
    assert "fine-tuning a copy" in text and "written and checked" in text and out.exists()
    tuned = runs.load(f"{soft}-nir", fast=False)
    assert (
        tuned.stem.neuron.v_reset == 0.0 and tuned.stem.neuron.strict and tuned.stem.neuron.coefficients() == (0.5, 1.0)
    )
    assert (soft / "student.safetensors").read_bytes() == before
    again = ["export", str(soft), "--to", "nir", "--retrain-for", "nir", "--epochs", "1", "--overwrite"]
    ok(*again, "--out", str(out))  # the copy is there already
    copy = Path(f"{soft}-nir") / "student.safetensors"
    kept, changed = copy.read_bytes(), runs.load(soft, fast=False)
    changed.head.bias.data += 1  # as if it had been trained again
    about = runs.about(soft)
    runs.save(changed, soft / "student.safetensors", classes=about["classes"], shape=about["shape"])
    text = mistakes_of(capsys, *again, "--out", str(out))
    assert "teacher: this is not what the run in" in text and "choose another with --retrained, or delete it" in text
    assert copy.read_bytes() == kept
    ok(*again, "--out", str(out), "--retrained", str(tmp_path / "other"))


def test_what_nir_cannot_say_is_found_before_retraining(pictures, tmp_path, capsys):
    run = tmp_path / "pruned"
    words = ["distill", "--data", f"folder:{pictures}", "--student", "small(widths=(3, 4), neuron=lif(v_reset=None))"]
    words += ["--method", "ce", "--transform", "unstructured_pruning", "--epochs", "1", "--no-progress"]
    ok(*words, "--precision", "32-true", "--steps", "2", "--select", "last", "--out", str(run))
    text = mistakes_of(capsys, "export", str(run), "--to", "nir", "--retrain-for", "nir", "--epochs", "1")
    assert "NIR cannot say this student" in text and not (tmp_path / "pruned-nir").exists()


def test_mistakes(student, tmp_path, capsys):
    run, _, _ = student
    assert "it should be 'nir', 'onnx' or 'torch'" in mistakes_of(capsys, "export", str(run), "--to", "tflite")
    assert "to: " in mistakes_of(capsys, "export", str(run))
    text = mistakes_of(capsys, "export", str(run), "--to", "torch", "--retrain-for", "nir", "--out", "gone/a.pt2")
    assert "is for --to nir" in text and "no folder 'gone'" in text
    runs.save(build("small(widths=(3,), neuron=relu)"), tmp_path / "student.safetensors")
    assert "it is an ANN" in mistakes_of(capsys, "export", str(tmp_path), "--to", "torch")
    assert "is the name of a student file" in mistakes_of(
        capsys, "export", str(run), "--to", "nir", "--out", str(tmp_path / "new.safetensors")
    )
