"""Compare on tiny images: pairing, resuming, sharing the work, mistakes."""

import copy
import csv
import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import spikedistill
from spikedistill import cli
from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass
from spikedistill.functional import put
from spikedistill.methods import METHODS
from spikedistill.neurons import Neuron, ReLU
from spikedistill.objectives import CE
from spikedistill.optim import sparsity
from spikedistill.recipes import compare
from spikedistill.recipes.comparing import crew, tuning
from spikedistill.recipes.comparing.rows import Row
from spikedistill.recipes.distill import distill
from spikedistill.spec import SpecError

TEACHER, STUDENT = "small(widths=(4, 6), neuron=relu)", "small(widths=(3, 6))"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for c, name in enumerate(("left", "middle", "right")):
        (folder / name).mkdir()
        for i in range(12):
            image = rng.integers(0, 80, (12, 12), dtype=np.uint8)
            image[:, 4 * c : 4 * c + 4] += 150
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


@pytest.fixture
def how(pictures, tmp_path):
    """Settings of a comparison in this process, which takes a second or two."""
    common = dict(data=pictures, student=STUDENT, teacher=TEACHER, epochs=1, batch=12, steps=2, valid=0.25)
    return common | dict(precision="32-true", seeds=[0, 1], jobs=0, progress=False, out=str(tmp_path / "out"))


def mistakes(methods, how, **more):
    with pytest.raises(SpecError) as error:
        compare.compare(methods, **how | more)
    return str(error.value)


def test_rows_seeds_tables_and_the_same_command_again(how, tmp_path, capsys):
    methods = "ce; both = kd+bkd"
    result = compare.compare(methods, **how, bkd={"blur": 0.3}, row={"both": {"lr": 0.02}})
    out = tmp_path / "out"
    assert [row["name"] for row in result["rows"]] == ["ce", "both"] and result["baseline"] == "ce"
    ce, both = result["rows"]
    assert ce["seeds"] == both["seeds"] == [0, 1] and both["difference"]["seeds"] == [0, 1]
    assert (ce["teacher_calls"], both["teacher_calls"]) == (0, 1) and ce["training_only"] == 0 < both["training_only"]
    assert both["settings"]["lr"] == 0.02 and both["settings"]["bkd"] == {"blur": 0.3}
    config = json.loads((out / "runs" / "both-1" / "config.json").read_text())
    assert config["lr"] == 0.02 and config["seed"] == 1 and config["teacher"] == str(out / "teacher")
    assert json.loads((out / "runs" / "ce-0" / "config.json").read_text())["teacher"] is None
    assert "95% interval" in capsys.readouterr().out
    assert {p.name for p in out.glob("compare.*")} == {"compare.json", "compare.csv", "compare.md", "compare.tex"}
    lines = list(csv.DictReader((out / "compare.csv").open()))
    assert float(lines[1]["difference"]) == pytest.approx(both["difference"]["mean"])
    before = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/*")}
    again = compare.compare(methods, **how, bkd={"blur": 0.3}, row={"both": {"lr": 0.02}})
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("runs/*/*")}
    assert again["rows"] == result["rows"] and again["conclusions"] == result["conclusions"]
    wider = compare.compare(
        "ce; both = kd+bkd; tet", **how | {"seeds": [0, 1, 2]}, bkd={"blur": 0.3}, row={"both": {"lr": 0.02}}
    )
    assert wider["rows"][0]["accuracies"][:2] == ce["accuracies"] and len(wider["rows"]) == 3


def test_rewrites_for_all_rows_and_runs_of_another_precision(how, tmp_path):
    how |= {"transform": "tt_snn(rank=2)", "seeds": [0]}
    result = compare.compare("ce; kd", **how)
    assert all(row["trained"] < row["parameters"] for row in result["rows"]) and "32-true" not in str(result["notes"])
    file = tmp_path / "out" / "runs" / "kd-0" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"precision": "bf16-mixed"}))
    notes = compare.compare("ce; kd", **how)["notes"]
    assert "runs were made in 32-true on cpu and in bf16-mixed on cpu" in " ".join(notes)


