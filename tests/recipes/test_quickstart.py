"""The quickstart: its table, and what is refused before the teacher trains."""

import json

import pytest

from spikedistill import cli
from tests.recipes.test_distill import mistakes_of
from tests.recipes.test_distill import pictures as pictures

QUICK = ["--epochs", "1", "--batch", "16", "--steps", "2", "--precision", "32-true", "--no-progress"]
SMALL = ["--widths", "(3, 4)", "--teacher", "small(widths=(4, 6), neuron=relu)"]


def test_a_table_of_every_method(pictures, tmp_path, capsys):
    words = ["run", "quickstart", "--data", pictures, *QUICK, *SMALL, "--seeds", "0,1", "--out", str(tmp_path / "out")]
    for _ in range(2):  # the second time nothing is trained
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert not stop.value.code
        printed = capsys.readouterr().out
        for text in ("ANN teacher", "ReLU twin", "SNN, bkd", "over ce", "report.html"):
            assert text in printed, text
    rows = json.loads((tmp_path / "out" / "quickstart.json").read_text())["rows"]
    ce, kd = rows[2], rows[3]
    assert kd["difference"]["mean"] == pytest.approx(kd["accuracy"] - ce["accuracy"]) and kd["samples"] == 6
    values = kd["difference"]["values"]
    if values[0] == values[1]:  # two seeds that agree are no certainty: a sample's weight is the least spread
        assert kd["difference"]["high"] > kd["difference"]["mean"]
    assert (tmp_path / "out" / "quickstart.md").exists()


def test_mistakes_are_found_before_the_teacher_trains(pictures, tmp_path, capsys):
    bad = ["--widths", "(4, x)", "--teacher", "smal", "--seeds", "0,0", "--augment", "flipp"]
    text = mistakes_of(capsys, "run", "quickstart", "--data", pictures, *QUICK, *bad, "--out", str(tmp_path / "out"))
    for expected in ("widths: ", "teacher: 'smal' is unknown", "seeds: 0,0: give each once", "augment: "):
        assert expected in text, expected
    assert not (tmp_path / "out").exists()
    assert "did you mean 'fashion'" in mistakes_of(capsys, "run", "quickstart", "--data", "fashoin")
