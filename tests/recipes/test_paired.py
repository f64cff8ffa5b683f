"""Events with images of the same classes from the command line: what each network sees, and what does not go together."""

import json
import re
from dataclasses import replace

import pytest
import torch

from spikedistill import cli, data, models, runs
from spikedistill.core.taps import infer
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
        return data.from_tensors(
            x, y, x[:9], y[:9], classes=names, valid=valid, name=name, augment="none", batch_size=batch_size
        )

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
def teacher(tmp_path):
    """As if it had been trained on the images."""
    (tmp_path / "teacher").mkdir()
    model = models.build(TEACHER, classes=3, channels=3)
    runs.save(model, tmp_path / "teacher" / "student.safetensors", classes=NAMES, shape=(3, 12, 12))
    return str(tmp_path / "teacher")


def test_ckd_and_static2dvs(teacher, small_sets, tmp_path):
    result = run(tmp_path / "ckd", *PAIR, "--method", "ckd", "--teacher", teacher)
    assert result["test"]["samples"] == 12 and len(result["test"]["by_step"]) == STEPS
    assert result["teacher_calls"] == pytest.approx(3 / 5)  # 5 batches, of which it is on for progress < 0.58
    assert runs.load(tmp_path / "ckd").stem.conv.in_channels == 2
    assert runs.load(teacher).stem.conv.in_channels == 3
    alone = run(tmp_path / "static", *PAIR, "--method", "static2dvs")
    assert alone["parameters"]["teacher"] == 0 and alone["parameters"]["training_only"] > 0
    html = page.write(tmp_path / "ckd").read_text()
    assert "Not shown" not in html
    drawn = re.search(r'<figure id="streams">(<svg.*?</svg>)', html, re.S).group(1)
    assert "var(--" not in drawn and "fill: #ffffff" in drawn  # black on white, on a dark page too
    assert 'id="streams"' in html and "Images and events" in html and 'id="disagreements"' not in html


def test_the_student_of_hsd_is_evaluated_on_the_frames_it_was_trained_on(small_sets, tmp_path):
    events = ["--data", "fashion-events", "--student", TEACHER]
    run(tmp_path / "ann", *events, "--method", "ce", "--transform", "hsd_quantise(levels=2)")
    result = run(
        tmp_path / "snn", *events, "--method", "hsd", "--teacher", str(tmp_path / "ann"), "--hsd.student_frames=(0, 2)"
    )
    assert len(result["test"]["by_step"]) == 2 and result["teacher_calls"] == 1
    assert runs.about(tmp_path / "snn")["frames"] == [0, 2] and "frames" not in runs.about(tmp_path / "ann")