def test_runs_of_a_seed_share_initialisation_order_and_augmentation(how, tmp_path):
    """With steps too small to be seen, whatever is left of training is the initialisation and the norms' statistics."""
    rows = ["ce", "kd", "bkd", "tet", "activity", "kdsnn", "joint_a_snn", "own = sakd(init='matching')"]
    how |= {"augment": "flip|shift(1)", "weight_decay": 0.0, "lr": 1e-30, "select": "last"}
    result = compare.compare(rows, **how)
    out = tmp_path / "out" / "runs"
    weights = {
        p.name: spikedistill.load(p, fast=False).state_dict() for p in out.glob("*-[01]") if "joint" not in p.name
    }
    for name, state in weights.items():
        ce = weights[f"ce-{name[-1]}"]
        same = all(torch.allclose(v.float(), ce[k].float(), rtol=0, atol=1e-5) for k, v in state.items())
        assert same == (not name.startswith("own")), name
    assert {row["name"]: row["rewritten"] for row in result["rows"] if row["rewritten"]} == {
        "joint_a_snn": "joint_a_snn"
    }
    assert "own starts from weights of its own" in " ".join(result["notes"])
    assert any(not torch.equal(v, weights["ce-1"][k]) for k, v in weights["ce-0"].items())


def test_rows_and_seeds_share_one_cache_of_the_teacher(how, tmp_path):
    plain = compare.compare("ce; kd", **how, augment="none")
    kept = dict(cache_teacher=str(tmp_path / "kept"), augment="none", out=str(tmp_path / "again"))
    shared = compare.compare("ce; kd; soft = kd(tau=8)", **how | kept)
    assert [row["accuracy"] for row in shared["rows"][:2]] == [row["accuracy"] for row in plain["rows"]]
    hits = {
        name: (found["hits"], found["asked"])
        for name in ("ce-0", "kd-0", "kd-1", "soft-0", "soft-1")
        for found in [json.loads((tmp_path / "again" / "runs" / name / "result.json").read_text())["teacher_cache"]]
    }
    cache, asked = shared["teacher_cache"], hits["kd-0"][1]
    assert plain["teacher_cache"] is None and cache["read"] == 3 * asked and cache["saved_seconds"] > 0
    assert f"{cache['computed']:,} computed, {cache['read']:,} read from the cache" in " ".join(shared["notes"])
    runs = [json.loads((tmp_path / "again/runs" / f"kd-{seed}/result.json").read_text()) for seed in (0, 1)]
    own = [r["train_cpu_seconds"] - r["teacher_cache"]["cpu_seconds"] for r in runs]
    assert runs[0]["teacher_cache"]["cpu_seconds"] > 0 == runs[1]["teacher_cache"]["cpu_seconds"]
    assert shared["rows"][1]["cpu_seconds"] == pytest.approx(sum(own) / 2)  # which row asked first is no cost of it
    assert [row["teacher_calls"] for row in shared["rows"]] == [0, 1, 1]
    assert hits == {"ce-0": (0, 0), "kd-0": (0, asked)} | dict.fromkeys(("kd-1", "soft-0", "soft-1"), (asked, asked))


def test_a_comparison_of_processes_shares_out_and_a_killed_one_goes_on(how, tmp_path, capsys):
    words = [f"--{k}={v if k != 'seeds' else '0,1'}" for k, v in how.items() if k not in ("jobs", "progress")]
    command = [sys.executable, "-m", "spikedistill.cli", "compare", "--method", "ce; tet", "--jobs", "2", *words]
    command[command.index(f"--teacher={TEACHER}")] = "--no-progress"
    subprocess.run([*command, "--shard", "1/2"], check=True, timeout=300, capture_output=True)
    out = tmp_path / "out" / "runs"
    assert sorted(p.parent.name for p in out.glob("*/result.json")) == ["ce-0", "tet-0"]
    first = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert first["missing"] == ["ce-1", "tet-1"] and first["rows"][1]["verdict"] == "one seed"
    weights = (out / "tet-0" / "student.safetensors").read_bytes()
    (out / "tet-0" / "result.json").unlink()  # as if it had been killed before the end
    how |= {"teacher": None}
    lines = {r["run"]: r["state"] for r in compare.compare("ce; tet", **how, dry_run=True)["runs"]}
    assert lines == {"ce-0": "finished", "ce-1": "to do", "tet-0": "goes on after epoch 1", "tet-1": "to do"}
    with compare.claim(tmp_path / "out" / "locks" / "runs-ce-1"):  # another machine is on it
        result = compare.compare("ce; tet", **how)
        assert result["missing"] == ["ce-1"] and "not finished: ce-1" in result["notes"][0]
    assert compare.compare("ce; tet", **how)["missing"] == []
    assert (out / "tet-0" / "student.safetensors").read_bytes() == weights


