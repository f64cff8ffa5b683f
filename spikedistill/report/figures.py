"""Figures from tables of results, in colours that colour-blind readers tell apart."""

from pathlib import Path
from typing import Any

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#7f7f7f"  # of the Okabe-Ito palette


def accuracies(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """A dot per seed and a bar at the mean of each row's "accuracies" (shares). Networks without spikes are grey."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 * len(rows) + 1.1), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        values = [100 * a for a in row["accuracies"]]
        colour = GREY if row["rate"] is None else BLUE if i == 2 else ORANGE
        mean = sum(values) / len(values)
        axes.plot(values, [i] * len(values), "o", color=colour, alpha=0.55, markersize=6, markeredgewidth=0)
        axes.plot([mean, mean], [i - 0.28, i + 0.28], color=colour, linewidth=2.5)
        axes.annotate(f"{mean:.2f}", (max(values), i), (8, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy [%]; a dot is a seed, a bar the mean")
    axes.set_title(title, fontsize=10, loc="left")
    axes.margins(x=0.12, y=0.1)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path)


def speed(networks: list[dict[str, Any]], steps: list[dict[str, Any]], path: Path) -> None:
    """Left: a training step of each library, "train" {"ms", "low", "high"}. Right: time and saved memory by T."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.36 * len(networks) + 1.3), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, row in enumerate(networks):
        t = row["train"]
        colour = ORANGE if row["name"].startswith("ours") else GREY if row["name"].startswith("ReLU") else BLUE
        left.barh(i, t["ms"], color=colour, xerr=[[t["ms"] - t["low"]], [t["high"] - t["ms"]]], height=0.7)
        left.annotate(f"{t['ms']:.0f}", (t["high"], i), (4, 0), textcoords="offset points", va="center", fontsize=8)
    left.set_yticks(range(len(networks)), [row["name"] for row in networks], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("training step [ms], median and quartiles")
    left.margins(x=0.1)
    at = [row["steps"] for row in steps]
    right.plot(at, [row["train"]["ms"] for row in steps], "o-", color=ORANGE)
    right.set_xlabel("time steps T")
    right.set_ylabel("training step [ms]", color=ORANGE)
    memory = right.twinx()
    memory.plot(at, [row["saved_mib"] for row in steps], "s--", color=BLUE)
    memory.set_ylabel("kept for backward [MiB]", color=BLUE)
    for axes in (right, memory):
        axes.set_ylim(bottom=0)
    for axes in (left, right, memory):
        axes.spines[["top"]].set_visible(False)
    figure.savefig(path)
