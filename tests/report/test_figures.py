"""Figures of more rows than usual."""

import re
import warnings
from pathlib import Path

import numpy as np
import torch

from spikedistill.report import figures, page


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
    (axes,) = figures.pareto(points, [("cost", "cost")], joined=True).axes
    assert len(axes.containers) == 16 and [text.get_text() for text in axes.texts] == ["t = 1", "t = 3", "t = 16"]
    (axes,) = figures.pareto(points[:4], [("cost", "cost")], joined=True).axes
    assert len(axes.texts) == 4


def test_equal_points_do_not_beat_each_other():
    points = [{"name": n, "accuracy": a, "cost": c} for n, a, c in (("a", 0.8, 1.0), ("b", 0.8, 1.0), ("c", 0.8, 2.0))]
    (axes,) = figures.pareto(points, [("cost", "cost")], part="validation").axes
    assert len([line for line in axes.lines if line.get_markersize() == 11]) == 2
    assert axes.get_ylabel() == "validation accuracy [%]"


def test_of_many_steps_only_some_are_labelled():
    line = [0.5, 0.6, 0.9, *[0.7] * 12, 0.8]
    (axes,) = figures.steps({"student": line}).axes
    assert {text.get_text() for text in axes.texts} == {"50.00", "90.00", "80.00"}
    assert axes.get_xticks().tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    (axes,) = figures.steps({"student": line[:4]}).axes
    assert len(axes.texts) == 4


def test_a_raster_shows_evenly_spaced_neurons_and_ticks_that_fit():
    spikes = torch.zeros(16, 1, 79)
    spikes[0, 0, 78], spikes[1, 0, 0], spikes[2, 0, 41] = 1, 1, 1
    axes = figures.raster(torch.rand(1, 1, 4, 4), {"layer": spikes}, ["a"]).axes[1]
    (marks,) = axes.collections
    assert {t for t, _ in marks.get_offsets().tolist()} >= {2, 3} and max(n for _, n in marks.get_offsets()) > 19
    assert len(axes.get_xticks()) == 8
    small = figures.raster(torch.rand(1, 1, 4, 4), {"layer": torch.ones(3, 1, 5)}, ["a"]).axes[1]
    assert len(small.collections[0].get_offsets()) == 15 and small.get_xticks().tolist() == [1, 2, 3]


def test_numbers_of_the_confusion_are_read_on_a_light_page_and_on_a_dark_one():
    def luminance(colour):
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    template = (Path(page.__file__).parent / "page.html").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): #(\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", template, re.S)
    )
    axes = figures.confusion(np.array([[10, 0], [10, 0]]), ["a", "b"]).axes[0]
    for names in (light, dark):
        colours = {k: [int(v[i : i + 2], 16) / 255 for i in (0, 2, 4)] for k, v in names.items()}
        for patch, key in zip(axes.patches, ("blue", "orange")):
            alpha = patch.get_alpha()
            mixed = [alpha * c + (1 - alpha) * p for c, p in zip(colours[key], colours["card"])]
            low, high = sorted((luminance(mixed), luminance(colours["ink"])))
            assert (high + 0.05) / (low + 0.05) > 4.5


def test_names_are_text_that_finds_room(tmp_path):
    name, file = "a $b$ of some thirty characters", tmp_path / 'x" onload="alert(1).svg'
    sample = {
        "image": torch.rand(1, 4, 4),
        "label": name,
        "student": {name: 0.5, "c": 0.5},
        "teacher": {name: 1.0, "c": 0},
    }
    drawn = figures.disagreements([sample])
    drawn.draw_without_rendering()
    assert drawn.axes[1].get_position().width * 7.6 > 0.7  # inches
    assert "a $b$ of some\u2026 *" in figures.inline(
        drawn, "some_names"
    ) and 'aria-label="some names"' in figures.inline(drawn, "some_names")
    file.write_text("<svg/>")
    assert 'alt="x&quot; onload=&quot;alert(1)"' in figures.embedded(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of letters that matplotlib's font does not have
        figures.save(figures.confusion(np.eye(2, dtype=int), ["\u732b", "$x_{$"]), tmp_path, "saved")
    assert (
        ">\u732b<" in (tmp_path / "saved.svg").read_text(encoding="utf-8") and (tmp_path / "saved.pdf").stat().st_size
    )
    figures.accuracies([{"name": "a$b$c", "accuracies": [0.5], "rate": 0.1}], tmp_path / "a.svg", "of $a_{$")


def test_a_single_epoch_has_one_tick():
    drawn = figures.curves([{"epoch": 0, "loss": 1.0, "accuracy": 0.5}], 1)
    drawn.draw_without_rendering()
    low, high = drawn.axes[0].get_xlim()
    assert [t for t in drawn.axes[0].get_xticks() if low <= t <= high] == [1]


def test_powers_on_an_axis_are_numbers():
    points = [{"name": str(i), "accuracy": 0.5 + i / 10, "cost": 10.0**i} for i in range(4)]
    drawn = figures.inline(figures.pareto(points, [("cost", "cost")]), "powers")
    assert "mathdefault" not in drawn and ">100<" in drawn


def test_confusion_of_many_classes_has_a_scale_in_percent():
    drawn = figures.confusion(np.eye(26, dtype=int), [str(i) for i in range(26)])
    axes, bar = drawn.axes
    assert axes.images[0].get_array().max() == 100 and bar.get_ylabel() == "[%]"