def test_a_row_again_in_a_run_of_its_own_gives_the_same_numbers(how, tmp_path):
    result = compare.compare("kd(tau=2)", **how | {"seeds": [3]})
    one = json.loads((tmp_path / "out" / "runs" / "kd-3.json").read_text()) | {"out": str(tmp_path / "again")}
    student, teacher, data, methods = (one.pop(k) for k in ("student", "teacher", "data", "method"))
    again = distill(student, teacher, data, methods, **one)
    assert again["test"]["accuracy"] == result["rows"][0]["accuracies"][0]
    files = [(p / "student.safetensors").read_bytes() for p in (tmp_path / "again", tmp_path / "out" / "runs" / "kd-3")]
    assert files[0] == files[1]


def test_every_mistake_is_named_before_work_starts(how, tmp_path, capsys):
    text = mistakes(
        "ce; soft = kd(tau=8)+bkd; ce = tet; bkdd", how,
        bkd={"blurr": 3}, row={"soft": {"epochs": 3, "lr": -1}, "sof": {"lr": 1.0}}, baseline="kdd", shard="5/4",
        seed=3, joint=1, lasnn={"weight": 1.0}, seeds=[0, 0],
    )  # fmt: skip
    for words in (
        "bkd.blurr: no such setting; did you mean 'blur'?", "row.soft.epochs: it is the same for every row",
        "row.soft.lr: -1", "row.sof: there is no such row; did you mean 'soft'?", "two rows are called 'ce'",
        "'bkdd' is unknown; did you mean 'bkd'?", "baseline: 'kdd' is no row", "shard: '5/4'", "--seeds 0,1,2",
        "joint: no such setting", "lasnn: settings for a method that no row uses", "give each seed once",
    ):  # fmt: skip
        assert words in text, (words, text)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        cli.main(["compare", "--overwrite", "--no-test"])
    told = capsys.readouterr().err
    assert "no finished run is repeated" in told and "a run is tested once" in told and "--seeds" not in told
    assert "student: each run is a process" in mistakes("ce", how, student=torch.nn.Linear(1, 1))
    assert "kd needs one" in mistakes("ce; kd", how, teacher=None)


def test_rows_that_cannot_share_the_student_are_named(how, tmp_path, monkeypatch):
    def another(student, teacher=None):
        """A method that trains something else than the student."""
        other = copy.deepcopy(student)
        return Plan({"student": Pass(other, grad=True)}, {"ce": (1.0, CE())})

    def ann(student, teacher=None):
        """A method that takes the student's neurons away."""
        for name, module in [*student.named_modules()]:
            if isinstance(module, Neuron):
                put(student, name, ReLU())
        return Plan({"student": Pass(student, grad=True)}, {"ce": (1.0, CE())})

    monkeypatch.setitem(METHODS, "another", another)
    monkeypatch.setitem(METHODS, "ann", ann)
    rows = "ce; another; ann; flat = ce; far = bkd(tap='stage9'); two = kd(tau=2)+activity"
    text = mistakes(rows, how, row={"flat": {"transform": "tt_snn(rank=2, where='no*')"}})
    assert "row 'another' does not train the student: it cannot share one" in text
    assert "row 'far': bkd: student (Small) publishes no tap 'stage9'" in text
    assert "row 'ann' makes a network without spiking neurons of the student" in text
    assert "row 'flat': transform: tt_snn: where='no*' names no 3x3 convolution" in text
    assert "row 'two'" in text and "term 'kd' means two things" in text and "row 'ce'" not in text
    assert not (tmp_path / "out" / "runs").exists()


