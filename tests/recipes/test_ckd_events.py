"""Events with and without images: one command, one table, the picture, and what is refused before training."""

import json
import re

import pytest

from spikedistill import cli
from spikedistill.recipes.ckd_events import Config, check
from tests.recipes.test_paired import small_sets as small_sets

MODELS = ["--student", "small(widths=(3, 4))", "--teacher", "small(widths=(4, 6), neuron=relu)"]
QUICK = ["--epochs", "1", "--batch", "8", "--steps", "3", "--precision", "32-true", "--no-progress"]


def start(*words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "ckd_events", *words])
    return stop.value.code


def test_table_picture_and_the_same_command_again(small_sets, tmp_path, capsys):
    out = tmp_path / "out"
    words = [*MODELS, *QUICK, "--seeds", "0,1", "--out", str(out)]
    assert not start(*words)
    printed = capsys.readouterr().out
    for text in ("ANN on images", "events alone", "static2dvs", "ckd", "over alone", "streams.svg"):
        assert text in printed, text
    configs = {p.parent.name: json.loads(p.read_text()) for p in out.glob("*/config.json")}
    rows = ("alone", "longer", "static2dvs", "ckd")
    assert set(configs) == {"teacher", *(f"{name}-{seed}" for name in rows for seed in (0, 1))}
    assert [configs[f"{name}-1"]["epochs"] for name in rows] == [1, 2, 1, 1]
    assert [configs[f"{name}-1"]["pair"] for name in rows] == [None, None, "fashion-mini", "fashion-mini"]
    same = ("student", "data", "lr", "seed", "steps", "batch")
    assert len({json.dumps([configs[f"{name}-1"][k] for k in same]) for name in rows}) == 1
    made = json.loads((out / "ckd_events.json").read_text())["rows"]
    alone, ckd = made[1], made[4]
    assert [r["name"] for r in made] == ["ANN on images", "events alone", "events alone, twice", "static2dvs", "ckd"]
    assert ckd["difference"]["mean"] == pytest.approx(ckd["accuracy"] - alone["accuracy"]) and "difference" not in alone
    shape = json.loads((out / "teacher" / "result.json").read_text())["shape"]
    assert shape == [3, 12, 12] and "over alone" in (out / "ckd_events.md").read_text()
    svg = (out / "streams.svg").read_text()
    assert svg.count("<image") == 3 * (1 + 2 * 3) and (out / "ckd_events.svg").exists()  # rgb, hybrid and events over T
    html = (out / "report.html").read_text()
    assert f"report: {out / 'report.html'}" in printed and "data:image/svg+xml;base64," in html
    shown = re.findall(r'<figure id="(\w+)">', html)
    assert shown == ["accuracies", "streams", "accuracy_by_step"]  # a single epoch is no curve
    for text in ("ckd-1", "over alone", f"{ckd['accuracy']:.2%}", "fashion-events", "torch"):
        assert text in html, text
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(out), "--figures", str(tmp_path / "f")])
    assert not stop.value.code and capsys.readouterr().out.strip() == str(out / "report.html")
    assert (tmp_path / "f" / "streams.svg").read_text() == svg
    weights = (out / "ckd-1" / "student.safetensors").stat().st_mtime_ns
    assert not start(*words) and (out / "ckd-1" / "student.safetensors").stat().st_mtime_ns == weights
    capsys.readouterr()
    assert start(*words, "--teacher-augment", "none") == 2
    assert "holds a run with other settings (augment: 'flip|shift(2)' there, 'none' now)" in capsys.readouterr().err


def test_common_classes_are_those_of_every_row(small_sets, tmp_path):
    make = small_sets["images"]
    small_sets["images"] = lambda name, **how: make(name, names=("dog", "cat", "wolf"), **how)
    out = tmp_path / "out"
    words = [*MODELS, *QUICK, "--teacher-epochs", "2", "--seeds", "0", "--no-control", "--out", str(out)]
    assert start(*words) == 2 and not (out / "teacher" / "metrics.jsonl").exists()
    assert not start(*words, "--pair-classes", "common")
    results = {p.parent.name: json.loads(p.read_text()) for p in out.glob("*/result.json")}
    assert {name: r["epochs"] for name, r in results.items()} == {
        "teacher": 2, "alone-0": 1, "static2dvs-0": 1, "ckd-0": 1,
    }  # fmt: skip
    assert {results[name]["test"]["samples"] for name in ("alone-0", "static2dvs-0", "ckd-0")} == {8}  # of 12, no fox


def test_mistakes(tmp_path, capsys):
    words = [
        "--ckd",
        "ckd(tua=2)",
        "--static2dvs",
        "bkd",
        "--seeds",
        "1,1",
        "--teacher",
        "smal",
        "--teacher-augment",
        "flipp",
    ]
    assert start("--data", "fashion-evnts", *words, "--out", str(tmp_path / "out")) == 2
    text = capsys.readouterr().err
    for expected in (
        "did you mean 'fashion-events'", "pair: which images are of the classes of fashion-evnts?", "did you mean 'tau'?",
        "static2dvs: 'bkd' will not do", "seeds: 1,1", "teacher: 'smal' is unknown", "teacher_augment: ",
    ):  # fmt: skip
        assert expected in text, expected
    assert not (tmp_path / "out").exists()
    assert "batch: '2'" in (start("--batch", "2"), capsys.readouterr().err)[1]
    for name, other in (("ckd", "ckdsnn"), ("static2dvs", "static2dvsx(align=1)"), ("ckd", "bkd + ckd"), ("ckd", "")):
        assert f"{name}: '{other}' will not do: write {name}(KEY=VALUE, ...)" in check(Config(**{name: other}))[1]
    good = [check(Config(ckd=text))[1] for text in ("ckd", "ckd (tau=3)", "ckd(tau=3) + joint_a_snn")]
    assert not [m for mistakes in good for m in mistakes if "will not do" in m]
    missing = check(Config(data="n-caltech101", root=str(tmp_path), pair="folder:nowhere"))[1]
    assert any("Caltech101" in m for m in missing) and any("pair: " in m and "nowhere" in m for m in missing)
