"""The main job through the command line and through Python, on tiny images."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import spikedistill
from spikedistill import cli, models, optim, runs
from spikedistill.core.fit import Stage
from spikedistill.core.plan import merge
from spikedistill.methods import ckd, distilling_spikes, kd, static2dvs, tssd
from spikedistill.models.small import small
from spikedistill.recipes.distill import distill, rehearse, split
from spikedistill.report.activity import activity
from spikedistill.spec import SpecError
from tests.methods.toy import toy_batch, toy_student, toy_teacher

TEACHER = "small(widths=(4, 6), neuron=relu)"
STUDENT = "small(widths=(3, 6))"
QUICK = ["--epochs", "1", "--batch", "16", "--precision", "32-true", "--no-progress"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes of 20 images, 12x12, told apart by which third is bright."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for c, name in enumerate(("left", "middle", "right")):
        (folder / name).mkdir()
        for i in range(20):
            image = rng.integers(0, 80, (12, 12), dtype=np.uint8)
            image[:, 4 * c : 4 * c + 4] += 150
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def teacher(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    command = ["distill", "--data", pictures, "--student", TEACHER, "--method", "ce", "--out", str(out), *QUICK]
    cli_ok(*command, "--epochs=12", "--lr", "0.02", without="--epochs")
    return str(out)


def cli_ok(*words, without=None):
    """Run a command in this process; `without` drops an earlier flag and its value."""
    words = list(words)
    if without:
        i = words.index(without)
        del words[i : i + 2]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert not stop.value.code, words


def mistakes_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def test_teacher_then_student_by_two_methods(pictures, teacher, tmp_path, capsys):
    out = tmp_path / "student"
    words = ["--data", pictures, "--teacher", teacher, "--student", STUDENT, "--method", "kd,bkd", "--steps", "2"]
    cli_ok("distill", *words, "--bkd.blur", "0.4", "--kd.tau=2.5", "--out", str(out), *QUICK)
    printed = capsys.readouterr().out
    assert "test accuracy" in printed and "firing rate" in printed and "student.safetensors" in printed
    assert {p.name for p in out.iterdir()} == {*runs.FILES}
    result = json.loads((out / "result.json").read_text())
    assert result["test"]["samples"] == 6 and len(result["test"]["by_step"]) == 2
    assert "once" in result["test"]["touched"] and result["valid"]["samples"] == 6
    assert result["parameters"]["student"] == sum(p.numel() for p in spikedistill.load(out, fast=False).parameters())
    assert result["parameters"]["training_only"] == 2 * (9 * 6**2 + 6)
    assert set(result["activity"]["layers"]) == {"stem.neuron", "stage2.1.neuron"}
    assert result["train_seconds"] > 0 and result["peak_memory_bytes"] > 1e6
    config = json.loads((out / "config.json").read_text())
    assert config["bkd"] == {"blur": "0.4"} and config["kd"] == {"tau": "2.5"} and config["steps"] == 2
    machine = json.loads((out / "machine.json").read_text())
    assert machine["versions"]["torch"] and machine["processor"]


def test_a_run_folder_runs_again_from_its_config_with_the_same_numbers(pictures, teacher, tmp_path):
    first, again = tmp_path / "a", tmp_path / "b"
    words = ["--data", pictures, "--teacher", teacher, "--student", STUDENT, "--method", "bkd(blur=0.3)", *QUICK]
    cli_ok("distill", *words, "--out", str(first))
    cli_ok("distill", "--config", str(first), "--out", str(again))
    a, b = (spikedistill.load(p, fast=False).state_dict() for p in (first, again))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_kept_outputs_of_the_teacher_change_no_number(pictures, teacher, tmp_path, where):
    plain = ["distill", "--data", pictures, "--teacher", teacher, "--student", STUDENT, "--method", "kd,bkd", *QUICK]
    plain += ["--epochs", "3", "--augment", "flip", "--valid", "0.2"]
    del plain[plain.index("--epochs") : plain.index("--epochs") + 2]
    kept = [*plain, "--cache-teacher", "memory" if where == "memory" else str(tmp_path / "kept")]
    results = []
    for name, words in (("plain", plain), ("first", kept), ("second", kept)):
        cli_ok(*words, "--out", str(tmp_path / name))
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
    without, first, second = results
    for other in (first, second):
        assert other["valid"] == without["valid"] and other["test"] == without["test"]
    assert 0 < first["teacher_cache"]["hits"] < first["teacher_cache"]["asked"] and not first["teacher_cache"]["full"]
    assert "teacher_cache" not in without and [r["teacher_calls"] for r in results] == [1, 1, 1]
    spent = first["teacher_cache"]
    assert 0 < spent["computed_seconds"] < first["train_seconds"]
    if where == "memory":  # every run pays for them
        assert spent["cpu_seconds"] == spent["seconds"] == 0
    else:
        assert spent["cpu_seconds"] > 0 and spent["seconds"] == spent["computed_seconds"]
        assert second["teacher_cache"]["hits"] == second["teacher_cache"]["asked"]
        assert second["teacher_cache"]["cpu_seconds"] == second["teacher_cache"]["seconds"] == 0


def test_activity_is_that_of_the_student_in_float32_whatever_it_was_trained_in(pictures, tmp_path):
    """Means of spikes in bfloat16 look like any other numbers, and additions would be counted as multiplications."""
    words = ["distill", "--data", pictures, "--student", "small(widths=(3, 6))", "--method", "ce", *QUICK]
    words[words.index("32-true")] = "bf16-mixed"
    cli_ok(*words, "--out", str(tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "result.json").read_text())["activity"]
    held_out = spikedistill.data.load(pictures, valid=0.1, batch_size=16).valid
    assert found == activity(spikedistill.load(tmp_path / "run", fast=False), held_out)
    assert found["operations"]["ac"] > 0 and found["synapses"]["head"]["kind"] == "ac"


def test_a_place_for_outputs_that_cannot_be_made_is_named(pictures, teacher, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = (
        "distill",
        "--data",
        pictures,
        "--teacher",
        teacher,
        "--method",
        "kd",
        "--out",
        str(tmp_path / "out"),
        *QUICK,
    )
    assert "cache_teacher: cannot write to" in mistakes_of(capsys, *words, "--cache-teacher", str(tmp_path / "file"))


@pytest.mark.parametrize("ending", ["toml", "yaml", "json"])
def test_config_files_mirror_the_flags(pictures, teacher, tmp_path, ending):
    settings = {"data": pictures, "teacher": teacher, "student": STUDENT, "method": ["bkd"], "epochs": 1, "batch": 16}
    settings |= {"progress": False, "precision": "32-true"}
    if ending == "toml":
        text = "\n".join(f"{k} = {json.dumps(v)}" for k, v in settings.items()) + "\n[bkd]\nblur = 0.25\n"
    else:
        text = json.dumps(settings | {"bkd": {"blur": 0.25}})  # JSON is YAML
    file = tmp_path / f"c.{ending}"
    file.write_text(text)
    out = tmp_path / "out"
    cli_ok("distill", "--config", str(file), "--out", str(out), "--bkd.weight", "0.01")
    config = json.loads((out / "config.json").read_text())
    assert config["method"] == ["bkd"] and config["epochs"] == 1 and float(config["bkd"]["blur"]) == 0.25
    assert float(config["bkd"]["weight"]) == 0.01  # a flag of a section leaves the rest of it


def test_every_mistake_is_reported_at_once_with_its_path_and_the_nearest_name(capsys, tmp_path):
    text = mistakes_of(
        capsys, "distill", "--data", "fashion-mimi", "--method", "bdk,kd", "--kd.taw", "3", "--epochs", "0",
        "--student", "smal", "--teacher", str(tmp_path / "nowhere"), "--bath", "3", "--augment", "flipp",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    for words in (
        "8 mistakes", "epochs: '0'", "greater than or equal to 1", "'bdk' is unknown; did you mean 'bkd'?",
        "kd.taw: no such setting; did you mean 'tau'?", "bath: no such setting; did you mean 'batch'?",
        "did you mean 'fashion-mini'?", "'smal' is unknown; did you mean 'small'?", "nowhere", "'flip'",
    ):  # fmt: skip
        assert words in text, words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--kd.tau", "-1", "--method", "kd"], "kd.tau: '-1' will not do: it should be greater than 0"),
        (["--kd.tau", "warm", "--method", "kd"], "kd.tau: 'warm' will not do: it should be a valid number"),
        (["--bkd.blur", "1.5"], "less than or equal to 1"),
        (["--tet.lam", "0.1"], "tet: settings for a method that is not used"),
        (["--method", "ce(smoothing=2)"], "ce.smoothing: no such setting; did you mean 'label_smoothing'?"),
        (["--method", "ce("], "cannot read 'ce('"),
        (["--method", ""], "method: none is given"),
        (["--student", "small(width=3)"], "small.width: no such setting; did you mean 'widths'?"),
        (["--student", "small(neuron=lfi)"], "'lfi' is unknown"),
        (["--teacher", "small"], "without trained weights"),
        (["--epochs", "two"], "epochs: 'two' will not do"),
        (["extra"], "'extra': expected a flag"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["--config", "absent.toml"], "cannot read 'absent.toml'"),
        (["--data", "folder:absent"], "absent"),
    ],
)
def test_mistakes(capsys, words, expected):
    assert expected in mistakes_of(capsys, "distill", "--out", "/nonexistent/never", *words)


def test_a_method_that_needs_a_teacher_says_so(capsys):
    assert "teacher: bkd needs one: a run folder" in mistakes_of(capsys, "distill", "--method", "bkd")


def test_unknown_recipe_and_name(capsys, tmp_path):
    assert "recipe 'quikstart' is unknown; did you mean 'quickstart'?" in mistakes_of(capsys, "run", "quikstart")
    assert "did you mean 'bkd'?" in mistakes_of(capsys, "show", "bkdd")
    assert "did you mean 'distill'?" in mistakes_of(capsys, "cp", "distil", str(tmp_path))


def test_teacher_of_other_classes_or_size_is_named_with_both_shapes(pictures, tmp_path):
    how = dict(data=pictures, student=STUDENT, methods="kd", out=str(tmp_path / "x"), progress=False, epochs=1)
    with pytest.raises(SpecError, match=r"teacher: Small gives 7 classes \(logits \[1, 2, 7\]\), the data have 3"):
        distill(teacher=small(classes=7, widths=(3, 4), neuron="relu"), **how)
    how["out"] = str(tmp_path / "y")
    with pytest.raises(SpecError, match=r"teacher: Small cannot take images of \[1, 12, 12\]"):
        distill(teacher=small(classes=3, channels=3, widths=(3, 4), neuron="relu"), **how)


def test_feature_map_that_does_not_fit_is_named_with_both_shapes_before_training(pictures, tmp_path):
    teacher = small(classes=3, widths=(3, 4, 5), neuron="relu")
    how = dict(data=pictures, student=STUDENT, teacher=teacher, methods="bkd", progress=False, epochs=1)
    with pytest.raises(SpecError, match=r"term 'bkd'.*\[2, 5, 6, 6\].*\[2, 5, 3, 3\].*resize=True"):
        distill(out=str(tmp_path / "x"), **how)
    assert not (tmp_path / "x" / "metrics.jsonl").exists()
    result = distill(out=str(tmp_path / "y"), bkd={"resize": True}, **how)
    assert result["epochs"] == 1


def test_the_rehearsal_prepares_its_batch_and_finds_heads_that_do_not_spike():
    rehearse(Stage([], **vars(tssd(toy_student()))), toy_batch(2))
    with pytest.raises(SpecError, match="trains with 2 time steps a student that is measured and used with 3"):
        rehearse(Stage([], **vars(tssd(toy_student(), steps=2))), toy_batch(2))
    rehearse(Stage([], **vars(tssd(toy_student(), steps=3))), toy_batch(2))
    with pytest.raises(SpecError, match=r"method: the weight of every term is 0 \(ce, kd\)"):
        rehearse(Stage([], **vars(kd(toy_student(), toy_teacher(), ce=0, weight=0))), toy_batch(2))
    student = toy_student()
    both = merge(ckd(student, toy_teacher()), static2dvs(student))
    with pytest.raises(SpecError, match="are replaced already: take one of the two methods"):
        rehearse(Stage([], **vars(both)), toy_batch(2))
    with pytest.raises(SpecError, match=r"spikes_soft.*outputs of the student are not spikes"):
        rehearse(Stage([], **vars(distilling_spikes(toy_student(), toy_teacher()))), toy_batch(2))

    class NoSteps(torch.nn.Module):
        def forward(self, x):
            return model(x)

    for alone, where in ((dict(alpha=0), "method: a model"), (dict(beta=0, steps=None), "term 'tssd_time'")):
        model, own = toy_student(), NoSteps()
        own.steps, own.dims, own.model = 3, {"model.stage1": 5}, model
        plan = tssd(own, **dict(steps=3, classes=4) | alone)
        with pytest.raises(SpecError, match=f"{where}.*unexpected keyword argument 'steps'"):
            rehearse(Stage([], **vars(plan)), toy_batch(2))


def test_unknown_tap_lists_the_valid_ones(pictures, teacher, tmp_path):
    how = dict(data=pictures, student=STUDENT, teacher=teacher, methods="bkd", progress=False)
    with pytest.raises(SpecError, match=r"bkd: student \(Small\) publishes no tap 'stage7'.*did you mean 'stage2'"):
        distill(out=str(tmp_path / "x"), bkd={"tap": "stage7"}, **how)


def test_methods_that_do_not_go_together_are_named(pictures, teacher, tmp_path):
    with pytest.raises(SpecError, match=r"kd and activity.* do not go together: term 'kd' means two"):
        distill(
            data=pictures, student=STUDENT, teacher=teacher, methods="kd + activity(tau=2)", out=str(tmp_path / "x")
        )


def test_a_folder_is_never_overwritten_silently(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["distill", "--data", pictures, "--student", STUDENT, "--method", "ce", "--out", str(out), *QUICK]
    cli_ok(*words)
    weights = (out / "student.safetensors").read_bytes()
    text = mistakes_of(capsys, *words, "--lr", "0.1")
    assert "holds a run with other settings (lr: 0.01 there, 0.1 now)" in text
    assert (out / "student.safetensors").read_bytes() == weights
    cli_ok(*words)  # the same run again: its result, without training
    assert (out / "student.safetensors").read_bytes() == weights
    (out / "notes.txt").write_text("mine")
    cli_ok(*words, "--lr", "0.1", "--overwrite")
    assert (out / "student.safetensors").read_bytes() != weights and (out / "notes.txt").read_text() == "mine"
    assert "epochs: 1 there, 2 now" in mistakes_of(capsys, "distill", "--config", str(out), "--epochs", "2")
    config = json.loads((out / "config.json").read_text())
    assert "overwrite" not in config  # it was for that command
    (out / "config.json").write_text(json.dumps(config | {"overwrite": True}))  # as earlier versions kept it
    assert "epochs: 1 there, 2 now" in mistakes_of(capsys, "distill", "--config", str(out), "--epochs", "2")


def test_a_setting_given_in_two_places_is_a_mistake(capsys):
    words = ["distill", "--data", "fashion-mini", "--method", "bkd(blur=0.1, tau=3)", "--bkd.blur", "0.2"]
    assert "bkd.blur: it is 0.1 in 'bkd(blur=0.1, tau=3)' and 0.2 here: give it once" in mistakes_of(capsys, *words)
    words[-1] = "0.10"  # the same number
    assert "give it once" not in mistakes_of(capsys, *words, "--epochs", "0")


def test_foreign_folders_and_places_that_cannot_be_written(tmp_path, capsys):
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "result.json").write_text("{}")
    common = ["distill", "--data", "fashion-mini", "--method", "ce", "--out"]
    assert "but no config.json: choose another folder" in mistakes_of(capsys, *common, str(stranger))
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot write to" in mistakes_of(capsys, *common, str(file / "run"))
    assert (stranger / "result.json").read_text() == "{}"


def test_split_at_commas_outside_brackets():
    assert split("kd, bkd(blur=0.4, tau=2)+tet") == ["kd", "bkd(blur=0.4, tau=2)", "tet"]


def test_show_and_list_and_cp(capsys, tmp_path):
    cli_ok("list")
    text = " ".join(capsys.readouterr().out.split())
    for word in ("bkd", "fashion-mini", "spikformer", "quickstart"):
        assert word in text
    cli_ok("show", "bkd")
    text = " ".join(capsys.readouterr().out.split())
    for word in ("Xu, You, Guo", "Evidence: code", "blur", "0.15", "share of channels dropped"):
        assert word in text
    for name in ("small", "fashion", "quickstart", "distill"):
        cli_ok("show", name)
    cli_ok("cp", "quickstart", str(tmp_path))
    assert (tmp_path / "quickstart.py").exists()
    mistakes_of(capsys, "cp", "quickstart", str(tmp_path))


@pytest.mark.parametrize("name", ["quickstart", "predict"])
def test_a_copied_recipe_runs_as_it_was_changed(name, tmp_path):
    cli_ok("cp", name, str(tmp_path))
    file = tmp_path / f"{name}.py"
    was = {"quickstart": "Epochs of every run", "predict": "Replace the file"}[name]
    assert was in file.read_text()
    file.write_text(file.read_text().replace(was, "MINE"))

    def run(*words):
        return subprocess.run([sys.executable, str(file), *words], capture_output=True, text=True)

    assert "MINE" in run("--help").stdout
    wrong = run(*(["--run"] if name == "predict" else []), str(tmp_path / "none"), "--bach", "3")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and "error:" in wrong.stderr


def test_two_processes_from_the_command_line(pictures, tmp_path):
    command = [sys.executable, "-m", "spikedistill.cli", "distill", "--data", pictures, "--student", STUDENT]
    command += ["--method", "ce", "--accelerator", "cpu", "--devices", "2", "--out", str(tmp_path / "run"), *QUICK]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=180, capture_output=True, env=env)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["processes"] == 2 and result["test"]["samples"] == 6
    assert runs.load(tmp_path / "run", fast=False).head.out_features == 3


def test_timing_of_help_and_import():
    """Top-level help imports no torch, and the package adds no heavy import to torch's."""
    code = "import sys; from spikedistill import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    code = "import torch, sys; before = set(sys.modules); import spikedistill; spikedistill.fit, spikedistill.methods\n"
    code += "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
    code += "assert not new & {'lightning_fabric', 'matplotlib', 'pydantic', 'rich', 'torchvision', 'timm'}, new"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_rewritten_student_is_folded_back_and_loads(pictures, teacher, tmp_path):
    how = dict(data=pictures, teacher=teacher, student=STUDENT, epochs=1, batch=16, precision="32-true", progress=False)
    plain = distill(**how, methods="bkd", out=str(tmp_path / "plain"))["parameters"]
    texts = ["factorise", "unstructured_pruning(mean=0.1, std=0.1, search=0.5)"]
    with pytest.raises(SpecError, match=r"transform: unstructured_pruning.* needs --select last"):
        distill(**how, methods="bkd", transform=texts, out=str(tmp_path / "both"))
    result = distill(**how, methods="bkd", transform=texts, select="last", out=str(tmp_path / "both"))
    assert result["parameters"]["student_in_training"] != plain["student"]
    student = runs.load(tmp_path / "both", fast=False)
    assert type(student.get_submodule("stage2.1.conv")).__name__ == "Conv2d"
    metrics = (tmp_path / "both" / "metrics.jsonl").read_text()
    assert '"synops"' in metrics
    joint = distill(**how | {"teacher": None}, methods="joint_a_snn", out=str(tmp_path / "joint"))
    assert joint["parameters"]["student"] == plain["student"] < joint["parameters"]["student_in_training"]
    assert (
        runs.load(tmp_path / "joint", fast=False).state_dict().keys()
        == runs.load(tmp_path / "plain", fast=False).state_dict().keys()
    )