def test_rows_may_rewrite_the_student_or_prune_it(how, tmp_path, capsys):
    own = {"tt": {"transform": "tt_snn(rank=1)"}, "thin": {"optimizer": "stds(threshold=0.5)"}}
    own |= {"gated": {"transform": "unstructured_pruning(mean=0.1, std=0.1)"}}
    how |= {"select": "last", "seeds": [0], "row": own}
    result = compare.compare("ce; tt = kd; thin = ce; gated = bkd", **how)
    ce, tt, thin, gated = result["rows"]
    assert [row["rewritten"] for row in result["rows"]] == [
        "", "tt_snn(rank=1)", "", "unstructured_pruning(mean=0.1, std=0.1)",
    ]  # fmt: skip
    assert len({row["parameters"] for row in result["rows"]}) == 1, "folded back"
    assert tt["trained"] < ce["trained"] == ce["parameters"] == thin["trained"] < gated["trained"]
    assert ce["nonzero"] == ce["parameters"] > max(thin["nonzero"], gated["nonzero"])
    assert tt["nonzero"] == ce["parameters"] - 3 * 6 * 4, "a cross has no corners"
    assert thin["ac"] + thin["mac"] < ce["ac"] + ce["mac"] and ce["cpu_seconds"] > 0
    out = tmp_path / "out"
    assert json.loads((out / "runs" / "tt-0" / "config.json").read_text())["transform"] == ["tt_snn(rank=1)"]
    text = (out / "compare.md").read_text()
    assert "tt by tt_snn(rank=1); gated by unstructured_pruning" in text and "| CPU s |" in text and "| not 0 |" in text
    assert "row.tt.transform: transform 'tt_snm' is unknown; did you mean 'tt_snn'?" in mistakes(
        "ce; tt = kd", how | {"row": {"tt": {"transform": "tt_snm"}}}
    )
    assert "it is given as --transform tt_snn" in mistakes("ce; tt_snn", how | {"row": {}})
    assert "tt-0' holds a run with other settings (transform" in mistakes(
        "ce; tt = kd", how | {"row": {"tt": {"transform": "tt_snn(rank=2)"}}}
    )


def test_a_folder_that_is_a_run_or_a_file_is_left_alone(how, tmp_path):
    how |= {"teacher": None, "seeds": [0]}
    compare.compare("ce", **how)
    run = tmp_path / "out" / "runs" / "ce-0"
    before = {p: p.read_bytes() for p in run.iterdir()}
    assert "is the folder of a run" in mistakes("ce", how, out=str(run))
    assert "result.json' is a file" in mistakes("ce", how, out=str(run / "result.json" / "x"))
    assert {p: p.read_bytes() for p in run.iterdir()} == before
    (run / "result.json").unlink()
    (run / "checkpoint.pt").write_bytes(before[run / "checkpoint.pt"][:1000])
    assert "checkpoint.pt' is damaged: delete it, and the run begins again" in mistakes("ce; tet", how)
    (run / "checkpoint.pt").unlink()
    compare.compare("ce", **how)
    assert (run / "student.safetensors").read_bytes() == before[run / "student.safetensors"]