def test_whoever_runs_the_student_of_hsd_later_shows_it_the_same_frames(small_sets, tmp_path, monkeypatch, capsys):
    """Frame 1 looks like another class: a student that is shown it, too, is led astray."""
    shown = torch.tensor([[4, 0], [0, 4], [4, 4]], dtype=torch.uint8)[:, :, None, None].expand(3, 2, 8, 8)

    def events(**how):
        clips = [(torch.stack([shown[i % 3], shown[(i + 1) % 3], shown[i % 3]]), i % 3) for i in range(48)]
        made = data.from_events(clips, clips[:12], NAMES, (8, 8), steps=STEPS, batch_size=how["batch_size"])
        return replace(made, name="fashion-events")

    monkeypatch.setattr(data.simulate, "fashion_events", events)
    quick = ["--epochs", "4", *QUICK[2:], "--lr", "0.03", "--data", "fashion-events"]
    cli_ok("distill", "--out", str(tmp_path / "ann"), *quick, "--student", TEACHER, "--method", "ce")
    learn = ["--method", "hsd(init=none)", "--teacher", str(tmp_path / "ann"), "--hsd.student_frames=(0, -1)"]
    cli_ok("distill", "--out", str(tmp_path / "snn"), *quick, "--student", STUDENT, *learn)
    result = json.loads((tmp_path / "snn" / "result.json").read_text())["test"]
    student, clips = runs.load(tmp_path / "snn"), data.load("fashion-events", batch_size=8).test
    x, y = (torch.cat([batch[k] for batch in clips], dim) for k, dim in (("x", 1), ("y", 0)))
    right, astray = ((infer(student, z).logits.mean(0).argmax(1) == y).float().mean() for z in (x[[0, 2]], x))
    assert right == pytest.approx(result["accuracy"]) and right != astray  # else this test shows nothing
    answers = tmp_path / "answers.json"
    for way in ((), ("--stream",)):
        cli_ok("predict", str(tmp_path / "snn"), "--out", str(answers), "--overwrite", *way)
        answered = json.loads(answers.read_text())
        assert answered["accuracy"] == pytest.approx(result["accuracy"]) and answered["mean_steps"] == 2
    assert "give 1 to 2" in mistakes_of(capsys, "predict", str(tmp_path / "snn"), "--steps", "3")
    seen = page.look(tmp_path / "snn", *(runs.read_json(tmp_path / "snn" / f"{n}.json") for n in ("config", "result")))
    assert seen["confusion"].diag().sum() / seen["confusion"].sum() == pytest.approx(result["accuracy"])
    assert len(seen["batch"]["x"]) == 2 and seen["activity"]["steps"] == 2
    assert "The student sees frames 0, 2 of a recording" in page.write(tmp_path / "snn").read_text()


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda x: x, None),
        (lambda x: x * 2 + 0.5, None),  # changes the frames, leaves their number
        (lambda x: x[:2], [0, 1]),
        (lambda x: x.flip(0), [2, 1, 0]),
        (lambda x: x[[-1]], [2]),
        (lambda x: (x[:2] + x[1:]) / 2, "2 frames of 3, which are none of them"),
    ],
)
def test_frames_left(small_sets, prepare, expected):
    events = data.load("fashion-events", steps=3)
    change = lambda batch, progress: batch | {"x": prepare(batch["x"])}  # noqa: E731
    if isinstance(expected, str):
        with pytest.raises(SpecError, match=expected):
            distill.frames_left(events, change, distill.two(events))
    else:
        assert distill.frames_left(events, change, distill.two(events)) == expected


def test_frames_that_a_recording_does_not_have(small_sets):
    events = data.load("fashion-events", steps=3)
    cut = data.at_frames(events, [2, 0])
    assert data.at_frames(events, None) is events and cut.train is events.train and cut.test.samples == 12
    whole, part = (next(iter(split))["x"] for split in (events.test, cut.test))
    assert torch.equal(part, whole[[2, 0]]) and len(cut.test) == len(events.test)
    for frames, says in (
        ([3], "sees frame 3 of a recording, but fashion-events has 3"),
        ([-1], "from 0 on"),
        ("01", "not by '01'"),
    ):
        with pytest.raises(data.DataError, match=says):
            data.at_frames(events, frames)


def test_rate_codes_are_the_same_for_teacher_and_student_and_in_every_evaluation(small_sets, tmp_path, capsys):
    first = run(tmp_path / "a", "--data", "fashion-mini", "--encode", "bernoulli", "--method", "ce")
    again = run(tmp_path / "b", "--data", "fashion-mini", "--encode", "bernoulli", "--method", "ce")
    assert first["test"] == again["test"] and len(first["test"]["by_step"]) == STEPS
    text = mistakes_of(capsys, "distill", "--data", "fashion-events", "--encode", "poisson", "--method", "ce")
    assert "fashion-events has frames of events already; encode is for images" in text


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["--data", "fashion-events", "--method", "ckd", "--teacher", "T"],
            "pair: ckd learns from events and from images",
        ),
        (["--data", "fashion-mini", "--method", "static2dvs"], "pair: static2dvs learns from events and from images"),
        (
            ["--data", "fashion-mini", "--pair", "fashion", "--method", "static2dvs"],
            "data: fashion-mini has images; a pair",
        ),
        (
            ["--data", "fashion-events", "--pair", "nmnist", "--method", "static2dvs"],
            "pair: nmnist has frames of events",
        ),
        (
            ["--data", "fashion-events", "--pair", "fashion-mimi", "--method", "static2dvs"],
            "did you mean 'fashion-mini'?",
        ),
        ([*PAIR, "--pair-classes", "some", "--method", "static2dvs"], "it should be 'all' or 'common'"),
        ([*PAIR, "--method", "ckd"], "teacher: ckd needs one"),
        ([*PAIR, "--method", "ckd,kd", "--teacher", "T"], "pass 'teacher' means two things"),
        ([*PAIR, "--method", "kd", "--teacher", "T"], "teacher: Small cannot take images of [2, 2, 8, 8]"),
    ],
)
def test_mistakes(teacher, small_sets, tmp_path, capsys, words, expected):
    words = [teacher if word == "T" else word for word in words]
    out = tmp_path / "out"
    assert expected in mistakes_of(capsys, "distill", *QUICK, "--student", STUDENT, "--out", str(out), *words)
    assert not (out / "metrics.jsonl").exists()