def test_prunes_with_stds(pictures, teacher, tmp_path, capsys):
    words = ["--data", pictures, "--teacher", teacher, "--student", STUDENT, "--method", "kd", *QUICK]
    text = mistakes_of(capsys, "distill", *words, "--optimizer", "stds(curv=linear)", "--out", str(tmp_path / "x"))
    assert "--select last" in text and "did you mean 'curve'" in text
    cli_ok("distill", *words, "--optimizer", "stds(threshold=0.2)", "--select", "last", "--out", str(tmp_path / "y"))
    assert 0.1 < optim.sparsity(runs.load(tmp_path / "y", fast=False)) < 1


def test_recomputing_changes_no_number(pictures, tmp_path, monkeypatch):
    results, asked, recompute = [], [], models.recompute
    monkeypatch.setattr(models, "recompute", lambda model: asked.append(model) or recompute(model))
    for flags in ([], ["--recompute"]):
        out = tmp_path / f"run{len(flags)}"
        command = ["distill", "--data", pictures, "--student", STUDENT, "--method", "ce", "--out", str(out), *QUICK]
        cli_ok(*command, *flags)
        results.append(spikedistill.load(out, fast=False).state_dict())
        assert len(asked) == len(flags)
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_a_run_that_fails_before_training_leaves_the_folder_free(pictures, tmp_path, capsys):
    words = ["distill", "--data", pictures, "--epochs", "1", "--out", str(tmp_path / "x"), "--method", "kd"]
    teacher = tmp_path / "t.py"
    teacher.write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(7))\n")
    assert "gives 7 classes" in mistakes_of(capsys, *words, "--teacher", f"{teacher}:net")
    assert not any((tmp_path / "x").iterdir())
    teacher.write_text(teacher.read_text().replace("7", "3"))
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--teacher", f"{teacher}:net", "--student", "small(widths=(2, 3))", "--batch", "8"])
    assert not stop.value.code and (tmp_path / "x" / "result.json").exists()


