"""Distil from Python with data, models and parts of one's own, which have no name."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import spikedistill
from spikedistill import cli, data, models
from spikedistill.core.taps import infer
from spikedistill.models.small import small
from spikedistill.origin import fingerprint
from spikedistill.recipes.comparing.rows import is_trained_here
from spikedistill.recipes.distill import distill
from spikedistill.spec import SpecError
from tests.models import test_foreign

timm = test_foreign.timm  # a fixture


def test_python_with_own_tensors_module_and_function(tmp_path):
    x, y = torch.rand(48, 1, 8, 8), torch.arange(48) % 3
    x[torch.arange(48), 0, y] += 0.0
    own = data.from_tensors(x, y, x[:12], y[:12], valid=0.25, batch_size=12)

    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(1, 5, 3, padding=1)
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.features(x).relu().mean((-2, -1)))

    student = small(classes=3, widths=(4,), steps=3)
    before = student.head.weight.detach().clone()
    how = dict(out=str(tmp_path / "a"), epochs=2, progress=False, batch=12)
    result = distill(student, Teacher(), own, ["bkd", "kd"], bkd={"teacher_tap": "features"}, **how)
    assert not torch.equal(student.head.weight, before) and len(result["test"]["by_step"]) == 3
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def tiny(classes, channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, classes))\n"
    )
    how["out"] = str(tmp_path / "b")
    result = distill(f"{tmp_path / 'mine.py'}:tiny", Teacher(), own, "kd", **how)
    with pytest.raises(SpecError, match=r"built by code.*mine\.py:tiny.*trust_code=True"):
        spikedistill.load(tmp_path / "b")
    assert spikedistill.load(tmp_path / "b", trust_code=True)[1].out_features == 3


def test_the_readme_loop_one_level_down(tmp_path, monkeypatch):
    """The block as it stands there, on small things."""
    page = (Path(__file__).parents[2] / "README.md").read_text()
    block = next(part.split("```")[0] for part in page.split("```python\n") if "plan = merge(" in part)
    x, y = torch.rand(32, 1, 8, 8), torch.arange(32) % 2
    made = data.from_tensors(x, y, x, y, valid=0, batch_size=8)
    teacher = small(classes=2, widths=(4, 6), neuron="relu")
    monkeypatch.setattr(data, "load", lambda name, batch_size: made)
    monkeypatch.setattr(spikedistill, "load", lambda path, fast: teacher, raising=False)
    monkeypatch.setattr(models, "build", lambda name: small(classes=2, widths=(4, 6)))
    monkeypatch.chdir(tmp_path)
    names: dict = {"sd": spikedistill}
    exec(block.replace("epochs=8", "epochs=2"), names)
    assert len((tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()) == 2
    assert infer(names["student"], x).logits.shape == (4, 32, 2) and names["plan"].loss.keys() == {
        "ce",
        "bkd",
        "wsld",
        "kd",
    }


def test_frames_are_counted_by_their_second_axis(tmp_path):
    x = torch.rand(40, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = data.from_tensors(x, torch.arange(40) % 4, x[:10], torch.arange(10) % 4, batch_size=10)
    how = dict(student="small(widths=(3, 4))", methods="ce", epochs=1, batch=10, progress=False, steps=3)
    result = distill(data=frames, **how, out=str(tmp_path / "run"))
    assert result["test"]["samples"] == 10 and len(result["test"]["by_step"]) == 3


def test_settings_that_data_of_yours_could_not_take_are_mistakes(tmp_path):
    x, y = torch.rand(48, 1, 8, 8), torch.arange(48) % 3
    own = data.from_tensors(x, y, x[:12], y[:12], valid=0.25, batch_size=12)
    how = dict(student="small(widths=(3, 4))", methods="ce", progress=False, out=str(tmp_path / "run"))
    with pytest.raises(SpecError) as error:
        distill(data=own, augment="flip", valid=0.2, batch=8, **how)
    assert [line.split(":")[0] for line in error.value.mistakes] == ["augment", "valid", "batch"]
    assert "have batches of 12: make them with batch_size=8" in str(error.value) and not (tmp_path / "run").exists()
    distill(data=own, epochs=1, **how)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["batch"] == 12


def test_the_only_update_of_a_run_trains(tmp_path):
    x, y = torch.rand(24, 1, 8, 8), torch.arange(24) % 3
    own = data.from_tensors(x, y, x[:12], y[:12], valid=0, batch_size=24)
    student = small(classes=3, widths=(4,), steps=3)
    before = student.head.weight.detach().clone()
    distill(student, data=own, methods="ce", epochs=1, progress=False, out=str(tmp_path / "run"))
    assert not torch.equal(student.head.weight, before)


class Listed:
    """A data set that gives samples and labels alone."""

    def __init__(self, x, y, noise=0.0):
        self.x, self.targets, self.noise = x, y.tolist(), noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = self.x[i]
        return (x + self.noise * torch.rand_like(x)).clamp(0, 1), self.targets[i]


def test_other_samples_of_the_same_labels_are_noticed():
    x, y = torch.rand(40, 1, 4, 4), torch.arange(40) % 2

    def of(x, noise=0.0):
        return fingerprint(data.from_dataset(Listed(x, y, noise), Listed(x, y, noise), "ab", (1, 4, 4), valid=0.2))

    assert of(x) == of(x) != of(x * 0.9)
    assert of(x, 0.1) == of(x, 0.1) != of(x * 0.9, 0.1)  # drawn alike by a seed
    words = Listed(x, y)
    words.targets = ["a", "b"] * 20  # of which nothing has to be known
    words.__class__ = type("Words", (Listed,), {"__getitem__": lambda self, i: (self.x[i].bfloat16(), y[i])})
    assert fingerprint(data.from_dataset(words, words, "ab", (1, 4, 4), labels=y, valid=0)) != of(x)

    class Drawn(Listed):
        own = torch.Generator().manual_seed(0)

        def __getitem__(self, i):
            return torch.rand(1, 4, 4, generator=self.own), self.targets[i]

    drawn = [data.from_dataset(Drawn(x, y), Drawn(x, y), "ab", (1, 4, 4), valid=0.2) for y in (y, y, 1 - y)]
    assert fingerprint(drawn[0]) == fingerprint(drawn[1]) != fingerprint(drawn[2])  # drawn anew: labels alone
    pictures = [
        data.folders.Pictures([Path(__file__)], [0], (1, 4, 4)),
        data.folders.Pictures([Path(json.__file__)], [0], (1, 4, 4)),
    ]
    assert pictures[0].samples != pictures[1].samples


def own_teacher(x, y, **how):
    """A run on tensors with a teacher given as text; QUICK."""
    quick: dict = dict(epochs=1, precision="32-true", progress=False, student="small(widths=(3, 6))", methods="kd")
    return distill(data=data.from_tensors(x, y, x, y, valid=0.25, batch_size=12), **quick | how)


def test_a_teacher_of_a_library_has_trained_weights_and_its_own_last_layer(timm, tmp_path, monkeypatch):
    x, y = torch.rand(24, 3, 24, 24), torch.arange(24) % 3
    drawn = ("timm:resnet18", "timm:resnet18(pretrained=no)", "timm:resnet18(pretrained=True, classes=3)")
    for teacher in drawn:
        with pytest.raises(
            SpecError, match=r"without trained weights: write timm:resnet18\(pretrained=True\), or train"
        ):
            own_teacher(x, y, teacher=teacher, out=tmp_path / "run")
    with pytest.raises(SpecError, match=r"teacher: Foreign gives 1000 classes .* train it on them first"):
        own_teacher(x, y, teacher="timm:resnet18(pretrained=True)", out=tmp_path / "run")
    assert timm.made == [("resnet18", True, {})] and not (tmp_path / "run" / "config.json").exists()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: test_foreign.Net(num_classes=3))
    assert own_teacher(x, y, teacher="timm:resnet18(pretrained=True)", out=tmp_path / "run")["test"]["samples"] == 24


@pytest.mark.parametrize(
    "text, trained",
    [
        ("timm:resnet18(pretrained=True)", False),
        ("timm:resnet18(checkpoint_path='mine.pth')", False),
        ("timm:resnet18(pretrained=True, num_classes=3)", True),
        ("timm:resnet18", True),
    ],
)
def test_compare_trains_a_teacher_that_has_no_weights_and_no_other(timm, text, trained):
    assert is_trained_here(text) == trained
    assert is_trained_here("small(neuron=relu)") and not is_trained_here(None) and not is_trained_here("smal")


def test_what_the_teacher_knows_is_said_before_training(tmp_path, capsys):
    """One that was trained on images of another normalisation teaches chance, without a word of torch's."""
    x, y = torch.rand(48, 1, 8, 8), torch.arange(48) % 3
    x[torch.arange(48), 0, y] = 5.0

    class Knows(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            return self.scale * x[:, 0, :3].amax(2)

    results = [
        own_teacher(x / 5, y, teacher=Knows(scale), progress=True, out=tmp_path / f"{scale}") for scale in (9.0, -9.0)
    ]
    assert results[0]["teacher_accuracy"] == 1 and results[1]["teacher_accuracy"] == 0
    said = capsys.readouterr().err
    assert "teacher: 100.00% on validation\n" in said
    assert "teacher: 0.00% on validation, which is hardly more than chance: does it want another normalisation" in said
    assert own_teacher(x / 5, y, teacher=None, methods="ce", out=tmp_path / "ce")["teacher_accuracy"] is None


def test_the_time_steps_of_own_events_are_those_of_the_run(tmp_path):
    recorded = [(torch.randint(0, 3, (6, 2, 8, 8)), i % 3) for i in range(24)]
    own = data.from_events(recorded, recorded, ["a", "b", "c"], (8, 8), steps=6, valid=0.25, batch_size=12)
    how = dict(student="small(widths=(3, 6))", methods="ce", epochs=1, precision="32-true", progress=False)
    result = distill(data=own, out=tmp_path / "run", **how)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == len(result["test"]["by_step"]) == 6
    assert spikedistill.load(tmp_path / "run").steps == 6
    with pytest.raises(
        SpecError, match="steps: the data that are given have 6 frames a sample: make them with steps=5"
    ):
        distill(data=own, steps=5, out=tmp_path / "other", **how)


MINE = """
import torch

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass
from spikedistill.data import from_events
from spikedistill.objectives import CE


def recordings(batch_size, steps=5, valid=0.25, silent=False, root="mine"):
    assert root == "mine"
    torch.manual_seed(0)
    x = torch.randint(0, 3, (24, steps, 2, 8, 8)) * (not silent)
    both = [(frames, i % 3) for i, frames in enumerate(x)]
    return from_events(both, both, ["a", "b", "c"], (8, 8), steps=steps, valid=valid, batch_size=batch_size)


class Apart(torch.nn.Module):
    def forward(self, step):
        return -rate(step.student.logits).std()


def deep(student, teacher=None, *, weight):
    return Plan({"student": Pass(student, grad=True)}, {"ce": (weight * student.depth_of_mine, CE())})


def apart(student, teacher=None, *, weight: float = 0.5):
    return Plan({"student": Pass(student, grad=True)}, {"ce": (1.0, CE()), "apart": (weight, Apart())})
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


OWN = ["--student", "small(widths=(3, 6))", "--epochs", "1", "--batch", "8", "--steps", "5", "--no-progress"]


def test_data_of_a_function_are_trained_on_predicted_and_exported(mine, tmp_path, capsys):
    out, name = str(tmp_path / "run"), f"{mine}:recordings"
    assert answer("distill", "--data", name, "--method", "ce", "--out", out, *OWN) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["test"]["by_step"]) == 5 and result["test"]["samples"] == 24
    assert answer("predict", out) == 2 and answer("export", out, "--to", "torch") == 2
    assert capsys.readouterr().err.count("if you trust it, give --trust-code") == 2
    assert answer("predict", out, "--trust-code", "--out", str(tmp_path / "answers.json")) == 0
    assert json.loads((tmp_path / "answers.json").read_text())["accuracy"] == result["test"]["accuracy"]
    assert answer("predict", out, "--data", name) == 0
    page = (answer("report", out), (tmp_path / "run" / "report.html").read_text())[1]
    assert "made by the code" in page and "Confusion" not in page
    assert answer("report", out, "--trust-code") == 0 and "Confusion" in (tmp_path / "run" / "report.html").read_text()


def test_code_that_a_run_folder_names_is_not_run_unasked(mine, tmp_path, capsys):
    """Neither as its data nor as the images of a pair; who made the folder may have made the file."""
    out = tmp_path / "run"
    assert answer("distill", "--data", f"{mine}:recordings", "--method", "ce", "--out", str(out), *OWN) == 0
    (tmp_path / "evil.py").write_text("raise SystemError('it ran')\n\n\ndef images():\n    pass\n")
    settings = json.loads((out / "config.json").read_text())
    capsys.readouterr()
    for more in ({"pair": f"{tmp_path}/evil.py:images"}, {"data": f"{tmp_path}/evil.py:images"}):
        (out / "config.json").write_text(
            json.dumps(settings | {"data": "fashion-events", "pair_classes": "common"} | more)
        )
        assert answer("predict", str(out)) == answer("export", str(out), "--to", "torch") == 2
        assert capsys.readouterr().err.count(f"made by the code '{tmp_path}/evil.py:images'") == 2
        assert answer("report", str(out)) == 0 and "evil.py:images" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--data", "{}:recording"], "has no function 'recording': did you mean 'recordings'?"),
        (["--data", "{}:recordings(step=3)"], "recordings.step: no such setting; it takes batch_size, steps"),
        (["--data", "{}:recordings(batch_size=4)"], "makes batches of 4: let it take batch_size, or give --batch 4"),
        (["--data", "{}:recordings(steps=7)"], "gives 7 frames a sample: let it take steps, or give --steps 7"),
        (["--data", "{}:apart(student=1)"], "apart returned a Plan: it must return a Data"),
        (
            ["--method", "{}:deep(weight=1)"],
            "deep: AttributeError: 'Small' object has no attribute 'depth_of_mine' (line 25)",
        ),
        (["--method", "{}:apar"], "has no function 'apar': did you mean 'apart'?"),
        (["--method", "{}:apart(wait=1)"], "apart.wait: no such setting; it takes weight"),
        (["--method", "{}:apart(weight=much)"], "apart.weight: 'much' will not do"),
    ],
)
def test_mistakes_in_own_functions(mine, tmp_path, capsys, words, expected):
    flags = {"--data": f"{mine}:recordings", "--method": "ce"} | {words[0]: words[1].format(mine)}
    assert answer("distill", *(w for pair in flags.items() for w in pair), "--out", str(tmp_path / "run"), *OWN) == 2
    assert expected in capsys.readouterr().err


def test_a_method_of_a_function_is_compared_with_the_others(mine, tmp_path, capsys):
    rows = f"ce; {mine}:apart; strong = {mine}:apart(weight=2) + tet"
    words = ["compare", "--data", f"{mine}:recordings", "--method", rows, "--seeds", "0,1", *OWN]
    words += ["--out", str(tmp_path / "compare"), "--jobs", "0"]
    assert answer(*words) == 0
    made = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert [row["name"] for row in made["rows"]] == ["ce", "apart", "strong"]
    result = json.loads((tmp_path / "compare/runs/strong-1/result.json").read_text())
    assert result["loss"]["apart"] == 2 and "spread" in result["loss"]
    mine.write_text(MINE.replace(".std()", ".var()"))
    capsys.readouterr()
    assert answer(*words) == 2
    assert f"was made with another {mine}: --mixed accepts it" in capsys.readouterr().err
    assert answer(*words, "--mixed") == 0
    run = ["distill", "--config", str(tmp_path / "compare/runs/strong-1")]
    assert answer(*run) == 2 and f"{mine}: this is not what the run in" in capsys.readouterr().err


def answer(*words):
    """What a command ends with."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*words])
    return stop.value.code or 0