def test_classes_that_do_not_fit(teacher, small_sets, tmp_path, capsys):
    make, words = small_sets["images"], [*PAIR, "--method", "ckd", "--teacher", teacher, "--student", STUDENT, *QUICK]
    small_sets["images"] = lambda name, **how: make(name, names=("cat", "dog", "wolf"), **how)
    text = mistakes_of(capsys, "distill", *words, "--out", str(tmp_path / "a"))
    assert "classes in one modality only: only fashion-events has 'fox'; only fashion-mini has 'wolf'" in text
    assert "--pair-classes common" in text and not (tmp_path / "a" / "metrics.jsonl").exists()
    text = mistakes_of(capsys, "distill", *words, "--pair-classes", "common", "--out", str(tmp_path / "b"))
    assert "knows the classes 'cat', 'dog', 'fox', fashion-mini has 'cat', 'dog'; train it on these" in text
    small_sets["images"] = make
    events = small_sets["events"]
    small_sets["events"] = lambda name, **how: events(name, names=("cat", "fox", "dog"), **how)
    text = mistakes_of(capsys, "distill", *words, "--out", str(tmp_path / "c"))
    assert "the same classes in another order" in text


def test_python_with_data_that_are_not_paired_says_what_is_missing(small_sets, tmp_path):
    events = small_sets["events"]("events", steps=STEPS)
    with pytest.raises(SpecError, match=r"pair: static2dvs learns"):
        distill.distill(STUDENT, data="fashion-events", methods="static2dvs", out=str(tmp_path / "a"))
    how = dict(steps=STEPS, epochs=1, progress=False, out=str(tmp_path / "b"))
    with pytest.raises(SpecError, match=r"static2dvs: the batch has x, y, index and no 'source'.*data.Pairs"):
        distill.distill(STUDENT, data=events, methods="static2dvs", **how)
    own = data.paired(events, small_sets["images"]("images"))
    result = distill.distill(STUDENT, data=own, methods="static2dvs", **how | {"out": str(tmp_path / "c")})
    assert result["epochs"] == 1


def test_compare_trains_the_teacher_on_the_images(small_sets, tmp_path):
    how = dict(student=STUDENT, teacher=TEACHER, data="fashion-events", pair="fashion-mini", steps=STEPS, epochs=1)
    how |= dict(batch=8, precision="32-true", seeds=[0], jobs=0, progress=False, out=str(tmp_path / "out"))
    told = compare("tet; static2dvs; ckd", **how, dry_run=True)["runs"]
    assert [line["run"] for line in told] == ["teacher", "tet-0", "static2dvs-0", "ckd-0"]
    assert not (tmp_path / "out").exists()
    result = compare("tet; static2dvs; ckd", **how)
    assert [row["name"] for row in result["rows"]] == ["tet", "static2dvs", "ckd"]
    assert runs.load(tmp_path / "out" / "teacher").stem.conv.in_channels == 3
    assert result["teacher"]["accuracy"] is None and "was not tested on these data" in result["not_shown"][0]
    assert "was not tested on these data" in page.write(tmp_path / "out").read_text()
    with pytest.raises(SpecError, match="all classes of the images, not the common ones: give a run folder"):
        compare("ckd", **how | {"pair_classes": "common", "out": str(tmp_path / "other")})


def test_only_methods_of_two_modalities_read_images():
    assert {name: set(found) for name in distill.METHODS if (found := distill.streams(name))} == {
        "ckd": {"source", "rgb"},
        "static2dvs": {"source"},
    }
