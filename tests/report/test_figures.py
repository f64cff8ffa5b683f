"""Figures of more rows than usual."""

import warnings

import numpy as np

from spikedistill.report import figures


def test_many_rows_find_room():
    rows = {f"method_{i}": [0.5, 0.6, 0.7 + 0.001 * i] for i in range(25)}
    points = [{"name": n, "accuracy": a[-1], "spread": 0.01, "cost": 30.0 - i} for i, (n, a) in enumerate(rows.items())]
    points.append({"name": "far_off", "accuracy": 0.4, "spread": None, "cost": 40.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that leaves no room for the axes
        drawn = [figures.steps(rows, 0.8), figures.learning(rows), figures.pareto(points, [("cost", "cost")])]
        drawn = [figures.inline(figure, "many") for figure in drawn]
    assert all(name in drawn[0] and name in drawn[1] for name in rows)
    assert "method_24" in drawn[2] and "method_3" not in drawn[2]  # the best and cheapest is named, the beaten are not
    assert "below: far_off 40.00" in drawn[2]


def test_all_steps_of_one_network_are_drawn():
    points = [
        {"name": f"t = {t}", "accuracy": 0.8 if t > 2 else 0.1, "spread": None, "cost": float(t)} for t in range(1, 17)
    ]
    drawn = figures.inline(figures.pareto(points, [("cost", "cost")], joined=True), "joined")
    assert all(f"t = {t}<" in drawn for t in range(1, 17)) and "below" not in drawn


def test_equal_points_do_not_beat_each_other():
    points = [{"name": n, "accuracy": a, "cost": c} for n, a, c in (("a", 0.8, 1.0), ("b", 0.8, 1.0), ("c", 0.8, 2.0))]
    (axes,) = figures.pareto(points, [("cost", "cost")], part="validation").axes
    assert len([line for line in axes.lines if line.get_markersize() == 11]) == 2
    assert axes.get_ylabel() == "validation accuracy [%]"


def test_confusion_of_many_classes_has_a_scale_in_percent():
    drawn = figures.confusion(np.eye(26, dtype=int), [str(i) for i in range(26)])
    axes, bar = drawn.axes
    assert axes.images[0].get_array().max() == 100 and bar.get_ylabel() == "[%]"
