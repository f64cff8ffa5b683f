"""Events with images of the same classes from the command line: what each network sees, and what does not go together."""

import json

import pytest
import torch

import spikedistill
from spikedistill import cli, data, models, runs
from spikedistill.data import DataError, Tensors, streams
from spikedistill.recipes import distill
from spikedistill.recipes.compare import compare
from spikedistill.report import page
from spikedistill.spec import SpecError
from tests.data.test_streams import NAMES, clip

TEACHER = "small(widths=(4, 6), neuron=relu)"
STUDENT = "small(widths=(3, 4))"
STEPS = 3


@pytest.fixture
def small_sets(monkeypatch):
    """`fashion-events` and `fashion-mini`, but of three classes, a few samples and 8x8 pixels."""

    def events(name, *, names=NAMES, steps=None, batch_size=8, **how):
        clips = [(clip(i % 3)[:, :, :, :8] * (1 + i % 2), i % 3) for i in range(48)]
        return data.from_events(clips, clips[:12], names, (8, 8), steps=steps, batch_size=batch_size, name=name)

    def images(name, *, names=NAMES, batch_size=8, valid=0.1, augment="none", **how):
        x, y = torch.zeros(60, 3, 12, 12, dtype=torch.uint8), torch.arange(60) % 3
        x[:, 0] = (80 * y).view(-1, 1, 1)
        return data.from_tensors(x, y, x[:9], y[:9], classes=names, valid=valid, name=name, augment="none", batch_size=batch_size)

    made = {"events": events, "images": images}
    monkeypatch.setattr(data.simulate, "fashion_events", lambda **how: made["events"]("fashion-events", **how))
    monkeypatch.setattr(data.images, "idx", lambda name, *a, **how: made["images"](name, **how))
    return made


def cli_ok(*words):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert not stop.value.code, words


def mistakes_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


QUICK = ["--epochs", "1", "--batch", "8", "--precision", "32-true", "--no-progress", "--steps", str(STEPS)]
PAIR = ["--data", "fashion-events", "--pair", "fashion-mini"]


def run(out, *words):
    words = words if "--student" in words else ("--student", STUDENT, *words)
    cli_ok("distill", "--out", str(out), *QUICK, *words)
    return json.loads((out / "result.json").read_text())


@pytest.fixture
def teacher(small_sets, tmp_path):
    run(tmp_path / "teacher", "--data", "fashion-mini", "--student", TEACHER, "--method", "ce")
    return str(tmp_path / "teacher")


def test_ckd_and_static2dvs(teacher, tmp_path):
    result = run(tmp_path / "ckd", *PAIR, "--method", "ckd", "--teacher", teacher)
    assert result["test"]["samples"] == 12 and len(result["test"]["by_step"]) == STEPS
    assert result["teacher_calls"] == pytest.approx(3 / 5)  # 5 batches, of which it is on for progress < 0.58
    assert runs.load(tmp_path / "ckd").stem.conv.in_channels == 2
    assert runs.load(teacher).stem.conv.in_channels == 3
    alone = run(tmp_path / "static", *PAIR, "--method", "static2dvs")
    assert alone["parameters"]["teacher"] == 0 and alone["parameters"]["training_only"] > 0
    html = page.write(tmp_path / "ckd").read_text()
    assert "Not shown" not in html
