"""`spikedistill predict` through the command line: data, files, early exit, tables."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from spikedistill import cli, runs
from spikedistill.core.evaluate import evaluate
from spikedistill.data import load
from spikedistill.inference import whole
from spikedistill.models import build
from spikedistill.recipes import predict
from tests.export.wake import awake
from tests.recipes.test_distill import mistakes_of


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for c, name in enumerate(("left", "middle", "right")):
        (folder / name).mkdir()
        for i in range(20):
            image = rng.integers(0, 80, (12, 12), dtype=np.uint8)
            image[:, 4 * c : 4 * c + 4] += 150
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def student(pictures, tmp_path_factory):
    torch.manual_seed(0)
    out, data = tmp_path_factory.mktemp("run"), load(f"folder:{pictures}")
    model = build("small(widths=(3, 4))", classes=3, channels=1, steps=4, mean=data.mean, std=data.std)
    awake(model, next(iter(data.train))["x"])
    runs.save(model, out / "student.safetensors", classes=list(data.classes), shape=list(data.shape))
    runs.write_json(out / "config.json", {"data": f"folder:{pictures}", "root": None, "size": None})
    return out, model, data


def test_the_test_set_in_a_table(student, tmp_path, capsys):
    run, model, data = student
    out = tmp_path / "answers.csv"
    ok("predict", str(run), "--out", str(out))
    rows = list(csv.DictReader(out.open()))
    want = evaluate(model, data.test)
    assert len(rows) == want["samples"] and sum(r["right"] == "True" for r in rows) / len(rows) == want["accuracy"]
    assert all(0 < float(r["confidence"]) <= 1 and r["steps"] == "4" for r in rows)
    assert f"accuracy {want['accuracy']:.2%}" in capsys.readouterr().out
    text = mistakes_of(capsys, "predict", str(run), "--out", str(out))
    assert "exists; choose another --out, or --overwrite" in text
    ok("predict", str(run), "--out", str(out), "--steps", "2", "--overwrite")
    rows = list(csv.DictReader(out.open()))
    assert sum(r["right"] == "True" for r in rows) / len(rows) == want["by_step"][1] and rows[0]["steps"] == "2"


def test_early_exit_and_streams(student, tmp_path, capsys):
    run, _, _ = student
    files = [tmp_path / f"{name}.json" for name in "abc"]
    ok("predict", str(run), "--out", str(files[0]))
    ok("predict", str(run), "--stream", "--out", str(files[1]))
    a, b = (json.loads(f.read_text()) for f in files[:2])
    assert [r["label"] for r in a["answers"]] == [r["label"] for r in b["answers"]] and a["accuracy"] == b["accuracy"]
    limit = sorted(r["confidence"] for r in a["answers"])[0] * 0.99
    capsys.readouterr()
    ok("predict", str(run), "--confidence", str(limit), "--out", str(files[2]), "--samples", "5")
    c = json.loads(files[2].read_text())
    assert c["samples"] == 5 and c["mean_steps"] < 4
    assert all(r["confidence"] >= limit or r["steps"] == 4 for r in c["answers"])
    assert f"{c['mean_steps']:.2f} time steps on average" in capsys.readouterr().out


def test_files_are_read_as_the_training_images_were(student, pictures, tmp_path, capsys):
    run, model, data = student
    names = [str(pictures / "left" / "0.png"), str(pictures / "right" / "3.png")]
    out = tmp_path / "a.json"
    ok("predict", str(run), "--files", *names, "--out", str(out), "--batch", "1")
    answers = json.loads(out.read_text())["answers"]
    x = torch.stack([torch.from_numpy(np.array(Image.open(n)))[None] for n in names]).float() / 255
    want = model(x).mean(0).softmax(-1).max(-1)
    assert [a["label"] for a in answers] == [data.classes[i] for i in want.indices.tolist()]
    assert [a["confidence"] for a in answers] == pytest.approx(want.values.tolist(), abs=1e-5)
    assert [a["sample"] for a in answers] == names and "truth" not in answers[0]
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(tmp_path / "colour.png")
    ok("predict", str(run), "--files", str(tmp_path / "colour.png"))
    assert "colour.png: " in capsys.readouterr().out


def test_mistakes_are_all_said_at_once(student, tmp_path, capsys):
    run, _, _ = student
    words = ["predict", str(run), "--files", "gone.png", "--steps", "5", "--out", "a.txt", "--data", "fashion-mini"]
    text = mistakes_of(capsys, *words)
    for part in ("no file 'gone.png'", "give 1 to 4", "should end in .csv or .json", "not both"):
        assert part in text
    text = mistakes_of(capsys, "predict", str(run), "--data", "fashion-mini")
    assert "samples of [1, 28, 28] (channels, height, width), the student takes [1, 12, 12]" in text
    assert "it does not exist" in mistakes_of(capsys, "predict", str(tmp_path / "gone"))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert "cannot be read as an image" in mistakes_of(
        capsys, "predict", str(run), "--files", str(tmp_path / "bad.png")
    )


def copied(pictures, folder, change=lambda image: image, name=str):
    """The same pictures, changed, in folders of other names."""
    for file in pictures.glob("*/*.png"):
        target = folder / name(file.parent.name) / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        change(Image.open(file)).save(target)
    return f"folder:{folder}"


def test_other_pictures_are_brought_to_what_the_student_takes(student, pictures, tmp_path, capsys):
    run, _, _ = student
    larger = copied(pictures, tmp_path / "larger", lambda image: image.resize((36, 36)))
    ok("predict", str(run), "--data", larger)
    colour = copied(pictures, tmp_path / "colour", lambda image: image.convert("RGB").rotate(90))
    for command in (["predict"], ["export", "--to", "torch"]):
        text = mistakes_of(capsys, command[0], str(run), *command[1:], "--data", colour)
        assert "samples of [3, 12, 12]" in text and "the student takes [1, 12, 12]" in text
    other = copied(pictures, tmp_path / "other", name=str.upper)
    assert "are not those of the student" in mistakes_of(capsys, "predict", str(run), "--data", other)


def test_files_are_encoded_as_the_training_images_were(student, pictures, tmp_path, monkeypatch):
    run, _, _ = student
    encoded = tmp_path / "run"
    shutil.copytree(run, encoded)
    config = json.loads((run / "config.json").read_text())
    runs.write_json(encoded / "config.json", config | {"encode": "bernoulli", "steps": 3})
    seen = []
    monkeypatch.setattr(predict, "whole", lambda model, x, steps: seen.append(x) or whole(model, x, steps))
    ok("predict", str(encoded), "--files", str(pictures / "left" / "0.png"))
    assert seen[0].shape == (3, 1, 1, 12, 12) and set(seen[0].unique().tolist()) == {0.0, 1.0}


def test_a_network_of_another_library_answers_for_all_its_steps(pictures, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from spikedistill import models\nfrom spikedistill.models.foreign import Spiking\n"
        "def net(classes, channels, steps):\n"
        "    inner = models.build('small(widths=(3, 4), neuron=relu)', classes=classes, channels=channels)\n"
        "    return Spiking(inner, steps=steps, reset=lambda net: None)\n"
    )
    words = ["distill", "--data", f"folder:{pictures}", "--student", f"{tmp_path / 'mine.py'}:net", "--method", "ce"]
    out = str(tmp_path / "foreign")
    ok(*words, "--epochs", "1", "--precision", "32-true", "--no-progress", "--steps", "2", "--out", out)
    ok("predict", out, "--trust-code")
    for flag in (["--stream"], ["--confidence", "0.5"], ["--steps", "1"]):
        assert "another library's" in mistakes_of(capsys, "predict", out, "--trust-code", *flag)
    assert "neurons are another library's" in mistakes_of(capsys, "export", out, "--trust-code", "--to", "nir")


MINE = """
from torch import nn
from spikedistill.models.layers import Conv2d, sequence
from spikedistill.neurons import LIF

