"""Intervals and verdicts, against printed tables and by hand."""

import pytest

from spikedistill.report import comparison, tables
from spikedistill.report.paired import difference, t_quantile, t_within


@pytest.mark.parametrize(
    "confidence, df, printed",
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 4, 2.776), (0.99, 7, 3.499), (0.9, 30, 1.697), (0.975, 3, 4.177)],
)
def test_quantiles_are_those_of_printed_tables(confidence, df, printed):
    assert t_quantile(confidence, df) == pytest.approx(printed, abs=5e-4)
    assert t_within(t_quantile(confidence, df), df) == pytest.approx(confidence)


def test_a_paired_difference_by_hand():
    d = difference([0.5, 0.6, 0.7], [0.4, 0.5, 0.3])
    assert d.mean == pytest.approx(0.2) and d.spread == pytest.approx(0.03**0.5)
    half = 4.302653 * 0.03**0.5 / 3**0.5
    assert (d.low, d.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half)) and d.covers_zero
    assert difference([0.5], [0.4]).low is None and difference([0.5], [0.4]).covers_zero
    with pytest.raises(ValueError):
        difference([0.5, 0.6], [0.4])


def test_equal_differences_of_few_images_are_no_certainty():
    assert not difference([0.5, 0.6], [0.4, 0.5]).covers_zero
    assert difference([0.5, 0.6], [0.4, 0.5], resolution=0.1).covers_zero


def result(accuracy, **more):
    ops = {"ac": 10.0, "mac": 2.0, "dense": 40.0}
    return {
        "test": {"accuracy": accuracy, "samples": 1000, "by_step": [accuracy / 2, accuracy]},
        "valid": {"accuracy": accuracy},
        "activity": {"rate": 0.1, "operations": ops},
        "train_seconds": 3.0,
        "peak_memory_bytes": 1e6,
        "parameters": {"student": 5, "training_only": 7},
        "best_epoch": 2,
        "teacher_calls": 1.0,
    } | more


def results(**methods):
    return {name: dict(enumerate(map(result, values))) for name, values in methods.items()}


def test_no_winner_is_named_while_an_interval_covers_zero():
    runs = results(ce=[0.80, 0.81, 0.82], kd=[0.81, 0.80, 0.84])
    rows = comparison.rows_of(runs, "ce")
    assert rows[1]["verdict"] == "unclear" and rows[1]["difference"]["mean"] == pytest.approx(0.02 / 3)
    words = " ".join(comparison.conclusions(runs, rows, "ce"))
    assert "Not shown to differ from ce: kd" in words and "No winner" in words and "best of" not in words


def test_a_winner_beats_every_row_and_a_worse_row_is_said():
    runs = results(ce=[0.80, 0.81, 0.82], kd=[0.850, 0.861, 0.871], bad=[0.70, 0.711, 0.72])
    words = " ".join(comparison.conclusions(runs, comparison.rows_of(runs, "ce"), "ce"))
    assert "kd is better than ce" in words and "bad is worse than ce" in words and "kd is the best of the 3" in words


def test_the_best_is_named_with_the_confidence_that_is_asked_for():
    runs = results(kd=[0.81, 0.83, 0.85], tet=[0.80, 0.81, 0.82])  # no run of the baseline is finished
    rows = comparison.rows_of(runs, "ce", 0.8)
    assert "No winner" in " ".join(comparison.conclusions(runs, rows, "ce"))
    assert "kd is the best of the 2" in " ".join(comparison.conclusions(runs, rows, "ce", 0.8))


def test_verdicts_ask_for_more_the_more_rows_are_compared():
    one = results(ce=[0.80, 0.81, 0.82], kd=[0.815, 0.829, 0.843])
    many = one | results(a=[0.8, 0.81, 0.8], b=[0.8, 0.81, 0.8], c=[0.8, 0.81, 0.8], d=[0.8, 0.81, 0.8])
    alone, among = (next(r for r in comparison.rows_of(x, "ce") if r["name"] == "kd") for x in (one, many))
    assert alone["difference"] == among["difference"] and alone["difference"]["low"] > 0
    assert alone["verdict"] == "better" and among["verdict"] == "unclear"
    assert among["verdict_confidence"] == pytest.approx(0.99)


def test_pairs_are_the_seeds_that_both_rows_have():
    runs = {"ce": {0: result(0.8), 1: result(0.7)}, "kd": {1: result(0.75), 2: result(0.9)}}
    row = comparison.rows_of(runs, "ce")[1]
    assert row["difference"]["seeds"] == [1] and row["difference"]["mean"] == pytest.approx(0.05)
    assert row["verdict"] == "one seed" and row["accuracies"] == [0.75, 0.9]


def test_the_legend_has_the_confidence_that_the_verdicts_were_taken_at():
    runs = results(ce=[0.80, 0.81, 0.82], kd=[0.815, 0.829, 0.843]) | {"half": {0: result(0.9)}}
    rows = comparison.rows_of(runs, "ce", 0.975)
    assert rows[1]["verdict_confidence"] == 0.975
    assert "A verdict asks for" not in " ".join(comparison.legend(rows, 0.975, 1))
    assert "97.5% interval" in comparison.tables(rows, "", "ce", 0.975)[0].heads
    assert "99.9% interval" in comparison.tables(rows, "", "ce", 0.999)[0].heads
    both = comparison.rows_of(runs | results(tet=[0.8, 0.8, 0.8]), "ce", 0.95)
    assert "97.50% confidence, because 2 rows" in " ".join(comparison.legend(both, 0.95, 1))


def test_latex_escapes_and_csv_reads_back():
    table = tables.Table(["a_b", "%"], [["x & y ±", "1,5"]], "t")
    assert r"a\_b & \%" in tables.latex(table) and r"x \& y $\pm$ & 1,5" in tables.latex(table)
    assert tables.csv(table).splitlines()[1] == 'x & y ±,"1,5"'
