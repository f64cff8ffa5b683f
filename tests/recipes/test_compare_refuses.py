"""Compare: what is refused, noticed or kept, so that no run is lost and no number is of something else."""

import json
import shutil

import pytest

from spikedistill.recipes import compare
from spikedistill.recipes import distill as distill_module
from spikedistill.recipes.comparing import crew
from spikedistill.recipes.comparing import rows as rows_module
from spikedistill.recipes.comparing.rows import Row
from spikedistill.recipes.distill import distill
from spikedistill.spec import SpecError
from tests.recipes import test_compare
from tests.recipes.test_compare import TEACHER, mistakes

how, pictures = test_compare.how, test_compare.pictures  # fixtures


OWN_METHOD = """
from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass
from spikedistill.objectives import CE

def begins(student, teacher=None):
    if teacher is None:
        raise ValueError("it was given no teacher")
    return Plan({"student": Pass(student, grad=True)}, {"ce": (1.0, CE())})

def forgets(student, teacher=None):
    return Plan({"student": Pass(student, grad=True)}, {"mine": (1.0, lambda step: step.student.logitz.mean())})
"""


def test_a_method_of_ones_own_may_read_the_teacher_outside_a_pass(how, tmp_path):
    (tmp_path / "mine.py").write_text(OWN_METHOD)
    result = compare.compare(f"ce; own = {tmp_path}/mine.py:begins", **how | {"seeds": [0]})
    assert [row["name"] for row in result["rows"]] == ["ce", "own"]
    made = json.loads((tmp_path / "out/runs/own-0/config.json").read_text())
    assert made["teacher"].endswith("out/teacher")


def test_a_mistake_in_a_term_of_ones_own_names_the_row(how, tmp_path):
    (tmp_path / "mine.py").write_text(OWN_METHOD)
    text = mistakes(f"ce; own = {tmp_path}/mine.py:forgets", how | {"seeds": [0]})
    assert "row 'own': term 'mine': AttributeError" in text and "logitz" in text


OWN_DATA = """
import torch
import spikedistill

def tiny(batch_size):
    x, y = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
    return spikedistill.data.from_tensors(x, y, x[:12], y[:12], valid=0, batch_size=batch_size)
"""


def test_data_without_a_validation_part_are_refused_before_training(how, tmp_path):
    (tmp_path / "mine.py").write_text(OWN_DATA)
    more = how | {"data": f"{tmp_path}/mine.py:tiny", "teacher": None, "seeds": [0]}
    assert mistakes("ce; tet", more) == "data: they have no validation part, on which every choice is made"
    assert not (tmp_path / "out").exists()
    one = {k: v for k, v in more.items() if k not in ("seeds", "jobs")} | {"methods": "ce"}
    with pytest.raises(SpecError, match="test: these data have no validation part"):
        distill(**one, test=False)
    result = distill(**one)
    assert "valid" not in result and result["activity"]["rate"] > 0  # of the test samples


def test_runs_of_other_data_in_the_folder_are_noticed(how, tmp_path):
    how |= {"seeds": [0]}
    compare.compare("ce; kd", **how)
    file = tmp_path / "out/runs/kd-0/origin.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": "another"}))
    text = mistakes("ce; kd", how)
    assert text == f"out: '{file.parent}' was made with other data: choose another --out, or delete it"


def test_unfinished_runs_of_another_version_cannot_be_mixed_in(how, tmp_path):
    how |= {"seeds": [0]}
    compare.compare("ce; kd", **how)
    folder = tmp_path / "out/runs/kd-0"
    made = json.loads((folder / "machine.json").read_text())
    made["versions"]["torch"] = "1.0"
    (folder / "machine.json").write_text(json.dumps(made))
    assert "torch 1.0 there" in mistakes("ce; kd", how) and mistakes("ce; kd", how).endswith("--mixed accepts it")
    assert len(compare.compare("ce; kd", **how, mixed=True)["notes"]) >= 1
    (folder / "result.json").unlink()
    for more in ({}, {"mixed": True}):
        assert mistakes("ce; kd", how, **more).endswith("delete it to begin it again")


def test_a_tuning_of_another_version_or_code_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN_METHOD)
    config, row = compare.Config(tune=1, out=str(tmp_path)), Row("own", (f"{tmp_path}/mine.py:begins",))
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "own.json").write_text(json.dumps({"asked": compare._asked(config, row)}))
    assert compare._tuned(config, row)
    (tmp_path / "mine.py").write_text(OWN_METHOD + "\n# changed\n")
    assert compare._tuned(config, row) is None
    (tmp_path / "mine.py").write_text(OWN_METHOD)
    monkeypatch.setattr(compare.runs, "machine", lambda: {"versions": {"spikedistill": "9", "torch": "9"}})
    assert compare._tuned(config, row) is None
    assert compare._tuned(config.model_copy(update={"mixed": True}), row)


def test_the_settings_name_the_teacher_that_was_given_and_an_idle_one_is_not_trained(how, tmp_path):
    how |= {"seeds": [0]}
    compare.compare("ce; tet", **how)
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text())["teacher"] == TEACHER and not (out / "teacher").exists()
    result = compare.compare("ce; tet; kd", **how)
    assert json.loads((out / "config.json").read_text())["teacher"] == TEACHER and (out / "teacher").exists()
    assert any(note.startswith("teacher: ") and "on validation" in note for note in result["notes"])
    again = compare.Config.model_validate(json.loads((out / "config.json").read_text()))
    assert compare.run(again)["rows"] == result["rows"]


def test_a_teacher_of_paired_images_has_all_of_them():
    config = compare.Config(data="fashion-events", pair="fashion-mini", train_share=0.1, teacher=TEACHER)
    job = rows_module.teacher_job(config, [Row("ckd", ("ckd",))])
    assert job.settings["train_share"] == 1.0 and job.settings["data"] == "fashion-mini"


def test_a_strange_result_beside_the_teacher_loses_nothing(how, tmp_path):
    how |= {"seeds": [0]}
    compare.compare("ce; kd", **how)
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    shutil.copy(tmp_path / "out/teacher/student.safetensors", teacher)
    (teacher / "result.json").write_text('{"acc": 0.9}')
    result = compare.compare("ce; kd", **how | {"teacher": str(teacher), "out": str(tmp_path / "other")})
    assert result["teacher"]["accuracy"] is None and len(result["rows"]) == 2
    assert any(row["name"] == "teacher" for row in result["references"])
    assert any("was not tested on these data" in text for text in result["not_shown"])


def test_tables_are_written_one_process_after_another(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(compare.time, "sleep", lambda s: slept.append(s) or held.__exit__(None, None, None))
    held = crew.claim(tmp_path / "summary")
    held.__enter__()
    assert compare.alone(tmp_path / "summary", lambda: {"made": len(slept)}) == {"made": 1}


def test_peak_memory_is_that_of_training(how, monkeypatch):
    """Not of measuring, which comes after it and takes more; none where nothing was trained."""
    moments = []
    monkeypatch.setattr(distill_module.runs, "peak_memory", lambda device: moments.append("peak") or 5)
    monkeypatch.setattr(
        distill_module, "measure", lambda *a: moments.append("measured") or {"valid": {}, "activity": {}}
    )
    one = {k: v for k, v in how.items() if k not in ("seeds", "jobs", "teacher")} | {"methods": "ce"}
    result = distill(**one)
    assert result["peak_memory_bytes"] == 5 and moments == ["peak", "measured"]