class Mine(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.conv, self.neuron, self.head = Conv2d(channels, 4, 3), LIF(v_th=0.1), nn.Linear(4, classes)
    def run(self, x, steps):
        return self.head(self.neuron(self.conv(x), len(x) if len(x) > 1 else steps).mean((-2, -1)))
    def forward(self, x, steps=None):
        return self.run(sequence(x), steps or 3)

class Bare(Mine):
    def forward(self, x):
        return self.run(sequence(x), 3)

class Rectified(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, 4, 3), nn.Linear(4, classes)
    def forward(self, x):
        return self.head(self.conv(x).relu().mean((-2, -1)))
"""


def test_a_student_of_yours_takes_the_steps_that_it_takes(pictures, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MINE)

    def trained(name):
        out = str(tmp_path / name)
        words = ["--data", f"folder:{pictures}", "--student", f"{tmp_path / 'mine.py'}:{name}", "--method", "ce"]
        ok("distill", *words, "--epochs", "1", "--precision", "32-true", "--no-progress", "--out", out)
        return out, json.loads((tmp_path / name / "result.json").read_text())["test"]

    for name in ("Mine", "Bare"):
        out, want = trained(name)
        found = predict.run(predict.Config(run=out, precision="32-true", trust_code=True))
        assert found["mean_steps"] == len(want["by_step"]) == 3 and found["accuracy"] == want["accuracy"]
    text = mistakes_of(capsys, "predict", out, "--trust-code", "--steps", "2")
    assert "the student takes 3, whatever it is asked" in text
    for flag in (["--stream"], ["--confidence", "0.5"]):
        assert "takes 3 time steps for a frame" in mistakes_of(capsys, "predict", out, "--trust-code", *flag)
    out, how = str(tmp_path / "Mine"), {"run": str(tmp_path / "Mine"), "precision": "32-true", "trust_code": True}
    assert predict.run(predict.Config(**how, steps=2))["mean_steps"] == 2
    assert predict.run(predict.Config(**how, confidence=1.0))["mean_steps"] == 3
    assert "trained with 3, give 1 to 3" in mistakes_of(capsys, "predict", out, "--trust-code", "--steps", "4")
    how["run"], _ = trained("Rectified")
    assert predict.run(predict.Config(**how, confidence=1.0))["mean_steps"] == 1


def test_an_ann_sees_an_image_once(pictures, tmp_path):
    data = load(f"folder:{pictures}")
    model = build("small(widths=(3, 4), neuron=relu)", classes=3, channels=1, steps=4)
    runs.save(model, tmp_path / "student.safetensors", classes=list(data.classes), shape=list(data.shape))
    how = {"run": str(tmp_path), "data": f"folder:{pictures}", "precision": "32-true"}
    whole, sure = (predict.run(predict.Config(**how, confidence=c)) for c in (None, 0.99))
    assert sure["mean_steps"] == 1 and sure["accuracy"] == whole["accuracy"]


def test_names_of_files_that_are_not_utf8_are_written_as_they_are(tmp_path):
    predict.write(tmp_path / "a.csv", [{"sample": "caf\udce9.png", "label": "\u732b"}], {})
    assert (tmp_path / "a.csv").read_bytes().splitlines()[1] == b"caf\xe9.png," + "\u732b".encode()


def test_a_student_of_events_reads_no_image_files(tmp_path, pictures, capsys):
    runs.save(build("small(widths=(3, 4))", classes=3, channels=2), tmp_path / "student.safetensors", shape=[2, 12, 12])
    text = mistakes_of(capsys, "predict", str(tmp_path), "--files", str(pictures / "left" / "0.png"))
    assert "samples of 2 channels, which no image file has" in text


def ok(*words):
    if words[0] == "predict":
        words = (*words, "--precision", "32-true")  # so that answers do not depend on the processor
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert not stop.value.code, words