def test_folders_of_other_settings_versions_or_data_are_named_and_kept(how, tmp_path, capsys):
    how |= {"teacher": None, "seeds": [0]}
    compare.compare("ce; tet", **how)
    out = tmp_path / "out"
    result = (out / "runs" / "ce-0" / "result.json").read_text()
    assert "'ce': 1" not in mistakes("ce; tet(lam=0.5)", how) and "tet-0' holds a run with other settings" in mistakes(
        "ce; tet(lam=0.5)", how
    )
    assert "ce-0' holds a run with other settings (epochs: 1 there, 2 now)" in mistakes("ce", how, epochs=2)
    machine = json.loads((out / "runs" / "ce-0" / "machine.json").read_text())
    old = machine | {"versions": machine["versions"] | {"torch": "1.0"}}
    (out / "runs" / "ce-0" / "machine.json").write_text(json.dumps(old))
    assert "ce-0' was made by other versions (torch 1.0 there" in mistakes("ce; tet", how)
    mixed = compare.compare("ce; tet", **how, mixed=True)
    assert "made by 2 sets of versions" in " ".join(mixed["notes"])
    (out / "runs" / "ce-0" / "machine.json").write_text(json.dumps(machine))
    origin = json.loads((out / "origin.json").read_text())
    (out / "origin.json").write_text(json.dumps(origin | {"data": "0123"}))
    assert "data: these are not the ones" in mistakes("ce; tet", how)
    (out / "origin.json").write_text(json.dumps(origin))
    (out / "runs" / "tet-0" / "result.json").write_text('{"test": ')
    assert "tet-0' is damaged" in mistakes("ce; tet", how)
    (out / "runs" / "tet-0" / "config.json").unlink()
    assert "but no config.json: move it away" in mistakes("ce; tet", how)
    assert "left alone: tet-0" not in " ".join(compare.compare("ce", **how)["notes"])
    assert (out / "runs" / "ce-0" / "result.json").read_text() == result


def test_a_run_that_fails_is_named_and_the_others_finish(how, tmp_path, monkeypatch):
    def fails(student, teacher=None):
        """A method whose loss is not a number once training runs."""
        return Plan({"student": Pass(student, grad=True)}, {"ce": (lambda p: float("nan") if p != 0.5 else 1.0, CE())})

    monkeypatch.setitem(METHODS, "fails", fails)
    text = mistakes("ce; fails", how, teacher=None, seeds=[0])
    assert "fails-0 failed" in text and "ce-0" not in text
    kept = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["name"] for row in kept["rows"]] == ["ce"] and kept["missing"] == ["fails-0"]
    assert kept["rows"][0]["peak_memory_bytes"] is None  # this process holds what the runs before it left

    def cannot(c):
        raise OSError("no such file")

    monkeypatch.setattr(crew.distill, "run", cannot)
    text = mistakes("ce; tet; activity", how, teacher=None, seeds=[0])
    assert "tet-0 failed: no such file" in text and "activity-0 failed: no such file" in text


def test_the_space_of_a_method_is_its_rate_and_weights():
    start = tuning.defaults([("bkd", {}), ("kd", {"weight": 0.5})], 0.02)
    assert start["lr"] == 0.02 and start["kd.weight"] == 0.5 and "bkd.weight" in start
    assert not {"kd.ce", "kd.tau", "bkd.blur"} & set(start)
    assert tuning.space(start, 0.02)["lr"] == pytest.approx((0.0025, 0.08))
    assert tuning.applied({"lr": 1, "kd.weight": 2}) == {"lr": 1, "kd": {"weight": 2}}
    given = tuning.defaults([("sakd", {"feature": 2.0, "logits": None})], 0.02)
    assert given == {"lr": 0.02, "sakd.feature": 2.0}  # a weight that may be None, where a number is given


def test_tuning_gives_every_row_as_many_trials_and_never_reads_the_test_data(how, tmp_path):
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'spikedistill[tune]'")
    how |= {"seeds": [0], "tune": 2}
    result = compare.compare("ce; kd", **how)
    for row in result["rows"]:
        assert len(row["tuned"]["trials"]) == 2 and row["tuned"]["trials"][0]["values"]["lr"] == 0.01
        assert row["settings"]["lr"] == row["tuned"]["values"]["lr"]
        best = max(t["valid"] for t in row["tuned"]["trials"])
        assert row["tuned"]["valid"] == best
    trials = [json.loads(p.read_text()) for p in (tmp_path / "out" / "tune").glob("*/result.json")]
    assert len(trials) == 4 and all("test" not in t and "valid" in t for t in trials)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/*/*")}
    assert compare.compare("ce; kd", **how)["rows"] == result["rows"]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/*/*")}


