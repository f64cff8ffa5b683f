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