def test_a_run_that_is_to_be_overwritten_stays_until_the_new_one_trains(
    pictures, teacher, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    common = ["distill", "--data", pictures, "--student", STUDENT, *QUICK]
    first = [*common, "--teacher", teacher, "--method", "kd", "--out", str(out)]
    bad = [
        "--method",
        "bkd",
        "--bkd.tap",
        "stage1",
        "--bkd.teacher_tap",
        "stage2",
        "--overwrite",
    ]  # maps of other sizes
    cli_ok(*first)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert "term 'bkd'" in mistakes_of(capsys, *common, "--teacher", teacher, "--out", str(out), *bad)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before

    def killed(*_args):
        raise KeyboardInterrupt  # what `except Exception` does not see, as it does not see SIGKILL

    with monkeypatch.context() as patch:
        patch.setattr("spikedistill.recipes.distill.rehearse", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(data=pictures, student=STUDENT, methods="ce", out=str(out), overwrite=True, progress=False)
    assert (out / ".before").exists()
    assert "holds a run with other settings" in mistakes_of(capsys, *first, "--lr", "0.3")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    cli_ok(*first, "--lr", "0.3", "--overwrite")
    assert not (out / ".before").exists() and json.loads((out / "config.json").read_text())["lr"] == 0.3
    for folder in (teacher, f"{teacher}/student.safetensors"):
        words = [*common, "--method", "kd", "--out", teacher, "--overwrite", "--teacher", folder]
        assert "is the folder of the teacher" in mistakes_of(capsys, *words)
    assert (Path(teacher) / "student.safetensors").exists()


def test_other_data_or_another_teacher_of_the_same_name_are_noticed(pictures, teacher, tmp_path, capsys):
    images, by = tmp_path / "images", tmp_path / "teacher"
    shutil.copytree(pictures.removeprefix("folder:"), images)
    shutil.copytree(teacher, by)
    words = ["distill", "--data", f"folder:{images}", "--student", STUDENT, "--method", "kd", *QUICK]
    words += ["--teacher", str(by), "--out", str(tmp_path / "run")]
    cli_ok(*words)
    cli_ok(*words)  # finished
    (by / "student.safetensors").write_bytes((tmp_path / "run" / "student.safetensors").read_bytes())
    assert "teacher: this is not what the run in" in mistakes_of(capsys, *words)
    shutil.copy(f"{teacher}/student.safetensors", by)
    Image.new("L", (12, 12), 77).save(images / "left" / "0.png")
    for name in ("result.json", "student.safetensors"):  # as if it had been killed at the end
        assert "data: this is not what the run in" in mistakes_of(capsys, *words)
        (tmp_path / "run" / name).unlink()
    (images / "left").rename(images / "links")
    text = mistakes_of(capsys, *words[:-1], str(tmp_path / "new"))
    assert "knows the classes 'left', 'middle', 'right'" in text and not (tmp_path / "new" / "metrics.jsonl").exists()


def test_a_damaged_checkpoint_is_named(pictures, tmp_path, capsys):
    words = ["distill", "--data", pictures, "--student", STUDENT, "--method", "ce", *QUICK, "--out", str(tmp_path)]
    cli_ok(*words)
    (tmp_path / "result.json").unlink()
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert "checkpoint.pt' is damaged: delete it" in mistakes_of(capsys, *words)
    assert "out: the name of the folder is empty" in mistakes_of(capsys, *words[:-1], "")
    assert "to: it must be given, one of " in mistakes_of(capsys, "export", str(tmp_path))
    assert "cannot write" in mistakes_of(capsys, "cp", "quickstart", str(tmp_path / "no" / "q.py"))