def test_a_trial_that_fails_counts_as_0_and_is_told(how, tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'spikedistill[tune]'")
    run = crew.distill.run

    def fails(c):
        if Path(c.out).relative_to(Path(c.out).parents[1]).as_posix() in failing:
            raise RuntimeError("epoch 1, step 2: loss = nan")
        return run(c)

    monkeypatch.setattr(crew.distill, "run", fails)
    how |= {"teacher": None, "seeds": [0], "tune": 2}
    failing = {"tune/tet-0", "tune/tet-1"}
    text = mistakes("ce; tet", how, out=str(tmp_path / "lost"))
    assert "trial tet-0 failed: epoch 1, step 2: loss = nan\ntrial tet-1 failed: " in text and "ce" not in text
    failing = {"tune/tet-0"}
    result = compare.compare("ce; tet", **how)
    ce, tet = (row["tuned"] for row in result["rows"])
    assert tet["trials"][0]["failed"] == "epoch 1, step 2: loss = nan" and tet["trials"][0]["valid"] == 0
    assert tet["trial"] == 1 and not any("failed" in trial for trial in [*ce["trials"], tet["trials"][1]])
    notes = " ".join(result["notes"])
    assert "failed and count as accuracy 0: 1 of tet;" in notes and "(ce: lr; tet: lr)" in notes
    failing = set()
    assert compare.compare("ce; tet", **how)["rows"] == result["rows"]


def test_a_tuning_is_of_the_methods_and_settings_of_its_row(how, tmp_path):
    config, row = compare.Config(tune=1, out=str(tmp_path)), Row("kd", ("kd",), {"kd": {"tau": 2.0}}, {"clip": 1.0})
    asked = compare._asked(config, row)
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "kd.json").write_text(json.dumps({"asked": asked}))
    assert compare._tuned(config, row)
    for other in ({"settings": {"kd": {"tau": 8.0}}}, {"methods": ("kd", "activity")}, {"own": {"clip": 2.0}}):
        assert compare._tuned(config, replace(row, **other)) is None, other


def test_shards_begin_to_tune_with_different_rows(how, monkeypatch):
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'spikedistill[tune]'")
    tuned, found = [], {"set": {}, "values": {}, "ranges": {}, "trials": []}
    monkeypatch.setattr(compare, "tune", lambda c, row, team, _: tuned.append(row.name) or found)
    how |= {"teacher": None, "seeds": [0], "tune": 1}
    for shard in ("1/2", "2/2"):
        result = compare.compare("ce; tet", **how, shard=shard)
    assert tuned == ["ce", "tet", "tet", "ce"] and [row["name"] for row in result["rows"]] == ["ce", "tet"]


def test_a_tuning_that_is_stopped_ends(how, tmp_path):
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'spikedistill[tune]'")
    config = compare.Config(tune=1, out=str(tmp_path))
    with crew.Crew(config) as team, crew.claim(team.locks / "tune-ce-all"):  # another machine is on it
        team.stopped = True
        with pytest.raises(SpecError, match="tuning of ce: it was stopped"):
            compare.tune(config, Row("ce", ("ce",)), team, {})


