"""The chain teacher, assistant, student: one command, one table, and what is refused before anything is trained."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from spikedistill import cli
from spikedistill.core.fit import Stage, Trainee
from spikedistill.methods import ce, distilling_spikes
from spikedistill.recipes.distilling_spikes import Config, run
from tests.methods.toy import spiking, toy_batch, toy_student, toy_teacher

MODELS = [
    "--teacher", "small(widths=(5, 8), head=spiking)", "--assistant", "small(widths=(4, 6), head=spiking)",
    "--student", "small(widths=(3, 4), head=spiking)",
]  # fmt: skip
QUICK = [
    "--epochs",
    "1",
    "--batch",
    "16",
    "--steps",
    "3",
    "--precision",
    "32-true",
    "--no-progress",
    "--augment",
    "none",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for c, name in enumerate(("left", "middle", "right")):
        (folder / name).mkdir()
        for i in range(20):
            image = rng.integers(0, 80, (12, 12), dtype=np.uint8)
            image[:, 4 * c : 4 * c + 4] += 150
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


def start(*words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "distilling_spikes", *words])
    return stop.value.code


def test_the_chain_its_table_and_the_same_command_again(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--data", pictures, *MODELS, *QUICK, "--seeds", "0,1", "--encode", "bernoulli", "--out", str(out)]
    assert not start(*words)
    printed = capsys.readouterr().out
    for text in ("no KD", "direct", "via assistant", "over direct", "silent for", f"report: {out / 'report.html'}"):
        assert text in printed, text
    folders = {p.parent.name: p for p in out.glob("*/result.json")}
    students = {f"stages{stages}-{seed}" for stages in range(3) for seed in range(2)}
    assert set(folders) == {"teacher", "assistant-0", "assistant-1", *students}
    configs = {name: json.loads((out / name / "config.json").read_text()) for name in folders}
    assert configs["stages0-1"]["method"] == ["ce(counts=True)"] and configs["stages0-1"]["teacher"] is None
    assert configs["stages1-1"]["teacher"] == configs["assistant-1"]["teacher"] == str(out / "teacher")
    assert configs["stages2-1"]["teacher"] == str(out / "assistant-1")
    same = ("student", "epochs", "lr", "seed", "steps", "encode")
    assert len({json.dumps([configs[f"stages{s}-1"][k] for k in same]) for s in range(3)}) == 1
    made = json.loads((out / "distilling_spikes.json").read_text())
    assert [r["name"] for r in made["rows"]][2:] == ["no KD", "direct", "via assistant"]
    none, direct, chain = made["rows"][2:]
    expected = [a - b for a, b in zip(chain["accuracies"], direct["accuracies"])]
    assert chain["over_direct"]["values"] == pytest.approx(expected) and "over_direct" not in direct
    assert direct["over_none"]["mean"] == pytest.approx(direct["accuracy"] - none["accuracy"])
    assert 0 <= made["teacher_silent"] <= 1 and len(none["accuracies"]) == 2
    assert len(json.loads(folders["stages2-0"].read_text())["test"]["by_step"]) == 3
    assert (out / "distilling_spikes.svg").exists() and "over none" in (out / "distilling_spikes.md").read_text()
    weights = (out / "stages2-1" / "student.safetensors").stat().st_mtime_ns
    assert not start(*words)
    assert (out / "stages2-1" / "student.safetensors").stat().st_mtime_ns == weights


def test_stages_are_chosen_and_heads_need_not_spike_with_potential(pictures, tmp_path):
    models = {"student": "small(widths=(3, 4))", "teacher": "small(widths=(4, 5))", "assistant": "small"}
    how = dict(data=pictures, epochs=1, batch=16, steps=2, precision="32-true", progress=False, seeds=[3])
    how |= dict(stages=[1], out=str(tmp_path / "out"), method="distilling_spikes(signal=potential)")
    rows = run(Config(**how, **models))
    assert [r["name"] for r in rows] == ["teacher", "direct"]
    assert {p.name for p in (tmp_path / "out").glob("*/")} == {"teacher", "stages1-3"}
    assert json.loads((tmp_path / "out" / "teacher" / "config.json").read_text())["method"] == ["ce"]


def distil(*words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["distill", *words])
    return stop.value.code


def test_teacher_and_student_of_different_T(pictures, tmp_path, capsys):
    quick = ["--data", pictures, "--epochs", "1", "--batch", "16", "--precision", "32-true", "--no-progress"]
    spiking, plain = MODELS[5], "small(widths=(3, 4))"
    assert not distil(
        *quick, "--student", spiking, "--method", "ce", "--steps", "5", "--out", str(tmp_path / "teacher")
    )
    ours = [*quick, "--teacher", str(tmp_path / "teacher"), "--method"]
    for steps in (2, 7):
        out = str(tmp_path / f"out{steps}")
        assert not distil(*ours, "distilling_spikes", "--student", spiking, "--steps", f"{steps}", "--out", out)
        potential = [*ours, "distilling_spikes(signal=potential)", "--student", plain, "--steps", f"{steps}"]
        assert not distil(*potential, "--out", out + "p")
        for folder in (out, out + "p"):
            result = json.loads((tmp_path / folder / "result.json").read_text())
            assert len(result["test"]["by_step"]) == steps and result["teacher_calls"] == 1
    capsys.readouterr()
    words = [
        *ours,
        "distilling_spikes(full=1.0)",
        "--student",
        spiking,
        "--steps",
        "2",
        "--out",
        str(tmp_path / "full"),
    ]
    assert distil(*words) == 2 and "the student has 2 time steps, the teacher 5" in capsys.readouterr().err
    words[words.index("distilling_spikes(full=1.0)")] = "distilling_spikes(signal=potential, full=1.0)"
    words[-1] += "p"
    assert distil(*words) == 2 and "distilling_spikes: full, sliding, per_window" in capsys.readouterr().err


def test_mistakes(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        "--data",
        "mnits",
        "--stages",
        "1,1",
        "--student",
        "smal",
        "--method",
        "kd",
        "--bath",
        "3",
        "--encode",
        "rate",
    ]
    assert start(*words, "--out", str(out)) == 2
    text = capsys.readouterr().err
    for expected in (
        "did you mean 'mnist'", "stages: 1,1: give each once", "student: 'smal' is unknown", "method: 'kd' will not do",
        "did you mean 'batch'", "encode: 'rate'",
    ):  # fmt: skip
        assert expected in text, expected
    assert start("--stages", "0,3") == 2 and "less than or equal to 2" in capsys.readouterr().err
    assert start("--method", "distilling_spikes(tua=2)") == 2 and "did you mean 'tau'?" in capsys.readouterr().err
    for method, says in (
        ("signal=potential, full=1", "full, sliding, per_window and task='mse' need signal='spikes'"),
        ("sliding=1, window=7", "window=7 is longer than the 6 time steps"),
        ("alpha=1, soft=0", "distilling_spikes.alpha: 1 takes the labels away"),
        ("full=1, task=mse", "task=mse will not do here: the rows without KD learn labels by cross-entropy"),
    ):  # fit no network, so none is trained first
        assert start("--method", f"distilling_spikes({method})", "--out", str(out)) == 2
        assert says in capsys.readouterr().err and not out.exists()
    plain = ["--data", pictures, *QUICK, "--out", str(out)]
    assert start(*plain, "--student", "small(widths=(3, 4))", "--teacher", "small(widths=(3, 4), neuron=relu)") == 2
    text = capsys.readouterr().err
    assert "student: the outputs of 'small(widths=(3, 4))' are not spikes: head=spiking" in text and "teacher: " in text
    assert "assistant: " not in text and not out.exists()
    voting = ["--student", "plif_net(size=12, width=2, hidden=4, neuron='plif(v_th=0.05)')", "--stages", "0,1"]
    assert start(*plain, *voting, *MODELS[:2]) == 2
    assert "are not spikes: head=spiking (plif_net: vote=1), or" in capsys.readouterr().err and not out.exists()
    for method in ("distilling_spikesman", "'distilling_spikes", "bkd + distilling_spikes"):
        assert start("--method", method) == 2
        assert f"method: '{method}' will not do: write distilling_spikes(" in capsys.readouterr().err


def test_labels_alone_are_the_task_of_the_method():
    """So that what differs between rows is distillation."""

    def value(build):
        torch.manual_seed(0)
        plan = spiking(build)(toy_student(), toy_teacher())
        return Trainee(Stage([], **vars(plan))).eval()(toy_batch(), 0.5)[0]

    counts = value(lambda s, t: ce(s, counts=True))
    assert torch.equal(counts, value(lambda s, t: distilling_spikes(s, t, alpha=0.0)))
    assert not torch.equal(counts, value(lambda s, t: ce(s)))
