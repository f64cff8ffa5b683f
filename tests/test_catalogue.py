"""The page of methods is what the code gives, and `list` and `show` say it."""

import json
import re
from pathlib import Path

import pytest

from spikedistill import catalogue, cli
from spikedistill.catalogue import card, cost, ours, page
from spikedistill.methods import METHODS, bkd, ce, distilling_spikes, sakd, strong2weak

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"


@pytest.fixture(scope="module")
def fresh():
    return page()


def without_cost(text):
    """The page without its last column, which is measured."""
    return re.sub(r"\| [^|\n]*\|$", "", text, flags=re.M)


def test_the_committed_page_is_what_the_code_gives(fresh):
    assert without_cost(PAGE.read_text()) == without_cost(fresh), (
        "spikedistill list methods --markdown > docs/methods.md"
    )


def test_what_a_row_says(fresh):
    heads, _, *rows = [
        [c.strip() for c in line.strip("|\n").split("|")] for line in fresh.splitlines() if line[:1] == "|"
    ]
    rows = {row[0].strip("`"): dict(zip(heads, row)) for row in rows}
    assert [*rows] == [*METHODS]
    column = {head: {name: row[head] for name, row in rows.items()} for head in heads}
    assert column["teacher"]["bkd"] == "needed" and column["teacher"]["activity"] == "used"
    assert {column["teacher"][name] for name in ("ce", "tet", "tks", "tssd", "joint_a_snn", "static2dvs")} == {"none"}
    assert {column["time"][name] for name in ("ce", "kd", "bkd", "lasnn", "kd_snn_liang", "ckdsnn")} == {"mean"}
    steps = ("tet", "tks", "tser", "meom", "seal_kd", "strong2weak", "full_range_kd", "hsd", "tssd", "ckd")
    assert {column["time"][name] for name in steps} == {"per step"}
    assert column["taps"]["bkd"] == "student: stage3; teacher: stage3"
    assert column["taps"]["activity"] == "student: every neuron" and column["taps"]["kd"] == ""
    assert column["extra"]["bkd"] == f"{2 * (9 * 128**2 + 128):,}" and column["extra"]["kd"] == ""
    assert column["further passes"]["tssd"] == "long" and column["further passes"]["ce"] == ""
    assert column["merges with"]["tet"] == "all" and column["merges with"]["ce"] == "all but tks"
    assert column["merges with"]["static2dvs"] == "all but ckd"
    for name, row in rows.items():  # it is mutual
        for other in rows.keys() - {name}:
            assert merges(row["merges with"], other) == merges(rows[other]["merges with"], name), (name, other)


def merges(text, name):
    named = re.sub("^all( but)?", "", text).replace(" ", "").split(",")
    return (name in named) != text.startswith("all")


def test_cards():
    about = card(bkd)
    assert (about.year, about.evidence) == ("2024", "code")
    assert about.paper == "Xu et al., https://arxiv.org/abs/2407.09083"
    assert (card(ce).year, card(ce).paper, card(ce).evidence) == ("", "", "code")
    assert (card(sakd).year, card(sakd).paper) == ("2024", "Qiu et al., https://openreview.net/forum?id=QwFw-CcUb10")
    assert card(strong2weak).evidence == "paper text" and card(distilling_spikes).evidence == "reconstruction"
    for name, build in METHODS.items():
        about = card(build)
        assert about.evidence and (
            name == "ce" or (re.fullmatch(r"20\d\d", about.year) and "https://" in about.paper)
        ), name
        if about.evidence == "reconstruction":
            assert "in the style of" in about.title.lower(), name


def test_our_rows_are_those_of_the_results(tmp_path, monkeypatch, capsys):
    (tmp_path / "mini").mkdir()
    table = (
        "| model | test | cost | cost, cached |\n|---|---:|---:|---:|\n| `bkd` | 86% | 1.7 | 1.2 |\n| kd | 85% | | |\n"
    )
    (tmp_path / "mini" / "speed.md").write_text(f"**title**\n\n{table}\n\ntext | of bkd\n")
    alone = {"methods": ["bkd"], "lr": 0.04, "bkd": {"weight": 5.0, "wsld": 0}, "name": "heavy"}
    others = [alone | {"transform": ["tt_snn(rank=4)"]}, alone | {"methods": ["bkd", "kd"]}]
    difference = {"mean": 0.0123, "low": -0.002, "high": 0.0266}
    rows = [{"settings": each, "accuracy": 0.8662, "difference": difference} for each in (alone, *others)]
    (tmp_path / "mini" / "compare.json").write_text(json.dumps({"rows": rows, "baseline": "ce", "title": "T = 4"}))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(catalogue, "RESULTS", tmp_path)
    expected = "mini: bkd(weight=5.0, wsld=0), lr 0.04, 86.62% on test, +1.23 over ce [−0.20, +2.66]; T = 4"
    assert [*ours("bkd")] == [expected] and [*ours("tks")] == []
    assert (cost("bkd"), cost("kd"), cost("tks")) == ("1.7 (1.2)", "", "")
    cli.show("bkd")
    assert f"\nours, {expected}\n" in capsys.readouterr().out
    monkeypatch.setattr(catalogue, "RESULTS", tmp_path / "none")
    cli.show("bkd")
    out = capsys.readouterr().out
    assert "\nours, " not in out, out[out.find("\nours, ") :]
    assert "Evidence: code" in out and "wsld tau^2" in out and "share of channels dropped" in out


def test_list_shows_year_paper_and_evidence(capsys):
    cli.list_("methods")  # not a terminal: a line for each
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bkd "))
    assert "Xu et al. 2024, arXiv:2407.09083" in line and " code " in line and line.rstrip().endswith("dropped.")


def test_a_narrow_terminal_cuts_no_name(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    cli.list_("methods")
    words = capsys.readouterr().out.split()
    assert set(METHODS) | {"arXiv:2407.09083", "openreview:kKLnXRCd20", "reconstruction"} <= set(words)
    assert {"(BKDSNN):", "(SAMD),", "channels"} <= set(words)