def test_a_folder_that_cannot_lock_is_refused(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(SpecError, match=f"out: '{tmp_path}' cannot be shared"), crew.claim(tmp_path / "one"):
        pass


def test_runs_side_by_side_share_out_gpus_and_processors(how, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for named, expected in (("", ["0", "1"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert crew.gpus(compare.Config()) == expected
    assert crew.gpus(compare.Config(accelerator="cpu")) == crew.gpus(compare.Config(devices=2)) == []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    given = []

    class Child:
        def __init__(self, command, env, **_):
            given.append((env["CUDA_VISIBLE_DEVICES"], env["OMP_NUM_THREADS"]))
            self.wait, self.terminate = lambda: 1, lambda: None
            both.wait(10)

    both = threading.Barrier(2)
    monkeypatch.setattr(crew.subprocess, "Popen", Child)
    with crew.Crew(compare.Config(jobs=2, out=str(tmp_path), progress=False)) as team:
        jobs = [crew.Job(f"ce-{seed}", tmp_path / f"ce-{seed}", {"epochs": 1}) for seed in range(4)]
        assert len(team.all(jobs)) == 4
    assert sorted(given) == [("GPU-a", "1")] * 2 + [("GPU-b", "1")] * 2


def test_tune_without_optuna_says_what_to_install(how, monkeypatch):
    monkeypatch.setattr(tuning, "find_spec", lambda name: None)
    assert "pip install 'spikedistill[tune]'" in mistakes("ce", how, tune=2)


def test_an_optimiser_that_prunes_leaves_the_teacher_alone(how):
    compare.compare("ce; kd", **how | {"seeds": [0], "optimizer": "stds(threshold=0.5)", "select": "last"})
    teacher, student = (spikedistill.load(f"{how['out']}/{name}", fast=False) for name in ("teacher", "runs/kd-0"))
    assert sparsity(teacher) == 0 < sparsity(student)


def test_help_shows_the_settings(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    text = capsys.readouterr().out
    assert "--dry-run" in text and "--shard" in text and "--overwrite" not in text


def test_a_folder_may_be_moved_but_its_teacher_not_exchanged(how, tmp_path, monkeypatch):
    how |= {"seeds": [0]}
    compare.compare("ce; kd", **how | {"seeds": [5]})
    result = compare.compare("ce; kd", **how)  # the teacher of seed 5 stays
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(crew.distill, "train", None)  # nothing is run again
    for out in ("moved", str(tmp_path / "moved")):
        assert compare.compare("ce; kd", **how | {"out": out})["rows"] == result["rows"]
    kd = json.loads((tmp_path / "moved" / "runs" / "kd-0" / "config.json").read_text())
    words = {k: kd[k] for k in how if k in kd and k not in ("out", "teacher")}
    again = distill(methods="kd", **words, teacher="moved/teacher", out="moved/runs/kd-0")
    assert again["test"]["accuracy"] == result["rows"][1]["accuracy"]
    with pytest.raises(SpecError, match="teacher: this is not what the run in 'moved/runs/kd-0' was made with"):
        distill(methods="kd", **words, teacher="moved/runs/ce-0", out="moved/runs/kd-0")
    text = mistakes("ce; kd", how, out="moved", teacher="moved/runs/ce-0")
    assert "moved/runs/kd-0' was made with another teacher" in text and "ce-0' was" not in text


def test_a_folder_holds_one_comparison(how, tmp_path):
    """Also where no row and no seed is there already, whose run folder would show the difference."""
    made = compare.compare("ce", **how | {"seeds": [0]})
    text = (tmp_path / "out" / "compare.json").read_text()
    for more in ({"student": "small(widths=(4, 4))"}, {"tune": 1}, {"batch": 6}):
        found = mistakes("tet", how | {"seeds": [5]}, **more)
        assert "holds a comparison with other settings" in found and next(iter(more)) in found
    assert (tmp_path / "out" / "compare.json").read_text() == text
    wider = compare.compare("ce; tet", **how | {"seeds": [0]})
    assert wider["rows"][0]["accuracies"] == made["rows"][0]["accuracies"] and len(wider["rows"]) == 2


def test_tuning_takes_no_trial_of_other_settings(how, tmp_path):
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'spikedistill[tune]'")
    how |= {"seeds": [0], "tune": 1}
    compare.compare("kd", **how)
    for more in ({"student": "small(widths=(4, 4))"}, {"tune": 2}, {"lr": 0.05}):
        assert "holds a comparison with other settings" in mistakes("kd", how, **more)
    assert re.search(r"tune/kd-0' holds a run with other settings \(kd: ", mistakes("kd", how, kd={"weight": 0.5}))
    made = json.loads((tmp_path / "out" / "tune" / "kd-0" / "config.json").read_text())
    assert made["kd"] == {"weight": 1.0}
